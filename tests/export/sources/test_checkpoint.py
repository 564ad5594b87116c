"""Where models come from, and what is said about those that cannot be used."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from export import errors as e
from export.sources.checkpoint import BUILT_IN, RandomWeights, resolve

from ...models import tiny_modules, write_tiny_model
from .compvis_names import compvis_modules, compvis_state_dict


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_compvis_file_gives_the_weights_that_it_was_made_of(tmp_path, kind, suffix):
    modules = compvis_modules(kind)
    file, state = tmp_path / f"model{suffix}", compvis_state_dict(modules)
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 1000}, file)
    else:
        save_file(state, file)
    source = resolve(str(file), tokenizer=BUILT_IN / "tokenizer")
    latents, context, t = torch.randn(1, 4, 16, 8), torch.randn(1, 77, 64), torch.tensor([500.0])
    ids = torch.randint(0, 300, (2, 77))
    with torch.no_grad():
        torch.testing.assert_close(
            source.unet()(latents, t, context).sample, modules["unet"](latents, t, context).sample
        )
        torch.testing.assert_close(source.vae().decode(latents).sample, modules["vae"].decode(latents).sample)
        torch.testing.assert_close(
            source.text_encoder()(ids).last_hidden_state, modules["text_encoder"](ids).last_hidden_state
        )
    assert source.scheduler_config()["prediction_type"] == ("v_prediction" if kind == "sd2" else "epsilon")
    assert source.tokenizer().pad_token == ("!" if kind == "sd2" else "<|endoftext|>")
    assert source.sample_size() == (768 if kind == "sd2" else 512)


def test_the_prediction_type_of_an_sd2_file_can_be_given(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(compvis_state_dict(compvis_modules("sd2")), file)
    source = resolve(str(file), tokenizer=BUILT_IN / "tokenizer", prediction_type="epsilon")
    assert source.scheduler_config()["prediction_type"] == "epsilon"
    assert source.sample_size() == 512
    with pytest.raises(e.UsageError, match="it must be epsilon or v_prediction"):
        resolve(str(file), tokenizer=BUILT_IN / "tokenizer", prediction_type="flow")


def test_step_875000_of_sd2_predicts_noise(tmp_path):
    torch.save(
        {"state_dict": compvis_state_dict(compvis_modules("sd2")), "global_step": 875000}, tmp_path / "base.ckpt"
    )
    assert (
        resolve(str(tmp_path / "base.ckpt"), tokenizer=BUILT_IN / "tokenizer").scheduler_config()["prediction_type"]
        == "epsilon"
    )


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Malicious()}, "evil.ckpt")
    with pytest.raises(e.UnsafePickleError, match=r"evil\.ckpt is a pickle that holds more than tensors"):
        resolve("evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises((e.UnsafePickleError, e.UnreadableModelError)):
        resolve("plain.ckpt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["damaged.safetensors", "damaged.ckpt"])
def test_a_damaged_file_is_unreadable(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(e.UnreadableModelError, match=f"{name} cannot be read"):
        resolve(str(tmp_path / name))


def test_a_lora_file_is_not_a_model(tmp_path):
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(e.UnsupportedModelError, match="not a whole Stable Diffusion checkpoint"):
        resolve(str(tmp_path / "lora.safetensors"))


def test_an_inpainting_unet_is_refused(tmp_path):
    from export.graphs.denoiser import Denoiser

    unet = UNet2DConditionModel(
        in_channels=9, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    with pytest.raises(e.UnsupportedModelError, match=r"in_channels=9; .* \(9 is inpainting"):
        Denoiser(unet, torch.float32)
    unet = UNet2DConditionModel(
        num_class_embeds=3, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    with pytest.raises(e.UnsupportedModelError, match="num_class_embeds=3"):
        Denoiser(unet, torch.float32)


def test_a_vae_of_another_factor_is_refused():
    from export.graphs.vae import VaeDecoder, VaeEncoder

    for graph in (VaeDecoder, VaeEncoder):
        with pytest.raises(
            e.UnsupportedModelError, match=r"the VAE has 4 channels, a factor of 1 .* have 4, 8 and none"
        ):
            graph(AutoencoderKL(block_out_channels=(32,)), torch.float32)


def test_an_sdxl_folder_is_refused(tmp_path):
    folder = write_tiny_model(tmp_path / "model", "sd1")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(e.UnsupportedModelError, match="StableDiffusionXLPipeline"):
        resolve(str(folder))


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(e.UnreadableModelError, match=r"has no model_index\.json"):
        resolve(str(tmp_path))
    folder = write_tiny_model(tmp_path / "model", "sd1")
    (folder / "unet").rename(folder / "gone")
    with pytest.raises(e.UnreadableModelError, match="has no folder unet/"):
        resolve(str(folder))


def test_a_folder_with_damaged_weights(tmp_path):
    folder = write_tiny_model(tmp_path / "model", "sd1")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        e.UnreadableModelError,
        match=r"unet/diffusion_pytorch_model\.safetensors cannot be read: SafetensorError: .*invalid header length",
    ):
        resolve(str(folder)).unet()


def test_half_precision_variants_are_found(tmp_path):
    from ...models import diffusers_pipeline

    diffusers_pipeline(tiny_modules("sd1")).to(torch.float16).save_pretrained(tmp_path / "model", variant="fp16")
    source = resolve(str(tmp_path / "model"))
    assert {p.dtype for p in (*source.unet().parameters(), *source.text_encoder().parameters())} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nonsense", "no folder or file here, and not a hub id"),
        ("sd15", "add --random-weights"),
        ("missing.ckpt", "there is no file"),
    ],
)
def test_an_unknown_model_is_explained(model, words):
    with pytest.raises(e.UnknownModelError, match=words):
        resolve(model)


def test_random_weights_need_a_known_architecture():
    with pytest.raises(e.UsageError, match="known: sd15, sd21, sd21-base"):
        resolve("sdxl", random_weights=True)


@pytest.mark.slow
def test_no_network_is_said_in_one_line(tmp_path):
    """A fresh process, because the hub's library reads its settings when it is imported."""
    code = (
        "from export.sources.checkpoint import resolve; from export.errors import NoNetworkError\n"
        "try: resolve('nobody/no-such-model')\nexcept NoNetworkError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "nobody/no-such-model is not in the local cache and the hub could not be reached" in done.stdout
    assert "if a folder here is meant, check its path" in done.stdout


def test_random_weights_tokenizer_has_clips_ids():
    for name, pad in (("sd15", 49407), ("sd21", 0)):
        tokenizer = RandomWeights(name).tokenizer()
        ids = tokenizer("a red circle", padding="max_length", max_length=77).input_ids
        assert (ids[0], ids[4], ids[5]) == (49406, 49407, pad)


def test_fingerprints_change_with_the_weights_of_their_part_only(tmp_path):
    first, second = (
        resolve(str(write_tiny_model(tmp_path / "a", "sd1"))),
        resolve(str(write_tiny_model(tmp_path / "b", "sd1"))),
    )
    assert all(
        first.fingerprint(part) == second.fingerprint(part) for part in ("unet", "vae", "text_encoder", "tokenizer")
    )
    unet = second.unet()
    with torch.no_grad():
        unet.conv_out.bias += 1
    unet.save_pretrained(tmp_path / "b" / "unet")
    second = resolve(str(tmp_path / "b"))
    assert first.fingerprint("unet") != second.fingerprint("unet")
    assert first.fingerprint("vae") == second.fingerprint("vae")
