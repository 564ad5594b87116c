"""Noise schedules: what scheduler_config.json says about the forward process, in float64.

Notation: ab_t is the product of (1 - beta) up to t ("alphas_cumprod"), alpha = sqrt(ab), sigma = sqrt(1 - ab), and
s = sigma / alpha is the noise level of k-diffusion. The state of a sampler here is VP-scaled: x = alpha x0 + sigma eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SchedulerConfigError, shown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
MAX_TRAIN_TIMESTEPS = 100_000


def _is_integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low < value < high


def _are_betas(value: Any) -> bool:
    return isinstance(value, list) and 2 <= len(value) <= MAX_TRAIN_TIMESTEPS and all(map(_is_number(0, 1), value))


OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_train_timesteps": (f"an integer from 2 to {MAX_TRAIN_TIMESTEPS}", _is_integer(2, MAX_TRAIN_TIMESTEPS)),
    "beta_start": ("a number between 0 and 1", _is_number(0, 1)),
    "beta_end": ("a number between 0 and 1", _is_number(0, 1)),
    "trained_betas": ("a list of numbers between 0 and 1", _are_betas),
    "timestep_spacing": (f"one of {', '.join(SPACINGS)}", lambda value: isinstance(value, str) and value in SPACINGS),
    "steps_offset": ("an integer from 0 to 1000", _is_integer(0, 1000)),
    "solver_order": ("an integer from 1 to 3", _is_integer(1, 3)),
    "sigma_min": ("a number above 0", _is_number(0, math.inf)),
    "sigma_max": ("a number above 0", _is_number(0, math.inf)),
    "lambda_min_clipped": (
        "a number or -Infinity",
        lambda value: value == -math.inf or _is_number(-math.inf, math.inf)(value),
    ),
    **{
        name: ("a string", lambda value: isinstance(value, str))
        for name in (
            "_class_name",
            "prediction_type",
            "beta_schedule",
            "variance_type",
            "algorithm_type",
            "solver_type",
            "final_sigmas_type",
            "interpolation_type",
            "timestep_type",
        )
    },
    **{
        name: ("true or false", lambda value: value is None or isinstance(value, bool))
        for name in (
            "clip_sample",
            "thresholding",
            "set_alpha_to_one",
            "rescale_betas_zero_snr",
            "skip_prk_steps",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "use_lu_lambdas",
            "use_flow_sigmas",
            "euler_at_final",
            "lower_order_final",
        )
    },
}
"""What the options that are read here must be, in words and as a test. diffusers takes null for false."""

NULLABLE = frozenset({"trained_betas", "sigma_min", "sigma_max", "variance_type"})
"""Options of which null says that there is none."""


@dataclass(frozen=True)
class Schedule:
    """The forward process and the shipped options of a model. `config` is its scheduler_config.json."""

    config: Mapping[str, Any]
    alphas_cumprod: np.ndarray
    prediction_type: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Reads betas and prediction type as diffusers does; SchedulerConfigError for what is not known here or is of
        the wrong type."""
        config = _checked(config)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise SchedulerConfigError(
                f"prediction_type {prediction_type!r} is not known; known: {', '.join(PREDICTION_TYPES)}"
            )
        for option in ("clip_sample", "thresholding"):
            if config.get(option):
                raise SchedulerConfigError(
                    f"{option}=true clamps the latents, which no latent diffusion model wants and no sampler "
                    f"here does; set it to false in scheduler_config.json"
                )
        alphas_cumprod = np.cumprod(1 - _betas(config))
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _rescale_zero_terminal_snr(alphas_cumprod)
        return cls(config, alphas_cumprod, prediction_type)

    @property
    def train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def option(self, name: str, default: Any, allowed: tuple[Any, ...]) -> Any:
        """An option of scheduler_config.json, or diffusers' default for it; SchedulerConfigError if it is none of
        `allowed`."""
        value = self.config.get(name, default)
        if value not in allowed:
            raise SchedulerConfigError(
                f"scheduler option {name}={value!r} is not supported; supported: {', '.join(repr(a) for a in allowed)}"
            )
        return value

    def sigmas(self) -> np.ndarray:
        """s of every training timestep. A zero terminal SNR is taken as ab = 2**-24 (s = 4096), as diffusers does."""
        alphas_cumprod = self.alphas_cumprod
        if self.config.get("rescale_betas_zero_snr"):
            alphas_cumprod = np.append(alphas_cumprod[:-1], 2.0**-24)
        return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def _checked(config: Any) -> dict[str, Any]:
    """The options that say something. SchedulerConfigError for one of the wrong type: "false" would be true, and 1.5
    would be 1."""
    if not isinstance(config, Mapping):
        raise SchedulerConfigError(
            f"the scheduler's configuration is {shown(config)}; it must be an object, as scheduler_config.json is"
        )
    given = {name: value for name, value in config.items() if value is not None or name not in NULLABLE}
    for name, (rule, right) in OPTIONS.items():
        if name in given and not right(given[name]):
            raise SchedulerConfigError(
                f"scheduler option {name} is {shown(given[name])}; it must be {rule} (scheduler_config.json)"
            )
    return given


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    if "trained_betas" in config:
        return np.asarray(config["trained_betas"], np.float64)
    name, count = config.get("beta_schedule", "linear"), int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if name == "linear":
        return np.linspace(start, end, count)
    if name == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    if name == "squaredcos_cap_v2":
        edges = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    raise SchedulerConfigError(f"beta_schedule {name!r} is not known; known: linear, scaled_linear, squaredcos_cap_v2")


def _rescale_zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """arXiv 2305.08891, algorithm 1."""
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def spaced_timesteps(schedule: Schedule, steps: int, default_spacing: str) -> np.ndarray:
    """Timesteps from high to low as DDIM, DDPM, PNDM and Euler of diffusers space them; not rounded where "linspace"
    is not (arXiv 2305.08891, table 2)."""
    total = schedule.train_timesteps
    spacing = schedule.option("timestep_spacing", default_spacing, SPACINGS)
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps)[::-1] * float(total // steps) + schedule.config.get("steps_offset", 0)
    return np.round(np.arange(total, 0, -total / steps)) - 1


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int) -> np.ndarray:
    """arXiv 2206.00364, equation 5, with rho = 7."""
    ramp = np.linspace(0, 1, steps)
    return (sigma_max ** (1 / 7) + ramp * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7


def sigma_to_timestep(sigma: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The fractional timesteps of noise levels, linear in log s between training timesteps."""
    return np.interp(np.log(np.maximum(sigma, 1e-10)), np.log(sigmas), np.arange(len(sigmas)))
