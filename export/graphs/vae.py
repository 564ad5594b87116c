"""The VAE's two graphs. Each takes its half of one model and leaves the other half as it is."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..sources.checks import check_vae
from .precision import prepare

MAGNITUDE_UNIT = 2.0**-20
"""Keeps the sum over a picture's values near 1."""


class VaeDecoder(nn.Module):
    """latents [batch, 4, height, width] -> image [batch, 8 height, 8 width, 3] uint8, rounded as diffusers does, and
    magnitude [batch]. The cast to uint8 comes last: TensorRT moves nothing else in that type."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_vae(vae.config)
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.scale, self.dtype = float(vae.config.scaling_factor), dtype
        prepare(self, dtype, fused_attention)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        z = (latents / self.scale).to(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        image = self.decoder(z).float()
        magnitude = (image.abs() * MAGNITUDE_UNIT).sum(dim=(1, 2, 3))
        pixels = torch.round((image / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).contiguous()
        return pixels.to(torch.uint8), magnitude


class VaeEncoder(nn.Module):
    """image [batch, 8 height, 8 width, 3] uint8 -> mean and std of the latents, both scaled as the U-Net sees them."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_vae(vae.config)
        self.quant_conv, self.encoder = vae.quant_conv, vae.encoder
        self.scale, self.dtype = float(vae.config.scaling_factor), dtype
        prepare(self, dtype, fused_attention)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image.float().permute(0, 3, 1, 2) / 127.5 - 1
        moments = self.encoder(pixels.to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return mean * self.scale, std * self.scale
