"""Texts to embeddings, which are kept for later calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..backends.interface import Backend
from ..backends.recent import Recent
from ..contract import PROMPT_TOKENS, Family
from ..job import Conditioning, Joined
from .chunks import Chunks, chunked, splitter
from .emphasis import EMPHASES, Emphasis, sections
from .table import TokenTable
from .tokenizer import ClipTokenizer

KEPT = 64
"""The number of chunks' embeddings that are kept. SD 1.5's take 0.24 MB each."""


@dataclass(frozen=True)
class Text:
    """A text as it is encoded. syntax: "plain" is cut after 75 tokens, "a1111" has brackets and any number of chunks.
    skip: how many of the encoder's last layers are left out."""

    text: str
    syntax: str = "plain"
    emphasis: Emphasis = EMPHASES["original"]
    skip: int = 0


@dataclass(frozen=True, eq=False)
class Chunk:
    """A row of the text encoder: ids [77] int32, weights [77] float32."""

    ids: np.ndarray
    weights: np.ndarray
    restore: bool
    skip: int

    @cached_property
    def key(self) -> tuple[bytes, bytes, bool, int]:
        """Equal for equal embeddings only: all that the encoder reads follows from it."""
        return self.ids.tobytes(), self.weights.tobytes(), self.restore, self.skip


class TextConditioning:
    """The embeddings of texts. The key of an embedding is everything that the text encoder computed it from, so another
    input always has another key. `table` has the textual inversions."""

    def __init__(self, tokenizer: ClipTokenizer, table: TokenTable, backend: Backend, family: Family) -> None:
        self._tokenizer, self.table, self._backend = tokenizer, table, backend
        self._joined = {one.name for one in family["denoiser"].inputs if "tokens" in one.names}
        self._kept: Recent[tuple[bytes, bytes, bool, int], Conditioning] = Recent(KEPT)

    def __call__(self, texts: Sequence[Text], tokenized: Callable[[], None] = lambda: None) -> list[Conditioning]:
        """One embedding for each text, the same object for equal texts. One call of the text encoder makes the chunks
        that are not kept. `tokenized` is called after tokenizing."""
        chunks = {text: self.chunks(text) for text in texts}
        tokenized()
        encoded = self._encode([chunk for several in chunks.values() for chunk in several])
        joined = {text: self._join([encoded[chunk.key] for chunk in several]) for text, several in chunks.items()}
        return [joined[text] for text in texts]

    def given(self, embedding: np.ndarray) -> Conditioning:
        """An embedding [T, C] that a call passes, as the one of a text."""
        return dict.fromkeys(self._joined, embedding)

    def chunks(self, text: Text) -> list[Chunk]:
        """The rows of the text encoder that a text becomes."""
        if text.syntax == "plain":
            found = self._plain(text.text)
        else:
            found = chunked(sections(text.text), self._tokenizer, text.emphasis, self.table.words)
        return [
            Chunk(ids, weights, found.mean_restored and bool((weights != 1).any()), text.skip)
            for ids, weights in zip(found.ids, found.weights)
        ]

    def _plain(self, text: str) -> Chunks:
        split = splitter(self._tokenizer, self.table.words)
        ids = self._tokenizer([text], lambda text: [token for together in split(text) for token in together])
        ends = np.argmax(ids == self._tokenizer.special.end, axis=1).astype(np.int32)
        return Chunks(ids, np.ones(ids.shape, np.float32), ends, False)

    def _encode(self, chunks: Sequence[Chunk]) -> dict[tuple[bytes, bytes, bool, int], Conditioning]:
        """The embeddings of chunks, by key."""
        found = {chunk.key: self._kept[chunk.key] for chunk in chunks if chunk.key in self._kept}
        new = {chunk.key: chunk for chunk in chunks if chunk.key not in found}
        if new:
            found.update(zip(new, self._backend.encode_text(self._inputs(list(new.values())))))
        for chunk in chunks:
            self._kept.put(chunk.key, found[chunk.key])
        return found

    def _inputs(self, chunks: Sequence[Chunk]) -> dict[str, np.ndarray]:
        """The text encoder's."""
        return {
            "embeddings": self.table(np.stack([chunk.ids for chunk in chunks])),
            "emphasis": np.stack([chunk.weights for chunk in chunks]),
            "restore": np.array([chunk.restore for chunk in chunks], np.int32),
            "skip": np.array([chunk.skip for chunk in chunks], np.int32),
        }

    def _join(self, chunks: Sequence[Conditioning]) -> Conditioning:
        """A text's embedding: its chunks one behind the other; what has no tokens is the first one's."""
        joined = {name: _behind([chunk[name] for chunk in chunks]) for name in self._joined}
        return {**chunks[0], **joined}

    def clear(self) -> None:
        """Frees the embeddings."""
        self._kept.clear()


def _behind(values: Sequence[Any]) -> Any:
    """Values of 77 tokens one behind the other: an array of arrays, for what is on a device the values themselves."""
    if not all(isinstance(value, np.ndarray) for value in values):
        return Joined(tuple(values), PROMPT_TOKENS * len(values))
    return values[0] if len(values) == 1 else np.concatenate(values)
