"""Step tables that keep the predicted clean latent of every evaluation, for previews.

The solver leaves slots of the state that nothing reads again. The row of an update that fills such a slot may as well
fill it with x0, which changes no other number and costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..contract import SLOTS
from .table import StepTable, as_x0


@dataclass(frozen=True, eq=False)
class Watched:
    """A table, and for each evaluation the slot in which x0 lies after it; None where the solver needs them all, or
    there is no x0."""

    table: StepTable
    slots: tuple[int | None, ...]


def watched(table: StepTable, prediction_type: str) -> Watched:
    """The table with x0 of the guided output, as a model of that prediction type says it."""
    updates, clipped = table.updates.copy(), table.clipped.copy()
    slots = [_free(read) for read in _read_later(table)]
    for index, slot in enumerate(slots):
        alpha, sigma = float(table.alphas[index]), float(table.sigmas[index])
        if alpha == 0 and prediction_type == "epsilon":  # noise alone says nothing of what is under it
            slots[index] = slot = None
        if slot is None:
            continue
        x0 = as_x0(prediction_type, sigma / alpha if alpha else math.inf)
        updates[index, slot], clipped[index, slot] = x0[:-1], x0[-1]
    updates.flags.writeable = clipped.flags.writeable = False
    return Watched(replace(table, updates=updates, clipped=clipped), tuple(slots))


def _read_later(table: StepTable) -> list[frozenset[int]]:
    """The slots that count after each evaluation: the latent, and what later ones read to make it."""
    counting, found = frozenset([0]), []
    for update in reversed(table.updates):
        found.append(counting)
        rows = update[sorted(counting), :SLOTS]
        counting = frozenset(np.flatnonzero(rows.any(axis=0)).tolist()) | {0}
    return found[::-1]


def _free(read: frozenset[int]) -> int | None:
    return next((slot for slot in range(SLOTS - 1, 0, -1) if slot not in read), None)
