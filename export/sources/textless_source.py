"""Models without texts, from any kind of source."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel

from engine.contract import Family
from engine.family import textless

from ..graphs.recipes import KL_LATENTS, PIXELS, VQ_LATENTS, Recipes
from ..textless import TextlessPipeline
from . import textless_checks as checks
from .reading import reading
from .source import Load, Source

CLASSES: dict[str, Any] = {"UNet2DModel": UNet2DModel, "VQModel": VQModel, "AutoencoderKL": AutoencoderKL}


class Textless(Source):
    """A U-Net on pixels, or on the latents of a decoder."""

    @property
    @abstractmethod
    def decoder(self) -> str | None:
        """The class of the decoder, VQModel or AutoencoderKL; None for a model on pixels."""

    @property
    def family(self) -> Family:
        self.check_parts()
        return textless(checks.traits_of(self.config("unet"), self._factor()))

    @property
    def recipes(self) -> Recipes:
        if self.decoder is None:
            return PIXELS
        return VQ_LATENTS if self.decoder == "VQModel" else KL_LATENTS

    def _factor(self) -> int:
        return checks.factor_of(None if self.decoder is None else self.config("vqvae"))

    def sample_size(self) -> int:
        return checks.sample_size(self.config("unet"), self._factor())

    def check_parts(self) -> None:
        unet = self.config("unet")
        checks.check_unet(unet, on_pixels=self.decoder is None)
        if self.decoder is not None:
            checks.check_decoder(self.decoder, self.config("vqvae"), unet["in_channels"])

    def check_configs(self) -> None:
        self.check_parts()
        self.sample_size()
        self.scheduler_config()

    def _check_weights(self, load: Load) -> None:
        """Makes one picture in one step, because options that a constructor accepts may still fail there."""
        pipeline, size = self.pipeline(load), self.sample_size()
        reading(self.inputs[0], lambda: pipeline(0, torch.Generator().manual_seed(0), (size, size), 1))

    def pipeline(self, load: Load | None = None) -> TextlessPipeline:
        load = load or self.load
        decoder = None if self.decoder is None else load("vqvae")
        return TextlessPipeline(load("unet"), decoder, self.scheduler_config(), self.family)
