"""Noise levels by rule: the schedule types of A1111, k-diffusion and ComfyUI.

A rule is a function `(levels, steps) -> [N+1]`. `levels` [T] are the noise levels s = sigma / alpha of the training
timesteps, rising and finite. The result falls: the levels of N evaluations and the one that the last step goes to. N is
`steps` but for `ddim_uniform`, which takes one more for some. Sources: k-diffusion's `sampling.py` and `external.py`,
and for the rest the papers that are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
"""Align your steps (arXiv 2404.14507): the levels found for Stable Diffusion 1.5 and for SDXL."""


def sigma_to_timestep(sigma: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The fractional timesteps of noise levels, linear in log s between training timesteps. Only infinite noise is at
    an infinite last one."""
    finite = levels[:-1] if np.isinf(levels[-1]) else levels
    timesteps = np.interp(np.log(np.maximum(sigma, 1e-10)), np.log(finite), np.arange(len(finite)))
    return np.where(np.isinf(sigma), len(levels) - 1, timesteps)


def timestep_to_sigma(timesteps: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The noise levels of fractional timesteps, linear in log s: k-diffusion's `t_to_sigma`."""
    return np.exp(np.interp(timesteps, np.arange(len(levels)), np.log(levels)))


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """arXiv 2206.00364, equation 5."""
    ramp = np.linspace(0, 1, steps)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return _with_ends(sigmas, sigma_min, sigma_max)


def exponential_sigmas(sigma_min: float, sigma_max: float, steps: int) -> np.ndarray:
    """Evenly spaced in log s, and so in lambda = -log s (arXiv 2206.00927, section 3.3)."""
    sigmas = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))
    return _with_ends(sigmas, sigma_min, sigma_max)


def _with_ends(sigmas: np.ndarray, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Without the rounding errors of the ends, which would put the lowest level below where the last step goes."""
    sigmas[-1] = sigma_min
    sigmas[0] = sigma_max
    return sigmas


def beta_sigmas(sigma_min: float, sigma_max: float, steps: int) -> np.ndarray:
    """Quantiles of the beta distribution with both parameters 0.6 (arXiv 2407.12173)."""
    return sigma_min + (sigma_max - sigma_min) * beta_quantile(1 - np.linspace(0, 1, steps))


def beta_quantile(p: np.ndarray, a: float = 0.6) -> np.ndarray:
    """The inverse of the regularized incomplete beta function I_x(a, a). Newton's method in log x and log I, which are
    nearly proportional to each other up to x = 1/2; beyond that by symmetry."""
    below = np.minimum(p, 1 - p)
    inside = below > 0
    log_p = np.log(below[inside])
    log_beta = 2 * math.lgamma(a) - math.lgamma(2 * a)
    log_x = np.minimum((log_p + math.log(a) + log_beta) / a, math.log(0.5))
    for _ in range(8):
        x = np.exp(log_x)
        log_tail = a * log_x - math.log(a) - log_beta + np.log(_hypergeometric(x, a))
        density = np.exp(a * log_x + (a - 1) * np.log1p(-x) - log_beta)  # x times the density
        log_x = np.minimum(log_x - (log_tail - log_p) * np.exp(log_tail) / density, math.log(0.5))
    quantile = np.zeros_like(below)
    quantile[inside] = np.exp(log_x)
    return np.where(p > 0.5, 1 - quantile, quantile)


def _hypergeometric(x: np.ndarray, a: float) -> np.ndarray:
    """2F1(a, 1 - a; a + 1; x), whose terms halve at least where x is at most 1/2."""
    total, power = np.ones_like(x), np.ones_like(x)
    for k in range(56):
        power = power * x * (k + 1 - a) / (k + 1)
        total += power * a / (a + k + 1)
    return total


def _then_zero(sigmas: np.ndarray) -> np.ndarray:
    return np.append(sigmas, 0.0)


def _uniform(levels: np.ndarray, steps: int) -> np.ndarray:
    """k-diffusion's `get_sigmas`: timesteps evenly spaced from the last to the first."""
    return _then_zero(timestep_to_sigma(np.linspace(len(levels) - 1, 0, steps), levels))


def _sgm_uniform(levels: np.ndarray, steps: int) -> np.ndarray:
    """Evenly spaced timesteps for one step more, of which the last is left out."""
    return _then_zero(timestep_to_sigma(np.linspace(len(levels) - 1, 0, steps + 1)[:-1], levels))


def _karras(levels: np.ndarray, steps: int, rho: float = 7.0) -> np.ndarray:
    return _then_zero(karras_sigmas(levels[0], levels[-1], steps, rho))


def _exponential(levels: np.ndarray, steps: int) -> np.ndarray:
    return _then_zero(exponential_sigmas(levels[0], levels[-1], steps))


def _polyexponential(levels: np.ndarray, steps: int, rho: float = 1.0) -> np.ndarray:
    """k-diffusion's `get_sigmas_polyexponential`."""
    low, high = math.log(levels[0]), math.log(levels[-1])
    return _then_zero(np.exp(low + (high - low) * np.linspace(1, 0, steps) ** rho))


def _beta(levels: np.ndarray, steps: int) -> np.ndarray:
    return _then_zero(beta_sigmas(levels[0], levels[-1], steps))


def _kl_optimal(levels: np.ndarray, steps: int) -> np.ndarray:
    """Align your steps, theorem 3.1: evenly spaced in arctan s. It ends at the lowest level and not at no noise."""
    return np.tan(np.linspace(math.atan(levels[-1]), math.atan(levels[0]), steps + 1))


def _simple(levels: np.ndarray, steps: int) -> np.ndarray:
    """Whole timesteps from the last on, T / steps apart, rounded up."""
    down = (np.arange(steps) * (len(levels) / steps)).astype(int)
    return _then_zero(levels[len(levels) - 1 - down])


def _ddim_uniform(levels: np.ndarray, steps: int) -> np.ndarray:
    """Timesteps 1, 1 + T // steps, and so on. Where T // steps is less than T / steps there may be one more of them."""
    return _then_zero(levels[1 :: max(len(levels) // steps, 1)][::-1])


def _ays(levels: np.ndarray, steps: int) -> np.ndarray:
    return _then_zero(_resampled(AYS, steps))


def _ays_sdxl(levels: np.ndarray, steps: int) -> np.ndarray:
    return _then_zero(_resampled(AYS_SDXL, steps))


def _resampled(sigmas: tuple[float, ...], steps: int) -> np.ndarray:
    """Another number of levels, linear in log s along the given ones."""
    places = np.linspace(0, 1, len(sigmas))
    return np.exp(np.interp(np.linspace(0, 1, steps), places, np.log(sigmas)))


@dataclass(frozen=True)
class LevelRule:
    """label: A1111's name; sigmas: the rule; bends: whether it takes `rho`, the exponent that bends it."""

    label: str
    sigmas: Callable[..., np.ndarray]
    bends: bool = False


RULES: Mapping[str, LevelRule] = {
    "uniform": LevelRule("Uniform", _uniform),
    "karras": LevelRule("Karras", _karras, bends=True),
    "exponential": LevelRule("Exponential", _exponential),
    "polyexponential": LevelRule("Polyexponential", _polyexponential, bends=True),
    "sgm_uniform": LevelRule("SGM Uniform", _sgm_uniform),
    "kl_optimal": LevelRule("KL Optimal", _kl_optimal),
    "ays": LevelRule("Align Your Steps", _ays),
    "ays_sdxl": LevelRule("Align Your Steps SDXL", _ays_sdxl),
    "simple": LevelRule("Simple", _simple),
    "normal": LevelRule("Normal", _uniform),
    "ddim_uniform": LevelRule("DDIM", _ddim_uniform),
    "beta": LevelRule("Beta", _beta),
}
"""The rules by name."""
