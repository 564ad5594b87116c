"""A model, from any kind of source.

Every source hands out one part at a time, in float32, so that no two large parts need to be in memory together.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from engine.contract import Family
from engine.family import STABLE_DIFFUSION, Traits, joined
from engine.manifest import LowResolution

from .. import oracles
from ..adapters import Fusion
from ..errors import UsageError
from ..graphs.recipes import JOINED, RECIPES, Recipes
from . import checks
from .reading import reading

PARTS = ("text_encoder", "unet", "vae", "tokenizer", "scheduler")
"""Of a text-to-image model."""

Load = Callable[[str], Any]
"""Returns a part with weights."""


class Source(ABC):
    """A model. name: of its bundle. origin: the manifest's entry about where the model came from. inputs: the files and
    folders that it is read from. options: the builder's options about the model, by their names on the command line."""

    models: Mapping[str, str]
    """The parts with weights, and what messages call them."""

    def __init__(self, name: str, origin: Mapping[str, str], inputs: tuple[Path, ...] = ()) -> None:
        self.name, self.origin, self.inputs = name, dict(origin), inputs
        self.options: dict[str, str] = {}
        self._fusion: Fusion | None = None
        self._fingerprints: dict[str, str] = {}

    @property
    @abstractmethod
    def family(self) -> Family:
        """What the bundle of this model holds."""

    @property
    @abstractmethod
    def recipes(self) -> Recipes:
        """How the graphs are made of the parts."""

    @abstractmethod
    def read(self, part: str) -> nn.Module:
        """A new model of one of `models`, float32 on the CPU, as it was trained."""

    def load(self, part: str) -> nn.Module:
        """The same, with the adapters that it is built with."""
        model = self.read(part)
        if self._fusion is not None:
            self._fusion.apply(part, model)
        return model

    def fuse(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """Puts adapters (docs/adapters.md), each with its weight, into the model. UsageError for a family that adapters
        don't change, AdapterError for a file that holds none."""
        if not adapters:
            return
        adapted = {component.name: component.adapted for component in self.family.components if component.adapted}
        parts = {recipe.part: adapted[name] for name, recipe in self.recipes.items() if name in adapted}
        if not parts:
            raise UsageError(
                f"--lora {adapters[0][0]} is for Stable Diffusion, and {self.name} is a model without texts, whose "
                "weights adapters don't change; leave it out"
            )
        self._fusion = Fusion(adapters, parts, self.read)
        self.inputs = (*self.inputs, *self._fusion.files)
        self.options["lora"] = str(self._fusion)

    @abstractmethod
    def config(self, part: str) -> dict[str, Any]:
        """The configuration of one of `models`, with its defaults."""

    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """scheduler_config.json as the bundle has it: the runtime can make pictures with it."""

    @abstractmethod
    def sample_size(self) -> int:
        """Height and width in pixels that the model was trained at."""

    @abstractmethod
    def pipeline(self, load: Load | None = None) -> Any:
        """What makes the model's pictures with diffusers, float32 on the CPU: the oracle. Parts are asked of `load`."""

    @abstractmethod
    def check_configs(self) -> None:
        """Checks configurations, scheduler and tokenizer: the errors of `check`."""

    @abstractmethod
    def _fingerprint(self, part: str) -> str: ...

    def fingerprint(self, part: str) -> str:
        """A hash of everything that determines a part, the tokenizer or the scheduler. It is computed once: files that
        change later are seen by a new Source."""
        if part not in self._fingerprints:
            own = self._fingerprint(part)
            self._fingerprints[part] = own if self._fusion is None else self._fusion.fingerprint(part, own)
        return self._fingerprints[part]

    def tokenizer(self) -> Any:
        """The tokenizer of transformers; None for a model without texts."""
        return None

    def text_layers(self) -> int:
        """The number of the text encoder's layers; 0 for a model without texts."""
        return 0

    def low_resolution(self) -> LowResolution | None:
        """How an upscaler adds noise to what it makes larger; None for other models."""
        return None

    def sizes(self) -> dict[str, int]:
        """The sizes of the graphs' dimensions that are the model's, by name."""
        return {}

    def check(self, load: Load | None = None) -> None:
        """Checks that a bundle of this model can be built and will run: configurations, scheduler, tokenizer, then
        every tensor.

        Raises UnreadableModelError, UnsupportedModelError, UnsafePickleError or UsageError. Parts are asked of `load`;
        without one they are loaded and dropped one by one.
        """
        self.check_configs()
        self._check_weights(load or self.load)

    def _check_weights(self, load: Load) -> None:
        """Loads every part and runs it once on a small input, because options that a constructor accepts may still fail
        there."""
        for part, what in self.models.items():
            model = load(part)
            reading(f"the {what} of {self.name}", partial(checks.run_once, model))
            del model


class TextToImage(Source):
    """A model of Stable Diffusion 1.x or 2.x."""

    models = MappingProxyType({"text_encoder": "text encoder", "vae": "VAE", "unet": "U-Net"})

    @abstractmethod
    def text_encoder(self) -> CLIPTextModel: ...

    @abstractmethod
    def unet(self) -> UNet2DConditionModel: ...

    @abstractmethod
    def vae(self) -> AutoencoderKL: ...

    @abstractmethod
    def tokenizer(self) -> CLIPTokenizer: ...

    @property
    def joins(self) -> tuple[int, ...]:
        """The numbers of channels that the U-Net of such a model may see beside the latents."""
        return checks.PLAIN

    @property
    def family(self) -> Family:
        if self.joins == checks.PLAIN:
            return STABLE_DIFFUSION
        self._check_graphs()
        unet = self.config("unet")
        concat, levels = unet["in_channels"] - checks.CHANNELS, unet.get("num_class_embeds")
        if not concat:
            return STABLE_DIFFUSION
        return joined(Traits(checks.CHANNELS, self._factor(concat), concat=concat, noise_levels=levels))

    @property
    def recipes(self) -> Recipes:
        joins = self.family.joins
        return RECIPES if joins is None else JOINED[joins]

    def _factor(self, concat: int) -> int:
        return checks.UPSCALER_FACTOR if concat == checks.UPSCALER else checks.FACTOR

    def sizes(self) -> dict[str, int]:
        return {
            "context_size": int(self.config("unet")["cross_attention_dim"]),
            "text_width": int(self.config("text_encoder")["hidden_size"]),
        }

    def text_layers(self) -> int:
        return int(self.config("text_encoder")["num_hidden_layers"])

    def read(self, part: str) -> nn.Module:
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}[part]()

    def check_configs(self) -> None:
        self._check_graphs()
        unet, text_encoder = self.config("unet"), self.config("text_encoder")
        checks.check_text_encoder(text_encoder)
        checks.check_width(unet, text_encoder)
        self.sample_size()
        self.scheduler_config()
        self.low_resolution()
        checks.check_tokenizer(self.tokenizer(), self._tokenizer_name(), text_encoder["vocab_size"])

    def _check_graphs(self) -> None:
        unet = self.config("unet")
        checks.check_unet(unet, self.joins)
        checks.check_vae(self.config("vae"), self._factor(unet["in_channels"] - checks.CHANNELS))

    def _tokenizer_name(self) -> str:
        return "the tokenizer"

    def pipeline(self, load: Load | None = None) -> DiffusionPipeline:
        config, load = self.scheduler_config(), load or self.load
        parts = {
            "vae": load("vae"),
            "text_encoder": load("text_encoder"),
            "tokenizer": self.tokenizer(),
            "unet": load("unet"),
            "scheduler": getattr(diffusers, config["_class_name"]).from_config(config),
        }
        return oracles.pipeline(self.family, parts, self.low_resolution())


class Models:
    """The parts of a model. Each is made when it is first asked for, and kept until it is released."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._made: dict[str, nn.Module] = {}

    def __call__(self, part: str) -> nn.Module:
        if part not in self._made:
            self._made[part] = self._source.load(part)
        return self._made[part]

    def release(self, *parts: str) -> None:
        """Frees the memory of parts that are not used any more."""
        for part in parts:
            self._made.pop(part, None)
        gc.collect()
