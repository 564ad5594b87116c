"""Adapters that a model is built with: the weights are those of diffusers' `fuse_lora`, the pictures those of
`load_lora`."""

import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import build_engines
from engine import Pipeline
from engine.commands import builder
from engine.errors import AdapterError, AdapterFamilyError, AdapterWeightError
from export.errors import UsageError
from export.sources.checkpoint import resolve
from tests import lora_files
from tests.conftest import copy_bundle


@pytest.fixture(scope="module")
def file(tiny_sources, tmp_path_factory):
    lora = lora_files.random_lora(tiny_sources["sd1"].pipeline(), convolutions=True)
    return lora_files.kohya(tmp_path_factory.mktemp("lora") / "ink.safetensors", lora)


@pytest.fixture(scope="module")
def model(tiny_sources):
    return str(tiny_sources["sd1"].folder)


def parameters(model):
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_the_changes_are_those_of_diffusers(model, file):
    fused, plain = resolve(model, loras=[(file, 0.8)]), resolve(model)
    theirs = plain.pipeline()
    theirs.load_lora_weights(str(file.parent), weight_name=file.name)
    theirs.fuse_lora(lora_scale=0.8)
    theirs.unload_lora_weights()
    for part in ("unet", "text_encoder"):
        before, ours, wanted = map(parameters, (plain.load(part), fused.load(part), getattr(theirs, part)))
        changed = {name for name in before if not np.array_equal(before[name], ours[name])}
        assert len(changed) > 10
        for name in before:
            largest = np.abs(wanted[name] - before[name]).max()
            assert np.abs(ours[name] - wanted[name]).max() <= 1e-6 * max(largest, np.abs(before[name]).max())
        assert all(np.abs(wanted[name] - before[name]).max() > 0 for name in changed)


def test_only_what_an_adapter_changes_is_traced_again(model, file):
    def prints(*loras):
        source = resolve(model, loras=loras)
        return [source.fingerprint(part) for part in ("unet", "text_encoder", "vae", "tokenizer")]

    plain, one, same, other = prints(), prints((file, 1.0)), prints((file, 1.0)), prints((file, 0.5))
    assert one == same
    assert plain[2:] == one[2:]
    assert len({*plain[:2], *one[:2], *other[:2]}) == 6


def test_a_plain_models_adapter_changes_the_first_channels_of_an_inpainting_model(joined_sources, tmp_path):
    source = joined_sources["inpaint"]
    save_file({"lora_unet_conv_in.diff": torch.ones(32, 4, 3, 3)}, tmp_path / "full.safetensors")
    fused = resolve(str(source.folder), loras=[(tmp_path / "full.safetensors", 0.5)])
    change = fused.load("unet").conv_in.weight - source.load("unet").conv_in.weight
    torch.testing.assert_close(change[:, :4], torch.full((32, 4, 3, 3), 0.5))
    assert not change[:, 4:].any()


@pytest.mark.slow
def test_a_bundle_with_an_adapter_in_it_makes_the_pictures_of_the_adapter(
    model, tiny_sources, tiny_bundles, tmp_path, capsys
):
    """Of the text encoder alone: the trace of the U-Net is shared, and the VAE is that of the bundle beside."""
    plain = copy_bundle(tiny_bundles["sd1"], tmp_path)
    lora = lora_files.random_lora(tiny_sources["sd1"].pipeline(), seed=7)
    file = lora_files.kohya(tmp_path / "ink.safetensors", {"text_encoder": lora["text_encoder"]})
    form = ["--backend", "onnxruntime", "--precision", "fp32", "--height", "64", "--width", "64", "--batch", "1"]
    options = ["--lora", f"{file}:0.5", "--lora", f"{file}:0.3"]
    assert build_engines.main([model, "--name", "inked", "--output", str(tmp_path), *form, *options]) == 0
    said = capsys.readouterr().out
    assert f"vae_decoder: the same as in {plain}" in said
    assert "text_encoder: exported in" in said
    call = {"seed": 0, "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent", "progress": False}
    with Pipeline.load(tmp_path / "inked", backend="onnxruntime") as pipeline:
        assert pipeline.bundle.contents.source.options == {"lora": f"{file}:0.5\n{file}:0.3"}
        ours = pipeline("a ring", **call).images
        again = pipeline.bundle.command()
    with Pipeline.load(plain, backend="onnxruntime") as pipeline:
        without = pipeline("a ring", **call).images
        pipeline.load_lora(file, weight=0.8)
        wanted = pipeline("a ring", **call).images
    assert np.abs(ours - wanted).max() < 1e-3
    assert np.abs(without - wanted).max() > 1e-2
    assert f"--lora {file}:0.5 --lora {file}:0.3" in again
    assert build_engines.main(shlex.split(again)[len(shlex.split(builder())) :]) == 0
    assert "inked is up to date" in capsys.readouterr().out


def test_a_key_that_nothing_uses_is_a_warning_and_another_family_an_error(model, tmp_path, file):
    save_file({**load_file(file), "surprise": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.warns(RuntimeWarning, match="these change nothing in this model: surprise"):
        resolve(model, loras=[(tmp_path / "more.safetensors", 1.0)]).load("text_encoder")
    layers = lora_files.layers(resolve(None).load("unet"), ("attn2.to_k",), 0)
    other = lora_files.kohya(tmp_path / "demo.safetensors", {"unet": layers})
    with pytest.raises(AdapterFamilyError, match=r"demo\.safetensors was trained for a model .* 128 .* 32 numbers"):
        resolve(model, loras=[(other, 1.0)]).load("unet")


def test_mistakes_are_named_before_anything_is_loaded(model, file, tmp_path):
    with pytest.raises(UsageError, match="is for Stable Diffusion, and shapes is a model without texts, whose weights"):
        resolve("shapes", loras=[(file, 1.0)])
    with pytest.raises(AdapterError, match="is no file, or is empty"):
        resolve(model, loras=[(tmp_path / "gone.safetensors", 1.0)])
    with pytest.raises(AdapterWeightError, match="the weight of 'ink' is 200"):
        resolve(model, loras=[(file, 200.0)])
    with pytest.raises(
        UsageError, match="--lora is for building a bundle from a model, and --bundle takes an existing"
    ):
        build_engines.run(build_engines.parser().parse_args(["--bundle", str(tmp_path), "--lora", str(file)]))
