"""DPM-Solver and DPM-Solver++, singlestep: steps that start anew from a saved latent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Weights:
    """What a step makes of the latent at its group's start, of the values there, of their first two derivatives, and of
    the noise."""

    start: float
    d0: float
    d1: float
    d2: float
    noise: float = 0.0


def dpmpp_singlestep(
    grid: Grid,
    order: int = 2,
    heun: bool = False,
    eta: float = 0.0,
    lower_order_final: bool = True,
    steps: int | None = None,
    diffusers_third_order: bool = False,
) -> StepTable:
    """DPM-Solver++ (arXiv 2211.01095), singlestep, orders 1 to 3, between the grid's points. With eta 0 it equals
    DPMSolverSinglestepScheduler with algorithm dpmsolver++, and with eta 1 with sde-dpmsolver++.

    `heun`: solver_type heun and not midpoint; `lower_order_final` as in `singlestep_orders`; `steps`: those of the
    whole loop, if the grid starts late; `diffusers_third_order` as in `dpmpp_multistep`, with `heun`.
    """

    def weights(s: float, s_next: float) -> _Weights:
        (alpha_next, sigma_next), sigma = vp(s_next), vp(s)[1]
        z, kept = (1 + eta) * math.log(s / s_next), (s_next / s) ** eta
        d0, d1, d2 = (alpha_next * z * phi(n, -z) for n in (1, 2, 3))
        if diffusers_third_order:
            d2 -= alpha_next
        return _Weights(sigma_next / sigma * kept, d0, d1, d2, sigma_next * math.sqrt(1 - kept**2))

    return _singlestep(grid, as_x0, weights, _orders(grid, order, lower_order_final, steps), heun, draw=eta > 0)


def dpm_singlestep(
    grid: Grid, order: int = 2, heun: bool = False, lower_order_final: bool = True, steps: int | None = None
) -> StepTable:
    """DPM-Solver (arXiv 2206.00927), of the predicted noise, singlestep, orders 1 to 3. Equals
    DPMSolverSinglestepScheduler with algorithm dpmsolver. The options are those of `dpmpp_singlestep`."""

    def weights(s: float, s_next: float) -> _Weights:
        (alpha_next, sigma_next), alpha, h = vp(s_next), vp(s)[0], math.log(s / s_next)
        d0, d1, d2 = (-sigma_next * h * phi(n, h) for n in (1, 2, 3))
        return _Weights(alpha_next / alpha, d0, d1, d2)

    return _singlestep(grid, as_epsilon, weights, _orders(grid, order, lower_order_final, steps), heun, draw=False)


def _orders(grid: Grid, order: int, lower_order_final: bool, steps: int | None) -> list[int]:
    """The order of each step, and where the grid starts late those of its steps in the whole loop, as far as there are
    values for them."""
    whole = len(grid) if steps is None else steps
    orders = singlestep_orders(whole, order, lower_order_final, bool(grid.targets[-1] == 0))[-len(grid) :]
    return [min(k, i + 1) for i, k in enumerate(orders)]


def _singlestep(
    grid: Grid,
    native: Callable[[str, float], Linear],
    weights: Callable[[float, float], _Weights],
    orders: Sequence[int],
    heun: bool,
    draw: bool,
) -> StepTable:
    """Every step from its group's start, with the derivatives there from the values since. PAST has the latent at the
    start and the last values."""
    refuse_infinite_noise(grid.sigmas[0], "singlestep DPM-Solver")
    builder, sigmas = TableBuilder(), grid.sigmas.tolist()
    for i, ((t, s, s_next), k) in enumerate(zip(grid.steps(), orders)):
        m0 = native(grid.prediction_type, s)
        if s_next == 0:
            builder.add(t, s, single(as_x0(grid.prediction_type, s)), draw=draw)
            continue
        start = X if k == 1 else _START
        d0, d1, d2 = _derivatives(m0, sigmas[i - k + 1 : i + 1], s_next, heun)
        w = weights(sigmas[i - k + 1], s_next)
        if k == 2 and not heun:
            w = dataclasses.replace(w, d1=w.d0 / 2)
        x_next = w.start * start + w.d0 * d0 + w.d1 * d1 + w.d2 * d2 + w.noise * NOISE
        builder.add(t, s, keep(x_next, start, m0, _M1), draw=draw)
    return builder.table(grid.initial_scale)


def _derivatives(m0: Linear, levels: Sequence[float], s_next: float, heun: bool) -> tuple[Linear, Linear, Linear]:
    """The value at a group's start, and its derivatives in lambda times the step's length and its square, from the
    values at these one to three levels, of which m0 is the newest. Midpoint takes one derivative from the ends."""
    if len(levels) == 1:
        return m0, 0 * m0, 0 * m0
    h = math.log(levels[0] / s_next)
    r = [math.log(levels[0] / level) / h for level in levels[1:]]
    if len(levels) == 2:
        return _M1, (m0 - _M1) / r[0], 0 * m0
    near, far = (_M1 - _M2) / r[0], (m0 - _M2) / r[1]
    if not heun:
        return _M2, far, 0 * m0
    return _M2, (r[1] * near - r[0] * far) / (r[1] - r[0]), 2 * (far - near) / (r[1] - r[0])


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
