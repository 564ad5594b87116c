"""What `python -m engine samplers` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from .catalog import (
    SAMPLERS,
    canonical_name,
    find,
    found_row,
    sampler_name,
    sampler_parameters,
    schedule_types,
    step_table,
    takes_types,
)
from .levels import RULES
from .sampler import Sampler
from .schedule import Schedule
from .table import StepTable

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",  # which every sampler can do
}
STEPS = 48
"""Enough for what is more at the start or the end not to count, and divisible by 2 and 3, for samplers with groups."""


@cache
def _table(name: str) -> StepTable:
    return step_table(name, Schedule.from_config(STABLE_DIFFUSION), STEPS)


def evaluations(name: str) -> int:
    """How often a sampler evaluates the U-Net in each step, the first and the last perhaps less often."""
    return round(len(_table(name)) / STEPS)


def adds_noise(name: str) -> str:
    """ "yes" for a sampler that adds noise by default, so that more steps make another picture, else "no"."""
    return "yes" if _table(name).updates[:, :, -1].any() else "no"


def facts(name: str) -> tuple[str, str, str, str, str, str]:
    """Name, A1111's label, class of diffusers, evaluations a step, noise and schedule types of a sampler."""
    row = SAMPLERS[name]
    label = row.label if row.webui is not None else "-"
    scheduler_class = row.scheduler_class or "-"
    return name, label, scheduler_class, str(evaluations(name)), adds_noise(name), _in_short(row)


def overview() -> Iterator[str]:
    """All samplers, a line each."""
    header = ("name", "A1111's label", "class of diffusers", "evaluations", "noise", "schedule types")
    for cells in (header, *map(facts, SAMPLERS)):
        yield "{:<18} {:<18} {:<31} {:>11}  {:<5}  {}".format(*cells)
    yield ""
    yield "evaluations: of the U-Net in each step; noise: whether steps add some, so that more make another picture"
    yield f"all: {', '.join(RULES)}"
    yield "A1111's labels mean A1111's samplers, also with a schedule type after them: 'DPM++ 2M Karras'."
    yield "`python -m engine samplers NAME` says which options a sampler takes."


def _in_short(row: Sampler) -> str:
    types = schedule_types(found_row(row))
    own = [kind for kind in types if kind not in RULES]
    return ", ".join(["all", *own] if set(RULES) <= set(types) else types) or "its own"


def describe(names: Sequence[str]) -> Iterator[str]:
    """What samplers take, by any of their names. UnknownSchedulerError for one that there isn't."""
    for asked in names:
        found = find(sampler_name(asked, Schedule.from_config({})))
        assert found is not None
        name, row = canonical_name(found), found.sampler
        meaning = f"A1111's {name}" if found.webui else f"diffusers' {row.scheduler_class}"
        yield f"{name}: {meaning}"
        yield f"  evaluations a step: {evaluations(name)}; noise: {adds_noise(name)}"
        yield f"  schedule types: {', '.join(schedule_types(found)) or 'its own'}"
        if found.webui and takes_types(row):
            yield f"  without one: {found.default_type}"
        for option, parameter in sampler_parameters(found, None).items():
            yield f"  {option}: {parameter.rule}"
