"""Tokens: a text becomes 77 token ids, for CLIP and for the BERT of latent diffusion."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Encoder

from ..bundle import SpecialTokens
from ..contract import PROMPT_TOKENS
from ..errors import ManifestError

END_OF_WORD = "</w>"
"""The end of a word in CLIP's byte pairs."""

MARK = r"<.+>|\[.+\]"
"""CLIP's marks are like <|startoftext|>, and BERT's like [CLS]."""

SHOWN_CHARACTERS = 300
"""The most characters of cut-off text that the warning shows."""

logger = logging.getLogger(__name__)


class ClipTokenizer:
    """Gives the ids of the model's `transformers.CLIPTokenizer` or `BertTokenizer`, from the bundle's
    tokenizer.json."""

    def __init__(self, file: Path, special: SpecialTokens) -> None:
        try:
            self._encoder = Encoder.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ManifestError(f"{file} is not a tokenizer: {error}") from error
        self._check_marks(special, file)
        self._encoder.no_padding()
        self._encoder.no_truncation()
        self.special = special

    def __call__(self, texts: list[str], ids_of: Callable[[str], list[int]] | None = None) -> np.ndarray:
        """Token ids, [len(texts), 77] int32: start, text, end, padding. Text beyond 75 tokens is cut off, with
        diffusers' warning. `ids_of` replaces `ids`."""
        ids = np.full((len(texts), PROMPT_TOKENS), self.special.pad, np.int32)
        for row, text in zip(ids, texts):
            tokens = (ids_of or self.ids)(text)
            kept, removed = tokens[: PROMPT_TOKENS - 2], tokens[PROMPT_TOKENS - 2 :]
            if removed:
                cut = self._text(removed)
                logger.warning(
                    "The following part of your input was truncated because CLIP can only handle sequences up to %d "
                    "tokens: %s",
                    PROMPT_TOKENS,
                    [cut if len(cut) <= SHOWN_CHARACTERS else f"{cut[:SHOWN_CHARACTERS]}..."],
                )
            row[0] = self.special.start
            row[1 : len(kept) + 1] = kept
            row[len(kept) + 1] = self.special.end
        return ids

    def ids(self, text: str) -> list[int]:
        """The ids of a text of any length, without marks and padding."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def _check_marks(self, special: SpecialTokens, file: Path) -> None:
        """ManifestError unless start and end are two different marks of the vocabulary, and the padding is a token of
        it."""
        start, end, pad = (self._encoder.id_to_token(number) for number in (special.start, special.end, special.pad))
        if start == end or pad is None or not all(mark and re.fullmatch(MARK, mark) for mark in (start, end)):
            raise ManifestError(
                f"the manifest has the tokens start={special.start}, end={special.end} and pad={special.pad}, which "
                f"are {start!r}, {end!r} and "
                f"{pad!r} in {file}; start and end must be two marks like '<|startoftext|>'"
            )

    def _text(self, tokens: list[int]) -> str:
        return self._encoder.decode(tokens, skip_special_tokens=False).replace(END_OF_WORD, " ").strip()
