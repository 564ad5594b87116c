"""The U-Net's rows of each picture: a prompt's parts, their schedules, and the negative prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..job import Conditioning, Row, guided
from ..job import Texts as Embedded
from .conditioning import Text, TextConditioning
from .prompt import Part, by_evaluation, schedule
from .request import Texts, counted_steps

Guide = Callable[[Sequence[tuple[Embedded, float]], "Embedded | None", np.ndarray, float], tuple[Row, ...]]
"""Makes the rows of a picture: `engine.job.guided`, or another that takes the same."""

Scheduled = tuple[tuple[int, Text], ...]
"""Texts, each with the evaluation from which on it counts."""


@dataclass(frozen=True)
class Loop:
    """The loop that schedules are for: its steps, as they count them, and its evaluations; before: the steps of a first
    pass, of which this is the second."""

    steps: int
    evaluations: int
    before: int

    def scheduled(self, part: Part, texts: Texts, skip: int) -> Scheduled:
        """What a part of a prompt says at each evaluation. Equal texts in a row are one."""
        spoken = by_evaluation(schedule(part, self.steps, self.before), self.evaluations)
        starts = [i for i, text in enumerate(spoken) if i == 0 or text != spoken[i - 1]]
        return tuple((start, Text(spoken[start], texts.syntax, texts.emphasis, skip)) for start in starts)


def picture_rows(
    texts: Texts,
    encode: TextConditioning,
    scales: np.ndarray,
    rescale: float,
    steps: int,
    before: int = 0,
    guide: Guide = guided,
    tokenized: Callable[[], None] = lambda: None,
) -> list[tuple[Row, ...]]:
    """The rows of a picture of each prompt, in a loop of so many steps whose evaluations have these guidance scales.
    before: the steps of a first pass. guide: makes the rows of a picture. All texts are encoded together; `tokenized`
    is called after tokenizing."""
    loop = Loop(counted_steps(steps, len(scales)), len(scales), before)
    parts = [
        [loop.scheduled(part, texts, texts.skip) for part in prompt.parts] if texts.embeds is None else []
        for prompt in texts.parsed
    ]
    against: list[Scheduled] = []
    needed = texts.needs_negative(bool((scales > 1).any()))
    if needed and texts.negative_embeds is None:
        against = [loop.scheduled(negative.parts[0], texts, texts.negative_skip) for negative in texts.negative]
    every = dict.fromkeys(text for one in [*chain(*parts), *against] for _, text in one)
    found = dict(zip(every, encode(list(every), tokenized)))
    made = []
    for number, prompt in enumerate(texts.parsed):
        positive = [_embedded(scheduled, found) for scheduled in parts[number]]
        if texts.embeds is not None:
            positive = [encode.given(texts.embeds[number])]
        negative: Embedded | None = None
        if needed and texts.negative_embeds is not None:
            negative = encode.given(texts.negative_embeds[number])
        elif needed:
            negative = _embedded(against[number], found)
        weights = [part.weight for part in prompt.parts]
        made.append(guide(list(zip(positive, weights, strict=True)), negative, scales, rescale))
    return made


def _embedded(scheduled: Scheduled, found: Mapping[Text, Conditioning]) -> Embedded:
    if len(scheduled) == 1:
        return found[scheduled[0][1]]
    return [(start, found[text]) for start, text in scheduled]
