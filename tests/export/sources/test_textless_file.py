"""One file of a model without texts is a model like any other: OpenAI's layout and CompVis'."""

import json

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import save_file

from engine import family
from export.errors import UnreadableModelError, UsageError
from export.sources.checkpoint import resolve
from export.sources.textless_file import is_textless

from .guided_diffusion import UNet
from .test_latent_diffusion import checkpoint

FLAGS = {"num_heads": 2, "image_size": 64, "noise_schedule": "cosine", "diffusion_steps": 4000}


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """A checkpoint as torch.save writes it, with its flags beside it."""
    torch.manual_seed(0)
    original = UNet(num_heads=2, num_classes=5, resblock_updown=True).eval()
    file = tmp_path_factory.mktemp("openai") / "model.pt"
    torch.save(original.state_dict(), file)
    file.with_suffix(".json").write_text(json.dumps({**FLAGS, "rescale_timesteps": True}))
    return file, original


@torch.no_grad()
def test_a_file_of_openais_makes_pictures(openai):
    file, original = openai
    source = resolve(str(file))
    source.check()
    assert (source.name, source.sample_size(), source.decoder) == ("model", 64, None)
    assert source.family == family.textless(family.Traits(3, 1, 5, True))
    assert source.scheduler_config()["num_train_timesteps"] == 4000
    x = torch.randn(1, 3, 64, 64)
    made = source.load("unet")(x, torch.tensor([2000]), class_labels=torch.tensor([3])).sample
    assert (made - original(x, torch.tensor([500]), torch.tensor([3]))).abs().max() <= 1e-5


def test_the_fingerprint_knows_the_weights_and_the_flags(openai, tmp_path):
    file, original = openai
    fingerprints = set()
    for name, flags in (("one", FLAGS), ("two", {**FLAGS, "num_heads": 4})):
        copy = tmp_path / f"{name}.safetensors"
        save_file(original.state_dict(), copy)
        copy.with_suffix(".json").write_text(json.dumps(flags))
        fingerprints.add(resolve(str(copy)).fingerprint("unet"))
    assert len({*fingerprints, resolve(str(file)).fingerprint("unet")}) == 3


def test_another_sampler_may_be_asked_for(openai):
    assert resolve(str(openai[0]), scheduler="ddim").scheduler_config()["_class_name"] == "DDIMScheduler"


def test_a_file_of_compvis_without_text_makes_pictures(tmp_path):
    _, weights = checkpoint()
    file = tmp_path / "ldm.ckpt"
    torch.save({"state_dict": weights, "global_step": 7}, file)
    file.with_suffix(".json").write_text(json.dumps({"num_head_channels": 32, "image_size": 32}))
    source = resolve(str(file))
    source.check()
    assert (source.decoder, source.sample_size()) == ("VQModel", 64)
    assert source.family == family.textless(family.Traits(3, 2, None, False))
    assert isinstance(source.load("vqvae"), VQModel)


@pytest.mark.parametrize("option", ["tokenizer", "prediction_type"])
def test_options_of_models_with_text_are_refused(openai, option, tmp_path):
    value = {"tokenizer": tmp_path, "prediction_type": "epsilon"}[option]
    with pytest.raises(UsageError, match="has no use for it, so leave the option out"):
        resolve(str(openai[0]), **{option: value})


def test_a_damaged_file_is_named(openai, tmp_path):
    weights = {**openai[1].state_dict(), "out.0.weight": torch.full((32,), float("nan"))}
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    file.with_suffix(".json").write_text(json.dumps(FLAGS))
    with pytest.raises(UnreadableModelError, match=r"not finite \(conv_norm_out\.weight\)"):
        resolve(str(file)).check()


def test_a_model_with_text_stays_one(tmp_path):
    file = tmp_path / "sd.safetensors"
    save_file({"model.diffusion_model.time_embed.0.weight": torch.zeros(1), "cond_stage_model.x": torch.zeros(1)}, file)
    assert not is_textless(file)
