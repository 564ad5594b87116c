"""Steps in k-diffusion's scale y = x / alpha, in which the model's estimate is y = x0 + s epsilon.

The solvers of this scale leave the last state in it, as k-diffusion and diffusers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .grids import Grid
from .table import refuse_infinite_noise, vp


@dataclass(frozen=True)
class Step:
    """A step from the noise level s, at timestep t, down to s_next, at t_next, and up to the level of the next
    evaluation by `up` times standard normal noise. alpha: the scale in which it leaves y."""

    t: float
    s: float
    t_next: float
    s_next: float
    up: float
    alpha: float


def ve_steps(grid: Grid) -> Iterator[Step]:
    """The steps of a grid, without noise."""
    for i, (t, s, s_next) in enumerate(grid.steps()):
        yield Step(t, s, timestep_of(grid, s_next), s_next, 0.0, scale_after(grid, i, s_next))


def scale_after(grid: Grid, i: int, s: float) -> float:
    """alpha of the noise level s that step i goes to, and 1 after the last one."""
    return 1.0 if i == len(grid) - 1 else vp(s)[0]


def timestep_of(grid: Grid, s: float) -> float:
    """The grid's own timestep of a noise level, which may be rounded, or where it has none that of its training."""
    same = np.flatnonzero(grid.sigmas == s)
    return float(grid.timesteps[same[0]]) if len(same) else grid.timestep(s)


def churned(grid: Grid, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> tuple[list[Step], float]:
    """The steps of a grid with churn, and the factor of the first latent: arXiv 2206.00364, algorithm 2, whose noise is
    added at the end of the step before. The first latent, which is noise, has that of the first step in its factor."""
    most = math.sqrt(2) - 1
    gammas = [min(s_churn / len(grid), most) if s_tmin <= s <= s_tmax else 0.0 for s in grid.sigmas.tolist()]
    if max(gammas) == 0:
        return list(ve_steps(grid)), grid.initial_scale
    refuse_infinite_noise(grid.sigmas[0], "a sampler with churn")
    hats = [s * (1 + gamma) for s, gamma in zip(grid.sigmas.tolist(), gammas)]  # line 5
    steps = []
    for i, step in enumerate(ve_steps(grid)):
        t = step.t if gammas[i] == 0 else grid.timestep(hats[i])
        s_after = step.s_next if i == len(grid) - 1 else hats[i + 1]
        up = s_noise * math.sqrt(s_after**2 - step.s_next**2)  # line 6
        steps.append(Step(t, hats[i], step.t_next, step.s_next, up, scale_after(grid, i, s_after)))
    s, s_hat = float(grid.sigmas[0]), hats[0]
    first = math.hypot(grid.initial_scale / vp(s)[0], s_noise * math.sqrt(s_hat**2 - s**2))
    return steps, vp(s_hat)[0] * first


def ancestral(s: float, s_next: float, eta: float) -> tuple[float, float]:
    """s_down and s_up, with s_down^2 + s_up^2 = s_next^2 (k-diffusion, get_ancestral_step)."""
    kept = max(1 - eta**2 + (eta * s_next / s) ** 2, 0.0)
    return s_next * math.sqrt(kept), s_next * math.sqrt(1 - kept)
