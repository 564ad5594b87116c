"""Checks from the configuration of a model without texts that the graphs support it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import shown
from engine.family import Traits
from engine.manifest import LARGEST_CHANNELS, LARGEST_CLASSES, LARGEST_SIDE, SMALLEST_SIDE

from ..errors import UnreadableModelError, UnsupportedModelError
from .checks import LARGEST_SCALE, SMALLEST_SCALE

PIXEL_CHANNELS = (1, 3)

UNET_OPTIONS: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "mid_block_type": ("UNetMidBlock2D", None),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
"""Options of UNet2DModel, with the only values that the denoiser's graph supports."""

UNET_BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
DECODER_BLOCKS = {
    "VQModel": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    "AutoencoderKL": ("UpDecoderBlock2D",),
}
DECODERS = tuple(DECODER_BLOCKS)


def check_unet(config: Mapping[str, Any], on_pixels: bool) -> None:
    """UnsupportedModelError or UnreadableModelError for a UNet2DModel that the graph has no place for."""
    for option, known in UNET_OPTIONS.items():
        if config[option] not in known:
            raise UnsupportedModelError(
                f"the U-Net has {option}={shown(config[option])}; supported: {', '.join(map(repr, known))}"
            )
    for option, known in UNET_BLOCKS.items():
        _check_blocks("the U-Net", option, config[option], known)
    channels = config["in_channels"]
    if not _is_whole(channels, 1, LARGEST_CHANNELS) or (on_pixels and channels not in PIXEL_CHANNELS):
        raise UnsupportedModelError(
            f"the U-Net has in_channels={shown(channels)}; a model on pixels has 3, or 1 for grey, and a model on "
            "latents as many as its decoder"
        )
    if config["out_channels"] not in (channels, 2 * channels):
        raise UnsupportedModelError(
            f"the U-Net has in_channels={channels} and out_channels={shown(config['out_channels'])}; it must have as "
            "many, or with a learned variance twice as many"
        )
    classes = config["num_class_embeds"]
    if classes is not None and not _is_whole(classes, 1, LARGEST_CLASSES):
        raise UnreadableModelError(
            f"the U-Net has num_class_embeds={shown(classes)}; it must be null or an integer from 1 to "
            f"{LARGEST_CLASSES}"
        )


def check_decoder(kind: str, config: Mapping[str, Any], channels: int) -> None:
    """UnsupportedModelError for a VQModel or AutoencoderKL that the decoder's graph has no place for, or that is of
    another model than a U-Net with so many channels."""
    _check_blocks(f"the {kind}", "up_block_types", config["up_block_types"], DECODER_BLOCKS[kind])
    if config["out_channels"] != 3 or config.get("norm_type", "group") != "group" or config.get("shift_factor"):
        raise UnsupportedModelError(
            f"the {kind} has out_channels={shown(config['out_channels'])}, norm_type="
            f"{shown(config.get('norm_type', 'group'))} and shift_factor={shown(config.get('shift_factor'))}; "
            "supported are 3, 'group' and none"
        )
    own = config["latent_channels"] if config.get("vq_embed_dim") is None else config["vq_embed_dim"]
    if own != channels:
        raise UnsupportedModelError(
            f"the U-Net has {channels} channels and the {kind} {shown(own)}; they are not of one model"
        )
    scale = config["scaling_factor"]
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    if not number or not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise UnsupportedModelError(
            f"the {kind} has scaling_factor={shown(scale)}; it must be a number from {SMALLEST_SCALE:g} to "
            f"{LARGEST_SCALE:g}"
        )


def factor_of(decoder: Mapping[str, Any] | None) -> int:
    """Pixels per latent element; 1 for a model on pixels, which has no decoder."""
    return 1 if decoder is None else int(2 ** (len(decoder["block_out_channels"]) - 1))


def traits_of(unet: Mapping[str, Any], factor: int) -> Traits:
    channels = int(unet["in_channels"])
    return Traits(channels, factor, unet["num_class_embeds"], unet["out_channels"] == 2 * channels)


def sample_size(unet: Mapping[str, Any], factor: int) -> int:
    """The height in pixels that a U-Net was trained at. UnreadableModelError where its configuration doesn't say, or
    says what no bundle can be built for."""
    size = unet["sample_size"]
    sides = size if isinstance(size, (list, tuple)) else [size]
    if len(sides) not in (1, 2) or not all(
        _is_whole(side, -(-SMALLEST_SIDE // factor), LARGEST_SIDE // factor) for side in sides
    ):
        raise UnreadableModelError(
            f"the U-Net has sample_size={shown(size)}; it must be an integer from {-(-SMALLEST_SIDE // factor)} to "
            f"{LARGEST_SIDE // factor}"
        )
    if len(set(sides)) > 1:
        raise UnsupportedModelError(f"the U-Net has sample_size={shown(size)}; supported are square samples")
    return factor * int(sides[0])


def _check_blocks(whose: str, option: str, blocks: Any, known: tuple[str, ...]) -> None:
    usable = isinstance(blocks, (list, tuple)) and blocks and all(block in known for block in blocks)
    if not usable:
        raise UnsupportedModelError(f"{whose} has {option}={shown(blocks)}; supported is a list of {', '.join(known)}")


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
