"""The samplers, one row each: name, grid, solver and options. catalog.py finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adams import deis, ipndm, lms
from .class_grids import (
    consistency_grid,
    euler_grid,
    fractional_grid,
    midpoint_grid,
    one_more_grid,
    sine_grid,
    strided_grid,
    successive_grid,
    trajectory_grid,
)
from .consistency import lcm, tcd
from .ddpm import ddim, ddpm
from .dpm2 import dpm2, dpm2_ancestral
from .dpm_solver import dpm_multistep, dpmpp_multistep
from .dpmpp_ancestral import dpmpp_2s_ancestral, dpmpp_sde
from .euler import euler, euler_ancestral
from .heun import heun, restart
from .plms import plms, pndm
from .sa_solver import sa_solver
from .sampler import ANY, LEARNED_VARIANCES, Options, Parameter, Sampler, Webui, number, whole
from .singlestep import dpm_fast, dpm_singlestep, dpmpp_singlestep
from .unipc import unipc
from .webui_grids import ddim_timesteps_grid, dpm_fast_grid, unipc_grid

Arguments = dict[str, Any]
Parameters = Mapping[str, Parameter]


def _clip_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {"clip_range": config["clip_sample_range"] if config["clip_sample"] else None}


def _ddpm_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {"variance_type": config["variance_type"], **_clip_arguments(config, steps)}


def _dpm_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    """diffusers counts all steps of the grid, also where a loop starts late."""
    few = bool(config["lower_order_final"] and steps < 15)
    return {
        "order": config["solver_order"],
        "heun": config["solver_type"] == "heun",
        "final_first_order": bool(config["euler_at_final"]) or few,
        "final_second_order": few,
    }


def _sde_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {**_dpm_arguments(config, steps), "eta": 1.0, "diffusers_third_order": True}


def _noise_sde_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {**_dpm_arguments(config, steps), "sde": True}


def _singlestep_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {
        "order": config["solver_order"],
        "heun": config["solver_type"] == "heun",
        "lower_order_final": bool(config["lower_order_final"]),
        "steps": steps,
    }


def _singlestep_sde_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {**_singlestep_arguments(config, steps), "eta": 1.0, "diffusers_third_order": True}


def _deis_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    few = bool(config["lower_order_final"] and steps < 15)
    return {"order": config["solver_order"], "final_first_order": few, "final_second_order": few}


def _unipc_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {
        "order": config["solver_order"],
        "bh1": config["solver_type"] == "bh1",
        "predict_x0": bool(config["predict_x0"]),
        "lower_order_final": bool(config["lower_order_final"]),
        "disable_corrector": tuple(config["disable_corrector"]),
    }


def _sa_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {
        "predictor_order": config["predictor_order"],
        "corrector_order": config["corrector_order"],
        "predict_x0": config["algorithm_type"] == "data_prediction",
        "lower_order_final": bool(config["lower_order_final"]),
    }


def _lcm_arguments(config: Mapping[str, Any], steps: int) -> Arguments:
    return {"timestep_scaling": config["timestep_scaling"]}


_SPACING: Options = {"timestep_spacing": ANY, "steps_offset": ANY}
_LEVELS: Options = {"use_karras_sigmas": ANY, "use_exponential_sigmas": ANY, "use_beta_sigmas": ANY}
_FINAL: Options = {"final_sigmas_type": ("zero", "sigma_min")}
_RANGE: Options = {"sigma_min": ANY, "sigma_max": ANY}
_CLIPPING: Options = {"clip_sample_range": ANY}
_FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
_SOLVER_TYPES = ("midpoint", "heun", "logrho", "bh1", "bh2")
"""Classes take the names of other classes for their own first one, so that their files can be switched."""

_MULTISTEP: Options = {
    "solver_order": (1, 2, 3),
    "solver_type": _SOLVER_TYPES,
    "lower_order_final": ANY,
    "lambda_min_clipped": ANY,
    "variance_type": (None, *_FIXED_VARIANCES, *LEARNED_VARIANCES),  # it changes nothing
}
_DPM: Options = {**_SPACING, **_LEVELS, **_FINAL, **_MULTISTEP, "use_lu_lambdas": ANY, "euler_at_final": ANY}
_DPM_OF_NOISE: Options = {**_DPM, "final_sigmas_type": ("sigma_min",)}
_SINGLESTEP: Options = {**_LEVELS, **_FINAL, **_MULTISTEP}
_DISTILLED: Options = {"original_inference_steps": ANY}
_DISTILLED_IGNORE = ("timestep_spacing", "steps_offset", "set_alpha_to_one")

_CHURN: Parameters = {
    "s_churn": number(0),
    "s_tmin": number(0),
    "s_tmax": number(0),
    "s_noise": number(0, 10),
}
_ANCESTRAL: Parameters = {"eta": number(0, 1), "s_noise": number(0, 10)}
_SDE: Parameters = {"eta": number(0, 10), "s_noise": number(0, 10)}

ROWS = (
    Sampler(
        "ddim",
        "DDIM",
        ddim,
        "DDIMScheduler",
        strided_grid,
        {**_SPACING, **_CLIPPING, "set_alpha_to_one": ANY},
        arguments=_clip_arguments,
        eta="eta",
        webui=Webui(grid=ddim_timesteps_grid),
    ),
    Sampler(
        "ddpm",
        "DDPM",
        ddpm,
        "DDPMScheduler",
        successive_grid,
        {**_SPACING, **_CLIPPING, "variance_type": (*_FIXED_VARIANCES, *LEARNED_VARIANCES)},
        arguments=_ddpm_arguments,
    ),
    Sampler(
        "euler",
        "Euler",
        euler,
        "EulerDiscreteScheduler",
        euler_grid,
        {
            **_SPACING,
            **_LEVELS,
            **_FINAL,
            **_RANGE,
            "interpolation_type": ("linear", "log_linear"),
            "timestep_type": ("discrete", "continuous"),
        },
        parameters=_CHURN,
        webui=Webui(),
    ),
    Sampler(
        "euler_a",
        "Euler a",
        euler_ancestral,
        "EulerAncestralDiscreteScheduler",
        fractional_grid,
        _SPACING,
        parameters=_ANCESTRAL,
        webui=Webui(),
    ),
    Sampler(
        "dpmpp_2m",
        "DPM++ 2M",
        dpmpp_multistep,
        "DPMSolverMultistepScheduler",
        one_more_grid,
        _DPM,
        preset={"algorithm_type": "dpmsolver++"},
        arguments=_dpm_arguments,
        webui=Webui("karras"),
    ),
    Sampler(
        "dpmpp_2m_karras",
        "DPM++ 2M Karras",
        dpmpp_multistep,
        "DPMSolverMultistepScheduler",
        one_more_grid,
        _DPM,
        preset={"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
        arguments=_dpm_arguments,
    ),
    Sampler(
        "pndm",
        "PLMS",
        plms,
        "PNDMScheduler",
        strided_grid,
        {**_SPACING, "set_alpha_to_one": ANY, "skip_prk_steps": ANY},
        preset={"skip_prk_steps": True},
        levels=False,
        own_timesteps=False,
        webui=Webui(grid=ddim_timesteps_grid),
    ),
    Sampler(
        "pndm_prk",
        "PNDM PRK",
        pndm,
        "PNDMScheduler",
        strided_grid,
        {**_SPACING, "set_alpha_to_one": ANY, "skip_prk_steps": ANY},
        preset={"skip_prk_steps": False},
        levels=False,
        own_timesteps=False,
    ),
    Sampler("ipndm", "iPNDM", ipndm, parameters={"order": whole(1, 4)}, webui=Webui()),
    Sampler("ipndm_sine", "iPNDM sine", ipndm, "IPNDMScheduler", sine_grid, {}, levels=False, own_timesteps=False),
    Sampler(
        "lms",
        "LMS",
        lms,
        "LMSDiscreteScheduler",
        fractional_grid,
        {**_SPACING, **_LEVELS},
        parameters={"order": whole(1, 4)},
        webui=Webui(),
    ),
    Sampler(
        "heun",
        "Heun",
        heun,
        "HeunDiscreteScheduler",
        fractional_grid,
        {**_SPACING, **_LEVELS},
        parameters=_CHURN,
        webui=Webui(),
    ),
    Sampler(
        "dpm2",
        "DPM2",
        dpm2,
        "KDPM2DiscreteScheduler",
        midpoint_grid,
        {**_SPACING, **_LEVELS},
        parameters=_CHURN,
        webui=Webui("karras", drops=True),
    ),
    Sampler(
        "dpm2_a",
        "DPM2 a",
        dpm2_ancestral,
        "KDPM2AncestralDiscreteScheduler",
        midpoint_grid,
        {**_SPACING, **_LEVELS},
        parameters=_ANCESTRAL,
        webui=Webui("karras", drops=True),
    ),
    Sampler("dpmpp_2s_a", "DPM++ 2S a", dpmpp_2s_ancestral, parameters=_ANCESTRAL, webui=Webui("karras")),
    Sampler(
        "dpmpp_sde",
        "DPM++ SDE",
        dpmpp_sde,
        "DPMSolverSDEScheduler",
        fractional_grid,
        {**_SPACING, **_LEVELS},
        parameters={**_ANCESTRAL, "r": number(0.01, 0.99)},
        webui=Webui("karras"),
    ),
    Sampler(
        "dpmpp_2m_sde",
        "DPM++ 2M SDE",
        dpmpp_multistep,
        "DPMSolverMultistepScheduler",
        one_more_grid,
        _DPM,
        preset={"algorithm_type": "sde-dpmsolver++"},
        arguments=_sde_arguments,
        parameters=_SDE,
        webui=Webui("exponential", arguments={"eta": 1.0}),
    ),
    Sampler(
        "dpmpp_2m_sde_heun",
        "DPM++ 2M SDE Heun",
        dpmpp_multistep,
        "DPMSolverMultistepScheduler",
        one_more_grid,
        _DPM,
        preset={"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        arguments=_sde_arguments,
        parameters=_SDE,
        webui=Webui("exponential", arguments={"eta": 1.0, "heun": True}),
    ),
    Sampler(
        "dpmpp_3m",
        "DPM++ 3M",
        dpmpp_multistep,
        "DPMSolverMultistepScheduler",
        one_more_grid,
        _DPM,
        preset={"algorithm_type": "dpmsolver++", "solver_order": 3},
        arguments=_dpm_arguments,
    ),
    Sampler(
        "dpmpp_3m_sde",
        "DPM++ 3M SDE",
        dpmpp_multistep,
        "DPMSolverMultistepScheduler",
        one_more_grid,
        _DPM,
        preset={"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        arguments=_sde_arguments,
        parameters=_SDE,
        webui=Webui("exponential", drops=True, arguments={"eta": 1.0, "order": 3, "heun": True}),
    ),
    Sampler(
        "dpm_2m",
        "DPM-Solver 2M",
        dpm_multistep,
        "DPMSolverMultistepScheduler",
        one_more_grid,
        _DPM_OF_NOISE,
        preset={"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        arguments=_dpm_arguments,
    ),
    Sampler(
        "dpm_2m_sde",
        "DPM-Solver 2M SDE",
        dpm_multistep,
        "DPMSolverMultistepScheduler",
        one_more_grid,
        {**_DPM_OF_NOISE, "solver_order": (1, 2)},
        preset={"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        arguments=_noise_sde_arguments,
        levels=False,
    ),
    Sampler(
        "dpmpp_2s",
        "DPM++ 2S",
        dpmpp_singlestep,
        "DPMSolverSinglestepScheduler",
        one_more_grid,
        _SINGLESTEP,
        preset={"algorithm_type": "dpmsolver++"},
        arguments=_singlestep_arguments,
    ),
    Sampler(
        "dpmpp_3s",
        "DPM++ 3S",
        dpmpp_singlestep,
        "DPMSolverSinglestepScheduler",
        one_more_grid,
        _SINGLESTEP,
        preset={"algorithm_type": "dpmsolver++", "solver_order": 3},
        arguments=_singlestep_arguments,
    ),
    Sampler(
        "dpmpp_2s_sde",
        "DPM++ 2S SDE",
        dpmpp_singlestep,
        "DPMSolverSinglestepScheduler",
        one_more_grid,
        _SINGLESTEP,
        preset={"algorithm_type": "sde-dpmsolver++"},
        arguments=_singlestep_sde_arguments,
        parameters={"eta": number(0, 10)},
    ),
    Sampler(
        "dpm_2s",
        "DPM-Solver 2S",
        dpm_singlestep,
        "DPMSolverSinglestepScheduler",
        one_more_grid,
        {**_SINGLESTEP, "final_sigmas_type": ("sigma_min",)},
        preset={"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        arguments=_singlestep_arguments,
    ),
    Sampler(
        "dpm_fast",
        "DPM fast",
        dpm_fast,
        parameters=_ANCESTRAL,
        webui=Webui(grid=dpm_fast_grid, counts="evaluations"),
    ),
    Sampler(
        "deis",
        "DEIS",
        deis,
        "DEISMultistepScheduler",
        one_more_grid,
        {
            **_SPACING,
            **_LEVELS,
            "solver_order": (1, 2, 3),
            "lower_order_final": ANY,
            "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
            "solver_type": _SOLVER_TYPES,
        },
        arguments=_deis_arguments,
    ),
    Sampler(
        "unipc",
        "UniPC",
        unipc,
        "UniPCMultistepScheduler",
        one_more_grid,
        {
            **_SPACING,
            **_LEVELS,
            **_FINAL,
            **_RANGE,
            "solver_order": (1, 2, 3),
            "lower_order_final": ANY,
            "predict_x0": ANY,
            "solver_type": _SOLVER_TYPES,
            "disable_corrector": ANY,
        },
        arguments=_unipc_arguments,
        webui=Webui(grid=unipc_grid, arguments={"order": 3, "bh1": True}),
    ),
    Sampler("restart", "Restart", restart, parameters={"s_noise": number(0, 10)}, webui=Webui("karras")),
    Sampler(
        "lcm",
        "LCM",
        lcm,
        "LCMScheduler",
        consistency_grid,
        {**_DISTILLED, "timestep_scaling": ANY},
        arguments=_lcm_arguments,
        ignores=_DISTILLED_IGNORE,
    ),
    Sampler(
        "tcd",
        "TCD",
        tcd,
        "TCDScheduler",
        trajectory_grid,
        _DISTILLED,
        ignores=(*_DISTILLED_IGNORE, "timestep_scaling"),
        parameters={"gamma": number(0, 1)},
        levels=False,
        eta="gamma",
    ),
    Sampler(
        "sa_solver",
        "SA-Solver",
        sa_solver,
        "SASolverScheduler",
        one_more_grid,
        {
            **_SPACING,
            **_LEVELS,
            "predictor_order": (1, 2, 3),
            "corrector_order": (1, 2, 3, 4),
            "algorithm_type": ("data_prediction", "noise_prediction"),
            "lower_order_final": ANY,
            "lambda_min_clipped": ANY,
            "variance_type": (None, *_FIXED_VARIANCES),
        },
        arguments=_sa_arguments,
    ),
)
