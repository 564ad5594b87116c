"""Masks of pictures, of which the white part is repainted; and the part of a picture around a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .errors import MaskError
from .pixels import Readable, read_image

WHITE = 128
"""From here on a value of 255 counts as white, as 0.5 of 1 does in diffusers."""

Region = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R 601, which Pillow's mode L has too."""


def read_masks(source: Any) -> list[np.ndarray]:
    """The masks [H, W] uint8 of a call: of anything that `read_image` takes, arrays of bool, arrays [n, H, W], or a
    list. Raises MaskError and ImageError."""
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] > 4:
        source = list(source)
    if not isinstance(source, (list, tuple)):
        return [_read(source, "mask_image")]
    if not source:
        raise MaskError("mask_image is an empty list; pass a mask, or one for each text")
    return [_read(one, f"mask_image[{number}]") for number, one in enumerate(source)]


def _read(source: Any, what: str) -> np.ndarray:
    if isinstance(source, np.ndarray) and source.dtype == np.bool_:
        source = source.astype(np.uint8) * np.uint8(255)
    read = read_image(source, what)
    if isinstance(read, Image.Image):
        return np.asarray(read.convert("L"))
    return np.round(read @ LUMA * 255).astype(np.uint8)


def whitened(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where a mask [H, W] is white at another size, [height, width] bool; resampled by Lanczos' filter, as in
    diffusers."""
    if mask.shape != (height, width):
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.LANCZOS))
    return mask >= WHITE


def as_bytes(picture: Readable) -> np.ndarray:
    """A picture [H, W, 3] as uint8."""
    return np.asarray(picture) if isinstance(picture, Image.Image) else np.round(picture * 255).astype(np.uint8)


@dataclass(frozen=True)
class Crop:
    """The part of a picture around a mask, which is painted at `height` x `width` and put back."""

    region: Region
    height: int
    width: int

    @classmethod
    def around(cls, mask: np.ndarray, padding: int, height: int, width: int) -> Crop:
        """The smallest part with all that is not black and `padding` pixels around it, made higher or wider until it
        has the proportions of height x width, as far as the picture goes. MaskError for a black mask."""
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if not len(columns):
            raise MaskError(
                "mask_image is black, so padding_mask_crop finds no part to repaint; paint some of it white"
            )
        left, right = _padded(columns, padding, mask.shape[1])
        top, bottom = _padded(rows, padding, mask.shape[0])
        ratio = width / height
        if (right - left) / (bottom - top) > ratio:
            top, bottom = _grown(top, bottom, (right - left) / ratio, mask.shape[0])
        else:
            left, right = _grown(left, right, (bottom - top) * ratio, mask.shape[1])
        return cls((left, top, right, bottom), height, width)

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """The part of a picture [H, W, 3] or a mask [H, W], uint8, at the size that it is painted at. Where its
        proportions are others, its edges are repeated, as in diffusers' resize_mode "fill"."""
        part = Image.fromarray(picture).crop(self.region)
        wide = self.width / self.height < part.width / part.height
        width = self.width if wide else part.width * self.height // part.height
        height = part.height * self.width // part.width if wide else self.height
        return np.asarray(_filled(part.resize((width, height), Image.Resampling.LANCZOS), self.width, self.height))

    def put_back(self, painted: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The original [H, W, 3] uint8 with what was painted of the part. Where the mask is grey they are mixed."""
        left, top, right, bottom = self.region
        canvas = Image.new("RGB", (original.shape[1], original.shape[0]))
        canvas.paste(_covering(Image.fromarray(painted), right - left, bottom - top), (left, top))
        kept = Image.fromarray(original).convert("RGBA")
        kept.putalpha(ImageOps.invert(Image.fromarray(mask)))
        return np.asarray(Image.alpha_composite(canvas.convert("RGBA"), kept).convert("RGB"))


def _padded(found: np.ndarray, padding: int, limit: int) -> tuple[int, int]:
    """The first and the end of these indices, with padding that stays inside."""
    return max(int(found[0]) - padding, 0), min(int(found[-1]) + 1 + padding, limit)


def _grown(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """A side made longer at both ends, pushed back where it leaves 0..limit, and cut where it is too long for that."""
    extra = int(wanted - (high - low))
    low, high = low - extra // 2, high + extra - extra // 2
    if high > limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def _filled(part: Image.Image, width: int, height: int) -> Image.Image:
    """A picture in the middle of a size, with its edges, resampled from boxes without an area, on two sides."""
    x, y = width // 2 - part.width // 2, height // 2 - part.height // 2
    canvas = Image.new(part.mode, (width, height))
    canvas.paste(part, (x, y))
    if y > 0:
        canvas.paste(part.resize((width, y), box=(0, 0, width, 0)), (0, 0))
        canvas.paste(part.resize((width, y), box=(0, part.height, width, part.height)), (0, y + part.height))
    elif x > 0:
        canvas.paste(part.resize((x, height), box=(0, 0, 0, height)), (0, 0))
        canvas.paste(part.resize((x, height), box=(part.width, 0, part.width, height)), (x + part.width, 0))
    return canvas


def _covering(painted: Image.Image, width: int, height: int) -> Image.Image:
    """A picture in its own proportions that covers a size, of which the middle is taken."""
    wide = width / height > painted.width / painted.height
    own_width = width if wide else painted.width * height // painted.height
    own_height = painted.height * width // painted.width if wide else height
    canvas = Image.new("RGB", (width, height))
    resampled = painted.resize((own_width, own_height), Image.Resampling.LANCZOS)
    canvas.paste(resampled, (width // 2 - own_width // 2, height // 2 - own_height // 2))
    return canvas
