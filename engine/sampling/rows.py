"""The samplers, one row each: name, grid, solver and options. catalog.py finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .class_grids import euler_grid, fractional_grid, one_more_grid, strided_grid, successive_grid
from .ddpm import ddim, ddpm
from .dpm_solver import dpmpp_multistep
from .euler import euler, euler_ancestral
from .plms import plms
from .sampler import ANY, Options, Sampler, Webui
from .webui_grids import ddim_timesteps_grid


def _ddpm_arguments(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {"large_variance": config["variance_type"] == "fixed_large"}


def _dpm_arguments(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """diffusers counts all steps of the grid, also where a loop starts late."""
    return {
        "order": config["solver_order"],
        "heun": config["solver_type"] == "heun",
        "final_first_order": bool(config["euler_at_final"] or (config["lower_order_final"] and steps < 15)),
    }


_SPACING: Options = {"timestep_spacing": ANY, "steps_offset": ANY}
_KARRAS: Options = {"use_karras_sigmas": ANY, "use_exponential_sigmas": ANY, "use_beta_sigmas": ANY}
_FINAL: Options = {"final_sigmas_type": ("zero", "sigma_min")}
_FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
_DPM: Options = {
    **_SPACING,
    **_KARRAS,
    **_FINAL,
    "use_lu_lambdas": ANY,
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (1, 2),
    "solver_type": ("midpoint", "heun"),
    "lower_order_final": ANY,
    "euler_at_final": ANY,
    "lambda_min_clipped": ANY,
    "variance_type": (None, *_FIXED_VARIANCES),  # a variance that isn't learned changes nothing
}

ROWS = (
    Sampler(
        "ddim",
        "DDIM",
        "DDIMScheduler",
        strided_grid,
        ddim,
        {**_SPACING, "set_alpha_to_one": ANY},
        webui=Webui(grid=ddim_timesteps_grid),
        eta="eta",
    ),
    Sampler(
        "ddpm",
        "DDPM",
        "DDPMScheduler",
        successive_grid,
        ddpm,
        {**_SPACING, "variance_type": _FIXED_VARIANCES},
        arguments=_ddpm_arguments,
    ),
    Sampler(
        "euler",
        "Euler",
        "EulerDiscreteScheduler",
        euler_grid,
        euler,
        {
            **_SPACING,
            **_KARRAS,
            **_FINAL,
            "sigma_min": ANY,
            "sigma_max": ANY,
            "interpolation_type": ("linear", "log_linear"),
            "timestep_type": ("discrete", "continuous"),
        },
        webui=Webui(),
    ),
    Sampler(
        "euler_a",
        "Euler a",
        "EulerAncestralDiscreteScheduler",
        fractional_grid,
        euler_ancestral,
        _SPACING,
        webui=Webui(),
    ),
    Sampler(
        "dpmpp_2m",
        "DPM++ 2M",
        "DPMSolverMultistepScheduler",
        one_more_grid,
        dpmpp_multistep,
        _DPM,
        arguments=_dpm_arguments,
        webui=Webui("karras"),
    ),
    Sampler(
        "dpmpp_2m_karras",
        "DPM++ 2M Karras",
        "DPMSolverMultistepScheduler",
        one_more_grid,
        dpmpp_multistep,
        _DPM,
        preset={"use_karras_sigmas": True},
        arguments=_dpm_arguments,
    ),
    # Every Stable Diffusion model ships skip_prk_steps=true; a file that lacks it means the same.
    Sampler(
        "pndm",
        "PLMS",
        "PNDMScheduler",
        strided_grid,
        plms,
        {**_SPACING, "set_alpha_to_one": ANY, "skip_prk_steps": (True,)},
        preset={"skip_prk_steps": True},
        webui=Webui(grid=ddim_timesteps_grid),
        levels=False,
        own_timesteps=False,
    ),
)
