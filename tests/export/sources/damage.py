"""Tiny models with one thing wrong, each a function of a model's folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], Any]

INDEX, UNET, VAE, TEXT = "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
UNET_WEIGHTS, VAE_WEIGHTS = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT_WEIGHTS = "text_encoder/model.safetensors"
REMOVED = object()


def copy_model(model: Path, target: Path) -> Path:
    """A copy whose weights are hard links; `edit` and `edit_weights` write new files and so leave the original
    alone."""
    return Path(shutil.copytree(model, target, copy_function=os.link))


def replace_text(file: Path, text: str | bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)


def text(name: str, content: str | bytes) -> Damage:
    """Another content of a file."""
    return lambda folder: replace_text(folder / name, content)


def edit(name: str, **changes: Any) -> Damage:
    """Other values in a JSON file; REMOVED takes one out."""

    def apply(folder: Path) -> None:
        values = {**json.loads((folder / name).read_text()), **changes}
        replace_text(folder / name, json.dumps({key: value for key, value in values.items() if value is not REMOVED}))

    return apply


def edit_weights(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    """Other tensors in a safetensors file."""

    def apply(folder: Path) -> None:
        weights = change({key: value.clone() for key, value in load_file(folder / name).items()})
        (folder / name).unlink()
        save_file(weights, folder / name, metadata={"format": "pt"})

    return apply


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(names)}


def together(*damages: Damage) -> Damage:
    """One after the other."""

    def apply(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return apply


def removed(*names: str) -> Damage:
    """Files that are gone."""

    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def a_folder_instead(name: str) -> Damage:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return apply


def as_bin(part: str, change: Callable[[dict[str, Any]], Any] = lambda weights: weights) -> Damage:
    """Weights as a pickle instead of safetensors."""

    def apply(folder: Path) -> None:
        old = folder / (TEXT_WEIGHTS if part == "text_encoder" else f"{part}/diffusion_pytorch_model.safetensors")
        torch.save(
            change(load_file(old)),
            folder / part / ("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"),
        )
        old.unlink()

    return apply


class Malicious:
    """A pickle that runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def nan(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    weights[name][0] = float("nan")
    return weights


INDEXES: dict[str, tuple[Damage, str]] = {
    "is a list": (text(INDEX, "[]"), r"model_index.json holds \[\], not an object"),
    "is null": (text(INDEX, "null"), "model_index.json holds None, not an object"),
    "is no JSON": (text(INDEX, "{"), r"model_index.json is not JSON \(JSONDecodeError"),
    "is too deep": (text(INDEX, "[" * 100_000), "model_index.json is not JSON"),
    "is no UTF-8": (text(INDEX, b"\xff\xfe"), r"model_index.json is not JSON \(UnicodeDecodeError"),
    "is a folder": (a_folder_instead(INDEX), "model_index.json is not a file"),
    "a number for the U-Net": (
        edit(INDEX, unet=5),
        r'has unet=5; it must be the library and the class, for example \["diffusers", "UNet2DConditionModel"\]',
    ),
    "no class for the U-Net": (edit(INDEX, unet=["diffusers"]), r"has unet=\['diffusers'\]; it must be"),
    "no VAE": (edit(INDEX, vae=REMOVED), "has vae=None; it must be"),
    "no scheduler": (edit(INDEX, scheduler=[None, None]), r"has scheduler=\[None, None\]; it must be"),
    "another U-Net": (
        edit(INDEX, unet=["diffusers", "FluxTransformer2DModel"]),
        "with unet=FluxTransformer2DModel; supported are text-to-image",
    ),
    **{
        f"is of {name}": (
            edit(INDEX, _class_name=name),
            f"is of a {re.escape(repr(name))}; supported are text-to-image",
        )
        for name in (
            "StableDiffusionXLPipeline",
            "FluxPipeline",
            "StableDiffusionLatentUpscalePipeline",
            None,
            5,
            ["StableDiffusionPipeline"],
        )
    },
}

CONFIGS: dict[str, tuple[Damage, str]] = {
    **{
        f"{file} is {value}": (text(file, value), rf"{file} holds .*, not an object")
        for file in (UNET, VAE, TEXT, SCHEDULER, TOKENIZER)
        for value in ("[]", "null", '"x"')
    },
    **{
        f"{file} is garbled": (text(file, "{'a': 1}"), f"{file} is not JSON")
        for file in (UNET, VAE, TEXT, SCHEDULER, TOKENIZER)
    },
    **{
        f"{file} is missing": (removed(file), f"{file} is missing; the model is incomplete")
        for file in (UNET, VAE, TEXT, SCHEDULER, TOKENIZER)
    },
    **{
        f"{file} is a folder": (a_folder_instead(file), f"{file} is not a file")
        for file in (UNET, VAE, TEXT, SCHEDULER, TOKENIZER)
    },
    **{
        f"sample_size {value!r}": (
            edit(UNET, sample_size=value),
            "the U-Net has sample_size=.*; it must be an integer from 4 to 512",
        )
        for value in (-1, 0, 1, "x", 10**9, 8.5, True, [8, "x"], [8, 8, 8], {})
    },
    **{
        f"scaling_factor {value!r}": (
            edit(VAE, scaling_factor=value),
            "the VAE has scaling_factor=.*; it must be a number from 0.001 to 1000",
        )
        for value in (None, "x", 1e30, -1, 0, True, [0.18], float("nan"))
    },
    **{
        f"U-Net option {name}={value!r}": (edit(UNET, **{name: value}), f"the U-Net has {name}=")
        for name, value in (
            ("mid_block_type", None),
            ("mid_block_type", "UNetMidBlock2D"),
            ("dual_cross_attention", True),
            ("in_channels", 9),
            ("in_channels", "x"),
            ("out_channels", 8),
            ("class_embed_type", "timestep"),
            ("num_class_embeds", 3),
            ("encoder_hid_dim", 4),
            ("time_cond_proj_dim", 4),
            ("center_input_sample", True),
            ("time_embedding_type", "fourier"),
            ("attention_type", "gated"),
            ("cross_attention_norm", "layer_norm"),
            ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
            ("up_block_types", None),
            ("cross_attention_dim", 64),
            ("cross_attention_dim", [32, 32]),
            ("addition_embed_type", "text"),
        )
    },
    **{
        f"U-Net value {name}={value!r}": (edit(UNET, **{name: value}), "unet")
        for name, value in (
            ("layers_per_block", None),
            ("layers_per_block", "x"),
            ("norm_num_groups", 7),
            ("act_fn", "nope"),
            ("block_out_channels", None),
            ("block_out_channels", [32]),
            ("attention_head_dim", "x"),
        )
    },
    **{
        f"U-Net value {name}={value!r}": (edit(UNET, **{name: value}), "the U-Net of model cannot be read")
        for name, value in (
            ("norm_num_groups", -1),
            ("norm_eps", "x"),
            ("mid_block_scale_factor", "x"),
            ("freq_shift", "x"),
        )
    },
    "VAE value norm_num_groups=-1": (edit(VAE, norm_num_groups=-1), "the VAE of model cannot be read"),
    "text value num_attention_heads=-1": (
        edit(TEXT, num_attention_heads=-1),
        "the text encoder of model cannot be read",
    ),
    **{
        f"VAE option {name}={value!r}": (edit(VAE, **{name: value}), "the VAE has")
        for name, value in (
            ("latent_channels", 16),
            ("shift_factor", 0.1),
            ("block_out_channels", [8, 16]),
            ("block_out_channels", "x"),
            ("block_out_channels", None),
            ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        )
    },
    "an attention mask": (edit(TEXT, use_attention_mask=True), r"uses an attention mask \(use_attention_mask\)"),
    "a text of 32 tokens": (edit(TEXT, max_position_embeddings=32), "max_position_embeddings=32; CLIP's is 77"),
    "no words of text": (edit(TEXT, hidden_size="x"), "text_encoder"),
    "another width of text": (edit(TEXT, hidden_size=64), "cross_attention_dim=32 and the text encoder hidden_size=64"),
}


def another_scheduler(name: str) -> Damage:
    return together(edit(SCHEDULER, _class_name=name), edit(INDEX, scheduler=["diffusers", name]))


SCHEDULERS: dict[str, tuple[Damage, str]] = {
    **{
        name: (
            another_scheduler(name),
            f"has the scheduler '{name}' .*a bundle cannot ship; ship another with --scheduler NAME: ddim, ddpm, ",
        )
        for name in ("VQDiffusionScheduler", "ScoreSdeVeScheduler", "IPNDMScheduler", "Nope", "ddim")
    },
    **{
        f"_class_name {name!r}": (
            edit(SCHEDULER, _class_name=name),
            r"has _class_name=.* and model_index.json PNDMScheduler; make them the same",
        )
        for name in ("Nope", 5, "__class__", None, "DDIMScheduler")
    },
    "no _class_name": (edit(SCHEDULER, _class_name=REMOVED), "has the scheduler None"),
    "an unknown option": (edit(SCHEDULER, no_such_option=True), "'no_such_option' is not known to pndm"),
    "no skip_prk_steps": (edit(SCHEDULER, skip_prk_steps=REMOVED), "is a PNDMScheduler without skip_prk_steps=true"),
    **{
        f"{name} {value!r}": (edit(SCHEDULER, **{name: value}), f"{name}=.*; it must be")
        for name, value in (
            ("beta_start", "x"),
            ("beta_start", None),
            ("beta_start", -1),
            ("beta_end", 1e308),
            ("beta_end", True),
            ("trained_betas", [0.1]),
            ("trained_betas", "x"),
            ("trained_betas", ["a"] * 1000),
            ("trained_betas", [2.0] * 1000),
            ("num_train_timesteps", 0),
            ("num_train_timesteps", -5),
            ("num_train_timesteps", 20),
            ("num_train_timesteps", None),
            ("num_train_timesteps", "x"),
            ("num_train_timesteps", 10**12),
            ("steps_offset", -1),
            ("steps_offset", "1"),
            ("steps_offset", None),
            ("set_alpha_to_one", "no"),
            ("rescale_betas_zero_snr", "false"),
        )
    },
    "timestep_spacing": (
        edit(SCHEDULER, timestep_spacing="foo"),
        "timestep_spacing='foo'; it must be one of leading, linspace, trailing",
    ),
    "beta_schedule": (edit(SCHEDULER, beta_schedule="foo"), "beta_schedule 'foo' is not known; known: linear"),
    "prediction_type": (edit(SCHEDULER, prediction_type="flow"), "prediction_type 'flow' is not known; known: epsilon"),
    "prediction_type list": (edit(SCHEDULER, prediction_type=[]), "prediction_type"),
}

TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "no vocabulary": (
        removed("tokenizer/tokenizer.json"),
        "cannot tell 'a cat' and 'a dog' apart: its vocabulary is missing or damaged",
    ),
    "garbled vocabulary": (text("tokenizer/tokenizer.json", "{}"), "tokenizer"),
    "unknown pad_token": (edit(TOKENIZER, pad_token="<pad>"), "'<pad>' is one that it has no embedding for"),
    "bos_token is text": (edit(TOKENIZER, bos_token="a"), "has bos_token='a', which is text and not a mark"),
    "bos_token is null": (edit(TOKENIZER, bos_token=None), "bos_token=None; it must be a token of the vocabulary"),
    "pad_token is a number": (edit(TOKENIZER, pad_token=5), "pad_token=5; it must be"),
    "bos_token is eos_token": (
        edit(TOKENIZER, bos_token="<|endoftext|>"),
        "has one token for the start and the end of a text",
    ),
    "another class": (
        edit(TOKENIZER, tokenizer_class="T5Tokenizer"),
        "tokenizer_class='T5Tokenizer'; the text encoder .* needs a CLIPTokenizer",
    ),
    "a class that is a number": (edit(TOKENIZER, tokenizer_class=5), "tokenizer_class=5"),
    "another length": (edit(TOKENIZER, model_max_length=32), "model_max_length is 32; CLIP's is 77"),
    "a length that is a text": (edit(TOKENIZER, model_max_length="x"), "model_max_length"),
    "more words than embeddings": (edit(TEXT, vocab_size=10), "knows 624 tokens and the text encoder 10"),
}

WEIGHTS: dict[str, tuple[Damage, str]] = {
    "U-Net without conv_in.weight": (
        edit_weights(UNET_WEIGHTS, without("conv_in.weight")),
        r"1 of the model's tensors are missing \(conv_in.weight\)",
    ),
    "VAE without decoder.conv_in.weight": (
        edit_weights(VAE_WEIGHTS, without("decoder.conv_in.weight")),
        r"missing \(decoder.conv_in.weight\)",
    ),
    "text encoder without its last norm": (
        edit_weights(TEXT_WEIGHTS, without("final_layer_norm")),
        r"2 of the model's tensors are missing \(final_layer_norm.bias, final_layer_norm.weight\)",
    ),
    "text encoder without a tensor": (
        edit_weights(TEXT_WEIGHTS, without("")),
        "of the model's tensors are missing .* and 31 more",
    ),
    "U-Net without a tensor": (edit_weights(UNET_WEIGHTS, without("")), "of the model's tensors are missing"),
    "names with a prefix": (
        edit_weights(UNET_WEIGHTS, lambda w: {f"model.{name}": value for name, value in w.items()}),
        r"are missing \(conv_in.bias, .*\); \d+ are not the model's \(model.conv_in.bias, ",
    ),
    "a tensor too many": (
        edit_weights(VAE_WEIGHTS, lambda w: {**w, "extra.weight": torch.zeros(2)}),
        r"1 are not the model's \(extra.weight\)",
    ),
    "another shape": (
        edit_weights(UNET_WEIGHTS, lambda w: {**w, "conv_out.bias": torch.zeros(9)}),
        r"another shape \(conv_out.bias \[9\] instead of \[4\]\)",
    ),
    "another shape in the text encoder": (
        edit_weights(TEXT_WEIGHTS, lambda w: {**w, "final_layer_norm.bias": torch.zeros(3)}),
        r"another shape \(final_layer_norm.bias \[3\] instead of \[32\]\)",
    ),
    "three layers in the configuration": (edit(TEXT, num_hidden_layers=3), r"missing \(encoder.layers.2"),
    "one layer in the configuration": (edit(TEXT, num_hidden_layers=1), r"are not the model's \(encoder.layers.1"),
    "two transformer layers in the configuration": (
        edit(UNET, transformer_layers_per_block=2),
        r"missing \(down_blocks.0.attentions.0.transformer_blocks.1",
    ),
    "integers": (
        edit_weights(UNET_WEIGHTS, lambda w: {**w, "conv_in.weight": w["conv_in.weight"].to(torch.int8)}),
        r"holds integers: conv_in.weight \(I8\)",
    ),
    "integers in a pickle": (
        as_bin("vae", lambda w: {name: value.to(torch.int8) for name, value in w.items()}),
        r"holds integers: .* \(torch.int8\)",
    ),
    "values that are not finite": (
        edit_weights(VAE_WEIGHTS, lambda w: nan(w, "decoder.conv_in.bias")),
        r"not finite \(decoder.conv_in.bias\)",
    ),
    "no file": (removed(UNET_WEIGHTS), "unet has no weights: none of diffusion_pytorch_model.safetensors, "),
    "no file of the text encoder": (removed(TEXT_WEIGHTS), "text_encoder has no weights: none of model.safetensors, "),
    "an empty file": (text(UNET_WEIGHTS, b""), "diffusion_pytorch_model.safetensors cannot be read: the file is empty"),
    "a Git LFS pointer": (
        text(UNET_WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid"),
        "it is a Git LFS pointer, .* run git lfs pull",
    ),
    "a web page": (text(VAE_WEIGHTS, "<!doctype html><html>"), r"it is a web page \(HTML\)"),
    "noise": (text(VAE_WEIGHTS, b"\x01\x02\x03" * 99), "neither safetensors nor written by torch.save"),
    "half a file": (
        lambda folder: replace_text(folder / VAE_WEIGHTS, (folder / VAE_WEIGHTS).read_bytes()[:50_000]),
        "vae/diffusion_pytorch_model.safetensors cannot be read: SafetensorError: ",
    ),
    "a folder": (a_folder_instead(UNET_WEIGHTS), "diffusion_pytorch_model.safetensors: Is a directory"),
    "code in the U-Net": (
        as_bin("unet", lambda w: {**w, "x": Malicious()}),
        "diffusion_pytorch_model.bin is a pickle that holds more than tensors",
    ),
    "code in the text encoder": (
        as_bin("text_encoder", lambda w: {**w, "x": Malicious()}),
        "pytorch_model.bin is a pickle that holds more than tensors",
    ),
    "a list in a pickle": (as_bin("vae", lambda w: list(w.values())), "holds a list, not tensors by name"),
    "an index without files": (
        together(removed(VAE_WEIGHTS), text(VAE_WEIGHTS + ".index.json", '{"weight_map": {"a": "gone.safetensors"}}')),
        "names 1 files, and gone.safetensors is not beside it",
    ),
    "an index that is no index": (
        together(removed(VAE_WEIGHTS), text(VAE_WEIGHTS + ".index.json", '{"weight_map": ["a"]}')),
        "has no weight_map",
    ),
    "an index that leads out": (
        together(removed(VAE_WEIGHTS), text(VAE_WEIGHTS + ".index.json", '{"weight_map": {"a": "../x.safetensors"}}')),
        "has no weight_map from tensors to files in its folder",
    ),
}

FAMILIES = {"index": INDEXES, "config": CONFIGS, "scheduler": SCHEDULERS, "tokenizer": TOKENIZERS, "weights": WEIGHTS}
