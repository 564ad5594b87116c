"""Whatever is typed, the command ends with 0, 1 or 2 and with named errors only."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Pipeline
from engine.__main__ import main
from engine.errors import BackendError

OPTIONS = {
    "picture": [
        "--prompts",
        "--bundle",
        "--output",
        "--negative-prompt",
        "--steps",
        "--guidance-scale",
        "--seed",
        "--scheduler",
        "--eta",
        "--height",
        "--width",
        "--count",
        "--backend",
        "--device",
        "--no-cuda-graphs",
        "--threads",
        "--quiet",
        "--help",
        "--version",
        "--nonsense",
        "-x",
        "--",
    ],
    "doctor": ["--bundles", "--verify", "--help", "--nonsense", "--"],
}
PLACES = [
    "good",
    "broken",
    "garbled",
    "empty",
    "nowhere",
    "texts.txt",
    "picture.png",
    "pipe.png",
    "nowhere/picture.png",
    "loop.png",
    "/",
    "~",
    "/dev/null",
]
TEXT = st.text(st.characters(), max_size=30)
NUMBERS = ["9" * 5000, "-" + "9" * 5000, "1e999", "0x10", "1_0", "\u0663", " 7 ", str(2**64)]
NAMES = ["ddim", "cpu", "cuda:1", "openvino", "onnxruntime", "tensorrt", "a\0b", "n" * 300, "p/" * 3000]
VALUES = (
    st.sampled_from(PLACES)
    | st.sampled_from(NUMBERS)
    | st.sampled_from(NAMES)
    | st.integers().map(str)
    | st.floats().map(str)
    | TEXT
)


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(list(OPTIONS)))
    words = [command] if draw(st.integers(0, 9)) else [draw(VALUES)]
    for option in draw(st.lists(st.sampled_from(OPTIONS[command]), max_size=5)):
        value = draw(VALUES)
        words += draw(st.sampled_from([[option, value], [f"{option}={value}"], [value, option], [option]]))
    return words


@pytest.fixture(scope="module")
def place(demo_bundle, tmp_path_factory):
    """A folder with a bundle that is good and three that are not; loading is where it ends."""
    folder = tmp_path_factory.mktemp("garbage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(Pipeline, "load", stop)
        (folder / "good").symlink_to(demo_bundle)
        for name, content in (("broken", "{"), ("garbled", '{"format": 2, "files": 5}'), ("empty", None)):
            (folder / name).mkdir()
            if content:
                (folder / name / "manifest.json").write_text(content)
        (folder / "texts.txt").write_text("a ring\na star\n")
        os.mkfifo("pipe.png")
        os.symlink("loop.png", "loop.png")
        yield folder


def stop(*arguments, **options):
    raise BackendError("nothing is loaded in this test")


def run(words):
    return run_command(main, words)


def run_command(main, words):
    """The exit code, and all that was printed to streams of a terminal that knows ASCII only."""
    printed = [io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2)]
    with redirect_stdout(printed[0]), redirect_stderr(printed[1]):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    for stream in printed:
        stream.flush()
    return code, b"".join(stream.buffer.getvalue() for stream in printed).decode("ascii")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(words=command_lines())
def test_no_command_line_ends_in_an_error_without_a_name(place, words):
    before = sorted(os.listdir(place))
    code, printed = run(words)
    assert code in (0, 1, 2)
    assert "Traceback" not in printed
    assert "run again with --debug" not in printed
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["picture"],
        [""],
        ["picture", "red", "--steps", "9" * 5000],
        ["picture", "red", "--count", "9" * 5000],
        ["picture", "red", "--seed", "-" + "9" * 5000],
        ["picture", "\ud800", "--bundle", "good"],
        ["picture", "red", "--bundle", "\ud800"],
        ["picture", "red", "--bundle", "good/" + "p/" * 3000],
        ["picture", "red", "--prompts", "\0"],
        ["doctor", "--bundles", "\0"],
        ["doctor", "--bundles", "n" * 5000],
        ["doctor", "--bundles", "\udcff"],
        ["picture", "red", "--output", "\0.png"],
        ["picture", "red", "--output", "p/" * 3000 + "a.png"],
        ["picture", "\0", "--bundle", "good", "--device", "\0"],
        ["picture", "red", "--bundle", "good", "--device", "cuda:" + "9" * 5000],
        ["picture", "red", "--bundle", "good", "--device", "cuda:²"],
    ],
)
def test_command_lines_that_once_had_no_name(place, words):
    code, printed = run(words)
    assert code in (1, 2)
    assert "run again with --debug" not in printed
