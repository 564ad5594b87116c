"""The grids of diffusers' scheduler classes, whatever solver uses them: timesteps and noise levels of their
`set_timesteps`."""

import inspect
from functools import cache

import diffusers
import numpy as np
import pytest

from engine.errors import SchedulerConfigError, StepsError, TimestepsError
from engine.sampling.class_grids import (
    FLAGS,
    consistency_grid,
    euler_grid,
    fractional_grid,
    midpoint_grid,
    one_more_grid,
    strided_grid,
    successive_grid,
    trajectory_grid,
)
from engine.sampling.schedule import BETAS, Schedule
from engine.sampling.scheduler_classes import CLASSES

SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WHOLE = {
    "DDIMScheduler": strided_grid,
    "DDPMScheduler": successive_grid,
    "LCMScheduler": consistency_grid,
    "TCDScheduler": trajectory_grid,
}
BY_TIMESTEP = {
    "EulerDiscreteScheduler": euler_grid,
    "EulerAncestralDiscreteScheduler": fractional_grid,
    "LMSDiscreteScheduler": fractional_grid,
    "HeunDiscreteScheduler": fractional_grid,
    "DPMSolverSDEScheduler": fractional_grid,
    "KDPM2DiscreteScheduler": midpoint_grid,
    "KDPM2AncestralDiscreteScheduler": midpoint_grid,
    "DPMSolverMultistepScheduler": one_more_grid,
    "DPMSolverSinglestepScheduler": one_more_grid,
    "DEISMultistepScheduler": one_more_grid,
    "UniPCMultistepScheduler": one_more_grid,
    "SASolverScheduler": one_more_grid,
}
ONE_MORE = [name for name, rule in BY_TIMESTEP.items() if rule is one_more_grid]
TWICE = ("HeunDiscreteScheduler", "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")


def ours(name, steps, timesteps=None, **options):
    config = {**SD1, **options}
    schedule = Schedule.from_config({**{option: CLASSES[name].get(option) for option in BETAS}, **config})
    configured = Schedule({**CLASSES[name], **schedule.config}, schedule.alphas_cumprod, schedule.prediction_type)
    return {**WHOLE, **BY_TIMESTEP}[name](configured, steps, timesteps)


@cache
def scheduler_of(name, betas):
    """Making some of these takes half a second, because they compute a thousand steps first."""
    return getattr(diffusers, name).from_config({**SD1, **dict(betas)})


def theirs(name, steps, timesteps=None, **options):
    """Timesteps and sigmas of diffusers, of each step's first evaluation."""
    betas = {option: options[option] for option in ("rescale_betas_zero_snr",) if option in options}
    scheduler = scheduler_of(name, tuple(betas.items()))
    scheduler.register_to_config(**{**CLASSES[name], **SD1, **options})
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    t, s = scheduler.timesteps.numpy(), getattr(scheduler, "sigmas", None)
    s = s if s is None else s.numpy()
    if name in TWICE:
        t = np.append(t[0], t[1::2]) if name == "HeunDiscreteScheduler" else t[::2]
        s = np.append(s[0], s[1::2])
    return scheduler, t, s if s is None else s[: len(t) + 1]


def check(name, steps, timesteps=None, **options):
    grid = ours(name, steps, timesteps, **options)
    scheduler, t, s = theirs(name, steps, timesteps, **options)
    cut = name in ONE_MORE and (options.get("use_exponential_sigmas") or options.get("use_beta_sigmas"))
    first = slice(1, None) if cut else slice(None)  # diffusers' float32 cuts the highest off to 998
    np.testing.assert_allclose(grid.timesteps[first], t[first], atol=2e-2)
    assert grid.initial_scale * np.hypot(1, grid.sigmas[0]) == pytest.approx(float(initial(scheduler, grid)), rel=2e-5)
    if s is not None:
        np.testing.assert_allclose(np.append(grid.sigmas, grid.targets[-1]), s, rtol=2e-5, atol=1e-9)
        np.testing.assert_array_equal(grid.targets[:-1], grid.sigmas[1:])


def initial(scheduler, grid):
    """diffusers' first noise in k-diffusion's scale; classes that are not in it start from alpha times as much."""
    scale = scheduler.init_noise_sigma
    return scale if hasattr(scheduler, "is_scale_input_called") or scale != 1 else np.hypot(1, grid.sigmas[0])


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy")
STEPS = [1, 2, 7, 20]


def kinds(name):
    return [None, *(kind for kind, flag in FLAGS.items() if flag in CLASSES[name])]


def spacings(name):
    return ["leading", "linspace", "trailing"] if "timestep_spacing" in CLASSES[name] else [None]


@pytest.mark.parametrize("name", BY_TIMESTEP)
def test_every_grid_of_a_class_is_that_of_diffusers(name):
    for kind in kinds(name):
        for spacing in spacings(name) if kind is None or name not in ONE_MORE else [None]:
            options = {"timestep_spacing": spacing} if spacing else {}
            for steps in STEPS:
                check(name, steps, **options, **({FLAGS[kind]: True} if kind else {}))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("steps", STEPS)
def test_whole_timesteps_are_those_of_diffusers(name, steps):
    for spacing in ["leading", "linspace", "trailing"]:
        check(name, steps, timestep_spacing=spacing)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
        (
            "EulerDiscreteScheduler",
            {"interpolation_type": "log_linear", "use_karras_sigmas": True, "timestep_spacing": "leading"},
        ),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        *(
            ("EulerDiscreteScheduler", {FLAGS[kind]: True, "sigma_min": 0.1, "sigma_max": 10.0})
            for kind in ("karras", "exponential", "beta")
        ),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0}),
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}),
        ("DPMSolverSinglestepScheduler", {"lambda_min_clipped": -2.0}),
        ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("SASolverScheduler", {"lambda_min_clipped": -2.0}),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "sigma_min": 0.1, "final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 5.0}),
        ("LCMScheduler", {"original_inference_steps": 100}),
        ("TCDScheduler", {"original_inference_steps": 37}),
    ],
)
def test_options_of_the_grid_equal_diffusers(name, options):
    for steps in (3, 20):
        check(name, steps, **options)


def test_a_step_from_the_lowest_level_to_the_lowest_is_no_step_up():
    """Rounding errors put the lowest of Karras's levels below it."""
    grid = ours(
        "EulerDiscreteScheduler",
        10,
        num_train_timesteps=2000,
        beta_schedule="squaredcos_cap_v2",
        use_karras_sigmas=True,
        final_sigmas_type="sigma_min",
    )
    assert grid.targets[-1] == grid.sigmas[-1] == grid.levels[0]


OWN = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


@pytest.mark.parametrize("name", [*WHOLE, *BY_TIMESTEP])
def test_a_calls_own_timesteps_are_taken_as_by_diffusers(name):
    """Of a class whose `set_timesteps` takes none, the rest of the grid is as always."""
    if "timesteps" in inspect.signature(getattr(diffusers, name).set_timesteps).parameters:
        for own in (OWN, [500], [999, 0]):
            check(name, len(own), tuple(own))
    grid = ours(name, len(OWN), tuple(map(float, OWN)))
    assert grid.timesteps.tolist() == OWN
    np.testing.assert_array_equal(grid.targets[:-1], grid.sigmas[1:])


@pytest.mark.parametrize("name", [*WHOLE, *BY_TIMESTEP])
@pytest.mark.parametrize(
    ("own", "words"),
    [
        ((500.0, 600.0), "timesteps must fall: number 1 is 500 and the next is 600; pass them from high to low"),
        ((500.0, 500.0), "timesteps must fall"),
        ((1000.0, 0.0), "timestep 1000 is not one of the model's, which go from 999 to 0"),
        ((500.0, -1.0), "timestep -1 is not one of the model's"),
    ],
)
def test_timesteps_that_do_not_fall_or_are_not_there_are_refused(name, own, words):
    with pytest.raises(TimestepsError, match=words):
        ours(name, len(own), own)


@pytest.mark.parametrize("name", [*WHOLE, "DPMSolverMultistepScheduler"])
def test_timesteps_that_must_be_whole_are_refused_if_they_are_not(name):
    with pytest.raises(TimestepsError, match=r"timestep 500\.5 is not a whole number, which this sampler needs"):
        ours(name, 2, (500.5, 3.0))


def test_own_timesteps_go_with_no_other_levels():
    with pytest.raises(SchedulerConfigError, match="use_karras_sigmas=true leaves no room for timesteps of a call"):
        ours("EulerDiscreteScheduler", 1, (500.0,), use_karras_sigmas=True)
    with pytest.raises(SchedulerConfigError, match="use_karras_sigmas=true and use_beta_sigmas=true contradict"):
        ours("EulerDiscreteScheduler", 5, use_karras_sigmas=True, use_beta_sigmas=True)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_more_steps_than_a_model_was_distilled_on_are_refused(name):
    with pytest.raises(
        StepsError, match=r"original_inference_steps=50 of 1000 timesteps has no 51 steps; take fewer, from 1 to 50"
    ):
        ours(name, 51)
