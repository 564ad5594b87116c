"""The text encoder's graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from ..sources.checks import check_text_encoder
from .precision import prepare


class TextEncoder(nn.Module):
    """input_ids [rows, 77] int32 -> context [rows, 77, C]."""

    def __init__(self, model: CLIPTextModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_text_encoder(model.config.to_dict())
        # The softmax of "eager" asks for float32, and torch's exporter drops that: in graphs in half precision it is in
        # half, well within tolerance.
        model.set_attn_implementation("sdpa" if fused_attention else "eager")
        prepare(model, dtype, fused_attention)
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).last_hidden_state.float()
