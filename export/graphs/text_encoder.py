"""The text encoder's graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.masking_utils import create_causal_mask

from ..sources.checks import check_text_encoder
from .precision import prepare

LEAST_MEAN = 1e-4
"""Means below this part of the mean size of the values are rounding, as with a final norm that has no bias: they are
not restored."""


class TextEncoder(nn.Module):
    """embeddings [rows, 77, W], emphasis [rows, 77], restore and skip [rows] int32 -> context [rows, 77, C]: what
    CLIPTextModel makes of tokens with these embeddings, `hidden_states[-(skip + 1)]` after the final norm."""

    def __init__(self, model: CLIPTextModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_text_encoder(model.config.to_dict())
        # The softmax of "eager" asks for float32, and torch's exporter drops that: in graphs in half precision it is in
        # half, well within tolerance.
        model.set_attn_implementation("sdpa" if fused_attention else "eager")
        prepare(model, dtype, fused_attention)
        self.config, self.dtype = model.config, dtype
        self.positions = model.embeddings.position_embedding
        self.layers: nn.ModuleList = model.encoder.layers
        self.norm: Any = model.final_layer_norm

    def forward(self, embeddings: Tensor, emphasis: Tensor, restore: Tensor, skip: Tensor) -> Tensor:
        hidden = embeddings.to(self.dtype) + self.positions.weight
        mask = create_causal_mask(config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        for number, layer in enumerate(self.layers, 1):
            made = layer(hidden, mask, is_causal=True)
            hidden = torch.where(taken(number, len(self.layers), skip), made, hidden)
        return emphasized(self.norm(hidden).float(), emphasis, restore)


def token_table(model: Any) -> Tensor:
    """The vectors of a text encoder's tokens [tokens, W]."""
    table: Tensor = model.get_input_embeddings().weight.detach()
    return table


def taken(number: int, layers: int, skip: Tensor) -> Tensor:
    """Whether each row [rows, 1, 1] goes through the layer of that number, from 1."""
    return skip[:, None, None] <= layers - number


def emphasized(context: Tensor, emphasis: Tensor, restore: Tensor) -> Tensor:
    """Each token's vector times its weight; where `restore` is 1, the whole then has the mean that it had. A row whose
    weights are all 1 stays bit for bit."""
    weighted = context * emphasis[:, :, None]
    before, after = _sum(context), _sum(weighted)
    changed = (emphasis - 1).abs().sum(dim=1)[:, None, None] > 0
    sure = after.abs() > LEAST_MEAN * _sum(weighted.abs())
    wanted = changed & sure & (restore[:, None, None] > 0)
    factor = torch.where(wanted, before / torch.where(wanted, after, 1.0), 1.0)
    return weighted * factor


def _sum(context: Tensor) -> Tensor:
    """Over the tokens and channels of each row."""
    return context.flatten(1).sum(dim=1)[:, None, None]
