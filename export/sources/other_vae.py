"""A VAE of its own: a file or a folder that stands in for the one in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from engine.bundle import sha256

from ..errors import UsageError
from . import compvis, weights
from .checks import with_defaults
from .compvis import VAE
from .diffusers_folder import HASHED, hash_files, load_weights
from .presets import ARCHITECTURES
from .reading import read_object, reading

PREFIXES = (VAE, "vae.", "")
OWN = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""What the names of a VAE's tensors begin with; a file may hold its loss too."""

FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the attention's layers in diffusers' older files."""


@dataclass(frozen=True)
class OtherVae:
    """A VAE with its configuration. tensors: by diffusers' names, or None for a folder, which is read when needed."""

    place: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] | None

    def model(self) -> AutoencoderKL:
        """In float32. UnreadableModelError names tensors that do not fit."""
        if self.tensors is None:
            name = "diffusion_pytorch_model"
            files = (f"{name}.safetensors", f"{name}.bin")
            model: AutoencoderKL = load_weights(self.place, AutoencoderKL, *files, low_cpu_mem_usage=False)
            return model
        model = AutoencoderKL(**self.config)
        compvis.fill(self.place, model, self.tensors)
        weights.check_finite(self.place, model)
        return model

    def fingerprint(self) -> str:
        """A hash of its files."""
        if self.tensors is None:
            return reading(self.place, lambda: hash_files(self.place, self.place, HASHED))
        return reading(self.place, lambda: sha256(self.place))


def read(place: Path, settings: Mapping[str, Any]) -> OtherVae:
    """The VAE in a file, of CompVis' or diffusers' names, or in a folder of diffusers'; of a whole model its VAE is
    taken. `settings` are options of AutoencoderKL that no tensor tells.

    Raises UsageError, UnreadableModelError, UnsupportedModelError or UnsafePickleError.
    """
    if place.is_dir():
        return _read_folder(place)
    if not place.is_file():
        raise UsageError(f"--vae {place} is not there; pass a VAE's file ({_suffixes()}) or its diffusers folder")
    if place.suffix.lower() not in weights.CHECKPOINT_SUFFIXES:
        raise UsageError(f"--vae {place} is not a file of weights; it must be one of {_suffixes()}, or a folder")
    tensors = without_prefix(weights.read(place), place)
    weights.refuse_integers(place, weights.integers_of(tensors))
    return reading(place, lambda: _of_tensors(place, tensors, settings))


def _read_folder(folder: Path) -> OtherVae:
    if (folder / "model_index.json").is_file():
        folder = folder / "vae"
    config = read_object(folder / "config.json")
    found = config.get("_class_name", "AutoencoderKL")
    if found != "AutoencoderKL":
        raise UsageError(f"--vae {folder} holds a {found}; a Stable Diffusion model needs an AutoencoderKL")
    return OtherVae(folder, with_defaults(AutoencoderKL, config), None)


def without_prefix(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The VAE's tensors of a file, without `first_stage_model.` or `vae.`. UsageError where there are none."""
    for prefix in PREFIXES:
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if "decoder.conv_in.weight" in own:
            return {name: value for name, value in own.items() if name.startswith(OWN)}
    raise UsageError(
        f"--vae {file} holds no VAE: it has no decoder.conv_in.weight, with or without {VAE} before it; pass the VAE's "
        "own file, or a checkpoint that has one"
    )


def _of_tensors(file: Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> OtherVae:
    preset = ARCHITECTURES["sd15"].vae
    if any(name.startswith("decoder.up_blocks.") for name in tensors):
        named = {_new_name(name): value for name, value in tensors.items()}
        converted = {name: _as_linear(name, value) for name, value in named.items()}
        return OtherVae(file, {**preset, **_diffusers_config(converted), **settings}, converted)
    prefixed = {VAE + name: value for name, value in tensors.items()}
    config = {**preset, **compvis.vae_config(prefixed), **settings}
    return OtherVae(file, config, convert_ldm_vae_checkpoint(prefixed, config))


def _new_name(name: str) -> str:
    former = re.search(r"\.attentions\.\d+\.(query|key|value|proj_attn)\.", name)
    return name if former is None else name.replace(f".{former[1]}.", f".{FORMER[former[1]]}.")


def _as_linear(name: str, value: Tensor) -> Tensor:
    """A 1x1 convolution in an attention as the matrix that it is."""
    return value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value


def _diffusers_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    levels = compvis.count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "block_out_channels": [
            tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
        ],
        "layers_per_block": compvis.count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _suffixes() -> str:
    return ", ".join(weights.CHECKPOINT_SUFFIXES)
