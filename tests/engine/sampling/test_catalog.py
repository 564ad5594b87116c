"""The catalog: names, options, and the errors that say what doesn't go together."""

import dataclasses
import inspect
import json
import re

import diffusers
import numpy as np
import pytest

from engine.errors import SchedulerConfigError, StepsError, UnknownSchedulerError
from engine.sampling.catalog import SAMPLERS, sampler_name, step_table
from engine.sampling.schedule import FORWARD_OPTIONS, OPTIONS, Schedule
from engine.sampling.scheduler_classes import CLASSES

from .test_samplers import SD1

DIFFUSERS = sorted({row.scheduler_class for row in SAMPLERS.values()})


def table_of(name, steps=10, start=0, **options):
    return step_table(name, Schedule.from_config({**SD1, **options}), steps, start=start)


def test_labels_are_unique():
    assert len({row.label for row in SAMPLERS.values()}) == len(SAMPLERS)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_options_of_a_class_and_their_defaults_are_diffusers(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert CLASSES[name] == {option: p.default for option, p in parameters.items() if option != "self"}


def test_no_class_is_listed_without_a_sampler():
    assert sorted(CLASSES) == DIFFUSERS


@pytest.mark.parametrize("row", SAMPLERS.values(), ids=list(SAMPLERS))
def test_a_row_honours_options_of_its_class_whose_type_is_checked(row):
    honoured = set(row.options) - {"eta"}
    assert honoured <= set(CLASSES[row.scheduler_class])
    assert honoured <= set(OPTIONS)
    assert not honoured & FORWARD_OPTIONS
    assert set(row.preset) <= honoured


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_option_that_nothing_knows_is_an_error_by_name(name):
    with pytest.raises(SchedulerConfigError, match=f"'no_such_option' is not known to {name} .*remove it .*correct"):
        table_of(name, no_such_option=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_eta_is_an_argument_and_not_an_option(name):
    with pytest.raises(SchedulerConfigError, match="'eta' is not known"):
        table_of(name, eta=1.0)


UNSUPPORTED = {
    "ddim": {"sample_max_value": 2.0},
    "euler": {"use_exponential_sigmas": True, "use_beta_sigmas": True, "interpolation_type": "log_linear"},
    "dpmpp_2m": {
        "use_lu_lambdas": True,
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "bh2",
        "final_sigmas_type": "denoise_to_zero",
        "variance_type": "learned_range",
    },
    "ddpm": {"variance_type": "learned_range"},
    "pndm": {"skip_prk_steps": False},
}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, option, value) for name, options in UNSUPPORTED.items() for option, value in options.items()]
    + [("euler", "timestep_type", "continuous"), ("dpmpp_2m_karras", "use_lu_lambdas", True)],
)
def test_an_option_of_its_class_that_a_sampler_does_not_do_is_named(name, option, value):
    message = f"scheduler option {option}={value!r} is not supported by {name}; supported: "
    with pytest.raises(SchedulerConfigError, match=re.escape(message)):
        table_of(name, **{option: value})


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_of_other_classes_do_not_count(name):
    """As in diffusers' `from_config`: a model's file is used with any scheduler."""
    row = SAMPLERS[name]
    others = {
        option: value
        for options in UNSUPPORTED.values()
        for option, value in options.items()
        if option not in CLASSES[row.scheduler_class]
    }
    np.testing.assert_array_equal(table_of(name, **others).updates, table_of(name).updates)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shipped", DIFFUSERS)
def test_what_diffusers_writes_for_any_class_can_be_switched_to_any_sampler(name, shipped):
    config = json.loads(getattr(diffusers, shipped).from_config(SD1).to_json_string())
    if name == "pndm":
        config["skip_prk_steps"] = True
    table = step_table(name, Schedule.from_config({**config, "clip_sample": False}), 10)
    assert np.isfinite(table.updates).all()


def test_null_is_false_for_an_option_that_a_sampler_does_not_do():
    np.testing.assert_array_equal(table_of("euler", use_beta_sigmas=None).updates, table_of("euler").updates)


def test_the_karras_sampler_takes_karras_levels_whatever_the_file_says():
    expected = table_of("dpmpp_2m", use_karras_sigmas=True).updates
    for given in ({}, {"use_karras_sigmas": False}, {"use_karras_sigmas": True}):
        np.testing.assert_array_equal(table_of("dpmpp_2m_karras", **given).updates, expected)


def test_an_unknown_scheduler_lists_the_known_ones():
    with pytest.raises(UnknownSchedulerError, match="'plms2' is not known; known: ddim, ddpm, euler, euler_a"):
        sampler_name("plms2", Schedule.from_config(SD1))
    with pytest.raises(UnknownSchedulerError, match="the model's own scheduler 'UniPCMultistepScheduler'"):
        sampler_name(None, Schedule.from_config({**SD1, "_class_name": "UniPCMultistepScheduler"}))


def test_shipped_class_names_choose_the_sampler():
    for scheduler_class in DIFFUSERS:
        first = next(name for name, row in SAMPLERS.items() if row.scheduler_class == scheduler_class)
        config = json.loads(getattr(diffusers, scheduler_class).from_config(SD1).to_json_string())
        assert sampler_name(None, Schedule.from_config({**config, "clip_sample": False})) == first


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [999, 1000])
def test_a_thousand_steps_work_or_are_refused_by_name(name, steps):
    if steps == 1000 and name not in ("euler", "euler_a", "dpmpp_2m_karras"):
        # steps_offset=1 would reach timestep 1000, or timesteps would be there twice
        with pytest.raises(StepsError, match="take fewer"):
            table_of(name, steps)
    else:
        table = table_of(name, steps)
        assert np.isfinite(table.updates).all()
        assert table.timesteps.max() <= 999


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_that_the_model_does_not_have_are_refused(name, steps):
    with pytest.raises(StepsError, match=f"{name} has no {steps} steps on a schedule of 1000 timesteps; take"):
        table_of(name, steps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("start", [-1, 10])
def test_a_start_outside_of_the_loop_is_refused(name, start):
    with pytest.raises(StepsError, match=f"10 steps cannot start at step {start}; take one from 0 to 9"):
        table_of(name, start=start)


@pytest.mark.parametrize("error", [ZeroDivisionError, IndexError])
def test_a_failure_inside_a_solver_is_raised_as_itself(error, monkeypatch):
    """It isn't the user's mistake, so that nothing tells them to take fewer steps."""

    def solver(grid, eta, clip_range):
        raise error("a bug")

    monkeypatch.setitem(SAMPLERS, "ddim", dataclasses.replace(SAMPLERS["ddim"], solver=solver))
    with pytest.raises(error, match="a bug"):
        table_of("ddim")
