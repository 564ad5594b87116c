"""Heun's method in k-diffusion's scale y = x / alpha: two evaluations a step, one in a step to no noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .grids import Grid
from .levels import karras_sigmas
from .table import NOISE, PAST, StepTable, TableBuilder, X, as_epsilon, as_x0, keep, refuse_infinite_noise, single, vp
from .ve import Step, churned, timestep_of

_SLOPE = PAST[0]


def heun(
    grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> StepTable:
    """Heun, algorithm 2 of arXiv 2206.00364. Equals HeunDiscreteScheduler, which has no churn, and k-diffusion's
    sample_heun."""
    refuse_infinite_noise(grid.sigmas[0], "Heun's method")
    steps, initial_scale = churned(grid, s_churn, s_tmin, s_tmax, s_noise)
    return _heun(steps, grid.prediction_type, initial_scale)


def _heun(steps: Iterable[Step], prediction_type: str, initial_scale: float) -> StepTable:
    builder = TableBuilder()
    for step in steps:
        x0, slope = as_x0(prediction_type, step.s), as_epsilon(prediction_type, step.s)
        y_next = x0 + step.s_next * slope  # line 8
        if step.s_next == 0:
            update = single(step.alpha * (y_next + step.up * NOISE))
            builder.add(step.t, step.s, update, draw=step.up > 0, scale=1 / step.alpha)
            continue
        alpha = vp(step.s_next)[0]
        builder.add(step.t, step.s, keep(alpha * y_next, slope), scale=1 / alpha)
        # Line 11: y + (s' - s) (slope + slope') / 2, from y + (s' - s) slope.
        correction = (step.s_next - step.s) / 2 * (as_epsilon(prediction_type, step.s_next) - _SLOPE)
        update = single(step.alpha * (X / alpha + correction + step.up * NOISE))
        builder.add(step.t_next, step.s_next, update, draw=step.up > 0, scale=1 / step.alpha)
    return builder.table(initial_scale)


@dataclass(frozen=True)
class Restarts:
    """Goes back `times` times from the grid's level nearest to s_min to the one nearest to s_max, and down again over
    `levels` of Karras's levels, both ends included."""

    s_min: float
    s_max: float
    levels: int
    times: int


def restart(grid: Grid, restarts: Sequence[Restarts] | None = None, s_noise: float = 1.0) -> StepTable:
    """Restart, arXiv 2306.14878, with Heun's steps. Without `restarts` they and the levels are those of
    A1111's sampler "Restart": see `automatic_restarts`."""
    refuse_infinite_noise(grid.sigmas[0], "Restart")
    levels = [*grid.sigmas.tolist(), float(grid.targets[-1])]
    if restarts is None:
        levels, restarts = automatic_restarts(levels)
    segments = list(_segments(levels, restarts))
    steps = []
    for i, (s, s_next) in enumerate(segments):
        last = i == len(segments) - 1
        s_after = s_next if last else segments[i + 1][0]
        up = s_noise * math.sqrt(s_after**2 - s_next**2)
        alpha = 1.0 if last else vp(s_after)[0]
        steps.append(Step(timestep_of(grid, s), s, timestep_of(grid, s_next), s_next, up, alpha))
    return _heun(steps, grid.prediction_type, grid.initial_scale)


def automatic_restarts(levels: Sequence[float]) -> tuple[list[float], list[Restarts]]:
    """A1111's rule, which keeps the number of steps: from 20 steps on one restart of 9 steps, from 36 on two of a
    quarter of them, between 0.1 and 2; the other steps have Karras's levels over the grid's range. Fewer steps stay as
    they are."""
    steps = len(levels) - 1
    if steps < 20:
        return list(levels), []
    count, times = (steps // 4, 2) if steps >= 36 else (9, 1)
    fewer = karras_sigmas(levels[-2], levels[0], steps - count * times)
    return [*fewer.tolist(), levels[-1]], [Restarts(0.1, 2.0, count + 1, times)]


def _segments(levels: Sequence[float], restarts: Sequence[Restarts]) -> Iterable[tuple[float, float]]:
    """Start and end of every step. A start above the end before it is a restart."""
    plans = {_nearest(levels, plan.s_min): plan for plan in restarts}
    for i in range(len(levels) - 1):
        yield levels[i], levels[i + 1]
        plan = plans.get(i + 1)
        if plan is None:
            continue
        top = _nearest(levels, plan.s_max)
        if top < i + 1:
            inner = karras_sigmas(levels[i + 1], levels[top], plan.levels)[1:-1]
            again = [levels[top], *inner.tolist(), levels[i + 1]]
            yield from plan.times * list(itertools.pairwise(again))


def _nearest(levels: Sequence[float], s: float) -> int:
    return int(np.argmin(np.abs(np.array(levels) - s)))
