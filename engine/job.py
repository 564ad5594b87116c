"""Jobs: what the denoising loop needs for each picture."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .beginnings import Begin, FirstNoise
from .contract import PROMPT_TOKENS, Component
from .sampling.noise import Draws, TorchGenerator
from .sampling.table import StepTable
from .variation import Variation

Conditioning = Mapping[str, Any]
"""A text's embedding: for each output of the text encoder, by name, the backend's value for one text."""


@dataclass(frozen=True, eq=False)
class Joined:
    """Values of equally many tokens one behind the other, `tokens` in all: the chunks of a text."""

    parts: tuple[Any, ...]
    tokens: int


def spans(value: Any, tokens: int) -> Iterator[tuple[slice, Any]]:
    """The parts of an embedding and their places among the tokens of a call, a multiple of its own. It is repeated: the
    softmax over a repeated text gives the same attention."""
    parts = value.parts if isinstance(value, Joined) else (value,)
    length = _tokens(value) // len(parts)
    for number in range(tokens // length):
        yield slice(number * length, (number + 1) * length), parts[number % len(parts)]


def _tokens(value: Any) -> int:
    return value.tokens if isinstance(value, Joined) else len(value)


Texts = Conditioning | Sequence[tuple[int, Conditioning]]
"""One embedding, or several, each with the evaluation from which on it counts. The first counts from 0 on."""


@dataclass(frozen=True, eq=False)
class Row:
    """One text of a picture: a row of the U-Net.

    conditioning: its embedding, which may change with the evaluation. weight: of its output in the guided one, a
    number, or an array [E] with one for each evaluation. The U-Net does not evaluate the row where its weight is 0.
    rescale: phi of arXiv 2305.08891, section 3.4, if the guided output takes over the standard deviation of this row's.
    blind: the row sees zeros where the others see what the picture's `Beginning` has.
    """

    conditioning: Texts
    weight: float | np.ndarray
    rescale: float = 0.0
    blind: bool = False


@dataclass(frozen=True, eq=False)
class Phase:
    """What the U-Net evaluates of a job for some evaluations: the numbers of the rows, and an embedding for each."""

    rows: tuple[int, ...]
    texts: tuple[Conditioning, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """One picture.

    latents [C, h, w]: float32, where the loop starts, scaled for the table's first evaluation. steps: by name, an array
    [E, ...] of each input of the denoiser that changes with every evaluation, but for the noise. noise, picture: the
    call's random numbers, and which of them are this picture's; None for samplers without. extras: by name, the further
    inputs of the family that change once a loop: what one sample takes, or an array [rows, ...] for an input with a
    value for each row. tokens: a multiple of every embedding's tokens.
    """

    latents: np.ndarray
    table: StepTable
    rows: tuple[Row, ...]
    steps: Mapping[str, np.ndarray]
    noise: Draws | None = None
    picture: int = 0
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokens: int = PROMPT_TOKENS

    @cached_property
    def weights(self) -> np.ndarray:
        """The rows' weights at each evaluation, [E, rows] float32. ValueError for a row with another number of them."""
        columns = [np.broadcast_to(np.asarray(row.weight, np.float32), len(self.table)) for row in self.rows]
        return np.stack(columns, axis=1)

    @cached_property
    def phases(self) -> list[Phase]:
        """The phase of each evaluation. Those that evaluate the same are one object. At least one row is evaluated."""
        made: dict[tuple[int, ...], Phase] = {}
        evaluated = self.weights != 0
        if (evaluated == evaluated[0]).all() and all(isinstance(row.conditioning, Mapping) for row in self.rows):
            return [self._phase(0, made)] * len(self.table)
        return [self._phase(index, made) for index in range(len(self.table))]

    def _phase(self, index: int, made: dict[tuple[int, ...], Phase]) -> Phase:
        rows = tuple(np.flatnonzero(self.weights[index]).tolist()) or (0,)
        texts = tuple(conditioning_at(self.rows[row].conditioning, index) for row in rows)
        return made.setdefault((*rows, *map(id, texts)), Phase(rows, texts))

    def drawn(self, index: int) -> dict[str, np.ndarray]:
        """What an evaluation takes besides `steps`: its noise, if one is drawn. Otherwise the update multiplies the old
        noise by 0."""
        if self.noise is None or not self.table.draws[index]:
            return {}
        return {"noise": self.noise.take(index, self.picture)}

    def draw_ahead(self, index: int) -> None:
        """Draws the noise of an evaluation, if it has some, before it is needed, while the device works on an earlier
        one."""
        if self.noise is not None and index < len(self.table) and self.table.draws[index]:
            self.noise.prepare(index)


def step_inputs(table: StepTable, denoiser: Component) -> dict[str, np.ndarray]:
    """`Job.steps` for a table: the inputs of this denoiser that follow from it."""
    known = {"timestep": table.timesteps, "update": table.updates, "clip": table.clips, "variance": table.variances}
    if "clip" in denoiser.input_names:
        known["update"] = np.concatenate([table.updates, table.clipped[:, :, np.newaxis]], axis=2)
    made = {tensor.name: known[tensor.name].astype(np.float32) for tensor in denoiser.stepped if tensor.name in known}
    for tensor in denoiser.stepped:
        if tensor.default is not None:
            shape = tensor.shape({"batch": len(table)})
            made[tensor.name] = np.full(shape, tensor.default, np.float32)
    return made


def classed(class_label: int | None) -> tuple[Row, ...]:
    """The row of one picture of a model without texts."""
    labels = {} if class_label is None else {"class_labels": np.array(class_label, np.int32)}
    return (Row(labels, 1.0),)


def conditioning_at(texts: Texts, index: int) -> Conditioning:
    """The embedding that counts at an evaluation."""
    if isinstance(texts, Mapping):
        return texts
    return texts[bisect_right(texts, index, key=lambda one: one[0]) - 1][1]


def guided(
    prompts: Sequence[tuple[Texts, float]], negative: Texts | None, scales: np.ndarray, rescale: float = 0.0
) -> tuple[Row, ...]:
    """The rows of one picture. With a negative prompt u: classifier-free guidance (arXiv 2207.12598) of scale scales[i]
    at evaluation i, u + sum of weight * scale * (c - u) over the prompts c (arXiv 2206.01714). Where u has no weight,
    as with one prompt and scale 1, it is not evaluated. The guided output takes over the standard deviation of the mean
    of the prompts' outputs."""
    if negative is None:
        return tuple(Row(prompt, weight) for prompt, weight in prompts)
    positive = [max(weight, 0.0) for _, weight in prompts]
    shares = positive if sum(positive) else [1.0, *positive[1:]]
    rows = [
        Row(prompt, weight * scales, rescale * share / sum(shares)) for (prompt, weight), share in zip(prompts, shares)
    ]
    return Row(negative, 1 - sum(weight for _, weight in prompts) * scales), *rows


def tokens_of(rows: Sequence[Row], denoiser: Component) -> int:
    """The smallest multiple of the tokens of all embeddings of a picture."""
    names = [tensor.name for tensor in denoiser.inputs if "tokens" in tensor.names]
    found = {1}
    for row in rows:
        several = (
            [row.conditioning] if isinstance(row.conditioning, Mapping) else [text for _, text in row.conditioning]
        )
        found.update(_tokens(text[name]) for text in several for name in names)
    return math.lcm(*found)


def jobs(
    table: StepTable,
    denoiser: Component,
    rows: Sequence[tuple[Row, ...]],
    generators: Sequence[TorchGenerator],
    plane: tuple[int, ...],
    latents: np.ndarray | None,
    begin: Begin,
    variation: Variation | None = None,
) -> list[Job]:
    """The jobs of one call. There is one generator for all pictures, whose noise is then drawn together as in
    diffusers, or one for each. `latents` [B, C, h, w], standard normal, replace the first noise, which `variation` then
    changes. `plane` is (C, h, w). `begin` says where the loops start."""
    count, steps = len(rows), step_inputs(table, denoiser)
    several = count if len(generators) == 1 else 1
    made: list[Job] = []
    for generator in generators:
        first = len(made)
        pictures = range(first, first + several)
        beginnings = begin(generator, pictures, _first_noise(generator, pictures, latents, variation))
        noise = Draws(generator, (several, *plane), table.draws) if table.draws.any() else None
        for picture, start in enumerate(beginnings):
            own, changing = rows[first + picture], {**steps, **start.steps}
            extras, tokens = {**start.extras, **seen_by(own, start.seen)}, tokens_of(own, denoiser)
            made.append(Job(start.latents, table, own, changing, noise, picture, extras, tokens))
    return made


def seen_by(rows: Sequence[Row], seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each row sees, [rows, ...] by name."""
    return {
        name: np.stack([np.zeros_like(value) if row.blind else value for row in rows]) for name, value in seen.items()
    }


def _first_noise(
    generator: TorchGenerator, pictures: range, latents: np.ndarray | None, variation: Variation | None
) -> FirstNoise:
    def noise(shape: tuple[int, ...]) -> np.ndarray:
        own = generator.randn(shape) if latents is None else latents[pictures.start : pictures.stop]
        return own if variation is None else variation.vary(own, pictures)

    return noise
