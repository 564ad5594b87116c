"""A1111's labels mean A1111's samplers: k-diffusion's functions, and CompVis' DDIM, PLMS and UniPC, on the noise levels
that A1111 gives them, from the label to the latents after the loop."""

import diffusers
import numpy as np
import pytest
import torch

from engine.sampling.catalog import SAMPLERS, step_table, takes_types
from engine.sampling.levels import RULES
from engine.sampling.schedule import Schedule
from engine.sampling.table import vp

from .references import LEVELS, SD1, Brownian, Noise, latent, run_diffusers, run_k_diffusion, run_table, toy_model
from .test_levels import FORMULAS

STEPS = (2, 5, 10, 20, 50)
FUNCTIONS = {
    "Euler": ("euler", "uniform", {}),
    "Euler a": ("euler_ancestral", "uniform", {}),
    "LMS": ("lms", "uniform", {}),
    "Heun": ("heun", "uniform", {}),
    "DPM2": ("dpm_2", "karras", {}),
    "DPM2 a": ("dpm_2_ancestral", "karras", {}),
    "DPM++ 2S a": ("dpmpp_2s_ancestral", "karras", {}),
    "DPM++ 2M": ("dpmpp_2m", "karras", {}),
    "DPM++ SDE": ("dpmpp_sde", "karras", {}),
    "DPM++ 2M SDE": ("dpmpp_2m_sde", "exponential", {}),
    "DPM++ 2M SDE Heun": ("dpmpp_2m_sde", "exponential", {"solver_type": "heun"}),
    "DPM++ 3M SDE": ("dpmpp_3m_sde", "exponential", {}),
}
"""k-diffusion's function and the schedule type that "Automatic" is, by label."""

DROP_THE_LEVEL_BEFORE_THE_LAST = ("DPM2", "DPM2 a", "DPM++ 3M SDE")
DETERMINISTIC = ("Euler", "LMS", "Heun", "DPM2", "DPM++ 2M")
ELSEWHERE = {"DDIM", "PLMS", "UniPC", "DPM fast", "Restart", "iPNDM"}
"""Tested below, and with their solvers; A1111 has no iPNDM."""


def schedule(prediction_type="epsilon"):
    return Schedule.from_config({**SD1, "prediction_type": prediction_type})


def sigmas_of(label, kind, steps):
    if label not in DROP_THE_LEVEL_BEFORE_THE_LAST:
        return np.array(list(FORMULAS[kind](steps)), np.float64)
    more = list(FORMULAS[kind](steps + 1))
    return np.array([*more[:-2], more[-1]], np.float64)


def check(label, kind, steps, prediction_type="epsilon", asked=None, **options):
    function, _, theirs = FUNCTIONS[label]
    sigmas = sigmas_of(label, kind, steps)
    table = step_table(label, schedule(prediction_type), steps, schedule_type=asked, options=tuple(options.items()))
    noise = Brownian if function == "dpmpp_sde" else Noise
    ours, given = noise(), noise()
    drawn = {} if label in DETERMINISTIC else {"noise_sampler": given if noise is Brownian else given.torch}
    x = latent() * table.initial_scale
    expected = run_k_diffusion(function, sigmas, x, prediction_type, **theirs, **drawn, **options)
    actual = run_table(table, x, ours)
    if function.startswith(("dpmpp_2m", "dpmpp_3m")):  # our latents keep VP's scale where noise is left at the end
        actual = actual / vp(sigmas[-1])[0]
    scale = max(1.0, np.abs(expected).max())
    # k-diffusion's levels are float32.
    np.testing.assert_allclose(actual, expected, atol=5e-5 * scale, rtol=0, err_msg=f"{label} {kind} {steps}")


def test_every_label_is_tested():
    labels = {row.label for row in SAMPLERS.values() if row.webui is not None}
    assert labels == {*FUNCTIONS, *ELSEWHERE}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("label", FUNCTIONS)
def test_a_label_is_k_diffusions_function_on_a1111s_levels(label, prediction_type):
    for steps in STEPS:
        check(label, FUNCTIONS[label][1], steps, prediction_type)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("label", FUNCTIONS)
def test_a_label_with_any_schedule_type_is_k_diffusions_function_there(label, kind):
    check(label, kind, 7, asked=kind)


def test_options_are_those_of_k_diffusion():
    check("Euler a", "uniform", 10, eta=0.4, s_noise=1.02)
    check("DPM++ 2M SDE", "exponential", 10, eta=0.4, s_noise=1.02)
    check("DPM++ SDE", "karras", 10, r=0.4)
    check("LMS", "uniform", 10, order=2)


@pytest.mark.parametrize("label", [row.label for row in SAMPLERS.values() if takes_types(row)])
def test_a_label_can_do_a_zero_terminal_snr(label):
    """A1111 puts a very low signal in place of none."""
    config = {**SD1, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    table = step_table(label, Schedule.from_config(config), 10)
    assert np.isfinite(table.updates).all()
    assert table.sigmas[0] / table.alphas[0] == pytest.approx(4518.76, abs=0.01)


def timesteps_of(steps):
    """A1111's, from high to low: one more than steps where 1000 // steps leaves room."""
    return np.minimum(np.arange(0, 1000, 1000 // steps) + 1, 999)[::-1]


def compvis_step(x, epsilon, s, s_next, noise=0.0, deviation=0.0):
    """DDIM's, as CompVis writes it."""
    (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
    x0 = (x - sigma * epsilon) / alpha
    return alpha_next * x0 + np.sqrt(sigma_next**2 - deviation**2) * epsilon + deviation * noise


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50])
def test_ddim_is_that_of_compvis(steps, eta):
    timesteps, x, ours, theirs = timesteps_of(steps), latent(), Noise(), Noise()
    levels = LEVELS[timesteps].tolist()
    for t, s, s_next in zip(timesteps, levels, [*levels[1:], LEVELS[0]]):
        (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
        deviation = eta * sigma_next / sigma * np.sqrt(1 - (alpha / alpha_next) ** 2)
        x = compvis_step(x, toy_model(x, t), s, s_next, theirs.draw() if eta else 0.0, deviation)
    table = step_table("DDIM", schedule(), steps, eta)
    assert len(table) == {30: 31, 7: 8}.get(steps, steps)
    np.testing.assert_allclose(run_table(table, latent(), ours), x, atol=1e-8)


@pytest.mark.parametrize("steps", [2, 7, 20, 30, 50])
def test_plms_is_that_of_compvis(steps):
    """Its first step takes the average of the slopes at its start and at its end."""
    timesteps, x, old = timesteps_of(steps), latent(), []
    levels = LEVELS[timesteps].tolist()
    for i, (t, s, s_next) in enumerate(zip(timesteps, levels, [*levels[1:], LEVELS[0]])):
        e = toy_model(x, t)
        if i == 0:
            slope = (e + toy_model(compvis_step(x, e, s, s_next), timesteps[1])) / 2
        else:
            weights = [(3, -1), (23, -16, 5), (55, -59, 37, -9)][min(i, 3) - 1]
            slope = sum(w * m for w, m in zip(weights, [e, *old])) / sum(weights)
        x, old = compvis_step(x, slope, s, s_next), [e, *old]
    np.testing.assert_allclose(run_table(step_table("PLMS", schedule(), steps), latent()), x, atol=1e-8)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [3, 10, 20, 30])
def test_unipc_is_of_order_3_with_bh1_on_uniform_times(steps, prediction_type):
    """diffusers' UniPC, given the levels of UniPC's own code: times from 1 to 1 / 1000, log alpha linear between."""
    count = len(timesteps_of(steps))
    times = np.linspace(1.0, 1 / 1000, count + 1)
    alphas = np.exp(np.interp(times, np.arange(1, 1001) / 1000, -0.5 * np.log(1 + LEVELS**2)))
    options = {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"}
    scheduler = diffusers.UniPCMultistepScheduler.from_config({**SD1, **options, "prediction_type": prediction_type})
    scheduler.set_timesteps(count)
    scheduler.sigmas = torch.from_numpy(np.sqrt(1 - alphas**2) / alphas)
    scheduler.timesteps = torch.from_numpy((times[:-1] - 1 / 1000) * 1000)
    expected = run_diffusers(scheduler, latent())
    table = step_table("UniPC", schedule(prediction_type), steps)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, atol=1e-9)
    np.testing.assert_allclose(run_table(table, latent()), expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("steps", [1, 2, 10, 11, 12])
def test_dpm_fast_evaluates_the_unet_once_a_step(steps):
    table = step_table("DPM fast", schedule(), steps)
    assert len(table) == steps
    assert table.timesteps[0] == 999
    assert table.initial_scale == pytest.approx(table.sigmas[0])


def test_restart_is_on_karras_levels():
    for steps in (10, 24, 40):
        table = step_table("Restart", schedule(), steps)
        assert len(table) == 2 * steps - 1
        assert table.draws.sum() == {10: 0, 24: 1, 40: 2}[steps]
