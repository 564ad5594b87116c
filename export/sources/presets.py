"""Exact configurations of the known architectures, independent of any download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLIP_VOCABULARY = 49408
"""Entries of CLIP's vocabulary; the last two are the start and the end token."""


@dataclass(frozen=True)
class Architecture:
    """The constructor arguments of a model's parts, its scheduler_config.json, and the token that pads its prompts."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    pad_token: str


_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_SD1_UNET = {**_UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD2_UNET = {**_UNET, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_CLIP_L = {
    "vocab_size": CLIP_VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "max_position_embeddings": 77,
}
_OPEN_CLIP_H = {
    "vocab_size": CLIP_VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
    "max_position_embeddings": 77,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_PNDM = {**_SCHEDULER, "_class_name": "PNDMScheduler", "prediction_type": "epsilon"}
_DDIM_V = {**_SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}

ARCHITECTURES = {
    "sd15": Architecture(_SD1_UNET, {**_VAE, "sample_size": 512}, _CLIP_L, _PNDM, "<|endoftext|>"),
    "sd21": Architecture(
        {**_SD2_UNET, "sample_size": 96, "upcast_attention": True},
        {**_VAE, "sample_size": 768},
        _OPEN_CLIP_H,
        _DDIM_V,
        "!",
    ),
    "sd21-base": Architecture({**_SD2_UNET, "sample_size": 64}, {**_VAE, "sample_size": 512}, _OPEN_CLIP_H, _PNDM, "!"),
}
