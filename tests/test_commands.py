"""The two commands as a user types them: exit codes, one line for an error, no traceback."""
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from PIL import Image

import build_engines
from build_engines import parse_range
from engine import __main__ as command
from engine.contract import Range
from export.errors import UsageError

ROOT = Path(__file__).parents[1]


def test_build_engines_says_what_it_did(demo_bundle, capsys):
    assert build_engines.main(["--output", str(demo_bundle.parent)]) == 0
    assert capsys.readouterr().out == f"{demo_bundle} is up to date\n"
    assert build_engines.main(["--output", str(demo_bundle.parent), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("arguments", "words"), [
    (["nonsense"], "'nonsense' is no folder or file here"),
    (["sdxl", "--random-weights"], "known: sd15, sd21, sd21-base"),
    (["--height", "500"], "--height 500 is not a multiple of 8 from 16 up"),
    (["--height", "8"], "--height 8 is not a multiple of 8 from 16 up"),
    (["--width", "64:32:128"], "MIN <= OPT <= MAX must hold"),
    (["--width", "64:128"], "it must be N or MIN:OPT:MAX"),
    (["--batch", "0"], "--batch 0 is not 1 or more"),
    (["--batch", "many"], "--batch is 'many'"),
    (["--precision", "bf16"], "no bf16 kernels"),
    (["--name", "../x"], "--name '../x' is not a plain name"),
    (["--output", "/dev/null/engines"], "/dev/null/engines cannot be made"),
])
def test_a_mistake_is_one_line(arguments, words, capsys, tmp_path):
    output = [] if "--output" in arguments else ["--output", str(tmp_path)]
    code = build_engines.main([*arguments, *output])
    printed = capsys.readouterr()
    assert code == (1 if "/dev/null/engines" in arguments else 2)
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert build_engines.main(["nonsense", "--debug", "--output", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_argparse_mistakes_exit_2():
    done = subprocess.run([sys.executable, "build_engines.py", "--precision", "int3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_ranges():
    assert parse_range("512", "height", 8, 16) == Range(512, 512, 512)
    assert parse_range("64:512:768", "height", 8, 16) == Range(64, 512, 768)
    with pytest.raises(UsageError):
        parse_range("64:512:764", "height", 8, 16)


def test_picture_command_writes_a_picture_and_says_how_long_it_took(demo_bundle, tmp_path, capsys):
    file = tmp_path / "circle.png"
    assert command.main(["picture", "a large red circle on a blue background", "--bundle", str(demo_bundle), "--steps", "3", "--seed", "1",
                         "--backend", "onnxruntime", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {file}\nseed 1; ONNX Runtime {onnxruntime.__version__} on the CPU\ntokenize" in printed
    assert "3 steps of" in printed
    assert "values within 1 of 255" in printed
    assert "Seed: 1" in Image.open(file).text["parameters"]
    assert os.listdir(tmp_path) == ["circle.png"]


def test_picture_command_numbers_several_pictures(demo_bundle, tmp_path):
    assert command.main(["picture", "a ring", "--bundle", str(demo_bundle), "--steps", "1", "--count", "2", "--quiet", "--output",
                         str(tmp_path / "ring.png")]) == 0
    assert sorted(os.listdir(tmp_path)) == ["ring-0.png", "ring-1.png"]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--bundle", "/nowhere"], 2, "there is no bundle at /nowhere"),
    (["--steps", "0"], 2, "num_inference_steps is 0"),
    (["--guidance-scale", "nan"], 2, "guidance_scale is nan"),
    (["--height", "500"], 2, "height 500 is not a multiple of 8"),
    (["--scheduler", "best"], 2, "'best' is not known"),
    (["--output", "/dev/null/a.png"], 1, "/dev/null/a.png cannot be written"),
])
def test_picture_command_explains_mistakes_in_one_line(demo_bundle, tmp_path, capsys, arguments, code, words):
    defaults = ["--bundle", str(demo_bundle), "--steps", "1", "--output", str(tmp_path / "a.png")]
    assert command.main(["picture", "a ring", *defaults, *arguments]) == code
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_a_failed_write_keeps_the_old_picture(tmp_path, demo):
    from engine.errors import OutputFileError
    file = tmp_path / "a.png"
    file.mkdir()
    with pytest.raises(OutputFileError, match=r"a\.png cannot be written"):
        command.write_png(demo("a ring", num_inference_steps=1, seed=0).images[0], file)
    assert os.listdir(tmp_path) == ["a.png"]
