"""CompVis' latent diffusion without text is read from its own checkpoints."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from export.errors import UnreadableModelError, UnsupportedModelError
from export.sources import latent_diffusion
from export.sources.openai_flags import Flags

from .compvis_names import vae_names
from .guided_diffusion import UNet

FILE = Path("model.ckpt")
FLAGS = Flags(image_size=8, num_head_channels=32)
LEVELS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def vq_model() -> VQModel:
    return VQModel(**LEVELS, latent_channels=3, num_vq_embeddings=16, scaling_factor=1.0).eval()


def checkpoint(first_stage=None, channels: int = 3, **buffers) -> tuple[UNet, dict]:
    torch.manual_seed(0)
    original = UNet(num_head_channels=32, use_scale_shift_norm=False, learn_sigma=False, in_channels=channels).eval()
    stage = (first_stage or vq_model()).state_dict()
    weights = {f"model.diffusion_model.{name}": value for name, value in original.state_dict().items()}
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float()
    return original, {**weights, **vae_names(stage, 2), "betas": betas, **buffers}


@torch.no_grad()
def test_the_parts_are_those_that_were_written(tmp_path):
    first_stage = vq_model()
    original, weights = checkpoint(first_stage)
    assert latent_diffusion.is_latent_diffusion(set(weights))
    found = latent_diffusion.read(weights, FILE, FLAGS)
    x, timesteps = torch.randn(1, 3, 8, 8), torch.tensor([501])
    assert (found.unet.model(FILE)(x, timesteps).sample - original(x, timesteps)).abs().max() <= 1e-5
    decoder = found.decoder_model(FILE)
    assert isinstance(decoder, VQModel)
    assert torch.equal(decoder.decode(x).sample, first_stage.decode(x).sample)
    assert (decoder.config.scaling_factor, decoder.config.sample_size) == (1.0, 16)


@torch.no_grad()
def test_the_running_averages_are_the_model():
    original, weights = checkpoint()
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value + 0.5
        for name, value in weights.items()
        if name.startswith("model.diffusion_model.")
    }
    found = latent_diffusion.read({**weights, **averages, "model_ema.decay": torch.tensor(0.99)}, FILE, FLAGS)
    assert torch.equal(found.unet.weights["conv_in.bias"], original.input_blocks[0][0].bias + 0.5)


@torch.no_grad()
def test_a_vae_as_first_stage_is_read_with_its_scale():
    first_stage = AutoencoderKL(**LEVELS, latent_channels=4).eval()
    _, weights = checkpoint(first_stage, channels=4, scale_factor=torch.tensor(0.22))
    found = latent_diffusion.read(weights, FILE, FLAGS)
    x, decoder = torch.randn(1, 4, 8, 8), found.decoder_model(FILE)
    assert torch.equal(decoder.decode(x).sample, first_stage.decode(x).sample)
    assert decoder.config.scaling_factor == pytest.approx(0.22)


def test_the_schedule_is_the_one_in_the_file():
    _, weights = checkpoint()
    config = latent_diffusion.read(weights, FILE, FLAGS).scheduler
    assert (config["beta_schedule"], config["beta_start"], config["beta_end"]) == ("scaled_linear", 0.0015, 0.0195)
    other = torch.linspace(1e-4, 0.02, 10)
    config = latent_diffusion.read({**weights, "betas": other}, FILE, FLAGS).scheduler
    assert (config["num_train_timesteps"], "beta_schedule" in config) == (10, False)
    assert config["trained_betas"] == pytest.approx(other.tolist())


def without(prefix: str) -> dict:
    return {name: value for name, value in checkpoint()[1].items() if not name.startswith(prefix)}


def test_what_is_incomplete_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="nothing decodes its latents"):
        latent_diffusion.read(without("first_stage_model."), FILE, FLAGS)
    with pytest.raises(UnsupportedModelError, match="has no betas"):
        latent_diffusion.read(without("betas"), FILE, FLAGS)
    with pytest.raises(UnreadableModelError, match=r"tensors are missing \(post_quant_conv\.bias"):
        latent_diffusion.read(without("first_stage_model.post_quant_conv"), FILE, FLAGS).decoder_model(FILE)


def test_attention_all_over_the_first_stage_is_refused():
    weights = {**checkpoint()[1], "first_stage_model.encoder.down.1.attn.0.q.weight": torch.zeros(1)}
    with pytest.raises(UnsupportedModelError, match="attention at more than its lowest resolution"):
        latent_diffusion.read(weights, FILE, FLAGS)


def test_a_model_with_text_is_not_one():
    names = set(checkpoint()[1])
    assert not latent_diffusion.is_latent_diffusion(names | {"cond_stage_model.embedding.weight"})
