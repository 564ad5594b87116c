"""diffusers' own pipelines of Stable Diffusion: what bundles are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)
from PIL import Image

from engine.contract import JOINS, Family
from engine.family import LATENT_CHANNELS
from engine.manifest import LowResolution

CHECKED = {
    None: StableDiffusionPipeline,
    "mask": StableDiffusionInpaintPipeline,
    "image": StableDiffusionInstructPix2PixPipeline,
}
"""The pipelines that take a safety checker, by what the U-Net sees beside the latents (JOINS)."""


def pipeline(family: Family, parts: Mapping[str, Any], low_resolution: LowResolution | None) -> DiffusionPipeline:
    """The pipeline of a family with these parts, without safety checker and progress bar."""
    made: DiffusionPipeline
    if family.joins == "depth":
        made = StableDiffusionDepth2ImgPipeline(**parts, depth_estimator=None, feature_extractor=None)
    elif low_resolution is not None:
        noising = DDPMScheduler.from_config(dict(low_resolution.scheduler))
        most = low_resolution.max_noise_level
        made = StableDiffusionUpscalePipeline(**parts, low_res_scheduler=noising, max_noise_level=most)
    else:
        checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        made = CHECKED[family.joins](**parts, **checker)
    made.set_progress_bar_config(disable=True)
    return made


def joins_of(pipeline: DiffusionPipeline) -> str | None:
    """What the U-Net of a pipeline sees beside the latents."""
    return JOINS.get(pipeline.unet.config.in_channels - LATENT_CHANNELS)


def beside_text(joins: str | None, height: int, width: int, pictures: int = 1) -> dict[str, Any]:
    """The arguments of our call, beside text and size, that make pictures for a comparison: each has an image of its
    own, so that its seed draws what it draws alone."""
    if joins is None:
        return {}
    if joins == "low_resolution":
        return {"image": [_example(height // 4, width // 4)] * pictures}
    image = [_example(height, width)] * pictures
    down, across = np.mgrid[0 : height // 8, 0 : width // 8]
    if joins == "depth":
        depth_map = (down + 2 * across).astype(np.float32)
        return {"image": image, "depth_map": depth_map, "strength": 1.0}  # below 1 diffusers miscounts PNDM's steps
    if joins == "mask":
        return {"image": image, "mask_image": Image.fromarray(_mask(height, width))}
    return {"image": image}


def as_in_diffusers(joins: str | None, height: int, width: int) -> dict[str, Any]:
    """The same for a call of diffusers that makes one picture, with the size where the image does not say it."""
    given = beside_text(joins, height, width)
    if joins in (None, "mask"):
        given |= {"height": height, "width": width}
    if "depth_map" in given:
        given["depth_map"] = torch.from_numpy(given["depth_map"])[None]
    return given


def _example(height: int, width: int) -> Image.Image:
    """A picture whose colours change from corner to corner."""
    down, across = np.mgrid[0:height, 0:width]
    colours = [255 * down / height, 255 * across / width, 255 * (down + across) / (height + width)]
    return Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8))


def _mask(height: int, width: int) -> np.ndarray:
    """White on the left."""
    white = np.zeros((height, width), np.uint8)
    white[:, : width // 2] = 255
    return white
