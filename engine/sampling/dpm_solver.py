"""DPM-Solver++ (arXiv 2211.01095): exponential integrators in lambda = log(alpha / sigma) of the predicted clean
latent."""

from __future__ import annotations

import math

from .grids import Grid
from .table import PAST, StepTable, TableBuilder, X, as_x0, multistep, vp


def dpmpp_2m(grid: Grid, order: int = 2, heun: bool = False, final_first_order: bool = False) -> StepTable:
    """DPM-Solver++(2M), algorithm 2, or with order 1 DPM-Solver++ 1. Equals DPMSolverMultistepScheduler with algorithm
    dpmsolver++.

    A step to no noise is of first order, and the last one also with `final_first_order`.
    """
    builder, last, h_last = TableBuilder(), len(grid) - 1, math.nan
    for i, (t, s, s_next) in enumerate(grid.steps()):
        sigma, (alpha_next, sigma_next) = vp(s)[1], vp(s_next)
        h = math.log(s / s_next) if s_next > 0 else math.inf
        m0, m1 = as_x0(grid.prediction_type, s), PAST[0]
        gain = -alpha_next * math.expm1(-h)
        x_next = sigma_next / sigma * X + gain * m0
        first_order = i == 0 or order == 1 or (i == last and final_first_order)
        if not first_order and 0 < h < math.inf:
            slope = alpha_next * (math.expm1(-h) / h + 1) if heun else gain / 2
            x_next = x_next + slope * (h / h_last) * (m0 - m1)
        builder.add(t, s, multistep(x_next, m0))
        h_last = h
    return builder.table(grid.initial_scale)
