"""The options of the command line. A mistake is reported in one line. No library is imported here, because --help
should appear at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from .argument_types import (
    ByName,
    adapter,
    axis,
    device,
    enlargement,
    given_input,
    interval,
    inversion,
    number,
    numbers,
    option,
    path,
    scales,
    whole_number,
)
from .errors import EngineError, PromptError, PromptsFileError
from .version import __version__

BACKENDS = ("tensorrt", "openvino", "onnxruntime")
"""A copy of the names in engine.backends, which need NumPy."""

Group = argparse._ArgumentGroup

MAX_PICTURES = 10_000
MAX_FILE_BYTES = 16 << 20

PICTURE_NOTES = """\
A text that begins with "-" comes last, after "--":  %(prog)s --steps 30 -- "-text"
--count 3 --seed 0 makes the pictures of seeds 0, 1 and 2, for each text; any of them comes again from its own seed
alone, and from its file with `reproduce`. Without --backend: TensorRT where it and a GPU are found; else for a small
model (U-Net of less than 256 MB) ONNX Runtime, which starts fastest, and for a large one OpenVINO; in each case what is
installed. docs/command_line.md has examples.
Exit code: 0, 2 for a mistake in the command, 1 for a failure."""

REPRODUCE_NOTES = """\
Exit code: 0 for equal pixels, 3 for others; 2 if the picture cannot be made again, 1 for a failure."""

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
    _add_reproduce(
        commands.add_parser(
            "reproduce",
            help="make a picture again from what its file says",
            epilog=REPRODUCE_NOTES,
            formatter_class=layout,
        )
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


def _add_picture(p: argparse.ArgumentParser) -> None:
    """The options of `picture`, in groups. An option that is an argument of a call has that argument's name as its
    `dest`; it then counts in files of calls and in comparisons as well."""
    _add_subject(p.add_argument_group("what the pictures show"))
    _add_beginning(p.add_argument_group("what they begin with"))
    _add_making(p.add_argument_group("how they are made"))
    _add_second_pass(p.add_argument_group("variations and a second pass"))
    _add_sampling(p.add_argument_group("the sampler"))
    _add_several(p.add_argument_group("several pictures"))
    _add_files(p.add_argument_group("files"))
    _add_machine(p.add_argument_group("the machine"))


def _add_subject(c: Group) -> None:
    c.add_argument("prompt", nargs="*", metavar="PROMPT", help="a text in quotes, or several")
    c.add_argument("--prompts", type=path, metavar="FILE", help="more texts, one a line, in UTF-8")
    c.add_argument("--negative-prompt", default="", metavar="TEXT", help="what the pictures should not show")
    c.add_argument(
        "--class-label",
        dest="class_labels",
        type=whole_number(0, 2**31 - 1),
        action="append",
        default=[],
        metavar="N",
        help="a class, for a model that has classes instead of texts; may be repeated",
    )
    _add_prompting(c)


def _add_beginning(c: Group) -> None:
    c.add_argument("--image", type=path, metavar="FILE", help="a picture to start from")
    c.add_argument(
        "--mask",
        dest="mask_image",
        type=path,
        metavar="FILE",
        help="which part of --image is repainted: the white one",
    )
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


def _add_making(c: Group) -> None:
    c.add_argument(
        "--seed",
        type=whole_number(0, 2**64 - 1),
        metavar="N",
        help="the seed of the first picture of each text (default: a random one)",
    )
    c.add_argument(
        "--height", type=whole_number(1, 1 << 16), metavar="PIXELS", help="default: what the bundle is best at"
    )
    c.add_argument("--width", type=whole_number(1, 1 << 16), metavar="PIXELS")
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


def _add_prompting(c: Group) -> None:
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
    _add_vectors(c)


def _add_vectors(c: Group) -> None:
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


def _add_second_pass(c: Group) -> None:
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


def _add_sampling(c: Group) -> None:
    c.add_argument(
        "--steps", dest="num_inference_steps", type=whole_number(1, 1000), default=20, metavar="N", help="default: 20"
    )
    c.add_argument(
        "--sampler",
        "--scheduler",
        dest="scheduler",
        metavar="NAME",
        help="our name, diffusers' class or A1111's label; `samplers` lists them (default: the model's own)",
    )
    c.add_argument(
        "--schedule-type", metavar="NAME", help="the sampler's noise levels, such as karras (default: its own)"
    )
    c.add_argument("--timesteps", type=numbers, metavar="T,T,...", help="the timesteps themselves, from high to low")
    c.add_argument("--sigmas", type=numbers, metavar="S,S,...", help="the noise levels themselves, and where to end")
    c.add_argument("--timestep-respacing", metavar="TEXT", help="timesteps in Improved DDPM's way, such as ddim50")
    c.add_argument(
        "--sampler-option",
        dest="sampler_options",
        type=option,
        action=ByName,
        default={},
        metavar="NAME=VALUE",
        help="an option of the sampler, such as s_churn=10; may be repeated",
    )
    c.add_argument(
        "--eta", type=number(low=0.0), default=0.0, metavar="E", help="DDIM's share of new noise, 0 to 1 (default: 0)"
    )


def _add_several(c: Group) -> None:
    c.add_argument(
        "--count", type=whole_number(1, MAX_PICTURES), default=1, metavar="N", help="pictures of each text (default: 1)"
    )
    c.add_argument(
        "--grid", action="store_true", help="also write all pictures on one sheet, to the output's name with -grid"
    )
    c.add_argument(
        "--compare",
        type=axis,
        action="append",
        default=[],
        metavar="NAME=V,V,...",
        help="one labelled grid with a picture for each value of an option, such as sampler=ddim,euler_a; given twice: "
        "the first across, the second down. Values that have commas are separated by ;",
    )
    c.add_argument(
        "--batch-file",
        type=path,
        metavar="FILE",
        help="calls, one JSON object a line, with the names of options; what a line doesn't say, the other options do. "
        "What is already written is skipped",
    )


def _add_files(c: Group) -> None:
    c.add_argument("--bundle", type=path, default=Path("engines/demo"), metavar="FOLDER", help="default: engines/demo")
    c.add_argument(
        "--output",
        default="picture.png",
        metavar="FILE",
        help="a .png, .jpg or .webp (lossless) file; several pictures get numbers (default: picture.png)",
    )
    c.add_argument(
        "--no-metadata", dest="metadata", action="store_false", help="write no settings into the pictures' files"
    )


def _add_machine(c: Group) -> None:
    c.add_argument("--backend", choices=BACKENDS, metavar="NAME", help=f"{', '.join(BACKENDS)} (default: see below)")
    c.add_argument("--device", type=device, metavar="NAME", help="cpu, cuda or cuda:N (default: by the backend)")
    c.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel of a step from the host")
    c.add_argument("--threads", type=whole_number(1, 1024), metavar="N", help="default: every core")
    c.add_argument("--quiet", action="store_true", help="print errors only")
    c.add_argument("--debug", action="store_true", help="print the traceback of an error")


def _add_reproduce(p: argparse.ArgumentParser) -> None:
    c = p.add_argument_group("the picture")
    c.add_argument("picture", type=path, metavar="PICTURE", help="a .png, .jpg or .webp file of LatentRT or A1111")
    c.add_argument("--bundle", type=path, default=Path("engines/demo"), metavar="FOLDER", help="default: engines/demo")
    c.add_argument("--output", metavar="FILE", help="where to write the new picture (default: it is not written)")
    c.add_argument("--text", action="store_true", help="go by A1111's text, even if the file has LatentRT's record")
    c.add_argument(
        "--image",
        type=path,
        action="append",
        metavar="FILE",
        help="what it was made from (default: the file that the record names); may be repeated, as in its call",
    )
    c.add_argument(
        "--mask",
        dest="mask_image",
        type=path,
        action="append",
        metavar="FILE",
        help="its mask (default: the file that the record names)",
    )
    c.add_argument(
        "--input",
        dest="inputs",
        type=given_input,
        action=ByName,
        default={},
        metavar="NAME=FILE",
        help="an array that the call was given, such as latents=noise.npy; may be repeated",
    )
    _add_vectors(c)
    _add_machine(p.add_argument_group("the machine"))


def call_options() -> dict[str, argparse.Action]:
    """The options of `picture` by every name that they have: `--sampler` is "sampler"; its hyphens may be
    underscores."""
    actions = _picture_parser()._actions
    named = {text.lstrip("-").replace("-", "_"): action for action in actions for text in action.option_strings}
    return {**named, **{action.dest: action for action in actions}}


def _picture_parser() -> argparse.ArgumentParser:
    p = Parser(prog=f"{program()} picture")
    _add_picture(p)
    return p


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
    wanted = "one prompt a line"
    prompts = [line.strip() for line in read_lines(file, "--prompts", wanted, PromptsFileError) if line.strip()]
    if not prompts:
        raise PromptsFileError(f"--prompts {str(file)!r} has no line with a text; write {wanted}")
    return prompts


def read_lines(file: Path, option: str, wanted: str, error: type[EngineError]) -> list[str]:
    """The lines of a text file in UTF-8. `error` if it cannot be read, with what is wanted of it."""
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as failure:
        raise error(
            f"{option} {str(file)!r} cannot be read ({failure.strerror}); pass a text file with {wanted}"
        ) from failure
    if len(content) > MAX_FILE_BYTES:
        raise error(f"{option} {str(file)!r} has more than {MAX_FILE_BYTES} bytes; pass a text file with {wanted}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = content.count(b"\n", 0, failure.start) + 1
        raise error(
            f"{option} {str(file)!r} is not UTF-8: line {line} has the byte 0x{content[failure.start]:02x}; "
            f"save it as UTF-8, {wanted}"
        ) from failure
    return text.split("\n")
