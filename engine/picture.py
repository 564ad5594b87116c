"""PIL images that write their parameters into PNG files."""

from __future__ import annotations

import math
import re
from os import PathLike
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PARAMETERS = "parameters"
"""The PNG text chunk that the Stable Diffusion web UIs read."""


class Picture(Image.Image):
    """A PIL image that writes its `info["parameters"]` whenever it is saved as PNG; otherwise a plain `Image.Image`."""

    @classmethod
    def from_pixels(cls, pixels: np.ndarray, parameters: str) -> Picture:
        """A picture of `pixels` [height, width, 3] uint8."""
        plain = Image.fromarray(pixels)
        picture = cls()
        picture.__setstate__(plain.__getstate__())
        picture.info[PARAMETERS] = parameters
        return picture

    def save(
        self, fp: str | bytes | PathLike[str] | PathLike[bytes] | IO[bytes], format: str | None = None, **params: Any
    ) -> None:
        """As `Image.save`. A PNG gets the parameters, unless `pnginfo` is given. Other formats have no place for
        them."""
        if "pnginfo" not in params and PARAMETERS in self.info:
            text = PngInfo()
            text.add_text(PARAMETERS, self.info[PARAMETERS])
            params["pnginfo"] = text
        super().save(fp, format, **params)


def format_parameters(prompt: str, negative_prompt: str, fields: dict[str, str | int | float]) -> str:
    """The text that web UIs write: prompt, negative prompt, then `Key: value` pairs; values with , : or a line break
    are quoted."""
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    pairs = []
    for key, value in fields.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if re.search(r"[,:\n]", text):
            text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        pairs.append(f"{key}: {text}")
    return "\n".join([*lines, ", ".join(pairs)]).strip()


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; 99 for equal ones."""
    error = ((actual.astype(np.float64) - expected.astype(np.float64)) ** 2).mean()
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))
