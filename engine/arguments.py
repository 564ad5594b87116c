"""The options of the command line. A mistake is reported in one line. No library is imported here, because --help
should appear at once."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from .errors import PromptError, PromptsFileError
from .version import __version__

BACKENDS = ("tensorrt", "openvino", "onnxruntime")
"""A copy of the names in engine.backends, which need NumPy."""

MAX_PICTURES = 10_000
MAX_PROMPTS_BYTES = 16 << 20

PICTURE_NOTES = """\
A text that begins with "-" comes last, after "--":  %(prog)s --steps 30 -- "-text"
--count 3 --seed 0 makes the pictures of seeds 0, 1 and 2, for each text; any of them comes again from its own seed
alone. Without --backend: TensorRT where it and a GPU are found; else for a small model (U-Net of less than 256 MB)
ONNX Runtime, which starts fastest, and for a large one OpenVINO; in each case what is installed.
Exit code: 0, 2 for a mistake in the command, 1 for a failure."""

DOCTOR_NOTES = """\
Exit code: 0 if every bundle that was found can make pictures here with one backend at least; 1 if one cannot, or none
was found."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, like every error of the commands."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists what is taken\n")


def program() -> str:
    """The command's name as the user typed it."""
    return "latentrt" if Path(sys.argv[0]).stem == "latentrt" else "python -m engine"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options. SystemExit with code 2 and one line for a mistake, with code 0 after --help and --version."""
    p = parser()
    options, unknown = p.parse_known_args(arguments)
    if unknown:
        p.prog += f" {options.command}"
        p.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def parser() -> argparse.ArgumentParser:
    p = Parser(prog=program(), description="Pictures from texts, without torch.")
    p.add_argument("--version", action="version", version=f"LatentRT {__version__}")
    commands = p.add_subparsers(dest="command", required=True)
    layout = argparse.RawDescriptionHelpFormatter
    _add_picture(
        commands.add_parser("picture", help="make pictures from texts", epilog=PICTURE_NOTES, formatter_class=layout)
    )
    c = commands.add_parser("samplers", help="list the samplers with their schedule types and options")
    c.add_argument("names", nargs="*", metavar="NAME", help="show the options of these samplers")
    c.add_argument("--debug", action="store_true", help="print the traceback of an error")
    c = commands.add_parser(
        "doctor",
        help="report what this machine has and which bundles it can use",
        epilog=DOCTOR_NOTES,
        formatter_class=layout,
    )
    c.add_argument(
        "--bundles",
        type=path,
        default=Path("engines"),
        metavar="FOLDER",
        help="a bundle, or a folder of bundles (default: engines/)",
    )
    c.add_argument("--verify", action="store_true", help="read every file and compare its SHA-256")
    c.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return p


def _add_picture(c: argparse.ArgumentParser) -> None:
    c.add_argument("prompt", nargs="*", metavar="PROMPT", help="a text in quotes, or several")
    c.add_argument("--prompts", type=path, metavar="FILE", help="more texts, one a line, in UTF-8")
    c.add_argument(
        "--class-label",
        type=whole_number(0, 2**31 - 1),
        action="append",
        default=[],
        metavar="N",
        help="a class, for a model that has classes instead of texts; may be repeated",
    )
    c.add_argument("--image", type=path, metavar="FILE", help="a picture to start from")
    c.add_argument("--mask", type=path, metavar="FILE", help="which part of --image is repainted: the white one")
    c.add_argument("--composite", action="store_true", help="keep what is not white pixel for pixel")
    c.add_argument(
        "--padding-mask-crop",
        type=whole_number(0, 1 << 16),
        metavar="PIXELS",
        help="paint only the part around the mask, with so many pixels on each side",
    )
    c.add_argument(
        "--strength",
        type=number(low=0.0),
        metavar="S",
        help="how much of --image changes, 0 to 1 (default: 0.8, with --mask 1)",
    )
    c.add_argument(
        "--depth-map", type=path, metavar="FILE", help="for a depth model: a picture, the lighter the nearer"
    )
    c.add_argument(
        "--image-guidance-scale",
        type=number(low=0.0),
        metavar="G",
        help="how closely InstructPix2Pix follows --image, from 1 up (default: 1.5)",
    )
    c.add_argument(
        "--noise-level",
        type=whole_number(0, 1000),
        metavar="N",
        help="of the noise that the upscaler adds to --image (default: 20)",
    )
    _add_second_pass(c)
    c.add_argument("--bundle", type=path, default=Path("engines/demo"), metavar="FOLDER", help="default: engines/demo")
    c.add_argument(
        "--output",
        default="picture.png",
        metavar="FILE",
        help="a .png, .jpg or .webp (lossless) file; several pictures get numbers (default: picture.png)",
    )
    c.add_argument("--negative-prompt", default="", metavar="TEXT", help="what the pictures should not show")
    _add_prompting(c)
    c.add_argument("--steps", type=whole_number(1, 1000), default=20, metavar="N", help="default: 20")
    c.add_argument(
        "--guidance-scale",
        type=scales,
        default=7.5,
        metavar="G",
        help="how closely pictures follow the text; 1 is without guidance; G,G,... for each step (default: 7.5)",
    )
    c.add_argument(
        "--guidance-rescale",
        type=number(low=0.0),
        default=0.0,
        metavar="PHI",
        help="0 to 1: how far the contrast that guidance adds is taken back (default: 0)",
    )
    c.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="START:END",
        help="the part of the steps with guidance, such as 0.2:0.8; the others are faster (default: 0:1)",
    )
    c.add_argument(
        "--seed",
        type=whole_number(0, 2**64 - 1),
        metavar="N",
        help="the seed of the first picture of each text (default: a random one)",
    )
    _add_sampling(c)
    c.add_argument(
        "--height", type=whole_number(1, 1 << 16), metavar="PIXELS", help="default: what the bundle is best at"
    )
    c.add_argument("--width", type=whole_number(1, 1 << 16), metavar="PIXELS")
    c.add_argument(
        "--count", type=whole_number(1, MAX_PICTURES), default=1, metavar="N", help="pictures of each text (default: 1)"
    )
    c.add_argument("--backend", choices=BACKENDS, metavar="NAME", help=f"{', '.join(BACKENDS)} (default: see below)")
    c.add_argument("--device", type=device, metavar="NAME", help="cpu, cuda or cuda:N (default: by the backend)")
    c.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel of a step from the host")
    c.add_argument("--threads", type=whole_number(1, 1024), metavar="N", help="default: every core")
    c.add_argument("--quiet", action="store_true", help="print errors only")
    c.add_argument("--debug", action="store_true", help="print the traceback of an error")


def _add_prompting(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--prompt-syntax",
        choices=("a1111", "plain"),
        default="a1111",
        help="a1111: brackets, AND, BREAK and [from:to:when] mean what they mean there; plain: they are characters "
        "(default: a1111)",
    )
    c.add_argument(
        "--emphasis",
        choices=("original", "no norm", "ignore"),
        default="original",
        help="how weights in brackets act (default: original)",
    )
    c.add_argument(
        "--clip-skip",
        type=whole_number(0, 1000),
        metavar="N",
        help="how many of the text encoder's last layers are left out; 1 is A1111's 2 (default: 0)",
    )
    c.add_argument(
        "--textual-inversion",
        type=inversion,
        action="append",
        default=[],
        metavar="FILE[=TOKEN]",
        help="vectors that TOKEN stands for in the texts (default: the word in the file, or its name); may be repeated",
    )
    c.add_argument(
        "--lora",
        type=adapter,
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="an adapter, with its weight in every picture (default: 1; 0: only where a text has the tag "
        "<lora:NAME:WEIGHT>, with the file's name); may be repeated",
    )


def _add_second_pass(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--subseed", type=whole_number(0, 2**64 - 1), metavar="N", help="the seed of a variation (default: random)"
    )
    c.add_argument(
        "--subseed-strength",
        type=number(low=0.0),
        metavar="S",
        help="0 to 1: how far the noise goes towards --subseed's; --count then counts subseeds, with one seed",
    )
    c.add_argument(
        "--hires", type=enlargement, metavar="X", help="a second pass, so many times larger, or at WIDTHxHEIGHT pixels"
    )
    c.add_argument("--hires-upscaler", metavar="NAME", help="how --hires enlarges, see docs/tasks.md")
    c.add_argument("--hires-steps", type=whole_number(1, 1000), metavar="N", help="default: as --steps")
    c.add_argument("--hires-strength", type=number(low=0.0), metavar="S", help="default: 0.7")
    c.add_argument("--hires-sampler", metavar="NAME", help="default: as --scheduler")
    c.add_argument("--hires-prompt", metavar="TEXT", help="the text of the second pass (default: the same)")


def _add_sampling(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--scheduler",
        metavar="NAME",
        help="a sampler: our name, diffusers' class or A1111's label; `samplers` lists them (default: the model's own)",
    )
    c.add_argument(
        "--schedule-type", metavar="NAME", help="the sampler's noise levels, such as karras (default: its own)"
    )
    c.add_argument("--timesteps", type=numbers, metavar="T,T,...", help="the timesteps themselves, from high to low")
    c.add_argument("--sigmas", type=numbers, metavar="S,S,...", help="the noise levels themselves, and where to end")
    c.add_argument("--timestep-respacing", metavar="TEXT", help="timesteps in Improved DDPM's way, such as ddim50")
    c.add_argument(
        "--sampler-option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the sampler, such as s_churn=10; may be repeated",
    )
    c.add_argument(
        "--eta", type=number(low=0.0), default=0.0, metavar="E", help="DDIM's share of new noise, 0 to 1 (default: 0)"
    )


def shorten(text: str, characters: int = 60) -> str:
    """A quoted text for a message, cut to so many characters."""
    return repr(text if len(text) <= characters else text[:characters] + "...")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument's type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        written = re.fullmatch(r"[+-]?[0-9]+", text.strip())
        value = int(text) if written and len(text) <= 40 else low - 1  # Python refuses to read thousands of digits
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not a whole number from {low} to {high}")
        return value

    return parse


def number(low: float = -math.inf) -> Callable[[str], float]:
    """An argument's type: a finite number, at least `low`."""

    def parse(text: str) -> float:
        value = math.nan
        with suppress(ValueError):
            value = float(text)
        if not math.isfinite(value) or value < low:
            floor = f" from {low:g} up" if math.isfinite(low) else ""
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not a finite number{floor}")
        return value

    return parse


def scales(text: str) -> float | list[float]:
    """An argument's type: a finite number, or several with commas between them."""
    values = numbers(text)
    return values[0] if len(values) == 1 else values


def enlargement(text: str) -> dict[str, float | int]:
    """An argument's type: a factor, or WIDTHxHEIGHT in pixels; the arguments of `Hires`."""
    if re.fullmatch(r"[0-9]{1,5}x[0-9]{1,5}", text):
        width, height = map(int, text.split("x"))
        return {"width": width, "height": height}
    return {"scale": number(low=1.0)(text)}


def interval(text: str) -> tuple[float, float]:
    """An argument's type: two finite numbers with a colon between them."""
    parts = text.split(":")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not START:END, such as 0.2:0.8")
    return number()(parts[0]), number()(parts[1])


def numbers(text: str) -> list[float]:
    """An argument's type: finite numbers with commas between them."""
    return [number()(part) for part in text.split(",")]


def option(text: str) -> tuple[str, bool | int | float | str]:
    """An argument's type: a name and its value, which is true, false, a number or a word."""
    name, equals, written = (part.strip() for part in text.partition("="))
    if not (name and equals and written):
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not like NAME=VALUE")
    if written.lower() in ("true", "false"):
        return name, written.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(written)
    return name, written


def inversion(text: str) -> tuple[Path, str | None]:
    """An argument's type: a file, and after the last "=" a word."""
    file, equals, token = text.rpartition("=")
    if not equals:
        return path(text), None
    if not token:
        raise argparse.ArgumentTypeError(f"{shorten(text)} has no word after the '='; write FILE=TOKEN, or FILE alone")
    return path(file), token


def adapter(text: str) -> tuple[Path, float]:
    """An argument's type: a file, and after the last ":" its weight, which is 1 if there is none."""
    file, _, written = text.rpartition(":")
    if not file or not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", written):
        return path(text), 1.0
    return path(file), float(written)


def device(text: str) -> str:
    """An argument's type: "cpu", "cuda" or "cuda:N"."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", text):
        raise argparse.ArgumentTypeError(f"{shorten(text)} is none of cpu, cuda and cuda:N with the number of a GPU")
    return text


def path(text: str) -> Path:
    """An argument's type: a name that a file can have; ~ is the home folder."""
    with suppress(RuntimeError):  # no user of that name: the file is called ~something
        text = os.path.expanduser(text)
    try:
        os.stat(text)
    except ValueError as error:  # NUL, halves of surrogate pairs
        raise argparse.ArgumentTypeError(f"{shorten(text)} cannot be a file's name") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is too long for a file's name") from error
    if not text:
        raise argparse.ArgumentTypeError("'' names no file")
    return Path(text)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The texts of the command line, then those of the file. PromptError if there are none, PromptsFileError if the
    file is not usable."""
    prompts = [*given, *(_prompts_of(file) if file is not None else [])]
    if not prompts:
        raise PromptError(
            "there is no text to make a picture from; pass one in quotes, or --prompts FILE with one a line"
        )
    return prompts


def _prompts_of(file: Path) -> list[str]:
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_PROMPTS_BYTES + 1)
    except OSError as error:
        raise PromptsFileError(
            f"--prompts {str(file)!r} cannot be read ({error.strerror}); pass a text file with one prompt a line"
        ) from error
    if len(content) > MAX_PROMPTS_BYTES:
        raise PromptsFileError(
            f"--prompts {str(file)!r} has more than {MAX_PROMPTS_BYTES} bytes; pass a text file with one prompt a line"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptsFileError(
            f"--prompts {str(file)!r} is not UTF-8: line {line} has the byte 0x{content[error.start]:02x}; "
            f"save it as UTF-8, one prompt a line"
        ) from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise PromptsFileError(f"--prompts {str(file)!r} has no line with a text; write one prompt a line")
    return prompts
