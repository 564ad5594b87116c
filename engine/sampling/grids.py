"""Grids: at which timesteps and noise levels a sampler evaluates the U-Net, and where its steps go.

A rule is a function `(schedule, steps) -> Grid`. It reads the options of scheduler_config.json, of which
`Sampler.configured` has filled in the defaults. Steps that don't fit are a StepsError, and options that contradict each
other a SchedulerConfigError, before any solver runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ..errors import SchedulerConfigError, StepsError
from .schedule import Schedule
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


def strided_grid(schedule: Schedule, steps: int) -> StridedGrid:
    """The grid of DDIMScheduler and PNDMScheduler, which step to t - T // steps whatever the next timestep is.
    set_alpha_to_one says where a step below timestep 0 goes: to no noise, or to that of timestep 0."""
    timesteps = _whole_timesteps(schedule, steps)
    stride = schedule.train_timesteps // steps
    levels = schedule.exact_sigmas()
    final = 0.0 if schedule.config["set_alpha_to_one"] else levels[0]
    targets = np.where(timesteps >= stride, levels[timesteps - stride], final)
    sources = levels[np.minimum(timesteps + stride, len(levels) - 1)]
    grid = StridedGrid(
        timesteps.astype(np.float64),
        levels[timesteps],
        targets,
        schedule.prediction_type,
        1.0,
        sources,
        levels=levels,
    )
    return _checked(grid, schedule, steps)


def plms_grid(schedule: Schedule, steps: int) -> StridedGrid:
    """`strided_grid` for PNDMScheduler, which divides by alpha and so cannot start at a zero terminal SNR."""
    grid = strided_grid(schedule, steps)
    if math.isinf(grid.sigmas[0]):
        raise SchedulerConfigError(
            f"PNDMScheduler cannot start at timestep {grid.timesteps[0]:g}, which has no signal "
            f"(rescale_betas_zero_snr=true); take another scheduler, for example ddim, or timestep_spacing 'leading'"
        )
    return grid


def successive_grid(schedule: Schedule, steps: int) -> Grid:
    """The grid of DDPMScheduler: the timesteps of `strided_grid`, and every step goes to the next one."""
    timesteps = _whole_timesteps(schedule, steps)
    levels = schedule.exact_sigmas()
    sigmas = levels[timesteps]
    targets = np.append(sigmas[1:], 0.0)
    grid = Grid(timesteps.astype(np.float64), sigmas, targets, schedule.prediction_type, 1.0, levels=levels)
    return _checked(grid, schedule, steps)


def fractional_grid(schedule: Schedule, steps: int) -> Grid:
    """The grid of EulerAncestralDiscreteScheduler: timesteps that need not be whole, and noise levels linear between
    them. The last step goes to no noise."""
    timesteps = _checked_timesteps(spaced_timesteps(schedule, steps), schedule, steps)
    sigmas = np.interp(timesteps, np.arange(schedule.train_timesteps), schedule.sigmas())
    return _ve_grid(schedule, steps, timesteps, sigmas, 0.0)


def euler_grid(schedule: Schedule, steps: int) -> Grid:
    """The grid of EulerDiscreteScheduler: `fractional_grid`, or Karras's noise levels over the same range or from
    sigma_max to sigma_min; final_sigmas_type says where the last step goes."""
    grid = fractional_grid(schedule, steps)
    timesteps, sigmas = grid.timesteps, grid.sigmas
    if schedule.config["use_karras_sigmas"]:
        low, high = schedule.config.get("sigma_min"), schedule.config.get("sigma_max")
        sigmas = karras_sigmas(sigmas[-1] if low is None else low, sigmas[0] if high is None else high, len(sigmas))
        timesteps = sigma_to_timestep(sigmas, schedule.sigmas())
    return _ve_grid(schedule, steps, timesteps, sigmas, _final_sigma(schedule))


def _ve_grid(schedule: Schedule, steps: int, timesteps: np.ndarray, sigmas: np.ndarray, final: float) -> Grid:
    """diffusers starts from s noise or sqrt(s^2 + 1) noise, in its own (VE) scale."""
    leading = schedule.config["timestep_spacing"] == "leading"
    initial_scale = 1.0 if leading else vp(float(sigmas[0]))[1]
    targets = np.append(sigmas[1:], final)
    grid = Grid(timesteps, sigmas, targets, schedule.prediction_type, initial_scale, levels=schedule.sigmas())
    return _checked(grid, schedule, steps)


def one_more_grid(schedule: Schedule, steps: int) -> Grid:
    """The grid of DPMSolverMultistepScheduler: whole timesteps, spaced as for one step more, of which the last is
    dropped, or Karras's noise levels."""
    levels = schedule.sigmas()
    if schedule.config["use_karras_sigmas"]:
        sigmas = karras_sigmas(levels[0], levels[-1], steps)
        timesteps = sigma_to_timestep(sigmas, levels)
        if schedule.config.get("beta_schedule") != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = np.floor(timesteps)
    else:
        timesteps = _checked_timesteps(_one_more_timesteps(schedule, steps, levels), schedule, steps)
        sigmas = levels[timesteps.astype(int)]
    targets = np.append(sigmas[1:], _final_sigma(schedule))
    grid = Grid(timesteps, sigmas, targets, schedule.prediction_type, 1.0, levels=levels)
    return _checked(grid, schedule, steps)


def _one_more_timesteps(schedule: Schedule, steps: int, levels: np.ndarray) -> np.ndarray:
    config, spacing = schedule.config, schedule.config["timestep_spacing"]
    total = int(np.sum(-np.log(levels) >= config["lambda_min_clipped"]))
    if total == 0:
        raise SchedulerConfigError(
            f"lambda_min_clipped={config['lambda_min_clipped']:g} leaves no timestep: the largest lambda of this "
            f"schedule is {-math.log(levels[0]):g}; take a smaller one in scheduler_config.json"
        )
    if spacing == "linspace":
        return np.round(np.linspace(0, total - 1, steps + 1))[:0:-1]
    if spacing == "leading":
        return np.arange(steps, 0, -1) * float(total // (steps + 1)) + config["steps_offset"]
    return _trailing_timesteps(total, schedule.train_timesteps / steps)


def spaced_timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """Timesteps from high to low as DDIM, DDPM, PNDM and Euler of diffusers space them; not rounded where "linspace"
    is not (arXiv 2305.08891, table 2)."""
    total, spacing = schedule.train_timesteps, schedule.config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps)[::-1] * float(total // steps) + schedule.config["steps_offset"]
    return _trailing_timesteps(total, total / steps)


def _trailing_timesteps(total: int, stride: float) -> np.ndarray:
    """diffusers' timesteps, without the -1 that its rounding adds for some numbers of steps, such as 61 of 1000."""
    timesteps = np.round(np.arange(total, 0, -stride)) - 1
    return timesteps[timesteps >= 0]


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int) -> np.ndarray:
    """arXiv 2206.00364, equation 5, with rho = 7."""
    ramp = np.linspace(0, 1, steps)
    return (sigma_max ** (1 / 7) + ramp * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7


def sigma_to_timestep(sigma: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The fractional timesteps of noise levels, linear in log s between training timesteps. Only infinite noise is at
    an infinite last one."""
    finite = sigmas[:-1] if np.isinf(sigmas[-1]) else sigmas
    timesteps = np.interp(np.log(np.maximum(sigma, 1e-10)), np.log(finite), np.arange(len(finite)))
    return np.where(np.isinf(sigma), len(sigmas) - 1, timesteps)


def _final_sigma(schedule: Schedule) -> float:
    return 0.0 if schedule.config["final_sigmas_type"] == "zero" else float(schedule.sigmas()[0])


def _whole_timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    return np.round(_checked_timesteps(spaced_timesteps(schedule, steps), schedule, steps)).astype(int)


def _checked_timesteps(timesteps: np.ndarray, schedule: Schedule, steps: int) -> np.ndarray:
    """The timesteps; StepsError for some that the model doesn't have or that are there twice."""
    last = schedule.train_timesteps - 1
    if timesteps.max() > last:
        raise _no_such_steps(
            schedule, steps, f"timestep {timesteps.max():g} would be the first and {last} is the highest"
        )
    if (np.diff(timesteps) >= 0).any():
        raise _no_such_steps(schedule, steps, "some timesteps would be there twice")
    return timesteps


def _no_such_steps(schedule: Schedule, steps: int, reason: str) -> StepsError:
    return StepsError(
        f"the model's scheduler has no {steps} steps on a schedule of {schedule.train_timesteps} timesteps with "
        f"timestep_spacing={schedule.config['timestep_spacing']} and steps_offset={schedule.config['steps_offset']} "
        f"({reason}); take fewer"
    )


def _checked(grid: GridType, schedule: Schedule, steps: int) -> GridType:
    """The grid, if a solver can do it: the noise falls from evaluation to evaluation, no step adds some, and float32
    holds its levels."""
    sigmas = grid.sigmas
    if not (sigmas[1:] < sigmas[:-1]).all():
        if sigmas[-1] > sigmas[0]:
            raise SchedulerConfigError(
                f"sigma_min is above sigma_max (the noise levels would go from {sigmas[0]:g} to {sigmas[-1]:g}); "
                f"correct them in scheduler_config.json"
            )
        raise _no_such_steps(schedule, steps, "some noise levels would coincide")
    if not (grid.targets <= sigmas).all():
        raise SchedulerConfigError(
            f"final_sigmas_type={schedule.config['final_sigmas_type']!r} would end at the noise level "
            f"{grid.targets[-1]:g}, above the last step's {sigmas[-1]:g}; take a larger sigma_min "
            f"(scheduler_config.json)"
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
