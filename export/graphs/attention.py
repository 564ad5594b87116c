"""Attention as the graphs have it, in place of diffusers' processors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

TINY = 1e-12
"""Added to a squared length, for a query of zeros."""


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
