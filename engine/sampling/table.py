"""Samplers as step tables: for every U-Net evaluation a timestep and a matrix, computed in float64.

The state has K = SLOTS slots. Slot 0 is the latent x that the U-Net sees, VP-scaled: x = alpha x0 + sigma noise. One
evaluation does

    state' = update @ [state; output; noise; clipped]

with `output` the guided output of the U-Net, `noise` standard normal, and `clipped` the predicted clean sample within a
range, for models on pixels. A row of an update is a `Linear`, so a solver writes its paper's equations with `X`,
`OUTPUT`, `NOISE`, `CLIPPED` and `PAST`, and makes updates of them with `single`, `multistep` or `keep`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TypeAlias

import numpy as np

from ..contract import SLOTS
from ..errors import SchedulerConfigError

Linear: TypeAlias = np.ndarray
"""[K+3] float64: a quantity as a linear combination of the state's slots, the output, the noise and the clipped
prediction. Sums of these and their products with numbers are NumPy's."""

COLUMNS = SLOTS + 3
_BASIS = np.eye(COLUMNS)
_BASIS.flags.writeable = False
X: Linear = _BASIS[0]
PAST: Sequence[Linear] = tuple(_BASIS[1:SLOTS])
"""What the slots from 1 on remember; after `multistep`, the values that it pushed, newest first."""
OUTPUT: Linear = _BASIS[SLOTS]
NOISE: Linear = _BASIS[SLOTS + 1]
CLIPPED: Linear = _BASIS[SLOTS + 2]
"""The quantity that an evaluation's `Clip` names, within its range."""

_SHIFT = np.eye(SLOTS, COLUMNS, k=-1)
"""The update that moves every slot into the next one."""


class SolverError(ArithmeticError):
    """A solver made a table that is not finite in float32. The grid was in order, so this is a bug in the solver."""


@dataclass(frozen=True)
class Clip:
    """What CLIPPED stands for in an evaluation: clamp(x X + output OUTPUT, -limit, limit)."""

    x: float
    output: float
    limit: float

    @classmethod
    def of(cls, value: Linear, limit: float) -> Clip:
        """`value`, a combination of X and OUTPUT, within +-limit."""
        return cls(float(value[0]), float(value[SLOTS]), limit)


NO_CLIP = Clip(0.0, 0.0, 0.0)

LogVariances: TypeAlias = tuple[float, float]
"""The largest and the smallest logarithm of a learned variance. The U-Net's second output v in -1..1 chooses between
them, element by element, and NOISE is multiplied by the deviation (arXiv 2102.09672, equation 15)."""

UNIT_VARIANCE: LogVariances = 0.0, 0.0
"""Leaves NOISE as it is."""


@dataclass(frozen=True)
class StepTable:
    """Everything the loop needs to know about a sampler.

    timesteps [E] and updates [E, K, K+2], float64, one of each per U-Net evaluation; draws [E] says where diffusers
    draws noise (also where its factor is zero, so that the random numbers stay in step); scales [E] are the factors
    that turn the latents after each evaluation into diffusers', which are not VP-scaled for every sampler.

    clipped [E, K]: what each slot takes of the clipped prediction, the last column of the updates; clips [E, 3]: what
    that is, the numbers of a `Clip`; variances [E, 2]: `LogVariances`. These are for models on pixels.

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
    clipped: np.ndarray
    clips: np.ndarray
    variances: np.ndarray

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
        self._clips: list[Clip] = []
        self._variances: list[LogVariances] = []

    def add(
        self,
        timestep: float,
        s: float,
        update: np.ndarray,
        draw: bool = False,
        scale: float = 1.0,
        clip: Clip = NO_CLIP,
        variance: LogVariances = UNIT_VARIANCE,
    ) -> None:
        """One evaluation at a timestep and the noise level s."""
        self._timesteps.append(timestep)
        self._updates.append(update)
        self._draws.append(draw)
        self._scales.append(scale)
        self._noise.append(vp(s))
        self._clips.append(clip)
        self._variances.append(variance)

    def table(self, initial_scale: float) -> StepTable:
        """All evaluations; SolverError for numbers that are not finite in float32."""
        updates, scales = np.stack(self._updates), np.array(self._scales)
        clips, variances = np.array([astuple(clip) for clip in self._clips]), np.array(self._variances)
        # The largest number is NaN if one is, and a comparison with NaN is false.
        numbers = (updates.reshape(len(updates), -1), scales[:, None], clips, variances)
        largest = np.abs(np.concatenate(numbers, axis=1)).max(axis=1)
        finite = largest <= np.finfo(np.float32).max
        if not finite.all():
            i = int(np.argmin(finite))
            raise SolverError(
                f"the solver's update of evaluation {i} (timestep {self._timesteps[i]:g}) is not finite in float32; "
                f"this is a bug of the solver, please report it with scheduler_config.json"
            )
        alphas, sigmas = np.array(self._noise).T
        return StepTable(
            np.array(self._timesteps, np.float64),
            np.ascontiguousarray(updates[:, :, :-1]),
            np.array(self._draws),
            initial_scale,
            scales,
            alphas,
            sigmas,
            np.ascontiguousarray(updates[:, :, -1]),
            clips,
            variances,
        )


def single(x_next: Linear) -> np.ndarray:
    """The update of a solver without memory."""
    update = np.zeros((SLOTS, COLUMNS))
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
