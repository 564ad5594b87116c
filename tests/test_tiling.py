"""Large pictures go through the VAE in tiles, without seams."""

import numpy as np
import pytest
from PIL import Image

from engine import Hires, Pipeline
from engine.backends.interface import decode_in_tiles
from engine.contract import Range, Shapes
from engine.errors import TilingError
from engine.picture import psnr
from engine.tiling import Tiles, axis
from export.demo.pictures import Scene
from export.demo.pictures import picture as drawn

from . import fakes
from .engine.backends.test_tensorrt import VERSION

slow = pytest.mark.slow
PROMPTS = ["a large red circle on a blue background", "a small orange cross on a green background"]
FAST = {"num_inference_steps": 4, "progress": False, "seed": 0}
LARGE = {"height": 128, "width": 128, "output_type": "np", **FAST}


@pytest.mark.parametrize(("size", "side"), [(16, 8), (17, 8), (256, 64), (100, 64), (64, 64), (33, 12)])
def test_tiles_of_one_size_cover_an_axis_with_weights_of_one_in_sum(size, side):
    total = np.zeros(size * 2)
    for tile, weight in axis(size, side, 2):
        assert tile.stop - tile.start == side
        total[tile.start * 2 : tile.stop * 2] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_an_end_that_is_not_the_pictures_has_no_weight():
    first, *_, last = [weight for _, weight in axis(256, 64, 1)]
    assert first[0] == last[-1] == 1
    assert not first[-4:].any()
    assert not last[:4].any()


def sides(tiling, height, width, *profiles):
    tiles = Tiles.of(tiling, height, width, 8, profiles)
    return None if tiles is None else tiles.sides


def profile(low, high):
    return Shapes(Range(low, low, high), Range(low, low, high), Range(1, 1, 1))


def test_pictures_are_tiled_above_1024_pixels_a_side_or_when_asked():
    assert sides(None, 1024, 1024) is None
    assert sides(None, 1024, 1032) == (64, 64)
    assert sides(True, 768, 512) == (64, 64)
    assert sides(True, 512, 512) is None
    assert sides(256, 512, 128) == (32, 16)
    assert sides(False, 2048, 2048) is None


def test_a_plan_for_larger_sizes_has_tiles_of_its_smallest():
    assert sides(None, 2048, 2048, profile(1024, 2048)) == (128, 128)
    assert sides(None, 2048, 2048, profile(2048, 2048)) is None
    assert sides(None, 2048, 2048, profile(256, 2048), profile(256, 512)) == (64, 64)


# ------------------------------------------------------------------------------------------- the built-in model


@slow
def test_no_seam_is_to_be_seen(demo):
    """The tiles have the size that the model was trained at. They differ from the whole in what its VAE gathers from
    all of a picture; no row and no column shows where a tile ends."""
    asked = {**LARGE, "num_inference_steps": 20, "seed": [3, 4], "output_type": "latent"}
    latents = demo(PROMPTS, **asked).images
    whole = demo._backend.decode(latents).image
    tiled = decode_in_tiles(demo._backend.decode, latents, Tiles.of(64, 128, 128, 8, demo.profiles)).image
    for one, other in zip(tiled, whole, strict=True):
        assert psnr(one, other) > 30
    for along in (1, 2):
        steps = np.abs(np.diff(tiled.astype(float) - whole, axis=along))
        assert steps.mean(axis=(0, 3 - along, 3)).max() < 4


@slow
def test_the_encoder_is_tiled_too(demo):
    """A picture loses 3 dB on the way through both in tiles: 32 dB become 29."""
    original = Image.fromarray(drawn(Scene("circle", "red", "blue", "large", "centre"))).resize((128, 128))
    asked = {"image": original, "strength": 0.05, "num_inference_steps": 20, "seed": 0, "progress": False}
    whole, tiled = (np.asarray(demo(PROMPTS[0], vae_tiling=tiling, **asked).images[0]) for tiling in (False, 64))
    assert not np.array_equal(whole, tiled)
    assert psnr(tiled, np.asarray(original)) > psnr(whole, np.asarray(original)) - 4


@slow
def test_openvino_and_tensorrt_have_the_tiles_of_onnxruntime(demo, demo_bundle, demo_fp16, planned):
    asked = {**LARGE, "height": 96, "width": 80, "num_inference_steps": 2, "vae_tiling": 64}
    wanted = demo(PROMPTS[0], **asked).images
    with Pipeline.load(demo_bundle, backend="openvino") as pipeline:
        made = pipeline(PROMPTS[0], **asked).images
    assert psnr(255 * made, 255 * wanted) > 45
    with Pipeline.load(demo_fp16, backend="onnxruntime") as pipeline:
        wanted = pipeline(PROMPTS[0], **asked).images
    with fakes.install(VERSION), Pipeline.load(planned(VERSION)) as pipeline:
        made = pipeline(PROMPTS[0], **asked).images
    assert psnr(255 * made, 255 * wanted) > 40


@slow
def test_a_second_pass_is_tiled_at_its_size(demo):
    asked = {"hires": Hires(upscaler="lanczos"), "output_type": "np", **FAST}
    whole, tiled = (demo(PROMPTS[0], vae_tiling=tiling, **asked).images for tiling in (None, 64))
    assert whole.shape == tiled.shape == (1, 128, 128, 3)
    assert not np.array_equal(whole, tiled)


@pytest.mark.parametrize("tiling", [0, 56, 512.0, "auto", 10**9])
def test_what_is_no_side_of_a_tile_is_an_error_by_name(demo, tiling):
    with pytest.raises(TilingError, match=r"it must be True, False, None .* or the side of a tile, 64 to \d+ pixels"):
        demo(PROMPTS[0], vae_tiling=tiling, **FAST)
