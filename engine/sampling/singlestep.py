"""DPM-Solver and DPM-Solver++, singlestep: steps that start anew from a saved latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .grids import Grid
from .integrals import phi
from .orders import fast_orders, singlestep_orders
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
from .ve import ancestral, scale_after

_START, _M1, _M2 = PAST[:3]


def dpmpp_singlestep(
    grid: Grid, order: int = 2, heun: bool = False, lower_order_final: bool = True, steps: int | None = None
) -> StepTable:
    """DPM-Solver++ (arXiv 2211.01095), singlestep, orders 1 to 3, between the grid's points. Equals
    DPMSolverSinglestepScheduler with algorithm dpmsolver++.

    `heun`: solver_type heun and not midpoint; `lower_order_final` as in `singlestep_orders`; `steps`: those of the
    whole loop, if the grid starts late.
    """

    def weights(s: float, s_next: float) -> tuple[float, float, float, float]:
        (alpha_next, sigma_next), sigma, h = vp(s_next), vp(s)[1], math.log(s / s_next)
        gains = [alpha_next * h * phi(n, -h) for n in (1, 2, 3)]
        return sigma_next / sigma, gains[0], gains[1], gains[2]

    return _singlestep(grid, as_x0, weights, _orders(grid, order, lower_order_final, steps), heun)


def dpm_singlestep(
    grid: Grid, order: int = 2, heun: bool = False, lower_order_final: bool = True, steps: int | None = None
) -> StepTable:
    """DPM-Solver (arXiv 2206.00927), of the predicted noise, singlestep, orders 1 to 3. Equals
    DPMSolverSinglestepScheduler with algorithm dpmsolver. The options are those of `dpmpp_singlestep`."""

    def weights(s: float, s_next: float) -> tuple[float, float, float, float]:
        (alpha_next, sigma_next), alpha, h = vp(s_next), vp(s)[0], math.log(s / s_next)
        gains = [-sigma_next * h * phi(n, h) for n in (1, 2, 3)]
        return alpha_next / alpha, gains[0], gains[1], gains[2]

    return _singlestep(grid, as_epsilon, weights, _orders(grid, order, lower_order_final, steps), heun)


def _orders(grid: Grid, order: int, lower_order_final: bool, steps: int | None) -> list[int]:
    """The order of each step, and where the grid starts late those of its steps in the whole loop, as far as there are
    values for them."""
    whole = len(grid) if steps is None else steps
    orders = singlestep_orders(whole, order, lower_order_final, bool(grid.targets[-1] == 0))[-len(grid) :]
    return [min(k, i + 1) for i, k in enumerate(orders)]


def _singlestep(
    grid: Grid,
    native: Callable[[str, float], Linear],
    weights: Callable[[float, float], tuple[float, float, float, float]],
    orders: Sequence[int],
    heun: bool,
) -> StepTable:
    """x' = A start + B0 D0 + B1 D1 + B2 D2 from the group's start, whose derivatives D1 and D2 come from the values
    since."""
    refuse_infinite_noise(grid.sigmas[0], "singlestep DPM-Solver")
    builder, sigmas = TableBuilder(), grid.sigmas.tolist()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        m0, k = native(grid.prediction_type, s), orders[i]
        if k == 1:
            x0, epsilon = as_x0(grid.prediction_type, s), as_epsilon(grid.prediction_type, s)
            alpha_next, sigma_next = vp(s_next)
            builder.add(t, s, keep(alpha_next * x0 + sigma_next * epsilon, X, m0))
            continue
        first = sigmas[i - k + 1]
        ratio, b0, b1, b2 = weights(first, s_next)
        h = math.log(first / s_next)
        r0 = math.log(first / s) / h
        if k == 2:
            x_next = ratio * _START + b0 * _M1 + (b1 if heun else b0 / 2) * (m0 - _M1) / r0
        else:
            r1 = math.log(first / sigmas[i - 1]) / h
            d1_0, d1_1 = (_M1 - _M2) / r1, (m0 - _M2) / r0
            x_next = ratio * _START + b0 * _M2 + b1 * d1_1
            if heun:
                d1, d2 = (r0 * d1_0 - r1 * d1_1) / (r0 - r1), 2 * (d1_1 - d1_0) / (r0 - r1)
                x_next = ratio * _START + b0 * _M2 + b1 * d1 + b2 * d2
        builder.add(t, s, keep(x_next, _START, m0, _M1))
    return builder.table(grid.initial_scale)


def dpm_fast(grid: Grid, evaluations: int, eta: float = 0.0, s_noise: float = 1.0) -> StepTable:
    """DPM fast (k-diffusion, sample_dpm_fast): DPM-Solver-fast of arXiv 2206.00927 in y = x / alpha, with `evaluations`
    of the U-Net in evaluations // 3 + 1 steps of the grid, which should be uniform in lambda and end above no noise. A
    grid that starts late has the last of these steps."""
    refuse_infinite_noise(grid.sigmas[0], "DPM fast")
    builder, end = TableBuilder(), float(grid.targets[-1])
    for i, ((t, s, s_next), k) in enumerate(zip(grid.steps(), fast_orders(evaluations)[-len(grid) :])):
        s_down = max(ancestral(s, s_next, eta)[0], end)
        s_up = math.sqrt(s_next**2 - s_down**2)
        t_last, s_last, y_next = _inner_evaluations(builder, grid, (t, s), s_down, k)
        alpha = scale_after(grid, i, s_next)
        x_next = alpha * (y_next + s_noise * s_up * NOISE)
        builder.add(t_last, s_last, single(x_next), draw=eta > 0, scale=1 / alpha)
    return builder.table(grid.initial_scale)


def _inner_evaluations(
    builder: TableBuilder, grid: Grid, start: tuple[float, float], s_next: float, order: int
) -> tuple[float, float, Linear]:
    """Adds the evaluations of a step before its last one. Returns that one's timestep and noise level, and y at the
    step's end. Algorithms 1 and 2 of arXiv 2206.00927, with r1 = 1/2, and r1 = 1/3 and r2 = 2/3."""
    t, s = start
    x0, epsilon = as_x0(grid.prediction_type, s), as_epsilon(grid.prediction_type, s)
    if order == 1 or s_next == 0:
        return t, s, x0 + s_next * epsilon
    h, y, first = math.log(s / s_next), _START / vp(s)[0], _M1
    s1 = s * math.exp(-h / order)
    t1, alpha1 = grid.timestep(s1), vp(s1)[0]
    builder.add(t, s, keep(alpha1 * (x0 + s1 * epsilon), X, epsilon), scale=1 / alpha1)
    second = as_epsilon(grid.prediction_type, s1)
    if order == 2:
        return t1, s1, y - s_next * math.expm1(h) * second
    s2, r2h = s * math.exp(-2 * h / 3), 2 * h / 3
    t2, alpha2 = grid.timestep(s2), vp(s2)[0]
    y2 = y - s2 * math.expm1(r2h) * first - 2 * s2 * r2h * phi(2, r2h) * (second - first)
    builder.add(t1, s1, keep(alpha2 * y2, _START, first), scale=1 / alpha2)
    third = as_epsilon(grid.prediction_type, s2)
    return t2, s2, y - s_next * math.expm1(h) * first - 1.5 * s_next * h * phi(2, h) * (third - first)
