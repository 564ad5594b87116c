"""Samplers of distilled consistency models: every step goes to a clean or cleaner latent and back up with new noise."""

from __future__ import annotations

import math

from .grids import Grid
from .table import NOISE, StepTable, TableBuilder, X, as_epsilon, as_x0, single, vp

_SIGMA_DATA = 0.5


def lcm(grid: Grid, timestep_scaling: float = 10.0) -> StepTable:
    """Latent consistency models, arXiv 2310.04378, algorithm 3. Equals LCMScheduler, whose last step ends at the
    consistency function and draws nothing."""
    builder = TableBuilder()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        scaled = t * timestep_scaling
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / math.sqrt(scaled**2 + _SIGMA_DATA**2)
        denoised = c_skip * X + c_out * as_x0(grid.prediction_type, s)
        if i == len(grid) - 1:
            builder.add(t, s, single(denoised))
            continue
        alpha_next, sigma_next = vp(s_next)
        builder.add(t, s, single(alpha_next * denoised + sigma_next * NOISE), draw=True)
    return builder.table(grid.initial_scale)


def tcd(grid: Grid, gamma: float = 0.3) -> StepTable:
    """Trajectory consistency distillation, arXiv 2402.19159, strategic stochastic sampling: down to timestep
    (1 - gamma) t_next, then up to t_next with noise. Equals TCDScheduler with eta = gamma, whose last step goes to
    timestep 0 and draws nothing."""
    builder = TableBuilder()
    below = [*grid.timesteps[1:].tolist(), 0.0]
    for i, ((t, s, s_next), t_next) in enumerate(zip(grid.steps(), below)):
        s_down = float(grid.levels[math.floor((1 - gamma) * t_next)])
        alpha_down, sigma_down = vp(s_down)
        x_down = alpha_down * as_x0(grid.prediction_type, s) + sigma_down * as_epsilon(grid.prediction_type, s)
        if gamma == 0 or i == len(grid) - 1:
            builder.add(t, s, single(x_down))
            continue
        ratio = vp(s_next)[0] / alpha_down
        x_next = ratio * x_down + math.sqrt(1 - ratio**2) * NOISE
        builder.add(t, s, single(x_next), draw=True)
    return builder.table(grid.initial_scale)
