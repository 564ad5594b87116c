"""The text encoder's graph of latent diffusion."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from torch import Tensor, nn

from .precision import prepare
from .text_encoder import emphasized, taken


class BertEncoder(nn.Module):
    """The inputs of `TextEncoder` -> context [rows, 77, C]. LDMBertModel.forward without a mask, and without its check
    of half precision, which depends on the values."""

    def __init__(self, model: LDMBertModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        prepare(model, dtype, fused_attention)
        encoder = model.model
        self.positions, self.layers, self.norm = encoder.embed_positions, encoder.layers, encoder.layer_norm
        self.dtype = dtype

    def forward(self, embeddings: Tensor, emphasis: Tensor, restore: Tensor, skip: Tensor) -> Tensor:
        hidden = embeddings.to(self.dtype) + self.positions.weight
        for number, layer in enumerate(self.layers, 1):
            made = hidden + attend(layer.self_attn, layer.self_attn_layer_norm(hidden))
            made = made + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(made))))
            hidden = torch.where(taken(number, len(self.layers), skip), made, hidden)
        return emphasized(self.norm(hidden).float(), emphasis, restore)


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
