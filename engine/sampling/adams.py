"""Adams-Bashforth methods: the next latent from the predicted noise of the last evaluations."""

from __future__ import annotations

import math

import numpy as np

from .grids import Grid
from .integrals import adams_weights, exponential_weights
from .orders import multistep_orders
from .table import PAST, StepTable, TableBuilder, X, as_epsilon, as_x0, multistep, refuse_infinite_noise, vp, weighted
from .ve import scale_after

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""The weights of the newest value and those before it, for steps of one size."""


def lms(grid: Grid, order: int = 4) -> StepTable:
    """Linear multistep in y = x / alpha, orders 1 to 4: the integral of the polynomial in s through the last slopes.
    Equals LMSDiscreteScheduler and k-diffusion's sample_lms, whose quadrature is good to 1e-4 where this is exact."""
    builder = TableBuilder()
    refuse_infinite_noise(grid.sigmas[0], "LMS")
    sigmas = grid.sigmas.tolist()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        epsilon = as_epsilon(grid.prediction_type, s)
        last = sigmas[max(i + 1 - order, 0) : i + 1][::-1]
        y_next = X / vp(s)[0] + weighted(adams_weights(last, s_next), (epsilon, *PAST))
        alpha = scale_after(grid, i, s_next)
        builder.add(t, s, multistep(alpha * y_next, epsilon), scale=1 / alpha)
    return builder.table(grid.initial_scale)


def ipndm(grid: Grid, order: int = 4) -> StepTable:
    """iPNDM (arXiv 2204.13902): `lms` with the weights of steps of one size. Equals IPNDMScheduler, but for the first
    step, which has no signal there: diffusers takes x0 = 0, and here it is exact."""
    builder = TableBuilder()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        x0, epsilon = as_x0(grid.prediction_type, s), as_epsilon(grid.prediction_type, s)
        if i == 0:
            y_next = x0 + s_next * epsilon
        else:
            y_next = X / vp(s)[0] + (s_next - s) * weighted(ADAMS_BASHFORTH[min(i, order - 1)], (epsilon, *PAST))
        builder.add(t, s, multistep(vp(s_next)[0] * y_next, epsilon))
    return builder.table(grid.initial_scale)


def deis(grid: Grid, order: int = 2, final_first_order: bool = False, final_second_order: bool = False) -> StepTable:
    """DEIS, arXiv 2204.13902 equations 14 and 15, with polynomials in log s, orders 1 to 3. Equals
    DEISMultistepScheduler. The last step is of first order with `final_first_order`, the one before it of second order
    at most with `final_second_order`, and one to no noise of first order always, where diffusers' is not a number."""
    refuse_infinite_noise(grid.sigmas[0], "DEIS")
    builder = TableBuilder()
    orders = multistep_orders(grid, order, final_first_order, final_second_order)
    lambdas = (-np.log(grid.sigmas)).tolist()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        epsilon = as_epsilon(grid.prediction_type, s)
        if orders[i] == 1:
            y_next = as_x0(grid.prediction_type, s) + s_next * epsilon
        else:
            h = math.log(s / s_next)
            nodes = [lambdas[i - k] - lambdas[i] for k in range(orders[i])]
            y_next = X / vp(s)[0] - s_next * weighted(exponential_weights(nodes, h, h), (epsilon, *PAST))
        builder.add(t, s, multistep(vp(s_next)[0] * y_next, epsilon))
    return builder.table(grid.initial_scale)
