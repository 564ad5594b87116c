"""Checks from a model's configuration, before any weights are read, that the graphs support it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from engine.contract import JOINS, PROMPT_TOKENS
from engine.errors import SchedulerConfigError, shown
from engine.family import STABLE_DIFFUSION
from engine.manifest import LARGEST_CLASSES, LowResolution
from engine.sampling.schedule import noising

from ..errors import UnreadableModelError, UnsupportedModelError, UsageError

CHANNELS, FACTOR = STABLE_DIFFUSION.channels, STABLE_DIFFUSION.factor

UPSCALER_FACTOR = 4
"""Pixels per latent element of the x4 upscaler."""

PLAIN = (0,)
"""The channels that a U-Net which makes pictures of texts alone sees beside the latents."""

UPSCALER = next(concat for concat, what in JOINS.items() if what == "low_resolution")

MAX_NOISE_LEVEL = 350
"""That of StableDiffusionUpscalePipeline where a model does not say."""

MODELS = "text-to-image models of Stable Diffusion 1.x and 2.x"

EARLIER = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "LDMTextToImagePipeline")
"""The kinds of models from before Stable Diffusion that are supported too."""

UNUSED_INPUTS = (
    "class_embed_type",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
)
UNET_OPTIONS: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "dual_cross_attention": (False, None),
    "class_embeddings_concat": (False, None),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "time_embedding_type": ("positional", None),
    "attention_type": ("default", None),
    "cross_attention_norm": (None,),
}
"""Options of UNet2DConditionModel, with the only values that the denoiser's graph supports."""

BLOCKS: dict[str, dict[str, tuple[str, ...]]] = {
    "the U-Net": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "the VAE": {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)},
}
SMALLEST_SAMPLE, LARGEST_SAMPLE = 4, 512
"""Latent sizes of 32 to 4096 pixels."""

SMALLEST_SCALE, LARGEST_SCALE = 1e-3, 1e3
"""A VAE's scaling_factor brings its latents to unit variance: 0.18 in Stable Diffusion, 0.13 in SDXL."""

PLAIN_TEXTS = ("a cat", "a dog", "a sun", "a large red circle on a blue background")


def with_defaults(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the constructor's defaults for what it leaves out."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {**{p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}, **config}


def check_unet(config: Mapping[str, Any], joins: Collection[int] = PLAIN) -> None:
    """UnsupportedModelError for U-Nets that need other inputs than latents, timestep, text and one of these numbers of
    channels beside the latents, or have another structure."""
    _check_channels(config, joins)
    for name in UNUSED_INPUTS:
        if config.get(name) is not None:
            raise UnsupportedModelError(
                f"the U-Net has {name}={shown(config[name])}, an input that {MODELS} do not have"
            )
    for name, usual in UNET_OPTIONS.items():
        if name in config and config[name] not in usual:
            raise UnsupportedModelError(f"the U-Net has {name}={shown(config[name])}; {MODELS} have {usual[0]!r}")
    _check_blocks("the U-Net", config)


def _check_channels(config: Mapping[str, Any], joins: Collection[int]) -> None:
    channels, levels = config["in_channels"], config.get("num_class_embeds")
    allowed = [CHANNELS + concat for concat in joins]
    if channels not in allowed or isinstance(channels, bool):
        which = MODELS if tuple(joins) == PLAIN else "models of this kind"
        raise UnsupportedModelError(
            f"the U-Net has in_channels={shown(channels)}; {which} have {' or '.join(map(str, allowed))} (9 is "
            "inpainting, 8 InstructPix2Pix, 5 depth, 7 upscaling)"
        )
    if config["out_channels"] != CHANNELS:
        raise UnsupportedModelError(f"the U-Net has out_channels={shown(config['out_channels'])}; {CHANNELS} is known")
    if channels != CHANNELS + UPSCALER:
        if levels is not None:
            raise UnsupportedModelError(
                f"the U-Net has num_class_embeds={shown(levels)}, an input that only the x4 upscaler has"
            )
    elif not isinstance(levels, int) or isinstance(levels, bool) or not 1 <= levels <= LARGEST_CLASSES:
        raise UnsupportedModelError(
            f"the U-Net has num_class_embeds={shown(levels)}; the x4 upscaler's is the number of noise levels, an "
            f"integer from 1 to {LARGEST_CLASSES}"
        )


def check_vae(config: Mapping[str, Any], wanted: int = FACTOR) -> None:
    """UnsupportedModelError for VAEs of another factor, scale or number of channels than Stable Diffusion's."""
    channels = config["block_out_channels"]
    factor = 2 ** (len(channels) - 1) if isinstance(channels, (list, tuple)) and channels else shown(channels)
    if factor != wanted or config["latent_channels"] != CHANNELS or config.get("shift_factor"):
        raise UnsupportedModelError(
            f"the VAE has {shown(config['latent_channels'])} channels, a factor of {factor} and shift_factor="
            f"{shown(config.get('shift_factor'))}; those of "
            f"{'the x4 upscaler' if wanted == UPSCALER_FACTOR else 'Stable Diffusion 1.x and 2.x'} have {CHANNELS}, "
            f"{wanted} and none"
        )
    scale = config["scaling_factor"]
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    if not number or not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise UnsupportedModelError(
            f"the VAE has scaling_factor={shown(scale)}; it must be a number from {SMALLEST_SCALE:g} to "
            f"{LARGEST_SCALE:g} "
            f"(Stable Diffusion's is 0.18215)"
        )
    _check_blocks("the VAE", config)


def check_low_resolution(config: Mapping[str, Any], most: Any, levels: int | None, where: str) -> LowResolution:
    """How an upscaler adds noise, from its low_res_scheduler and its max_noise_level. UnsupportedModelError where that
    is not known, or where the U-Net has no embedding for all levels."""
    try:
        known = len(noising(config).alphas_cumprod)
    except SchedulerConfigError as error:
        raise UnsupportedModelError(f"{where}: {error}") from error
    limit = min(known, levels or known) - 1
    if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= limit:
        raise UnsupportedModelError(
            f"the model has max_noise_level={shown(most)}; it must be an integer from 0 to {limit}, the last level "
            f"of the U-Net and of {where}"
        )
    return LowResolution(dict(config), most)


def _check_blocks(whose: str, config: Mapping[str, Any]) -> None:
    for name, allowed in BLOCKS[whose].items():
        blocks = config[name]
        if (
            not isinstance(blocks, (list, tuple))
            or not blocks
            or not all(isinstance(block, str) and block in allowed for block in blocks)
        ):
            raise UnsupportedModelError(
                f"{whose} has {name}={shown(blocks)}; supported is a list of {' and '.join(allowed)}"
            )


def check_text_encoder(config: Mapping[str, Any]) -> None:
    """UnsupportedModelError for text encoders that take another input than 77 tokens."""
    if config.get("use_attention_mask"):
        raise UnsupportedModelError(
            "the text encoder uses an attention mask (use_attention_mask); the text encoders of Stable Diffusion 1.x "
            "and 2.x do not"
        )
    if config["max_position_embeddings"] != PROMPT_TOKENS:
        raise UnsupportedModelError(
            f"the text encoder has max_position_embeddings={shown(config['max_position_embeddings'])}; CLIP's is "
            f"{PROMPT_TOKENS}"
        )


def check_width(unet: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> None:
    """UnsupportedModelError if the widths of U-Net and text encoder differ."""
    wanted, given = unet["cross_attention_dim"], text_encoder["hidden_size"]
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted != given:
        raise UnsupportedModelError(
            f"the U-Net has cross_attention_dim={shown(wanted)} and the text encoder hidden_size={shown(given)}; they "
            "must be the same "
            f"number, so these parts are not of one model"
        )


def latent_size(config: Mapping[str, Any]) -> int:
    """The height in latents that a U-Net was trained at, 64 if its configuration does not say. Raises
    UnreadableModelError."""
    size = config.get("sample_size")
    sides = size if isinstance(size, (list, tuple)) else [64 if size is None else size]
    usable = all(
        isinstance(side, int) and not isinstance(side, bool) and SMALLEST_SAMPLE <= side <= LARGEST_SAMPLE
        for side in sides
    )
    if len(sides) not in (1, 2) or not usable:
        raise UnreadableModelError(
            f"the U-Net has sample_size={shown(size)}; it must be an integer from {SMALLEST_SAMPLE} to "
            f"{LARGEST_SAMPLE} "
            f"(64 is 512 pixels)"
        )
    return int(sides[0])


@torch.no_grad()
def run_once(model: CLIPTextModel | AutoencoderKL | UNet2DConditionModel) -> None:
    """One pass of a model on zeros, 64 pixels wide. It raises what the model raises."""
    if isinstance(model, CLIPTextModel):
        model(torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64))
    elif isinstance(model, AutoencoderKL):
        model.decode(torch.zeros(1, CHANNELS, 8, 8))
        model.encode(torch.zeros(1, 3, 8 * FACTOR, 8 * FACTOR))
    else:
        labels = None if model.config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64)
        context = torch.zeros(1, PROMPT_TOKENS, int(model.config.cross_attention_dim))
        model(torch.zeros(1, model.config.in_channels, 8, 8), 1, context, class_labels=labels)


def check_tokenizer(tokenizer: CLIPTokenizer, what: str, vocabulary: Any) -> None:
    """UnreadableModelError or UsageError for a tokenizer that is not like CLIP's, or has more tokens than the text
    encoder."""
    if tokenizer.model_max_length != PROMPT_TOKENS:
        raise UsageError(
            f"{what}: the tokenizer's model_max_length is {shown(tokenizer.model_max_length)}; CLIP's is "
            f"{PROMPT_TOKENS}"
        )
    for name in ("bos_token", "eos_token"):
        token = getattr(tokenizer, name)
        if not isinstance(token, str) or not re.fullmatch("<.+>", token):
            raise UnreadableModelError(
                f"{what} has {name}={shown(token)}, which is text and not a mark; CLIP's are <|startoftext|> and "
                "<|endoftext|>"
            )
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        raise UnreadableModelError(
            f"{what} has one token for the start and the end of a text ({tokenizer.bos_token}); CLIP has two"
        )
    known = tokenizer.get_vocab()
    beyond = sorted(token for token, number in known.items() if not isinstance(vocabulary, int) or number >= vocabulary)
    if beyond:
        raise UnreadableModelError(
            f"{what} knows {len(known)} tokens and the text encoder {shown(vocabulary)} (vocab_size); {beyond[0]!r} is "
            "one that it has "
            "no embedding for. The two are not of one model, or a token in tokenizer_config.json is not in the "
            "vocabulary"
        )
    texts = [tuple(tokenizer(text).input_ids) for text in PLAIN_TEXTS]
    if len(set(texts)) < len(texts):
        raise UnreadableModelError(
            f"{what} cannot tell {PLAIN_TEXTS[0]!r} and {PLAIN_TEXTS[1]!r} apart: its vocabulary is missing or "
            "damaged. It needs "
            f"tokenizer.json, or vocab.json and merges.txt"
        )


def check_tokenizer_config(config: Mapping[str, Any], what: str) -> None:
    """UnsupportedModelError for a tokenizer_config.json of another tokenizer than CLIP's, UnreadableModelError for one
    without its marks."""
    found = config.get("tokenizer_class")
    if found not in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
        raise UnsupportedModelError(
            f"{what} has tokenizer_class={shown(found)}; the text encoder of Stable Diffusion 1.x and 2.x needs a "
            "CLIPTokenizer"
        )
    for name in ("bos_token", "eos_token", "pad_token"):
        if name in config and not isinstance(config[name], (str, dict)):
            raise UnreadableModelError(f"{what} has {name}={shown(config[name])}; it must be a token of the vocabulary")
