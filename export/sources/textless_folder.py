"""Models without texts in diffusers' layout: DDPM, Improved DDPM, and unconditional latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from engine.errors import shown

from ..errors import UnreadableModelError, UnsupportedModelError
from . import schedulers
from . import textless_checks as checks
from .checks import with_defaults
from .diffusers_folder import HASHED, check_entry, hash_files, load_weights, read_scheduler
from .reading import read_object, reading
from .textless_source import CLASSES, Textless

PIPELINES = {"DDPMPipeline": None, "DDIMPipeline": None, "PNDMPipeline": None, "LDMPipeline": "vqvae"}
"""The `_class_name` of supported models, with the part that decodes latents."""

FILES = {"unet": "config.json", "vqvae": "vqvae/config.json", "scheduler": "scheduler_config.json"}
"""A part's configuration where it has no folder."""


class TextlessFolder(Textless):
    """A folder as the `save_pretrained` of one of PIPELINES writes it."""

    def __init__(self, folder: Path, name: str, origin: Mapping[str, str], sampler: str | None = None) -> None:
        super().__init__(name, origin, (folder,))
        self.folder, self._sampler = folder, sampler
        self._file = folder / "model_index.json"
        self._index = read_object(self._file)
        latents = PIPELINES[self._index["_class_name"]] is not None
        self.models = {"unet": "U-Net", "vqvae": "decoder"} if latents else {"unet": "U-Net"}
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
    def decoder(self) -> str | None:
        return None if "vqvae" not in self.models else str(self._index["vqvae"][1])

    def _class(self, part: str) -> Any:
        return CLASSES[self._index[part][1]]

    def read(self, part: str) -> nn.Module:
        name = "diffusion_pytorch_model"
        model: nn.Module = load_weights(
            self._place(part), self._class(part), f"{name}.safetensors", f"{name}.bin", low_cpu_mem_usage=False
        )
        return model

    def config(self, part: str) -> dict[str, Any]:
        return with_defaults(self._class(part), read_object(self._place(part) / "config.json"))

    def scheduler_config(self) -> dict[str, Any]:
        config, file = read_scheduler(self._place("scheduler"), self._index, self._sampler)
        return schedulers.kept(config, str(file), self._sampler, self.family)

    def _fingerprint(self, part: str) -> str:
        folder = self._place(part)
        return reading(folder, lambda: hash_files(folder, self.folder, HASHED))
