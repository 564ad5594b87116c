"""Texts to embeddings, which are kept for later calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..backends.interface import Backend
from ..backends.recent import Recent
from ..job import Conditioning
from .tokenizer import ClipTokenizer

KEPT = 64
"""The number of embeddings that are kept. SD 1.5's take 0.24 MB each."""

Key = tuple[bytes, ...]


class TextConditioning:
    """The embeddings of texts. The key of an embedding is everything that the text encoder computed it from, so another
    input always has another key."""

    def __init__(self, tokenizer: ClipTokenizer, backend: Backend) -> None:
        self._tokenizer, self._backend = tokenizer, backend
        self._kept: Recent[Key, Conditioning] = Recent(KEPT)

    def __call__(self, texts: Sequence[str], tokenized: Callable[[], None] = lambda: None) -> list[Conditioning]:
        """One embedding for each text. One call of the text encoder makes those that are not kept. `tokenized` is
        called after tokenizing."""
        inputs = {"input_ids": self._tokenizer(list(texts))}
        tokenized()
        keys = [tuple(array[i].tobytes() for array in inputs.values()) for i in range(len(texts))]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = [i for i, key in enumerate(keys) if key not in found and keys.index(key) == i]
        if new:
            encoded = self._backend.encode_text({name: np.ascontiguousarray(a[new]) for name, a in inputs.items()})
            found.update({keys[i]: conditioning for i, conditioning in zip(new, encoded)})
        for key in keys:
            self._kept.put(key, found[key])
        return [found[key] for key in keys]

    def clear(self) -> None:
        """Frees the embeddings."""
        self._kept.clear()
