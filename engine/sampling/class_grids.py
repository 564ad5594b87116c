"""The grids of diffusers' scheduler classes.

A rule is a function `(schedule, steps, timesteps) -> Grid`. It reads the options of scheduler_config.json, of which
`Sampler.configured` has filled in the defaults. `timesteps` are a call's own, which take the place of the spaced ones;
`steps` is then their number. Steps that don't fit are a StepsError, timesteps that don't a TimestepsError, and options
that contradict each other a SchedulerConfigError, before any solver runs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..errors import SchedulerConfigError, StepsError
from .grids import Grid, StridedGrid, checked, falling
from .levels import beta_sigmas, exponential_sigmas, karras_sigmas, sigma_to_timestep
from .schedule import Schedule
from .table import vp

Timesteps = tuple[float, ...] | None

FLAGS = {
    "karras": "use_karras_sigmas",
    "lu": "use_lu_lambdas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
"""The options that replace the levels of the timesteps by others, by the name of the grid."""


def strided_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> StridedGrid:
    """The grid of DDIMScheduler and PNDMScheduler, which step to t - T // steps whatever the next timestep is.
    set_alpha_to_one says where a step below timestep 0 goes: to no noise, or to that of timestep 0. Steps on a call's
    own timesteps go to the next one."""
    levels = schedule.exact_sigmas()
    final = 0.0 if schedule.config["set_alpha_to_one"] else levels[0]
    if timesteps is None:
        chosen = _whole_timesteps(schedule, steps)
        stride = schedule.train_timesteps // steps
        targets = np.where(chosen >= stride, levels[chosen - stride], final)
        sources = levels[np.minimum(chosen + stride, len(levels) - 1)]
    else:
        chosen = falling(timesteps, schedule.train_timesteps - 1, whole=True).astype(int)
        targets = np.append(levels[chosen[1:]], min(final, levels[chosen[-1]]))
        sources = np.append(levels[chosen[0]], levels[chosen[:-1]])
    return checked(
        StridedGrid(
            chosen.astype(np.float64), levels[chosen], targets, schedule.prediction_type, 1.0, sources, levels=levels
        )
    )


def successive_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> Grid:
    """The grid of DDPMScheduler: the timesteps of `strided_grid`, and every step goes to the next one."""
    whole = _whole_timesteps(schedule, steps) if timesteps is None else _own(schedule, timesteps)
    levels = schedule.exact_sigmas()
    return _successive(schedule, whole, levels, 0.0)


def consistency_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> Grid:
    """The grid of LCMScheduler: `steps` of the original_inference_steps timesteps that the model was distilled on, or
    a call's own. The last step goes to no noise."""
    whole = _distilled(schedule, steps) if timesteps is None else _own(schedule, timesteps)
    return _successive(schedule, whole, schedule.exact_sigmas(), 0.0)


def trajectory_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> Grid:
    """The grid of TCDScheduler: `consistency_grid`, whose last step goes to timestep 0."""
    whole = _distilled(schedule, steps) if timesteps is None else _own(schedule, timesteps)
    levels = schedule.exact_sigmas()
    return _successive(schedule, whole, levels, float(levels[0]))


def sine_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> Grid:
    """The grid of IPNDMScheduler, which has a noise schedule of its own: timesteps from 1 down to 1 / steps, sigma =
    sin(t pi / 2)^2, and a model that predicts v. The first timestep has no signal. SchedulerConfigError for a model
    that predicts something else."""
    if schedule.prediction_type != "v_prediction":
        raise SchedulerConfigError(
            f"IPNDMScheduler has a noise schedule of its own, for models that predict v, and this one predicts "
            f"{schedule.prediction_type}; take scheduler 'ipndm', which uses the model's"
        )
    sigma = np.sin(np.linspace(1, 0, steps + 1) * math.pi / 2) ** 2
    with np.errstate(divide="ignore"):
        sigmas = sigma / np.sqrt(1 - sigma**2)
    told = 2 / math.pi * np.arcsin(sigma[:-1])
    levels = np.sort(sigmas)
    return checked(Grid(told, sigmas[:-1], sigmas[1:], "v_prediction", 1.0, levels=levels))


def _successive(schedule: Schedule, timesteps: np.ndarray, levels: np.ndarray, final: float) -> Grid:
    sigmas = levels[timesteps]
    targets = np.append(sigmas[1:], final)
    grid = Grid(timesteps.astype(np.float64), sigmas, targets, schedule.prediction_type, 1.0, levels=levels)
    return checked(grid)


def _distilled(schedule: Schedule, steps: int) -> np.ndarray:
    original = schedule.config["original_inference_steps"]
    if not steps <= original <= schedule.train_timesteps:
        raise StepsError(
            f"a model that was distilled on original_inference_steps={original} of {schedule.train_timesteps} "
            f"timesteps has no {steps} steps; take fewer, from 1 to {min(original, schedule.train_timesteps)}"
        )
    stride = schedule.train_timesteps // original
    chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    return (original - chosen) * stride - 1


def fractional_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> Grid:
    """The grid of diffusers' classes after k-diffusion: timesteps that need not be whole, and noise levels linear
    between them; or levels of another rule over the same range, or from sigma_max to sigma_min. final_sigmas_type,
    where a class has it, says where the last step goes."""
    chosen, sigmas = _fractional(schedule, steps, timesteps)
    kind = _kind(schedule, timesteps)
    if kind is not None:
        return _kind_grid(schedule, kind, sigmas[-1], sigmas[0], steps)
    return _ve_grid(schedule, chosen, sigmas, _final_sigma(schedule))


def midpoint_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> Grid:
    """`fractional_grid` for KDPM2DiscreteScheduler and its ancestral sister, which round the timesteps of Karras's
    levels."""
    grid = fractional_grid(schedule, steps, timesteps)
    return replace(grid, timesteps=np.round(grid.timesteps)) if schedule.config["use_karras_sigmas"] else grid


def euler_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> Grid:
    """`fractional_grid` for EulerDiscreteScheduler, with its options. interpolation_type "log_linear": levels evenly
    spaced in log s, for one step more, beside the timesteps that there are; the last step goes to the lowest of them.
    Another rule then goes over the whole range.
    timestep_type "continuous": a model that predicts v is told log(s) / 4."""
    if schedule.config["interpolation_type"] == "log_linear":
        grid = _log_linear_grid(schedule, steps, timesteps)
    else:
        grid = fractional_grid(schedule, steps, timesteps)
    return continuous(schedule, grid)


def continuous(schedule: Schedule, grid: Grid) -> Grid:
    """The grid with the timesteps of timestep_type "continuous", where the model is trained on those."""
    if schedule.config.get("timestep_type") == "continuous" and schedule.prediction_type == "v_prediction":
        return replace(grid, timesteps=0.25 * np.log(grid.sigmas))
    return grid


def _log_linear_grid(schedule: Schedule, steps: int, timesteps: Timesteps) -> Grid:
    levels, kind = schedule.sigmas(), _kind(schedule, timesteps)
    if kind is not None:
        return _kind_grid(schedule, kind, levels[0], levels[-1], steps)
    chosen, _ = _fractional(schedule, steps, timesteps)
    sigmas = exponential_sigmas(levels[0], levels[-1], steps + 1)
    return _ve_grid(schedule, chosen, sigmas[:-1], float(sigmas[-1]))


def _kind_grid(schedule: Schedule, kind: str, low: float, high: float, steps: int) -> Grid:
    sigmas = _levels(schedule, kind, low, high, steps)
    return _ve_grid(schedule, sigma_to_timestep(sigmas, schedule.sigmas()), sigmas, _final_sigma(schedule))


def _fractional(schedule: Schedule, steps: int, timesteps: Timesteps) -> tuple[np.ndarray, np.ndarray]:
    highest = schedule.train_timesteps - 1
    if timesteps is None:
        chosen = _checked_timesteps(spaced_timesteps(schedule, steps), schedule, steps)
    else:
        chosen = falling(timesteps, highest, whole=False)
    return chosen, np.interp(chosen, np.arange(highest + 1), schedule.sigmas())


def _ve_grid(schedule: Schedule, timesteps: np.ndarray, sigmas: np.ndarray, final: float) -> Grid:
    """diffusers starts from s noise or sqrt(s^2 + 1) noise, in its own (VE) scale."""
    leading = schedule.config["timestep_spacing"] == "leading"
    initial_scale = 1.0 if leading else vp(float(sigmas[0]))[1]
    targets = np.append(sigmas[1:], final)
    return checked(Grid(timesteps, sigmas, targets, schedule.prediction_type, initial_scale, levels=schedule.sigmas()))


def one_more_grid(schedule: Schedule, steps: int, timesteps: Timesteps = None) -> Grid:
    """The grid of DPMSolverMultistepScheduler and its kin: whole timesteps, spaced as for one step more, of which the
    last is dropped; or levels of another rule over the whole range, whose timesteps are made whole: rounded for
    Karras's and Lu's, cut off for others, as diffusers does. (Its float32 may cut the highest timestep off to the one
    below.) Where the class has no final_sigmas_type, the last step goes to the lowest level, or nowhere from there."""
    levels, kind = schedule.sigmas(), _kind(schedule, timesteps)
    if kind is None:
        chosen = _one_more_timesteps(schedule, steps, levels) if timesteps is None else _own(schedule, timesteps)
        sigmas = levels[chosen.astype(int)]
    else:
        sigmas = _levels(schedule, kind, levels[0], levels[-1], steps)
        chosen = sigma_to_timestep(sigmas, levels)
        if kind in ("karras", "lu") and not _keeps_fractions(schedule):
            chosen = np.round(chosen)
        chosen = np.floor(chosen + 1e-6)  # the highest is whole but for rounding errors
    targets = np.append(sigmas[1:], _last_target(schedule, kind, sigmas))
    return checked(Grid(chosen.astype(float), sigmas, targets, schedule.prediction_type, 1.0, levels=levels))


def _last_target(schedule: Schedule, kind: str | None, sigmas: np.ndarray) -> float:
    """Where the last step goes. From levels of another rule UniPC, DEIS and SA-Solver end at the last of them, and
    DPM-Solver at the lowest level of all."""
    final = _final_sigma(schedule, "sigma_min")
    dpm_solver = "final_sigmas_type" in schedule.config and "predict_x0" not in schedule.config
    return float(sigmas[-1]) if final > 0 and kind is not None and not dpm_solver else final


def _keeps_fractions(schedule: Schedule) -> bool:
    """DPMSolverMultistepScheduler, alone of these classes, cuts timesteps off on the cosine schedule."""
    return "euler_at_final" in schedule.config and schedule.config.get("beta_schedule") == "squaredcos_cap_v2"


def _one_more_timesteps(schedule: Schedule, steps: int, levels: np.ndarray) -> np.ndarray:
    config, spacing = schedule.config, schedule.config.get("timestep_spacing", "linspace")
    clipped = config.get("lambda_min_clipped", -math.inf)
    total = int(np.sum(-np.log(levels) >= clipped))
    if total == 0:
        raise SchedulerConfigError(
            f"lambda_min_clipped={clipped:g} leaves no timestep: the largest lambda of this "
            f"schedule is {-math.log(levels[0]):g}; take a smaller one in scheduler_config.json"
        )
    if spacing == "linspace":
        timesteps = np.round(np.linspace(0, total - 1, steps + 1))[:0:-1]
    elif spacing == "leading":
        timesteps = np.arange(steps, 0, -1) * float(total // (steps + 1)) + config["steps_offset"]
    else:
        timesteps = _trailing_timesteps(total, schedule.train_timesteps / steps)
    return _checked_timesteps(timesteps, schedule, steps)


def _kind(schedule: Schedule, timesteps: Timesteps) -> str | None:
    """Which of FLAGS is set. SchedulerConfigError for two; a call's own timesteps go with none."""
    kinds = [kind for kind, option in FLAGS.items() if schedule.config.get(option)]
    if len(kinds) > 1 or (kinds and timesteps is not None):
        both = " and ".join(f"{FLAGS[kind]}=true" for kind in kinds)
        raise SchedulerConfigError(
            f"{both} {'contradict each other' if len(kinds) > 1 else 'leaves no room for timesteps of a call'}; "
            f"correct scheduler_config.json, or pass a schedule_type such as 'linspace'"
        )
    return kinds[0] if kinds else None


def _levels(schedule: Schedule, kind: str, low: float, high: float, steps: int) -> np.ndarray:
    """Noise levels of one of FLAGS. Lu's lambdas are evenly spaced in lambda, which is exponential in s."""
    config = schedule.config
    low, high = float(config.get("sigma_min") or low), float(config.get("sigma_max") or high)
    rule = {"karras": karras_sigmas, "beta": beta_sigmas}.get(kind, exponential_sigmas)
    return rule(low, high, steps)


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


def _final_sigma(schedule: Schedule, default: str = "zero") -> float:
    return 0.0 if schedule.config.get("final_sigmas_type", default) == "zero" else float(schedule.sigmas()[0])


def _own(schedule: Schedule, timesteps: tuple[float, ...]) -> np.ndarray:
    return falling(timesteps, schedule.train_timesteps - 1, whole=True).astype(int)


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
        f"timestep_spacing={schedule.config.get('timestep_spacing', 'linspace')} and "
        f"steps_offset={schedule.config.get('steps_offset', 0)} ({reason}); take fewer"
    )
