"""Modules in the precision that was asked for: matrix products and convolutions in it, norms in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from .attention import PlainAttention

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


def _replace(
    module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...], replacement: type[nn.Module]
) -> None:
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, replacement(child))
        else:
            _replace(child, kind, replacement)


def prepare(module: nn.Module, dtype: torch.dtype, fused_attention: bool) -> None:
    """Sets the precision of a module in place and makes it traceable."""
    module.eval().requires_grad_(False)
    module.to(dtype)
    if dtype != torch.float32:
        _replace(module, (nn.GroupNorm, nn.LayerNorm), Float32Norm)
    _replace(module, Upsample2D, Upsample)
    for child in module.modules():
        if isinstance(child, Attention):
            child.processor = PlainAttention(fused_attention)


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the weights in place to what they will be in the graph, so that only its arithmetic is compared. Norms and
    the timestep's embedding stay as they are."""
    if dtype == torch.float32:
        return
    norms = (nn.GroupNorm, nn.LayerNorm, Float32Norm)
    exact = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    exact |= {id(p) for p in getattr(model, "time_embedding", nn.Module()).parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in exact:
                parameter.copy_(parameter.to(dtype).float())
