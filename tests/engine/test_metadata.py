"""Settings in picture files, and files that are none."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from engine.errors import MetadataError
from engine.metadata import Metadata, embed, read, save_options
from engine.output import write_picture
from engine.picture import Picture

TEXT = 'a cat, "été" 日本 🎨\nSteps: 20, Sampler: Euler a, Seed: 1'
RECORD = {"prompt": "日本 \0 🎨", "seeds": [2**64 - 1], "guidance_scale": 7.123456789, "eta": None}
PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def picture(record=RECORD, parameters=TEXT):
    made = Picture.from_pixels(PIXELS, parameters)
    embed(made, parameters, record)
    return made


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_every_format_gives_back_the_text_and_the_record(tmp_path, name):
    write_picture(picture(), tmp_path / name)
    found = read(tmp_path / name)
    assert found.parameters == TEXT
    assert found.record() == RECORD
    picture(None, "plain").save(tmp_path / name)
    assert read(tmp_path / name) == Metadata("plain", None)


def test_the_text_is_where_a1111_puts_it(tmp_path):
    picture().save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").text["parameters"] == TEXT
    picture().save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    assert b"Exif\0\0MM\0*" in data
    assert b"UNICODE\0" + TEXT.encode("utf-16-be") in data
    assert Image.open(tmp_path / "a.jpg").getexif().get_ifd(ExifTags.IFD.Exif)[0x9286].startswith(b"UNICODE\0")


def test_without_settings_none_are_written(tmp_path):
    plain = Image.fromarray(PIXELS)
    for name in ("a.png", "a.jpg", "a.webp"):
        write_picture(plain, tmp_path / name)
        assert read(tmp_path / name) == Metadata(None, None)
        assert read(tmp_path / name).record() is None
    assert save_options({}, "PNG") == {}
    assert save_options(picture().info, "GIF") == {}


def test_own_options_of_saving_win(tmp_path):
    picture().save(tmp_path / "a.png", pnginfo=PngInfo())
    assert read(tmp_path / "a.png") == Metadata(None, None)
    stream = io.BytesIO()
    picture().save(stream, format="png")
    stream.seek(0)
    assert Image.open(stream).text["parameters"] == TEXT
    with open(tmp_path / "b.webp", "wb") as file:
        picture().save(file)
    assert read(tmp_path / "b.webp").parameters == TEXT


def test_settings_too_long_for_a_jpeg_are_refused_and_fit_elsewhere(tmp_path):
    long = "日" * 40_000
    with pytest.raises(
        MetadataError, match=r"settings take 80\d+ bytes, and a JPEG holds 65533; write a .png or .webp"
    ):
        write_picture(picture(None, long), tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []
    for name in ("a.png", "a.webp"):
        picture(None, long).save(tmp_path / name)
        assert read(tmp_path / name).parameters == long
    longest_ascii = "a" * 10_000 + "\nNegative prompt: " + "b" * 10_000
    picture({"prompt": "a" * 10_000, "negative_prompt": "b" * 10_000}, longest_ascii).save(tmp_path / "b.jpg")
    assert read(tmp_path / "b.jpg").parameters == longest_ascii


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),
        b"ASCII\0\0\0" + TEXT.encode() + b"\0\0",
        bytes(8) + TEXT.encode(),
        TEXT.encode(),
    ],
)
def test_comments_of_other_programs_are_read(tmp_path, comment):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = b"Camera"
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    assert read(tmp_path / "a.jpg") == Metadata(TEXT, None)


def test_the_comment_of_a_gif_is_read(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.gif", comment=TEXT.encode())
    assert read(tmp_path / "a.gif").parameters == TEXT


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has the format None, and this version reads 1; use the version of LatentRT that made"),
        ('{"format": 2}', "has the format 2"),
        ('"' + " " * 2**20 + '"', "is longer than 1048576 characters"),
    ],
)
def test_damaged_records_are_errors_and_leave_the_text(tmp_path, record, words):
    text = PngInfo()
    text.add_text("parameters", TEXT)
    text.add_text("latentrt", record)
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=text)
    found = read(tmp_path / "a.png")
    assert found.parameters == TEXT
    with pytest.raises(MetadataError, match=words):
        found.record()


def test_a_record_that_inflates_without_end_is_refused():
    with pytest.raises(MetadataError, match="is longer than"):
        Metadata(None, zlib.compress(b" " * 10**7, 9)).record()
    with pytest.raises(MetadataError, match="is damaged"):
        Metadata(None, b"no deflated data").record()


def test_the_pixels_are_not_needed(tmp_path):
    picture().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: data.index(b"IDAT") + 10])
    assert read(tmp_path / "a.png").record() == RECORD


def test_what_is_no_picture_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for file in (tmp_path / "a.png", tmp_path / "none.png", tmp_path, "a\0.png"):
        with pytest.raises(MetadataError, match="can't be read as a picture"):
            read(file)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_text_that_inflates_without_end_is_refused(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    data = stream.getvalue()
    bomb = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b" " * 10**7, 9))
    (tmp_path / "a.png").write_bytes(data[:33] + bomb + data[33:])
    with pytest.raises(MetadataError, match="can't be read as a picture"):
        read(tmp_path / "a.png")


def good_files():
    files = []
    for name in ("PNG", "JPEG", "WEBP"):
        stream = io.BytesIO()
        picture().save(stream, name)
        files.append(stream.getvalue())
    return files


GOOD = good_files()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=5), st.data())
def test_damaged_files_are_read_or_errors_by_name(tmp_path_factory, data, changes, draw):
    changed = bytearray(data[: draw.draw(st.integers(1, len(data)))] if draw.draw(st.booleans()) else data)
    for place, value in changes:
        changed[place % len(changed)] = value
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(changed)
    try:
        found = read(file)
        found.record()
    except MetadataError:
        return
    assert found.parameters is None or isinstance(found.parameters, str)
