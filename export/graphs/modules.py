"""The four torch modules that are traced. Inputs and outputs are the contract in engine/contract.py.

Each takes float32 (or integers) and returns float32 (or pixels); inside, matrix products and convolutions run in the
precision asked for, while norms, the timestep embedding and the softmax of U-Net and VAE stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers import CLIPTextModel

from ..sources.checks import check_text_encoder, check_unet, check_vae

MAGNITUDE_UNIT = 2.0**-20
"""Keeps the sum over a picture's values near 1."""

TINY = 1e-12
"""Added to a squared length, for a query of zeros."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Float32Norm(nn.Module):
    """A norm that computes in float32 and returns what it was given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.float()).to(x.dtype)


class Upsample(nn.Module):
    """diffusers' Upsample2D without its workarounds for huge tensors, which a trace with dynamic sizes cannot
    follow."""

    def __init__(self, original: Upsample2D) -> None:
        super().__init__()
        self.conv = original.conv

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        if output_size is None:
            return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(hidden_states, size=output_size, mode="nearest"))


class PlainAttention:
    """An attention processor for diffusers: scaled Q, float32 softmax, no workarounds.

    `upcast_attention` models (SD 2.1) have scores beyond the range of float16. Their graphs in float16 multiply
    `bounded_scores`, others in float32. `fused` leaves all of it to one operator of the graph, whose softmax the
    runtime computes in float32, but not for those models."""

    def __init__(self, fused: bool) -> None:
        self._fused = fused

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, value = split(attn.to_q(hidden_states) * attn.scale), split(attn.to_v(context))
        if self._fused and not attn.upcast_attention:
            mixed = F.scaled_dot_product_attention(query, split(attn.to_k(context)), value, scale=1.0)
        else:
            if not attn.upcast_attention:
                scores = query @ split(attn.to_k(context)).transpose(-1, -2)
            elif query.dtype == torch.float16:
                scores = bounded_scores(query, split(F.linear(centred(context), attn.to_k.weight)))
            else:
                scores = query.float() @ split(attn.to_k(context)).float().transpose(-1, -2)
            mixed = torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value
        output = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        if len(shape) == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


def centred(tokens: Tensor) -> Tensor:
    """Tokens [B, N, C] minus their mean over N. Keys that are linear in them lose one vector that all share (and a
    bias), which adds the same number to all scores of a query: softmax is unchanged. What is left is small, so that
    rounding it to half loses little; a float32 product comes too late for that."""
    wide = tokens.float()
    return (wide - wide.sum(dim=1, keepdim=True) / tokens.shape[1]).to(tokens.dtype)


def bounded_scores(query: Tensor, key: Tensor) -> Tensor:
    """query @ key^T in float32 by a product in half precision that cannot overflow, whatever finite values [B, H, N, D]
    there are.

    Each query is divided by its length and by sqrt(D) before the product and multiplied by both after it. By Cauchy and
    Schwarz no score in between is larger than |key| / sqrt(D), which is at most the largest element of the key.
    Centring the keys alone bounds what they have in common, not their spread."""
    wide = query.float()
    length = (query.shape[-1] * wide.square().sum(dim=-1, keepdim=True) + TINY).sqrt()
    return ((wide / length).to(key.dtype) @ key.transpose(-1, -2)).float() * length


def _replace(
    module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...], replacement: type[nn.Module]
) -> None:
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, replacement(child))
        else:
            _replace(child, kind, replacement)


def _prepare(module: nn.Module, dtype: torch.dtype, fused_attention: bool) -> None:
    """Sets the precision of a module in place and makes it traceable."""
    module.eval().requires_grad_(False)
    module.to(dtype)
    if dtype != torch.float32:
        _replace(module, (nn.GroupNorm, nn.LayerNorm), Float32Norm)
    _replace(module, Upsample2D, Upsample)
    for child in module.modules():
        if isinstance(child, Attention):
            child.processor = PlainAttention(fused_attention)


class TextEncoder(nn.Module):
    """input_ids [rows, 77] int32 -> context [rows, 77, C]."""

    def __init__(self, model: CLIPTextModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_text_encoder(model.config.to_dict())
        # The softmax of "eager" asks for float32, and torch's exporter drops that: in graphs in half precision it is in
        # half, well within tolerance.
        model.set_attn_implementation("sdpa" if fused_attention else "eager")
        _prepare(model, dtype, fused_attention)
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).last_hidden_state.float()


class Denoiser(nn.Module):
    """One whole denoising step: U-Net, guidance and sampler. The timestep of a sample is embedded once, in float32,
    and spread to its rows."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_unet(unet.config)
        _prepare(unet, dtype, fused_attention)
        unet.time_embedding.float()
        self.unet, self.dtype = unet, dtype

    def forward(
        self,
        state: Tensor,
        row_sample: Tensor,
        context: Tensor,
        timestep: Tensor,
        mixing: Tensor,
        update: Tensor,
        noise: Tensor,
    ) -> Tensor:
        rows = torch.index_select(state[:, 0], 0, row_sample)
        embedding = torch.index_select(self._embed(timestep), 0, row_sample)
        output = self._evaluate(rows.to(self.dtype), embedding.to(self.dtype), context.to(self.dtype)).float()
        guided = torch.matmul(mixing, output.flatten(1))
        columns = torch.cat([state.flatten(2), guided.unsqueeze(1), noise.flatten(1).unsqueeze(1)], dim=1)
        return torch.bmm(update, columns).reshape(state.shape)

    def _embed(self, timestep: Tensor) -> Tensor:
        return self.unet.time_embedding(self.unet.time_proj(timestep))

    def _evaluate(self, sample: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        """UNet2DConditionModel.forward for the models of Stable Diffusion 1.x and 2.x. Upsampling always asks for the
        size of the skip connection: the same as doubling, and right for the sizes that halving rounds."""
        unet = self.unet
        sample = unet.conv_in(sample)
        skips = [sample]
        for block in unet.down_blocks:
            crossed = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            sample, outputs = block(hidden_states=sample, temb=embedding, **crossed)
            skips += outputs
        sample = unet.mid_block(sample, embedding, encoder_hidden_states=context)
        for i, block in enumerate(unet.up_blocks):
            used, skips = tuple(skips[-len(block.resnets) :]), skips[: -len(block.resnets)]
            crossed = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            size = skips[-1].shape[2:] if i < len(unet.up_blocks) - 1 else None
            sample = block(
                hidden_states=sample, temb=embedding, res_hidden_states_tuple=used, upsample_size=size, **crossed
            )
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))


class VaeDecoder(nn.Module):
    """latents [batch, 4, height, width] -> image [batch, 8 height, 8 width, 3] uint8, rounded as diffusers does, and
    magnitude [batch]. The cast to uint8 comes last: TensorRT moves nothing else in that type."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_vae(vae.config)
        vae.encoder = None
        _prepare(vae, dtype, fused_attention)
        self.vae, self.dtype = vae, dtype

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        z = (latents / self.vae.config.scaling_factor).to(self.dtype)
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        image = self.vae.decoder(z).float()
        magnitude = (image.abs() * MAGNITUDE_UNIT).sum(dim=(1, 2, 3))
        return torch.round((image / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).contiguous().to(
            torch.uint8
        ), magnitude


class VaeEncoder(nn.Module):
    """image [batch, 8 height, 8 width, 3] uint8 -> mean and std of the latents, both scaled as the U-Net sees them."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_vae(vae.config)
        vae.decoder = None
        _prepare(vae, dtype, fused_attention)
        self.vae, self.dtype = vae, dtype

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image.float().permute(0, 3, 1, 2) / 127.5 - 1
        moments = self.vae.encoder(pixels.to(self.dtype))
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return mean * self.vae.config.scaling_factor, std * self.vae.config.scaling_factor
