"""Files of weights: their kind, their tensors, and whether these are what the model needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UnreadableModelError, UnsupportedModelError
from .reading import read_object, reading

NAMES_SHOWN = 5
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
"""Suffixes of single files. The first bytes decide a file's kind; the suffix only says that it holds weights."""

INDEX_SUFFIX = ".safetensors.index.json"

HARMLESS = ("position_ids", "text_projection.weight", "logit_scale")
HARMLESS_PARTS = ("vision_model.", "visual_projection.")
"""Tensors in older files that no graph uses: a buffer, and the rest of a whole CLIP model."""

FROM_TRAINING = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    *(f"numpy.{module}.multiarray.scalar" for module in ("core", "_core")),
    "numpy.dtype",
)
"""What Lightning leaves beside the weights in its checkpoints, SD 1.4's among them. None of it is imported or run."""

VARIANTS = (None, "fp16", "bf16")
"""The endings of weights in diffusers' folders, in the order of preference."""

INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool}
INTEGER_CODES = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"}


def kind(file: Path) -> str:
    """The kind of a file by its first bytes: "safetensors", "zip" (torch.save) or "pickle" (torch.save before 1.6).

    UnreadableModelError for other kinds; it names the kinds that are known.
    """
    head = reading(file, lambda: _head(file))
    if not head:
        raise UnreadableModelError(f"{file} cannot be read: the file is empty; download it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    if head[:4] == b"PK\x03\x04":
        return "zip"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        raise UnreadableModelError(
            f"{file} cannot be read: it is a Git LFS pointer, not the weights; run git lfs pull in its folder"
        )
    if head.lstrip()[:1] == b"<":
        raise UnreadableModelError(
            f"{file} cannot be read: it is a web page (HTML), not weights; the download needed a login or failed, so "
            "download it again"
        )
    raise UnreadableModelError(
        f"{file} cannot be read: it begins with {head[:16]!r}, so it is neither safetensors nor written by torch.save; "
        f"download it again"
    )


def _head(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(64)


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file. Pickles are read by torch's weights-only loader, which refuses code."""
    if is_index(file):
        return {name: value for shard in shards(file) for name, value in read(shard).items()}
    found = kind(file)
    if found == "safetensors":
        return reading(file, lambda: load_file(file))
    content = reading(file, lambda: _read_pickle(file, found == "zip"))
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        raise UnreadableModelError(
            f"{file} holds a {type(weights).__name__}, not tensors by name; save the state_dict of the model"
        )
    tensors = {name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if isinstance(content.get("global_step"), int):
        tensors["global_step"] = torch.tensor(content["global_step"])
    return tensors


class Ignored:
    """Stands for an object in a pickle that is not wanted."""

    def __new__(cls, *arguments: Any) -> Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Keeps nothing."""


def _read_pickle(file: Path, mmap: bool) -> Any:
    """What torch's weights-only loader reads, with what FROM_TRAINING names as Ignored."""
    with torch.serialization.safe_globals([(Ignored, name) for name in FROM_TRAINING]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def is_index(file: Path) -> bool:
    """Whether a file is the index of a checkpoint in several."""
    return file.name.lower().endswith(INDEX_SUFFIX)


def stem(file: Path) -> str:
    """The name of a checkpoint without its suffix."""
    return file.name[: -len(INDEX_SUFFIX)] if is_index(file) else file.stem


def files_of(file: Path) -> tuple[Path, ...]:
    """The files that a checkpoint is in: itself, or the index and those that it names."""
    return (file, *shards(file)) if is_index(file) else (file,)


def names(file: Path) -> set[str]:
    """The names of a checkpoint's tensors, read without them where the kind of file allows it."""
    if is_index(file):
        return {name for shard in shards(file) for name in names(shard)}
    if kind(file) == "safetensors":
        with reading(file, lambda: safe_open(file, "pt")) as tensors:
            return set(tensors.keys())
    return set(read(file))


def check_floats(file: Path) -> None:
    """UnsupportedModelError where a file holds integers: quantised weights mean nothing without their scales."""
    if kind(file) == "safetensors":
        with reading(file, lambda: safe_open(file, "pt")) as tensors:
            codes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        integers = {name: code for name, code in codes.items() if code in INTEGER_CODES}
    else:
        integers = integers_of(read(file))
    refuse_integers(file, integers)


def integers_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The types of the tensors that hold integers."""
    return {name: str(value.dtype) for name, value in weights.items() if value.dtype in INTEGERS}


def refuse_integers(what: Path, integers: Mapping[str, str]) -> None:
    wrong = {
        name: code
        for name, code in integers.items()
        if not name.endswith(("position_ids", "global_step", "num_batches_tracked"))
    }
    if wrong:
        raise UnsupportedModelError(
            f"{what} holds integers: {_some(f'{name} ({code})' for name, code in wrong.items())}; quantised weights "
            "are not "
            f"supported, so use the model's float16 or float32 files"
        )


@dataclass(frozen=True)
class WeightFiles:
    """The files that one part's weights are read from, and the options that make from_pretrained read just these."""

    files: tuple[Path, ...]
    options: Mapping[str, Any]


def choose(folder: Path, safetensors: str, pickle: str) -> WeightFiles:
    """The weights of a part: safetensors before pickles, whole numbers of bits before the "fp16" variant; one file or
    an index of several; "bf16" comes after "fp16". `safetensors` and `pickle` are the files' names, for example
    model.safetensors and pytorch_model.bin."""
    tried = []
    for name, safe in ((safetensors, True), (pickle, False)):
        stem, suffix = name.rsplit(".", 1)
        for variant in VARIANTS:
            options = {"use_safetensors": safe, **({"variant": variant} if variant else {})}
            middle = f".{variant}" if variant else ""
            single, index = folder / f"{stem}{middle}.{suffix}", folder / f"{name}.index{middle}.json"
            if single.exists():
                return WeightFiles((single,), options)
            if index.exists():
                return WeightFiles(shards(index), options)
            tried.append(single.name)
    raise UnreadableModelError(
        f"{folder} has no weights: none of {', '.join(tried)}, nor an index of several files; the model is incomplete, "
        "so "
        f"download or save it again"
    )


def shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names. UnreadableModelError for a garbled index, and for files that are missing."""
    named = read_object(index).get("weight_map")
    if (
        not isinstance(named, dict)
        or not named
        or not all(isinstance(name, str) and Path(name).name == name for name in named.values())
    ):
        raise UnreadableModelError(
            f"{index} has no weight_map from tensors to files in its folder; download or save the model again"
        )
    files = tuple(index.with_name(name) for name in sorted(set(named.values())))
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UnreadableModelError(
            f"{index} names {len(files)} files, and {', '.join(missing)} is not beside it; download the whole model"
        )
    return files


def check_loading(what: Path, info: Mapping[str, Any]) -> None:
    """UnreadableModelError if from_pretrained's loading info shows that weights and configuration do not match."""
    check_fit(
        what,
        info["missing_keys"],
        info["unexpected_keys"],
        [(name, found, wanted) for name, found, wanted in info["mismatched_keys"]],
    )
    if info.get("error_msgs"):
        raise UnreadableModelError(f"{what} cannot be read: {'; '.join(map(str, info['error_msgs']))}")


def check_fit(
    what: Path, missing: Iterable[str], unexpected: Iterable[str], mismatched: Sequence[tuple[str, Any, Any]]
) -> None:
    """UnreadableModelError that names the tensors which a model lacks, does not know, or has in another shape."""
    missing = sorted(missing)
    unknown = sorted(name for name in unexpected if not name.endswith(HARMLESS) and not name.startswith(HARMLESS_PARTS))
    shapes = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in sorted(mismatched)]
    problems = [
        f"{len(names)} {words} ({_some(names)})"
        for names, words in (
            (missing, "of the model's tensors are missing"),
            (unknown, "are not the model's"),
            (shapes, "have another shape"),
        )
        if names
    ]
    if problems:
        raise UnreadableModelError(
            f"{what}: the weights do not fit the model's configuration: {'; '.join(problems)}. Get the weights and the "
            f"configuration that belong together, or save the model again"
        )


def check_finite(what: Path, model: nn.Module) -> None:
    """UnreadableModelError that names weights which are NaN or infinite."""
    suspect = {
        name: value
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not math.isfinite(value.sum())
    }
    wrong = [
        name for name, value in suspect.items() if not torch.isfinite(value).all()
    ]  # a sum may overflow where no value is infinite
    if wrong:
        raise UnreadableModelError(
            f"{what}: {len(wrong)} tensors hold values that are not finite ({_some(wrong)}); the file is damaged, so "
            "download it again"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    )
