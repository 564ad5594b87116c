"""What makes pixels of latents and latents of pixels: the two halves of a VAE, the decoder of a VQ-VAE, and for models
on pixels a clamp and a scale. The VAE's graphs each take their half of one model and leave the other as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from ..sources.checks import UPSCALER_FACTOR, check_vae
from .precision import prepare

UPSCALER_SCALE = 0.08333
"""The scaling_factor that diffusers' pipeline takes, whatever the model says."""

MAGNITUDE_UNIT = 2.0**-20
"""Keeps the sum over a picture's values near 1."""


def finished(image: Tensor) -> tuple[Tensor, Tensor]:
    """image [batch, 3, H, W] float32 in -1..1 -> [batch, H, W, 3] uint8, rounded as diffusers does, and magnitude
    [batch]. The cast to uint8 comes last: TensorRT moves nothing else in that type."""
    magnitude = (image.abs() * MAGNITUDE_UNIT).sum(dim=(1, 2, 3))
    pixels = torch.round((image / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).contiguous()
    return pixels.to(torch.uint8), magnitude


class PixelDecoder(nn.Module):
    """Samples of a model on pixels, with one channel or three -> image and magnitude. Grey becomes three equal
    channels."""

    def __init__(self, unet: nn.Module, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return finished(latents.expand(-1, 3, -1, -1))


class VqDecoder(nn.Module):
    """latents [batch, C, height, width] -> image and magnitude. Each latent becomes the nearest entry of the codebook,
    found in float32."""

    def __init__(self, model: VQModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder
        self.codebook = nn.Parameter(model.quantize.embedding.weight.detach().float(), requires_grad=False)
        self.scale, self.dtype = float(model.config.scaling_factor), dtype
        prepare(self.post_quant_conv, dtype, fused_attention)
        prepare(self.decoder, dtype, fused_attention)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        z = nearest((latents / self.scale).permute(0, 2, 3, 1), self.codebook).permute(0, 3, 1, 2)
        return finished(self.decoder(self.post_quant_conv(z.to(self.dtype))).float())


def nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """The entry of the codebook [n, C] that is nearest to each value [..., C]. What all distances of a value have in
    common, its own length, is left out."""
    distances = (codebook * codebook).sum(dim=1) - 2 * torch.matmul(values, codebook.T)
    return F.embedding(torch.argmin(distances, dim=-1), codebook)


class KlDecoder(nn.Module):
    """latents [batch, C, height, width] -> image and magnitude, by an AutoencoderKL of any factor."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.scale, self.dtype = float(vae.config.scaling_factor), dtype
        prepare(self, dtype, fused_attention)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        z = (latents / self.scale).to(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return finished(self.decoder(z).float())


class VaeDecoder(KlDecoder):
    """That of Stable Diffusion."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        check_vae(vae.config)
        super().__init__(vae, dtype, fused_attention)


class UpscalerDecoder(KlDecoder):
    """That of the x4 upscaler, whose latents have a quarter of a picture's height and width."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        check_vae(vae.config, UPSCALER_FACTOR)
        super().__init__(vae, dtype, fused_attention)
        self.scale = UPSCALER_SCALE


class VaeEncoder(nn.Module):
    """image [batch, 8 height, 8 width, 3] in -1..1 -> mean and std of the latents, scaled as the U-Net sees
    them."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_vae(vae.config)
        self.quant_conv, self.encoder = vae.quant_conv, vae.encoder
        self.scale, self.dtype = float(vae.config.scaling_factor), dtype
        prepare(self, dtype, fused_attention)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.encoder(image.permute(0, 3, 1, 2).to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return mean * self.scale, std * self.scale


class UnscaledEncoder(VaeEncoder):
    """That of InstructPix2Pix, whose U-Net sees a picture's latents as the VAE makes them."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__(vae, dtype, fused_attention)
        self.scale = 1.0
