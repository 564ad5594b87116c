"""The forward process that a scheduler_config.json describes."""

import diffusers
import numpy as np
import pytest

from engine.errors import SchedulerConfigError
from engine.sampling.schedule import WEBUI_ZERO_SNR, Schedule

from .test_samplers import SD1


def test_constants_of_the_stable_diffusion_schedule():
    schedule = Schedule.from_config(SD1)
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-9)
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.0046600985, abs=1e-10)
    assert schedule.sigmas()[0] == pytest.approx(0.0291671582, abs=1e-9)
    assert schedule.sigmas()[-1] == pytest.approx(14.6146412293, abs=1e-9)


def test_a_zero_terminal_snr_is_infinite_or_what_diffusers_takes_it_for():
    schedule = Schedule.from_config({**SD1, "rescale_betas_zero_snr": True})
    with np.errstate(all="raise"):
        assert schedule.exact_sigmas()[-1] == np.inf
        assert schedule.sigmas()[-1] == pytest.approx(4096, rel=1e-6)
    np.testing.assert_array_equal(schedule.exact_sigmas()[:-1], schedule.sigmas()[:-1])


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        ("DDPMScheduler", "linear"),
        ("DDPMScheduler", "scaled_linear"),
        ("DDPMScheduler", "squaredcos_cap_v2"),
        ("DDPMScheduler", "sigmoid"),
        ("DDPMScheduler", "laplace"),
        ("HeunDiscreteScheduler", "exp"),
    ],
)
@pytest.mark.parametrize("count", [1000, 50])
def test_beta_schedules_are_those_of_diffusers(scheduler, name, count):
    """Which of them a class of diffusers knows differs; here every sampler knows all."""
    config = {"beta_schedule": name, "beta_start": 0.0015, "beta_end": 0.0195, "num_train_timesteps": count}
    theirs = getattr(diffusers, scheduler).from_config(config)
    np.testing.assert_allclose(
        np.log(Schedule.from_config(config).alphas_cumprod),
        np.log(theirs.alphas_cumprod.double().numpy()),
        rtol=2e-4,
        atol=1e-6,
    )


def test_trained_betas_are_taken_as_they_are():
    betas = [0.1, 0.2, 0.4]
    schedule = Schedule.from_config({"trained_betas": betas})
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.72, 0.432])


def test_a_zero_terminal_snr_rescales_as_diffusers_does():
    config = {**SD1, "rescale_betas_zero_snr": True}
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(Schedule.from_config(config).alphas_cumprod, theirs, atol=1e-6)


def test_a1111_takes_a_zero_terminal_snr_for_another_number():
    schedule = Schedule.from_config({**SD1, "rescale_betas_zero_snr": True})
    assert schedule.sigmas(WEBUI_ZERO_SNR)[-1] == pytest.approx(4518.76, abs=0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clip_sample": True}, "clip_sample=true"),
        ({"thresholding": True}, "thresholding=true"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"beta_schedule": "odd"}, "beta_schedule 'odd' is not known; known: linear, scaled_linear, sigmoid, squared"),
        ({"timestep_spacing": "odd"}, "timestep_spacing is 'odd'"),
        ({"beta_start": 1e-300, "beta_end": 1e-300}, "noise doesn't grow .*beta_start=1e-300, beta_end=1e-300"),
        ({"trained_betas": [0.999] * 1000}, r"noise doesn't grow .*trained_betas=\[0.999.*so large"),
    ],
)
def test_a_schedule_that_is_not_supported_says_which_option(config, message):
    with pytest.raises(SchedulerConfigError, match=message):
        Schedule.from_config({**SD1, **config})
