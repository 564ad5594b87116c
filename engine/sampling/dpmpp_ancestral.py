"""k-diffusion's stochastic singlestep DPM-Solver++ in y = x / alpha. Two evaluations a step, one in a step to no
noise."""

from __future__ import annotations

import math

from .grids import Grid
from .table import NOISE, PAST, StepTable, TableBuilder, X, as_epsilon, as_x0, keep, refuse_infinite_noise, single, vp
from .ve import ancestral, scale_after

_START = PAST[0]


def dpmpp_2s_ancestral(grid: Grid, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """DPM++ 2S a (k-diffusion, sample_dpmpp_2s_ancestral): arXiv 2211.01095, algorithm 1 with its point halfway in
    lambda, and ancestral noise."""
    refuse_infinite_noise(grid.sigmas[0], "DPM++ 2S a")
    builder = TableBuilder()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        s_down, s_up = ancestral(s, s_next, eta)
        noise = s_noise * s_up * NOISE
        alpha, draw = scale_after(grid, i, s_next), eta > 0 and s_next > 0
        x0 = as_x0(grid.prediction_type, s)
        if s_down == 0:
            builder.add(t, s, single(alpha * (x0 + noise)), draw=draw, scale=1 / alpha)
            continue
        s_mid = math.sqrt(s * s_down)
        alpha_mid = vp(s_mid)[0]
        y_mid = x0 + s_mid * as_epsilon(grid.prediction_type, s)  # u_i, which is a step of DDIM
        builder.add(t, s, keep(alpha_mid * y_mid, X), scale=1 / alpha_mid)
        x0_mid = as_x0(grid.prediction_type, s_mid)
        y_next = s_down / s * _START / vp(s)[0] + (1 - s_down / s) * x0_mid
        builder.add(grid.timestep(s_mid), s_mid, single(alpha * (y_next + noise)), draw=draw, scale=1 / alpha)
    return builder.table(grid.initial_scale)


def dpmpp_sde(grid: Grid, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> StepTable:
    """DPM++ SDE (k-diffusion, sample_dpmpp_sde). Equals DPMSolverSDEScheduler with eta 1 and r 1/2.

    Both noises of a step are increments of one Brownian motion over s, from the step's start to the point between and
    to its end, as those of the references, which have a Brownian tree for it.
    """
    refuse_infinite_noise(grid.sigmas[0], "DPM++ SDE")
    builder = TableBuilder()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        alpha, start = scale_after(grid, i, s_next), X / vp(s)[0]
        x0 = as_x0(grid.prediction_type, s)
        if s_next == 0:
            builder.add(t, s, single(x0))
            continue
        s_mid = s ** (1 - r) * s_next**r
        alpha_mid, weight = vp(s_mid)[0], 1 / (2 * r)
        s_down, s_up = ancestral(s, s_mid, eta)
        y_mid = s_down / s * start + (1 - s_down / s) * x0 + s_noise * s_up * NOISE
        s_down, s_up = ancestral(s, s_next, eta)
        shared = math.sqrt((s - s_mid) / (s - s_next))  # of the whole step's increment, the first one's part
        known = s_down / s * start + (1 - s_down / s) * (1 - weight) * x0 + s_noise * s_up * shared * NOISE
        builder.add(t, s, keep(alpha_mid * y_mid, known), draw=eta > 0, scale=1 / alpha_mid)
        x0_mid = as_x0(grid.prediction_type, s_mid)
        rest = math.sqrt((s_mid - s_next) / (s - s_next))
        y_next = PAST[0] + (1 - s_down / s) * weight * x0_mid + s_noise * s_up * rest * NOISE
        builder.add(grid.timestep(s_mid), s_mid, single(alpha * y_next), draw=eta > 0, scale=1 / alpha)
    return builder.table(grid.initial_scale)
