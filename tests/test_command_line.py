"""`picture` with many calls, comparisons and sheets, `reproduce`, and the commands of docs/command_line.md."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine import Pipeline, metadata
from engine.__main__ import main
from engine.batch_file import Totals, run
from engine.comparison import comparable
from engine.errors import BatchFileError, DeviceLostError, OutputFileError
from engine.record import UNRECORDED, call_parameters

ROOT = Path(__file__).parents[1]
FAST = {"num_inference_steps": 1, "progress": False}


def batch(demo, folder, *lines, output="many.png", **defaults):
    """Runs a file of lines. The totals, what was written, and the failures."""
    file = folder / "calls.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    told, warned = [], []
    totals = run(demo, file, str(folder / output), {**FAST, **defaults}, told.append, warned.append)
    shorten = f"{file}:"
    return totals, [line.removeprefix(shorten) for line in told], [line.removeprefix(shorten) for line in warned]


def pictures(folder):
    return sorted(name for name in os.listdir(folder) if name != "calls.jsonl")


def test_each_line_is_a_call_with_arguments_by_name(demo, tmp_path):
    totals, told, warned = batch(
        demo,
        tmp_path,
        {"prompt": "a ring", "seed": 1, "output": str(tmp_path / "ring.jpg")},
        "",
        {"prompt": ["a star", "a heart"], "steps": 2, "sampler": "euler_a", "sampler-options": {"s_noise": 0.9}},
        {"prompt": "a ring", "num_inference_steps": 2, "guidance_scale": [5, 1], "guidance-interval": [0, 1]},
    )
    assert warned == []
    assert str(totals) == "lines: 3 made, 0 were there already, 0 failed"
    assert pictures(tmp_path) == ["many-3-0.png", "many-3-1.png", "many-4.png", "ring.jpg"]
    assert told[0] == f"1: wrote {tmp_path / 'ring.jpg'}"
    arguments = metadata.read(tmp_path / "many-3-1.png").record()["arguments"]
    assert (arguments["prompt"], arguments["scheduler"], arguments["num_inference_steps"]) == ("a heart", "euler_a", 2)
    assert arguments["sampler_options"] == {"s_noise": 0.9}


def test_what_a_line_leaves_out_the_command_line_says(demo, tmp_path):
    batch(demo, tmp_path, {"prompt": "a ring"}, {"seed": 4, "prompt": "b"}, seed=3, scheduler="euler")
    first, second = (metadata.read(tmp_path / f"many-{i}.png").record()["arguments"] for i in (1, 2))
    assert (first["seed"], second["seed"]) == (3, 4)
    assert first["scheduler"] == second["scheduler"] == "euler"


def test_what_is_written_is_skipped_and_what_was_changed_is_made_again(demo, tmp_path):
    lines = [{"prompt": "a ring", "seed": 1}, {"prompt": "a star"}, {"prompt": "a heart", "seed": 2}]
    batch(demo, tmp_path, *lines[:2])
    before = {name: os.stat(tmp_path / name).st_mtime_ns for name in pictures(tmp_path)}
    assert batch(demo, tmp_path, *lines)[0] == Totals(1, 2)
    assert {name: os.stat(tmp_path / name).st_mtime_ns for name in before} == before
    assert batch(demo, tmp_path, {"prompt": "a ring", "seed": 9}, *lines[1:])[0] == Totals(1, 2)
    assert batch(demo, tmp_path, *lines, num_inference_steps=2)[0] == Totals(3, 0)
    (tmp_path / "many-1.png").write_bytes(b"half of it")
    assert batch(demo, tmp_path, *lines, num_inference_steps=2)[0] == Totals(1, 2)


def test_without_metadata_a_file_that_is_there_is_skipped(demo, tmp_path):
    assert batch(demo, tmp_path, {"prompt": "a ring", "seed": 1}, metadata=False)[0] == Totals(1, 0)
    assert batch(demo, tmp_path, {"prompt": "a ring", "seed": 2}, metadata=False)[0] == Totals(0, 1)
    assert metadata.read(tmp_path / "many-1.png") == metadata.Metadata(None, None)


FAILING = [
    ("{", "it is not JSON"),
    ("[" * 100_000, "it is not JSON"),
    ("5", "it is 5; write an object such as"),
    ({"prompt": "a", "colour": "red"}, "'colour' is no argument; there are: output, "),
    ({"prompt": "a", "metadata": False}, "'metadata' is no argument"),
    ({"prompt": "a", "steps": 2, "num_inference_steps": 3}, "num_inference_steps is given twice, once as 'num_inf"),
    ({"prompt": "a", "steps": "many"}, "num_inference_steps is 'many'; it must be an integer"),
    ({"prompt": "a", "height": 500}, "height 500 is not a multiple of 8"),
    ({"prompt": "a", "seed": -1}, "seed -1 is not an integer"),
    ({"prompt": "a", "latents": [1]}, "'latents' is no argument"),
    ({"prompt": "a", "image": "/nowhere.png"}, "image '/nowhere.png' cannot be read (No such file or directory)"),
    ({"prompt": "a", "mask": "mask.png"}, "mask_image says which part of an image is repainted; pass image too"),
    ({"prompt": "a", "strength": 0.5}, "strength says how much of an image changes; pass image too"),
    ({"seed": 1}, "prompt is missing"),
    ({"prompt": "a", "output": 5}, "output is 5; it must be a file's name"),
    ({"prompt": "a", "output": "a.gif"}, "the extension '.gif' is no format of pictures"),
    ({"prompt": "a", "output": "/nowhere/a.png"}, "/nowhere is not a folder"),
]
"""Lines, and words of what is said of them."""


def test_a_line_that_fails_is_named_and_the_others_are_made(demo, tmp_path):
    totals, _, warned = batch(
        demo, tmp_path, {"prompt": "a ring"}, *(line for line, _ in FAILING), {"prompt": "a star"}
    )
    assert (totals.made, totals.failures) == (2, list(range(2, len(FAILING) + 2)))
    assert len(warned) == len(FAILING)
    for number, ((_, words), said) in enumerate(zip(FAILING, warned), 2):
        assert said.startswith(f"{number}: ")
        assert words in said
    assert pictures(tmp_path) == ["many-1.png", f"many-{len(FAILING) + 2}.png"]
    assert str(totals).endswith(f"{len(FAILING)} failed (lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...)")


def test_two_lines_for_one_file_are_a_mistake_of_the_second(demo, tmp_path):
    twice = {"prompt": "a ring", "output": str(tmp_path / "a.png")}
    totals, _, warned = batch(demo, tmp_path, twice, {**twice, "seed": 1})
    assert totals == Totals(1, 0, [2])
    assert "a.png is the file of line 1; give this line another output" in warned[0]


def test_a_lost_device_ends_the_file(demo, tmp_path):
    class Lost(Pipeline):
        def __init__(self):
            self.__dict__ = demo.__dict__

        def __call__(self, *arguments, **options):
            raise DeviceLostError("the GPU is gone")

    with pytest.raises(DeviceLostError):
        batch(Lost(), tmp_path, {"prompt": "a ring"}, {"prompt": "a star"})


def test_a_full_disk_ends_the_file(demo, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputFileError, match=r"many-1\.png cannot be written \(No space left on device\)"):
        batch(demo, tmp_path, {"prompt": "a ring"}, {"prompt": "a star"})


def test_lines_begin_with_pictures_too(demo, tmp_path):
    begin, mask = tmp_path / "begin.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "red").save(begin)
    Image.new("L", (64, 64), 255).save(mask)
    line = {"prompt": "a ring", "image": str(begin), "strength": 0.9, "num_inference_steps": 2, "seed": 1}
    lines = [line, {**line, "mask": str(mask), "composite": True}]
    assert batch(demo, tmp_path, *lines)[0] == Totals(2, 0)
    assert batch(demo, tmp_path, *lines)[0] == Totals(0, 2)
    Image.new("RGB", (64, 64), "blue").save(begin)
    assert batch(demo, tmp_path, *lines)[0] == Totals(2, 0)


def test_a_file_of_calls_that_cannot_be_read(demo, tmp_path):
    (tmp_path / "bad").write_bytes(b"{}\n\xff")
    for name, words in (("bad", "is not UTF-8: line 2"), ("none", "cannot be read"), (".", "Is a directory")):
        with pytest.raises(BatchFileError, match=words):
            run(demo, tmp_path / name, "a.png", FAST, None, print)


def command(bundle, *words):
    """The exit code of a command on a bundle."""
    with_bundle = ["--bundle", str(bundle), "--backend", "onnxruntime"]
    try:
        return main([words[0], *with_bundle, *map(str, words[1:])])
    except SystemExit as end:
        return end.code


def test_a_grid_compares_values_of_two_arguments(demo_bundle, demo, tmp_path):
    file = tmp_path / "grid.png"
    axes = ["--compare", "sampler=ddim,euler_a", "--compare", "steps=1,2"]
    assert command(demo_bundle, "picture", "a ring", "--seed", 3, *axes, "--output", file) == 0
    grid = np.asarray(Image.open(file))
    left, top = grid.shape[1] - (2 * 64 + 4), grid.shape[0] - (2 * 64 + 4)
    for row, steps in enumerate((1, 2)):
        for column, sampler in enumerate(("ddim", "euler_a")):
            image = demo("a ring", num_inference_steps=steps, scheduler=sampler, seed=3, progress=False).images[0]
            y, x = top + row * 68, left + column * 68
            assert np.array_equal(grid[y : y + 64, x : x + 64], np.asarray(image))
    assert pictures(tmp_path) == ["grid.png"]


def test_every_argument_of_a_call_that_is_an_option_can_be_compared():
    """Without a list of them: whoever adds an option adds it here."""
    assert {"prompt", "sampler", "scheduler", "steps", "num_inference_steps", "seed", "eta"} <= comparable().keys()
    assert {action.dest for action in comparable().values()} <= call_parameters() - UNRECORDED


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--compare", "size=1,2"], "--compare 'size' is no argument of a call; there are: class_label, class_labels"),
        (["--compare", "backend=a,b"], "--compare 'backend' is no argument"),
        (["--compare", "steps"], "'steps' is not like NAME=VALUE,VALUE"),
        (["--compare", "steps=5,"], "'steps=5,' is not like NAME=VALUE,VALUE"),
        (["--compare", "steps=5,many"], "--compare steps: 'many' is not a whole number from 1 to 1000"),
        (["--compare", "sampler=best"], "--compare sampler=best: scheduler 'best' is not known"),
        (["--compare", "steps=1", "--compare", "height=64,500"], "--compare steps=1, height=500: height 500 is not a"),
        (["--compare", "steps=1", "--compare", "num-inference-steps=2"], "names num_inference_steps twice"),
        (["--compare", "eta=0", "--compare", "eta=1", "--compare", "seed=1"], "is given 3 times; a grid has two axes"),
        (["--compare", "seed=" + ",".join(map(str, range(401)))], "asks for 401 pictures; at most 400"),
        (["--compare", "steps=1", "--count", "2"], "--count cannot be used with --compare; leave it out"),
        (["--compare", "steps=1", "--grid"], "--grid cannot be used with --compare"),
        (["--compare", "steps=1", "--batch-file", "x"], "--compare cannot be used with --batch-file"),
        (["a star", "--compare", "steps=1"], "several texts cannot be used with --compare; leave all but one out"),
        (["--compare", "steps=1", "--output", "a.gif"], "the extension '.gif' is no format"),
        (["--batch-file", "/nowhere"], "--batch-file '/nowhere' cannot be read (No such file or directory)"),
    ],
)
def test_a_mistake_in_a_comparison_is_one_line(demo_bundle, tmp_path, capsys, words, told):
    output = [] if "--output" in words else ["--output", tmp_path / "a.png"]
    assert command(demo_bundle, "picture", "a ring", *words, *output) == 2
    printed = capsys.readouterr().err
    assert told in printed
    assert printed.count("\n") == 1
    assert pictures(tmp_path) == []


def test_values_may_have_commas_and_options_of_samplers_are_arguments(demo_bundle, tmp_path, capsys):
    axes = ["--compare", "guidance-scale=7;7,1", "--compare", "sampler-option=s_noise=1,s_noise=0.5"]
    sampler = ["--sampler", "euler_a", "--steps", "2", "--seed", "1"]
    assert command(demo_bundle, "picture", "a ring", *axes, *sampler, "--output", tmp_path / "a.png") == 0
    assert f"wrote {tmp_path / 'a.png'} (4 pictures, seed 1)" in capsys.readouterr().out


def test_an_inpainted_picture_comes_again_from_its_own_seed_and_from_its_file(demo_bundle, tmp_path, capsys):
    begin, mask, moved = (tmp_path / name for name in ("begin.png", "mask.png", "moved.png"))
    Image.new("RGB", (64, 64), "red").save(begin)
    Image.new("L", (64, 64), 255).save(mask)
    words = ["picture", "a star", "--image", begin, "--mask", mask, "--steps", 1, "--quiet"]
    assert command(demo_bundle, *words, "--seed", 3, "--count", 2, "--output", tmp_path / "a.png") == 0
    assert command(demo_bundle, *words, "--seed", 4, "--output", tmp_path / "b.png") == 0
    pair, alone = (Image.open(tmp_path / name).tobytes() for name in ("a-1.png", "b.png"))
    assert pair == alone
    mask.rename(moved)
    assert command(demo_bundle, "reproduce", tmp_path / "b.png") == 2
    assert f"from the mask_image '{mask}' (64 x 64 pixels, SHA-256 " in capsys.readouterr().err
    assert command(demo_bundle, "reproduce", tmp_path / "b.png", "--mask", moved) == 0
    assert command(demo_bundle, "reproduce", tmp_path / "b.png", "--mask", moved, "--image", tmp_path / "none.png") == 2
    assert "none.png' cannot be read (No such file or directory)" in capsys.readouterr().err


def test_reproduce_says_whether_the_pixels_are_equal(demo_bundle, demo, tmp_path, capsys):
    file = tmp_path / "a.png"
    demo(["a ring", "a star"], num_inference_steps=2, seed=0, progress=False).images[1].save(file)
    assert command(demo_bundle, "reproduce", file, "--output", tmp_path / "b.png") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"made {file} again from its record, picture 2 of its call, with ONNX Runtime")
    assert told.endswith("the pixels are equal\n")
    assert (tmp_path / "b.png").read_bytes() != b""
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(tmp_path / "b.png")))
    changed = Image.open(file)
    text = changed.text["parameters"].replace("Steps: 2", "Tiling: True, Steps: 1")
    demo("a ring", num_inference_steps=1, seed=0, progress=False).images[0].save(file)
    other = Image.open(file)
    info = PngInfo()
    info.add_text("parameters", text)
    other.save(file, pnginfo=info)
    assert command(demo_bundle, "reproduce", file) == 3
    told = capsys.readouterr().out
    assert "not honoured: Tiling: True (there is no such setting here)\nthe pixels differ: PSNR " in told
    assert "  settings: A1111's text, which does not say everything\n" in told


def test_reproduce_explains_what_it_cannot_do(demo_bundle, demo, tmp_path, capsys):
    noise = np.zeros((1, 4, 8, 8), np.float32)
    demo("a ring", latents=noise, **FAST).images[0].save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "none.png").write_text("no picture")
    for words, told in (
        (["a.png"], "pass --input latents=FILE"),
        (["plain.png"], "has no settings: neither LatentRT's record nor A1111's text"),
        (["none.png"], "can't be read as a picture"),
        (["missing.png"], "can't be read as a picture"),
        (["a.png", "--input", "latents"], "'latents' is not like NAME=FILE"),
        (["a.png", "--output", "b.gif"], "the extension '.gif' is no format"),
    ):
        assert command(demo_bundle, "reproduce", tmp_path / words[0], *words[1:]) == 2
        assert told in capsys.readouterr().err


def test_a_contact_sheet_is_beside_the_pictures(demo_bundle, tmp_path):
    words = ["picture", "a ring", "a star", "--count", 2, "--seed", 1, "--steps", 1, "--grid", "--quiet"]
    assert command(demo_bundle, *words, "--output", tmp_path / "a.png") == 0
    assert pictures(tmp_path) == ["a-0.png", "a-1.png", "a-2.png", "a-3.png", "a-grid.png"]
    sheet, second = (np.asarray(Image.open(tmp_path / name)) for name in ("a-grid.png", "a-1.png"))
    assert np.array_equal(sheet[:64, 68:132], second)


def test_no_metadata_leaves_a_plain_file(demo_bundle, tmp_path):
    words = ["picture", "a ring", "--steps", 1, "--no-metadata", "--quiet", "--output", tmp_path / "a.png"]
    assert command(demo_bundle, *words) == 0
    assert metadata.read(tmp_path / "a.png") == metadata.Metadata(None, None)


PAGE = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_page_runs(demo_bundle, tmp_path, monkeypatch, capsys):
    """In the order of the page, in a folder where the bundle is engines/demo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "demo").symlink_to(demo_bundle)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save("mask.png")
    (tmp_path / "calls.jsonl").write_text(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    commands = [line for line in PAGE.splitlines() if line.startswith("python -m engine ")]
    assert len(commands) >= 14
    for line in commands:
        backend = ["--backend", "onnxruntime"] if re.search("engine (picture|reproduce)", line) else []
        assert main([*shlex.split(line)[3:], *backend]) == 0, line
    assert "the pixels are equal" in capsys.readouterr().out


def test_the_commands_work_in_processes_of_their_own(demo_bundle, tmp_path):
    start = [sys.executable, "-m", "engine"]
    common = ["--bundle", str(demo_bundle), "--backend", "onnxruntime"]
    calls = '{"prompt": "a ring", "steps": 1, "seed": 1}\n{"steps": 0, "prompt": "a"}\n'
    (tmp_path / "calls.jsonl").write_text(calls)
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    words = ["picture", *common, "--batch-file", str(tmp_path / "calls.jsonl"), "--output", str(tmp_path / "a.png")]
    done = subprocess.run([*start, *words], **options)
    assert done.returncode == 1
    assert f"{tmp_path / 'calls.jsonl'}:2: num_inference_steps is 0" in done.stderr
    assert done.stdout.endswith("lines: 1 made, 0 were there already, 1 failed (line 2)\n")
    done = subprocess.run([*start, "reproduce", str(tmp_path / "a-1.png"), *common], **options)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "the pixels are equal")
