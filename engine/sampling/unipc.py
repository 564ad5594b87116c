"""UniPC (arXiv 2302.04867): a predictor, and a corrector that takes the predictor's next evaluation for itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from .grids import Grid
from .integrals import phi
from .table import (
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
    weighted,
)

_KNOWN, _M1, _M2 = PAST[:3]
"""What the corrector knows before the evaluation, and the last values."""


def unipc(
    grid: Grid,
    order: int = 2,
    bh1: bool = False,
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> StepTable:
    """UniPC, orders 1 to 3 with B(h) = h (`bh1`) or exp(h) - 1, of predicted x0 or noise. Equals
    UniPCMultistepScheduler, also in steps to no noise, where its bh1 is not a number; these are of first order.

    `lower_order_final`: the last steps are of orders 3, 2, 1; `disable_corrector`: the steps whose end isn't corrected.
    """
    refuse_infinite_noise(grid.sigmas[0], "UniPC")
    builder, lambdas = TableBuilder(), (-np.log(grid.sigmas)).tolist()
    weight = 0.0  # of the newest value in the corrector
    for i, (t, s, s_next) in enumerate(grid.steps()):
        m0 = (as_x0 if predict_x0 else as_epsilon)(grid.prediction_type, s)
        corrects = i > 0 and i - 1 not in disable_corrector
        x = _KNOWN + weight * m0 if corrects else X  # UniC, with the value at its own end
        x_next, gain = _first_order(x, m0, s, s_next, predict_x0)
        if s_next in (0, s):  # the last step, to no noise or without length
            builder.add(t, s, single(x_next))
            continue
        h = math.log(s / s_next)
        k = min(order, i + 1, len(grid) - i if lower_order_final else order)
        r = [(lambdas[i - j] - lambdas[i]) / h for j in range(1, k)]
        z = -h if predict_x0 else h
        b = z if bh1 else math.expm1(z)
        predictor, corrector = _weights(r, z, b)
        slopes = [(m - m0) / r_m for m, r_m in zip((_M1, _M2), r)]
        known = x_next + gain * b * (weighted(corrector, slopes) - corrector[-1] * m0)
        weight = gain * b * corrector[-1]
        builder.add(t, s, keep(x_next + gain * b * weighted(predictor, slopes), known, m0, _M1))
    return builder.table(grid.initial_scale)


def _first_order(x: Linear, m0: Linear, s: float, s_next: float, predict_x0: bool) -> tuple[Linear, float]:
    """The step of DDIM, and what turns the weights of B(h) into those of this step."""
    (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
    if predict_x0:
        return sigma_next / sigma * x + alpha_next * (1 - s_next / s) * m0, -alpha_next
    return alpha_next / alpha * x + alpha_next * (s_next - s) * m0, -sigma_next


def _weights(r: Sequence[float], z: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """rho of UniP and of UniC, which has the value at the step's end too (r = 1). With one unknown each is 1/2, as in
    the paper."""
    nodes = np.array([*r, 1.0])
    powers = np.vander(nodes, increasing=True).T
    right = np.array([z * phi(j + 1, z) * math.factorial(j) / b for j in range(1, len(nodes) + 1)])
    half = np.array([0.5])
    corrector = half if len(r) == 0 else np.linalg.solve(powers, right)
    predictor = half if len(r) == 1 else np.linalg.solve(powers[:-1, :-1], right[:-1])
    return predictor, corrector
