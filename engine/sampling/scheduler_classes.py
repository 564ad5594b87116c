"""What diffusers' scheduler classes take, with their defaults: the arguments that a scheduler_config.json may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_FORWARD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FINAL = {"final_sigmas_type": "zero"}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
_SHIFT = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_VE = {**_FORWARD, **_SIGMAS, "timestep_spacing": "linspace"}
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = {
    **_FORWARD,
    **_STABLE_DIFFUSION,
    **_THRESHOLDING,
    **_CLIPPING,
    **_ZERO_SNR,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}

CLASSES: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": {
        **_FORWARD,
        **_THRESHOLDING,
        **_CLIPPING,
        **_ZERO_SNR,
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
    },
    "DDPMScheduler": {
        **_FORWARD,
        **_THRESHOLDING,
        **_CLIPPING,
        **_ZERO_SNR,
        "timestep_spacing": "leading",
        "variance_type": "fixed_small",
    },
    "EulerDiscreteScheduler": {
        **_FORWARD,
        **_ZERO_SNR,
        **_SIGMAS,
        **_FINAL,
        "timestep_spacing": "linspace",
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": {**_FORWARD, **_ZERO_SNR, "timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {
        **_FORWARD,
        **_THRESHOLDING,
        **_ZERO_SNR,
        **_SIGMAS,
        **_FINAL,
        **_FLOW,
        **_SHIFT,
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "PNDMScheduler": {
        **_FORWARD,
        "timestep_spacing": "leading",
        "skip_prk_steps": False,
        "set_alpha_to_one": False,
    },
    "IPNDMScheduler": {"num_train_timesteps": 1000, "trained_betas": None},
    "LMSDiscreteScheduler": _VE,
    "HeunDiscreteScheduler": {**_VE, **_STABLE_DIFFUSION, **_CLIPPING, "clip_sample": False},
    "KDPM2DiscreteScheduler": {**_VE, **_STABLE_DIFFUSION},
    "KDPM2AncestralDiscreteScheduler": {**_VE, **_STABLE_DIFFUSION},
    "DPMSolverSDEScheduler": {**_VE, **_STABLE_DIFFUSION, "noise_sampler_seed": None},
    "DPMSolverSinglestepScheduler": {
        **{option: default for option, default in _FORWARD.items() if option != "steps_offset"},
        **_THRESHOLDING,
        **_SIGMAS,
        **_FINAL,
        **_FLOW,
        **_SHIFT,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "DEISMultistepScheduler": {
        **_VE,
        **_THRESHOLDING,
        **_FLOW,
        **_SHIFT,
        "solver_order": 2,
        "algorithm_type": "deis",
        "solver_type": "logrho",
        "lower_order_final": True,
    },
    "UniPCMultistepScheduler": {
        **_VE,
        **_THRESHOLDING,
        **_ZERO_SNR,
        **_FINAL,
        **_FLOW,
        **_SHIFT,
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "SASolverScheduler": {
        **_VE,
        **_THRESHOLDING,
        **_FLOW,
        "predictor_order": 2,
        "corrector_order": 2,
        "tau_func": None,
        "algorithm_type": "data_prediction",
        "lower_order_final": True,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
}
"""Of diffusers 0.42. A test compares them with the classes of the diffusers that is installed."""
