"""DPM-Solver and DPM-Solver++, multistep: exponential integrators in lambda = log(alpha / sigma)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import SchedulerConfigError
from .grids import Grid
from .integrals import phi
from .orders import multistep_orders
from .table import (
    NOISE,
    PAST,
    Linear,
    StepTable,
    TableBuilder,
    X,
    as_epsilon,
    as_x0,
    multistep,
    refuse_infinite_noise,
    vp,
)


def dpmpp_multistep(
    grid: Grid,
    order: int = 2,
    heun: bool = False,
    eta: float = 0.0,
    s_noise: float = 1.0,
    final_first_order: bool = False,
    final_second_order: bool = False,
    diffusers_third_order: bool = False,
) -> StepTable:
    """DPM-Solver++ (arXiv 2211.01095), multistep, orders 1 to 3; order 2 is its algorithm 2. With eta 0 it equals
    DPMSolverMultistepScheduler with algorithm dpmsolver++, and with eta 1 with sde-dpmsolver++; k-diffusion's
    sample_dpmpp_2m, sample_dpmpp_2m_sde, and with `heun` sample_dpmpp_3m_sde.

    `heun` is solver_type heun of second-order steps, and not midpoint. A step to no noise is of first order, and the
    last one also with `final_first_order`; the one before it is of second order at most with `final_second_order`.
    `diffusers_third_order`: the third-order SDE steps of diffusers 0.42, in which half of D2 has the wrong sign.
    """
    builder = TableBuilder()
    orders = multistep_orders(grid, order, final_first_order, final_second_order)
    past: list[float] = []
    for (t, s, s_next), k in zip(grid.steps(), orders):
        (alpha_next, sigma_next), sigma = vp(s_next), vp(s)[1]
        h = math.log(s / s_next) if s_next > 0 else math.inf
        z, kept = (1 + eta) * h, (s_next / s) ** eta  # kept: exp(-eta h)
        m0 = as_x0(grid.prediction_type, s)
        x_next = sigma_next / sigma * kept * X - alpha_next * math.expm1(-z) * m0
        d1, d2 = _differences(m0, h, past[: k - 1])
        if k == 2 and not heun:
            x_next = x_next - alpha_next * math.expm1(-z) / 2 * d1
        elif k > 1:
            x_next = x_next + alpha_next * z * (phi(2, -z) * d1 + phi(3, -z) * d2)
        if k == 3 and diffusers_third_order:
            x_next = x_next - alpha_next * d2
        deviation = s_noise * sigma_next * math.sqrt(1 - kept**2)
        builder.add(t, s, multistep(x_next + deviation * NOISE, m0), draw=eta > 0)
        past = [h, *past][:2]
    return builder.table(grid.initial_scale)


def dpm_multistep(
    grid: Grid,
    order: int = 2,
    heun: bool = False,
    sde: bool = False,
    final_first_order: bool = False,
    final_second_order: bool = False,
) -> StepTable:
    """DPM-Solver (arXiv 2206.00927), of the predicted noise, multistep, orders 1 to 3. Equals
    DPMSolverMultistepScheduler with algorithm dpmsolver, or with `sde` sde-dpmsolver, which has no third order. The
    other options are those of `dpmpp_multistep`. SchedulerConfigError for an SDE's step to no noise."""
    if sde and grid.targets[-1] == 0:
        raise SchedulerConfigError(
            "algorithm_type 'sde-dpmsolver' cannot go to no noise at all (final_sigmas_type 'zero'); take "
            "final_sigmas_type 'sigma_min', or algorithm_type 'sde-dpmsolver++'"
        )
    if sde:
        refuse_infinite_noise(grid.sigmas[0], "sde-dpmsolver")
    builder = TableBuilder()
    orders = multistep_orders(grid, order, final_first_order, final_second_order)
    drift, past = 2.0 if sde else 1.0, list[float]()
    for (t, s, s_next), k in zip(grid.steps(), orders):
        x0, m0 = as_x0(grid.prediction_type, s), as_epsilon(grid.prediction_type, s)
        h = math.log(s / s_next) if s_next > 0 else math.inf
        # y - drift s' (exp(h) - 1) m0 in y = x / alpha, and exp(h) is s / s'.
        y_next = X / vp(s)[0] - drift * (s - s_next) * m0 if sde else x0 + s_next * m0
        d1, d2 = _differences(m0, h, past[: k - 1])
        if k == 2 and not heun:
            y_next = y_next - drift * (s - s_next) / 2 * d1
        elif k > 1:
            y_next = y_next - drift * s_next * h * (phi(2, h) * d1 + phi(3, h) * d2)
        if sde:
            y_next = y_next + math.sqrt(s**2 - s_next**2) * NOISE
        builder.add(t, s, multistep(vp(s_next)[0] * y_next, m0), draw=sde)
        past = [h, *past][:2]
    return builder.table(grid.initial_scale)


_NOTHING: Linear = np.zeros_like(X)


def _differences(m0: Linear, h: float, past: Sequence[float]) -> tuple[Linear, Linear]:
    """D1 and D2 of the third-order step: h m' and, as the papers' code has it, half of h^2 m'', from the values before
    and the lengths of their steps, newest first. Because of that half its error is smaller than that of second order,
    but falls at that order too."""
    if not past:
        return _NOTHING, _NOTHING
    m1, m2 = PAST[:2]
    r0 = past[0] / h
    d1_0 = (m0 - m1) / r0
    if len(past) == 1:
        return d1_0, _NOTHING
    r1 = past[1] / h
    d1_1 = (m1 - m2) / r1
    return d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1), (d1_0 - d1_1) / (r0 + r1)
