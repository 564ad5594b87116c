"""Comparisons with NumPy alone: random inputs of a component, differences, and their tolerances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.contract import SLOTS, Component, Sizes, Tensor

COMPONENT_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
"""Relative RMS difference. Rounding alone gives a Stable Diffusion U-Net 2.6e-6, 1.3e-3 and 1.3e-2."""

PIXEL_TOLERANCE = 2e-3
"""The least tolerance for the VAE decoder. Its pixels are integers, and a value halfway between two may be rounded
either way."""

PICTURE_TOLERANCE = {"fp32": 50.0, "fp16": 30.0, "bf16": 20.0}
"""The least accepted PSNR in dB. A difference of 1 of 255 everywhere is 48 dB."""


@dataclass(frozen=True)
class Difference:
    """How far one array is from another."""

    max_abs: float
    relative_rms: float


def difference(actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Largest absolute and relative root mean square difference."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    scale = math.sqrt((b**2).mean()) or 1.0
    return Difference(float(np.abs(a - b).max()), math.sqrt(((a - b) ** 2).mean()) / scale)


def tolerance(component: Component, precision: str) -> float:
    """The relative RMS difference that a component may have."""
    draws = any(tensor.dtype == "uint8" for tensor in component.outputs)
    return max(COMPONENT_TOLERANCE[precision], PIXEL_TOLERANCE if draws else 0.0)


def random_inputs(component: Component, sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of a component for these sizes of the dimensions, in the range of a real model's. `compared` is the
    part of the outputs that depends on them."""
    generator = np.random.default_rng(seed)
    inputs = {tensor.name: _random(tensor, sizes, generator) for tensor in component.inputs}
    if "update" in inputs:
        inputs["update"][:, 0] = 0.0
        inputs["update"][:, 0, SLOTS] = 1.0
    return inputs


def _random(tensor: Tensor, sizes: Sizes, generator: np.random.Generator) -> np.ndarray:
    """Indices count up, so every one appears. Numbers below a bound are spread over the range. Others are normal."""
    shape, below, dtype = tensor.shape(sizes), tensor.below, np.dtype(tensor.dtype)
    if isinstance(below, str):
        return (np.arange(math.prod(shape)) % sizes[below]).astype(dtype).reshape(shape)
    if below is None:
        return generator.standard_normal(shape, np.float32).astype(dtype, copy=False)
    if dtype.kind in "iu":
        return generator.integers(0, below, shape, dtype.type)
    return np.linspace(0.999 * below, 0.0035 * below, math.prod(shape), dtype=dtype).reshape(shape)


def compared(component: Component, output: str, value: np.ndarray) -> np.ndarray:
    """The part of an output that is compared. The update of `random_inputs` writes only the guided output into slot 0
    of the next state, because a difference would be lost beside the state."""
    is_state = any(tensor.fed_by == output for tensor in component.inputs)
    return value[:, 0] if is_state else value


def differences(component: Component, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Difference:
    """The largest differences of a component's outputs."""
    found = [
        difference(compared(component, name, actual), compared(component, name, wanted))
        for name, actual, wanted in zip(component.output_names, outputs, expected)
    ]
    return worst_of(found)


def worst_of(found: Sequence[Difference]) -> Difference:
    """The largest of each number."""
    return Difference(max(one.max_abs for one in found), max(one.relative_rms for one in found))


def not_finite(component: Component, outputs: Sequence[np.ndarray]) -> str | None:
    """The name of the first output with values that are not finite, in what is compared of it."""
    for name, value in zip(component.output_names, outputs):
        if not np.isfinite(compared(component, name, value).astype(np.float32)).all():
            return name
    return None


def as_json(found: Any) -> dict[str, Any]:
    """A dataclass as plain values, with floats short enough to read."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in asdict(found).items()}
