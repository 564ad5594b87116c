"""The inputs of a call, arrays and pictures: a picture's file has their hashes and the names of their files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .depth import Depth
from .errors import ImageError, MetadataError, ReproductionError, shown
from .init_image import InitImage
from .inpainting import Inpaint
from .masks import read_masks
from .metadata import reason
from .pixels import FromFile, Readable
from .request import Request
from .seen import Seen


@dataclass(frozen=True)
class Array:
    """An input: what tells it from others, not its values. file: the name of the picture's file as the call had it,
    None for what is from none; it does not count when two are compared."""

    sha256: str
    shape: tuple[int, ...]
    dtype: str
    file: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, values: np.ndarray | Readable, file: str | None = None) -> Array:
        """The SHA-256 is that of the values, one row after the other: of a picture that of its pixels, so that the same
        picture in another format is the same."""
        array = np.asarray(values)
        return cls(
            hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(), array.shape, str(array.dtype), file
        )


Arrays = tuple[Array, ...]


def _images(init: InitImage) -> Arrays:
    if init.latents is not None:
        return (Array.of(init.latents),)
    return tuple(Array.of(picture, file) for picture, file in zip(init.pictures, init.files))


def _array(values: np.ndarray | None) -> Arrays:
    return () if values is None else (Array.of(values),)


def _depths(seen: Seen | None) -> Arrays:
    return tuple(Array.of(depth) for depth in seen.maps) if isinstance(seen, Depth) else ()


def _masks(inpaint: Inpaint) -> Arrays:
    return tuple(Array.of(mask, file) for mask, file in zip(inpaint.masks, inpaint.files))


@dataclass(frozen=True)
class Input:
    """An argument of a call that is an input. arrays: those of a request; option: what `reproduce` takes for it;
    picture: whether it may be the name of a picture's file."""

    arrays: Callable[[Request], Arrays]
    option: str
    picture: bool = True


INPUTS: Mapping[str, Input] = {
    "latents": Input(lambda request: _array(request.latents), "--input latents=FILE", picture=False),
    "image": Input(lambda request: () if request.init is None else _images(request.init), "--image FILE"),
    "depth_map": Input(lambda request: _depths(request.seen), "--input depth_map=FILE"),
    "prompt_embeds": Input(lambda request: _array(request.texts.embeds), "--input prompt_embeds=FILE", picture=False),
    "negative_prompt_embeds": Input(
        lambda request: _array(request.texts.negative_embeds), "--input negative_prompt_embeds=FILE", picture=False
    ),
    "pooled_prompt_embeds": Input(lambda _: (), "--input pooled_prompt_embeds=FILE", picture=False),
    "mask_image": Input(lambda request: () if request.inpaint is None else _masks(request.inpaint), "--mask FILE"),
}
"""The inputs of a call, by argument."""


def inputs_of(request: Request) -> dict[str, Arrays]:
    """The inputs that a request has, by argument."""
    arrays = {name: one.arrays(request) for name, one in INPUTS.items()}
    return {name: found for name, found in arrays.items() if found}


def from_content(name: str, content: Any) -> Arrays:
    """The arrays of an input in a record. MetadataError."""
    if name not in INPUTS or not isinstance(content, list) or not content:
        raise _wrong(name, content)
    return tuple(_array_in(name, one) for one in content)


def _array_in(name: str, content: Any) -> Array:
    found = content if isinstance(content, dict) else {}
    digest, shape, dtype, file = (found.get(key) for key in ("sha256", "shape", "dtype", "file"))
    if not (isinstance(digest, str) and isinstance(shape, list) and isinstance(dtype, str)):
        raise _wrong(name, content)
    if not all(isinstance(side, int) for side in shape):
        raise _wrong(name, content)
    if file is not None and not (isinstance(file, str) and len(shape) >= 2):
        raise _wrong(name, content)
    return Array(digest, tuple(shape), dtype, file)


def _wrong(name: str, content: Any) -> MetadataError:
    return MetadataError(f"the record in the picture has an input {shown(name)} that is {shown(content)}")


def load(name: str, file: Path) -> Any:
    """An input that `reproduce` is given: the array of a .npy file, or a picture. ReproductionError."""
    if name not in INPUTS:
        raise ReproductionError(f"--input {name}: no call is given such an input; there are: {', '.join(INPUTS)}")
    try:
        return np.load(file, allow_pickle=False) if file.suffix.lower() == ".npy" else FromFile.read(file, name)
    except ImageError as error:
        raise ReproductionError(str(error)) from error
    except (OSError, ValueError, EOFError) as error:
        raise ReproductionError(
            f"{name} {str(file)!r} can't be read as an array ({reason(error)}); pass what numpy.save wrote"
        ) from error


def from_files(picture: Path, name: str, arrays: Arrays) -> list[FromFile]:
    """The pictures that a picture's record names as an input, from their files: under their names from the current
    folder, or else from the picture's. ReproductionError, with the name, for one that is missing, is no picture or has
    other pixels, and for an input that was in no file."""
    return [_from_file(picture, name, array) for array in arrays]


def _from_file(picture: Path, name: str, array: Array) -> FromFile:
    remedy = f"pass {INPUTS[name].option}"
    if array.file is None:
        raise ReproductionError(
            f"{picture} cannot be made again from its record alone: its call was given {name}, of which the record has "
            f"a hash only; {remedy}"
        )
    what = f"the {name} {array.file!r} ({_described(array)})"
    file = next((one for one in (Path(array.file), picture.parent / array.file) if os.path.isfile(one)), None)
    if file is None:
        raise ReproductionError(f"{picture} was made from {what}, which is not there; {remedy}")
    try:
        read = FromFile.read(file, name)
    except ImageError as error:
        raise ReproductionError(f"{picture} was made from {what}, and now {error}; or {remedy}") from error
    if hash_of(name, read) != array:
        raise ReproductionError(f"{picture} was made from {what}, and {str(file)!r} has other pixels; {remedy}")
    return read


def hash_of(name: str, read: FromFile) -> Array:
    """What a record has of a picture that is this input."""
    return Array.of(read_masks(read)[0][0] if name == "mask_image" else read.picture)


def _described(array: Array) -> str:
    height, width = array.shape[:2]
    return f"{width} x {height} pixels, SHA-256 {array.sha256[:10]}"
