"""DDPM and DDIM: steps between two points of the forward process. Primed quantities of the papers, those of the level
that a step goes to, are `_next` here.

`clip_range` keeps the predicted x0 within +-clip_range, as models on pixels are sampled; None leaves it alone.
"""

from __future__ import annotations

import math

from .grids import Grid
from .table import (
    CLIPPED,
    NO_CLIP,
    NOISE,
    UNIT_VARIANCE,
    Clip,
    Linear,
    LogVariances,
    StepTable,
    TableBuilder,
    X,
    as_epsilon,
    as_x0,
    single,
    vp,
)

LEAST_VARIANCE = 1e-20
"""As in diffusers: its logarithm is finite."""


def ddim(grid: Grid, eta: float = 0.0, clip_range: float | None = None) -> StepTable:
    """DDIM, arXiv 2010.02502 equations 12 and 16. Equals DDIMScheduler: its epsilon does not follow from the clipped
    x0."""
    builder = TableBuilder()
    for t, s, s_next in grid.steps():
        (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
        x0, clip = _within(as_x0(grid.prediction_type, s), clip_range)
        epsilon = as_epsilon(grid.prediction_type, s)
        deviation = eta * sigma_next / sigma * math.sqrt(1 - (alpha / alpha_next) ** 2)
        direction = math.sqrt(max(sigma_next**2 - deviation**2, 0.0))
        x_next = alpha_next * x0 + direction * epsilon + deviation * NOISE
        builder.add(t, s, single(x_next), draw=eta > 0, clip=clip)
    return builder.table(grid.initial_scale)


def ddpm(grid: Grid, variance_type: str = "fixed_small", clip_range: float | None = None) -> StepTable:
    """DDPM, arXiv 2006.11239 equation 7, on any grid. Equals DDPMScheduler. Learned variances are those of arXiv
    2102.09672: "learned_range" interpolates between the two fixed ones, and "learned" is the logarithm itself."""
    builder = TableBuilder()
    for t, s, s_next in grid.steps():
        (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
        beta = 1 - (alpha / alpha_next) ** 2
        x0, clip = _within(as_x0(grid.prediction_type, s), clip_range)
        mean = alpha_next * beta / sigma**2 * x0 + alpha / alpha_next * (sigma_next / sigma) ** 2 * X
        posterior = max((sigma_next / sigma) ** 2 * beta, LEAST_VARIANCE)
        factor, logarithms = _deviation(variance_type, posterior, beta)
        x_next = mean + factor * NOISE if t > 0 else mean
        builder.add(t, s, single(x_next), draw=t > 0, clip=clip, variance=logarithms)
    return builder.table(grid.initial_scale)


def _within(x0: Linear, clip_range: float | None) -> tuple[Linear, Clip]:
    """x0 within the range, and what CLIPPED stands for then."""
    return (x0, NO_CLIP) if clip_range is None else (CLIPPED, Clip.of(x0, clip_range))


def _deviation(variance_type: str, posterior: float, beta: float) -> tuple[float, LogVariances]:
    """The factor of NOISE, and the logarithms between which the U-Net chooses. `posterior` and `beta` are the smallest
    and the largest variance of a step."""
    if variance_type == "learned_range":
        return 1.0, (math.log(beta), math.log(posterior))  # arXiv 2102.09672, equation 15
    if variance_type == "learned":
        return 1.0, (1.0, -1.0)  # the interpolation is the U-Net's output then
    return math.sqrt(beta if variance_type == "fixed_large" else posterior), UNIT_VARIANCE
