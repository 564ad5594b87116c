"""Single-file checkpoints in the CompVis layout: the shapes give the architecture, diffusers converts the names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..errors import UnsupportedModelError
from . import weights as files
from .presets import ARCHITECTURES, Architecture

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
HEAD_SIZE = 64
"""Channels of an attention head in both text encoders and in SD 2.x's U-Net; SD 1.x's U-Net has 8 heads everywhere."""


def architecture(weights: dict[str, Tensor], file: Path, prediction_type: str | None) -> Architecture:
    """The architecture that follows from the shapes. No shape tells whether an SD 2.x model predicts noise or v.
    `prediction_type` decides if given; diffusers' rule is noise for global_step 875000, else v."""
    first = weights.get(UNET + "input_blocks.0.0.weight")
    if first is None or VAE + "decoder.conv_in.weight" not in weights:
        raise UnsupportedModelError(
            f"{file} has no {UNET}* and {VAE}* tensors, so it is not a whole Stable Diffusion checkpoint (a LoRA, a "
            "VAE?)"
        )
    if any(name.startswith("conditioner.") for name in weights):
        raise UnsupportedModelError(f"{file} is an SDXL checkpoint; supported are Stable Diffusion 1.x and 2.x")
    files.refuse_integers(
        file,
        files.integers_of(
            {name: value for name, value in weights.items() if name.startswith((UNET, VAE, CLIP, OPEN_CLIP))}
        ),
    )
    unet = _unet_config(weights)
    unet["in_channels"] = first.shape[1]
    second = (
        CLIP + "text_model.embeddings.token_embedding.weight" not in weights
        and OPEN_CLIP + "token_embedding.weight" in weights
    )
    preset = ARCHITECTURES["sd21" if second else "sd15"]
    if prediction_type is None:
        step = int(weights["global_step"]) if "global_step" in weights else None
        prediction_type = "v_prediction" if second and step != 875000 else "epsilon"
    unet["sample_size"] = 96 if second and prediction_type == "v_prediction" else 64
    unet["upcast_attention"] = second and prediction_type == "v_prediction"
    return Architecture(
        unet,
        {**preset.vae, **vae_config(weights), "sample_size": 8 * unet["sample_size"]},
        _text_config(weights, second, preset),
        {**preset.scheduler, "prediction_type": prediction_type},
        preset.pad_token,
    )


def count(weights: dict[str, Tensor], pattern: str) -> int:
    """One more than the highest number that the group of `pattern` matches among the names."""
    return 1 + max((int(match[1]) for name in weights if (match := re.match(pattern, name))), default=-1)


def _unet_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    channels: list[int] = []
    crossed: list[bool] = []
    layers: list[int] = [0]
    context = 0
    linear = False
    for i in range(1, count(weights, re.escape(UNET) + r"input_blocks\.(\d+)\.")):
        block = f"{UNET}input_blocks.{i}."
        if block + "0.op.weight" in weights:
            layers.append(0)
            continue
        if layers[-1] == 0:
            channels.append(weights[block + "0.in_layers.2.weight"].shape[0])
            crossed.append(block + "1.proj_in.weight" in weights)
        layers[-1] += 1
        if crossed[-1]:
            context = weights[block + "1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
            linear = weights[block + "1.proj_in.weight"].ndim == 2
    heads: Any = [max(1, width // HEAD_SIZE) for width in channels] if linear else 8
    return {
        "block_out_channels": channels,
        "layers_per_block": layers[0],
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        "attention_head_dim": heads,
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossed)],
    }


def vae_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    levels = count(weights, re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    return {
        "block_out_channels": [weights[f"{VAE}encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
        "layers_per_block": count(weights, re.escape(VAE) + r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_config(weights: dict[str, Tensor], second: bool, preset: Architecture) -> dict[str, Any]:
    if second:
        vocabulary, width = weights[OPEN_CLIP + "token_embedding.weight"].shape
        layers = (
            count(weights, re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\.") - 1
        )  # the last block is not used
        inner = weights[OPEN_CLIP + "transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    else:
        prefix = CLIP + "text_model."
        if prefix + "embeddings.token_embedding.weight" not in weights:
            raise UnsupportedModelError(
                f"the checkpoint has neither {prefix}* (SD 1.x) nor {OPEN_CLIP}* (SD 2.x): its text encoder is not CLIP"
            )
        vocabulary, width = weights[prefix + "embeddings.token_embedding.weight"].shape
        layers = count(weights, re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
        inner = weights[prefix + "encoder.layers.0.mlp.fc1.weight"].shape[0]
    return {
        **preset.text_encoder,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": max(1, width // HEAD_SIZE),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def unet(file: Path, weights: dict[str, Tensor], known: Architecture) -> UNet2DConditionModel:
    model = UNet2DConditionModel(**known.unet)
    fill(file, model, convert_ldm_unet_checkpoint(dict(weights), dict(model.config)))
    return model


def vae(file: Path, weights: dict[str, Tensor], known: Architecture) -> AutoencoderKL:
    model = AutoencoderKL(**known.vae)
    fill(file, model, convert_ldm_vae_checkpoint(dict(weights), dict(model.config)))
    return model


def text_encoder(file: Path, weights: dict[str, Tensor], known: Architecture) -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig(**known.text_encoder))
    if OPEN_CLIP + "token_embedding.weight" in weights:
        last = f"{OPEN_CLIP}transformer.resblocks.{known.text_encoder['num_hidden_layers']}."
        converted = convert_open_clip_checkpoint(
            model, {name: value for name, value in weights.items() if not name.startswith(last)}
        )
    else:
        converted = convert_ldm_clip_checkpoint(weights)
    named = {name.removeprefix("text_model."): value for name, value in converted.items()}
    fill(
        file,
        model,
        {
            name: value
            for name, value in named.items()
            if name not in ("embeddings.position_ids", "text_projection.weight")
        },
    )
    return model


def fill(file: Path, model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Fills exactly the weights of the model, as float32. UnreadableModelError names those that do not fit."""
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    mismatched = [
        (name, value.shape, wanted[name])
        for name, value in weights.items()
        if name in wanted and value.shape != wanted[name]
    ]
    files.check_fit(file, wanted.keys() - weights.keys(), weights.keys() - wanted.keys(), mismatched)
    model.load_state_dict({name: weights[name].float() for name in wanted})
    model.eval()
