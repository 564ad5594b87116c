"""Tiny models of the real classes, in the diffusers folder layout, for tests."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from export.sources.checkpoint import BUILT_IN

# Stable Diffusion's files hold all of these, whatever the class of their scheduler.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def tiny_modules(kind: str, seed: int = 0) -> dict:
    """Random components of the SD 1.x or SD 2.x kind ("sd1", "sd2"): heads, projections, activation and prediction type
    differ. "wide" is SD 1.x with heads of 16 and 32, as TensorRT's fused attention wants them."""
    torch.manual_seed(seed)
    second = kind == "sd2"
    tokenizer = CLIPTokenizer.from_pretrained(BUILT_IN / "tokenizer", pad_token="!" if second else "<|endoftext|>")
    unet = (
        UNet2DConditionModel(**UNET, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True)
        if second
        else UNet2DConditionModel(**UNET, attention_head_dim=2 if kind == "wide" else 8)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=32,
            hidden_act="gelu" if second else "quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = (
        DDIMScheduler(**{k: v for k, v in SCHEDULER.items() if k != "skip_prk_steps"}, prediction_type="v_prediction")
        if second
        else PNDMScheduler(**{k: v for k, v in SCHEDULER.items() if k != "clip_sample"})
    )
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }


def diffusers_pipeline(modules: dict) -> StableDiffusionPipeline:
    """diffusers' own pipeline of these components, without a progress bar."""
    pipeline = StableDiffusionPipeline(
        **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_tiny_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A tiny random model as a diffusers folder."""
    diffusers_pipeline(tiny_modules(kind, seed)).save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**SCHEDULER, **json.loads(file.read_text())}))
    return folder
