"""What a row of the catalog is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import SchedulerConfigError, shown
from .class_grids import FLAGS
from .grids import Grid
from .schedule import BETAS, FORWARD_OPTIONS, SPACINGS, Schedule
from .scheduler_classes import CLASSES
from .table import StepTable

Options = Mapping[str, tuple[Any, ...]]
ANY: tuple[Any, ...] = ()
"""Every value that schedule.OPTIONS allows."""

LEARNED_VARIANCES = ("learned", "learned_range")
"""For models that have outputs for it."""

_NOT_IN_A_CALL = frozenset({*FLAGS.values(), "timestep_spacing", "clip_sample_range"})
"""`schedule_type` says these in a call, and the range belongs to the model."""


@dataclass(frozen=True)
class Parameter:
    """An option of a call: what it must be, in words and as a test. It is a keyword argument of the solver."""

    rule: str
    right: Callable[[Any], bool]


def number(low: float, high: float = math.inf) -> Parameter:
    """A number from `low` to `high`."""
    rule = f"a number from {low:g} up" if math.isinf(high) else f"a number from {low:g} to {high:g}"

    def right(value: Any) -> bool:
        if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
            return False
        return bool(low <= value <= high)

    return Parameter(rule, right)


def whole(low: int, high: int) -> Parameter:
    """An integer from `low` to `high`."""

    def right(value: Any) -> bool:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            return False
        return bool(low <= value <= high)

    return Parameter(f"an integer from {low} to {high}", right)


FLAG = Parameter("true or false", lambda value: isinstance(value, bool))


WebuiGrid = Callable[[np.ndarray, int, str], Grid]


@dataclass(frozen=True)
class Webui:
    """What A1111's label means: a solver on A1111's noise levels.

    schedule_type: the one that "Automatic" chooses; grid: the sampler's own grid, which takes no schedule type;
    drops: whether the level before the last is left out (A1111's `discard_next_to_last_sigma`); arguments: the solver's
    keyword arguments; counts: the one that is the number of steps.
    """

    schedule_type: str = "uniform"
    grid: WebuiGrid | None = None
    drops: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    counts: str | None = None


def no_arguments(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Sampler:
    """A row of the catalog.

    name: what `scheduler=` takes; label: A1111's name, or one like it, for pictures' metadata; solver: makes the table
    of a Grid; parameters: its keyword arguments that a call may choose.

    scheduler_class: the class of diffusers that it equals, None where there is none, so that the name means A1111's
    sampler too; grid: the rule of its grid; options: what it honours beside the schedule's own options, with the values
    that it does; ignores: options of the class that change nothing; preset: the options that make the class this
    sampler, whatever scheduler_config.json says of them; arguments: the solver's keyword arguments, from the options
    and the number of steps; levels: whether the solver can use any falling noise levels; own_timesteps: whether the
    grid's rule takes a call's; eta: the solver's argument that a call's `eta` is, as in diffusers' pipelines.

    webui: what the label means in A1111, None where it has no such sampler.
    """

    name: str
    label: str
    solver: Callable[..., StepTable]
    scheduler_class: str | None = None
    grid: Callable[..., Grid] | None = None
    options: Options = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[Mapping[str, Any], int], dict[str, Any]] = no_arguments
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    levels: bool = True
    own_timesteps: bool = True
    eta: str | None = None
    webui: Webui | None = None

    @property
    def class_options(self) -> Mapping[str, Any]:
        """The options of diffusers' class with their defaults."""
        return CLASSES[self.scheduler_class] if self.scheduler_class is not None else {}

    def configured(self, schedule: Schedule, chosen: Mapping[str, Any] | None = None) -> Schedule:
        """The schedule with a value for every option of this sampler's class: the preset's, else the call's, else the
        model's, else diffusers' default. SchedulerConfigError for an option that nothing here knows, or that this
        sampler would have to honour and does not."""
        own = self.class_options
        self.refuse_unknown(schedule.config)
        for option, value in schedule.config.items():
            self._check(option, value, schedule.learned_variance)
        if schedule.zero_snr and "rescale_betas_zero_snr" not in own:
            raise SchedulerConfigError(
                f"{self.name} ({self.scheduler_class}) cannot do a zero terminal SNR (rescale_betas_zero_snr=true): it "
                f"divides by the signal of the last timestep, which has none; take another scheduler, for example ddim "
                f"or euler"
            )
        betas = {option: own[option] for option in BETAS if option in own and option not in schedule.config}
        if any(value != BETAS[option] for option, value in betas.items()):
            made = Schedule.from_config({**betas, **schedule.config, "clip_sample": False})
            schedule = replace(schedule, alphas_cumprod=made.alphas_cumprod)
        # sigma_min and sigma_max count for any class that makes levels from them, as in diffusers' from_config.
        kept = {*own, *FORWARD_OPTIONS, "sigma_min", "sigma_max"}
        given = {option: value for option, value in schedule.config.items() if option in kept}
        config = {**own, **given, **(chosen or {}), **self.preset}
        if config.get("clip_sample") and "clip_sample" in own and "clip_sample_range" not in self.options:
            raise SchedulerConfigError(
                f"scheduler option clip_sample=True is not supported by {self.name}; set it to false in "
                "scheduler_config.json, or take ddim or ddpm"
            )
        return replace(schedule, config=config)

    def refuse_unknown(self, config: Mapping[str, Any]) -> None:
        """SchedulerConfigError for an option that no class of diffusers has. Names that begin with "_" are diffusers'
        bookkeeping."""
        for option in config:
            known = option.startswith("_") or any(option in options for options in CLASSES.values())
            if not known and option not in FORWARD_OPTIONS:
                raise SchedulerConfigError(
                    f"scheduler option {shown(option)} is not known to {self.name} or to any other sampler; remove it "
                    f"from scheduler_config.json, or correct its name; {self.name} knows: {', '.join(self._known())}"
                )

    def _check(self, option: str, value: Any, learned_variance: bool) -> None:
        """Options of other classes don't count, as in diffusers' `from_config`."""
        own = self.class_options
        if option not in own or option in FORWARD_OPTIONS or option in self.preset or option in self.ignores:
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
        return sorted(FORWARD_OPTIONS & set(self.class_options or FORWARD_OPTIONS) | set(self.options))

    @property
    def own_types(self) -> tuple[str, ...]:
        """The schedule types that diffusers' class has options for, which are its meaning of them."""
        flags = tuple(kind for kind, option in FLAGS.items() if self.options.get(option) == ANY)
        return (SPACINGS if "timestep_spacing" in self.options else ()) + flags

    @property
    def fixed_type(self) -> str | None:
        """The schedule type that the preset says."""
        return next((kind for kind, option in FLAGS.items() if self.preset.get(option)), None)

    @property
    def config_parameters(self) -> tuple[str, ...]:
        """The options of scheduler_config.json that a call may choose too."""
        return tuple(option for option in self.options if option not in _NOT_IN_A_CALL and option not in self.preset)
