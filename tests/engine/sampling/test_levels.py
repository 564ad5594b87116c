"""The schedule types of A1111 against k-diffusion, SciPy and their formulas."""

import math

import numpy as np
import pytest
import scipy.stats

from engine.sampling.levels import AYS, AYS_SDXL, RULES, beta_quantile, sigma_to_timestep, timestep_to_sigma
from engine.sampling.schedule import Schedule
from tests.k_diffusion import sampling

from .test_class_grids import SD1

LEVELS = Schedule.from_config(SD1).sigmas()
LOW, HIGH = float(LEVELS[0]), float(LEVELS[-1])
STEPS = [1, 2, 5, 10, 20, 50]


def denoiser_sigmas(timesteps):
    """k-diffusion's DiscreteSchedule.t_to_sigma: linear in log s, written out."""
    below = np.floor(timesteps).astype(int)
    above, share = np.ceil(timesteps).astype(int), timesteps - np.floor(timesteps)
    return np.exp((1 - share) * np.log(LEVELS[below]) + share * np.log(LEVELS[above]))


def with_zero(sigmas):
    return [*sigmas, 0.0]


def interpolated(table, steps):
    """Log-linear in the place along the table, from its end."""
    places = np.linspace(0, 1, len(table))
    return np.exp(np.interp(np.linspace(0, 1, steps), places, np.log(table[::-1])))[::-1]


FORMULAS = {
    "uniform": lambda n: with_zero(denoiser_sigmas(np.linspace(999, 0, n))),
    "normal": lambda n: with_zero(denoiser_sigmas(np.linspace(999, 0, n))),
    "sgm_uniform": lambda n: with_zero(denoiser_sigmas(np.linspace(999, 0, n + 1)[:-1])),
    "karras": lambda n: sampling.get_sigmas_karras(n, LOW, HIGH).numpy(),
    "exponential": lambda n: sampling.get_sigmas_exponential(n, LOW, HIGH).numpy(),
    "polyexponential": lambda n: sampling.get_sigmas_polyexponential(n, LOW, HIGH).numpy(),
    "kl_optimal": lambda n: [math.tan(i / n * math.atan(LOW) + (1 - i / n) * math.atan(HIGH)) for i in range(n + 1)],
    "ays": lambda n: with_zero(interpolated(AYS, n)) if n > 1 else [AYS[0], 0],
    "ays_sdxl": lambda n: with_zero(interpolated(AYS_SDXL, n)) if n > 1 else [AYS_SDXL[0], 0],
    "simple": lambda n: with_zero(LEVELS[-(1 + int(i * 1000 / n))] for i in range(n)),
    "ddim_uniform": lambda n: with_zero([LEVELS[i] for i in range(1, 1000, 1000 // n)][::-1]),
    "beta": lambda n: with_zero(
        LOW + scipy.stats.beta.ppf(1 - i, 0.6, 0.6) * (HIGH - LOW) for i in np.linspace(0, 1, n)
    ),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", RULES)
def test_a_schedule_type_is_its_formula(name, steps):
    sigmas = RULES[name].sigmas(LEVELS, steps)
    np.testing.assert_allclose(sigmas, FORMULAS[name](steps), rtol=2e-6)  # k-diffusion's are float32
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_rho_bends_karras_and_polyexponential_levels(rho):
    for name, theirs in (
        ("karras", sampling.get_sigmas_karras),
        ("polyexponential", sampling.get_sigmas_polyexponential),
    ):
        np.testing.assert_allclose(RULES[name].sigmas(LEVELS, 12, rho=rho), theirs(12, LOW, HIGH, rho), rtol=5e-6)
    assert [name for name, rule in RULES.items() if rule.bends] == ["karras", "polyexponential"]


def test_align_your_steps_has_its_own_table_at_its_own_number_of_steps():
    np.testing.assert_allclose(RULES["ays"].sigmas(LEVELS, 11)[:-1], AYS)
    np.testing.assert_allclose(RULES["ays_sdxl"].sigmas(LEVELS, 11)[:-1], AYS_SDXL)


def test_the_inverse_of_the_incomplete_beta_function_is_scipys():
    p = np.concatenate([np.linspace(0, 1, 501), [1e-12, 1e-6, 0.5 - 1e-9, 1 - 1e-9]])
    for a in (0.3, 0.6, 0.9):
        np.testing.assert_allclose(beta_quantile(p, a), scipy.stats.beta.ppf(p, a, a), rtol=1e-12, atol=1e-300)


def test_timesteps_and_noise_levels_are_inverse_to_each_other():
    timesteps = np.array([999.0, 500.25, 0.5, 0.0])
    np.testing.assert_allclose(sigma_to_timestep(timestep_to_sigma(timesteps, LEVELS), LEVELS), timesteps, atol=1e-9)
    assert sigma_to_timestep(np.array([100.0, 1e-5]), LEVELS).tolist() == [999.0, 0.0]
