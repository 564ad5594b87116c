"""Numbers of repeated measurements, and the rules by which a result is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.compare import PICTURE_TOLERANCE

NOISE = 0.20
"""The largest spread that a result may have."""

STAGES = ("text_encoder", "denoise", "vae_decoder")


@dataclass(frozen=True)
class Summary:
    """Of n measurements: the smallest, percentiles, and the spread (p90 - p10) / p50."""

    n: int
    min: float
    p50: float
    p90: float
    p99: float
    spread: float


def summarize(samples: Sequence[float]) -> Summary:
    """Percentiles between two measurements are interpolated. ValueError without any."""
    if not samples:
        raise ValueError("there is nothing to summarize")
    p10, p50, p90, p99 = (float(value) for value in np.percentile(samples, [10, 50, 90, 99]))
    return Summary(len(samples), min(samples), p50, p90, p99, (p90 - p10) / p50 if p50 else 0.0)


def pair_ratios(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """Their time divided by ours, pair by pair, so a drift of the machine cancels."""
    return summarize([b / a for a, b in zip(ours, theirs, strict=True)])


def fitted_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """e of y = c x^e by least squares on logarithms: 1 is proportional, 0 constant. ValueError for fewer than two x."""
    if len(set(x)) < 2:
        raise ValueError(f"an exponent needs two different sizes; there is {sorted(set(x))}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def refuse_noise(what: str, spread: float) -> list[str]:
    """The reason, if the machine was too noisy."""
    if spread <= NOISE:
        return []
    return [
        f"{what} has a spread of {spread:.0%}, over {NOISE:.0%}: the machine was doing something else. Stop that, and "
        "measure again"
    ]


def refuse_timing(what: str, sample: Mapping[str, Any]) -> list[str]:
    """The reasons why a timing is invalid: nobody waited for the device, or the stages do not add up to the whole."""
    if not sample.get("synchronised"):
        return [
            f"{what} was timed without waiting for the device, so its times say when work was started, not when it was "
            "done"
        ]
    stages = sum(sample[stage] for stage in STAGES)
    if not 0.5 * sample["total"] <= stages <= 1.05 * sample["total"]:
        return [
            f"{what} took {sample['total']:.4g} s, and its stages add up to {stages:.4g} s: something was not "
            "measured, or not waited for"
        ]
    return []


def refuse_pictures(ours: str, theirs: str, decibels: Sequence[float], precisions: tuple[str, str]) -> list[str]:
    """The reason, if two sides did not make the same pictures from the same seeds."""
    allowed = min(PICTURE_TOLERANCE[precision] for precision in precisions)
    if min(decibels) >= allowed:
        return []
    return [
        f"the pictures of {ours} and {theirs} differ: PSNR {min(decibels):.1f} dB, at least {allowed:.0f} dB makes "
        "them the same in "
        f"{' and '.join(precisions)}"
    ]


def as_json(value: Any) -> Any:
    """Dataclasses and floats as they are stored, with five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    return as_json(asdict(value)) if hasattr(value, "__dataclass_fields__") else value
