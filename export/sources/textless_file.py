"""Models without texts in one file: the checkpoints of improved-diffusion, guided-diffusion and latent diffusion."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from engine.bundle import sha256

from . import latent_diffusion, openai, openai_flags, schedulers, weights
from .checks import with_defaults
from .latent_diffusion import LatentDiffusion
from .reading import reading
from .textless_source import CLASSES, Textless


def is_textless(file: Path) -> bool:
    """Whether a checkpoint is of a model that takes no text, by the names of its tensors. Raises
    UnreadableModelError."""
    names = weights.names(file)
    return openai.is_openai(names) or latent_diffusion.is_latent_diffusion(names)


class TextlessFile(Textless):
    """A checkpoint, with the flags beside it that openai_flags.py tells about."""

    def __init__(self, file: Path, sampler: str | None = None) -> None:
        super().__init__(file.stem, {"kind": "file", "id": file.name, "path": str(file.resolve())}, (file,))
        self.file, self._sampler = file, sampler
        self._flags = openai_flags.read_flags(file)
        tensors = weights.read(file)
        self._latent: LatentDiffusion | None = None
        if openai.is_openai(set(tensors)):
            self._unet = reading(file, lambda: openai.read_unet(tensors, file, self._flags))
            self._scheduler = openai_flags.scheduler(file, self._flags, self._unet.learned)
        else:
            self._latent = latent = reading(file, lambda: latent_diffusion.read(tensors, file, self._flags))
            self._unet, self._scheduler = latent.unet, latent.scheduler
        self.models = {"unet": "U-Net"} if self._latent is None else {"unet": "U-Net", "vqvae": "decoder"}
        self._hash = reading(file, lambda: sha256(file))

    @property
    def decoder(self) -> str | None:
        return None if self._latent is None else self._latent.decoder.__name__

    def read(self, part: str) -> nn.Module:
        if part == "unet" or self._latent is None:
            model: nn.Module = reading(self.file, lambda: self._unet.model(self.file))
        else:
            latent = self._latent
            model = reading(self.file, lambda: latent.decoder_model(self.file))
        weights.check_finite(self.file, model)
        return model

    def config(self, part: str) -> dict[str, Any]:
        if part == "unet" or self._latent is None:
            return with_defaults(CLASSES["UNet2DModel"], self._unet.config)
        return with_defaults(self._latent.decoder, self._latent.decoder_config)

    def scheduler_config(self) -> dict[str, Any]:
        return schedulers.kept(self._scheduler, str(self.file), self._sampler, self.family)

    def _fingerprint(self, part: str) -> str:
        given = json.dumps([self._hash, part, repr(self._flags), self._scheduler], sort_keys=True)
        return hashlib.sha256(given.encode()).hexdigest()
