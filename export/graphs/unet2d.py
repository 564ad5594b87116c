"""The denoiser's graph of models without texts: a UNet2DModel on pixels or on latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .denoiser import guide
from .precision import prepare


class ResampledBlock(nn.Module):
    """A ResnetBlock2D that doubles the size, without diffusers' workaround for large batches, which a trace with
    dynamic sizes cannot follow. `size` is the size of the result."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.block = block

    def forward(self, sample: Tensor, embedding: Tensor, size: Sequence[int]) -> Tensor:
        block = self.block
        hidden = block.nonlinearity(block.norm1(sample))
        sample, hidden = (F.interpolate(one, size=size, mode="nearest") for one in (sample, hidden))
        hidden = block.conv1(hidden)
        change = block.time_emb_proj(block.nonlinearity(embedding))[:, :, None, None]
        if block.time_embedding_norm == "scale_shift":
            scale, shift = change.chunk(2, dim=1)
            hidden = block.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = block.norm2(hidden + change)
        hidden = block.conv2(block.nonlinearity(hidden))
        if block.conv_shortcut is not None:
            sample = block.conv_shortcut(sample)
        return (sample + hidden) / block.output_scale_factor


class UNet2D(nn.Module):
    """UNet2DModel.forward for samples of any size, with the embedding of the timestep and the class given."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet
        for block in unet.up_blocks:
            for i, upsampler in enumerate(block.upsamplers or ()):
                if isinstance(upsampler, ResnetBlock2D):
                    block.upsamplers[i] = ResampledBlock(upsampler)

    def forward(self, sample: Tensor, embedding: Tensor) -> Tensor:
        unet = self.unet
        sample = unet.conv_in(2 * sample - 1 if unet.config.center_input_sample else sample)
        skips = [sample]
        for block in unet.down_blocks:
            sample, outputs = block(hidden_states=sample, temb=embedding)
            skips += outputs
        if unet.mid_block is not None:
            sample = unet.mid_block(sample, embedding)
        for block in unet.up_blocks:
            sample = _up(block, sample, embedding, skips)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))


def _up(block: Any, sample: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
    """An UpBlock2D, AttnUpBlock2D or ResnetUpsampleBlock2D. It takes its skip connections off the list. Upsampling asks
    for the size of the next one: the same as doubling, and right for the sizes that halving rounds."""
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    for resnet, attention in zip(block.resnets, attentions):
        sample = resnet(torch.cat([sample, skips.pop()], dim=1), embedding)
        if attention is not None:
            sample = attention(sample)
    for upsampler in block.upsamplers or ():
        size = skips[-1].shape[2:]
        if isinstance(upsampler, ResampledBlock):
            sample = upsampler(sample, embedding, size)
        else:
            sample = upsampler(sample, size)
    return sample


class TextlessDenoiser(nn.Module):
    """One whole denoising step: U-Net, the sampler's clipping and learned variance, and its update."""

    def __init__(self, unet: UNet2DModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        prepare(unet, dtype, fused_attention)
        unet.time_embedding.float()
        self.unet, self.dtype = UNet2D(unet), dtype

    def forward(
        self,
        state: Tensor,
        row_sample: Tensor,
        timestep: Tensor,
        mixing: Tensor,
        rescale: Tensor,
        update: Tensor,
        noise: Tensor,
        clip: Tensor,
        class_labels: Tensor | None = None,
        variance: Tensor | None = None,
    ) -> Tensor:
        channels, sample = state.shape[2], state[:, 0]
        output = self.predict(sample, row_sample, timestep, class_labels)
        guided = guide(output[:, :channels], mixing, rescale)
        noise = noise.flatten(1)
        if variance is not None:
            chosen = torch.matmul(mixing, output[:, channels:].flatten(1))
            noise = noise * deviation(chosen, variance)
        within = clipped(sample.flatten(1), guided.squeeze(1), clip)
        columns = [state.flatten(2), guided, noise.unsqueeze(1), within.unsqueeze(1)]
        return torch.bmm(update, torch.cat(columns, dim=1)).reshape(state.shape)

    def predict(self, sample: Tensor, row_sample: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """What the U-Net makes of samples [batch, C, h, w], for each row, in float32."""
        unet = self.unet.unet
        rows = torch.index_select(sample, 0, row_sample)
        embedding = unet.time_embedding(unet.time_proj(timestep))
        embedding = torch.index_select(embedding, 0, row_sample).to(self.dtype)
        if class_labels is not None:
            embedding = embedding + unet.class_embedding(class_labels)
        return self.unet(rows.to(self.dtype), embedding).float()


def deviation(chosen: Tensor, variance: Tensor) -> Tensor:
    """The standard deviation of each element, arXiv 2102.09672 equation 15. `chosen` [batch, n], in -1..1, lies between
    the smallest and the largest logarithm of `variance` [batch, 2], of which the largest comes first."""
    largest, smallest = variance[:, :1], variance[:, 1:]
    fraction = (chosen + 1) / 2
    return torch.exp(0.5 * (fraction * largest + (1 - fraction) * smallest))


def clipped(sample: Tensor, output: Tensor, clip: Tensor) -> Tensor:
    """The predicted clean sample [batch, n] within its range. clip [batch, 3]: its factors and its limit."""
    p, q, limit = clip[:, :1], clip[:, 1:2], clip[:, 2:]
    return torch.minimum(torch.maximum(p * sample + q * output, -limit), limit)
