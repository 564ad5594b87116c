"""Step tables: alpha and sigma of every evaluation, and tables that no loop may run."""

import math

import numpy as np
import pytest

from engine.contract import SLOTS
from engine.sampling.catalog import SAMPLERS, step_table
from engine.sampling.schedule import Schedule
from engine.sampling.table import (
    CLIPPED,
    COLUMNS,
    NOISE,
    OUTPUT,
    PAST,
    SolverError,
    TableBuilder,
    X,
    keep,
    multistep,
    single,
    vp,
)

from .test_samplers import SD1


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ipndm_sine"])
def test_a_table_knows_the_noise_of_its_evaluations(name, start):
    schedule = Schedule.from_config(SD1)
    table = step_table(name, schedule, 10, start=start)
    np.testing.assert_allclose(table.alphas**2 + table.sigmas**2, 1, rtol=1e-14)
    expected = np.interp(table.timesteps, np.arange(1000), np.sqrt(schedule.alphas_cumprod))
    # DPM-Solver rounds the timesteps of Karras's noise levels, others' levels are linear in s or log s between
    # timesteps, and PNDM evaluates at one timestep with the level of another.
    rounded = {"dpmpp_2m_karras": 5e-3, "pndm_prk": 1.0}
    np.testing.assert_allclose(table.alphas, expected, rtol=rounded.get(name, 1e-5))


@pytest.mark.parametrize(("name", "evaluations"), [("ddim", 10), ("pndm", 11)])
def test_a_table_has_a_row_for_each_evaluation(name, evaluations):
    table = step_table(name, Schedule.from_config(SD1), 10)
    shapes = {array.shape for array in (table.timesteps, table.draws, table.scales, table.alphas, table.sigmas)}
    assert shapes == {(evaluations,)}
    assert table.updates.shape == (evaluations, SLOTS, SLOTS + 2)


def test_a_late_start_draws_noise_for_what_is_left():
    whole, late = (step_table("euler_a", Schedule.from_config(SD1), 10, start=start) for start in (0, 4))
    np.testing.assert_array_equal(late.draws, whole.draws[4:])
    np.testing.assert_array_equal(late.updates, whole.updates[4:])


def test_an_update_computes_what_its_equation_says():
    """`x` is slot 0, `PAST` the others; multistep pushes the newest value, and keep says what each slot remembers."""
    state = np.array([2.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 17.0])
    assert (single(0.5 * X + 2 * OUTPUT + NOISE - CLIPPED) @ state).tolist() == [1 + 22 + 13 - 17, 0, 0, 0, 0]
    assert (multistep(X - PAST[2], OUTPUT) @ state).tolist() == [2 - 7, 11, 3, 5, 7]
    assert (keep(NOISE, PAST[1], X) @ state)[:4].tolist() == [13, 5, 2, 0]


def test_infinite_noise_is_noise_alone():
    assert vp(math.inf) == (0.0, 1.0)
    assert vp(0.0) == (1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])
def test_a_table_that_is_not_finite_is_the_solvers_bug(bad):
    builder = TableBuilder()
    builder.add(981.0, 14.0, single(X))
    builder.add(961.0, 12.0, np.full((SLOTS, COLUMNS), bad))
    with pytest.raises(SolverError, match=r"evaluation 1 \(timestep 961\) is not finite in float32; this is a bug"):
        builder.table(1.0)
