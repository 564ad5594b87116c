"""DPM2: k-diffusion's midpoint method in y = x / alpha, with the midpoint in log s. Two evaluations a step, one in a
step to no noise."""

from __future__ import annotations

import math

from .grids import Grid
from .table import (
    NOISE,
    PAST,
    Linear,
    StepTable,
    TableBuilder,
    X,
    as_epsilon,
    as_x0,
    keep,
    refuse_infinite_noise,
    single,
    vp,
)
from .ve import ancestral, churned, scale_after

_SLOPE = PAST[0]


def dpm2(
    grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> StepTable:
    """DPM2 (k-diffusion, sample_dpm_2). Equals KDPM2DiscreteScheduler, which has no churn."""
    refuse_infinite_noise(grid.sigmas[0], "DPM2")
    builder = TableBuilder()
    steps, initial_scale = churned(grid, s_churn, s_tmin, s_tmax, s_noise)
    for step in steps:
        _step(builder, grid, (step.t, step.s), step.s_next, step.up * NOISE, step.alpha)
    return builder.table(initial_scale)


def dpm2_ancestral(grid: Grid, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """DPM2 with ancestral noise (k-diffusion, sample_dpm_2_ancestral). Equals KDPM2AncestralDiscreteScheduler with eta
    and s_noise 1."""
    refuse_infinite_noise(grid.sigmas[0], "DPM2 a")
    builder = TableBuilder()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        s_down, s_up = ancestral(s, s_next, eta)
        _step(builder, grid, (t, s), s_down, s_noise * s_up * NOISE, scale_after(grid, i, s_next))
    return builder.table(grid.initial_scale)


def _step(
    builder: TableBuilder, grid: Grid, start: tuple[float, float], s_next: float, noise: Linear, alpha: float
) -> None:
    """From timestep and noise level `start` to s_next, then the noise. It leaves alpha y."""
    t, s = start
    x0, slope = as_x0(grid.prediction_type, s), as_epsilon(grid.prediction_type, s)
    draw = bool(noise.any())
    if s_next == 0:
        builder.add(t, s, single(alpha * (x0 + noise)), draw=draw, scale=1 / alpha)
        return
    s_mid = math.sqrt(s * s_next)
    alpha_mid = vp(s_mid)[0]
    builder.add(t, s, keep(alpha_mid * (x0 + s_mid * slope), slope), scale=1 / alpha_mid)
    y = X / alpha_mid - (s_mid - s) * _SLOPE  # at the step's start
    y_next = y + (s_next - s) * as_epsilon(grid.prediction_type, s_mid)
    builder.add(grid.timestep(s_mid), s_mid, single(alpha * (y_next + noise)), draw=draw, scale=1 / alpha)
