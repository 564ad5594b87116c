"""CLIP tokens: a text becomes 77 token ids."""
from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Encoder

from .bundle import SpecialTokens
from .contract import PROMPT_TOKENS
from .errors import ManifestError

END_OF_WORD = "</w>"
"""What CLIP's byte pairs end a word with."""

logger = logging.getLogger(__name__)


class ClipTokenizer:
    """What `transformers.CLIPTokenizer` of the model gives, from the bundle's tokenizer.json."""

    def __init__(self, file: Path, special: SpecialTokens) -> None:
        try:
            self._encoder = Encoder.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ManifestError(f"{file} is not a tokenizer: {error}; build the bundle again with build_engines.py --force") from error
        self._encoder.no_padding()
        self._encoder.no_truncation()
        self._special = special

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Token ids, [len(texts), 77] int32: start, text, end, padding. Text beyond 75 tokens is cut off, with diffusers' warning."""
        ids = np.full((len(texts), PROMPT_TOKENS), self._special.pad, np.int32)
        for row, text in zip(ids, texts):
            tokens = self._encoder.encode(text, add_special_tokens=False).ids
            kept, removed = tokens[:PROMPT_TOKENS - 2], tokens[PROMPT_TOKENS - 2:]
            if removed:
                logger.warning("The following part of your input was truncated because CLIP can only handle sequences up to %d tokens: %s",
                               PROMPT_TOKENS, [self._text(removed)])
            row[0] = self._special.start
            row[1:len(kept) + 1] = kept
            row[len(kept) + 1] = self._special.end
        return ids

    def _text(self, tokens: list[int]) -> str:
        return self._encoder.decode(tokens, skip_special_tokens=False).replace(END_OF_WORD, " ").strip()
