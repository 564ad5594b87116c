"""Depth to image: a U-Net that sees how far away each part of the picture is. StableDiffusionDepth2ImgPipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .beginnings import Begin, Encode, Encoded, from_images, seeing
from .errors import DepthMapError
from .init_image import each_of
from .pixels import MOST_PIXELS, read_image
from .resize import resampled

if TYPE_CHECKING:
    from .request import Request


@dataclass(frozen=True, eq=False)
class Depth:
    """The depth maps of a call: n arrays [H, W] float32 of finite numbers, each with more than one value. Larger is
    nearer, in any unit."""

    maps: tuple[np.ndarray, ...]

    @classmethod
    def check(cls, depth_map: Any) -> Depth:
        """Of a path, a PIL image, an array [H, W] or [n, H, W], or a list of these. DepthMapError, ImageError."""
        if isinstance(depth_map, np.ndarray) and depth_map.ndim == 3:
            depth_map = list(depth_map)
        if not isinstance(depth_map, (list, tuple)):
            return cls((_read(depth_map, "depth_map"),))
        if not depth_map:
            raise DepthMapError("depth_map is an empty list; pass a map, or one for each text")
        return cls(tuple(_read(one, f"depth_map[{number}]") for number, one in enumerate(depth_map)))

    def channels(self, height: int, width: int) -> np.ndarray:
        """The maps at the size of latents, [n, 1, height, width] float32, each stretched to -1..1."""
        maps = np.stack([resampled(one, height, width, "bicubic") for one in self.maps])
        low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
        scaled = 2 * (maps - low) / (high - low) - 1
        return scaled[:, np.newaxis].astype(np.float32)

    def begin(self, request: Request, plane: tuple[int, ...], encode: Encode) -> Begin:
        """See `Seen`."""
        assert request.init is not None
        of = each_of("depth maps", len(self.maps), len(request.prompts), request.images_per_prompt)
        channels = self.channels(*plane[1:])
        encoded = Encoded.of_images(request.init, request.height, request.width, request.image_of, encode)
        return seeing(from_images(request.table, encoded), [{"concat": channels[one]} for one in of])


def _read(source: Any, what: str) -> np.ndarray:
    if isinstance(source, np.ndarray):
        depth = _from_array(source, what)
    else:
        read = read_image(source, what)
        grey = np.asarray(read.convert("L")) if isinstance(read, Image.Image) else read[..., 0]
        depth = grey.astype(np.float32)
    if depth.min() == depth.max():
        raise DepthMapError(f"{what} is {depth.min():g} everywhere; a depth map needs something near and something far")
    return depth


def _from_array(array: np.ndarray, what: str) -> np.ndarray:
    if array.ndim != 2 or not 0 < array.size <= MOST_PIXELS:
        raise DepthMapError(f"{what} has shape {array.shape}; a depth map is [H, W], or [n, H, W] for several")
    if array.dtype.kind not in "iuf":
        raise DepthMapError(f"{what} is an array of {array.dtype}; pass numbers")
    depth = array.astype(np.float32)
    if not np.isfinite(depth).all():
        raise DepthMapError(f"{what} holds values that are not finite; pass numbers for every pixel")
    return depth
