"""Noise schedules: what scheduler_config.json says about the forward process, in float64, and the types of its options.

Notation: ab_t is the product of (1 - beta) up to t ("alphas_cumprod"), alpha = sqrt(ab), sigma = sqrt(1 - ab), and
s = sigma / alpha is the noise level of k-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contract import Family
from ..errors import SchedulerConfigError, shown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
MAX_TRAIN_TIMESTEPS = 100_000
ZERO_SNR, WEBUI_ZERO_SNR = 2.0**-24, 4.8973451890853435e-08
"""What diffusers and A1111 take a zero terminal SNR for, as ab; samplers after k-diffusion divide by its root."""


def _is_integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low < value < high


def _are_betas(value: Any) -> bool:
    return isinstance(value, list) and 2 <= len(value) <= MAX_TRAIN_TIMESTEPS and all(map(_is_number(0, 1), value))


def _are_indices(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_integer(0, MAX_TRAIN_TIMESTEPS), value))


OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_train_timesteps": (f"an integer from 2 to {MAX_TRAIN_TIMESTEPS}", _is_integer(2, MAX_TRAIN_TIMESTEPS)),
    "beta_start": ("a number between 0 and 1", _is_number(0, 1)),
    "beta_end": ("a number between 0 and 1", _is_number(0, 1)),
    "trained_betas": ("a list of numbers between 0 and 1", _are_betas),
    "timestep_spacing": (f"one of {', '.join(SPACINGS)}", lambda value: isinstance(value, str) and value in SPACINGS),
    "steps_offset": ("an integer from 0 to 1000", _is_integer(0, 1000)),
    "solver_order": ("an integer from 1 to 3", _is_integer(1, 3)),
    "predictor_order": ("an integer from 1 to 4", _is_integer(1, 4)),
    "corrector_order": ("an integer from 1 to 4", _is_integer(1, 4)),
    "original_inference_steps": ("an integer from 1 to 1000", _is_integer(1, 1000)),
    "timestep_scaling": ("a number above 0", _is_number(0, math.inf)),
    "disable_corrector": ("a list of integers from 0 up", _are_indices),
    "sigma_min": ("a number above 0", _is_number(0, math.inf)),
    "clip_sample_range": ("a number above 0", _is_number(0, math.inf)),
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
            "predict_x0",
        )
    },
}
"""What the options that are read here must be, in words and as a test. diffusers takes null for false."""

NULLABLE = frozenset({"trained_betas", "sigma_min", "sigma_max", "variance_type"})
"""Options of which null says that there is none."""

BETAS: Mapping[str, Any] = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
"""diffusers' defaults, but for classes that have others."""

FORWARD_OPTIONS = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
        "clip_sample",
        "thresholding",
    }
)
"""The options that a Schedule reads itself, whatever the sampler is."""


@dataclass(frozen=True)
class Schedule:
    """The forward process and the shipped options of a model. `config` is its scheduler_config.json. learned_variance:
    the U-Net has outputs for it."""

    config: Mapping[str, Any]
    alphas_cumprod: np.ndarray
    prediction_type: str
    learned_variance: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], family: Family | None = None) -> Schedule:
        """Reads betas and prediction type as diffusers does; SchedulerConfigError for what is not known here, is of the
        wrong type, or is not for models of the family. None is a family whose samples are not clipped."""
        config = _checked(config)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise SchedulerConfigError(
                f"prediction_type {prediction_type!r} is not known; known: {', '.join(PREDICTION_TYPES)}"
            )
        clips = family is not None and family.clips
        for option in ("thresholding",) if clips else ("clip_sample", "thresholding"):
            if config.get(option):
                raise SchedulerConfigError(
                    f"{option}=true clamps the {'samples' if clips else 'latents'}, which no sampler here supports for "
                    "this kind of model; set it to false in scheduler_config.json"
                )
        if not clips:
            config["clip_sample"] = False
        learned_variance = family is not None and family.learned_variance
        return cls(config, _alphas_cumprod(config), prediction_type, learned_variance)

    @property
    def train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def exact_sigmas(self) -> np.ndarray:
        """s of every training timestep; infinite at a zero terminal SNR."""
        with np.errstate(divide="ignore"):
            return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    @property
    def zero_snr(self) -> bool:
        """Whether the last timestep has no signal."""
        return bool(self.config.get("rescale_betas_zero_snr"))

    def sigmas(self, last: float = ZERO_SNR) -> np.ndarray:
        """s of every training timestep. A zero terminal SNR is taken as ab = 2**-24 (s = 4096), as diffusers does, or
        as another ab."""
        sigmas = self.exact_sigmas()
        if self.zero_snr:
            sigmas[-1] = math.sqrt((1 - last) / last)
        return sigmas


def noising(config: Mapping[str, Any]) -> Schedule:
    """The forward process of a scheduler that only adds noise: what it would clamp does not matter.
    SchedulerConfigError as in `Schedule.from_config`."""
    return Schedule.from_config({**config, "clip_sample": False, "thresholding": False})


def wrong_option(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first option of the wrong type and what it must be: "false" would be true, and 1.5 would be 1."""
    for name, (rule, right) in OPTIONS.items():
        if name not in config or (config[name] is None and name in NULLABLE):
            continue
        if not right(config[name]):
            return name, rule
    return None


def _checked(config: Any) -> dict[str, Any]:
    """The options that say something. SchedulerConfigError for one of the wrong type."""
    if not isinstance(config, Mapping):
        raise SchedulerConfigError(
            f"the scheduler's configuration is {shown(config)}; it must be an object, as scheduler_config.json is"
        )
    wrong = wrong_option(config)
    if wrong is not None:
        name, rule = wrong
        raise SchedulerConfigError(
            f"scheduler option {name} is {shown(config[name])}; it must be {rule} (scheduler_config.json)"
        )
    return {name: value for name, value in config.items() if value is not None or name not in NULLABLE}


def _alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """ab of every training timestep; SchedulerConfigError where the noise doesn't grow with each of them in float64."""
    alphas_cumprod = np.cumprod(1 - _betas(config))
    if not (alphas_cumprod[0] < 1 and (np.diff(alphas_cumprod) < 0).all()):
        given = ", ".join(
            f"{name}={shown(config[name])}" for name in ("beta_start", "beta_end", "trained_betas") if name in config
        )
        raise SchedulerConfigError(
            f"the noise doesn't grow with every timestep: some of the betas ({given}) are so small or so large that "
            f"float64 loses them; correct them in scheduler_config.json"
        )
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod = _rescale_zero_terminal_snr(alphas_cumprod)
    return alphas_cumprod


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    if "trained_betas" in config:
        return np.asarray(config["trained_betas"], np.float64)
    chosen = {**BETAS, **config}
    name, count = chosen["beta_schedule"], int(config.get("num_train_timesteps", 1000))
    start, end = float(chosen["beta_start"]), float(chosen["beta_end"])
    if name == "linear":
        return np.linspace(start, end, count)
    if name == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    if name == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, count))) + start
    if name in CUMULATIVE:
        edges = CUMULATIVE[name](np.arange(count + 1) / count)
        return np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    known = ", ".join(("linear", "scaled_linear", "sigmoid", *CUMULATIVE))
    raise SchedulerConfigError(f"beta_schedule {name!r} is not known; known: {known}")


def _cosine(u: np.ndarray) -> np.ndarray:
    """arXiv 2102.09672, equation 17."""
    return np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential(u: np.ndarray) -> np.ndarray:
    return np.exp(-12 * u)


def _laplace(u: np.ndarray) -> np.ndarray:
    """arXiv 2407.03297 with mu = 0 and b = 1/2; its alpha is what diffusers takes for ab."""
    log_snr = -0.5 * np.copysign(1, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
    return 1 / np.sqrt(1 + np.exp(-log_snr))


CUMULATIVE: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "squaredcos_cap_v2": _cosine,
    "exp": _exponential,
    "laplace": _laplace,
}
"""Schedules that are given as ab of the time from 0 to 1."""


def _rescale_zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """arXiv 2305.08891, algorithm 1."""
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
