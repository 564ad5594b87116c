"""Grids: at which timesteps and noise levels a sampler evaluates the U-Net, and where its steps go.

Their rules are in class_grids.py (those of diffusers' classes), levels.py (those of A1111's schedule types) and
webui_grids.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ..errors import SchedulerConfigError, StepsError, TimestepsError
from .levels import sigma_to_timestep
from .table import vp

GridType = TypeVar("GridType", bound="Grid")

LEAST_SIGMA, MOST_SIGMA = 1e-12, 1e12
"""Noise levels of evaluations; beyond these the coefficients of an update don't fit into float32."""


@dataclass(frozen=True)
class Grid:
    """The evaluations of a sampler, from high to low noise, all float64.

    timesteps [E]: what the U-Net is told, perhaps fractional; sigmas [E]: the noise levels s = sigma / alpha of
    k-diffusion there, of which the first may be infinite; targets [E]: the level that each step goes to, which is the
    next of `sigmas` for most samplers; initial_scale: what turns standard normal noise into the first latent; levels
    [T]: the noise levels of all training timesteps, rising, of which the last may be infinite.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    targets: np.ndarray
    prediction_type: str
    initial_scale: float
    levels: np.ndarray = field(kw_only=True)

    def __len__(self) -> int:
        return len(self.timesteps)

    def steps(self) -> Iterator[tuple[float, float, float]]:
        """Timestep, noise level and target of each step, as Python's floats, which don't divide by zero."""
        return zip(self.timesteps.tolist(), self.sigmas.tolist(), self.targets.tolist())

    def timestep(self, s: float) -> float:
        """The timestep of any noise level, for evaluations between those of the grid: linear in log s between training
        timesteps, as k-diffusion's `sigma_to_t`."""
        return float(sigma_to_timestep(np.array(s), self.levels))

    def starting_at(self, step: int) -> Grid:
        """The part from that step on, for a loop that starts from an image with the noise of this level. StepsError
        where there is no such step."""
        if not 0 <= step < len(self):
            raise StepsError(
                f"a loop of {len(self)} steps cannot start at step {step}; take one from 0 to {len(self) - 1}"
            )
        if step == 0:
            return self
        later = {
            part.name: getattr(self, part.name)[step:]
            for part in dataclasses.fields(self)
            if isinstance(getattr(self, part.name), np.ndarray) and part.name != "levels"
        }
        return dataclasses.replace(self, **later, initial_scale=vp(float(self.sigmas[step]))[1])


@dataclass(frozen=True)
class StridedGrid(Grid):
    """A grid whose steps all go T // steps timesteps down, as those of DDIM and PNDM in diffusers.

    sources [E]: the noise level of T // steps timesteps above each evaluation, where PLMS takes a step again.
    """

    sources: np.ndarray


def level_grid(
    sigmas: np.ndarray, levels: np.ndarray, prediction_type: str, initial_scale: float | None = None
) -> Grid:
    """The grid of any falling noise levels [N+1], of which the last is where the last step goes. The U-Net is told the
    timesteps of k-diffusion, which need not be whole. Unless initial_scale says something else, a loop starts from
    noise of the first level."""
    first = vp(float(sigmas[0]))[1] if initial_scale is None else initial_scale
    timesteps = sigma_to_timestep(sigmas[:-1], levels)
    return checked(Grid(timesteps, sigmas[:-1], sigmas[1:], prediction_type, first, levels=levels))


def checked(grid: GridType) -> GridType:
    """The grid, if a solver can do it: the noise falls from evaluation to evaluation, no step adds some, and float32
    holds its levels. Else a StepsError or a SchedulerConfigError."""
    sigmas = grid.sigmas
    if not (sigmas[1:] < sigmas[:-1]).all():
        if sigmas[-1] > sigmas[0]:
            raise SchedulerConfigError(
                f"sigma_min is above sigma_max (the noise levels would go from {sigmas[0]:g} to {sigmas[-1]:g}); "
                f"correct them in scheduler_config.json"
            )
        raise StepsError(f"some noise levels of {len(grid)} steps would coincide; take fewer steps")
    if not (grid.targets <= sigmas).all():
        raise SchedulerConfigError(
            f"the last step would end at the noise level {grid.targets[-1]:g}, above its start at {sigmas[-1]:g}; take "
            f"a larger sigma_min, or final_sigmas_type 'zero' (scheduler_config.json)"
        )
    if math.isinf(sigmas[0]) and grid.prediction_type == "epsilon":
        raise SchedulerConfigError(
            f"a model with prediction_type 'epsilon' predicts nothing at timestep {grid.timesteps[0]:g}, which has no "
            f"signal (rescale_betas_zero_snr=true); correct prediction_type, or take timestep_spacing 'leading'"
        )
    finite = sigmas[np.isfinite(sigmas)]
    in_range = (finite >= LEAST_SIGMA) & (finite <= MOST_SIGMA)
    if len(finite) < len(sigmas) - 1 or not in_range.all():
        raise SchedulerConfigError(
            f"the noise levels from {sigmas[0]:g} to {sigmas[-1]:g} are not all between {LEAST_SIGMA:g} and "
            f"{MOST_SIGMA:g}, as float32 needs them; correct the betas, sigma_min or sigma_max in scheduler_config.json"
        )
    return grid


def falling(given: tuple[float, ...], highest: float, whole: bool) -> np.ndarray:
    """A call's own timesteps. TimestepsError where they don't fall, the model doesn't have them, or the sampler needs
    whole ones."""
    timesteps = np.array(given, np.float64)
    if not ((timesteps >= 0) & (timesteps <= highest)).all():
        worst = timesteps[np.argmax(np.maximum(-timesteps, timesteps - highest))]
        raise TimestepsError(f"timestep {worst:g} is not one of the model's, which go from {highest:g} to 0")
    rises = np.diff(timesteps) >= 0
    if rises.any():
        i = int(np.argmax(rises))
        raise TimestepsError(
            f"timesteps must fall: number {i + 1} is {timesteps[i]:g} and the next is {timesteps[i + 1]:g}; pass them "
            f"from high to low, each once"
        )
    if whole and (timesteps != np.round(timesteps)).any():
        odd = timesteps[timesteps != np.round(timesteps)][0]
        raise TimestepsError(f"timestep {odd:g} is not a whole number, which this sampler needs; round it")
    return timesteps
