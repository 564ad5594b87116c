"""What a call asks of a row, in diffusers' meaning and in A1111's: the grid, and the solver's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import TimestepsError
from .class_grids import FLAGS, continuous
from .grids import Grid, falling, level_grid
from .levels import RULES, timestep_to_sigma
from .sampler import Sampler
from .schedule import SPACINGS, WEBUI_ZERO_SNR, Schedule

Plan = tuple[Grid, dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """steps; what a call says about the grid, of which at most one is not None: a schedule type, timesteps, or noise
    levels [N+1] with the one where the last step goes; options: those of a call."""

    steps: int
    schedule_type: str | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many steps there are."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return self.steps if self.sigmas is None else len(self.sigmas) - 1


def diffusers_plan(row: Sampler, schedule: Schedule, asked: Asked) -> Plan:
    """diffusers' class with the model's options and those of the call. A schedule type that the class has no option
    for is A1111's, and a call's own noise levels are those of EulerDiscreteScheduler.set_timesteps(sigmas=...)."""
    assert row.grid is not None
    configured = row.configured(schedule, _chosen_options(row, asked))
    kind = asked.schedule_type
    if asked.sigmas is None and (kind is None or kind in row.own_types):
        grid = row.grid(configured, asked.count, asked.timesteps)
    else:
        levels = configured.sigmas()
        unit = 1.0 if configured.config.get("timestep_spacing") == "leading" else None
        grid = continuous(configured, level_grid(_sigmas(levels, asked), levels, schedule.prediction_type, unit))
    return grid, row.arguments(configured.config, len(grid))


def _chosen_options(row: Sampler, asked: Asked) -> dict[str, Any]:
    """The options of scheduler_config.json that a call changes."""
    chosen = {option: value for option, value in asked.options.items() if option in row.config_parameters}
    kind = asked.schedule_type
    if kind is None or row.fixed_type is not None:
        return chosen
    chosen |= {option: False for option in FLAGS.values() if option in row.options}
    if kind in SPACINGS:
        chosen["timestep_spacing"] = kind
    elif kind in row.own_types:
        chosen[FLAGS[kind]] = True
    return chosen


def webui_plan(row: Sampler, schedule: Schedule, asked: Asked, default_type: str | None) -> Plan:
    """A1111's sampler: k-diffusion's function on A1111's noise levels, whatever scheduler_config.json says of them.
    default_type: the schedule type where the call says nothing."""
    meant = row.webui
    assert meant is not None
    row.refuse_unknown(schedule.config)
    levels = schedule.sigmas(WEBUI_ZERO_SNR)
    arguments = dict(meant.arguments) if meant.counts is None else {**meant.arguments, meant.counts: asked.steps}
    if meant.grid is not None:
        return meant.grid(levels, asked.steps, schedule.prediction_type), arguments
    if asked.schedule_type is None and asked.timesteps is None and asked.sigmas is None:
        asked = replace(asked, schedule_type=default_type)
    return level_grid(_sigmas(levels, asked, meant.drops), levels, schedule.prediction_type), arguments


def _sigmas(levels: np.ndarray, asked: Asked, drops: bool = False) -> np.ndarray:
    """The noise levels [N+1] that a call asks for. With `drops` those of a rule are made for one step more, and the
    last but one is left out."""
    if asked.sigmas is not None:
        return _falling_sigmas(asked.sigmas)
    if asked.timesteps is not None:
        timesteps = falling(asked.timesteps, len(levels) - 1, whole=False)
        return np.append(timestep_to_sigma(timesteps, levels), 0.0)
    assert asked.schedule_type is not None
    bent = {"rho": asked.options["rho"]} if "rho" in asked.options else {}
    sigmas = RULES[asked.schedule_type].sigmas(levels, asked.steps + drops, **bent)
    return np.delete(sigmas, -2) if drops else sigmas


def _falling_sigmas(given: tuple[float, ...]) -> np.ndarray:
    sigmas = np.array(given, np.float64)
    rises = np.diff(sigmas) >= 0
    if rises.any() or sigmas[-1] < 0:
        i = int(np.argmax(rises)) if rises.any() else len(sigmas) - 2
        raise TimestepsError(
            f"sigmas must fall, to 0 at the lowest: number {i + 1} is {sigmas[i]:g} and the next is {sigmas[i + 1]:g}; "
            f"pass those of all steps and where the last one goes, from high to low"
        )
    return sigmas
