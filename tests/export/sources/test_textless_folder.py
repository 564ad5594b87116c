"""Folders of models without texts: which are read, and what is wrong with others."""

import json
import shutil
from pathlib import Path

import pytest

from engine import commands
from engine.manifest import Origin
from export import errors as e
from export.sources import checks, latent_folder, textless_folder
from export.sources.checkpoint import resolve
from export.sources.textless_folder import TextlessFolder


@pytest.fixture
def changed(textless_sources, tmp_path):
    """changed(kind, file, key=value, ...): a copy of a model with another configuration."""

    def change(kind, file, **values):
        folder = shutil.copytree(textless_sources[kind].folder, tmp_path / "changed")
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return change


def test_the_family_says_what_the_model_is(textless_sources):
    families = {kind: source.family for kind, source in textless_sources.items()}
    assert {kind: (one.channels, one.factor, one.classes) for kind, one in families.items()} == {
        "ddpm": (3, 1, None),
        "iddpm": (3, 1, 5),
        "ldm": (3, 2, None),
    }
    assert [one.learned_variance for one in families.values()] == [False, True, False]
    assert all(one.clips and not one.tokenizers for one in families.values())
    assert textless_sources["ldm"].sample_size() == 32


def test_early_models_have_their_parts_beside_the_index(textless_sources, tmp_path):
    """As google/ddpm-cifar10-32 on the hub."""
    folder = textless_sources["ddpm"].folder
    for part in ("unet", "scheduler"):
        shutil.copytree(folder / part, tmp_path, dirs_exist_ok=True)
    shutil.copy(folder / "model_index.json", tmp_path)
    source = resolve(str(tmp_path))
    assert isinstance(source, TextlessFolder)
    source.check()
    assert source.family == textless_sources["ddpm"].family


@pytest.mark.parametrize(
    ("kind", "file", "values", "error", "words"),
    [
        ("ddpm", "unet/config.json", {"in_channels": 4}, e.UnsupportedModelError, "in_channels=4; a model on pixels"),
        ("ddpm", "unet/config.json", {"out_channels": 5}, e.UnsupportedModelError, "out_channels=5; it must have"),
        ("ddpm", "unet/config.json", {"sample_size": None}, e.UnreadableModelError, "sample_size=None; it must be"),
        ("ddpm", "unet/config.json", {"sample_size": [16, 32]}, e.UnsupportedModelError, "are square samples"),
        ("iddpm", "unet/config.json", {"num_class_embeds": 0}, e.UnreadableModelError, "num_class_embeds=0; it must"),
        (
            "ddpm",
            "unet/config.json",
            {"time_embedding_type": "fourier"},
            e.UnsupportedModelError,
            "time_embedding_type='fourier'; supported: 'positional'",
        ),
        (
            "ddpm",
            "unet/config.json",
            {"down_block_types": ["DownBlock2D", "AttnSkipDownBlock2D"]},
            e.UnsupportedModelError,
            "supported is a list of DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D",
        ),
        ("ldm", "vqvae/config.json", {"norm_type": "spatial"}, e.UnsupportedModelError, "norm_type='spatial'"),
        ("ldm", "vqvae/config.json", {"vq_embed_dim": 4}, e.UnsupportedModelError, "3 channels and the VQModel 4"),
        ("ldm", "vqvae/config.json", {"scaling_factor": 0}, e.UnsupportedModelError, "scaling_factor=0; it must be"),
        ("ldm", "model_index.json", {"vqvae": ["diffusers", "VAE"]}, e.UnsupportedModelError, "vqvae='VAE'; supported"),
        ("ddpm", "model_index.json", {"unet": 3}, e.UnreadableModelError, "unet=3; it must be the library and"),
        (
            "ddpm",
            "scheduler/scheduler_config.json",
            {"variance_type": "learned_range"},
            e.UnsupportedModelError,
            "variance_type='learned_range' is not supported by ddpm; supported: 'fixed_small'",
        ),
        (
            "ddpm",
            "scheduler/scheduler_config.json",
            {"thresholding": True},
            e.UnsupportedModelError,
            "thresholding=true clamps the samples",
        ),
    ],
)
def test_what_is_wrong_with_a_model_is_named(changed, kind, file, values, error, words):
    with pytest.raises(error) as caught:
        resolve(str(changed(kind, file, **values))).check_configs()
    assert words in str(caught.value)


def test_a_part_that_is_missing_is_named(textless_sources, tmp_path):
    folder = shutil.copytree(textless_sources["ldm"].folder, tmp_path / "changed")
    shutil.rmtree(folder / "vqvae")
    with pytest.raises(e.UnreadableModelError, match="has no folder vqvae/; the model is incomplete"):
        resolve(str(folder))


def test_another_scheduler_keeps_noise_and_clipping(textless_sources):
    source = resolve(str(textless_sources["iddpm"].folder), scheduler="ddim")
    config = source.scheduler_config()
    assert (config["_class_name"], config["beta_schedule"]) == ("DDIMScheduler", "squaredcos_cap_v2")
    assert config["clip_sample"]


def test_another_kind_of_model_is_told_which_are_read(textless_sources, changed):
    folder = changed("ddpm", "model_index.json", _class_name="ScoreSdeVePipeline")
    with pytest.raises(e.UnsupportedModelError, match=f"ScoreSdeVePipeline.*and {', '.join(checks.EARLIER)}"):
        resolve(str(folder))
    assert (*textless_folder.PIPELINES, latent_folder.PIPELINE) == checks.EARLIER


def test_the_second_built_in_model_is_built_again_by_its_name():
    assert commands.build_anything(Path("engines/shapes")).endswith(" shapes --output engines")
    assert commands._model(Origin("built-in", "shapes")) == ["shapes"]
    assert commands._model(Origin("built-in", "demo")) == []
