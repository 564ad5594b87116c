"""Finds the weights of a model that an adapter's file changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterFamilyError, shown
from ..weights import Weight
from .change import Change
from .files import AdapterFile, Layer, Ordered
from .names import aliases

Tables = Mapping[str, Mapping[str, tuple[Weight, ...]]]
"""The weights of each part of a model ("unet", "text_encoder"), by parameter."""

Target = tuple[str, str]
"""A part and one of its parameters."""

TRAINED_FOR = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
"""By the width of the text's vectors, which the keys and values of the second attention take."""

OLD_ORDER = re.compile(r"(.*\.transformer_blocks\.\d+)\.(attn1|ff|attn2)\.")
UNET_CLASSES = {
    "CrossAttention": r".*\.attn[12]\.(to_[qkv]|to_out\.0)",
    "Attention": r".*\.attn[12]\.(to_[qkv]|to_out\.0)",
    "GEGLU": r".*\.ff\.net\.0\.proj",
    "CLIPAttention": r".*\.self_attn\.(q|k|v|out)_proj",
    "CLIPMLP": r".*\.mlp\.fc[12]",
    "Transformer2DModel": r".*\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out)",
}
"""Linear layers inside modules of a class, by the class's name in cloneofsimo's files."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a file changes in one model. unused: its keys that change nothing."""

    file: Path
    changes: Mapping[Target, Change]
    unused: tuple[str, ...]


def fit(file: AdapterFile, tables: Tables) -> Fitted:
    """AdapterFamilyError if the file was trained for another family of models."""
    changes: dict[Target, Change] = {}
    unused = list(file.unknown)
    names = {part: aliases(_modules(table)) for part, table in tables.items()}
    for layer in file.layers:
        part, module = _module(layer, names)
        found = [] if module is None else _targets(layer, part, module, tables[part])
        if found:
            changes.update(found)
        else:
            unused.append(_written(layer))
    for ordered in file.ordered:
        changes.update(_counted(ordered, tables))
    _require_family(file, changes, tables)
    return Fitted(file.path, changes, tuple(unused))


def _modules(table: Mapping[str, object]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in table))


def _module(layer: Layer, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str | None]:
    """peft's files don't say which part they are about, so every part is asked."""
    parts = [layer.part, *(part for part in names if part != layer.part)] if layer.part == "unet" else [layer.part]
    for part in parts:
        module = names.get(part, {}).get(layer.name)
        if module is not None:
            return part, module
    return layer.part, None


def _targets(layer: Layer, part: str, module: str, table: Mapping[str, object]) -> list[tuple[Target, Change]]:
    found = []
    for change, name in ((layer.change, f"{module}.weight"), (layer.bias, f"{module}.bias")):
        if change is not None and name in table:
            found.append(((part, name), change))
    return found


def _written(layer: Layer) -> str:
    change = layer.change or layer.bias
    return layer.name if change is None else change.layer


def _counted(ordered: Ordered, tables: Tables) -> list[tuple[Target, Change]]:
    """cloneofsimo's layers. When its files were made, diffusers had a block's feed-forward before its second
    attention; now it is the last. The shapes tell which order a file has."""
    table = tables.get(ordered.part, {})
    patterns = [UNET_CLASSES[name] for name in ordered.classes if name in UNET_CLASSES]
    modules = [name for name in _modules(table) if any(re.fullmatch(pattern, name) for pattern in patterns)]
    for candidates in (sorted_as_of_old(modules), modules):
        if len(candidates) == len(ordered.changes) and all(
            _fits(change, table[f"{name}.weight"]) for name, change in zip(candidates, ordered.changes)
        ):
            return [((ordered.part, f"{name}.weight"), change) for name, change in zip(candidates, ordered.changes)]
    raise AdapterFamilyError(
        f"the file has {len(ordered.changes)} layers for the {ordered.part}, in modules of "
        f"{', '.join(ordered.classes)}, and this model has {len(modules)}, or other shapes; load a LoRA that was "
        "trained for this kind of model"
    )


def sorted_as_of_old(modules: Sequence[str]) -> list[str]:
    """The feed-forward of each block between its attentions."""
    order = {"attn1": 0, "ff": 1, "attn2": 2}
    blocks: dict[str, int] = {}

    def key(place_and_name: tuple[int, str]) -> tuple[int, int, int]:
        place, name = place_and_name
        match = OLD_ORDER.match(name)
        if match is None:
            return place, 0, place
        return blocks.setdefault(match[1], place), order[match[2]], place

    return [name for _, name in sorted(enumerate(modules), key=key)]


def _fits(change: Change, weights: Sequence[Weight]) -> bool:
    weight = weights[0]
    rows, columns = weight.shape[::-1] if weight.transposed else weight.shape[:2]
    tensors = change.tensors
    if not {"up", "down"} <= set(tensors):
        return False
    return tensors["up"].shape[:1] + tensors["down"].shape[1:2] == (rows, columns)


def _require_family(file: AdapterFile, changes: Mapping[Target, Change], tables: Tables) -> None:
    own = _width(tables)
    theirs = _trained_width(file)
    if theirs is not None and own is not None and theirs != own:
        raise AdapterFamilyError(
            f"{file.path} was trained for {_described(theirs)}, and this model is {_described(own)}; load a LoRA that "
            "was trained for this kind of model"
        )
    if not changes:
        first = _written(file.layers[0]) if file.layers else ""
        raise AdapterFamilyError(
            f"{file.path} has {len(file.layers)} layers, and this model has none of them (the first is {shown(first)}"
            "); load a LoRA that was trained for this kind of model"
        )


def _width(tables: Tables) -> int | None:
    """The width of the text's vectors in a model, from the first attention to it."""
    for name, (weight, *_) in tables.get("unet", {}).items():
        if name.endswith("attn2.to_k.weight"):
            return weight.shape[0] if weight.transposed else weight.shape[1]
    return None


def _trained_width(file: AdapterFile) -> int | None:
    base = file.metadata.get("ss_base_model_version", "").lower()
    if base.startswith("sdxl") or any(layer.part == "text_encoder_2" for layer in file.layers):
        return 2048
    ordered = (change for one in file.ordered if one.part == "unet" for change in one.changes)
    if any(True for _ in ordered):
        return None
    named = [layer for layer in file.layers if re.search(r"attn2[._]to_k$", layer.name) and layer.change is not None]
    return next(iter(_input_widths(layer.change for layer in named if layer.change is not None)), None)


def _input_widths(changes: Iterable[Change]) -> list[int]:
    downs = [change.tensors["down"].shape for change in changes if "down" in change.tensors]
    return [shape[1] for shape in downs if len(shape) > 1]


def _described(width: int) -> str:
    return f"{TRAINED_FOR.get(width, 'a model')} (a text's vectors have {width} numbers)"
