"""Models without trained weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import checks, schedulers
from .presets import ARCHITECTURES, CLIP_VOCABULARY, Architecture
from .source import Load, TextToImage

BUILT_IN = Path(__file__).parents[1] / "demo" / "model"
"""The built-in model, a diffusers folder."""

T = TypeVar("T")


class RandomWeights(TextToImage):
    """A known architecture with seeded random weights: for sizes, speed and tests, not for pictures that mean
    something."""

    def __init__(self, name: str, seed: int = 0, sampler: str | None = None) -> None:
        super().__init__(f"{name}-random", {"kind": "random", "id": name})
        self.seed, self._sampler = seed, sampler
        self._architecture: Architecture = ARCHITECTURES[name]

    def _build(self, make: Callable[[], T]) -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return make()

    def text_encoder(self) -> CLIPTextModel:
        return self._build(
            lambda: CLIPTextModel(
                CLIPTextConfig(
                    **self._architecture.text_encoder,
                    bos_token_id=CLIP_VOCABULARY - 2,
                    eos_token_id=CLIP_VOCABULARY - 1,
                )
            ).eval()
        )

    def unet(self) -> UNet2DConditionModel:
        return self._build(lambda: UNet2DConditionModel(**self._architecture.unet).eval())

    def vae(self) -> AutoencoderKL:
        return self._build(lambda: AutoencoderKL(**self._architecture.vae).eval())

    def tokenizer(self) -> CLIPTokenizer:
        """The built-in model's merges, with CLIP's ids for the start and the end token. So ids are in CLIP's range, but
        the words are others."""
        vocabulary = json.loads((BUILT_IN / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        merges = (BUILT_IN / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        vocabulary |= {"<|startoftext|>": CLIP_VOCABULARY - 2, "<|endoftext|>": CLIP_VOCABULARY - 1}
        return CLIPTokenizer(
            vocabulary,
            [tuple(merge.split(" ")) for merge in merges],
            pad_token=self._architecture.pad_token,
            model_max_length=77,
        )

    def scheduler_config(self) -> dict[str, Any]:
        return schedulers.shipped(self._architecture.scheduler, self.name, self._sampler)

    def config(self, part: str) -> dict[str, Any]:
        return config_of(self._architecture, part)

    def _check_weights(self, load: Load) -> None:
        """Nothing to check: the weights are made here, not read."""

    def sample_size(self) -> int:
        return int(self._architecture.vae["sample_size"])

    def _fingerprint(self, part: str) -> str:
        config = json.dumps([self._architecture.__dict__, self.seed, part, torch.__version__], sort_keys=True)
        return hashlib.sha256(config.encode()).hexdigest()


def config_of(known: Architecture, part: str) -> dict[str, Any]:
    """The configuration of a part of a known architecture, with its defaults."""
    if part == "text_encoder":
        return CLIPTextConfig(**known.text_encoder).to_dict()
    return checks.with_defaults(*((UNet2DConditionModel, known.unet) if part == "unet" else (AutoencoderKL, known.vae)))
