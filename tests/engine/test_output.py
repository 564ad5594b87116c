"""A picture is written whole, in the format of its name, and replaces nothing but a regular file."""

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from engine.errors import OutputFileError, OutputPathError
from engine.output import FORMATS, check_output, find_target, write_picture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def image():
    return Image.new("RGB", (16, 8), "red")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "--output '' names no file"),
        (".", "'.' names no file"),
        ("..", "'..' names no file"),
        ("/", "'/' names no file"),
        ("new/", "'new/' names no file"),
        ("-", "--output - would be standard output"),
        ("a\0.png", "holds a NUL character"),
        ("\ud800.png", "is not valid Unicode"),
        ("picture", "it has no extension"),
        ("a.gif", "the extension '.gif' is no format"),
        (".png", "it has no extension"),
        ("a.png.", "does not say which format"),
    ],
)
def test_names_that_are_not_taken(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputPathError, match=r"ends in \.png, \.jpg, \.jpeg or \.webp") as caught:
        check_output(name, 1)
    assert words in str(caught.value)
    assert os.listdir() == []


def test_several_pictures_are_numbered_and_all_checked(tmp_path):
    assert check_output(str(tmp_path / "a.b.JPG"), 2) == [tmp_path / "a.b-0.JPG", tmp_path / "a.b-1.JPG"]
    (tmp_path / "a-2.png").mkdir()
    with pytest.raises(OutputPathError, match=r"a-2\.png is a folder and is not replaced"):
        check_output(str(tmp_path / "a.png"), 3)
    (tmp_path / "b-1.png").symlink_to("b-0.png")
    with pytest.raises(OutputPathError, match=r"b-0\.png and .*b-1\.png are the same file"):
        check_output(str(tmp_path / "b.png"), 2)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/a.png", 1) == [tmp_path / "a.png"]


def make_device(place):
    try:
        os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


def make_socket(place):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(place))


THINGS = {
    "a folder": os.mkdir,
    "a device": make_device,
    "a named pipe": os.mkfifo,
    "a socket": make_socket,
    "a symbolic link that leads to itself": lambda place: os.symlink(place.name, place),
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", THINGS)
def test_what_is_no_regular_file_is_never_replaced(tmp_path, monkeypatch, image, kind, linked):
    monkeypatch.chdir(tmp_path)  # the name of a socket has to be short
    file = Path("thing.png")
    THINGS[kind](file)
    if linked:
        Path("link.png").symlink_to(file)
        file = Path("link.png")
    before = {name: os.lstat(name) for name in os.listdir()}
    for refused in (lambda: check_output(str(file), 1), lambda: write_picture(image, file)):
        with pytest.raises(OutputPathError, match=f"{file}.* is {kind} and is not replaced"):
            refused()
    assert {name: os.lstat(name) for name in os.listdir()} == before


def test_a_link_stays_and_its_target_is_written(tmp_path, image):
    (tmp_path / "album").mkdir()
    target = tmp_path / "album" / "old.png"
    target.write_bytes(b"old")
    (tmp_path / "latest.png").symlink_to("album/old.png")
    (tmp_path / "new.png").symlink_to("album/new.png")
    (tmp_path / "lost.png").symlink_to("nowhere/new.png")
    for name in ("latest.png", "new.png"):
        assert check_output(str(tmp_path / name), 1) == [tmp_path / name]
        write_picture(image, tmp_path / name)
        assert (tmp_path / name).is_symlink()
    assert Image.open(target).size == Image.open(tmp_path / "album" / "new.png").size == (16, 8)
    with pytest.raises(OutputFileError, match=r"lost\.png \(a symbolic link to .*nowhere is not a folder; make it"):
        check_output(str(tmp_path / "lost.png"), 1)
    assert sorted(os.listdir(tmp_path / "album")) == ["new.png", "old.png"]


@pytest.mark.parametrize("name", ["a/b.png", "plain/b.png", "n" * 300 + ".png"])
def test_folders_that_cannot_be_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("plain").touch()
    with pytest.raises(OutputFileError, match="cannot be written"):
        check_output(name, 1)


AS_ANYBODY = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
CHECK = """
import sys
from engine.errors import EngineError
from engine.output import check_output
try:
    check_output(sys.argv[1], 1)
except EngineError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
def test_what_may_not_be_written_is_told_before_work_starts(tmp_path):
    """A protected folder, a file in a folder that may not be looked into, a protected file."""
    for folder, mode in (("readonly", 0o555), ("closed", 0o000)):
        (tmp_path / folder).mkdir(mode=mode)
    (tmp_path / "kept.png").touch(mode=0o444)
    said = {}
    for name in ("readonly/a.png", "closed/a.png", "kept.png"):
        command = [*(AS_ANYBODY if os.geteuid() == 0 else []), sys.executable, "-c", CHECK, str(tmp_path / name)]
        said[name] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{tmp_path / 'readonly'} is write-protected; pass another --output" in said["readonly/a.png"]
    assert "closed/a.png' cannot be written (Permission denied)" in said["closed/a.png"]
    assert f"{tmp_path / 'kept.png'} is write-protected" in said["kept.png"]


def test_a_read_only_file_system_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda place: type("Answer", (), {"f_flag": os.ST_RDONLY}))
    with pytest.raises(OutputFileError, match=f"{tmp_path} is on a read-only file system"):
        find_target(tmp_path / "a.png")


@pytest.mark.parametrize("extension", FORMATS)
def test_the_extension_is_the_format(tmp_path, image, extension):
    for suffix in (extension, extension.upper()):
        write_picture(image, tmp_path / f"a{suffix}")
        assert Image.open(tmp_path / f"a{suffix}").format == FORMATS[extension].name
    if extension in (".png", ".webp"):
        noise = Image.effect_noise((32, 32), 80).convert("RGB")
        write_picture(noise, tmp_path / f"b{extension}")
        assert Image.open(tmp_path / f"b{extension}").convert("RGB").tobytes() == noise.tobytes()


def test_a_format_that_pillow_lacks_is_found_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda feature: feature != "webp")
    check_output(str(tmp_path / "a.png"), 1)
    with pytest.raises(OutputPathError, match="Pillow was installed without WEBP here; pass an --output that ends in"):
        check_output(str(tmp_path / "a.webp"), 1)


class Failing:
    """A picture whose writing fails halfway."""

    def __init__(self, error):
        self.error = error

    def save(self, stream, **options):
        stream.write(b"half of it")
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("too large"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, error):
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    with pytest.raises((OutputFileError, KeyboardInterrupt, MemoryError)) as caught:
        write_picture(Failing(error), file)
    if isinstance(error, (OSError, ValueError)):
        assert (
            str(caught.value)
            == f"{file} cannot be written ({getattr(error, 'strerror', error)}); pass another --output"
        )
    assert os.listdir(tmp_path) == ["a.png"]
    assert file.read_bytes() == b"old"


def test_the_file_keeps_its_permissions_and_long_names_work(tmp_path, image):
    private = tmp_path / ("n" * 250 + ".png")
    private.touch(mode=0o600)
    (tmp_path / f".{'n' * 50}.{os.getpid()}.tmp").touch()  # of a killed process
    write_picture(image, private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [private.name]
