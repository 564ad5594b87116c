"""The samplers, one row each: name, grid, solver and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import SchedulerConfigError, StepsError, UnknownSchedulerError, shown
from .ddpm import ddim, ddpm
from .dpm_solver import dpmpp_2m
from .euler import euler, euler_ancestral
from .grids import Grid, euler_grid, fractional_grid, one_more_grid, plms_grid, strided_grid, successive_grid
from .plms import plms
from .schedule import FORWARD_OPTIONS, Schedule
from .scheduler_classes import CLASSES
from .table import StepTable

Options = Mapping[str, tuple[Any, ...]]
ANY: tuple[Any, ...] = ()
"""Every value that schedule.OPTIONS allows."""


def _no_arguments(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Sampler:
    """A row of the catalog.

    name: what `scheduler=` takes; label: A1111's name, for pictures' metadata; scheduler_class: the class of diffusers
    that it equals; grid: the rule of its grid; solver: makes the table of a Grid; options: what it honours beside the
    schedule's own options, with the values that it does ("eta" is an argument of the call); preset: the options that
    make the class this sampler, whatever scheduler_config.json says of them; arguments: the solver's keyword arguments,
    from the options and the number of steps.
    """

    name: str
    label: str
    scheduler_class: str
    grid: Callable[[Schedule, int], Grid]
    solver: Callable[..., StepTable]
    options: Options
    preset: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[Mapping[str, Any], int], dict[str, Any]] = _no_arguments

    def configured(self, schedule: Schedule) -> Schedule:
        """The schedule with a value for every option of this sampler's class: the preset's, else the given one, else
        diffusers' default. SchedulerConfigError for an option that nothing here knows, or that this sampler would have
        to honour and does not."""
        for option, value in schedule.config.items():
            self._check(option, value, schedule.learned_variance)
        own = CLASSES[self.scheduler_class]
        config = {**own, **schedule.config, **self.preset}
        if config.get("clip_sample") and "clip_sample" in own and "clip_sample_range" not in self.options:
            raise SchedulerConfigError(
                f"scheduler option clip_sample=True is not supported by {self.name}; set it to false in "
                "scheduler_config.json, or take ddim or ddpm"
            )
        return replace(schedule, config=config)

    def _check(self, option: str, value: Any, learned_variance: bool) -> None:
        """Names that begin with "_" are diffusers' bookkeeping. Options of other classes don't count, as in diffusers'
        `from_config`."""
        if option.startswith("_") or option in FORWARD_OPTIONS:
            return
        own = CLASSES[self.scheduler_class]
        if option not in own:
            if not any(option in options for options in CLASSES.values()):
                raise SchedulerConfigError(
                    f"scheduler option {shown(option)} is not known to {self.name} or to any other sampler; remove it "
                    f"from scheduler_config.json, or correct its name; {self.name} knows: {', '.join(self._known())}"
                )
            return
        default = own[option]
        allowed = self.options.get(option, (default, None) if default is False else (default,))
        if not learned_variance:
            allowed = tuple(one for one in allowed if one not in LEARNED_VARIANCES)
        if allowed != ANY and value not in allowed:
            raise SchedulerConfigError(
                f"scheduler option {option}={shown(value)} is not supported by {self.name}; supported: "
                f"{', '.join(repr(value) for value in allowed)} (scheduler_config.json), or another scheduler"
            )

    def _known(self) -> list[str]:
        return sorted((FORWARD_OPTIONS | set(self.options)) & set(CLASSES[self.scheduler_class]))


def _clip_arguments(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {"clip_range": config["clip_sample_range"] if config["clip_sample"] else None}


def _ddpm_arguments(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {"variance_type": config["variance_type"], **_clip_arguments(config, steps)}


def _dpm_arguments(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """diffusers counts all steps of the grid, also where a loop starts late."""
    return {
        "order": config["solver_order"],
        "heun": config["solver_type"] == "heun",
        "final_first_order": bool(config["euler_at_final"] or (config["lower_order_final"] and steps < 15)),
    }


_SPACING: Options = {"timestep_spacing": ANY, "steps_offset": ANY}
_SIGMAS: Options = {"use_karras_sigmas": ANY, "final_sigmas_type": ("zero", "sigma_min")}
_CLIPPING: Options = {"clip_sample_range": ANY}
_FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
LEARNED_VARIANCES = ("learned", "learned_range")
"""For models that have outputs for it."""
_DPM: Options = {
    **_SPACING,
    **_SIGMAS,
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (1, 2),
    "solver_type": ("midpoint", "heun"),
    "lower_order_final": ANY,
    "euler_at_final": ANY,
    "lambda_min_clipped": ANY,
    "variance_type": (None, *_FIXED_VARIANCES, *LEARNED_VARIANCES),  # it changes nothing
}

_ROWS = (
    Sampler(
        "ddim",
        "DDIM",
        "DDIMScheduler",
        strided_grid,
        ddim,
        {**_SPACING, **_CLIPPING, "set_alpha_to_one": ANY, "eta": ANY},
        arguments=_clip_arguments,
    ),
    Sampler(
        "ddpm",
        "DDPM",
        "DDPMScheduler",
        successive_grid,
        ddpm,
        {**_SPACING, **_CLIPPING, "variance_type": (*_FIXED_VARIANCES, *LEARNED_VARIANCES)},
        arguments=_ddpm_arguments,
    ),
    Sampler(
        "euler",
        "Euler",
        "EulerDiscreteScheduler",
        euler_grid,
        euler,
        {
            **_SPACING,
            **_SIGMAS,
            "sigma_min": ANY,
            "sigma_max": ANY,
            "interpolation_type": ("linear",),
            "timestep_type": ("discrete",),
        },
    ),
    Sampler("euler_a", "Euler a", "EulerAncestralDiscreteScheduler", fractional_grid, euler_ancestral, _SPACING),
    Sampler(
        "dpmpp_2m",
        "DPM++ 2M",
        "DPMSolverMultistepScheduler",
        one_more_grid,
        dpmpp_2m,
        _DPM,
        arguments=_dpm_arguments,
    ),
    Sampler(
        "dpmpp_2m_karras",
        "DPM++ 2M Karras",
        "DPMSolverMultistepScheduler",
        one_more_grid,
        dpmpp_2m,
        _DPM,
        preset={"use_karras_sigmas": True},
        arguments=_dpm_arguments,
    ),
    # Every Stable Diffusion model ships skip_prk_steps=true; a file that lacks it means the same.
    Sampler(
        "pndm",
        "PLMS",
        "PNDMScheduler",
        plms_grid,
        plms,
        {**_SPACING, "set_alpha_to_one": ANY, "skip_prk_steps": (True,)},
        preset={"skip_prk_steps": True},
    ),
)

SAMPLERS: Mapping[str, Sampler] = {row.name: row for row in _ROWS}
"""The catalog, by name."""

_BY_CLASS = {row.scheduler_class: row.name for row in reversed(_ROWS)}
"""What a class of diffusers means: the first row of it, which reads the rest from the options."""


def sampler_name(name: str | None, schedule: Schedule) -> str:
    """The name in SAMPLERS that is meant by a name, a diffusers class name, or None (what the model was shipped
    with)."""
    asked = schedule.config.get("_class_name") if name is None else name
    known = _BY_CLASS.get(asked, asked) if isinstance(asked, str) else None
    if known is None or known not in SAMPLERS:
        whose = "the model's own scheduler" if name is None else "scheduler"
        raise UnknownSchedulerError(f"{whose} {shown(asked)} is not known; known: {', '.join(SAMPLERS)}")
    return known


def step_table(name: str, schedule: Schedule, steps: int, eta: float = 0.0, start: int = 0) -> StepTable:
    """The table of a sampler in SAMPLERS, or the part from step `start` on, in which multistep solvers warm up there.
    `eta` counts where the row says so, as in diffusers for DDIM only. StepsError where there are no such steps,
    SchedulerConfigError where the options don't go with the sampler."""
    sampler, most = SAMPLERS[name], schedule.train_timesteps
    schedule = sampler.configured(schedule)
    if not 1 <= steps <= most:
        raise StepsError(f"{name} has no {steps} steps on a schedule of {most} timesteps; take fewer, from 1 to {most}")
    arguments = sampler.arguments(schedule.config, steps)
    if "eta" in sampler.options:
        arguments["eta"] = eta
    return sampler.solver(sampler.grid(schedule, steps).starting_at(start), **arguments)
