"""Euler's method in k-diffusion's scale y = x / alpha."""

from __future__ import annotations

import math

from .grids import Grid
from .table import NOISE, StepTable, TableBuilder, as_epsilon, as_x0, single
from .ve import ancestral, churned, scale_after


def euler(
    grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> StepTable:
    """Euler, algorithm 2 of arXiv 2206.00364 without its lines 9 to 11. Equals EulerDiscreteScheduler, and
    with churn too k-diffusion's sample_euler.

    diffusers' own churn adds its noise after the evaluation, at the level without it; no pipeline asks for it.
    """
    builder = TableBuilder()
    steps, initial_scale = churned(grid, s_churn, s_tmin, s_tmax, s_noise)
    for step in steps:
        x0, epsilon = as_x0(grid.prediction_type, step.s), as_epsilon(grid.prediction_type, step.s)
        y_next = x0 + step.s_next * epsilon + step.up * NOISE  # line 8
        builder.add(step.t, step.s, single(step.alpha * y_next), draw=step.up > 0, scale=1 / step.alpha)
    return builder.table(initial_scale)


def euler_ancestral(grid: Grid, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """Euler with ancestral noise (k-diffusion, sample_euler_ancestral). Equals EulerAncestralDiscreteScheduler with eta
    and s_noise 1."""
    builder = TableBuilder()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        x0, epsilon = as_x0(grid.prediction_type, s), as_epsilon(grid.prediction_type, s)
        s_down, s_up = ancestral(s, s_next, eta)
        y_next = x0 + s_down * epsilon + s_noise * s_up * NOISE
        alpha = scale_after(grid, i, s_next)
        builder.add(t, s, single(alpha * y_next), draw=eta > 0, scale=1 / alpha)
    return builder.table(grid.initial_scale)
