"""The catalog: which sampler a name means, and its step table."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import (
    SamplerOptionError,
    SchedulerConfigError,
    ScheduleTypeError,
    StepsError,
    TimestepsError,
    UnknownSchedulerError,
    shown,
)
from .class_grids import FLAGS
from .levels import RULES
from .meaning import Asked, diffusers_plan, webui_plan
from .rows import ROWS
from .sampler import ANY, Parameter, Sampler, number
from .schedule import OPTIONS, SPACINGS, Schedule
from .scheduler_classes import CLASSES
from .table import StepTable

SAMPLERS: Mapping[str, Sampler] = {row.name: row for row in ROWS}
"""The catalog, by name."""

_CLASSES = tuple(dict.fromkeys(row.scheduler_class for row in ROWS if row.scheduler_class is not None))

_BY_LABEL = {row.label.casefold(): row for row in reversed(ROWS)}

_TYPE_LABELS: Mapping[str, str | None] = {**{rule.label: name for name, rule in RULES.items()}, "Automatic": None}

SCHEDULE_TYPES = tuple(dict.fromkeys((*SPACINGS, *RULES, *FLAGS)))
"""The schedule types that some sampler has, by our names."""

_SPELLINGS: Mapping[str, str | None] = {
    **{name: name for name in SCHEDULE_TYPES},
    **{label.casefold().replace(" ", "_"): name for label, name in _TYPE_LABELS.items()},
}


@dataclass(frozen=True)
class Found:
    """A row, whether it is meant as in A1111, and the schedule type that its name says."""

    sampler: Sampler
    webui: bool = False
    schedule_type: str | None = None

    @property
    def said_type(self) -> str | None:
        """The schedule type that comes with the name, so that a call cannot choose another."""
        return self.schedule_type if self.webui else self.sampler.fixed_type

    @property
    def default_type(self) -> str | None:
        """The schedule type where a call says none; None where scheduler_config.json says it."""
        if self.webui and self.schedule_type is None and self.sampler.webui is not None:
            return self.sampler.webui.schedule_type
        return self.said_type


def find(name: str) -> Found | None:
    """What one of our short names means, which is diffusers' sampler where it has one; or one of A1111's labels, in any
    case and perhaps followed by a schedule type ("DPM++ 2M Karras"), which is A1111's. None for others."""
    if name in SAMPLERS:
        return found_row(SAMPLERS[name])
    label = " ".join(name.split()).casefold()
    if label in _BY_LABEL and _BY_LABEL[label].fixed_type is None:
        row = _BY_LABEL[label]
        return Found(row, webui=row.webui is not None)
    for suffix, kind in _TYPE_LABELS.items():
        stem = label.removesuffix(f" {suffix.casefold()}")
        if stem != label and stem in _BY_LABEL and takes_types(_BY_LABEL[stem]):
            return Found(_BY_LABEL[stem], webui=True, schedule_type=kind)
    return None


def found_row(row: Sampler) -> Found:
    """What a row's short name means."""
    return Found(row, webui=row.scheduler_class is None)


def row_of_class(scheduler_class: str, config: Mapping[str, Any]) -> Sampler:
    """What a class of diffusers means with a model's options and its defaults: the row with the largest preset that
    agrees with them. SchedulerConfigError where the options ask for something that no row is."""
    rows = [row for row in ROWS if row.scheduler_class == scheduler_class and row.fixed_type is None]
    defaults = CLASSES[scheduler_class]
    meant = {**defaults, **config}
    if meant.get("algorithm_type") == "deis":  # so that DEIS's file can be switched to DPM-Solver
        meant["algorithm_type"] = defaults["algorithm_type"]
    wrong = {row.name: [option for option, value in row.preset.items() if meant[option] != value] for row in rows}
    nearest = min(rows, key=lambda row: (len(wrong[row.name]), -len(row.preset)))
    if wrong[nearest.name]:
        given = ", ".join(f"{option}={shown(meant[option])}" for option in nearest.preset)
        needed = " and ".join(f"{option}={shown(nearest.preset[option])}" for option in wrong[nearest.name])
        raise SchedulerConfigError(
            f"{scheduler_class} with {given} is not supported; the nearest that is has {needed} "
            f"(scheduler_config.json, or scheduler={nearest.name!r})"
        )
    return nearest


def takes_types(row: Sampler) -> bool:
    """Whether A1111's sampler of this label can use any schedule type."""
    return row.webui is not None and row.webui.grid is None


def sampler_name(name: str | None, schedule: Schedule) -> str:
    """The name for `find` of the sampler that is meant by such a name, by a class of diffusers with the model's
    options, or by None, which is what the model was shipped with. UnknownSchedulerError names the nearest ones."""
    asked = schedule.config.get("_class_name") if name is None else name
    if isinstance(asked, str) and asked in _CLASSES:
        return row_of_class(asked, schedule.config).name
    found = find(asked) if isinstance(asked, str) else None
    if found is not None:
        return canonical_name(found)
    whose = "the model's own scheduler" if name is None else "scheduler"
    near = _nearest(asked, _all_names(), SAMPLERS)
    raise UnknownSchedulerError(f"{whose} {shown(asked)} is not known; {near}; `python -m engine samplers` lists all")


def canonical_name(found: Found) -> str:
    if not found.webui:
        return found.sampler.name
    kind = found.schedule_type
    return found.sampler.label if kind is None else f"{found.sampler.label} {RULES[kind].label}"


def label_of(name: str) -> str:
    """A1111's label of a sampler by its canonical name, for pictures' metadata."""
    return SAMPLERS[name].label if name in SAMPLERS else name


def schedule_label(schedule_type: str) -> str:
    """A1111's label of a schedule type."""
    return RULES[schedule_type].label if schedule_type in RULES else schedule_type.capitalize()


def _all_names() -> list[str]:
    karras = [f"{row.label} Karras" for row in ROWS if takes_types(row)]
    return [*SAMPLERS, *_CLASSES, *dict.fromkeys(row.label for row in ROWS), *karras]


def _nearest(asked: Any, names: Iterable[str], known: Iterable[str]) -> str:
    """The names that are spelled most like it, or where there are none the known ones."""
    spelled = {name.casefold(): name for name in reversed(list(names))}
    text = asked.casefold() if isinstance(asked, str) else ""
    near = difflib.get_close_matches(text[:100], spelled, n=3, cutoff=0.5)
    return f"the nearest: {', '.join(spelled[name] for name in near)}" if near else f"known: {', '.join(known)}"


def schedule_type_name(asked: Any) -> str | None:
    """A schedule type by our name or A1111's, in any case; None for "Automatic". ScheduleTypeError for others."""
    spelled = "_".join(asked.casefold().replace("-", " ").split()) if isinstance(asked, str) else ""
    if spelled not in _SPELLINGS:
        near = _nearest(asked, SCHEDULE_TYPES, SCHEDULE_TYPES)
        raise ScheduleTypeError(f"schedule_type {shown(asked)} is not known; {near}")
    return _SPELLINGS[spelled]


def schedule_types(found: Found) -> tuple[str, ...]:
    """The schedule types that a sampler can use."""
    row = found.sampler
    if found.said_type is not None:
        return (found.said_type,)
    if found.webui:
        return tuple(RULES) if takes_types(row) else ()
    return tuple(dict.fromkeys((*row.own_types, *(RULES if row.levels else ()))))


def sampler_parameters(found: Found, schedule_type: str | None) -> dict[str, Parameter]:
    """The options that a call may choose: those of the solver, those of the schedule type, and in diffusers' meaning
    those of scheduler_config.json."""
    row, kind = found.sampler, schedule_type or found.default_type
    known = dict(row.parameters)
    if not found.webui:
        known |= {option: _config_parameter(option, row.options[option]) for option in row.config_parameters}
    ours = takes_types(row) if found.webui else kind not in row.own_types
    if kind is not None and kind in RULES and ours and RULES[kind].bends:
        known["rho"] = number(0.01, 100)
    return known


def _config_parameter(option: str, allowed: tuple[Any, ...]) -> Parameter:
    if allowed == ANY:
        return Parameter(*OPTIONS[option])
    return Parameter(f"one of {', '.join(map(repr, allowed))}", lambda value: value in allowed)


def step_table(
    name: str,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    start: int = 0,
    schedule_type: str | None = None,
    timesteps: tuple[float, ...] | None = None,
    sigmas: tuple[float, ...] | None = None,
    options: tuple[tuple[str, Any], ...] = (),
) -> StepTable:
    """The table of a sampler by its name, or the part from step `start` on, in which multistep solvers warm up there.

    `eta` counts where the row says so, as in diffusers. schedule_type: one of `schedule_types`, None for the sampler's
    own; timesteps, or noise levels (`sigmas`, with the one where the last step goes): a call's own, from high to low,
    whose number counts instead of `steps`; options: of `sampler_parameters`. Raises StepsError where there are no such
    steps, ScheduleTypeError, TimestepsError and SamplerOptionError where the sampler cannot do what the call asks for,
    SchedulerConfigError where the model's options don't go with it.
    """
    found = _found(name)
    row, given = found.sampler, dict(options)
    asked = Asked(steps, schedule_type, timesteps, sigmas, given)
    _check_grid(name, found, asked, schedule.train_timesteps)
    checked_options(name, asked.schedule_type, given)
    if found.webui:
        grid, arguments = webui_plan(row, schedule, asked, found.default_type)
    else:
        grid, arguments = diffusers_plan(row, schedule, asked)
    if row.eta is not None:
        arguments[row.eta] = eta
    arguments |= {option: value for option, value in given.items() if option in row.parameters}
    return row.solver(grid.starting_at(start), **arguments)


def _check_grid(name: str, found: Found, asked: Asked, most: int) -> None:
    """StepsError, ScheduleTypeError or TimestepsError where the sampler has no such grid."""
    kind, known = asked.schedule_type, schedule_types(found)
    said = [what for what in ("schedule_type", "timesteps", "sigmas") if getattr(asked, what) is not None]
    if len(said) > 1:
        raise TimestepsError(f"{' and '.join(said)} all say which grid is taken ({name}); pass one of them")
    if not 1 <= asked.count <= most:
        raise StepsError(
            f"{name} has no {asked.count} steps on a schedule of {most} timesteps; take fewer, from 1 to {most}"
        )
    if kind is not None and kind not in known:
        listed = ", ".join(known) or "none, its grid is its own"
        raise ScheduleTypeError(f"{name} cannot use schedule_type {kind!r}; it can use: {listed}")
    free = found.said_type is None and (takes_types(found.sampler) or not found.webui)
    takes_own = {"timesteps": free and found.sampler.own_timesteps, "sigmas": free and found.sampler.levels}
    for what, takes in takes_own.items():
        if what in said and not takes:
            raise TimestepsError(
                f"{name} cannot use {what} of a call: {_why_not(found)}; leave {what} out, or take another sampler, "
                f"for example euler"
            )


def _why_not(found: Found) -> str:
    """Why a sampler has no other grid."""
    if found.said_type is None:
        return "its steps depend on a grid of its own"
    return f"its name says the grid, {found.said_type}"


def checked_options(name: str, schedule_type: str | None, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The options of a call, of which lists are tuples now. SamplerOptionError for one that the sampler of this
    canonical name doesn't have on that schedule type, or whose value is wrong."""
    found = _found(name)
    known = sampler_parameters(found, schedule_type)
    for option, value in given.items():
        if option not in known:
            raise SamplerOptionError(
                f"{name} has no option {shown(option)}; it has: {', '.join(known) or 'none'} (sampler_options)"
            )
        if not known[option].right(value):
            raise SamplerOptionError(f"option {option} of {name} is {shown(value)}; it must be {known[option].rule}")
    return tuple((option, tuple(value) if isinstance(value, list) else value) for option, value in given.items())


def _found(name: str) -> Found:
    found = find(name)
    if found is None:
        raise UnknownSchedulerError(f"scheduler {shown(name)} is not known; {_nearest(name, _all_names(), SAMPLERS)}")
    return found
