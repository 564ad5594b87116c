"""The order at which each solver's error falls, on a denoiser that is known exactly.

Deterministic solvers: the data are a mixture of two normal distributions on a line, whose denoiser has a closed form.
On a line the probability flow keeps the order of points, so that it takes a quantile at one noise level to the same
quantile at another, and the exact end of every start is known too.

Stochastic solvers: the data are one normal distribution. Its denoiser is linear, so the mean and the covariance of all
that a table remembers follow exactly from its matrices, without a random number.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks import plots
from benchmarks.errors import BenchmarkUsageError
from benchmarks.options import PLOTS
from engine.contract import SLOTS
from engine.sampling.adams import deis, ipndm, lms
from engine.sampling.ddpm import ddim
from engine.sampling.dpm2 import dpm2, dpm2_ancestral
from engine.sampling.dpm_solver import dpm_multistep, dpmpp_multistep
from engine.sampling.dpmpp_ancestral import dpmpp_2s_ancestral, dpmpp_sde
from engine.sampling.euler import euler, euler_ancestral
from engine.sampling.grids import StridedGrid
from engine.sampling.heun import Restarts, heun, restart
from engine.sampling.plms import plms, pndm
from engine.sampling.sa_solver import sa_solver
from engine.sampling.singlestep import dpm_fast, dpm_singlestep, dpmpp_singlestep
from engine.sampling.table import StepTable
from engine.sampling.unipc import unipc

STEPS = (80, 160, 320)
HIGH, LOW = 80.0, 0.03
"""The noise levels that a loop goes from and to: not to 0, a step to which is of first order for most solvers."""

LEVELS = np.geomspace(LOW, HIGH, 1280 + 1)
"""Training levels, uniform in log s; 1280 is a multiple of STEPS, with even strides."""


@dataclass(frozen=True)
class Solver:
    """A row of the figure. order: what its error falls with, in the steps' length; scaled: it leaves x, and not
    k-diffusion's y = x / alpha."""

    name: str
    table: Callable[[StridedGrid], StepTable]
    order: int
    scaled: bool = False


@dataclass(frozen=True)
class Mixture:
    """Normal distributions on a line."""

    weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray

    def clean(self, y: np.ndarray, s: float) -> np.ndarray:
        """The mean of x0 [P], given y = x0 + s noise [P]."""
        variances = self.deviations**2 + s * s
        offsets = y[:, None] - self.means
        logs = np.log(self.weights) - np.log(variances) / 2 - offsets**2 / (2 * variances)
        shares = np.exp(logs - logs.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return np.sum(shares * (self.means + self.deviations**2 / variances * offsets), axis=1)

    def quantiles(self, probabilities: np.ndarray, s: float) -> np.ndarray:
        """The y [P] below which that much of the distribution at noise level s is, by bisection."""
        deviations = np.hypot(self.deviations, s)
        low = np.full(len(probabilities), np.min(self.means - 9 * deviations))
        high = np.full(len(probabilities), np.max(self.means + 9 * deviations))
        for _ in range(80):
            middle = (low + high) / 2
            below = _normal((middle[:, None] - self.means) / deviations) @ self.weights < probabilities
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return middle


def _normal(z: np.ndarray) -> np.ndarray:
    """The share of the standard normal distribution below z."""
    erf = np.array([math.erf(value / math.sqrt(2)) for value in z.ravel()])
    return (1 + erf.reshape(z.shape)) / 2


MIXTURE = Mixture(np.array([0.3, 0.7]), np.array([-1.0, 0.6]), np.array([0.5, 0.4]))
PROBABILITIES = np.linspace(0.05, 0.95, 13)

_unipc = partial(unipc, lower_order_final=False)
_sa_solver = partial(sa_solver, lower_order_final=False, tau=lambda t: 0.0)

DETERMINISTIC: dict[str, tuple[Solver, ...]] = {
    "one evaluation a step": (
        Solver("DDIM", ddim, 1, scaled=True),
        Solver("Euler", euler, 1),
        Solver("PLMS", plms, 2, scaled=True),
        Solver("PNDM", pndm, 2, scaled=True),
        Solver("iPNDM", ipndm, 2, scaled=True),
        Solver("LMS 2", partial(lms, order=2), 2),
        Solver("LMS 3", partial(lms, order=3), 3),
        Solver("LMS 4", lms, 4),
        Solver("DEIS 2", deis, 2, scaled=True),
        Solver("DEIS 3", partial(deis, order=3), 3, scaled=True),
    ),
    "DPM-Solver": (
        Solver("DPM++ 1", partial(dpmpp_multistep, order=1), 1, scaled=True),
        Solver("DPM++ 2M", dpmpp_multistep, 2, scaled=True),
        Solver("DPM++ 2M heun", partial(dpmpp_multistep, heun=True), 2, scaled=True),
        Solver("DPM++ 3M", partial(dpmpp_multistep, order=3), 2, scaled=True),
        Solver("DPM 2M", dpm_multistep, 2, scaled=True),
        Solver("DPM 3M", partial(dpm_multistep, order=3), 2, scaled=True),
        Solver("DPM++ singlestep 2", dpmpp_singlestep, 2, scaled=True),
        Solver("DPM++ singlestep 3", partial(dpmpp_singlestep, order=3, heun=True), 3, scaled=True),
        Solver("DPM singlestep 3", partial(dpm_singlestep, order=3), 3, scaled=True),
    ),
    "several evaluations a step": (
        Solver("Heun", heun, 2),
        Solver("DPM2", dpm2, 2),
        Solver("DPM++ 2S, eta 0", partial(dpmpp_2s_ancestral, eta=0.0), 2),
        Solver("DPM++ SDE, eta 0", partial(dpmpp_sde, eta=0.0), 2),
        Solver("DPM fast", lambda grid: dpm_fast(grid, 3 * len(grid) - 2), 2),
    ),
    "predictor and corrector": (
        Solver("UniPC 1", partial(_unipc, order=1), 2, scaled=True),
        Solver("UniPC 2, bh1", partial(_unipc, order=2, bh1=True), 3, scaled=True),
        Solver("UniPC 2, bh2", partial(_unipc, order=2), 3, scaled=True),
        Solver("UniPC 3", partial(_unipc, order=3), 4, scaled=True),
        Solver("UniPC 3 of noise", partial(_unipc, order=3, predict_x0=False), 4, scaled=True),
        Solver("SA-Solver 2/2, tau 0", partial(_sa_solver, predictor_order=2, corrector_order=2), 2, scaled=True),
        Solver("SA-Solver 3/4, tau 0", partial(_sa_solver, predictor_order=3, corrector_order=4), 4, scaled=True),
    ),
}

STOCHASTIC: tuple[Solver, ...] = (
    Solver("Euler a", euler_ancestral, 1),
    Solver("Euler, churn", partial(euler, s_churn=20.0), 1),
    Solver("Heun, churn", partial(heun, s_churn=20.0), 2),
    Solver("DPM2, churn", partial(dpm2, s_churn=20.0), 2),
    Solver("DPM2 a", dpm2_ancestral, 2),
    Solver("DPM++ 2S a", dpmpp_2s_ancestral, 2),
    Solver("DPM++ SDE", dpmpp_sde, 2),
    Solver("DPM++ 2M SDE", partial(dpmpp_multistep, eta=1.0), 2, scaled=True),
    Solver("DPM++ 2M SDE heun", partial(dpmpp_multistep, eta=1.0, heun=True), 2, scaled=True),
    Solver("DPM++ 3M SDE", partial(dpmpp_multistep, order=3, eta=1.0, heun=True), 2, scaled=True),
    Solver("DPM fast, eta 1/2", lambda grid: dpm_fast(grid, 3 * len(grid) - 2, eta=0.5), 2),
    Solver("SA-Solver 2/2, tau 1", partial(sa_solver, tau=lambda t: 1.0), 2, scaled=True),
    Solver("Restart", lambda grid: restart(grid, [Restarts(0.1, 2.0, max(3, len(grid) // 4), 2)]), 2),
)


def grid(steps: int) -> StridedGrid:
    """That many steps from HIGH to LOW, uniform in log s."""
    stride = (len(LEVELS) - 1) // steps
    timesteps = np.arange(steps, 0, -1) * stride
    above = LEVELS[np.minimum(timesteps + stride, len(LEVELS) - 1)]
    return StridedGrid(
        timesteps.astype(np.float64),
        LEVELS[timesteps],
        LEVELS[timesteps - stride],
        "epsilon",
        1.0,
        above,
        levels=LEVELS,
    )


@cache
def ends() -> tuple[np.ndarray, np.ndarray]:
    """The same quantiles at HIGH and at LOW: starts of the flow and its exact ends."""
    return MIXTURE.quantiles(PROBABILITIES, HIGH), MIXTURE.quantiles(PROBABILITIES, LOW)


def error(solver: Solver, steps: int) -> float:
    """The root mean square error of a deterministic solver at LOW, over the quantiles of the mixture."""
    table = solver.table(grid(steps))
    state = np.zeros((SLOTS, len(PROBABILITIES)))
    start, end = ends()
    state[0] = start / math.hypot(1, HIGH)
    for alpha, sigma, update in zip(table.alphas, table.sigmas, table.updates):
        output = (state[0] - alpha * MIXTURE.clean(state[0] / alpha, sigma / alpha)) / sigma
        state = update[:, :SLOTS] @ state + np.outer(update[:, SLOTS], output)
    y = state[0] * (math.hypot(1, LOW) if solver.scaled else 1)
    return float(np.sqrt(np.mean((y - end) ** 2)))


def moments(table: StepTable, mean: float, deviation: float) -> tuple[float, float]:
    """The mean and the variance of the last latent, for data of that mean and deviation and an exact start."""
    means, covariance = np.zeros(SLOTS), np.zeros((SLOTS, SLOTS))
    means[0] = table.alphas[0] * mean
    covariance[0, 0] = (table.alphas[0] * deviation) ** 2 + table.sigmas[0] ** 2
    for alpha, sigma, update in zip(table.alphas, table.sigmas, table.updates):
        # The output is slope (x - alpha mean), which makes the update an affine map of the state.
        slope = sigma / ((alpha * deviation) ** 2 + sigma**2)
        outputs, noise = update[:, SLOTS], update[:, SLOTS + 1]
        matrix = update[:, :SLOTS].copy()
        matrix[:, 0] += slope * outputs
        means = matrix @ means - slope * alpha * mean * outputs
        covariance = matrix @ covariance @ matrix.T + np.outer(noise, noise)
    return float(means[0]), float(covariance[0, 0])


def variance_error(solver: Solver, steps: int, deviation: float = 0.5) -> float:
    """The relative error of the variance at LOW that a stochastic solver makes of normal data."""
    _, variance = moments(solver.table(grid(steps)), 0.7, deviation)
    exact = deviation**2 + LOW**2
    return abs(variance * (1 + LOW**2 if solver.scaled else 1) / exact - 1)


def slope(errors: Sequence[float]) -> float:
    """The order at which errors fall over STEPS: the slope of a line through their logarithms."""
    return -float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="a picture of the errors")


def run(options: argparse.Namespace) -> None:
    """Prints the order of every solver, and draws the errors."""
    if options.output and options.output.suffix.lower() not in PLOTS:
        raise BenchmarkUsageError(f"--output is {str(options.output)!r}; its name must end with {', '.join(PLOTS)}")
    found = measured()
    for family, curves in found.items():
        print(f"\n{family}")
        for solver, errors in curves:
            falls = ", ".join(f"{value:.1e}" for value in errors)
            print(f"  {solver.name:22} order {slope(errors):.2f}, expected {solver.order}: {falls}")
    print(f"\nerrors at {', '.join(map(str, STEPS))} steps")
    if options.output:
        plots.convergence(found, STEPS, options.output)
        print(f"wrote {options.output}")


def measured() -> dict[str, list[tuple[Solver, list[float]]]]:
    """The errors of every solver at STEPS, by family."""
    found = {
        family: [(solver, [error(solver, steps) for steps in STEPS]) for solver in solvers]
        for family, solvers in DETERMINISTIC.items()
    }
    found["with noise: error of the variance"] = [
        (solver, [variance_error(solver, steps) for steps in STEPS]) for solver in STOCHASTIC
    ]
    return found
