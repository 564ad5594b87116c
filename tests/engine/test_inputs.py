"""A record names the pictures that a picture was made from; whoever makes it again needs them, and no others."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from engine import metadata
from engine.errors import ReproductionError
from engine.inputs import load
from engine.pixels import FromFile
from engine.record import check_call
from engine.reproduce import compare, make_again, plan, read_pixels, report

FAST = {"num_inference_steps": 2, "seed": 1, "progress": False}


def reproduced(pipeline, image, given=None):
    """What the file of a picture makes, beside it."""
    image.save("made.png")
    wanted = plan(Path("made.png"), metadata.read("made.png"), given or {})
    return compare(read_pixels(Path("made.png")), wanted, make_again(pipeline, wanted, progress=False))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The current folder, with two pictures and a mask. A call sees the second picture turned around."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("first.png", "second.jpg"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 3 if name == "second.jpg" else 1
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(name, exif=exif)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save("mask.png")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a ring", "image": "first.png"},
        {"prompt": "a ring", "image": "second.jpg", "strength": 0.7, "height": 64, "width": 96, "scheduler": "euler_a"},
        {"prompt": ["a ring", "a star"], "image": ["first.png", "second.jpg"], "num_images_per_prompt": 2},
        {"prompt": ["a ring", "a star"], "image": ["first.png", "second.jpg"], "seed": [3, 4]},
        {"prompt": ["a ring", "a star"], "image": "first.png", "mask_image": "mask.png", "seed": [5, 6]},
        {"prompt": ["a ring", "a star"], "image": "second.jpg", "mask_image": ["mask.png"] * 2, "strength": 0.7},
        {"prompt": "a ring", "image": "first.png", "mask_image": "mask.png", "padding_mask_crop": 4, "composite": True},
    ],
    ids=["image", "strength", "images", "seeds", "mask", "masks", "crop"],
)
def test_a_picture_from_pictures_comes_again_from_the_files_that_it_names(demo, files, arguments):
    image = demo(**{**FAST, **arguments}).images[-1]
    again = reproduced(demo, image)
    assert again.equal
    assert again.reasons == ()


def test_pictures_keep_the_names_of_their_files(demo, files):
    opened = Image.open("first.png")
    for given, name in (("first.png", "first.png"), (files / "first.png", str(files / "first.png"))):
        image = demo("a ring", image=given, **FAST).images[0]
        assert json.loads(image.info["latentrt"])["inputs"]["image"][0]["file"] == name
    mask = FromFile.read("mask.png", "the mask")
    request = check_call(demo.limits, {"prompt": "a ring", "image": [opened], "mask_image": mask})
    assert (request.init.files, request.inpaint.files) == (("first.png",), ("mask.png",))
    assert check_call(demo.limits, {"prompt": "a ring", "image": np.asarray(opened)}).init.files == (None,)


def test_a_record_has_what_a_picture_was_made_from(demo, files):
    arguments = {"mask_image": "mask.png", "composite": True, "padding_mask_crop": 4, "strength": 0.7}
    image = demo("a ring", image="first.png", **arguments, **FAST).images[0]
    content = json.loads(image.info["latentrt"])
    for name in ("composite", "padding_mask_crop", "strength"):
        assert content["arguments"][name] == arguments[name]
    assert [(name, one[0]["file"]) for name, one in content["inputs"].items()] == [
        ("image", "first.png"),
        ("mask_image", "mask.png"),
    ]
    assert "Denoising strength: 0.7, RNG: CPU, " in image.info["parameters"]
    assert ", Composite: True, Masked area padding: 4, Version: " in image.info["parameters"]
    assert "Composite" not in demo("a ring", **FAST).images[0].info["parameters"]


def test_a_file_that_is_missing_or_another_is_named(demo, files):
    image = demo("a ring", image="first.png", mask_image="mask.png", **FAST).images[0]
    (files / "mask.png").rename(files / "moved.png")
    with pytest.raises(ReproductionError, match=r"mask_image 'mask.png' \(64 x 64 pixels, SHA-256 \w{10}\), which"):
        reproduced(demo, image)
    moved = {"mask_image": [load("mask_image", files / "moved.png")]}
    assert reproduced(demo, image, moved).equal
    (files / "first.png").write_bytes((files / "second.jpg").read_bytes())
    with pytest.raises(ReproductionError, match=r"'first.png' has other pixels; pass --image FILE"):
        reproduced(demo, image, moved)
    (files / "first.png").write_bytes(b"no picture")
    with pytest.raises(ReproductionError, match=r"and now image 'first.png' is no picture .*; or pass --image FILE"):
        reproduced(demo, image, moved)
    with pytest.raises(ReproductionError, match=r"first\.png' is no picture that Pillow reads"):
        load("image", files / "first.png")
    other = reproduced(demo, image, {**moved, "image": [load("image", files / "second.jpg")]})
    assert not other.equal
    assert other.reasons[0].startswith("image: not the one that the picture was made from (first.png, SHA-256 ")


def test_files_are_looked_for_beside_the_picture_too(demo, files, monkeypatch):
    image = demo("a ring", image="first.png", **FAST).images[0]
    image.save("made.png")
    monkeypatch.chdir("/")
    wanted = plan(files / "made.png", metadata.read(files / "made.png"), {})
    assert make_again(demo, wanted, progress=False).tobytes() == image.tobytes()


def test_the_names_in_a_record_may_be_anything(demo, files):
    os.mkfifo("pipe")  # reading it would wait for ever
    image = demo("a ring", image="first.png", **FAST).images[0]
    content = json.loads(image.info["latentrt"])
    for name in ("pipe", "a\0b", "x" * 5000):
        content["inputs"]["image"][0]["file"] = name
        image.info["latentrt"] = json.dumps(content)
        with pytest.raises(ReproductionError, match="which is not there; pass --image FILE"):
            reproduced(demo, image)


def test_a_picture_that_was_in_no_file_is_asked_for(demo, files):
    image = demo("a ring", image=Image.new("RGB", (64, 64)), **FAST).images[0]
    with pytest.raises(ReproductionError, match="was given image, of which the record has a hash only; pass --image"):
        reproduced(demo, image)


def test_equal_pixels_from_another_picture_say_so(demo, files):
    image = demo("a ring", image="first.png", mask_image="mask.png", **FAST).images[0]
    mask = Image.open("mask.png")
    mask.putpixel((1, 1), 254)
    mask.save("grey.png")
    image.save("made.png")
    given = {"mask_image": [load("mask_image", files / "grey.png")]}
    wanted = plan(files / "made.png", metadata.read("made.png"), given)
    again = compare(read_pixels("made.png"), wanted, make_again(demo, wanted, progress=False))
    lines = list(report(files / "made.png", wanted, again, demo.description, None))
    assert lines[1] == "the pixels are equal, although:"
    assert lines[2].startswith("  mask_image: not the one that the picture was made from (mask.png")
