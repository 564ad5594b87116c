"""What a picture to start from may be."""

import io

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from engine.errors import ImageError
from engine.pixels import read_image, resized, size_of

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (24, 40, 3), np.uint8)


def pixels(image) -> np.ndarray:
    """[H, W, 3] uint8 of what was read."""
    return np.round((resized(image, *size_of(image)) + 1) * 127.5).astype(np.uint8)


def file_of(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("size", [(24, 40), (16, 64), (48, 8)])
def test_the_encoder_gets_what_diffusers_gives_it(size):
    image = Image.fromarray(COLOURS)
    wanted = VaeImageProcessor(vae_scale_factor=8).preprocess(image, *size)[0].permute(1, 2, 0).numpy()
    assert np.abs(resized(read_image(image), *size) - wanted).max() < 1e-6


def test_a_camera_s_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert size_of(read_image(file_of(tmp_path, Image.fromarray(COLOURS), exif=exif))) == (40, 24)


@pytest.mark.parametrize("form", ["RGBA file", "RGBA array", "float array", "palette", "grey and alpha"])
def test_what_is_transparent_shows_white(form, tmp_path):
    alpha = np.zeros((24, 40, 1), np.uint8)
    alpha[12:] = 255
    with_alpha = np.concatenate([COLOURS, alpha], axis=2)
    palette = Image.fromarray(COLOURS).quantize(16)
    source = {
        "RGBA file": lambda: file_of(tmp_path, Image.fromarray(with_alpha)),
        "RGBA array": lambda: with_alpha,
        "float array": lambda: with_alpha / 255,
        "palette": lambda: file_of(tmp_path, palette, transparency=bytes(16)),
        "grey and alpha": lambda: Image.fromarray(with_alpha).convert("LA"),
    }[form]()
    read = pixels(read_image(source))
    assert (read[:12] == 255).all()
    if form in ("RGBA file", "RGBA array", "float array"):
        assert (read[12:] == COLOURS[12:]).all()


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    read = resized(read_image(file_of(tmp_path, Image.fromarray(values))), 24, 40)
    assert np.abs(read[..., 0] - (values / 32767.5 - 1)).max() < 1e-6


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "HSV", "YCbCr"])
def test_other_modes_become_rgb(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    assert (pixels(read_image(image)) == np.asarray(image.convert("RGB"))).all()


def test_of_an_animation_it_is_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = file_of(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(read_image(file)) == [255, 0, 0]).all()


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "PNG")
    return buffer.getvalue()[:-600]


def bomb() -> bytes:
    """A PNG whose header says 20000 x 20000."""
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a picture", "no picture that Pillow reads"),
        (truncated(), "damaged"),
        (bomb(), "refused|at most 67108864"),
    ],
)
def test_a_file_that_is_no_picture_is_an_error_by_name(tmp_path, content, words):
    file = tmp_path / "a.png"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=words):
        read_image(file)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/no/such/file.png", "cannot be read"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.full((4, 4, 3), 2.0), "values from 2 to 2; floats are colours in 0..1"),
        (np.full((4, 4, 3), np.nan), "values from nan"),
        (np.zeros((4, 4, 3), np.int64), "array of int64"),
        (b"bytes", "image is a bytes"),
    ],
)
def test_what_is_no_picture_is_an_error_by_name(source, words):
    with pytest.raises(ImageError, match=words):
        read_image(source)
