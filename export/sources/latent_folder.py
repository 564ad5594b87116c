"""Latent diffusion with a text in diffusers' layout: LDMTextToImagePipeline, whose texts BERT reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import AutoencoderKL, LDMTextToImagePipeline, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import nn
from transformers import BertTokenizer

from engine.contract import PROMPT_TOKENS, Family
from engine.errors import shown
from engine.family import STABLE_DIFFUSION

from ..errors import UnreadableModelError, UnsupportedModelError
from ..graphs.recipes import BERT_KL, BERT_VQ, Recipes
from ..latent_diffusion import with_scheduler
from . import checks, schedulers
from .diffusers_folder import HASHED, check_entry, hash_files, load_weights, read_scheduler
from .reading import read_object, reading
from .source import Load, Source
from .textless_checks import check_decoder, factor_of

PIPELINE = "LDMTextToImagePipeline"
KNOWN = {
    "bert": ("LDMBertModel",),
    "vqvae": ("AutoencoderKL", "VQModel"),
    "unet": ("UNet2DConditionModel",),
    "tokenizer": ("BertTokenizer", "BertTokenizerFast"),
}
"""The classes of the parts that are supported."""

PARTS: dict[str, Any] = {
    "LDMBertModel": LDMBertModel,
    "AutoencoderKL": AutoencoderKL,
    "VQModel": VQModel,
    "UNet2DConditionModel": UNet2DConditionModel,
}


class LatentFolder(Source):
    """A folder as LDMTextToImagePipeline's `save_pretrained` writes it. Its graphs are those of Stable Diffusion, made
    of other parts."""

    models = MappingProxyType({"bert": "text encoder", "vqvae": "decoder", "unet": "U-Net"})

    def __init__(self, folder: Path, name: str, origin: Mapping[str, str], sampler: str | None = None) -> None:
        super().__init__(name, origin, (folder,))
        self.folder, self._sampler, file = folder, sampler, folder / "model_index.json"
        self._index = read_object(file)
        for part in (*KNOWN, "scheduler"):
            check_entry(self._index, part, file)
            if not (folder / part).is_dir():
                raise UnreadableModelError(f"{folder} has no folder {part}/; the model is incomplete")
        for part, known in KNOWN.items():
            if self._index[part][1] not in known:
                raise UnsupportedModelError(
                    f"{file} is of a {PIPELINE} with {part}={shown(self._index[part][1])}; supported is "
                    f"{' or '.join(known)}"
                )

    @property
    def family(self) -> Family:
        return STABLE_DIFFUSION

    @property
    def recipes(self) -> Recipes:
        return BERT_VQ if self._index["vqvae"][1] == "VQModel" else BERT_KL

    def read(self, part: str) -> nn.Module:
        cls, folder = PARTS[self._index[part][1]], self.folder / part
        if part == "bert":
            model: nn.Module = load_weights(folder, cls, "model.safetensors", "pytorch_model.bin")
        else:
            name = "diffusion_pytorch_model"
            model = load_weights(folder, cls, f"{name}.safetensors", f"{name}.bin", low_cpu_mem_usage=False)
        return model

    def tokenizer(self) -> BertTokenizer:
        folder = self.folder / "tokenizer"
        return reading(folder, lambda: BertTokenizer.from_pretrained(folder, local_files_only=True))

    def config(self, part: str) -> dict[str, Any]:
        file = self.folder / part / "config.json"
        given = read_object(file)
        if part == "bert":
            return reading(file, lambda: dict(LDMBertConfig(**given).to_dict()))
        return checks.with_defaults(PARTS[self._index[part][1]], given)

    def sizes(self) -> dict[str, int]:
        width = int(self.config("unet")["cross_attention_dim"])
        return {"context_size": width, "text_width": width}

    def text_layers(self) -> int:
        return int(self.config("bert")["encoder_layers"])

    def scheduler_config(self) -> dict[str, Any]:
        config, file = read_scheduler(self.folder / "scheduler", self._index, self._sampler)
        return schedulers.kept(config, str(file), self._sampler, self.family)

    def sample_size(self) -> int:
        return STABLE_DIFFUSION.factor * checks.latent_size(self.config("unet"))

    def check_configs(self) -> None:
        unet, bert, decoder = (self.config(part) for part in ("unet", "bert", "vqvae"))
        checks.check_unet(unet)
        check_decoder(self._index["vqvae"][1], decoder, unet["in_channels"])
        if factor_of(decoder) != STABLE_DIFFUSION.factor:
            raise UnsupportedModelError(
                f"the decoder has a factor of {factor_of(decoder)}; {PIPELINE} supports {STABLE_DIFFUSION.factor} alone"
            )
        if bert["max_position_embeddings"] != PROMPT_TOKENS or bert["d_model"] != unet["cross_attention_dim"]:
            raise UnsupportedModelError(
                f"the text encoder has max_position_embeddings={shown(bert['max_position_embeddings'])} and d_model="
                f"{shown(bert['d_model'])}; supported are {PROMPT_TOKENS} and the U-Net's cross_attention_dim, "
                f"{shown(unet['cross_attention_dim'])}"
            )
        if bert["vocab_size"] < len(self.tokenizer()):
            raise UnreadableModelError(
                f"{self.folder / 'tokenizer'} knows {len(self.tokenizer())} tokens and the text encoder "
                f"{bert['vocab_size']} (vocab_size); they are not of one model"
            )
        self.sample_size()
        self.scheduler_config()

    def _check_weights(self, load: Load) -> None:
        """Makes one picture in one step, because options that a constructor accepts may still fail there."""
        pipeline = self.pipeline(load)
        reading(self.folder, lambda: pipeline("a cat", 64, 64, num_inference_steps=1))

    def pipeline(self, load: Load | None = None) -> LDMTextToImagePipeline:
        load = load or self.load
        parts = {part: load(part).eval() for part in self.models}
        return with_scheduler(parts, self.tokenizer(), self.scheduler_config())

    def _fingerprint(self, part: str) -> str:
        folder = self.folder / part
        return reading(folder, lambda: hash_files(folder, self.folder, HASHED))
