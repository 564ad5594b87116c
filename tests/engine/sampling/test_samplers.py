"""Step tables against diffusers' schedulers, driving the same non-linear toy model."""

import json

import diffusers
import numpy as np
import pytest
import torch

from engine.contract import SLOTS
from engine.errors import SchedulerConfigError, StepsError, UnknownSchedulerError
from engine.sampling.noise import TorchGenerator
from engine.sampling.samplers import LABELS, SAMPLERS, sampler_name, step_table
from engine.sampling.schedule import Schedule

SHAPE = (2, 4, 8, 8)
SD1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
CLASSES = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "pndm": (diffusers.PNDMScheduler, {}),
}


def toy_model(x, t):
    """Any smooth non-linear function of the latent and the timestep."""
    tanh, roll = (torch.tanh, torch.roll) if isinstance(x, torch.Tensor) else (np.tanh, np.roll)
    return tanh(1.3 * x + 0.3 * roll(x, 1, -1)) * (0.7 + 0.3 * float(t) / 1000) + 0.1


def with_diffusers(name, config, steps, seed, eta):
    cls, extra = CLASSES[name]
    scheduler = cls.from_config({**config, **extra})
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    options = {"eta": eta} if name == "ddim" else {}
    if name != "pndm" and not name.startswith("dpmpp"):
        options["generator"] = generator
    for t in scheduler.timesteps:
        output = toy_model(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, **options).prev_sample
    return latents.numpy(), scheduler.timesteps.numpy()


def with_table(name, config, steps, seed, eta):
    table = step_table(name, Schedule.from_config(config), steps, eta)
    generator = TorchGenerator(seed)
    state = np.zeros((SHAPE[0], SLOTS, *SHAPE[1:]))
    state[:, 0] = generator.randn(SHAPE) * table.initial_scale
    for t, update, draw in zip(table.timesteps, table.updates, table.draws):
        noise = generator.randn(SHAPE) if draw else np.zeros(SHAPE)
        columns = np.concatenate([state, toy_model(state[:, 0], t)[:, None], noise[:, None]], axis=1)
        state = np.einsum("ij,bj...->bi...", update, columns)
    return state[:, 0], table.timesteps


def check(name, config, steps, seed=0, eta=0.0, tolerance=5e-5):
    expected, timesteps = with_diffusers(name, config, steps, seed, eta)
    actual, our_timesteps = with_table(name, config, steps, seed, eta)
    np.testing.assert_allclose(our_timesteps, timesteps, atol=2e-2)
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
@pytest.mark.parametrize("name", CLASSES)
def test_table_equals_the_diffusers_scheduler(name, steps, prediction_type):
    check(name, {**SD1, "prediction_type": prediction_type}, steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("name", CLASSES)
def test_every_timestep_spacing_equals_diffusers(name, steps, spacing):
    check(name, {**SD1, "timestep_spacing": spacing}, steps)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"set_alpha_to_one": True, "steps_offset": 0},
        {"num_train_timesteps": 500},
        {"trained_betas": [0.001 + 1e-5 * i for i in range(900)], "num_train_timesteps": 900},
    ],
)
@pytest.mark.parametrize("name", CLASSES)
def test_every_noise_schedule_equals_diffusers(name, options):
    if name == "dpmpp_2m_karras" and options.get("beta_schedule") == "squaredcos_cap_v2":
        pytest.skip("diffusers 0.42.1 itself ends this combination with an IndexError")
    # The cosine schedule ends at s = 20291, where diffusers' own float32 loses three digits.
    check(name, {**SD1, **options}, 10, tolerance=2e-3 if options.get("beta_schedule") == "squaredcos_cap_v2" else 5e-5)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmpp_2m"])
def test_zero_terminal_snr_equals_diffusers(name):
    check(
        name,
        {**SD1, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        12,
        tolerance=1e-3,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"solver_order": 1},
        {"solver_type": "heun"},
        {"final_sigmas_type": "sigma_min"},
        {"euler_at_final": True},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
        {"lambda_min_clipped": -2.0},
    ],
)
@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_options_equal_diffusers(options, steps):
    check("dpmpp_2m", {**SD1, **options}, steps)


@pytest.mark.parametrize("options", [{"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}])
def test_euler_options_equal_diffusers(options):
    check("euler", {**SD1, **options}, 20)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_with_eta_equals_diffusers(eta, prediction_type):
    check("ddim", {**SD1, "prediction_type": prediction_type}, 20, eta=eta)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_variances_equal_diffusers(variance_type):
    check("ddpm", {**SD1, "variance_type": variance_type}, 20)


def test_constants_of_the_stable_diffusion_schedule():
    schedule = Schedule.from_config(SD1)
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-9)
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.0046600985, abs=1e-10)
    assert schedule.sigmas()[0] == pytest.approx(0.0291671582, abs=1e-9)
    assert schedule.sigmas()[-1] == pytest.approx(14.6146412293, abs=1e-9)


def test_every_sampler_has_a_label_and_an_oracle():
    assert set(LABELS) == set(SAMPLERS) == set(CLASSES)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [999, 1000])
def test_a_thousand_steps_work_or_are_refused_by_name(name, steps):
    if steps == 1000 and name not in ("euler", "euler_a", "dpmpp_2m_karras"):
        with pytest.raises(
            StepsError, match="take fewer"
        ):  # steps_offset=1 would reach timestep 1000, or noise levels coincide
            step_table(name, Schedule.from_config(SD1), steps)
    else:
        table = step_table(name, Schedule.from_config(SD1), steps)
        assert np.isfinite(table.updates).all()
        assert table.timesteps.max() <= 1000


def test_an_unknown_scheduler_lists_the_known_ones():
    with pytest.raises(UnknownSchedulerError, match="'plms2' is not known; known: ddim, ddpm, euler, euler_a"):
        sampler_name("plms2", Schedule.from_config(SD1))
    with pytest.raises(UnknownSchedulerError, match="the model's own scheduler 'UniPCMultistepScheduler'"):
        sampler_name(None, Schedule.from_config({**SD1, "_class_name": "UniPCMultistepScheduler"}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clip_sample": True}, "clip_sample=true"),
        ({"thresholding": True}, "thresholding=true"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace'"),
    ],
)
def test_a_schedule_that_is_not_supported_says_which_option(config, message):
    with pytest.raises(SchedulerConfigError, match=message):
        Schedule.from_config({**SD1, **config})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps=False"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("dpmpp_2m", {"use_lu_lambdas": True}, "use_lu_lambdas"),
        ("ddim", {"timestep_spacing": "odd"}, "timestep_spacing is 'odd'"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type"),
    ],
)
def test_a_sampler_option_that_is_not_supported_is_named(name, config, message):
    with pytest.raises(SchedulerConfigError, match=message):
        step_table(name, Schedule.from_config({**SD1, **config}), 10)


def test_shipped_class_names_choose_the_sampler():
    for name, (cls, _) in CLASSES.items():
        if name != "dpmpp_2m_karras":
            config = json.loads(cls.from_config(SD1).to_json_string())
            assert sampler_name(None, Schedule.from_config({**config, "clip_sample": False})) == name
