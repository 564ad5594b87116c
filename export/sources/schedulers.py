"""The scheduler that a bundle ships: read as diffusers reads it, refused where the runtime has no such sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np

from engine.errors import EngineError, shown
from engine.sampling.samplers import SAMPLERS, sampler_name, step_table
from engine.sampling.schedule import Schedule

from ..errors import UnreadableModelError, UnsupportedModelError, UsageError
from .reading import cause

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
"""diffusers' class of each sampler, and the options that make it that sampler."""

NOISE_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
    "skip_prk_steps",
)
"""What describes the model's noise and its grid of timesteps, and so outlives another scheduler."""

STEPS = (2, 20, 50)
"""Numbers of steps that must work: the verification's, and what a call without num_inference_steps takes."""

LEAST_TIMESTEPS, MOST_TIMESTEPS = STEPS[-1], 100_000
BOOLEANS = (
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
    "skip_prk_steps",
    "clip_sample",
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_flow_sigmas",
    "lower_order_final",
    "euler_at_final",
)


def asked_sampler(name: str) -> str:
    """The name in SAMPLERS that `--scheduler` means by it or by a diffusers class name; UsageError for others."""
    try:
        return sampler_name(name, Schedule.from_config({}))
    except EngineError as error:
        raise UsageError(f"--scheduler {name!r} is not known; known: {', '.join(SAMPLERS)}") from error


def shipped(config: Mapping[str, Any], where: str, sampler: str | None = None) -> dict[str, Any]:
    """scheduler_config.json as diffusers' StableDiffusionPipeline uses it (steps_offset 1, nothing clipped), or that of
    another sampler with the noise and the grid that it describes. Raises UnreadableModelError or UnsupportedModelError
    where a picture cannot be made with it."""
    if sampler is not None:
        name, extra = CLASSES[sampler]
        config = {
            "_class_name": name,
            **{option: config[option] for option in NOISE_OPTIONS if option in config},
            **extra,
        }
    _check_class(config, where)
    _check_values(config, where)
    config = {**config, "steps_offset": 1, "clip_sample": False}
    _check_sampler(config, where)
    _check_diffusers(config, where)
    return config


def _check_class(config: Mapping[str, Any], where: str) -> None:
    found = config.get("_class_name")
    if not isinstance(found, str) or found not in {name for name, _ in CLASSES.values()}:
        raise UnsupportedModelError(
            f"{where} has the scheduler {shown(found)} (_class_name), which the runtime does not have; {_remedy()}"
        )
    if found == "PNDMScheduler" and config.get("skip_prk_steps") is not True:
        raise UnsupportedModelError(
            f"{where} is a PNDMScheduler without skip_prk_steps=true, whose Runge-Kutta steps the runtime does not "
            f"have; {_remedy()}"
        )


def _remedy() -> str:
    return f"ship another with --scheduler NAME: {', '.join(SAMPLERS)}"


def _check_values(config: Mapping[str, Any], where: str) -> None:
    """UnreadableModelError for numbers and switches that are none."""

    def refuse(name: str, rule: str) -> None:
        raise UnreadableModelError(f"{where} has {name}={shown(config[name])}; it must be {rule}")

    for name, low, high in (
        ("num_train_timesteps", LEAST_TIMESTEPS, MOST_TIMESTEPS),
        ("steps_offset", 0, MOST_TIMESTEPS),
    ):
        if name in config and not (_is_integer(config[name]) and low <= config[name] <= high):
            refuse(name, f"an integer from {low} to {high}")
    for name in ("beta_start", "beta_end"):
        if name in config and not (_is_number(config[name]) and 0 < config[name] < 1):
            refuse(name, "a number between 0 and 1")
    for name in BOOLEANS:
        if name in config and config[name] not in (None, True, False):
            refuse(name, "true or false")
    betas = config.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, list)
        and LEAST_TIMESTEPS <= len(betas) <= MOST_TIMESTEPS
        and all(_is_number(beta) and 0 < beta < 1 for beta in betas)
    ):
        refuse("trained_betas", f"null or a list of {LEAST_TIMESTEPS} or more numbers between 0 and 1")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_sampler(config: Mapping[str, Any], where: str) -> None:
    """That the runtime makes a table of steps of it."""
    try:
        schedule = Schedule.from_config(config)
        for steps in STEPS:
            table = step_table(sampler_name(None, schedule), schedule, steps)
            if not (
                np.isfinite(table.timesteps).all()
                and table.timesteps.min() >= 0
                and table.timesteps.max() < schedule.train_timesteps
            ):
                raise UnsupportedModelError(
                    f"{where} gives timesteps outside of the model's {schedule.train_timesteps} for {steps} steps; "
                    f"{_remedy()}"
                )
    except EngineError as error:
        raise UnsupportedModelError(f"{where}: {error}. Or {_remedy()}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnreadableModelError(f"{where} is no usable scheduler: {cause(error)}; {_remedy()}") from error


def _check_diffusers(config: Mapping[str, Any], where: str) -> None:
    """That diffusers takes it too, which the verification compares with."""
    try:
        getattr(diffusers, config["_class_name"]).from_config(config).set_timesteps(STEPS[-1])
    except Exception as error:  # its schedulers raise what their arithmetic raises
        raise UnreadableModelError(f"{where} is not accepted by diffusers: {cause(error)}; {_remedy()}") from error
