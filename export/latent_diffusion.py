"""The pictures of diffusers' LDMTextToImagePipeline: what bundles of latent diffusion with a text are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from diffusers import LDMTextToImagePipeline
from torch import Tensor, nn


def with_scheduler(
    parts: Mapping[str, nn.Module], tokenizer: Any, scheduler: Mapping[str, Any]
) -> LDMTextToImagePipeline:
    """The pipeline of these parts, without a progress bar."""
    made = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    pipeline = LDMTextToImagePipeline(**parts, tokenizer=tokenizer, scheduler=made)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: LDMTextToImagePipeline, prompt: str, **arguments: Any) -> tuple[Tensor, Tensor]:
    """One picture: its latents [C, h, w] and its values [H, W, 3] in 0..1. The pipeline returns no latents, so they are
    taken from what it decodes."""
    decode, seen = pipeline.vqvae.decode, []

    def watched(latents: Tensor) -> Any:
        seen.append(latents * pipeline.vqvae.config.scaling_factor)
        return decode(latents)

    with patch.object(pipeline.vqvae, "decode", watched):
        values = pipeline([prompt], output_type="np", **arguments).images
    return seen[0][0], torch.from_numpy(values[0])
