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
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
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
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "PNDMScheduler": {
        **_FORWARD,
        "timestep_spacing": "leading",
        "skip_prk_steps": False,
        "set_alpha_to_one": False,
    },
}
"""Of diffusers 0.42. A test compares them with the classes of the diffusers that is installed."""
