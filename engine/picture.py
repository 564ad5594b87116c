"""PIL images that write their parameters into files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from os import PathLike
from typing import IO, Any

import numpy as np
from PIL import Image

from .metadata import embed, save_options


class Picture(Image.Image):
    """A PIL image that writes its settings whenever it is saved; otherwise a plain `Image.Image`."""

    @classmethod
    def from_pixels(cls, pixels: np.ndarray, parameters: str, record: Mapping[str, Any] | None = None) -> Picture:
        """A picture of `pixels` [height, width, 3] uint8 with A1111's text and a record of JSON values."""
        plain = Image.fromarray(pixels)
        picture = cls()
        picture.__setstate__(plain.__getstate__())
        embed(picture, parameters, record)
        return picture

    def save(
        self, fp: str | bytes | PathLike[str] | PathLike[bytes] | IO[bytes], format: str | None = None, **params: Any
    ) -> None:
        """As `Image.save`. A PNG, JPEG or WebP gets the parameters, unless `pnginfo` or `exif` is given. Other formats
        have no place for them."""
        super().save(fp, format, **{**save_options(self.info, (format or _format(fp)).upper()), **params})


def _format(fp: Any) -> str:
    """Pillow's name for the format of a file's name. "" if there is none."""
    name = fp if isinstance(fp, (str, bytes, PathLike)) else getattr(fp, "name", "")
    try:
        extension = os.path.splitext(os.fsdecode(name))[1]
    except TypeError:  # a file that is opened by number
        return ""
    return Image.registered_extensions().get(extension.lower(), "")


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; 99 for equal ones."""
    error = ((actual.astype(np.float64) - expected.astype(np.float64)) ** 2).mean()
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))
