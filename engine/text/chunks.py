"""Texts with weights to tokens: chunks of 77, as A1111 makes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..bundle import SpecialTokens
from ..contract import PROMPT_TOKENS
from .emphasis import Emphasis, Section

LENGTH = PROMPT_TOKENS - 2
"""The tokens of a text in one chunk; a start mark and an end mark are around them."""

BACKTRACK = 20
"""The most tokens after a comma that move to the next chunk when theirs is full."""

Inversions = Mapping[str, Sequence[int]]
"""For each word of a textual inversion, the ids that stand for its vectors."""

Weighted = tuple[int, float]
"""A token's id and its weight."""


class Vocabulary(Protocol):
    """What `ClipTokenizer` does for texts in chunks."""

    special: SpecialTokens

    def ids(self, text: str) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class Chunks:
    """A text's tokens.

    ids: [chunks, 77] int32: start, tokens, end, padding. weights: [chunks, 77] float32, 1 for the marks and the
    padding. ends: [chunks] int32, the place of the first end mark, where the pooled output is read. mean_restored: see
    `Emphasis`.
    """

    ids: np.ndarray
    weights: np.ndarray
    ends: np.ndarray
    mean_restored: bool


def chunked(
    sections: Sequence[Section], vocabulary: Vocabulary, emphasis: Emphasis, inversions: Inversions | None = None
) -> Chunks:
    """The chunks of a text, at least one.

    Every piece is tokenized by itself. A full chunk that has a comma among its last 20 tokens ends behind that comma.
    `BREAK` ends a chunk, even one that is empty. The vectors of a textual inversion stay in one chunk.
    """
    filling = _Filling(vocabulary.ids(","))
    split = splitter(vocabulary, inversions or {})
    for number, section in enumerate(sections):
        if number:
            filling.finish()
        for text, weight in section:
            for together in split(text):
                filling.add(together, weight)
    if filling.current or not filling.full:
        filling.finish()
    return _arrays(filling.full, vocabulary.special, emphasis)


class _Filling:
    """Chunks while they are filled: those that are finished, and the current one."""

    def __init__(self, comma: list[int]) -> None:
        self.full: list[list[Weighted]] = []
        self.current: list[Weighted] = []
        self._comma = comma
        self._behind_comma = 0  # the current chunk's length after its last comma; 0 for none

    def finish(self) -> None:
        self.full.append(self.current)
        self.current = []
        self._behind_comma = 0

    def add(self, ids: Sequence[int], weight: float) -> None:
        """Adds tokens that stay together."""
        is_comma = list(ids) == self._comma
        if len(self.current) == LENGTH:
            self._go_on(self._behind_comma if not is_comma else 0)
        if len(self.current) + len(ids) > LENGTH:
            self.finish()
        self.current += [(token, weight) for token in ids]
        if is_comma:
            self._behind_comma = len(self.current)

    def _go_on(self, comma: int) -> None:
        """Finishes a full chunk: behind its last comma, if that is near."""
        moved = []
        if comma and LENGTH - comma < BACKTRACK:
            moved = self.current[comma:]
            del self.current[comma:]
        self.finish()
        self.current = moved


def splitter(vocabulary: Vocabulary, inversions: Inversions) -> Callable[[str], Iterator[Sequence[int]]]:
    """split(text): the text's ids, by what stays together: each token, and all ids of a textual inversion. Its word
    is found in any case, and not within a longer word."""
    words = sorted(inversions, key=len, reverse=True)
    pattern = re.compile("|".join(f"({_bounded(word)})" for word in words) or "(?!)", re.IGNORECASE)

    def split(text: str) -> Iterator[Sequence[int]]:
        start = 0
        for found in pattern.finditer(text):
            yield from ([token] for token in vocabulary.ids(text[start : found.start()]))
            assert found.lastindex is not None
            yield inversions[words[found.lastindex - 1]]
            start = found.end()
        yield from ([token] for token in vocabulary.ids(text[start:]))

    return split


def _bounded(word: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return before + re.escape(word) + after


def _arrays(chunks: Sequence[Sequence[Weighted]], special: SpecialTokens, emphasis: Emphasis) -> Chunks:
    ids = np.full((len(chunks), PROMPT_TOKENS), special.pad, np.int32)
    weights = np.ones((len(chunks), PROMPT_TOKENS), np.float32)
    ids[:, 0] = special.start
    for row, chunk in enumerate(chunks):
        end = len(chunk) + 1
        ids[row, 1:end] = [token for token, _ in chunk]
        ids[row, end] = special.end
        if emphasis.weighted:
            weights[row, 1:end] = [weight for _, weight in chunk]
    ends = np.argmax(ids == special.end, axis=1).astype(np.int32)
    return Chunks(ids, weights, ends, emphasis.mean_restored)
