"""Checkpoints of CompVis' latent diffusion without text (arXiv 2112.10752): OpenAI's U-Net on the latents of a VQ-VAE
or of a VAE."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from ..errors import UnsupportedModelError
from . import averages, compvis, openai
from . import weights as files
from .compvis import UNET, VAE
from .openai import OpenAIUNet
from .openai_flags import Flags

CODEBOOK = "quantize.embedding.weight"


@dataclass(frozen=True)
class LatentDiffusion:
    """The parts as diffusers would have them. decoder: VQModel or AutoencoderKL, with its configuration and weights."""

    unet: OpenAIUNet
    decoder: type[VQModel] | type[AutoencoderKL]
    decoder_config: dict[str, Any]
    decoder_weights: dict[str, Tensor]
    scheduler: dict[str, Any]

    def decoder_model(self, file: Path) -> VQModel | AutoencoderKL:
        """The decoder in float32. UnreadableModelError names tensors that do not fit."""
        model = self.decoder(**self.decoder_config)
        compvis.fill(file, model, self.decoder_weights)
        return model


def is_latent_diffusion(names: set[str]) -> bool:
    """Whether tensors are those of a latent diffusion model that takes no text and no class."""
    conditioned = any(name.startswith("cond_stage_model.") or ".transformer_blocks." in name for name in names)
    return UNET + "time_embed.0.weight" in names and not conditioned


def read(weights: dict[str, Tensor], file: Path, flags: Flags) -> LatentDiffusion:
    """The parts of a checkpoint. The U-Net's weights are the running averages where the file has them, as in CompVis'
    own scripts.

    Raises UnsupportedModelError for parts that diffusers has no class for, and UsageError where a flag is needed.
    """
    if VAE + "decoder.conv_in.weight" not in weights:
        raise UnsupportedModelError(
            f"{file} has no {VAE}* tensors, so nothing decodes its latents; use the whole checkpoint"
        )
    unet = openai.read_unet(_unet_weights(weights), file, flags)
    kind, config = _decoder(weights, file)
    stage = {name: value for name, value in weights.items() if name.startswith(VAE)}
    files.refuse_integers(file, files.integers_of(stage))
    converted = convert_ldm_vae_checkpoint(dict(stage), config)
    if kind is VQModel:
        converted[CODEBOOK] = stage[VAE + CODEBOOK]
    config["sample_size"] = unet.config["sample_size"] * 2 ** (len(config["block_out_channels"]) - 1)
    return LatentDiffusion(unet, kind, config, converted, _scheduler(weights, file))


def _unet_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's weights without their prefix, as running averages where there are some."""
    chosen = {}
    for name, value in weights.items():
        if name.startswith(UNET):
            chosen[name.removeprefix(UNET)] = weights.get(averages.average_of(name), value)
    return chosen


def _decoder(weights: dict[str, Tensor], file: Path) -> tuple[type[VQModel] | type[AutoencoderKL], dict[str, Any]]:
    """The class of the first stage and its configuration, from the shapes."""
    if compvis.count(weights, re.escape(VAE) + r"encoder\.down\.(\d+)\.attn\."):
        raise UnsupportedModelError(
            f"{file}: the first stage has attention at more than its lowest resolution, which is not supported"
        )
    factor = weights.get("scale_factor")
    config = {
        **compvis.vae_config(weights),
        "latent_channels": weights[VAE + "decoder.conv_in.weight"].shape[1],
        "scaling_factor": 1.0 if factor is None else float(factor),
    }
    codebook = weights.get(VAE + CODEBOOK)
    if codebook is None:
        return AutoencoderKL, config
    return VQModel, {**config, "num_vq_embeddings": codebook.shape[0], "vq_embed_dim": codebook.shape[1]}


def _scheduler(weights: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """The scheduler_config.json of CompVis' DDIM. The schedule is the buffer `betas`: scaled linear, in their words
    "linear", or any other as it is."""
    if "betas" not in weights:
        raise UnsupportedModelError(
            f"{file} has no betas, so its noise schedule is not known; use the checkpoint as it was trained, which "
            "holds them"
        )
    betas = weights["betas"].double()
    ends = betas[[0, -1]].sqrt()
    scaled = torch.linspace(float(ends[0]), float(ends[1]), len(betas), dtype=torch.float64).square()
    schedule: dict[str, Any] = {"trained_betas": betas.tolist()}
    if np.allclose(betas, scaled, rtol=1e-5):
        start, end = (float(f"{value:.6g}") for value in betas[[0, -1]].tolist())
        schedule = {"beta_schedule": "scaled_linear", "beta_start": start, "beta_end": end}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas),
        **schedule,
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
