"""How each component's graph is made: one row a component.

The modules take float32 (or integers) and return float32 (or pixels), as the contract says; inside, matrix products and
convolutions run in the precision asked for, while norms, the timestep's embedding and the softmax of U-Net and VAE stay
in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .bert import BertEncoder
from .denoiser import Denoiser, JoinedDenoiser
from .text_encoder import TextEncoder
from .tracing import ATTENTION_OPSET
from .unet2d import TextlessDenoiser
from .vae import KlDecoder, PixelDecoder, UnscaledEncoder, UpscalerDecoder, VaeDecoder, VaeEncoder, VqDecoder


class GraphModule(Protocol):
    """Makes the module that is traced of a part of the model, which it changes in place."""

    def __call__(self, model: Any, dtype: torch.dtype, fused_attention: bool = False, /) -> nn.Module: ...


@dataclass(frozen=True)
class Recipe:
    """`part` of the model, wrapped in `module`, makes the graph. `fuses`: its attention may become one operator, which
    TensorRT runs as a fused kernel or not at all; the kernels are for half precision and heads of 16 to 256 in steps of
    8, and the VAE has one head of 512."""

    part: str
    module: GraphModule
    fuses: bool = False

    def fuses_attention(self, precision: str, opset: int) -> bool:
        """Whether the graph leaves attention to one operator."""
        return self.fuses and opset >= ATTENTION_OPSET and precision != "fp32"


Recipes = Mapping[str, Recipe]
"""By the component's name."""

RECIPES: Recipes = {
    "text_encoder": Recipe("text_encoder", TextEncoder, fuses=True),
    "vae_decoder": Recipe("vae", VaeDecoder),
    "vae_encoder": Recipe("vae", VaeEncoder),
    "denoiser": Recipe("unet", Denoiser, fuses=True),
}
"""In the order in which they are traced: the largest last, when the memory of the others is free again."""

_JOINED: Recipes = {**RECIPES, "denoiser": Recipe("unet", JoinedDenoiser, fuses=True)}

JOINED: Mapping[str, Recipes] = {
    "depth": _JOINED,
    "mask": _JOINED,
    "image": {**_JOINED, "vae_encoder": Recipe("vae", UnscaledEncoder)},
    "low_resolution": {**_JOINED, "vae_decoder": Recipe("vae", UpscalerDecoder)},
}
"""U-Nets that see more than latents, by what they see (JOINS). The upscaler's family has no encoder."""

PIXELS: Recipes = {
    "vae_decoder": Recipe("unet", PixelDecoder),
    "denoiser": Recipe("unet", TextlessDenoiser, fuses=True),
}
"""DDPM and Improved DDPM: a UNet2DModel alone."""
VQ_LATENTS: Recipes = {**PIXELS, "vae_decoder": Recipe("vqvae", VqDecoder)}
KL_LATENTS: Recipes = {**PIXELS, "vae_decoder": Recipe("vqvae", KlDecoder)}
"""Unconditional latent diffusion, with a VQ-VAE and with a VAE."""

BERT_KL: Recipes = {
    "text_encoder": Recipe("bert", BertEncoder),
    "vae_decoder": Recipe("vqvae", VaeDecoder),
    "vae_encoder": Recipe("vqvae", VaeEncoder),
    "denoiser": RECIPES["denoiser"],
}
BERT_VQ: Recipes = {
    "text_encoder": Recipe("bert", BertEncoder),
    "vae_decoder": Recipe("vqvae", VqDecoder),
    "denoiser": RECIPES["denoiser"],
}
"""Latent diffusion with a text, with a VAE and with a VQ-VAE."""
