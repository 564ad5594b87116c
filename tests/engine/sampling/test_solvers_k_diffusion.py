"""Every solver that k-diffusion has equals its function: the same latents after a whole loop of a non-linear toy model,
in float64."""

from functools import partial

import numpy as np
import pytest
import torch

from engine.sampling.adams import lms
from engine.sampling.dpm2 import dpm2, dpm2_ancestral
from engine.sampling.dpm_solver import dpmpp_multistep
from engine.sampling.dpmpp_ancestral import dpmpp_2s_ancestral, dpmpp_sde
from engine.sampling.euler import euler, euler_ancestral
from engine.sampling.heun import Restarts, automatic_restarts, heun, restart
from engine.sampling.orders import fast_orders
from engine.sampling.singlestep import dpm_fast
from engine.sampling.table import vp

from .references import (
    LEVELS,
    Brownian,
    Noise,
    denoiser,
    grid_of_sigmas,
    karras,
    latent,
    run_k_diffusion,
    run_table,
    sampling,
)

STEPS = (1, 2, 5, 10, 20, 50)
KINDS = ("epsilon", "v_prediction")
CHURN = {"s_churn": 15.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.007}
SOME = {"eta": 0.6, "s_noise": 1.01}


def check(actual, expected, steps):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, atol=1e-5 * scale, rtol=0, err_msg=f"{steps} steps")


DETERMINISTIC = {
    "euler": ("euler", euler, {}),
    "heun": ("heun", heun, {}),
    "dpm2": ("dpm_2", dpm2, {}),
    "lms": ("lms", lms, {}),
    "lms of order 2": ("lms", lms, {"order": 2}),
    "2m": ("dpmpp_2m", dpmpp_multistep, {}),
}


@pytest.mark.parametrize(("kind", "final"), [("epsilon", 0.0), ("v_prediction", 0.0), ("v_prediction", 0.01)])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_solver_equals_k_diffusion(name, kind, final):
    function, solver, options = DETERMINISTIC[name]
    for steps in STEPS:
        sigmas = karras(steps, final)
        expected = run_k_diffusion(function, sigmas, latent(), kind, **options)
        table = solver(grid_of_sigmas(sigmas, kind), **options)
        actual = run_table(table, latent())
        if name == "2m":  # VP-scaled to the end
            actual = actual / vp(final)[0]
        check(actual, expected, steps)


STOCHASTIC = {
    "euler a": ("euler_ancestral", euler_ancestral, {}),
    "euler a with options": ("euler_ancestral", euler_ancestral, SOME),
    "dpm2 a": ("dpm_2_ancestral", dpm2_ancestral, {}),
    "dpm2 a with options": ("dpm_2_ancestral", dpm2_ancestral, SOME),
    "2s a": ("dpmpp_2s_ancestral", dpmpp_2s_ancestral, {}),
    "2s a with options": ("dpmpp_2s_ancestral", dpmpp_2s_ancestral, SOME),
    "2s a without noise": ("dpmpp_2s_ancestral", dpmpp_2s_ancestral, {"eta": 0.0}),
    "sde": ("dpmpp_sde", dpmpp_sde, {}),
    "sde with options": ("dpmpp_sde", dpmpp_sde, {**SOME, "r": 0.3}),
    "2m sde": ("dpmpp_2m_sde", dpmpp_multistep, {"eta": 1.0}),
    "2m sde with options": ("dpmpp_2m_sde", dpmpp_multistep, SOME),
    "2m sde heun": ("dpmpp_2m_sde", dpmpp_multistep, {"eta": 1.0, "heun": True}),
    "3m sde": ("dpmpp_3m_sde", dpmpp_multistep, {"eta": 1.0, "order": 3, "heun": True}),
    "3m sde with options": ("dpmpp_3m_sde", dpmpp_multistep, {**SOME, "order": 3, "heun": True}),
}


def their_options(options):
    theirs = {name: value for name, value in options.items() if name in ("eta", "s_noise", "r")}
    if "heun" in options and "order" not in options:
        theirs["solver_type"] = "heun"
    return theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_solver_equals_k_diffusion(name, kind):
    function, solver, options = STOCHASTIC[name]
    # k-diffusion's 2M SDE and 3M SDE end with an UnboundLocalError after a single step.
    for steps in STEPS if solver is not dpmpp_multistep else STEPS[1:]:
        sigmas = karras(steps)
        noise = Brownian() if function == "dpmpp_sde" else Noise().torch
        expected = run_k_diffusion(function, sigmas, latent(), kind, noise_sampler=noise, **their_options(options))
        ours = Brownian() if function == "dpmpp_sde" else Noise()
        check(run_table(solver(grid_of_sigmas(sigmas, kind), **options), latent(), ours), expected, steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("function", "solver"), [("euler", euler), ("heun", heun), ("dpm_2", dpm2)])
def test_churn_equals_k_diffusion(function, solver, kind, monkeypatch):
    """Its first noise is part of the table's first latent; the noise of the others is drawn a step earlier."""
    for steps in STEPS:
        sigmas = karras(steps)
        table = solver(grid_of_sigmas(sigmas, kind), **CHURN)
        first = table.sigmas[0] / table.alphas[0] / sigmas[0]
        gammas = [min(15 / steps, 2**0.5 - 1) if 0.1 <= s <= 10 else 0 for s in sigmas[:-1]]
        assert first == pytest.approx(1 + gammas[0])
        noise, ours = Noise(), Noise()
        draws = iter([torch.zeros(1) if i == 0 or gamma == 0 else noise.torch() for i, gamma in enumerate(gammas)])
        monkeypatch.setattr(sampling.torch, "randn_like", lambda x, draws=draws: next(draws))
        expected = run_k_diffusion(function, sigmas, latent(), kind, **CHURN)
        check(run_table(table, latent(), ours), expected, steps)
        assert ours.drawn == noise.drawn


@pytest.mark.parametrize("solver", [euler, heun, dpm2])
def test_churn_at_the_first_step_starts_from_more_noise(solver):
    """y0 = s0 z + sqrt(s_hat^2 - s0^2) s_noise z' has the deviation that the table starts with."""
    grid = grid_of_sigmas(karras(5))
    table = solver(grid, s_churn=1.0, s_noise=1.1)
    s, s_hat = grid.sigmas[0], 1.2 * grid.sigmas[0]
    y = np.hypot(np.hypot(1, s), 1.1 * np.sqrt(s_hat**2 - s**2))
    assert table.initial_scale == pytest.approx(y / np.hypot(1, s_hat))
    assert (table.alphas[0], table.timesteps[0]) == pytest.approx((1 / np.hypot(1, s_hat), 999))


@pytest.mark.parametrize("options", [{}, SOME])
@pytest.mark.parametrize("kind", KINDS)
def test_dpm_fast_equals_k_diffusion(kind, options, monkeypatch):
    exact = partial(torch.linspace, dtype=torch.float64)  # k-diffusion spaces its steps in float32
    monkeypatch.setattr(sampling.torch, "linspace", exact)
    for evaluations in STEPS:
        sigmas = np.geomspace(LEVELS[-1], LEVELS[0], evaluations // 3 + 2)
        y = torch.from_numpy(latent() * np.hypot(1, sigmas[0]))
        expected = sampling.sample_dpm_fast(
            denoiser(kind),
            y,
            sigmas[-1],
            sigmas[0],
            evaluations,
            disable=True,
            noise_sampler=Noise().torch,
            **options,
        ).numpy()
        table = dpm_fast(grid_of_sigmas(sigmas, kind), evaluations, **options)
        assert len(table) == evaluations
        check(run_table(table, latent(), Noise()), expected, evaluations)


def segments(levels, plan):
    """The levels between restarts, each with the one that it goes back to."""
    bottom = int(np.abs(levels - plan.s_min).argmin())
    top = int(np.abs(levels - plan.s_max).argmin())
    ramp = np.linspace(0, 1, plan.levels)
    low, high = levels[bottom] ** (1 / 7), levels[top] ** (1 / 7)
    again = (high + ramp * (low - high)) ** 7
    return [levels[: bottom + 1], *[again] * plan.times, levels[bottom:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [20, 50])
def test_restart_is_heun_that_goes_back_and_adds_noise(steps, kind):
    """A1111's rule: 9 of 20 steps are a restart, and of 50 two of 12 are."""
    count, times = (9, 1) if steps == 20 else (12, 2)
    plan = Restarts(0.1, 2.0, count + 1, times)
    noise, s = Noise(), karras(1)[0]
    y = torch.from_numpy(latent() * np.hypot(1, s))
    parts = segments(karras(steps - count * times), plan)
    for before, part in zip([None, *parts], parts):
        if before is not None and part[0] > before[-1]:
            y = y + 1.01 * noise.torch() * np.sqrt(part[0] ** 2 - before[-1] ** 2)
        y = sampling.sample_heun(denoiser(kind), y, torch.from_numpy(part), disable=True)
    table, ours = restart(grid_of_sigmas(karras(steps), kind), s_noise=1.01), Noise()
    check(run_table(table, latent(), ours), y.numpy(), steps)
    assert ours.drawn == noise.drawn == times
    assert len(table) == 2 * steps - 1


def test_restarts_can_be_given():
    plan = Restarts(s_min=0.5, s_max=3.0, levels=4, times=2)
    table = restart(grid_of_sigmas(karras(8)), [plan])
    assert len(table) == 2 * (8 + 2 * 3) - 1
    assert table.draws.sum() == 2
    assert automatic_restarts(karras(19)) == (karras(19).tolist(), [])


@pytest.mark.parametrize("evaluations", range(1, 12))
def test_dpm_fast_takes_as_many_evaluations_as_it_is_given(evaluations):
    orders = fast_orders(evaluations)
    assert (sum(orders), len(orders)) == (evaluations, evaluations // 3 + 1)
