"""Tiny models of the real classes, in the diffusers folder layout, for tests."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    LDMTextToImagePipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engine.contract import Family
from engine.family import Traits, joined
from engine.manifest import LowResolution
from export import oracles
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

SHALLOW_UNET = {
    **UNET,
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""One level: traced in two thirds of the time, where the shape of the U-Net is not the subject."""


def tiny_vae(channels: tuple[int, ...], **options: float) -> AutoencoderKL:
    """A random VAE with as many levels as `channels`."""
    return AutoencoderKL(
        block_out_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        **options,
    ).eval()


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
    vae = tiny_vae((8, 16, 16, 16))
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


JOINED = {"inpaint": 9, "depth": 5, "edit": 8, "upscale": 7}
"""The channels that the U-Net of each kind of model with more than text takes."""


def tiny_joined(kind: str) -> DiffusionPipeline:
    """diffusers' pipeline of a random model whose U-Net sees more than latents: a kind of JOINED."""
    modules = tiny_modules("sd1")
    torch.manual_seed(1)
    levels = {"num_class_embeds": 30} if kind == "upscale" else {}
    modules["unet"] = UNet2DConditionModel(
        **SHALLOW_UNET, attention_head_dim=8, in_channels=JOINED[kind], **levels
    ).eval()
    family = tiny_family(kind)
    if kind == "upscale":
        modules["vae"] = tiny_vae((8, 16, 16), scaling_factor=0.08333)
    noising = LowResolution({"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}, 29)
    return oracles.pipeline(family, modules, noising if kind == "upscale" else None)


def tiny_family(kind: str) -> Family:
    concat, upscales = JOINED[kind] - 4, kind == "upscale"
    return joined(Traits(4, 4 if upscales else 8, concat=concat, noise_levels=30 if upscales else None))


def write_joined_model(folder: Path, kind: str) -> Path:
    """That of `tiny_joined` as a diffusers folder."""
    tiny_joined(kind).save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**SCHEDULER, **json.loads(file.read_text())}))
    return folder


TEXTLESS_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def tiny_textless(kind: str) -> DiffusionPipeline:
    """A random model without texts: "ddpm", "iddpm" (classes, learned variance) or "ldm" (a VQ-VAE). The U-Nets of the
    first and the last are the same."""
    torch.manual_seed(0)
    if kind == "iddpm":
        unet = UNet2DModel(
            **TEXTLESS_UNET,
            out_channels=6,
            num_class_embeds=5,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        )
        return DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2"))
    unet = UNet2DModel(**TEXTLESS_UNET, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)
    if kind == "ddpm":
        return DDPMPipeline(unet, DDPMScheduler())
    decoder = VQModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        num_vq_embeddings=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    torch.nn.init.normal_(decoder.quantize.embedding.weight, std=3.0)
    return LDMPipeline(decoder, unet, DDIMScheduler(clip_sample=False))


def write_textless_model(folder: Path, kind: str) -> Path:
    """That of `tiny_textless` as a diffusers folder."""
    tiny_textless(kind).save_pretrained(folder)
    return folder


MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PLAIN = ["a", "large", "red", "circle", "on", "blue", "background", "small", "green", "star", "white", "##s"]
WORDS = [*MARKS, *PLAIN, *(f"word{number}" for number in range(250))]


def tiny_latent_diffusion() -> LDMTextToImagePipeline:
    """Random latent diffusion with a text: BERT, a VQ-VAE, and the U-Net of `tiny_modules("sd1")`."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET, attention_head_dim=8)
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(WORDS),
            d_model=32,
            encoder_layers=2,
            encoder_ffn_dim=64,
            encoder_attention_heads=2,
            head_dim=16,
            init_std=0.5,
        )
    )
    decoder = VQModel(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        num_vq_embeddings=32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    torch.nn.init.normal_(decoder.quantize.embedding.weight, std=3.0)
    pipeline = LDMTextToImagePipeline(
        vqvae=decoder.eval(),
        bert=bert.eval(),
        tokenizer=BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=77),
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
