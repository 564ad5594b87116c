"""Strided respacing (arXiv 2102.09672, section 4): fewer timesteps of the same forward process."""

from __future__ import annotations

import numpy as np

from ..errors import TimestepsError, shown
from .schedule import Schedule


def space_timesteps(text: str, total: int) -> tuple[int, ...]:
    """The timesteps, from high to low, that Improved DDPM's `timestep_respacing` keeps of `total`: "50" spaces 50 of
    them evenly from the first to the last; "10,15,25" does so in each of 3 equal parts; "ddim50" takes every 20th from
    0 on, and needs a whole stride. TimestepsError for others."""
    if not isinstance(text, str):
        raise TimestepsError(f"timestep_respacing is {shown(text)}; pass a string such as '50', '10,15,25' or 'ddim50'")
    counts = text.removeprefix("ddim").split(",")
    if not all(count.strip().isascii() and count.strip().isdigit() and len(count) < 8 for count in counts):
        raise TimestepsError(f"timestep_respacing {shown(text)} is not like '50', '10,15,25' or 'ddim50'")
    numbers = [int(count) for count in counts]
    if text.startswith("ddim"):
        return _every(numbers, text, total)
    return _sections(numbers, text, total)


def _every(numbers: list[int], text: str, total: int) -> tuple[int, ...]:
    for stride in range(1, total + 1):
        if [len(range(0, total, stride))] == numbers:
            return tuple(range(0, total, stride))[::-1]
    raise TimestepsError(
        f"timestep_respacing {shown(text)}: no whole stride leaves so many of {total} timesteps; take a divisor of "
        f"{total}, such as 'ddim50' of 1000, or the number alone"
    )


def _sections(counts: list[int], text: str, total: int) -> tuple[int, ...]:
    size, longer = divmod(total, len(counts))
    start = 0
    kept: list[int] = []
    for i, count in enumerate(counts):
        length = size + 1 if i < longer else size
        if not 1 <= count <= length:
            raise TimestepsError(
                f"timestep_respacing {shown(text)}: part {i + 1} of {total} timesteps has {length}, so it cannot give "
                f"{count}; take from 1 to {length}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        places = np.cumsum([0.0] + [stride] * (count - 1))  # added up as the reference does, which decides ties
        kept += [start + int(place) for place in np.round(places)]
        start += length
    return tuple(kept)[::-1]


def respaced_betas(schedule: Schedule, timesteps: tuple[int, ...]) -> np.ndarray:
    """The betas of a forward process that has these timesteps alone, in the order of the timesteps: with them a chain
    of DDPM has the same marginals."""
    alphas_cumprod = schedule.alphas_cumprod[list(timesteps)]
    return 1 - alphas_cumprod / np.append(alphas_cumprod[1:], 1.0)
