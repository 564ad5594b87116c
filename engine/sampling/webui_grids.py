"""The grids of A1111's samplers that don't come from k-diffusion. Each is a function
`(levels [T], steps, prediction_type) -> Grid`, with A1111's timesteps, of which there may be one more than steps."""

from __future__ import annotations

import numpy as np

from .grids import Grid, StridedGrid, checked, level_grid
from .levels import exponential_sigmas


def ddim_timesteps_grid(levels: np.ndarray, steps: int, prediction_type: str) -> StridedGrid:
    """DDIM and PLMS: timesteps 1, 1 + T // steps, ..., each step to the one below, the last to timestep 0. Where
    T // steps is less than T / steps there may be one more step (31 for 30), as in CompVis' code."""
    total = len(levels)
    timesteps = np.minimum(np.arange(0, total, max(total // steps, 1)) + 1, total - 1)[::-1]
    sigmas = levels[timesteps]
    targets, sources = np.append(sigmas[1:], levels[0]), np.append(sigmas[0], sigmas[:-1])
    return checked(StridedGrid(timesteps.astype(float), sigmas, targets, prediction_type, 1.0, sources, levels=levels))


def unipc_grid(levels: np.ndarray, steps: int, prediction_type: str) -> Grid:
    """UniPC: evenly spaced timesteps ("time_uniform"), log alpha linear between training timesteps, and an end at
    timestep 0. There are as many as those of DDIM."""
    total = len(levels)
    count = len(range(0, total, max(total // steps, 1)))
    timesteps = np.linspace(total - 1, 0, count + 1)
    log_alphas = np.interp(timesteps, np.arange(total), -np.log1p(levels**2) / 2)
    sigmas = np.sqrt(np.expm1(-2 * log_alphas))
    return checked(Grid(timesteps[:-1], sigmas[:-1], sigmas[1:], prediction_type, 1.0, levels=levels))


def dpm_fast_grid(levels: np.ndarray, steps: int, prediction_type: str) -> Grid:
    """DPM fast: steps // 3 + 1 steps evenly spaced in lambda, which take `steps` evaluations, to the lowest level."""
    sigmas = exponential_sigmas(float(levels[0]), float(levels[-1]), steps // 3 + 2)
    return level_grid(sigmas, levels, prediction_type)
