"""Models in diffusers' layout: a folder with a folder for each part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engine.bundle import sha256
from engine.errors import shown
from engine.manifest import LowResolution

from ..errors import UnreadableModelError, UnsupportedModelError
from . import checks, schedulers, weights
from .reading import read_object, reading
from .source import PARTS, TextToImage

HASHED = {".json", ".txt", ".safetensors", ".bin"}
"""Suffixes of the files that a part of a diffusers folder is made of."""

PIPELINES = {
    "StableDiffusionPipeline": checks.PLAIN,
    "StableDiffusionImg2ImgPipeline": checks.PLAIN,
    "StableDiffusionInpaintPipeline": (5, 0),
    "StableDiffusionDepth2ImgPipeline": (1,),
    "StableDiffusionInstructPix2PixPipeline": (4,),
    "StableDiffusionUpscalePipeline": (checks.UPSCALER,),
}
"""The supported `_class_name` in model_index.json, with the channels that its U-Net may see beside the latents."""

LOW_RESOLUTION = "low_res_scheduler"
CLASSES = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
"""The library and class of each part in the model_index.json of a supported model."""


class DiffusersFolder(TextToImage):
    """A folder as diffusers' `save_pretrained` writes it."""

    def __init__(self, folder: Path, name: str, origin: Mapping[str, str], sampler: str | None = None) -> None:
        super().__init__(name, origin, (folder,))
        self.folder, self._sampler = folder, sampler
        self._index = reading(folder, self._read_index)

    def _read_index(self) -> dict[str, Any]:
        file = self.folder / "model_index.json"
        if not file.exists():
            raise UnreadableModelError(
                f"{self.folder} has no model_index.json, so it is not a diffusers model; "
                f"{_inside(self.folder) or 'pass the folder that save_pretrained wrote'}"
            )
        index = read_object(file)
        _check_index(index, file)
        upscales = index["_class_name"] == "StableDiffusionUpscalePipeline"
        for part in (*PARTS, LOW_RESOLUTION) if upscales else PARTS:
            if not (self.folder / part).is_dir():
                raise UnreadableModelError(f"{self.folder} has no folder {part}/; the model is incomplete")
        return index

    @property
    def joins(self) -> tuple[int, ...]:
        return PIPELINES[self._index["_class_name"]]

    def _load(self, cls: Any, part: str, safetensors: str, pickle: str, **options: Any) -> Any:
        return load_weights(self.folder / part, cls, safetensors, pickle, **options)

    def text_encoder(self) -> CLIPTextModel:
        return self._load(CLIPTextModel, "text_encoder", "model.safetensors", "pytorch_model.bin")

    def unet(self) -> UNet2DConditionModel:
        return self._load_diffusers(UNet2DConditionModel, "unet")

    def vae(self) -> AutoencoderKL:
        return self._load_diffusers(AutoencoderKL, "vae")

    def _load_diffusers(self, cls: Any, part: str) -> Any:
        name = "diffusion_pytorch_model"
        return self._load(cls, part, f"{name}.safetensors", f"{name}.bin", low_cpu_mem_usage=False)

    def tokenizer(self) -> CLIPTokenizer:
        return read_tokenizer(self.folder / "tokenizer")

    def _tokenizer_name(self) -> str:
        return str(self.folder / "tokenizer")

    def config(self, part: str) -> dict[str, Any]:
        file = self.folder / part / "config.json"
        given = read_object(file)
        if part == "text_encoder":
            return reading(file, lambda: CLIPTextConfig.from_pretrained(file.parent, local_files_only=True).to_dict())
        return checks.with_defaults(UNet2DConditionModel if part == "unet" else AutoencoderKL, given)

    def scheduler_config(self) -> dict[str, Any]:
        config, file = read_scheduler(self.folder / "scheduler", self._index, self._sampler)
        return schedulers.of_family(config, str(file), self._sampler, self.family)

    def low_resolution(self) -> LowResolution | None:
        if self.family.joins != "low_resolution":
            return None
        file = self.folder / LOW_RESOLUTION / "scheduler_config.json"
        most = self._index.get("max_noise_level", checks.MAX_NOISE_LEVEL)
        return checks.check_low_resolution(read_object(file), most, self.family.noise_levels, str(file))

    def sample_size(self) -> int:
        return self.family.factor * checks.latent_size(self.config("unet"))

    def _fingerprint(self, part: str) -> str:
        folder = self.folder / part
        return reading(folder, lambda: hash_files(folder, self.folder, HASHED))


def _inside(folder: Path) -> str:
    """What to pass instead of a folder that holds models, as DreamBooth's has one for each number of steps."""
    found = sorted(file.parent for file in folder.glob("*/model_index.json"))
    found += sorted(file for file in folder.iterdir() if file.suffix.lower() in weights.CHECKPOINT_SUFFIXES)
    return f"pass what is in it: {', '.join(str(path) for path in found[:3])}" if found else ""


def _check_index(index: Mapping[str, Any], file: Path) -> None:
    """UnsupportedModelError for a model_index.json of another kind of model, UnreadableModelError for a garbled one."""
    pipeline = index.get("_class_name")
    if pipeline not in tuple(PIPELINES) or "text_encoder_2" in index:
        raise UnsupportedModelError(
            f"{file} is of a {shown(pipeline)}; supported are {checks.MODELS} ({' or '.join(PIPELINES)}), "
            f"and {', '.join(checks.EARLIER)}"
        )
    for part in PARTS:
        check_entry(index, part, file)
    for part, expected in CLASSES.items():
        if index[part][1] != expected[1]:
            raise UnsupportedModelError(
                f"{file} is of a {pipeline} with {part}={index[part][1]}; supported are {checks.MODELS} "
                f"({part}={expected[1]}, one text encoder)"
            )


def check_entry(index: Mapping[str, Any], part: str, file: Path) -> None:
    """UnreadableModelError unless a part of model_index.json has a library and a class."""
    entry = index.get(part)
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
        raise UnreadableModelError(
            f"{file} has {part}={shown(entry)}; it must be the library and the class, "
            f"for example {json.dumps(CLASSES.get(part, ('diffusers', 'DDIMScheduler')))}"
        )


def load_weights(folder: Path, cls: Any, safetensors: str, pickle: str, **options: Any) -> Any:
    """A part of a model in a folder, float32, from files of these names. Raises UnreadableModelError or
    UnsafePickleError."""
    chosen = reading(folder, lambda: weights.choose(folder, safetensors, pickle))
    for file in chosen.files:
        weights.check_floats(file)
    model, info = reading(
        folder,
        lambda: cls.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **chosen.options,
            **options,
        ),
    )
    weights.check_loading(folder, info)
    weights.check_finite(folder, model)
    return model


def read_scheduler(folder: Path, index: Mapping[str, Any], sampler: str | None) -> tuple[dict[str, Any], Path]:
    """The scheduler_config.json in a folder and its path. UnreadableModelError where it and model_index.json disagree,
    unless another `sampler` replaces it."""
    file = folder / "scheduler_config.json"
    config, named = read_object(file), index["scheduler"][1]
    if sampler is None and config.get("_class_name", named) != named:
        raise UnreadableModelError(
            f"{file} has _class_name={shown(config['_class_name'])} and model_index.json {named}; make them the "
            "same, or ship "
            f"another scheduler with --scheduler NAME"
        )
    return config, file


def hash_files(folder: Path, root: Path, suffixes: set[str]) -> str:
    """A hash of the files in a folder that have one of the suffixes: of their contents, and their names in `root`."""
    files = sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())
    lines = [f"{file.relative_to(root).as_posix()} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_tokenizer(folder: Path, **options: str) -> CLIPTokenizer:
    """The CLIP tokenizer in a folder."""
    file = folder / "tokenizer_config.json"
    checks.check_tokenizer_config(read_object(file), str(file))
    return reading(folder, lambda: CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options))
