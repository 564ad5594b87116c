"""Step tables against diffusers' schedulers as pipelines use them: float32, a seed's random numbers in their order, and
late starts. test_grids_diffusers.py has every sampler on every grid, in float64."""

import inspect

import diffusers
import numpy as np
import pytest
import torch

from engine.contract import SLOTS
from engine.sampling.catalog import SAMPLERS, step_table
from engine.sampling.noise import TorchGenerator
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
FEW = ("ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "pndm")
CLASSES = {name: (getattr(diffusers, SAMPLERS[name].scheduler_class), dict(SAMPLERS[name].preset)) for name in FEW}
"""diffusers' class of each sampler, and the options that make it that sampler."""


def toy_model(x, t):
    """Any smooth non-linear function of the latent and the timestep."""
    tanh, roll = (torch.tanh, torch.roll) if isinstance(x, torch.Tensor) else (np.tanh, np.roll)
    return tanh(1.3 * x + 0.3 * roll(x, 1, -1)) * (0.7 + 0.3 * float(t) / 1000) + 0.1


def with_diffusers(name, config, steps, seed, eta, start=0, image=None):
    """The latents and timesteps of StableDiffusionPipeline, or with an image of StableDiffusionImg2ImgPipeline."""
    cls, extra = CLASSES[name]
    scheduler = cls.from_config({**config, **extra})
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator)
    timesteps = scheduler.timesteps[start:]
    if image is None:
        latents = latents * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        latents = scheduler.add_noise(torch.from_numpy(image), latents, timesteps[:1].repeat(SHAPE[0]))
    return run_diffusers(name, scheduler, timesteps, latents, generator, eta), timesteps.numpy()


def run_diffusers(name, scheduler, timesteps, latents, generator, eta=0.0):
    options = {"eta": eta} if name == "ddim" else {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    for t in timesteps:
        output = toy_model(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, **options).prev_sample
    return latents.numpy()


def with_table(name, config, steps, seed, eta, start=0, image=None):
    table = step_table(name, Schedule.from_config(config), steps, eta, start)
    generator = TorchGenerator(seed)
    noise = generator.randn(SHAPE)
    state = np.zeros((SHAPE[0], SLOTS, *SHAPE[1:]))
    state[:, 0] = table.initial_scale * noise if image is None else table.alphas[0] * image + table.sigmas[0] * noise
    for t, update, draw in zip(table.timesteps, table.updates, table.draws):
        noise = generator.randn(SHAPE) if draw else np.zeros(SHAPE)
        columns = np.concatenate([state, toy_model(state[:, 0], t)[:, None], noise[:, None]], axis=1)
        state = np.einsum("ij,bj...->bi...", update, columns)
    return state[:, 0], table.timesteps


def check(name, config, steps, seed=0, eta=0.0, tolerance=5e-5, start=0, image=None):
    expected, timesteps = with_diffusers(name, config, steps, seed, eta, start, image)
    actual, our_timesteps = with_table(name, config, steps, seed, eta, start, image)
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


IMAGE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize("start", [0, 1, 7, 19])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [name for name in FEW if name != "pndm"])
def test_a_table_that_starts_late_equals_image_to_image_of_diffusers(name, prediction_type, start):
    check(name, {**SD1, "prediction_type": prediction_type}, 20, start=start, image=IMAGE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        ("euler", {"timestep_spacing": "leading"}),
        ("euler", {"timestep_spacing": "trailing", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
        ("euler_a", {"timestep_spacing": "trailing"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "solver_type": "heun"}),
    ],
)
@pytest.mark.parametrize("start", [0, 4])
def test_a_late_start_equals_diffusers_with_options_too(name, options, start):
    check(name, {**SD1, **options}, 20, start=start, image=IMAGE, tolerance=1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_late_start_with_eta_equals_diffusers(eta):
    check("ddim", SD1, 20, eta=eta, start=5, image=IMAGE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("start", [0, 7, 18, 19])
def test_plms_warms_up_where_it_starts(start, prediction_type):
    """diffusers' PNDMScheduler does it too where it is given the timesteps of a whole warm-up."""
    config = {**SD1, "prediction_type": prediction_type}
    scheduler = diffusers.PNDMScheduler.from_config(config)
    scheduler.set_timesteps(20)
    whole = [scheduler.timesteps[0], *scheduler.timesteps[2:]]
    timesteps = torch.stack([*whole[start : start + 2], *whole[start + 1 :]])
    latents = scheduler.add_noise(
        torch.from_numpy(IMAGE), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), timesteps[:1]
    )
    expected = run_diffusers("pndm", scheduler, timesteps, latents, None)
    actual, our_timesteps = with_table("pndm", config, 20, 0, 0.0, start, IMAGE)
    assert our_timesteps.tolist() == timesteps.tolist()
    np.testing.assert_allclose(actual, expected, atol=5e-5)
