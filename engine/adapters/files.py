"""Reads files of adapters: kohya's, LyCORIS's, diffusers' old and new, peft's and cloneofsimo's."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AdapterError, TensorFileError, shown
from ..text.tensors import StoredTensor, read_safetensors, safetensors_metadata
from ..text.torch_file import ZIP, read_torch
from .change import Change
from .names import component, split

MAX_PICKLE = 1 << 30
"""The most bytes of a .pt or .bin, which are read whole."""

PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"
BUNDLED = "bundle_emb."
SIMO = re.compile(r"(unet|text_encoder):(\d+):(up|down|rank)")

Tensors = dict[str, StoredTensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """The change of one layer. part: "unet", "text_encoder" or "text_encoder_2". name: without the format's prefix.
    bias: the change of its bias, if there is one."""

    part: str
    name: str
    change: Change | None
    bias: Change | None


@dataclass(frozen=True, eq=False)
class Ordered:
    """One layer of cloneofsimo's files, which count layers: the n-th of the part's layers within modules of these
    classes."""

    part: str
    classes: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """What a file changes. unknown: keys of no known format. metadata: the texts beside the tensors."""

    path: Path
    layers: tuple[Layer, ...]
    ordered: tuple[Ordered, ...]
    unknown: tuple[str, ...]
    metadata: Mapping[str, str]


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """The adapter in a .safetensors, .pt or .bin, or in a folder of peft or diffusers. The tensors stay in the file
    until they are needed. AdapterError if it holds none, TensorFileError if it can't be read."""
    file, config = _file(Path(path))
    try:
        tensors, metadata = _content(file)
        found = _read(file, tensors, metadata, config)
    except (TensorFileError, AdapterError) as error:
        raise type(error)(f"{file}: {error}") from error
    return found


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that `read_adapter` reads. AdapterError if there are none."""
    file, config = _file(path)
    return (file, file.with_name(PEFT_CONFIG)) if config else (file,)


def _file(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file of tensors, and peft's configuration if it is beside it."""
    advice = "pass a .safetensors, .pt or .bin of a LoRA, or peft's folder"
    try:
        file = path
        if path.is_dir():
            there = [path / name for name in PEFT_FILES if (path / name).is_file()]
            if not there:
                raise AdapterError(f"{path} is a folder without {', '.join(PEFT_FILES)}; {advice}")
            file = there[0]
        if not file.is_file() or not file.stat().st_size:
            raise AdapterError(f"{file} is no file, or is empty; {advice}")
        config = file.with_name(PEFT_CONFIG)
        if file.name not in PEFT_FILES[:2] or not config.is_file():
            return file, {}
        return file, _object(config.read_text(encoding="utf-8"), PEFT_CONFIG)
    except (OSError, UnicodeError, ValueError) as error:
        raise AdapterError(f"{shown(str(path))} can't be read ({error}); {advice}") from error


def _object(text: str, what: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not JSON ({error}); get it again") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{what} is no JSON object; get it again")
    return found


def _content(file: Path) -> tuple[Tensors, dict[str, str]]:
    data = np.memmap(file, np.uint8, "r").data
    start = bytes(data[:9])
    if not start.startswith(ZIP) and (not start.startswith(b"\x80") or start.endswith(b"{")):
        return read_safetensors(data), safetensors_metadata(data)
    if len(data) > MAX_PICKLE:
        raise TensorFileError(
            f"the file has {len(data) >> 20} MiB, and at most {MAX_PICKLE >> 20} of a pickle are read"
        )
    found = read_torch(data)
    for name in ("state_dict", "lora"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping):
        raise AdapterError(f"the file holds a {type(found).__name__}, and no tensors by name")
    return {str(name): value for name, value in found.items() if isinstance(value, StoredTensor)}, {}


def _read(file: Path, tensors: Tensors, metadata: Mapping[str, str], config: Mapping[str, Any]) -> AdapterFile:
    configs = {"": config} if config else _diffusers_configs(metadata)
    layers: dict[str, Tensors] = {}
    simo: dict[tuple[str, int], Tensors] = {}
    unknown = []
    for key, tensor in tensors.items():
        counted, named = SIMO.fullmatch(key), split(key)
        if counted:
            simo.setdefault((counted[1], int(counted[2])), {})[counted[3]] = tensor
        elif named:
            layers.setdefault(named[0], {})[named[1]] = tensor
        elif not key.startswith(BUNDLED):
            unknown.append(key)
    read = [_layer(layer, found, configs) for layer, found in layers.items()]
    unknown += [layer for layer, made in zip(layers, read) if made is None]
    made = tuple(layer for layer in read if layer is not None)
    ordered = tuple(_ordered(part, simo, metadata) for part in sorted({part for part, _ in simo}))
    if not made and not ordered:
        raise AdapterError(
            f"none of its {len(tensors)} tensors has a name that LoRA, LyCORIS, diffusers or peft use (the first is "
            f"{shown(next(iter(tensors), 'missing'))}): it is no adapter; for a whole model run "
            "python build_engines.py FILE"
        )
    return AdapterFile(file, made, ordered, tuple(unknown), metadata)


def _diffusers_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configuration of each part that diffusers writes into the file: keys such as "unet.lora_alpha"."""
    if DIFFUSERS_METADATA not in metadata:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _object(metadata[DIFFUSERS_METADATA], DIFFUSERS_METADATA).items():
        part, _, name = key.partition(".")
        configs.setdefault(part, {})[name] = value
    return configs


def _layer(full: str, tensors: Tensors, configs: Mapping[str, Mapping[str, Any]]) -> Layer | None:
    """None for tensors that are no change of a layer, such as those of a whole model."""
    part, name = component(full)
    config = configs.get(part, configs.get("", {}))
    tensors = dict(tensors)
    alpha, rank = _alpha(tensors.pop("alpha", None), name, config)
    bias = tensors.pop("diff_b", None)
    stabilized = bool(config.get("use_rslora", False))
    if "ia3_l" in tensors:
        on_input = _feeds_forward(name, tensors["ia3_l"].shape, config)
        tensors["ia3_in" if on_input else "ia3_out"] = tensors.pop("ia3_l")
    if set(tensors) <= {"weight", "scale"}:
        change = None
    else:
        change = Change(full, tensors, alpha, rank, stabilized)
        change.kind  # noqa: B018  a layer with half of its tensors is an error now
    if change is None and bias is None:
        return None
    if change is not None and change.kind == "ia3_on_output":
        return Layer(part, name, change, change)
    return Layer(part, name, change, Change(full, {"diff": bias}) if bias is not None else None)


def _feeds_forward(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether peft's (IA)^3 multiplies a layer's input, as it does in feed-forward modules."""
    modules = config.get("feedforward_modules")
    if isinstance(modules, str):
        return _matches(modules, name)
    if isinstance(modules, list):
        return any(name.endswith(str(one)) for one in modules)
    return len(shape) == 2 and shape[0] == 1


def _alpha(tensor: StoredTensor | None, name: str, config: Mapping[str, Any]) -> tuple[float | None, int | None]:
    """Alpha and the rank, from the file's tensor or from peft's configuration, whose patterns name ends of layers."""
    if tensor is not None or not config:
        return None if tensor is None else tensor.number(), None
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", config.get("alpha")))
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r"))
    if not all(value is None or _is_size(value) for value in (alpha, rank)):
        raise AdapterError(
            f"{PEFT_CONFIG} has alpha {shown(alpha)} and r {shown(rank)}, which must be numbers from 0; get it again"
        )
    return alpha, int(rank) if rank else None


def _is_size(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """peft's rule: the first pattern that is the name or an end of it behind a dot."""
    if not isinstance(patterns, Mapping):
        return default
    return next((value for pattern, value in patterns.items() if _matches(rf"(.*\.)?({pattern})", name)), default)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise AdapterError(f"{PEFT_CONFIG} has {shown(pattern)}, which is no pattern; get it again") from error


def _ordered(part: str, simo: Mapping[tuple[str, int], Tensors], metadata: Mapping[str, str]) -> Ordered:
    numbers = sorted(number for one, number in simo if one == part)
    if numbers != list(range(len(numbers))):
        raise AdapterError(
            f"layers of the {part} are missing: it has the numbers {_short(numbers)}; get the file again"
        )
    try:
        classes = tuple(map(str, json.loads(metadata.get(part, ""))))
    except (ValueError, TypeError):
        raise AdapterError(f"its metadata do not say which classes of modules the {part}'s layers are in") from None
    changes = []
    for number in numbers:
        tensors = simo[part, number]
        changes.append(Change(f"{part}:{number}", {name: tensors[name] for name in ("up", "down") if name in tensors}))
    return Ordered(part, classes, tuple(changes))


def _short(numbers: Iterable[int]) -> str:
    texts = list(map(str, numbers))
    return ", ".join(texts if len(texts) < 8 else [*texts[:7], "..."])
