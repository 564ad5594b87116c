"""DDPM and DDIM: steps between two points of the forward process. Primed quantities of the papers, those of the level
that a step goes to, are `_next` here."""

from __future__ import annotations

import math

from .grids import Grid
from .table import NOISE, StepTable, TableBuilder, X, as_epsilon, as_x0, single, vp


def ddim(grid: Grid, eta: float = 0.0) -> StepTable:
    """DDIM, arXiv 2010.02502 equations 12 and 16. Equals DDIMScheduler."""
    builder = TableBuilder()
    for t, s, s_next in grid.steps():
        (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
        x0, epsilon = as_x0(grid.prediction_type, s), as_epsilon(grid.prediction_type, s)
        deviation = eta * sigma_next / sigma * math.sqrt(1 - (alpha / alpha_next) ** 2)
        direction = math.sqrt(max(sigma_next**2 - deviation**2, 0.0))
        x_next = alpha_next * x0 + direction * epsilon + deviation * NOISE
        builder.add(t, s, single(x_next), draw=eta > 0)
    return builder.table(grid.initial_scale)


def ddpm(grid: Grid, large_variance: bool = False) -> StepTable:
    """DDPM, arXiv 2006.11239 equation 7, on any grid. Equals DDPMScheduler with variance_type fixed_small or
    fixed_large."""
    builder = TableBuilder()
    for t, s, s_next in grid.steps():
        (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
        beta = 1 - (alpha / alpha_next) ** 2
        x0 = as_x0(grid.prediction_type, s)
        mean = alpha_next * beta / sigma**2 * x0 + alpha / alpha_next * (sigma_next / sigma) ** 2 * X
        variance = beta if large_variance else max((sigma_next / sigma) ** 2 * beta, 1e-20)
        deviation = math.sqrt(variance) if t > 0 else 0.0
        builder.add(t, s, single(mean + deviation * NOISE), draw=t > 0)
    return builder.table(grid.initial_scale)
