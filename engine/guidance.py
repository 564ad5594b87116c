"""Classifier-free guidance (arXiv 2207.12598): how strong it is at each evaluation of the U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import checks
from .errors import GuidanceError

Scale = float | Sequence[float] | Callable[[int, float], float]
"""A number for all evaluations, a list with one for each step or evaluation, or a function (evaluation, timestep)."""


DEFAULT_SCALE = 7.5
"""What a call without a scale takes."""


@dataclass(frozen=True, eq=False)
class Guidance:
    """Checked guidance.

    scale: the number that was asked for, of a schedule the largest. scales [E]: that of each evaluation, 1 where the
    negative prompt takes no part. rescale: phi of arXiv 2305.08891, section 3.4. interval: (start, end), as asked for.
    scheduled: whether `scale` was a list or a function.
    """

    scale: float
    scales: np.ndarray
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    scheduled: bool = False

    @property
    def used(self) -> bool:
        """Whether the negative prompt takes part in any evaluation."""
        return bool((self.scales > 1).any())

    def parameters(self) -> Mapping[str, float | str]:
        """Its fields in a picture's parameters. Only the scale is always there."""
        fields: dict[str, float | str] = {"CFG scale": self.scale}
        if self.scheduled:
            fields["CFG schedule"] = " ".join(f"{scale:g}" for scale in self.scales)
        if self.rescale:
            fields["CFG rescale"] = self.rescale
        if self.interval is not None:
            fields["CFG interval"] = "{:g} to {:g}".format(*self.interval)
        return fields


def check_guidance(scale: Any, rescale: Any, interval: Any, steps: int, timesteps: np.ndarray) -> Guidance:
    """The guidance of a call of so many steps, whose evaluations see these timesteps. GuidanceError for what is no
    number, list or function of the right kind, for numbers out of range, and for an interval without an evaluation."""
    asked, scheduled = _scales(scale, steps, timesteps)
    scales = np.where(asked > 1, asked, 1.0)
    phi = checks.check_guidance_rescale(rescale)
    if interval is not None:
        interval = checks.check_guidance_interval(interval)
        inside = inside_interval(interval, len(scales))
        if not inside.any():
            raise GuidanceError(
                f"guidance_interval {interval} holds none of the {len(scales)} evaluations, which are "
                f"{1 / len(scales):g} apart; pass a wider one, or guidance_scale=1 for none"
            )
        scales = np.where(inside, scales, 1.0)
    return Guidance(float(asked.max()), scales, phi, interval, scheduled)


def without_text(guidance: Guidance) -> Guidance:
    """The guidance of a model without texts: none. GuidanceError if a call asked for some."""
    asked = guidance.used and (guidance.scheduled or guidance.scale != DEFAULT_SCALE)
    if asked or guidance.rescale or guidance.interval is not None:
        raise GuidanceError(
            "this model makes pictures without texts, so there is nothing that guidance could make them follow more "
            "closely; leave guidance_scale, guidance_rescale and guidance_interval out"
        )
    return Guidance(1.0, np.ones_like(guidance.scales))


def inside_interval(interval: tuple[float, float], evaluations: int) -> np.ndarray:
    """Which evaluations are inside: number i of E, counted from 0, if start <= i / E <= end."""
    start, end = interval
    fractions = np.arange(evaluations) / evaluations
    return (start <= fractions) & (fractions <= end)


def _scales(scale: Any, steps: int, timesteps: np.ndarray) -> tuple[np.ndarray, bool]:
    """The scale that was asked for at each evaluation, and whether it was a schedule."""
    if callable(scale):
        return _called(scale, timesteps), True
    if isinstance(scale, (list, tuple, range)) or (isinstance(scale, np.ndarray) and scale.ndim == 1):
        return _listed(scale, steps, len(timesteps)), True
    return np.full(len(timesteps), checks.check_guidance_scale(scale)), False


def _called(scale: Callable[[int, float], Any], timesteps: np.ndarray) -> np.ndarray:
    """What a function says for each evaluation."""
    checks.check_guidance_function(scale)
    values = [
        checks.check_guidance_scale(scale(index, timestep), f"guidance_scale({index}, {timestep:g})")
        for index, timestep in enumerate(timesteps.tolist())
    ]
    return np.array(values)


def _listed(scale: Sequence[Any] | np.ndarray, steps: int, evaluations: int) -> np.ndarray:
    """The numbers of a list, each for the evaluations of its step."""
    if len(scale) not in (steps, evaluations):
        more = "" if steps == evaluations else f" or {evaluations}, one for each evaluation of the U-Net,"
        raise GuidanceError(
            f"guidance_scale has {len(scale)} numbers; pass {steps}, one for each step,{more} or one number for all"
        )
    values = [checks.check_guidance_scale(value, f"guidance_scale[{index}]") for index, value in enumerate(scale)]
    return np.array(values)[np.arange(evaluations) * len(values) // evaluations]
