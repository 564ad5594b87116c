"""What `python -m engine samplers` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",  # which every sampler can do
}
STEPS = 48
"""Enough for what is more at the start or the end not to count, and divisible by 2 and 3, for samplers with groups."""


def evaluations(name: str) -> int:
    """How often a sampler evaluates the U-Net in each step, the first and the last perhaps less often."""
    table = step_table(name, Schedule.from_config(STABLE_DIFFUSION), STEPS)
    return round(len(table) / STEPS)


def draws_noise(name: str) -> bool:
    """Whether a sampler adds noise by default, so that more steps make another picture."""
    table = step_table(name, Schedule.from_config(STABLE_DIFFUSION), STEPS)
    return bool(table.updates[:, :, -1].any())


def overview() -> Iterator[str]:
    """All samplers, a line each."""
    yield f"{'name':<18} {'A1111':<20} {'diffusers':<34} {'evaluations':>11}  noise  schedule types"
    for name, row in SAMPLERS.items():
        label = row.label if row.webui is not None else "-"
        scheduler_class = row.scheduler_class or "-"
        drawn = "yes" if draws_noise(name) else "no"
        types = _in_short(row)
        yield f"{name:<18} {label:<20} {scheduler_class:<34} {evaluations(name):>11}  {drawn:<5}  {types}"
    yield ""
    yield "evaluations: of the U-Net in each step; noise: whether more steps make another picture, as without an option"
    yield f"all: {', '.join(RULES)}"
    yield "A1111's labels take these too, as in 'DPM++ 2M Karras' or with a schedule type beside them."
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
        yield f"  evaluations a step: {evaluations(name)}; noise: {'yes' if draws_noise(name) else 'no'}"
        yield f"  schedule types: {', '.join(schedule_types(found)) or 'its own'}"
        if found.webui and takes_types(row):
            yield f"  without one: {found.default_type}"
        for option, parameter in sampler_parameters(found, None).items():
            yield f"  {option}: {parameter.rule}"
