"""The pictures that a call starts from: files, PIL images and arrays, as pixels."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError, shown

MOST_PIXELS = 1 << 26
"""A picture with more is refused before it is decoded: 8192 x 8192."""

Readable: TypeAlias = "Image.Image | np.ndarray"
"""An 8-bit picture in mode RGB, or [H, W, 3] float32 in 0..1 where 8 bits are too few."""

LANCZOS, BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC

_WHITE = (255, 255, 255, 255)


def read_image(source: Any, what: str = "image") -> Readable:
    """A picture of a path, a PIL image or an array: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], uint8, or float in 0..1.

    EXIF's orientation is applied. What is transparent shows white, as in A1111. Of an animation it is the first frame.
    16 bits of grey keep their precision. ImageError for what is no picture, is damaged or has more than 2**26 pixels.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, what)
    if isinstance(source, (str, PathLike)):
        return _from_file(fspath(source), what)
    if isinstance(source, Image.Image):
        return _decoded(source, what)
    raise ImageError(f"{what} is a {type(source).__name__}; pass a path, a PIL image or a NumPy array [H, W, 3]")


def size_of(image: Readable) -> tuple[int, int]:
    """Height and width in pixels."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[0], image.shape[1])


def resized(image: Readable, height: int, width: int, filter: Image.Resampling = LANCZOS) -> np.ndarray:
    """The picture's pixels [height, width, 3] float32 in -1..1. Another size is stretched by a filter, Lanczos' as in
    diffusers' VaeImageProcessor for PIL images."""
    if isinstance(image, Image.Image):
        if image.size != (width, height):
            image = image.resize((width, height), filter)
        image = np.asarray(image, np.float32) / np.float32(255)
    elif image.shape[:2] != (height, width):
        image = np.stack(
            [_stretched(image[..., channel], height, width, filter) for channel in range(3)], axis=-1
        ).clip(0, 1)
    return 2 * image - 1


def _stretched(channel: np.ndarray, height: int, width: int, filter: Image.Resampling) -> np.ndarray:
    plane = Image.fromarray(np.ascontiguousarray(channel, np.float32), mode="F")
    return np.asarray(plane.resize((width, height), filter))


def _from_file(path: str | bytes, what: str) -> Readable:
    try:
        with Image.open(path) as image:
            return _decoded(image, what)
    except UnidentifiedImageError as error:
        raise ImageError(f"{what} {shown(path)} is no picture that Pillow reads; pass a PNG, JPEG or WebP") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} {shown(path)} is refused: {error}") from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{what} {shown(path)} cannot be read ({reason}); pass the path of a picture") from error


def _decoded(image: Image.Image, what: str) -> Readable:
    """A PIL image as pixels. Its file is read here at the latest."""
    width, height = image.size
    _check_size(height, width, what)
    try:
        turned = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:  # what Pillow's decoders raise
        raise ImageError(f"{what} is damaged ({error}); save it again, as a PNG for example") from error
    if turned.mode.startswith("I"):
        return _grey(np.asarray(turned, np.float32) / np.float32(65535), what)
    if turned.mode == "F":
        return _grey(np.asarray(turned, np.float32), what)
    if turned.has_transparency_data:
        clear = turned.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, _WHITE), clear).convert("RGB")
    return turned.convert("RGB")


def _grey(values: np.ndarray, what: str) -> np.ndarray:
    """[H, W] in 0..1 as three equal channels."""
    _check_range(values, what)
    return np.repeat(values[..., np.newaxis], 3, axis=2)


def _from_array(array: np.ndarray, what: str) -> Readable:
    if array.ndim == 2:
        array = array[..., np.newaxis]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(f"{what} has shape {array.shape}; an array is [H, W, 3], or has 1 or 4 channels")
    _check_size(array.shape[0], array.shape[1], what)
    if array.dtype == np.uint8:
        return _decoded(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), what)
    if array.dtype.kind != "f":
        raise ImageError(f"{what} is an array of {array.dtype}; pass uint8 in 0..255, or floats in 0..1")
    _check_range(array, what)
    values = array.astype(np.float32)
    if values.shape[2] == 4:
        values = values[..., :3] * values[..., 3:] + (1 - values[..., 3:])
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values


def _check_range(values: np.ndarray, what: str) -> None:
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 1:  # false for NaN too
        raise ImageError(f"{what} holds values from {low:g} to {high:g}; floats are colours in 0..1")


def _check_size(height: int, width: int, what: str) -> None:
    if not 0 < height * width <= MOST_PIXELS:
        raise ImageError(
            f"{what} is {width} x {height} pixels; at most {MOST_PIXELS} in all are taken. Make it smaller first"
        )
