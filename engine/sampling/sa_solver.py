"""SA-Solver (arXiv 2309.05019): stochastic Adams methods, a predictor and a corrector with the predictor's noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import SchedulerConfigError
from .grids import Grid
from .integrals import exponential_weights, phi
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
    weighted,
)

_KNOWN, _VALUES = PAST[0], PAST[1:]
"""What the corrector knows before the evaluation, its noise included, and the last values."""

MOST_PREDICTOR, MOST_CORRECTOR = len(_VALUES) + 1, len(_VALUES) + 2


def middle_tau(t: float) -> float:
    """diffusers' tau: noise between timesteps 200 and 800 only."""
    return 1.0 if 200 <= t <= 800 else 0.0


def sa_solver(
    grid: Grid,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: Callable[[float], float] = middle_tau,
    predict_x0: bool = True,
    lower_order_final: bool = True,
) -> StepTable:
    """SA-Solver with predictors of orders 1 to MOST_PREDICTOR and correctors of orders 1 to MOST_CORRECTOR. Equals
    SASolverScheduler with algorithm data_prediction, or noise_prediction without `predict_x0`.

    tau: how much noise a step from a timestep adds; 0 is the ODE and 1 the SDE of the paper. A step to no noise is of
    first order. `lower_order_final`: the last steps have falling orders. SchedulerConfigError for noise in a step of
    predicted noise to no noise.
    """
    refuse_infinite_noise(grid.sigmas[0], "SA-Solver")
    if not predict_x0 and grid.targets[-1] == 0 and tau(float(grid.timesteps[-1])) != 0:
        raise SchedulerConfigError(
            "SA-Solver with algorithm_type 'noise_prediction' cannot add noise in a step to no noise at all; take "
            "a grid that ends at sigma_min, or algorithm_type 'data_prediction'"
        )
    native = as_x0 if predict_x0 else as_epsilon
    builder, lambdas = TableBuilder(), (-np.log(grid.sigmas)).tolist()
    weight = 0.0  # of the newest value in the corrector
    for i, (t, s, s_next) in enumerate(grid.steps()):
        m0 = native(grid.prediction_type, s)
        x = X if i == 0 else _KNOWN + weight * m0
        interval = _Interval(s, s_next, tau(t), predict_x0)
        if s_next in (0, s):  # the last step, to no noise or without length
            builder.add(t, s, single(interval.start(x) + interval.first_order() * m0), draw=True)
            continue
        left = len(grid) - i if lower_order_final else len(grid)
        k, values = min(predictor_order, i + 1, left), (m0, *_VALUES)
        nodes = [lambdas[i - j] - lambdas[i] for j in range(max(k, min(corrector_order - 1, i + 1)))]
        predictor = interval.predictor(nodes[:k])
        corrector = interval.corrector(nodes[: min(corrector_order, i + 2, left + 1) - 1])
        weight = corrector[0]
        x_next = interval.start(x) + weighted(predictor, values)
        known = interval.start(x) + weighted(corrector[1:], values)
        builder.add(t, s, keep(x_next, known, *values[: len(_VALUES)]), draw=True)
    return builder.table(grid.initial_scale)


@dataclass(frozen=True)
class _Interval:
    """The integrals of one step: exp(lambda) drift x0, or noise, over lambda."""

    s: float
    s_next: float
    tau: float
    predict_x0: bool

    @property
    def drift(self) -> float:
        return 1 + self.tau**2

    @property
    def h(self) -> float:
        return math.log(self.s / self.s_next)

    @property
    def z(self) -> float:
        """The exponent of what the integral's start weighs more than its end."""
        return -self.drift * self.h if self.predict_x0 else self.h

    @property
    def gain(self) -> float:
        alpha_next, sigma_next = vp(self.s_next)
        return self.drift * (alpha_next if self.predict_x0 else -sigma_next)

    def start(self, x: Linear) -> Linear:
        """The part of the latent at the start, and the noise."""
        (alpha, sigma), (alpha_next, sigma_next) = vp(self.s), vp(self.s_next)
        if self.predict_x0:
            kept = (self.s_next / self.s) ** self.tau**2  # exp(-tau^2 h)
            return sigma_next / sigma * kept * x + sigma_next * math.sqrt(1 - kept**2) * NOISE
        deviation = self.tau * math.sqrt(self.s**2 - self.s_next**2)
        return alpha_next / alpha * x + alpha_next * deviation * NOISE

    def first_order(self) -> float:
        """The weight of a constant value, also over a step to no noise."""
        alpha_next = vp(self.s_next)[0]
        if self.predict_x0:
            return alpha_next * (1 - (self.s_next / self.s) ** self.drift)
        return -self.drift * alpha_next * (self.s - self.s_next)

    def predictor(self, nodes: Sequence[float]) -> np.ndarray:
        """The weights of the values at these nodes, of which the first is 0, the start. Those of order 2 for x0 have
        h^2 / 2 as the integral of the slope, as the authors' code has."""
        weights = self.gain * exponential_weights(nodes, self.h, self.z)
        if len(nodes) == 2 and self.predict_x0:
            change = self.gain * self.h**2 * (0.5 - phi(2, self.z)) / (nodes[0] - nodes[1])
            weights = weights + np.array([change, -change])
        return weights

    def corrector(self, nodes: Sequence[float]) -> np.ndarray:
        """The weights of the value at the end and of those at these nodes, with the same change of order 2."""
        weights = self.gain * exponential_weights([self.h, *nodes], self.h, self.z)
        if len(nodes) == 1 and self.predict_x0:
            change = self.gain * self.h * (0.5 - phi(2, self.z))
            weights = weights + np.array([change, -change])
        return weights
