"""Euler's method in k-diffusion's scale y = x / alpha. The last state is left in that scale, as diffusers does."""

from __future__ import annotations

import math

from .grids import Grid
from .table import NOISE, StepTable, TableBuilder, X, as_epsilon, single, vp


def euler(grid: Grid) -> StepTable:
    """Euler, algorithm 2 of arXiv 2206.00364 without churn. Equals EulerDiscreteScheduler."""
    return _euler(grid, ancestral=False)


def euler_ancestral(grid: Grid) -> StepTable:
    """Euler with ancestral noise (k-diffusion, sample_euler_ancestral). Equals EulerAncestralDiscreteScheduler."""
    return _euler(grid, ancestral=True)


def _euler(grid: Grid, ancestral: bool) -> StepTable:
    """y' = y + (s_down - s) epsilon + s_up noise."""
    builder, last = TableBuilder(), len(grid) - 1
    for i, (t, s, s_next) in enumerate(grid.steps()):
        alpha_next = 1.0 if i == last else vp(s_next)[0]
        down, up = _ancestral(s, s_next) if ancestral else (s_next, 0.0)
        y = X / vp(s)[0]
        y_next = y + (down - s) * as_epsilon(grid.prediction_type, s) + up * NOISE
        builder.add(t, s, single(alpha_next * y_next), draw=ancestral, scale=1 / alpha_next)
    return builder.table(grid.initial_scale)


def _ancestral(s: float, s_next: float) -> tuple[float, float]:
    """s_down and s_up, with s_down^2 + s_up^2 = s_next^2 (k-diffusion, get_ancestral_step with eta = 1)."""
    return s_next**2 / s, s_next * math.sqrt(1 - (s_next / s) ** 2)
