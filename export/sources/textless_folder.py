"""Models without texts in diffusers' layout: DDPM, Improved DDPM, and unconditional latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch import nn

from engine.contract import Family
from engine.errors import shown
from engine.family import textless

from ..errors import UnreadableModelError, UnsupportedModelError
from ..graphs.recipes import KL_LATENTS, PIXELS, VQ_LATENTS, Recipes
from ..textless import TextlessPipeline
from . import schedulers
from . import textless_checks as checks
from .checks import with_defaults
from .diffusers_folder import HASHED, check_entry, hash_files, load_weights, read_scheduler
from .reading import read_object, reading
from .source import Load, Source

PIPELINES = {"DDPMPipeline": None, "DDIMPipeline": None, "PNDMPipeline": None, "LDMPipeline": "vqvae"}
"""The `_class_name` of supported models, with the part that decodes latents."""

FILES = {"unet": "config.json", "vqvae": "vqvae/config.json", "scheduler": "scheduler_config.json"}
"""A part's configuration where it has no folder."""

CLASSES: dict[str, Any] = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}


class TextlessFolder(Source):
    """A folder as the `save_pretrained` of one of PIPELINES writes it."""

    def __init__(self, folder: Path, name: str, origin: Mapping[str, str], sampler: str | None = None) -> None:
        super().__init__(name, origin, (folder,))
        self.folder, self._sampler = folder, sampler
        self._file = folder / "model_index.json"
        self._index = read_object(self._file)
        self._decoder = PIPELINES[self._index["_class_name"]]
        self.models = {"unet": "U-Net"} if self._decoder is None else {"unet": "U-Net", "vqvae": "decoder"}
        for part in (*self.models, "scheduler"):
            check_entry(self._index, part, self._file)
            if not (folder / part).is_dir() and not (folder / FILES[part]).is_file():
                raise UnreadableModelError(f"{folder} has no folder {part}/; the model is incomplete")
        self._check_classes()

    def _place(self, part: str) -> Path:
        """The folder of a part. Early models have their U-Net and scheduler beside model_index.json."""
        return self.folder / part if (self.folder / part).is_dir() else self.folder

    def _check_classes(self) -> None:
        for part, known in (("unet", ("UNet2DModel",)), ("vqvae", checks.DECODERS)):
            if part in self.models and self._index[part][1] not in known:
                raise UnsupportedModelError(
                    f"{self._file} is of a {self._index['_class_name']} with {part}={shown(self._index[part][1])}; "
                    f"supported is {' or '.join(known)}"
                )

    @property
    def family(self) -> Family:
        self.check_parts()
        return textless(checks.traits_of(self.config("unet"), self._factor()))

    @property
    def recipes(self) -> Recipes:
        if self._decoder is None:
            return PIXELS
        return VQ_LATENTS if self._index["vqvae"][1] == "VQModel" else KL_LATENTS

    def _class(self, part: str) -> Any:
        return UNet2DModel if part == "unet" else CLASSES[self._index[part][1]]

    def load(self, part: str) -> nn.Module:
        name = "diffusion_pytorch_model"
        model: nn.Module = load_weights(
            self._place(part), self._class(part), f"{name}.safetensors", f"{name}.bin", low_cpu_mem_usage=False
        )
        return model

    def config(self, part: str) -> dict[str, Any]:
        return with_defaults(self._class(part), read_object(self._place(part) / "config.json"))

    def _factor(self) -> int:
        return checks.factor_of(None if self._decoder is None else self.config("vqvae"))

    def scheduler_config(self) -> dict[str, Any]:
        config, file = read_scheduler(self._place("scheduler"), self._index, self._sampler)
        return schedulers.kept(config, str(file), self._sampler, self.family)

    def sample_size(self) -> int:
        return checks.sample_size(self.config("unet"), self._factor())

    def check_parts(self) -> None:
        unet = self.config("unet")
        checks.check_unet(unet, on_pixels=self._decoder is None)
        if self._decoder is not None:
            checks.check_decoder(self._index["vqvae"][1], self.config("vqvae"), unet["in_channels"])

    def check_configs(self) -> None:
        self.check_parts()
        self.sample_size()
        self.scheduler_config()

    def _check_weights(self, load: Load) -> None:
        """Makes one picture in one step, because options that a constructor accepts may still fail there."""
        pipeline, size = self.pipeline(load), self.sample_size()
        reading(self.folder, lambda: pipeline(0, torch.Generator().manual_seed(0), (size, size), 1))

    def pipeline(self, load: Load | None = None) -> TextlessPipeline:
        load = load or self.load
        decoder = None if self._decoder is None else load("vqvae")
        return TextlessPipeline(load("unet"), decoder, self.scheduler_config(), self.family)

    def _fingerprint(self, part: str) -> str:
        folder = self._place(part)
        return reading(folder, lambda: hash_files(folder, self.folder, HASHED))
