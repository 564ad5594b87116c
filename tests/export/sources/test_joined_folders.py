"""Folders of models whose U-Net sees more than latents: what is read of them, and what is refused by name."""

import json
import shutil

import pytest

from engine.errors import ManifestError
from engine.family import FAMILIES
from engine.manifest import Manifest
from export import errors as e
from export.component import Exporter, GraphFormat
from export.graphs.recipes import JOINED
from export.sources.checkpoint import DiffusersFolder, resolve


def changed(source, folder, file, changes):
    """The folder of a source with changes to one of its JSON files."""
    copy = shutil.copytree(source.folder, folder / "model")
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


@pytest.mark.parametrize(
    ("kind", "joins", "factor", "rows"),
    [("inpaint", "mask", 8, 2), ("depth", "depth", 8, 2), ("edit", "image", 8, 3), ("upscale", "low_resolution", 4, 2)],
)
def test_the_kind_of_pipeline_says_what_the_unet_sees(joined_sources, kind, joins, factor, rows):
    family = joined_sources[kind].family
    assert (family.joins, family.factor, family.most_rows) == (joins, factor, rows)
    assert ("vae_encoder" in family.names) == (kind != "upscale")
    joined_sources[kind].check_configs()


def test_an_inpainting_pipeline_of_four_channels_is_a_text_to_image_model(tiny_sources, tmp_path):
    named = {"_class_name": "StableDiffusionInpaintPipeline"}
    folder = changed(tiny_sources["sd1"], tmp_path, "model_index.json", named)
    assert resolve(str(folder)).family is FAMILIES["stable-diffusion"]


@pytest.mark.parametrize(
    ("kind", "file", "changes", "words"),
    [
        ("depth", "unet/config.json", {"in_channels": 9}, r"in_channels=9; models of this kind have 5 \(9 is"),
        ("edit", "unet/config.json", {"num_class_embeds": 3}, "an input that only the x4 upscaler has"),
        ("edit", "unet/config.json", {"out_channels": 8}, "out_channels=8; 4 is known"),
        ("upscale", "unet/config.json", {"num_class_embeds": None}, "num_class_embeds=None; .* number of noise levels"),
        ("upscale", "vae/config.json", {"block_out_channels": [8] * 4}, "a factor of 8 .* the x4 upscaler have 4, 4"),
        ("upscale", "model_index.json", {"max_noise_level": 30}, "max_noise_level=30; .* from 0 to 29, the last level"),
        (
            "upscale",
            "low_res_scheduler/scheduler_config.json",
            {"beta_schedule": "other"},
            "low_res_scheduler.*beta_schedule",
        ),
        (
            "upscale",
            "model_index.json",
            {"_class_name": "StableDiffusionLatentUpscalePipeline"},
            "is of a 'StableDiffusionLatentUpscalePipeline'; supported are",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(joined_sources, tmp_path, kind, file, changes, words):
    folder = changed(joined_sources[kind], tmp_path, file, changes)
    with pytest.raises(e.UnsupportedModelError, match=words):
        DiffusersFolder(folder, kind, {"kind": "folder", "id": kind}).check_configs()


def test_an_upscaler_without_its_noise_is_incomplete(joined_sources, tmp_path):
    folder = shutil.copytree(joined_sources["upscale"].folder, tmp_path / "model")
    shutil.rmtree(folder / "low_res_scheduler")
    with pytest.raises(e.UnreadableModelError, match="has no folder low_res_scheduler/; the model is incomplete"):
        resolve(str(folder))


def test_graphs_of_one_model_that_differ_in_their_module_have_other_fingerprints(joined_sources):
    """InstructPix2Pix' encoder has the same tensors and file of code as the others', and another scale."""
    source = joined_sources["edit"]
    encoders = [JOINED[joins]["vae_encoder"] for joins in ("image", "depth")]
    made = [Exporter(source, source.family["vae_encoder"], one, GraphFormat("fp32", 20)) for one in encoders]
    assert made[0].fingerprint() != made[1].fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("traits", {"concat": 2}, "traits is .* must be of a model with concat 1, 3, 4, 5"),
        ("traits", {"concat": 5}, "noise_levels where it is 3"),
        ("traits", {"noise_levels": 0}, "traits.noise_levels is 0; it must be an integer from 1"),
        ("low_resolution", {"max_noise_level": 30}, "low_resolution.max_noise_level is 30; .* from 0 to 29"),
        ("low_resolution", {"scheduler": None}, "low_resolution.scheduler is null; it must be an object"),
    ],
)
def test_a_manifest_of_no_such_model_names_the_field(joined_bundles, name, value, words):
    content = json.loads((joined_bundles["upscale"] / "manifest.json").read_text())
    with pytest.raises(ManifestError, match=words):
        Manifest.of({**content, name: {**content[name], **value}})


@pytest.mark.slow
def test_a_manifest_is_written_as_it_was_read(joined_bundles):
    for folder in joined_bundles.values():
        content = json.loads((folder / "manifest.json").read_text())
        assert json.loads(json.dumps(Manifest.of(content).content())) == content
