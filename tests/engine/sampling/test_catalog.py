"""The catalog: names, options, and the errors that say what doesn't go together."""

import dataclasses
import inspect
import json
import re
from time import perf_counter

import diffusers
import numpy as np
import pytest

from engine.errors import SamplerOptionError, SchedulerConfigError, StepsError, UnknownSchedulerError
from engine.sampling.catalog import SAMPLERS, find, sampler_name, sampler_parameters, schedule_types, step_table
from engine.sampling.class_grids import one_more_grid
from engine.sampling.levels import RULES
from engine.sampling.listing import describe, overview
from engine.sampling.schedule import FORWARD_OPTIONS, OPTIONS, Schedule
from engine.sampling.scheduler_classes import CLASSES

from .test_samplers import SD1

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy")
DIFFUSERS = sorted({row.scheduler_class for row in SAMPLERS.values() if row.scheduler_class is not None})
ROWS = {name: row for name, row in SAMPLERS.items() if row.scheduler_class is not None}
"""The rows that are samplers of diffusers."""


def table_of(name, steps=10, start=0, **options):
    return step_table(name, Schedule.from_config({**SD1, **model(name), **options}), steps, start=start)


def model(name):
    """A model that the sampler can do."""
    return {"prediction_type": "v_prediction"} if name == "ipndm_sine" else {}


def test_labels_and_names_are_unique():
    """In any case, so that "Euler a" and "euler_a" are the only pair that differ in meaning."""
    labels = [row.label.casefold() for row in SAMPLERS.values()]
    assert len(set(labels)) == len(set(SAMPLERS)) == len(SAMPLERS)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_options_of_a_class_and_their_defaults_are_diffusers(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert CLASSES[name] == {option: p.default for option, p in parameters.items() if option != "self"}


def test_no_class_is_listed_without_a_sampler():
    assert sorted(CLASSES) == DIFFUSERS


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_row_honours_options_of_its_class_whose_type_is_checked(row):
    honoured = {*row.options, *row.preset}
    assert {*honoured, *row.ignores} <= set(CLASSES[row.scheduler_class])
    assert honoured <= set(OPTIONS)
    assert not honoured & FORWARD_OPTIONS
    assert not set(row.options) & set(row.ignores)


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
    "euler": {"interpolation_type": "cubic", "timestep_type": "odd", "final_sigmas_type": "none"},
    "dpmpp_2m": {
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "solver_type": "odd",
        "final_sigmas_type": "denoise_to_zero",
        "variance_type": "learned_range",
    },
    "ddpm": {"variance_type": "learned_range"},
    "deis": {"use_flow_sigmas": True, "algorithm_type": "odd"},
    "unipc": {"solver_type": "bh3", "shift_terminal": 0.1},
    "sa_solver": {"predictor_order": 4, "algorithm_type": "dpmsolver++"},
    "lcm": {"clip_sample_range": 2.0},
}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, option, value) for name, options in UNSUPPORTED.items() for option, value in options.items()]
    + [("dpmpp_2m_karras", "use_flow_sigmas", True)],
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
        if option not in row.class_options
    }
    np.testing.assert_array_equal(table_of(name, **others).updates, table_of(name).updates)


@pytest.mark.parametrize("shipped", DIFFUSERS)
def test_what_diffusers_writes_for_any_class_can_be_switched_to_any_sampler(shipped):
    config = json.loads(getattr(diffusers, shipped).from_config(SD1).to_json_string())
    for name in SAMPLERS:
        if not diffusers_refuses(name, config):
            table = step_table(name, Schedule.from_config({**config, "clip_sample": False, **model(name)}), 10)
            assert np.isfinite(table.updates).all(), name


def diffusers_refuses(name, config):
    """SASolverScheduler and DEISMultistepScheduler don't take each other's algorithm_type."""
    algorithm = config.get("algorithm_type", "")
    return (name == "sa_solver" and algorithm.startswith("d") and algorithm != "data_prediction") or (
        name == "deis" and algorithm == "data_prediction"
    )


def test_null_is_false():
    for sampler, option in (("euler", "use_beta_sigmas"), ("dpmpp_2m", "use_flow_sigmas")):
        np.testing.assert_array_equal(table_of(sampler, **{option: None}).updates, table_of(sampler).updates)


def test_the_karras_sampler_takes_karras_levels_whatever_the_file_says():
    expected = table_of("dpmpp_2m", use_karras_sigmas=True).updates
    for given in ({}, {"use_karras_sigmas": False}, {"use_karras_sigmas": True}):
        np.testing.assert_array_equal(table_of("dpmpp_2m_karras", **given).updates, expected)


def test_an_unknown_scheduler_lists_the_known_ones():
    with pytest.raises(UnknownSchedulerError, match="'zzz' is not known; known: ddim, ddpm, euler, euler_a"):
        sampler_name("zzz", Schedule.from_config(SD1))
    with pytest.raises(UnknownSchedulerError, match="the model's own scheduler 'VQDiffusionScheduler'"):
        sampler_name(None, Schedule.from_config({**SD1, "_class_name": "VQDiffusionScheduler"}))


def test_shipped_class_names_choose_the_sampler():
    for scheduler_class in DIFFUSERS:
        first = next(name for name, row in SAMPLERS.items() if row.scheduler_class == scheduler_class)
        config = json.loads(getattr(diffusers, scheduler_class).from_config(SD1).to_json_string())
        assert sampler_name(None, Schedule.from_config({**config, "clip_sample": False})) == first


REFUSE = ("ddim", "ddpm", "pndm", "pndm_prk", "lcm", "tcd")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_thousand_steps_work_or_are_refused_by_name(name):
    """Where they are refused steps_offset=1 would reach timestep 1000, or timesteps would be there twice; or the model
    was distilled on fewer."""
    row = SAMPLERS[name]
    if name in REFUSE or (row.grid is one_more_grid and row.fixed_type is None):
        with pytest.raises(StepsError, match="take fewer"):
            table_of(name, 1000)
    else:
        table = table_of(name, 1000)
        assert np.isfinite(table.updates).all()
        assert table.timesteps.max() <= 999


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_that_the_model_does_not_have_are_refused(name, steps):
    with pytest.raises(StepsError, match=f"{name} has no {steps} steps on a schedule of 1000 timesteps; take"):
        table_of(name, steps)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "dpm_fast"])
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


SCHEDULE = Schedule.from_config(SD1)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_class_of_diffusers_means_its_first_row(row):
    first = next(name for name, other in SAMPLERS.items() if other.scheduler_class == row.scheduler_class)
    assert sampler_name(row.scheduler_class, SCHEDULE) == first


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("euler_a", "euler_a"),
        ("Euler a", "Euler a"),
        ("euler A", "Euler a"),
        ("  DPM++   2m  karras ", "DPM++ 2M Karras"),
        ("DPM++ 2M SGM Uniform", "DPM++ 2M SGM Uniform"),
        ("DPM++ 2M Automatic", "DPM++ 2M"),
        ("Euler Align Your Steps", "Euler Align Your Steps"),
        ("ddim", "ddim"),
        ("DDIM", "DDIM"),
        ("Plms", "PLMS"),
        ("DDPM", "ddpm"),  # A1111 has none
    ],
)
def test_labels_of_a1111_are_known_in_any_case(asked, name):
    assert sampler_name(asked, SCHEDULE) == name


@pytest.mark.parametrize("asked", ["DDIM Karras", "PLMS Karras", "Euler Odd", "Karras", "", "euler karras beta"])
def test_a_label_with_a_schedule_type_that_it_cannot_have_is_not_known(asked):
    with pytest.raises(UnknownSchedulerError, match="is not known"):
        sampler_name(asked, SCHEDULE)


@pytest.mark.parametrize("row", [row for row in SAMPLERS.values() if row.webui and row.webui.grid is None])
def test_a_schedule_type_in_a_label_and_beside_it_mean_the_same(row):
    for kind, rule in RULES.items():
        inside, beside = (
            step_table(f"{row.label} {rule.label}", SCHEDULE, 7),
            step_table(row.label, SCHEDULE, 7, schedule_type=kind),
        )
        np.testing.assert_array_equal(inside.updates, beside.updates)
        np.testing.assert_array_equal(inside.timesteps, beside.timesteps)


@pytest.mark.parametrize("row", [row for row in SAMPLERS.values() if row.webui and row.webui.grid is None])
def test_a_label_starts_from_noise_of_the_first_level(row):
    """k-diffusion's y = sigma z; diffusers' classes after it differ by the timestep spacing."""
    for kind in RULES:
        table = step_table(row.label, SCHEDULE, 7, schedule_type=kind)
        assert table.initial_scale == pytest.approx(table.sigmas[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_schedule_type_makes_a_table(name):
    for kind in schedule_types(find(name)):
        for steps in (1, 6) if name != "pndm_prk" else (4,):
            table = step_table(name, SCHEDULE, steps, schedule_type=kind)
            assert np.isfinite(table.updates).all(), kind


def test_a_schedule_type_of_diffusers_is_its_options():
    for name in ("euler", "dpmpp_2m"):
        for kind, options in {
            "karras": {"use_karras_sigmas": True},
            "beta": {"use_beta_sigmas": True},
            "trailing": {"timestep_spacing": "trailing"},
        }.items():
            for shipped in ({}, {"use_exponential_sigmas": True}):
                ours = step_table(name, Schedule.from_config({**SD1, **shipped}), 9, schedule_type=kind)
                np.testing.assert_array_equal(ours.updates, table_of(name, 9, **options).updates)


def test_options_of_the_file_may_be_chosen_in_a_call():
    ours = step_table("dpmpp_2m", SCHEDULE, 9, options=(("solver_type", "heun"), ("lower_order_final", False)))
    np.testing.assert_array_equal(
        ours.updates, table_of("dpmpp_2m", 9, solver_type="heun", lower_order_final=False).updates
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_option_that_a_sampler_does_not_have_is_named_with_those_that_it_has(name):
    with pytest.raises(SamplerOptionError, match=rf"{name} has no option 'no_such'; it has: ") as raised:
        step_table(name, SCHEDULE, 5, options=(("no_such", 1),))
    for option in sampler_parameters(find(name), None):
        assert option in str(raised.value)


@pytest.mark.parametrize("name", [*SAMPLERS, *dict.fromkeys(row.label for row in SAMPLERS.values() if row.webui)])
def test_a_wrong_value_of_every_option_is_refused(name):
    for option, parameter in sampler_parameters(find(name), None).items():
        for wrong in ("odd", None, -1e9, [1]):
            if not parameter.right(wrong):
                with pytest.raises(SamplerOptionError, match=f"option {option} of .* it must be "):
                    step_table(name, SCHEDULE, 5, options=((option, wrong),))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_table_of_50_steps_takes_less_than_20_milliseconds(name):
    times = []
    for _ in range(3):
        started = perf_counter()
        table_of(name, 50)
        times.append(perf_counter() - started)
    assert min(times) < 0.02


def test_the_list_says_how_often_the_unet_runs_and_whether_noise_is_added():
    lines = {line.split()[0]: line for line in overview() if line}
    for name in SAMPLERS:
        table = step_table(name, Schedule.from_config({**SD1, "prediction_type": "v_prediction"}), 42)
        noise = "yes" if table.updates[:, :, -1].any() else "no"
        assert f" {round(len(table) / 42)}  {noise} " in lines[name], name


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_list_says_what_each_sampler_takes(name):
    text = "\n".join(describe([name]))
    for option, parameter in sampler_parameters(find(name), None).items():
        assert f"  {option}: {parameter.rule}" in text
    for kind in schedule_types(find(name)):
        assert kind in text


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "dpmpp_2m"),
        ({"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ({"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, "dpmpp_2m_sde_heun"),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "dpmpp_3m_sde"),
        ({"solver_order": 3}, "dpmpp_3m"),
        ({"use_karras_sigmas": True}, "dpmpp_2m"),  # which takes other schedule types too
        ({"final_sigmas_type": "sigma_min"}, "dpmpp_2m"),
        ({"algorithm_type": "deis"}, "dpmpp_2m"),  # as diffusers reads DEIS's file
        ({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "dpm_2m"),
    ],
)
def test_a_class_means_the_row_that_agrees_with_the_file(config, name):
    schedule = Schedule.from_config({**SD1, **config, "_class_name": "DPMSolverMultistepScheduler"})
    assert sampler_name(None, schedule) == sampler_name("DPMSolverMultistepScheduler", schedule) == name


def test_pndm_without_its_runge_kutta_steps_is_plms():
    for options, name in (
        ({"skip_prk_steps": True}, "pndm"),
        ({"skip_prk_steps": False}, "pndm_prk"),
        ({}, "pndm_prk"),
    ):
        assert sampler_name("PNDMScheduler", Schedule.from_config(options)) == name


def test_a_class_whose_options_no_row_has_is_refused():
    """diffusers refuses this one too."""
    schedule = Schedule.from_config({**SD1, "algorithm_type": "dpmsolver", "final_sigmas_type": "zero"})
    words = r"'dpmsolver', final_sigmas_type='zero' is not supported; the nearest .* has final_sigmas_type='sigma_min'"
    with pytest.raises(SchedulerConfigError, match=words):
        sampler_name("DPMSolverMultistepScheduler", schedule)


def test_rho_is_an_option_of_the_schedule_types_that_it_bends():
    """Of A1111's meaning of them; diffusers has no such option."""
    for name, kind in (("DPM++ 2M", None), ("Euler", "polyexponential"), ("euler_a", "karras")):
        straight, bent = (
            step_table(name, SCHEDULE, 5, schedule_type=kind, options=options) for options in ((), (("rho", 3.0),))
        )
        assert not np.allclose(straight.timesteps, bent.timesteps)
    for name, kind in (("dpmpp_2m", "karras"), ("Euler", None), ("Euler", "beta")):
        with pytest.raises(SamplerOptionError, match="has no option 'rho'"):
            step_table(name, SCHEDULE, 5, schedule_type=kind, options=(("rho", 3.0),))


@pytest.mark.parametrize("name", ["euler_a", "lms", "dpmpp_2m", "deis", "unipc", "sa_solver", "ddim", "ddpm", "lcm"])
def test_a_calls_own_noise_levels_are_where_the_steps_go(name):
    sigmas = (14.0, 3.0, 0.5, 0.05)
    table = step_table(name, SCHEDULE, 20, sigmas=sigmas)
    np.testing.assert_allclose(table.sigmas / table.alphas, sigmas[:-1])


@pytest.mark.parametrize("steps", [1, 5])
def test_own_sigmas_and_timesteps_equal_diffusers_euler(steps):
    scheduler = diffusers.EulerDiscreteScheduler.from_config(SD1)
    for own in (
        {"sigmas": np.geomspace(14, 0.1, steps).tolist() + [0.0]},
        {"timesteps": [900, 500, 300, 200, 1][:steps]},
    ):
        scheduler.set_timesteps(**own)
        table = step_table("euler", SCHEDULE, 20, **{what: tuple(values) for what, values in own.items()})
        np.testing.assert_allclose(table.timesteps, scheduler.timesteps, atol=2e-2)
        np.testing.assert_allclose(table.sigmas / table.alphas, scheduler.sigmas[:-1], rtol=2e-5)


def test_a_model_with_continuous_timesteps_is_told_those_of_its_own_sigmas():
    config = {**SD1, "timestep_type": "continuous", "prediction_type": "v_prediction"}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=[14.0, 3.0, 0.0])
    table = step_table("euler", Schedule.from_config(config), 20, sigmas=(14.0, 3.0, 0.0))
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=1e-6)
