"""Single-file checkpoints in the CompVis layout: the shapes give the architecture, diffusers converts the names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..errors import UnreadableModelError, UnsupportedModelError
from . import compvis_yaml
from . import weights as files
from .compvis_yaml import SILENT, Settings
from .presets import ARCHITECTURES, Architecture

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
JOINS = (0, 5, 4, 1)
"""The channels that the U-Net of such a file may see beside the latents: none, or those of inpainting, InstructPix2Pix
and depth models."""

HEAD_SIZE = 64
"""Channels of an attention head in both text encoders and in SD 2.x's U-Net; SD 1.x's U-Net has 8 heads everywhere."""

SKIPPED_FROM = 24
"""Blocks of OpenCLIP ViT-H. SD 2.x does not use the last one, and files written from diffusers' models lack it."""

BASE_STEP = 875000
"""The global_step of SD 2.0's base model, which predicts noise."""


def known_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of CompVis' final layout: early files lack `text_model.` in the text encoder's."""
    first = CLIP + "embeddings."
    if not any(name.startswith(first) for name in weights):
        return weights
    return {
        f"{CLIP}text_model.{name.removeprefix(CLIP)}" if name.startswith(CLIP) else name: value
        for name, value in weights.items()
    }


def architecture(
    weights: dict[str, Tensor],
    file: Path,
    prediction_type: str | None,
    said: Settings = SILENT,
    vae_elsewhere: bool = False,
) -> Architecture:
    """The architecture that follows from the shapes, and from what the .yaml beside the file has `said`. No shape tells
    whether an SD 2.x model predicts noise or v: `prediction_type` decides, then the .yaml, then diffusers' rule (noise
    for global_step 875000, else v). Models of more channels (inpainting, depth, InstructPix2Pix) predict noise.

    Raises UnsupportedModelError for other models, UnreadableModelError where .yaml and tensors disagree.
    """
    _check_kind(weights, file, vae_elsewhere)
    files.refuse_integers(
        file,
        files.integers_of(
            {name: value for name, value in weights.items() if name.startswith((UNET, VAE, CLIP, OPEN_CLIP))}
        ),
    )
    unet = _unet_config(weights, said)
    _check_agreement(file, said, unet)
    second = _is_second(weights, file, said)
    preset = ARCHITECTURES["sd21" if second else "sd15"]
    predicts = prediction_type or said.prediction_type or _usual_prediction(weights, unet["in_channels"], second)
    large = second and predicts == "v_prediction"
    unet |= {"sample_size": _latent_size(said, large), "upcast_attention": large}
    pixels = 8 * unet["sample_size"]
    vae = {**preset.vae, **({} if vae_elsewhere else vae_config(weights)), **vae_settings(weights, said)}
    return Architecture(
        unet,
        {**vae, "sample_size": pixels},
        _text_config(weights, second, preset, said),
        {**preset.scheduler, **noise_schedule(weights, said), "prediction_type": predicts},
        preset.pad_token,
    )


def _check_kind(weights: dict[str, Tensor], file: Path, vae_elsewhere: bool) -> None:
    """UnsupportedModelError for files of other models, and for files without a part."""
    if any(name.startswith("conditioner.") for name in weights):
        raise UnsupportedModelError(
            f"{file} is an SDXL checkpoint, which is not supported yet; supported are Stable Diffusion 1.x and 2.x"
        )
    if any(name.startswith("control_model.") for name in weights):
        raise UnsupportedModelError(
            f"{file} is a ControlNet, not a model; pass the Stable Diffusion model it goes with"
        )
    whole = UNET + "input_blocks.0.0.weight" in weights
    if not whole and any(name.endswith("decoder.conv_in.weight") for name in weights):
        raise UnsupportedModelError(
            f"{file} has no {UNET}* tensors, so it is not a whole Stable Diffusion checkpoint; it holds a VAE: pass "
            "the model, and this file with --vae"
        )
    if whole and VAE + "decoder.conv_in.weight" not in weights and not vae_elsewhere:
        raise UnsupportedModelError(
            f"{file} has no {VAE}* tensors, so it is not a whole Stable Diffusion checkpoint; pass its VAE with --vae "
            "FILE_OR_FOLDER"
        )
    if not whole:
        raise UnsupportedModelError(
            f"{file} has no {UNET}* and {VAE}* tensors, so it is not a whole Stable Diffusion checkpoint (a LoRA?)"
        )
    if any(name.startswith(UNET + "label_emb.") for name in weights):
        raise UnsupportedModelError(
            f"{file} has {UNET}label_emb.*: its U-Net takes classes or pictures' embeddings besides the text (stable "
            "unCLIP, the x4 upscaler), which is not supported in a single file"
        )


def _check_agreement(file: Path, said: Settings, unet: Mapping[str, Any]) -> None:
    """UnreadableModelError where the .yaml describes another model than the tensors."""
    for name, value, found in (
        ("in_channels", said.in_channels, unet["in_channels"]),
        ("context_dim", said.context_dim, unet["cross_attention_dim"]),
    ):
        if value not in (None, found):
            raise UnreadableModelError(
                f"{compvis_yaml.beside(file)} has {name}={value} and the tensors of {file.name} {found}; get the "
                "configuration that belongs to the checkpoint, or move it away"
            )


def _is_second(weights: Mapping[str, Tensor], file: Path, said: Settings) -> bool:
    """Whether the text encoder is OpenCLIP's. UnreadableModelError where the .yaml names another than there is."""
    clip = CLIP + "text_model.embeddings.token_embedding.weight" in weights
    open_clip = OPEN_CLIP + "token_embedding.weight" in weights
    wanted = {compvis_yaml.CLIP: clip, compvis_yaml.OPEN_CLIP: open_clip}
    if said.text_encoder is not None and not wanted[said.text_encoder]:
        raise UnreadableModelError(
            f"{compvis_yaml.beside(file)} names the conditioning stage {said.text_encoder}, whose tensors {file.name} "
            "does not have; get the configuration that belongs to the checkpoint, or move it away"
        )
    if said.text_encoder is not None:
        return said.text_encoder == compvis_yaml.OPEN_CLIP
    return open_clip and not clip


def _usual_prediction(weights: Mapping[str, Tensor], channels: int, second: bool) -> str:
    step = int(weights["global_step"]) if "global_step" in weights else None
    return "v_prediction" if second and channels == 4 and step != BASE_STEP else "epsilon"


def _latent_size(said: Settings, large: bool) -> int:
    """The height in latents. Stability's own .yaml of the 768 model says 64 and means 96."""
    if said.image_size is None or (large and said.image_size == 64):
        return 96 if large else 64
    return said.image_size


def vae_settings(weights: Mapping[str, Tensor], said: Settings) -> dict[str, Any]:
    """The options of AutoencoderKL that no shape tells."""
    factor = said.scale_factor
    if factor is None and "scale_factor" in weights:
        factor = float(weights["scale_factor"])
    options = {"scaling_factor": factor, "norm_num_groups": said.vae_groups}
    return {name: value for name, value in options.items() if value is not None}


def noise_schedule(weights: Mapping[str, Tensor], said: Settings) -> dict[str, Any]:
    """The options of scheduler_config.json that the .yaml or else the buffer `betas` tells, where they are not Stable
    Diffusion's. The buffer may have been rounded to half precision."""
    if said.schedule or "betas" not in weights:
        return dict(said.schedule)
    usual = ARCHITECTURES["sd15"].scheduler
    ends = torch.tensor([usual["beta_start"], usual["beta_end"]], dtype=torch.float64).sqrt()
    betas = weights["betas"]
    wanted = torch.linspace(float(ends[0]), float(ends[1]), len(betas), dtype=torch.float64).square()
    rounding = max(1e-5, 2 * torch.finfo(betas.dtype).eps)
    if len(betas) == usual["num_train_timesteps"] and torch.allclose(betas.double(), wanted, rtol=rounding, atol=0):
        return {}
    return {"num_train_timesteps": len(betas), "trained_betas": betas.double().tolist()}


def count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number that the group of `pattern` matches among the names."""
    return 1 + max((int(match[1]) for name in weights if (match := re.match(pattern, name))), default=-1)


def _unet_config(weights: dict[str, Tensor], said: Settings) -> dict[str, Any]:
    channels: list[int] = []
    crossed: list[bool] = []
    layers: list[int] = [0]
    context = 0
    linear = False
    for i in range(1, count(weights, re.escape(UNET) + r"input_blocks\.(\d+)\.")):
        block = f"{UNET}input_blocks.{i}."
        if block + "0.op.weight" in weights:
            layers.append(0)
            continue
        if layers[-1] == 0:
            channels.append(weights[block + "0.in_layers.2.weight"].shape[0])
            crossed.append(block + "1.proj_in.weight" in weights)
        layers[-1] += 1
        if crossed[-1]:
            context = weights[block + "1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
            linear = weights[block + "1.proj_in.weight"].ndim == 2
    return {
        "in_channels": weights[UNET + "input_blocks.0.0.weight"].shape[1],
        "block_out_channels": channels,
        "layers_per_block": layers[0],
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        "attention_head_dim": _heads(said, channels, linear),
        "norm_num_groups": said.groups or 32,
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossed)],
    }


def _heads(said: Settings, channels: list[int], linear: bool) -> int | list[int]:
    """The number of attention heads, which diffusers calls attention_head_dim: one for all levels, or each level's."""
    if said.heads is not None:
        return said.heads
    if said.head_channels is None and not linear:
        return 8
    return [max(1, width // (said.head_channels or HEAD_SIZE)) for width in channels]


def vae_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    levels = count(weights, re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    return {
        "block_out_channels": [weights[f"{VAE}encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
        "layers_per_block": count(weights, re.escape(VAE) + r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_config(weights: dict[str, Tensor], second: bool, preset: Architecture, said: Settings) -> dict[str, Any]:
    if second:
        vocabulary, width = weights[OPEN_CLIP + "token_embedding.weight"].shape
        layers = _open_clip_layers(weights, said)
        inner = weights[OPEN_CLIP + "transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    else:
        prefix = CLIP + "text_model."
        if prefix + "embeddings.token_embedding.weight" not in weights:
            raise UnsupportedModelError(
                f"the checkpoint has neither {prefix}* (SD 1.x) nor {OPEN_CLIP}* (SD 2.x): its text encoder is not CLIP"
            )
        vocabulary, width = weights[prefix + "embeddings.token_embedding.weight"].shape
        layers = count(weights, re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
        inner = weights[prefix + "encoder.layers.0.mlp.fc1.weight"].shape[0]
    return {
        **preset.text_encoder,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": said.text_heads or max(1, width // HEAD_SIZE),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _open_clip_layers(weights: Mapping[str, Tensor], said: Settings) -> int:
    """The blocks that are used: all for the layer "last", else all but the last. A file with fewer than OpenCLIP's 24
    and without its projection was written from diffusers' 23."""
    blocks = count(weights, re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\.")
    as_saved = blocks >= SKIPPED_FROM or OPEN_CLIP + "text_projection" in weights
    return blocks - 1 if as_saved and said.text_layer != "last" else blocks


def unet(file: Path, weights: dict[str, Tensor], known: Architecture) -> UNet2DConditionModel:
    model = UNet2DConditionModel(**known.unet)
    fill(file, model, convert_ldm_unet_checkpoint(dict(weights), dict(model.config)))
    return model


def vae(file: Path, weights: dict[str, Tensor], known: Architecture) -> AutoencoderKL:
    model = AutoencoderKL(**known.vae)
    fill(file, model, convert_ldm_vae_checkpoint(dict(weights), dict(model.config)))
    return model


def text_encoder(file: Path, weights: dict[str, Tensor], known: Architecture) -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig(**known.text_encoder))
    if known.text_encoder["hidden_act"] == "gelu":
        last = f"{OPEN_CLIP}transformer.resblocks.{known.text_encoder['num_hidden_layers']}."
        converted = convert_open_clip_checkpoint(
            model, {name: value for name, value in weights.items() if not name.startswith(last)}
        )
    else:
        converted = convert_ldm_clip_checkpoint(weights)
    named = {name.removeprefix("text_model."): value for name, value in converted.items()}
    fill(
        file,
        model,
        {
            name: value
            for name, value in named.items()
            if name not in ("embeddings.position_ids", "text_projection.weight")
        },
    )
    return model


def fill(file: Path, model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Fills exactly the weights of the model, as float32. UnreadableModelError names those that do not fit."""
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    mismatched = [
        (name, value.shape, wanted[name])
        for name, value in weights.items()
        if name in wanted and value.shape != wanted[name]
    ]
    files.check_fit(file, wanted.keys() - weights.keys(), weights.keys() - wanted.keys(), mismatched)
    model.load_state_dict({name: weights[name].float() for name in wanted})
    model.eval()
