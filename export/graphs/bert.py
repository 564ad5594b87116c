"""The text encoder's graph of latent diffusion."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from torch import Tensor, nn

from .precision import prepare


class BertEncoder(nn.Module):
    """input_ids [rows, 77] int32 -> context [rows, 77, C]. LDMBertModel.forward without a mask, and without its check
    of half precision, which depends on the values."""

    def __init__(self, model: LDMBertModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        prepare(model, dtype, fused_attention)
        self.encoder = model.model

    def forward(self, input_ids: Tensor) -> Tensor:
        encoder = self.encoder
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = encoder.embed_tokens(input_ids) + encoder.embed_positions(positions)
        for layer in encoder.layers:
            hidden = hidden + attend(layer.self_attn, layer.self_attn_layer_norm(hidden))
            hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
        context: Tensor = encoder.layer_norm(hidden).float()
        return context


def attend(attention: Any, hidden: Tensor) -> Tensor:
    """Self-attention over all tokens, with a softmax in float32."""

    def heads(projection: nn.Module) -> Tensor:
        split: Tensor = projection(hidden).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        return split

    query = heads(attention.q_proj) * attention.scaling
    scores = query @ heads(attention.k_proj).transpose(-1, -2)
    mixed = torch.softmax(scores.float(), dim=-1).to(hidden.dtype) @ heads(attention.v_proj)
    output: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return output
