"""The two commands as a user types them: exit codes, one line for an error, no traceback."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from safetensors.numpy import save_file

import build_engines
from build_engines import parse_range
from engine import __main__ as command
from engine import __version__, arguments, making
from engine.contract import Range, Shapes
from export.errors import UsageError
from export.sources.checkpoint import resolve

ROOT = Path(__file__).parents[1]


def test_build_engines_says_what_it_did(demo_bundle, capsys):
    assert build_engines.main(["--output", str(demo_bundle.parent)]) == 0
    assert capsys.readouterr().out == f"{demo_bundle} is up to date\n"
    assert build_engines.main(["--output", str(demo_bundle.parent), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "'nonsense' is no folder or file here"),
        (["sdxl", "--random-weights"], "known: sd15, sd21, sd21-base"),
        (["--height", "500"], "--height 500 is not a multiple of 8 from 16 to 16384"),
        (["--height", "8"], "--height 8 is not a multiple of 8 from 16 to 16384"),
        (["--width", "64:32:128"], "MIN <= OPT <= MAX must hold"),
        (["--width", "64:128"], "it must be N or MIN:OPT:MAX"),
        (["--batch", "0"], "--batch 0 is not a number from 1 to 1024"),
        (["--batch", "many"], "--batch is 'many'"),
        (["--precision", "bf16"], "no bf16 kernels"),
        (["--name", "../x"], "--name '../x' cannot be a folder's name"),
        (["--output", "/dev/null/engines"], "/dev/null/engines/demo cannot be made (Not a directory)"),
    ],
)
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
    done = subprocess.run(
        [sys.executable, "build_engines.py", "--precision", "int3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_ranges():
    assert parse_range("512", "height", 8, 16, 1024) == Range(512, 512, 512)
    assert parse_range("64:512:768", "height", 8, 16, 1024) == Range(64, 512, 768)
    with pytest.raises(UsageError):
        parse_range("64:512:764", "height", 8, 16, 1024)


def test_plans_for_prompts_of_several_lengths_take_their_common_multiples():
    shapes = Shapes(*[Range(1, 1, 1)] * 3)
    assert build_engines.with_chunks([shapes], None) == [shapes]
    assert [one.chunks for one in build_engines.with_chunks([shapes], "1:2:4")] == [Range(1, 2, 12)]
    with pytest.raises(UsageError, match="--prompt-chunks 9 is not a number from 1 to 8"):
        build_engines.with_chunks([shapes], "9")


def test_picture_command_writes_a_picture_and_says_how_long_it_took(demo_bundle, tmp_path, capsys):
    file = tmp_path / "circle.png"
    assert (
        command.main(
            [
                "picture",
                "a large red circle on a blue background",
                "--bundle",
                str(demo_bundle),
                "--steps",
                "3",
                "--seed",
                "1",
                "--backend",
                "onnxruntime",
                "--output",
                str(file),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert f"wrote {file}\nseed 1; ONNX Runtime {onnxruntime.__version__} on the CPU\ntokenize" in printed
    assert "3 steps of" in printed
    assert "values within 1 of 255" in printed
    assert "Seed: 1" in Image.open(file).text["parameters"]
    assert os.listdir(tmp_path) == ["circle.png"]


def test_picture_command_numbers_several_pictures(demo_bundle, tmp_path):
    assert (
        command.main(
            [
                "picture",
                "a ring",
                "--bundle",
                str(demo_bundle),
                "--steps",
                "1",
                "--count",
                "2",
                "--quiet",
                "--output",
                str(tmp_path / "ring.png"),
            ]
        )
        == 0
    )
    assert sorted(os.listdir(tmp_path)) == ["ring-0.png", "ring-1.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--bundle", "/nowhere"], 2, "there is no bundle at /nowhere"),
        (["--bundle", "b" * 300], 2, "is too long for a file's name"),
        (["--bundle", ""], 2, "'' names no file"),
        (["--bundle", "a\0b"], 2, "'a\\x00b' cannot be a file's name"),
        (["--steps", "0"], 2, "--steps: '0' is not a whole number from 1 to 1000"),
        (["--steps", "9" * 5000], 2, "is not a whole number from 1 to 1000"),
        (["--count", "0"], 2, "--count: '0' is not a whole number from 1 to 10000"),
        (["--seed", "-1"], 2, "--seed: '-1' is not a whole number from 0 to 18446744073709551615"),
        (
            ["--seed", str(2**64 - 1), "--count", "2"],
            2,
            "goes beyond the last seed, 18446744073709551615; take a smaller --seed",
        ),
        (["--threads", str(2**31)], 2, "is not a whole number from 1 to 1024"),
        (["--guidance-scale", "nan"], 2, "--guidance-scale: 'nan' is not a finite number"),
        (["--guidance-scale", "1" + "0" * 400], 2, "is not a finite number"),
        (["--eta", "-1"], 2, "--eta: '-1' is not a finite number from 0 up"),
        (["--eta", "many"], 2, "--eta: 'many' is not a finite number from 0 up"),
        (["--height", "500"], 2, "height 500 is not a multiple of 8"),
        (["--scheduler", "best"], 2, "'best' is not known"),
        (["--backend", "torch"], 2, "--backend: invalid choice: 'torch' (choose from"),
        (["--device", "gpu"], 2, "--device: 'gpu' is none of cpu, cuda and cuda:N"),
        (["--negative-prompt", "\udc80"], 2, "negative_prompt is not valid UTF-8"),
        (["--prompts", "/nowhere.txt"], 2, "--prompts '/nowhere.txt' cannot be read (No such file or directory)"),
        (
            ["--no-such-option"],
            2,
            "unrecognized arguments: --no-such-option; `python -m engine picture --help` lists what is taken",
        ),
        (["--prompt-syntax", "compel"], 2, "--prompt-syntax: invalid choice: 'compel' (choose from"),
        (["--clip-skip", "2"], 2, "clip_skip is 2; it must be an integer from 0 to 1: this model's text encoder has 2"),
        (["--emphasis", "most"], 2, "--emphasis: invalid choice: 'most' (choose from"),
        (["--textual-inversion", "/nowhere.pt"], 2, "/nowhere.pt is no file, or is empty; pass a .safetensors, .pt"),
        (
            ["--lora", "/nowhere.safetensors:0.8"],
            2,
            "/nowhere.safetensors is no file, or is empty; pass a .safetensors",
        ),
        (["--textual-inversion", "/nowhere.pt="], 2, "has no word after the '='; write FILE=TOKEN, or FILE alone"),
        (["--output", "/dev/null/a.png"], 1, "/dev/null/a.png cannot be written: /dev/null is not a folder"),
        (
            ["--output", "a.gif"],
            2,
            "the extension '.gif' is no format of pictures; pass a name that ends in .png, .jpg, .jpeg or .webp",
        ),
    ],
)
def test_picture_command_explains_mistakes_in_one_line(demo_bundle, tmp_path, capsys, arguments, code, words):
    defaults = ["--bundle", str(demo_bundle), "--steps", "1", "--output", str(tmp_path / "a.png")]
    assert exit_code(["picture", "a ring", *defaults, *arguments]) == code
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def exit_code(arguments):
    try:
        return command.main(arguments)
    except SystemExit as end:
        return end.code


def test_the_output_is_checked_before_anything_is_loaded(demo_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.pipeline.Pipeline.load", None)
    assert command.main(["picture", "a ring", "--bundle", str(demo_bundle), "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder and is not replaced" in capsys.readouterr().err


def picture(bundle, *arguments):
    """Makes a picture in one step on ONNX Runtime."""
    return command.main(
        ["picture", *map(str, arguments), "--bundle", str(bundle), "--steps", "1", "--backend", "onnxruntime"]
    )


def test_the_command_reads_a1111s_language_and_takes_texts_as_they_are_when_asked(demo_bundle, tmp_path):
    def made(*arguments):
        assert picture(demo_bundle, *arguments, "--seed", 7, "--output", tmp_path / "a.png") == 0
        return Image.open(tmp_path / "a.png").tobytes()

    assert made("[a ring:a star:1.0]") == made("a ring") != made("[a ring:a star:1.0]", "--prompt-syntax", "plain")
    assert made("a (ring:2)", "--emphasis", "ignore") == made("a ring") != made("a (ring:2)")
    assert made("a ring", "--clip-skip", 1) != made("a ring")


def test_a_word_of_the_command_stands_for_the_vectors_of_a_file(demo_bundle, tmp_path, capsys):
    file = tmp_path / "vectors.safetensors"
    save_file({"emb_params": np.full((2, 128), 0.02, np.float32)}, file)

    def made(text, *arguments):
        assert picture(demo_bundle, text, *arguments, "--seed", 7, "--output", tmp_path / "a.png") == 0
        return Image.open(tmp_path / "a.png").tobytes()

    named = made("a vectors", "--textual-inversion", file)
    assert named == made("a <toy>", "--textual-inversion", f"{file}=<toy>") != made("a vectors")
    save_file({"emb_params": np.zeros((2, 768), np.float32)}, file)
    assert picture(demo_bundle, "a ring", "--textual-inversion", file, "--output", tmp_path / "a.png") == 2
    assert "are for text_encoder of width 768 (SD 1.x), and this model takes vectors for" in capsys.readouterr().err


def test_an_adapter_of_the_command_is_on_or_waits_for_a_tag(demo_bundle, tmp_path, capsys):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
    size = resolve(None).config("unet")["block_out_channels"][-1]
    factors = {"down": np.full((2, size), 0.2, np.float32), "up": np.full((size, 2), 0.2, np.float32)}
    file = tmp_path / "ink.safetensors"
    save_file({f"{layer}.lora_{name}.weight": value for name, value in factors.items()}, file)

    def made(text, *arguments):
        assert picture(demo_bundle, text, *arguments, "--seed", 7, "--output", tmp_path / "a.png") == 0
        return Image.open(tmp_path / "a.png").tobytes()

    tagged = made("a ring <lora:ink:0.8>", "--lora", f"{file}:0")
    assert made("a ring", "--lora", f"{file}:0.8") == tagged != made("a ring", "--lora", f"{file}:0")
    assert picture(demo_bundle, "a ring <lora:ink>", "--output", tmp_path / "a.png") == 2
    assert "no adapter is named 'ink'; none is loaded. Load it" in capsys.readouterr().err


def test_each_of_several_pictures_comes_again_from_its_own_seed(demo_bundle, tmp_path, capsys):
    assert picture(demo_bundle, "a ring", "--count", 3, "--seed", 7, "--output", tmp_path / "a.png") == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'a-2.png'} (seed 9, 'a ring')\nseeds 7 to 9; " in printed
    assert picture(demo_bundle, "a ring", "--seed", 9, "--output", tmp_path / "b.png") == 0
    first, second, alone = (Image.open(tmp_path / name).tobytes() for name in ("a-1.png", "a-2.png", "b.png"))
    assert second == alone
    assert first != alone


def test_several_texts_and_a_file_of_them(demo_bundle, tmp_path):
    (tmp_path / "texts.txt").write_bytes("\ufeffa red ring\r\n\n  a gr\u00fcn star\n".encode())
    assert (
        picture(
            demo_bundle,
            "a blue square",
            "a heart",
            "--prompts",
            tmp_path / "texts.txt",
            "--seed",
            1,
            "--quiet",
            "--output",
            tmp_path / "p.png",
        )
        == 0
    )
    written = [Image.open(tmp_path / f"p-{i}.png").text["parameters"] for i in range(4)]
    assert [text.splitlines()[0] for text in written] == ["a blue square", "a heart", "a red ring", "a gr\u00fcn star"]
    assert all("Seed: 1," in text for text in written)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a ring\nb\xff\n", "is not UTF-8: line 2 has the byte 0xff"),
        (b" \n\n", "has no line with a text"),
        (b"a" * (16 << 20) + b"b", "has more than 16777216 bytes"),
        (None, "cannot be read (Is a directory)"),
    ],
)
def test_a_file_of_prompts_that_is_not_usable(tmp_path, capsys, content, words):
    file = tmp_path / "texts.txt"
    file.mkdir() if content is None else file.write_bytes(content)
    assert command.main(["picture", "--prompts", str(file)]) == 2
    assert words in capsys.readouterr().err


def test_no_text_and_too_many_pictures(capsys, tmp_path):
    assert command.main(["picture"]) == 2
    assert "there is no text to make a picture from; pass one in quotes, or --prompts FILE" in capsys.readouterr().err
    assert command.main(["picture", "a", "b", "--count", "10000"]) == 2
    assert "2 texts with --count 10000 are 20000 pictures; one run makes at most 10000" in capsys.readouterr().err


def test_a_text_that_begins_with_a_dash(demo_bundle, tmp_path):
    assert (
        command.main(
            [
                "picture",
                "--bundle",
                str(demo_bundle),
                "--steps",
                "1",
                "--output",
                str(tmp_path / "a.png"),
                "--",
                "-5 rings",
            ]
        )
        == 0
    )
    assert Image.open(tmp_path / "a.png").text["parameters"].startswith("-5 rings\n")


def test_more_pictures_than_the_bundle_makes_at_once(demo_bundle, tmp_path, monkeypatch):
    """The bundle makes 8 together."""
    from engine import Pipeline

    calls = []
    original = Pipeline.__call__
    monkeypatch.setattr(
        Pipeline, "__call__", lambda self, prompt, *a, **k: calls.append(len(prompt)) or original(self, prompt, *a, **k)
    )
    assert picture(demo_bundle, "a ring", "--count", 9, "--seed", 0, "--quiet", "--output", tmp_path / "a.png") == 0
    assert calls == [5, 4]
    assert len(os.listdir(tmp_path)) == 9


def test_pictures_that_are_written_leave_the_memory(demo, tmp_path):
    options = arguments.parse(["picture", "--steps", "1", "--quiet"])
    results = making.make(demo, [("a ring", seed, tmp_path / f"{seed}.png") for seed in range(9)], options)
    assert [result.images for result in results] == [None, None]
    assert [result.seeds for result in results] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("total", "sizes", "calls"),
    [
        (1, [1], [1]),
        (9, [1, 2, 3, 4, 5, 6, 7, 8], [5, 4]),
        (6, [2, 4], [4, 2]),
        (8, [1, 4], [4, 4]),
        (6, [1, 4], [4, 1, 1]),
        (5, [2], [5]),
        (3, [], [3]),
        (10_000, [1, 8], [8] * 1250),
    ],
)
def test_pictures_are_split_into_the_fewest_calls(total, sizes, calls):
    assert sorted(making.split(total, sizes), reverse=True) == calls


def test_eta_reaches_the_sampler(demo_bundle, tmp_path):
    for eta in (0, 1):
        assert (
            command.main(
                [
                    "picture",
                    "a ring",
                    "--bundle",
                    str(demo_bundle),
                    "--steps",
                    "3",
                    "--seed",
                    "0",
                    "--eta",
                    str(eta),
                    "--quiet",
                    "--output",
                    str(tmp_path / f"{eta}.png"),
                ]
            )
            == 0
        )
    assert Image.open(tmp_path / "0.png").tobytes() != Image.open(tmp_path / "1.png").tobytes()


@pytest.mark.parametrize(
    ("file", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")]
)
def test_a_file_holds_the_format_of_its_extension(demo_bundle, tmp_path, file, kind):
    assert picture(demo_bundle, "a ring", "--quiet", "--output", tmp_path / file) == 0
    assert Image.open(tmp_path / file).format == kind


@pytest.mark.parametrize(
    ("size", "options", "backend"),
    [
        (1000, {}, "onnxruntime"),
        (1 << 28, {}, None),
        (1000, {"device": "cpu"}, "onnxruntime"),
        (1000, {"device": "cuda"}, None),
        (1000, {"precision": "bf16"}, None),
        (1000, {"missing": "onnxruntime"}, None),
        (1000, {"tensorrt": True}, None),
        (1000, {"tensorrt": True, "device": "cpu"}, "onnxruntime"),
    ],
)
def test_a_picture_from_a_shell_takes_the_backend_that_starts_fastest(tmp_path, monkeypatch, size, options, backend):
    graph = tmp_path / "denoiser.onnx"
    graph.touch()
    with open(tmp_path / "denoiser.onnx.data", "wb") as data:
        data.truncate(size)
    monkeypatch.setattr("engine.backends.tensorrt_is_usable", lambda: "tensorrt" in options)
    monkeypatch.setattr(making, "installed", lambda module: module != options.get("missing"))
    bundle = SimpleNamespace(precision=options.get("precision", "fp32"), graphs={"denoiser": graph})
    assert making.quickest_backend(bundle, options.get("device")) == backend


def test_what_the_help_names_is_what_there_is(capsys):
    from engine.backends import BACKENDS

    assert arguments.BACKENDS == BACKENDS
    with pytest.raises(SystemExit, match="0"):
        command.main(["picture", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "`samplers` lists them (default: the model's own)" in printed
    assert (
        'A text that begins with "-" comes last, after "--": python -m engine picture --steps 30 -- "-text"' in printed
    )
    assert "for a small model (U-Net of less than 256 MB) ONNX Runtime" in printed


def test_help_and_version_import_no_library():
    code = "import sys; sys.modules['numpy'] = None; from engine.__main__ import main; main(sys.argv[1:])"
    for asked, words in (
        (["--version"], f"LatentRT {__version__}\n"),
        (["picture", "--help"], "usage: python -m engine picture "),
    ):
        done = subprocess.run([sys.executable, "-c", code, *asked], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(words)


@pytest.mark.parametrize(
    ("started_as", "name"),
    [("/x/bin/latentrt", "latentrt"), ("C:/x/latentrt.exe", "latentrt"), ("/x/engine/__main__.py", "python -m engine")],
)
def test_the_command_is_called_what_was_typed(started_as, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started_as])
    assert command.main(["picture"]) == 2
    assert capsys.readouterr().err.startswith(f"{name}: there is no text")


def test_long_work_is_told_to_standard_error(demo_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(making, "LOADING_NOTE", 0.0)
    monkeypatch.setattr(making, "WORKING_NOTE", 0.01)
    assert picture(demo_bundle, "a ring", "--output", tmp_path / "a.png") == 0
    told = capsys.readouterr().err
    assert f"loading {demo_bundle} (0 s so far)\n" in told
    assert "making picture 1 of 1 (0 s so far)\n" in told
    assert picture(demo_bundle, "a ring", "--quiet", "--output", tmp_path / "a.png") == 0
    assert capsys.readouterr().err == ""


def run(*arguments, wrapped="{}", environment=None, **options):
    words = shlex.join([sys.executable, "-m", "engine", *map(str, arguments)])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", wrapped.format(words)],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, **(environment or {})},
        **options,
    )


@pytest.mark.parametrize("wrapped", ["{} | head -n 0", "{} >&-", "PYTHONIOENCODING=ascii {} | cat"])
def test_no_standard_output_makes_a_finished_picture_a_failure(demo_bundle, tmp_path, wrapped):
    done = run(
        "picture", "a ring", "--bundle", demo_bundle, "--steps", 1, "--output", tmp_path / "\u00fc.png", wrapped=wrapped
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(tmp_path) == ["\u00fc.png"]


def test_a_reader_that_goes_away_ends_no_report_with_an_error(demo_bundle):
    for asked in (["doctor", "--bundles", demo_bundle], ["picture", "--help"]):
        done = run(*asked, wrapped="{} | head -n 1")
        assert (done.returncode, done.stderr, done.stdout.count(b"\n")) == (0, b"", 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_standard_output_is_named(demo_bundle):
    done = run("doctor", "--bundles", demo_bundle, wrapped="{} >/dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        b"python -m engine: standard output cannot be written (No space left on device)\n",
    )


def test_a_package_that_is_missing_is_named_with_the_python_that_has_it(tmp_path, capsys, monkeypatch):
    missing = ModuleNotFoundError("No module named 'PIL'", name="PIL")
    monkeypatch.setattr(command, "__file__", str(tmp_path / "engine" / "__main__.py"))
    told = command.what_to_install(missing, ["picture", "it's red"])
    assert (
        f"{sys.executable} cannot import PIL (No module named 'PIL'); install what is needed: {sys.executable} -m pip "
        "install 'numpy>=1.26'" in told
    )
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    told = command.what_to_install(missing, ["picture", "it's red"])
    again = shlex.join([str(tmp_path / ".venv/bin/python"), "-m", "engine", "picture", "it's red"])
    assert told.endswith(f"`make demo` has installed what is needed for another Python: {again}")
    monkeypatch.chdir(tmp_path)
    assert ": .venv/bin/python -m engine doctor" in command.what_to_install(missing, ["doctor"])


@pytest.mark.parametrize(
    ("package", "asked"), [("PIL", ["picture", "red"]), ("numpy", ["picture", "red"]), ("numpy", ["doctor"])]
)
def test_a_missing_package_is_one_line(package, asked):
    code = (
        f"import sys; sys.modules[{package!r}] = None; from engine.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *asked], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{sys.executable} cannot import {package}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_messages_name_options_of_the_command(demo_bundle, capsys):
    assert (
        command.main(["picture", "red", "--bundle", str(demo_bundle), "--backend", "tensorrt", "--device", "cpu"]) == 2
    )
    told = capsys.readouterr().err
    assert "pass --device cuda or --backend onnxruntime" in told
    assert "backend=" not in told
