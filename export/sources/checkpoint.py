"""Finds the source that MODEL stands for: the built-in model, a diffusers folder, a hub id, a single file, or random
weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import shown

from ..errors import UnknownModelError, UsageError
from . import latent_folder, schedulers, textless_folder, weights
from .diffusers_folder import DiffusersFolder
from .hub import download
from .latent_folder import LatentFolder
from .presets import ARCHITECTURES
from .random_weights import BUILT_IN, RandomWeights
from .reading import read_object, reading
from .single_file import CompVisFile, check_options
from .source import Source
from .textless_file import TextlessFile, is_textless
from .textless_folder import TextlessFolder

SHAPES = BUILT_IN.with_name("shapes")
"""The second built-in model, a diffusers folder: classes instead of texts, on pixels."""

__all__ = ["BUILT_IN", "SHAPES", "CompVisFile", "DiffusersFolder", "RandomWeights", "Source", "resolve"]


def resolve(
    model: str | None,
    random_weights: bool = False,
    tokenizer: Path | None = None,
    prediction_type: str | None = None,
    scheduler: str | None = None,
    ema: bool = False,
    vae: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
) -> Source:
    """The source that MODEL stands for. `tokenizer`, `prediction_type`, `ema` (the running averages of the U-Net) and
    `vae` (a file or folder that stands in for the file's) are for single files of Stable Diffusion.
    `scheduler`, a name in engine.sampling.catalog.SAMPLERS or a diffusers class name, replaces the model's own.
    loras: files of adapters that go into the model, each with its weight.

    Raises UnknownModelError, UnreadableModelError, UnsupportedModelError, UnsafePickleError, NoNetworkError,
    UsageError, or engine's AdapterError.
    """
    source = _resolve(
        model,
        random_weights,
        FileOptions(tokenizer, prediction_type, ema, vae),
        None if scheduler is None else schedulers.asked_sampler(scheduler),
    )
    given = {
        "tokenizer": tokenizer and str(tokenizer.resolve()),
        "prediction-type": prediction_type,
        "scheduler": scheduler,
        "vae": vae and str(vae.resolve()),
        "ema": "yes" if ema else None,
    }
    source.options = {name: value for name, value in given.items() if value}
    source.fuse(loras)
    return source


@dataclass(frozen=True)
class FileOptions:
    """The options that are only for single files of Stable Diffusion."""

    tokenizer: Path | None
    prediction_type: str | None
    ema: bool
    vae: Path | None

    def refuse(self, what: str) -> None:
        """UsageError for the first that was given with another model."""
        given = {
            "tokenizer": self.tokenizer,
            "prediction-type": self.prediction_type,
            "ema": self.ema or None,
            "vae": self.vae,
        }
        for option, value in given.items():
            if value is not None:
                raise UsageError(
                    f"--{option}{'' if value is True else f' {value}'} is for a single file of Stable Diffusion "
                    f"({_suffixes()}); {what} says this itself, or has no use for it, so leave the option out"
                )


def _resolve(model: str | None, random_weights: bool, options: FileOptions, sampler: str | None) -> Source:
    if random_weights:
        if model not in ARCHITECTURES:
            raise UsageError(
                f"--random-weights needs a known architecture, not {model!r}; known: {', '.join(ARCHITECTURES)}"
            )
        options.refuse(f"{model} --random-weights")
        return RandomWeights(model, sampler=sampler)
    if model is not None and (file := _checkpoint(model)) is not None:
        check_options(options.tokenizer, options.prediction_type)
        if is_textless(file):
            options.refuse(f"{model}, a model without texts,")
            return TextlessFile(file, sampler)
        return CompVisFile(file, options.tokenizer, options.prediction_type, sampler, options.ema, options.vae)
    options.refuse("the built-in model" if model is None else model)
    if model is None:
        return DiffusersFolder(BUILT_IN, "demo", {"kind": "built-in", "id": "demo"}, sampler)
    path = Path(model)
    if path.is_dir():
        name = path.resolve().name
        return open_folder(path, name, {"kind": "folder", "id": name, "path": str(path.resolve())}, sampler)
    if model == SHAPES.name:
        return open_folder(SHAPES, model, {"kind": "built-in", "id": model}, sampler)
    if model in ARCHITECTURES:
        raise UnknownModelError(
            f"{model} is an architecture, not a model; add --random-weights to build it without trained weights"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not path.parent.is_dir():
        return open_folder(download(model), model.split("/")[1], {"kind": "hub", "id": model}, sampler)
    if {"/", os.sep} & set(model):
        raise UnknownModelError(f"there is no file or folder {model}; check the path, or pass a hub id like owner/name")
    raise UnknownModelError(
        f"{model!r} is no folder or file here, and not a hub id like owner/name; the second built-in "
        f"model is {SHAPES.name}; known architectures for --random-weights: {', '.join(ARCHITECTURES)}"
    )


def open_folder(folder: Path, name: str, origin: dict[str, str], sampler: str | None) -> Source:
    """The model in a diffusers folder, of the kind that its model_index.json names."""
    kind = reading(folder, lambda: _kind(folder / "model_index.json"))
    if kind in textless_folder.PIPELINES:
        return TextlessFolder(folder, name, origin, sampler)
    if kind == latent_folder.PIPELINE:
        return LatentFolder(folder, name, origin, sampler)
    return DiffusersFolder(folder, name, origin, sampler)


def _kind(index: Path) -> str:
    """The `_class_name` in a model_index.json. "" where there is none, which `DiffusersFolder` explains."""
    found = read_object(index).get("_class_name") if index.is_file() else None
    return found if isinstance(found, str) else ""


def _checkpoint(model: str) -> Path | None:
    """The single file that MODEL stands for. None if it stands for something else. UnknownModelError for a file that
    cannot be a model."""
    path = Path(model)
    try:
        exists, folder = path.exists(), path.is_dir()
    except OSError as error:  # too long, or in a folder that may not be read
        raise UnknownModelError(f"{shown(model)} cannot be read: {error.strerror}") from error
    known = path.suffix.lower() in weights.CHECKPOINT_SUFFIXES or weights.is_index(path)
    if not model or (exists and not folder and not path.is_file()):
        raise UnknownModelError(
            f"{model!r} is neither a folder nor a file; pass a diffusers folder or a single file ({_suffixes()})"
        )
    if exists and not folder and not known:
        raise UnknownModelError(
            f"{model} is a file of a kind that is not supported ({path.suffix or 'no suffix'}); a single file must be "
            "one of "
            f"{_suffixes()}, and a diffusers model is a folder"
        )
    if not exists and known:
        raise UnknownModelError(f"there is no file {model}; check the path")
    return path if exists and not folder else None


def _suffixes() -> str:
    return ", ".join(weights.CHECKPOINT_SUFFIXES)
