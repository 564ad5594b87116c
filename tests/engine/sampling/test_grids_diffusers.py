"""Every sampler on every grid that diffusers has for it: the latents after a whole loop of a non-linear toy model, in
float64, from the options of scheduler_config.json to the end."""

import inspect
from functools import cache

import diffusers
import numpy as np
import pytest
import torch

from engine.sampling.catalog import SAMPLERS, step_table
from engine.sampling.class_grids import FLAGS
from engine.sampling.schedule import SPACINGS, Schedule

from .references import SD1, Brownian, Noise, latent, run_diffusers, run_table, set_steps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy")
STEPS = (1, 2, 5, 10, 20, 50)
CONFIG = {**SD1, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
SCHEDULE = {kind: Schedule.from_config({**CONFIG, "prediction_type": kind}) for kind in ("epsilon", "v_prediction")}
ROWS = [name for name, row in SAMPLERS.items() if row.scheduler_class not in (None, "IPNDMScheduler")]


@cache
def scheduler_of(name):
    """Making some takes half a second. The noise levels are those of float64."""
    row = SAMPLERS[name]
    scheduler = getattr(diffusers, row.scheduler_class).from_config({**CONFIG, **row.preset})
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULE["epsilon"].alphas_cumprod)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def options_of(row, schedule_type):
    """The options of diffusers' class that a schedule type stands for."""
    flags = {option: row.preset.get(option, False) for option in FLAGS.values() if option in row.options}
    if schedule_type in FLAGS:
        return {**flags, FLAGS[schedule_type]: True}
    return {**flags, **({"timestep_spacing": schedule_type} if schedule_type in SPACINGS else {})}


def check(name, prediction_type, steps, schedule_type=None, timesteps=None):
    scheduler, row = scheduler_of(name), SAMPLERS[name]
    scheduler.register_to_config(**row.class_options)
    scheduler.register_to_config(**{**CONFIG, **row.preset, "prediction_type": prediction_type})
    scheduler.register_to_config(**options_of(row, schedule_type))
    set_steps(scheduler, steps, timesteps)
    noise = Brownian if hasattr(scheduler, "noise_sampler") else Noise
    ours, theirs = noise(), noise()
    eta = {} if row.eta is None else {"eta": 0.3}
    expected = run_diffusers(scheduler, latent(), theirs, **eta)
    table = step_table(name, SCHEDULE[prediction_type], steps, schedule_type=schedule_type, timesteps=timesteps, **eta)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, atol=2e-3, err_msg=f"{schedule_type} {steps}")
    actual = run_table(table, latent(), ours)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, atol=1e-5 * scale, rtol=0, err_msg=f"{schedule_type} {steps}")
    assert ours.drawn == theirs.drawn


FIRST = {row.scheduler_class: name for name, row in reversed(SAMPLERS.items())}
"""The rows of a class have one grid rule, so the first of them tries every grid."""


def steps_of(name, prediction_type, schedule_type):
    """All where the sampler's own grid is meant. Long runs take seconds: of other grids for both predictions, and with
    diffusers' LMS, which integrates numerically. PNDM takes 4 steps at least."""
    if name == "pndm_prk":
        return (4, 5, 10, 20, 50)
    seldom = schedule_type is not None and (name == "lms" or prediction_type == "v_prediction")
    return STEPS[:4] if seldom else STEPS


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ROWS)
def test_every_grid_of_a_sampler_equals_diffusers(name, prediction_type):
    row = SAMPLERS[name]
    for schedule_type in (None, *(row.own_types if FIRST[row.scheduler_class] == name else ())):
        for steps in steps_of(name, prediction_type, schedule_type):
            check(name, prediction_type, steps, schedule_type)


OWN = (999.0, 850.0, 545.0, 233.0, 24.0)
TAKE_OWN = [
    name
    for scheduler_class, name in FIRST.items()
    if scheduler_class is not None
    and "timesteps" in inspect.signature(getattr(diffusers, scheduler_class).set_timesteps).parameters
]


@pytest.mark.parametrize("name", TAKE_OWN)
def test_timesteps_of_a_call_equal_diffusers(name):
    check(name, "v_prediction", len(OWN), timesteps=OWN)
