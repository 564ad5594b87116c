"""The vectors of tokens: the model's, in a file that is mapped, and those of textual inversions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import InversionError, ManifestError, shown
from .inversion import FIRST, Inversion


class TokenTable:
    """Vectors by the ids of tokens. The ids of a textual inversion follow the model's, and none is given out twice:
    equal ids have equal vectors."""

    def __init__(self, file: Path) -> None:
        """ManifestError if the file holds no table of vectors."""
        try:
            table = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ManifestError(f"{file} is no array of NumPy ({error})") from error
        if table.ndim != 2 or table.dtype not in (np.float32, np.float16) or not table.size:
            raise ManifestError(f"{file} holds {table.dtype} of shape {table.shape} instead of vectors of tokens")
        self._table: np.ndarray = table
        self._added: dict[str, tuple[range, np.ndarray]] = {}
        self._hashes: dict[str, str] = {}
        self._next = len(table)

    @property
    def count(self) -> int:
        """The number of the model's own tokens."""
        return len(self._table)

    @property
    def width(self) -> int:
        return int(self._table.shape[1])

    @property
    def words(self) -> Mapping[str, range]:
        """The words of the textual inversions, with their ids."""
        return {word: ids for word, (ids, _) in self._added.items()}

    @property
    def hashes(self) -> Mapping[str, str]:
        """The SHA-256 of each word's vectors."""
        return dict(self._hashes)

    def add(self, inversion: Inversion) -> None:
        """Adds a word. InversionWidthError if its vectors are another model's, InversionError if it is there, in any
        case."""
        inversion.check({FIRST: self.width})
        if self._known(inversion.word) is not None:
            raise InversionError(
                f"the word {shown(inversion.word)} has vectors already; unload_textual_inversion({inversion.word!r}) "
                "first, or pass another token"
            )
        ids = range(self._next, self._next + inversion.count)
        self._added[inversion.word] = ids, inversion.vectors[FIRST]
        self._hashes[inversion.word] = hashlib.sha256(inversion.vectors[FIRST].tobytes()).hexdigest()
        self._next = ids.stop

    def remove(self, word: str) -> None:
        """Removes a word. InversionError if it is not there."""
        known = self._known(word) if isinstance(word, str) else None
        if known is None:
            loaded = ", ".join(map(repr, self._added)) or "none"
            raise InversionError(f"no textual inversion has the word {shown(word)}; loaded are: {loaded}")
        del self._added[known], self._hashes[known]

    def _known(self, word: str) -> str | None:
        """The word as it was added, which prompts may write in any case."""
        return next((one for one in self._added if one.casefold() == word.casefold()), None)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The vectors [..., width] float32 of ids [...]."""
        own = ids < self.count
        vectors = self._table[np.where(own, ids, 0)].astype(np.float32)
        for numbers, added in self._added.values():
            inside = (ids >= numbers.start) & (ids < numbers.stop)
            vectors[inside] = added[ids[inside] - numbers.start]
        return vectors
