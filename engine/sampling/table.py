"""Samplers as step tables: for every U-Net evaluation a timestep and a K x (K+2) matrix, computed in float64.

The state has K = SLOTS slots. Slot 0 is the latent x that the U-Net sees, VP-scaled: x = alpha x0 + sigma noise. One
evaluation does

    state' = update @ [state; output; noise]

with `output` the guided output of the U-Net and `noise` standard normal. A row of an update is a `Linear`, so a solver
writes its paper's equations with `X`, `OUTPUT`, `NOISE` and `PAST`, and makes updates of them with `single`,
`multistep` or `keep`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..contract import SLOTS
from ..errors import SchedulerConfigError

Linear: TypeAlias = np.ndarray
"""[K+2] float64: a quantity as a linear combination of the state's slots, the output and the noise. Sums of these and
their products with numbers are NumPy's."""

_BASIS = np.eye(SLOTS + 2)
_BASIS.flags.writeable = False
X: Linear = _BASIS[0]
PAST: Sequence[Linear] = tuple(_BASIS[1:SLOTS])
"""What the slots from 1 on remember; after `multistep`, the values that it pushed, newest first."""
OUTPUT: Linear = _BASIS[SLOTS]
NOISE: Linear = _BASIS[SLOTS + 1]

_SHIFT = np.eye(SLOTS, SLOTS + 2, k=-1)
"""The update that moves every slot into the next one."""


class SolverError(ArithmeticError):
    """A solver made a table that is not finite in float32. The grid was in order, so this is a bug in the solver."""


@dataclass(frozen=True)
class StepTable:
    """Everything the loop needs to know about a sampler.

    timesteps [E] and updates [E, K, K+2], float64, one of each per U-Net evaluation; draws [E] says where diffusers
    draws noise (also where its factor is zero, so that the random numbers stay in step); scales [E] are the factors
    that turn the latents after each evaluation into diffusers', which are not VP-scaled for every sampler.

    alphas [E] and sigmas [E], alpha^2 + sigma^2 = 1, describe the noise in the latents that each evaluation sees. The
    state is VP-scaled at a late start too: from an image x0 a loop starts at alphas[0] x0 + sigmas[0] noise, whether
    the table is whole or starts late. From nothing it starts at initial_scale noise.
    """

    timesteps: np.ndarray
    updates: np.ndarray
    draws: np.ndarray
    initial_scale: float
    scales: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)


class TableBuilder:
    """Collects the rows of a StepTable."""

    def __init__(self) -> None:
        self._timesteps: list[float] = []
        self._updates: list[np.ndarray] = []
        self._draws: list[bool] = []
        self._scales: list[float] = []
        self._noise: list[tuple[float, float]] = []

    def add(self, timestep: float, s: float, update: np.ndarray, draw: bool = False, scale: float = 1.0) -> None:
        """One evaluation at a timestep and the noise level s."""
        self._timesteps.append(timestep)
        self._updates.append(update)
        self._draws.append(draw)
        self._scales.append(scale)
        self._noise.append(vp(s))

    def table(self, initial_scale: float) -> StepTable:
        """All evaluations; SolverError for numbers that are not finite in float32."""
        updates, scales = np.stack(self._updates), np.array(self._scales)
        # The largest number is NaN if one is, and a comparison with NaN is false.
        largest = np.maximum(np.abs(updates).max(axis=(1, 2)), np.abs(scales))
        finite = largest <= np.finfo(np.float32).max
        if not finite.all():
            i = int(np.argmin(finite))
            raise SolverError(
                f"the solver's update of evaluation {i} (timestep {self._timesteps[i]:g}) is not finite in float32; "
                f"this is a bug of the solver, please report it with scheduler_config.json"
            )
        alphas, sigmas = np.array(self._noise).T
        return StepTable(
            np.array(self._timesteps, np.float64), updates, np.array(self._draws), initial_scale, scales, alphas, sigmas
        )


def single(x_next: Linear) -> np.ndarray:
    """The update of a solver without memory."""
    update = np.zeros((SLOTS, SLOTS + 2))
    update[0] = x_next
    return update


def multistep(x_next: Linear, newest: Linear) -> np.ndarray:
    """The update of a solver that remembers: `newest` is pushed into PAST, whose oldest value is lost."""
    update = _SHIFT.copy()
    update[0], update[1] = x_next, newest
    return update


def weighted(weights: Iterable[float], values: Iterable[Linear]) -> Linear:
    """The sum of the values with these weights, of which there may be fewer."""
    total = np.zeros_like(X)
    for weight, value in zip(weights, values):
        total = total + weight * value
    return total


def keep(x_next: Linear, *past: Linear) -> np.ndarray:
    """The update of a solver that says what each slot of PAST remembers, in their order; the rest forget."""
    update = single(x_next)
    update[1 : 1 + len(past)] = past
    return update


def vp(s: float) -> tuple[float, float]:
    """alpha and sigma of a k-diffusion noise level s = sigma / alpha, which may be infinite."""
    if math.isinf(s):
        return 0.0, 1.0
    alpha = 1 / math.sqrt(1 + s * s)
    return alpha, s * alpha


def as_x0(prediction_type: str, s: float) -> Linear:
    """The predicted clean latent at noise level s."""
    alpha, sigma = vp(s)
    if prediction_type == "epsilon":
        return (X - sigma * OUTPUT) / alpha
    return alpha * X - sigma * OUTPUT if prediction_type == "v_prediction" else OUTPUT


def as_epsilon(prediction_type: str, s: float) -> Linear:
    """The predicted noise at noise level s."""
    alpha, sigma = vp(s)
    if prediction_type == "epsilon":
        return OUTPUT
    return sigma * X + alpha * OUTPUT if prediction_type == "v_prediction" else (X - alpha * OUTPUT) / sigma


def refuse_infinite_noise(s: float, solver: str) -> None:
    """SchedulerConfigError for a first evaluation without signal, which the solver's equations don't allow."""
    if math.isinf(s):
        raise SchedulerConfigError(
            f"{solver} cannot start at a timestep that has no signal (rescale_betas_zero_snr=true); take another "
            f"scheduler, for example ddim, or timestep_spacing 'leading'"
        )
