"""OpenAI's U-Net on pixels, the layout of improved-diffusion and guided-diffusion, as a diffusers UNet2DModel.

    time_embed.{0,2}  label_emb                                  of the timestep and the class
    input_blocks.0.0                                             the first convolution
    input_blocks.N.0  input_blocks.N.1                           residual block, attention if the level has any
    middle_block.{0,1,2}                                         residual block, attention, residual block
    output_blocks.N.{0,1}  and the last one of them              the same; at the end of a level an upsampler
    out.{0,2}                                                    the last norm and convolution

Between two levels a block of `input_blocks` halves the size: a convolution (`op`), or a residual block that looks like
the others. CompVis' latent diffusion without text has the same U-Net under `model.diffusion_model.`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor

from ..errors import UnsupportedModelError, UsageError
from . import compvis, openai_flags
from . import weights as files
from .openai_flags import Flags

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""The layers of a residual block: OpenAI's names -> diffusers'."""

ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
GROUPS = 32
"""Groups of every group norm, a constant in OpenAI's code."""


@dataclass(frozen=True)
class OpenAIUNet:
    """A U-Net as diffusers would have it.

    config: of UNet2DModel. weights: by diffusers' names. heads: how many heads every attention has, where that is the
    same number at all widths, which no configuration of UNet2DModel says; else None. timestep_scale: what timesteps are
    multiplied with before their embedding. timestep_width: channels of that embedding.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    heads: int | None
    timestep_scale: float
    timestep_width: int

    @property
    def learned(self) -> bool:
        """Whether it predicts a variance too."""
        return bool(self.config["out_channels"] == 2 * self.config["in_channels"])

    def model(self, file: Path) -> UNet2DModel:
        """The model in float32. UnreadableModelError names tensors that do not fit."""
        model = UNet2DModel(**self.config)
        model.time_proj = Timesteps(self.timestep_width, True, 0, self.timestep_scale)
        model.time_embedding = TimestepEmbedding(self.timestep_width, self.config["time_embedding_dim"])
        for part in model.modules():
            if self.heads is not None and isinstance(part, Attention):
                part.heads = self.heads
                part.scale = (part.inner_dim // self.heads) ** -0.5
        compvis.fill(file, model, self.weights)
        return model


@dataclass(frozen=True)
class _Shape:
    """Levels of the U-Net, from the full size down. blocks: residual blocks of each on the way down; one more on the
    way up. resampling: "conv" or "resnet"."""

    channels: list[int]
    attention: list[bool]
    blocks: int
    resampling: str


def is_openai(names: set[str]) -> bool:
    """Whether tensors are named as improved-diffusion and guided-diffusion name them."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight"} <= names


def read_unet(weights: dict[str, Tensor], file: Path, flags: Flags) -> OpenAIUNet:
    """The U-Net in `weights`, whose names have no prefix.

    Raises UnsupportedModelError for a network that UNet2DModel is not, and UsageError where a flag is needed.
    """
    _refuse_relatives(weights, file)
    files.refuse_integers(file, files.integers_of(weights))
    shape = _shape(weights, file)
    widths = {width for width, has in zip(shape.channels, shape.attention) if has} | {shape.channels[-1]}
    head_size = _head_size(file, flags, widths)
    if flags.image_size is None:
        raise openai_flags.missing(file, "the size of its pictures", '{"image_size": 64}')
    time = weights["time_embed.0.weight"]
    first, last = weights["input_blocks.0.0.weight"], weights["out.2.weight"]
    block = weights["input_blocks.1.0.emb_layers.1.weight"]
    config = {
        **_blocks(shape),
        "sample_size": flags.image_size,
        "in_channels": first.shape[1],
        "out_channels": last.shape[0],
        "time_embedding_dim": time.shape[0],
        "attention_head_dim": head_size,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if block.shape[0] == 2 * shape.channels[0] else "default",
        "num_class_embeds": weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
    }
    scale = 1000 / flags.diffusion_steps if flags.rescale_timesteps else 1.0
    return OpenAIUNet(config, _convert(weights, shape, flags), flags.num_heads, scale, time.shape[1])


def _refuse_relatives(weights: dict[str, Tensor], file: Path) -> None:
    """UnsupportedModelError for the networks that share the layout's beginning."""
    if "out.2.weight" not in weights or not any(name.startswith("output_blocks.") for name in weights):
        raise UnsupportedModelError(
            f"{file} has no output_blocks.* and out.2: it is a classifier of noisy pictures, not a model that makes "
            "pictures; build the diffusion model that belongs to it"
        )
    given, made = weights["input_blocks.0.0.weight"].shape[1], weights["out.2.weight"].shape[0]
    if made not in (given, 2 * given):
        raise UnsupportedModelError(
            f"{file} takes {given} channels and gives {made}: it also looks at a second picture (an upsampler?). "
            "Supported are U-Nets that give as many channels as they take, or twice as many to learn the variance"
        )
    if any(".transformer_blocks." in name for name in weights):
        raise UnsupportedModelError(
            f"{file} has cross-attention, so it is not a U-Net on pixels or on latents without text; models with text "
            "are read from whole Stable Diffusion checkpoints and from diffusers folders"
        )


def _shape(weights: dict[str, Tensor], file: Path) -> _Shape:
    """The levels, from where the upsamplers are: they end every level but the last on the way up."""
    outputs = compvis.count(weights, r"output_blocks\.(\d+)\.")
    ends = [i for i in range(outputs) if _upsampler(weights, i) is not None]
    blocks = ends[0] if ends else outputs - 1
    levels = len(ends) + 1
    regular = ends == [(blocks + 1) * i + blocks for i in range(levels - 1)] and outputs == levels * (blocks + 1)
    if not regular or blocks < 1 or compvis.count(weights, r"input_blocks\.(\d+)\.") != outputs:
        raise UnsupportedModelError(
            f"{file}: the levels of the U-Net have different numbers of residual blocks, or change their size without "
            "weights (conv_resample False); UNet2DModel knows neither"
        )
    first = [1 + level * (blocks + 1) for level in range(levels)]
    return _Shape(
        [weights[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in first],
        [f"input_blocks.{i}.1.qkv.weight" in weights for i in first],
        blocks,
        "conv" if levels == 1 or f"input_blocks.{blocks + 1}.0.op.weight" in weights else "resnet",
    )


def _upsampler(weights: dict[str, Tensor], block: int) -> int | None:
    """The place of the upsampler in a block on the way up."""
    for place in (1, 2):
        names = (f"output_blocks.{block}.{place}.conv.weight", f"output_blocks.{block}.{place}.in_layers.0.weight")
        if any(name in weights for name in names):
            return place
    return None


def _head_size(file: Path, flags: Flags, widths: set[int]) -> int:
    """Channels of a head where all have as many, else a number that divides all widths. The layer in the middle always
    has attention."""
    if flags.num_head_channels is None and flags.num_heads is None:
        raise openai_flags.missing(
            file, "into how many heads its attention is split", '{"num_heads": 4} or {"num_head_channels": 64}'
        )
    size = flags.num_head_channels or math.gcd(*widths) // (flags.num_heads or 1)
    for width in sorted(widths):
        heads = flags.heads(width)
        if not heads or width % heads or not size or width % size:
            raise UsageError(
                f"the attention over {width} channels in {file} cannot be split as its flags say "
                f"(num_heads {flags.num_heads}, num_head_channels {flags.num_head_channels}); correct "
                f"{file.with_suffix('.json')}"
            )
    return size


def _blocks(shape: _Shape) -> dict[str, Any]:
    plain = ("DownBlock2D", "UpBlock2D")
    if shape.resampling == "resnet":
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return {
        "block_out_channels": shape.channels,
        "layers_per_block": shape.blocks,
        "down_block_types": ["AttnDownBlock2D" if has else plain[0] for has in shape.attention],
        "up_block_types": ["AttnUpBlock2D" if has else plain[1] for has in reversed(shape.attention)],
        "downsample_type": shape.resampling,
        "upsample_type": shape.resampling,
    }


def _convert(weights: dict[str, Tensor], shape: _Shape, flags: Flags) -> dict[str, Tensor]:
    """The weights by diffusers' names. A tensor without a place keeps its name, so that the check names it."""
    layers = dict(_layers(weights, shape))
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        block, _, last = layer.rpartition(".")
        if last == "qkv" and block in layers:
            parts = _query_key_value(value, flags)
            converted.update({f"{layers[block]}.{part}.{kind}": parts[i] for i, part in enumerate(_QKV)})
        elif last == "proj_out" and block in layers:
            converted[f"{layers[block]}.to_out.0.{kind}"] = value.flatten(1) if kind == "weight" else value
        elif last == "norm" and block in layers:
            converted[f"{layers[block]}.group_norm.{kind}"] = value
        else:
            converted[f"{layers.get(layer, layer)}.{kind}"] = value
    return converted


_QKV = ("to_q", "to_k", "to_v")


def _query_key_value(value: Tensor, flags: Flags) -> Tensor:
    """Weights [3 C, C, 1] or biases [3 C] of the three projections, [3, C, ...]. In the new order all queries come
    first; in the old one the rows go head by head, each with its queries, keys and values."""
    channels = value.shape[0] // 3
    flat = value.flatten(1) if value.ndim > 1 else value
    if flags.use_new_attention_order:
        return flat.reshape(3, channels, *flat.shape[1:])
    heads = flags.heads(channels) or 1
    by_head = flat.reshape(heads, 3, channels // heads, *flat.shape[1:])
    return by_head.transpose(0, 1).reshape(3, channels, *flat.shape[1:])


def _layers(weights: dict[str, Tensor], shape: _Shape) -> Iterator[tuple[str, str]]:
    """OpenAI's names of layers, and of blocks of attention, with diffusers'."""
    yield from ENDS.items()
    for old, new in _residual_blocks(weights, shape):
        yield from ((f"{old}.{layer}", f"{new}.{RESIDUAL[layer]}") for layer in RESIDUAL)
    yield "middle_block.1", "mid_block.attentions.0"
    per_level = shape.blocks + 1
    for level in range(len(shape.channels)):
        for block in range(shape.blocks):
            yield f"input_blocks.{1 + level * per_level + block}.1", f"down_blocks.{level}.attentions.{block}"
        for block in range(per_level):
            yield f"output_blocks.{level * per_level + block}.1", f"up_blocks.{level}.attentions.{block}"
        last = level * per_level + shape.blocks
        yield f"input_blocks.{last + 1}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        yield f"output_blocks.{last}.{_upsampler(weights, last)}.conv", f"up_blocks.{level}.upsamplers.0.conv"


def _residual_blocks(weights: dict[str, Tensor], shape: _Shape) -> Iterator[tuple[str, str]]:
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.2", "mid_block.resnets.1"
    per_level = shape.blocks + 1
    for level in range(len(shape.channels)):
        for block in range(shape.blocks):
            yield f"input_blocks.{1 + level * per_level + block}.0", f"down_blocks.{level}.resnets.{block}"
        for block in range(per_level):
            yield f"output_blocks.{level * per_level + block}.0", f"up_blocks.{level}.resnets.{block}"
        last = level * per_level + shape.blocks
        yield f"input_blocks.{last + 1}.0", f"down_blocks.{level}.downsamplers.0"
        yield f"output_blocks.{last}.{_upsampler(weights, last)}", f"up_blocks.{level}.upsamplers.0"
