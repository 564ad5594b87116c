"""The scheduler that a bundle ships: read as diffusers reads it, refused where the runtime has no such sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from engine.contract import Family
from engine.errors import EngineError, shown
from engine.sampling.catalog import SAMPLERS, sampler_name, step_table
from engine.sampling.schedule import FORWARD_OPTIONS, Schedule, wrong_option
from engine.sampling.scheduler_classes import CLASSES

from ..errors import UnreadableModelError, UnsupportedModelError, UsageError
from .reading import cause

NOISE_OPTIONS = (
    *sorted(FORWARD_OPTIONS - {"clip_sample", "thresholding"}),
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "skip_prk_steps",
)
"""The options that describe the model's noise and its timesteps. Another scheduler keeps them."""

SHIPPED = tuple(
    name
    for name, row in SAMPLERS.items()
    if row.scheduler_class is not None and name not in ("pndm_prk", "ipndm_sine", "dpmpp_sde")
)
"""The samplers that a bundle may ship. PNDM's Runge-Kutta steps need more steps than the verification takes;
IPNDMScheduler starts differently and DPMSolverSDEScheduler draws its noise from another library, so neither gives
diffusers' picture."""
SAMPLE_OPTIONS = ("clip_sample", "clip_sample_range", "variance_type")
"""What else describes a model on pixels."""

STEPS = (2, 20, 50)
"""Numbers of steps that must work: the verification's, and what a call without num_inference_steps takes."""

LEAST_TIMESTEPS = STEPS[-1]


def asked_sampler(name: str) -> str:
    """The name in SHIPPED that `--scheduler` means by it or by a diffusers class name; UsageError for others."""
    try:
        found = sampler_name(name, Schedule.from_config({}))
    except EngineError as error:
        raise UsageError(f"--scheduler {name!r} is not known; known: {', '.join(SHIPPED)}") from error
    if found not in SHIPPED:
        raise UsageError(
            f"--scheduler {name!r} is {found}, which a bundle cannot ship (calls can take it); known: "
            f"{', '.join(SHIPPED)}"
        )
    return found


def shipped(config: Mapping[str, Any], where: str, sampler: str | None = None) -> dict[str, Any]:
    """scheduler_config.json as diffusers' StableDiffusionPipeline uses it (steps_offset 1, nothing clipped), or that of
    another sampler with the noise and the grid that it describes. Raises UnreadableModelError or UnsupportedModelError
    where a picture cannot be made with it."""
    config = _with_sampler(config, sampler, NOISE_OPTIONS)
    _check_class(config, where)
    _check_values(config, where)
    config = {**config, "steps_offset": 1, "clip_sample": False}
    _check_sampler(config, where)
    _check_diffusers(config, where)
    return config


def of_family(config: Mapping[str, Any], where: str, sampler: str | None, family: Family) -> dict[str, Any]:
    """scheduler_config.json as diffusers' pipeline of a family with texts uses it: that of `shipped`, but for depth,
    InstructPix2Pix and the upscaler that of `kept`. Raises the errors of `shipped`."""
    if family.joins in (None, "mask"):
        return shipped(config, where, sampler)
    return kept(config, where, sampler, family)


def kept(config: Mapping[str, Any], where: str, sampler: str | None, family: Family) -> dict[str, Any]:
    """scheduler_config.json as diffusers' pipelines before Stable Diffusion use it: as it is, or that of another
    sampler. Raises the errors of `shipped`."""
    config = _with_sampler(config, sampler, (*NOISE_OPTIONS, *SAMPLE_OPTIONS) if family.clips else NOISE_OPTIONS)
    if not family.clips:  # what is not there is true in DDIM and DDPM, and would clip the latents
        config = {**_clip_default(config), **config} if sampler is None else {**config, "clip_sample": False}
    _check_class(config, where)
    _check_values(config, where)
    _check_sampler(config, where, family)
    _check_diffusers(config, where)
    return config


def _clip_default(config: Mapping[str, Any]) -> dict[str, Any]:
    own = CLASSES.get(str(config.get("_class_name")), {})
    return {"clip_sample": own["clip_sample"]} if "clip_sample" in own else {}


def _with_sampler(config: Mapping[str, Any], sampler: str | None, options: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of another sampler with these options of the model's, if there is another."""
    if sampler is None:
        return dict(config)
    row = SAMPLERS[sampler]
    own = {option: config[option] for option in options if option in config}
    return {"_class_name": row.scheduler_class, **own, **row.preset}


def _check_class(config: Mapping[str, Any], where: str) -> None:
    found = config.get("_class_name")
    if not isinstance(found, str) or found not in {SAMPLERS[name].scheduler_class for name in SHIPPED}:
        raise UnsupportedModelError(
            f"{where} has the scheduler {shown(found)} (_class_name), which a bundle cannot ship; {_remedy()}"
        )
    if found == "PNDMScheduler" and config.get("skip_prk_steps") is not True:
        raise UnsupportedModelError(
            f"{where} is a PNDMScheduler without skip_prk_steps=true, whose Runge-Kutta steps need more steps than the "
            f"verification takes; {_remedy()}"
        )


def _remedy() -> str:
    return f"ship another with --scheduler NAME: {', '.join(SHIPPED)}"


def _check_values(config: Mapping[str, Any], where: str) -> None:
    """UnreadableModelError for options of the wrong type, and for fewer timesteps than the runtime takes steps."""
    wrong = wrong_option(config)
    if wrong is not None:
        name, rule = wrong
        raise UnreadableModelError(f"{where} has {name}={shown(config[name])}; it must be {rule}")
    betas = config.get("trained_betas")
    if betas is not None and len(betas) < LEAST_TIMESTEPS:
        raise UnreadableModelError(
            f"{where} has trained_betas={shown(betas)}; it must be null or a list of {LEAST_TIMESTEPS} or more numbers"
        )
    if config.get("num_train_timesteps", LEAST_TIMESTEPS) < LEAST_TIMESTEPS:
        raise UnreadableModelError(
            f"{where} has num_train_timesteps={config['num_train_timesteps']}; it must be {LEAST_TIMESTEPS} or more"
        )


def _check_sampler(config: Mapping[str, Any], where: str, family: Family | None = None) -> None:
    """Checks that the runtime can make a table with it."""
    try:
        schedule = Schedule.from_config(config, family)
        for steps in STEPS:
            step_table(sampler_name(None, schedule), schedule, steps)
    except EngineError as error:
        raise UnsupportedModelError(f"{where}: {error}. Or {_remedy()}") from error


def _check_diffusers(config: Mapping[str, Any], where: str) -> None:
    """Checks that diffusers accepts it too, because the verification compares with diffusers."""
    try:
        getattr(diffusers, config["_class_name"]).from_config(config).set_timesteps(STEPS[-1])
    except Exception as error:  # its schedulers raise what their arithmetic raises
        raise UnreadableModelError(f"{where} is not accepted by diffusers: {cause(error)}; {_remedy()}") from error
