"""How results are compared, with NumPy alone: random inputs of a component, differences, and how large they may be."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.contract import INPUTS, LATENT_CHANNELS, PROMPT_TOKENS, SLOTS, VAE_FACTOR

COMPONENT_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
"""Relative RMS difference. Rounding alone gives a Stable Diffusion U-Net 2.6e-6, 1.3e-3 and 1.3e-2."""

PIXEL_TOLERANCE = 2e-3
"""The same for the VAE decoder at least: pixels are integers, and a value on the edge between two is rounded either
way."""

PICTURE_TOLERANCE = {"fp32": 50.0, "fp16": 30.0, "bf16": 20.0}
"""PSNR in dB, the least that is accepted. A difference of 1 of 255 everywhere is 48 dB."""


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


def tolerance(component: str, precision: str) -> float:
    """The relative RMS difference that a component may have."""
    return max(COMPONENT_TOLERANCE[precision], PIXEL_TOLERANCE if component == "vae_decoder" else 0.0)


def input_shapes(
    component: str, batch: int, rows: int, height: int, width: int, channels: int, tokens: int = PROMPT_TOKENS
) -> dict[str, tuple[int, ...]]:
    """Shapes of a component's inputs; height and width are those of the latents, channels those of the text."""
    latents = (batch, LATENT_CHANNELS, height, width)
    shapes = {
        "input_ids": (rows, PROMPT_TOKENS),
        "latents": latents,
        "image": (batch, VAE_FACTOR * height, VAE_FACTOR * width, 3),
        "state": (batch, SLOTS, *latents[1:]),
        "row_sample": (rows,),
        "context": (rows, tokens, channels),
        "timestep": (batch,),
        "mixing": (batch, rows),
        "update": (batch, SLOTS, SLOTS + 2),
        "noise": latents,
    }
    return {name: shapes[name] for name in INPUTS[component]}


def random_inputs(
    component: str, batch: int, rows: int, height: int, width: int, channels: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random inputs of a component, of the size that a real model's have. The denoiser's update writes the guided
    output alone into slot 0: beside the state a difference there would drown."""
    generator = np.random.default_rng(seed)
    shapes = input_shapes(component, batch, rows, height, width, channels)
    inputs: dict[str, np.ndarray] = {
        name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    if component == "text_encoder":
        inputs["input_ids"] = generator.integers(0, 256, shapes["input_ids"], np.int32)
    if component == "vae_encoder":
        inputs["image"] = generator.integers(0, 256, shapes["image"], np.uint8)
    if component == "denoiser":
        inputs["row_sample"] = np.arange(rows, dtype=np.int32) % batch
        inputs["timestep"] = np.linspace(999.0, 3.5, batch, dtype=np.float32)
        inputs["update"][:, 0] = 0.0
        inputs["update"][:, 0, SLOTS] = 1.0
    return inputs


def compared(component: str, output: str, value: np.ndarray) -> np.ndarray:
    """The part of an output that is compared: of the denoiser's the guided output of `random_inputs`."""
    return value[:, 0] if (component, output) == ("denoiser", "next_state") else value


def as_json(found: Any) -> dict[str, Any]:
    """A dataclass as plain values, with floats short enough to read."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in asdict(found).items()}
