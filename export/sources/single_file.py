"""Models in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from engine.bundle import sha256
from engine.family import STABLE_DIFFUSION

from ..errors import UsageError
from . import averages, compvis, compvis_yaml, other_vae, schedulers, weights
from .checks import with_defaults
from .compvis_yaml import SILENT
from .diffusers_folder import hash_files, read_tokenizer
from .hub import download
from .random_weights import config_of
from .reading import reading
from .source import TextToImage

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
PREDICTION_TYPES = ("epsilon", "v_prediction")


def check_options(tokenizer: Path | None, prediction_type: str | None) -> None:
    """UsageError for a tokenizer that is no folder and a prediction type that is none."""
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"--prediction-type is {prediction_type!r}; it must be {' or '.join(PREDICTION_TYPES)}")
    if tokenizer is not None and not tokenizer.is_dir():
        raise UsageError(
            f"--tokenizer {tokenizer} is {'not a folder' if tokenizer.exists() else 'not there'}; pass the folder of a "
            "CLIP tokenizer (tokenizer.json, or vocab.json and merges.txt)"
        )


class CompVisFile(TextToImage):
    """A single .safetensors or .ckpt file with the names of the CompVis and Stability repositories, or the index of
    one in several. The .yaml of its name counts. ema: the U-Net's running averages are the model. vae: a VAE that
    stands in for the file's."""

    def __init__(
        self,
        file: Path,
        tokenizer: Path | None,
        prediction_type: str | None,
        sampler: str | None = None,
        ema: bool = False,
        vae: Path | None = None,
    ) -> None:
        check_options(tokenizer, prediction_type)
        if tokenizer is not None:
            read_tokenizer(tokenizer)
        settings = compvis_yaml.beside(file)
        parts = (*weights.files_of(file), settings, tokenizer, vae)
        super().__init__(
            weights.stem(file),
            {"kind": "file", "id": file.name, "path": str(file.resolve())},
            tuple(part for part in parts if part is not None),
        )
        self.file, self._sampler = file, sampler
        said = SILENT if settings is None else reading(settings, lambda: compvis_yaml.read(settings))
        self._weights = averages.apply(compvis.known_names(weights.read(file)), file, ema)
        self._vae = None if vae is None else other_vae.read(vae, compvis.vae_settings(self._weights, said))
        self._architecture = reading(
            file, lambda: compvis.architecture(self._weights, file, prediction_type, said, vae is not None)
        )
        self._hash = [reading(one, partial(sha256, one)) for one in weights.files_of(file)]
        self._ema = ema
        self._tokenizer_folder = tokenizer or download(
            CLIP_TOKENIZER, ("*.json", "*.txt"), "pass its folder with --tokenizer FOLDER"
        )

    @property
    def joins(self) -> tuple[int, ...]:
        return compvis.JOINS

    def text_encoder(self) -> CLIPTextModel:
        return self._checked(compvis.text_encoder)

    def unet(self) -> UNet2DConditionModel:
        return self._checked(compvis.unet)

    def vae(self) -> AutoencoderKL:
        return self._checked(compvis.vae) if self._vae is None else self._vae.model()

    def _checked(self, convert: Callable[..., Any]) -> Any:
        model = reading(self.file, lambda: convert(self.file, self._weights, self._architecture))
        weights.check_finite(self.file, model)
        return model

    def tokenizer(self) -> CLIPTokenizer:
        return read_tokenizer(self._tokenizer_folder, pad_token=self._architecture.pad_token)

    def _tokenizer_name(self) -> str:
        return str(self._tokenizer_folder)

    def config(self, part: str) -> dict[str, Any]:
        if part == "vae" and self._vae is not None:
            return with_defaults(AutoencoderKL, self._vae.config)
        return config_of(self._architecture, part)

    def scheduler_config(self) -> dict[str, Any]:
        return schedulers.of_family(self._architecture.scheduler, str(self.file), self._sampler, self.family)

    def sample_size(self) -> int:
        return STABLE_DIFFUSION.factor * int(self._architecture.unet["sample_size"])

    def _fingerprint(self, part: str) -> str:
        if part == "tokenizer":
            folder = self._tokenizer_folder
            return reading(folder, lambda: hash_files(folder, folder, {".json", ".txt"}))
        if part == "vae" and self._vae is not None:
            return self._vae.fingerprint() + repr(sorted(self._vae.config.items()))
        known = self._architecture
        config = json.dumps([self._hash, self._ema, part, getattr(known, part), known.scheduler], sort_keys=True)
        return hashlib.sha256(config.encode()).hexdigest()
