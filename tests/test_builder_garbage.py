"""Whatever is typed, the builder ends with 0, 1 or 2 and with named errors only, and touches nothing that is there."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import build_engines
import export.build
from export.errors import OutputError

from .test_command_garbage import NUMBERS, TEXT, run_command

OPTIONS = [
    "--output",
    "--name",
    "--bundle",
    "--backend",
    "--precision",
    "--height",
    "--width",
    "--batch",
    "--rows",
    "--opset",
    "--device",
    "--optimization-level",
    "--workspace",
    "--max-aux-streams",
    "--diagnose",
    "--random-weights",
    "--tokenizer",
    "--prediction-type",
    "--scheduler",
    "--no-verify",
    "--force",
    "--quiet",
    "--help",
    "--nonsense",
    "--",
]
WORDS = [
    "sd15",
    "sd21",
    "owner/name",
    "model.safetensors",
    "model.ckpt",
    "page.ckpt",
    "folder",
    "pipe.ckpt",
    "model.SAFETENSORS",
    "model.pt",
    "folder/typo",
    "/",
    "~",
    "/dev/null",
    "64",
    "64:64:128",
    "1:2:3",
    "64,72",
    "nan",
    "0",
    "-1",
    "ddim",
    "epsilon",
    "cpu",
    "cuda:5",
    "fp32",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "18",
    "a\0b",
    "n" * 300,
    "p/" * 3000,
    "\ud800",
    "../x",
    ".",
]
VALUES = st.sampled_from(WORDS) | st.sampled_from(NUMBERS) | st.integers().map(str) | TEXT


@st.composite
def command_lines(draw):
    words = [draw(VALUES)] if draw(st.booleans()) else []
    for option in draw(st.lists(st.sampled_from(OPTIONS), max_size=5)):
        value = draw(VALUES)
        words += draw(st.sampled_from([[option, value], [f"{option}={value}"], [option]]))
    return words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with things that are no models. Nothing is built: what would be is where it ends."""
    folder = tmp_path_factory.mktemp("garbage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(export.build, "build", stop)
        for name, content in (
            ("model.safetensors", b""),
            ("model.ckpt", b""),
            ("page.ckpt", b"<html>"),
            ("model.SAFETENSORS", b"x"),
            ("model.pt", b"x"),
        ):
            (folder / name).write_bytes(content)
        (folder / "folder").mkdir()
        os.mkfifo("pipe.ckpt")
        yield folder


def stop(*arguments, **options):
    raise OutputError("nothing is built in this test")


def run(words):
    return run_command(build_engines.main, words)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(words=command_lines())
def test_no_command_line_of_the_builder_ends_in_an_error_without_a_name(place, words):
    before = sorted(os.listdir(place))
    code, printed = run(words)
    assert code in (0, 1, 2), printed
    assert "Traceback" not in printed
    assert "run again with --debug" not in printed, printed
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--height", ""], "--height is ''; it must be N or MIN:OPT:MAX"),
        (["--height", "9" * 5000], "it must be N or MIN:OPT:MAX"),
        (["--height", "65536"], "--height 65536 is not a multiple of 8 from 16 to 16384"),
        (["--height", "٦٤"], "it must be N or MIN:OPT:MAX"),
        (["--batch", "0"], "--batch 0 is not a number from 1 to 1024"),
        (["--batch", "1000000000"], "it must be N or MIN:OPT:MAX"),
        (["--device", "cuda:5", "--backend", "onnxruntime"], "--device cuda:5 is for --backend tensorrt"),
        (["--device", "nonsense"], "device is 'nonsense'; it must be 'cpu'"),
        (
            ["--optimization-level", "3", "--backend", "openvino"],
            "--optimization-level is for --backend tensorrt; leave it out",
        ),
        (["--workspace", "1", "--backend", "onnxruntime"], "--workspace is for --backend tensorrt"),
        (["--diagnose", "--backend", "onnxruntime"], "--diagnose is for --backend tensorrt"),
        (["--prediction-type", "banana"], "--prediction-type banana is for a single file"),
        (["--tokenizer", "nope"], "--tokenizer nope is for a single file"),
        (["sd15", "--random-weights", "--tokenizer", "folder"], "--tokenizer folder is for a single file"),
        (["--scheduler", "best"], "best"),
        (["--name", "../x"], "cannot be a folder's name"),
        (["--name", "a\0b"], "cannot be a folder's name"),
        (["--name", "-x"], "expected one argument"),
        (["--name=-x"], "cannot be a folder's name"),
        (["--name", "n" * 300], "cannot be a folder's name"),
        (["--name", ""], "cannot be a folder's name"),
        (["--bundle", "folder", "--precision", "fp16"], "--precision is for building a bundle from a model"),
        (["--bundle", "folder", "--output", "x"], "--output is for building a bundle from a model"),
        (["--bundle", "folder", "--backend", "openvino"], "leave out MODEL and backends other than tensorrt"),
        (["model.ckpt", "--tokenizer", "nope"], "--tokenizer nope is not there"),
    ],
)
def test_an_option_is_used_or_refused_never_ignored(place, words, expected):
    code, printed = run(words)
    assert code == 2
    assert expected in printed
