#!/usr/bin/env python3
"""Build a bundle: the graphs of a Stable Diffusion model, ready for the runtime, and TensorRT plans of them.

python build_engines.py                                       the built-in model
python build_engines.py path/to/diffusers-folder --precision fp16
python build_engines.py sd15 --random-weights --height 512 --width 512 --batch 1
python build_engines.py --bundle engines/sd15                 plans of a bundle for this machine's GPU; needs no torch
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from engine import __version__
from engine.arguments import adapter
from engine.backends import BACKENDS, default_backend, gpu_number, tensorrt_is_usable
from engine.backends.openvino.backend import OpenVinoBackend
from engine.commands import show_what_cannot_be_printed
from engine.contract import Range, Shapes
from engine.errors import EngineError, shown
from engine.family import STABLE_DIFFUSION
from engine.libraries import install_command
from engine.manifest import LARGEST_BATCH, LARGEST_SIDE, SMALLEST_SIDE
from export.errors import ExportError, UsageError

NAME = re.compile(r"[^\W_][^/\\:\x00-\x1f\x7f]*")
LONGEST_NAME = 100

MOST_CHUNKS = 8
"""Of a prompt, in plans: texts of up to 8 chunks side by side take 840."""

FOR_TENSORRT = ("rows", "prompt_chunks", "components", "diagnose", "workspace", "max_aux_streams", "optimization_level")
"""Options that say how plans are built."""

FOR_A_MODEL = (
    "output",
    "name",
    "precision",
    "opset",
    "random_weights",
    "tokenizer",
    "prediction_type",
    "scheduler",
    "ema",
    "vae",
    "lora",
)
"""Options that say how a model becomes a bundle, and that a bundle which is there has behind it."""


def parse_range(text: str, what: str, multiple: int, smallest: int, largest: int) -> Range:
    """N or MIN:OPT:MAX as a Range; UsageError says what is wrong with it."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise UsageError(
            f"--{what} is {shown(text)}; it must be N or MIN:OPT:MAX, for example {64 * multiple} or "
            f"{8 * multiple}:{64 * multiple}:{128 * multiple}"
        )
    low, best, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    for value in (low, best, high):
        if value % multiple or not smallest <= value <= largest:
            rule = f"a multiple of {multiple}" if multiple > 1 else "a number"
            raise UsageError(f"--{what} {value} is not {rule} from {smallest} to {largest}")
    if not low <= best <= high:
        raise UsageError(f"--{what} is {shown(text)}; MIN <= OPT <= MAX must hold")
    return Range(low, best, high)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="build_engines.py",
        description="Build a bundle: the graphs of a Stable Diffusion model, ready for the runtime.",
    )
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a diffusers folder, a hub id, a .safetensors or .ckpt file in the CompVis layout, a "
        "known architecture (sd15, sd21, sd21-base) with --random-weights, or shapes, the second built-in model; "
        "default: the first built-in model",
    )
    p.add_argument("--output", type=Path, help="the folder that bundles go to (default: engines/)")
    p.add_argument("--name", help="what the bundle is called (default: what the model is called)")
    p.add_argument(
        "--bundle", type=Path, metavar="FOLDER", help="build TensorRT plans of this bundle instead of a bundle of MODEL"
    )
    p.add_argument(
        "--backend",
        choices=BACKENDS,
        help="default: tensorrt where TensorRT and a GPU are found, else onnxruntime; openvino "
        "also measures which components may run in bf16 there",
    )
    p.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: fp16 for tensorrt, else fp32")
    p.add_argument(
        "--height",
        metavar="N",
        help="pixels: N, or MIN:OPT:MAX; several separated by commas (default: the size that the model was trained "
        "at for tensorrt, else sizes around it)",
    )
    p.add_argument("--width", metavar="N", help="the same")
    p.add_argument("--batch", metavar="N", help="pictures per call, the same (default: 1 for tensorrt, else 1:1:8)")
    p.add_argument(
        "--rows",
        metavar="N",
        help="rows of the U-Net in one call, the same (default: twice the pictures, with guidance, and once)",
    )
    p.add_argument(
        "--prompt-chunks",
        metavar="N",
        help="how long prompts may be, in chunks of 75 tokens, the same: 1:1:3 is up to three (default: 1)",
    )
    p.add_argument(
        "--components",
        metavar="NAME,...",
        help="build the plans of these only: denoiser, text_encoder, vae_decoder, vae_encoder (default: all)",
    )
    p.add_argument(
        "--opset",
        type=int,
        choices=[18, 23],
        help="23 has attention as one operator, for TensorRT 10.14 and later (default: 18)",
    )
    p.add_argument("--device", metavar="cuda:N", help="the GPU that plans are built on and for (default: cuda:0)")
    p.add_argument(
        "--optimization-level",
        type=int,
        choices=range(6),
        help="how long TensorRT searches; 5 takes hours (default: 3)",
    )
    p.add_argument(
        "--workspace",
        type=float,
        metavar="GIB",
        help="memory that TensorRT may use while it tries kernels (default: all)",
    )
    p.add_argument(
        "--max-aux-streams",
        type=int,
        metavar="N",
        help="streams that a plan may use besides its own (default: TensorRT decides)",
    )
    p.add_argument(
        "--diagnose",
        action="store_true",
        help="build the plans again and compare them with ONNX Runtime layer by layer",
    )
    p.add_argument(
        "--random-weights", action="store_true", help="MODEL is an architecture; its weights are seeded random numbers"
    )
    p.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="CLIP's tokenizer for a single file (default: from the hub)"
    )
    p.add_argument(
        "--prediction-type",
        metavar="TYPE",
        help="epsilon or v_prediction, for a single file of an SD 2.x model (default: what the .yaml beside it says, "
        "else epsilon for global_step 875000 and v_prediction for others)",
    )
    p.add_argument(
        "--ema",
        action="store_true",
        help="the U-Net's running averages (model_ema.*) are the model, for a single file that holds both",
    )
    p.add_argument(
        "--vae",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="another VAE for a single file, in CompVis' or diffusers' layout (default: the file's own)",
    )
    p.add_argument(
        "--lora",
        type=adapter,
        action="append",
        metavar="FILE[:WEIGHT]",
        help="an adapter that becomes a part of the model, with this weight (default: 1); may be repeated",
    )
    p.add_argument(
        "--scheduler",
        metavar="NAME",
        help="the bundle's own sampler, for a model whose own is not supported (default: the model's)",
    )
    p.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare with torch, diffusers and ONNX Runtime; the manifest says so",
    )
    p.add_argument("--force", action="store_true", help="build even if nothing changed")
    p.add_argument("--quiet", action="store_true", help="print errors only")
    p.add_argument("--version", action="version", version=f"LatentRT {__version__}")
    p.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return p


def parse_ranges(options: argparse.Namespace, factor: int = 1) -> dict[str, list[Range]]:
    """What --height, --width, --batch and --rows ask for, by name; names that were not given are missing. Height and
    width are multiples of `factor`."""
    pixels = (factor, SMALLEST_SIDE, LARGEST_SIDE)
    limits = {"height": pixels, "width": pixels, "batch": (1, 1, LARGEST_BATCH), "rows": (1, 1, 2 * LARGEST_BATCH)}
    given = {name: getattr(options, name).split(",") for name in limits if getattr(options, name) is not None}
    return {name: [parse_range(text, name, *limits[name]) for text in texts] for name, texts in given.items()}


def profiles(asked: dict[str, list[Range]], defaults: Shapes, most_rows: int = 2) -> list[Shapes]:
    """One profile for each set of height, width and batch (a single one goes with all), and in each for every number of
    rows. `most_rows` are the family's."""
    from export.tensorrt.profiles import with_rows

    sides = {name: asked.get(name, [getattr(defaults, name)]) for name in ("height", "width", "batch")}
    count = max(len(values) for values in sides.values())
    for name, values in sides.items():
        if len(values) not in (1, count):
            raise UsageError(
                f"--{name} has {len(values)} values and another option {count}; give one for all, or as many everywhere"
            )
    shapes = [Shapes(*(values[i % len(values)] for values in sides.values())) for i in range(count)]
    if "rows" not in asked:
        return [profile for one in shapes for profile in with_rows(one, most_rows)]
    for one in shapes:
        for rows in asked["rows"]:
            if rows.min < one.batch.min or rows.max < one.batch.max:
                raise UsageError(
                    f"--rows {rows} is fewer than --batch {one.batch}; each picture has a row of the U-Net, and two "
                    "with guidance"
                )
    return [replace(one, rows=rows) for one in shapes for rows in asked["rows"]]


def with_chunks(profiles: list[Shapes], text: str | None) -> list[Shapes]:
    """The profiles for prompts of so many chunks. Texts side by side take a common multiple of their chunks: those of n
    chunks at most take up to that of 1 to n."""
    if text is None:
        return profiles
    asked = parse_range(text, "prompt-chunks", 1, 1, MOST_CHUNKS)
    served = Range(asked.min, asked.opt, math.lcm(*range(1, asked.max + 1)))
    return [replace(one, chunks=served) for one in profiles]


def envelope(ranges: list[Range]) -> Range:
    """The smallest range that holds all, best at what the first is best at."""
    return Range(min(one.min for one in ranges), ranges[0].opt, max(one.max for one in ranges))


def run(options: argparse.Namespace) -> None:
    """Builds what the options ask for."""
    asked = parse_ranges(options, 1 if is_folder(options.bundle or options.model) else STABLE_DIFFUSION.factor)
    report = (lambda message: None) if options.quiet else (lambda message: print(message, flush=True))
    check_bundle_options(options)
    tensorrt = (
        options.bundle is not None
        or (options.backend or ("tensorrt" if tensorrt_is_usable() else "onnxruntime")) == "tensorrt"
    )
    gpu = gpu_number(options.device or "cuda")
    if tensorrt:
        check_tensorrt_options(options, gpu)
    else:
        refuse(options, FOR_TENSORRT, "is for --backend tensorrt")
        if options.device not in (None, "cpu"):
            raise UsageError(
                f"--device {options.device} is for --backend tensorrt; graphs for OpenVINO and ONNX Runtime are built "
                "on the CPU. Leave it out"
            )
    folder = options.bundle or build_bundle(
        options, asked, options.precision or ("fp16" if tensorrt else "fp32"), report
    )
    if tensorrt:
        build_plans(options, folder, asked, gpu or 0, report)


def is_folder(place: Path | str | None) -> bool:
    """Whether a model or a bundle is a folder here, which says itself what sizes are multiples of."""
    try:
        return place is not None and Path(place).is_dir()
    except OSError:  # too long, or in a folder that may not be read
        return False


def refuse(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """UsageError for the first of these options that was given: none is ignored."""
    for name in names:
        if getattr(options, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} {why}; leave it out")


def check_bundle_options(options: argparse.Namespace) -> None:
    """UsageError for options that do not go together, and for names that no folder can have."""
    if options.bundle is not None:
        if options.model is not None or options.backend not in (None, "tensorrt"):
            raise UsageError(
                "--bundle builds TensorRT plans of an existing bundle; leave out MODEL and backends other than tensorrt"
            )
        refuse(options, FOR_A_MODEL, "is for building a bundle from a model, and --bundle takes an existing one")
    if options.name is not None and (
        not NAME.fullmatch(options.name) or len(options.name.encode(errors="replace")) > LONGEST_NAME
    ):
        raise UsageError(
            f"--name {shown(options.name)} cannot be a folder's name; it begins with a letter or digit, holds no / \\ "
            "or :, and has at most "
            f"{LONGEST_NAME} bytes"
        )


def check_tensorrt_options(options: argparse.Namespace, gpu: int | None) -> None:
    """The errors of a machine or an option that plans cannot be built with, before anything is exported."""
    from engine.backends.tensorrt.cuda import Device
    from engine.backends.tensorrt.versions import load_tensorrt

    if gpu is None:
        raise UsageError("--device cpu cannot build TensorRT plans; leave it out, or pass --backend onnxruntime")
    if options.workspace is not None and not 0 < options.workspace < 2**20:
        raise UsageError(f"--workspace {options.workspace:g} is not a number of GiB above 0")
    if options.max_aux_streams is not None and not 0 <= options.max_aux_streams < 2**10:
        raise UsageError(f"--max-aux-streams is {shown(options.max_aux_streams)}; it must be from 0 to 1023")
    known = STABLE_DIFFUSION.names
    if options.components is not None and (unknown := set(options.components.split(",")) - set(known)):
        raise UsageError(f"--components has {shown(', '.join(sorted(unknown)))}; there are {', '.join(known)}")
    load_tensorrt()
    with Device(gpu).closing():
        pass


def build_bundle(
    options: argparse.Namespace, asked: dict[str, list[Range]], precision: str, report: Callable[[str], None]
) -> Path:
    """The ONNX bundle of MODEL: its folder."""
    from export.libraries import quiet_libraries

    quiet_libraries()
    from export.build import build, shapes_of
    from export.graphs.tracing import OPSET
    from export.sources.checkpoint import resolve

    source = resolve(
        options.model,
        options.random_weights,
        options.tokenizer,
        options.prediction_type,
        options.scheduler,
        options.ema,
        options.vae,
        options.lora or (),
    )
    if options.name is not None:
        source.name = options.name
    parse_ranges(options, source.family.factor)
    defaults = shapes_of(source)
    shapes = Shapes(
        **{side: envelope(asked.get(side, [getattr(defaults, side)])) for side in ("height", "width", "batch")}
    )
    made = build(
        source,
        options.output or Path("engines"),
        precision,
        shapes,
        opset=options.opset or OPSET,
        openvino=options.backend == "openvino",
        verify=not options.no_verify,
        force=options.force,
        report=report,
    )
    if (
        made.exported
        and options.backend is None
        and precision != "bf16"
        and default_backend() == "openvino"
        and OpenVinoBackend({}).has_bf16()
    ):
        report(
            "on this CPU it runs in fp32; --backend openvino measures which components may run in bf16, which is faster"
        )
    return made.folder


def build_plans(
    options: argparse.Namespace, folder: Path, asked: dict[str, list[Range]], gpu: int, report: Callable[[str], None]
) -> None:
    """The plans of the bundle in `folder`."""
    from engine.bundle import Bundle
    from export.tensorrt import build as to_tensorrt
    from export.tensorrt.compiling import Settings

    bundle, one = Bundle.open(folder, verify=False), Range(1, 1, 1)
    shapes, family = bundle.shapes, bundle.family
    parse_ranges(options, family.factor)
    sides = {
        name: Range(best, best, best) for name, best in (("height", shapes.height.opt), ("width", shapes.width.opt))
    }
    level = 3 if options.optimization_level is None else options.optimization_level
    settings = Settings(level, options.workspace and int(options.workspace * 2**30), options.max_aux_streams)
    to_tensorrt.build_plans(
        folder,
        with_chunks(profiles(asked, Shapes(**sides, batch=one), family.most_rows), options.prompt_chunks),
        settings,
        components=None if options.components is None else options.components.split(","),
        gpu=gpu,
        compare=not options.no_verify,
        diagnose=options.diagnose,
        force=options.force,
        report=report,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 when the bundle is there, 2 for a mistake of the user's, 1 for a failure."""
    show_what_cannot_be_printed()
    options = parser().parse_args(arguments)
    failure: Exception
    try:
        run(options)
        return 0
    except KeyboardInterrupt:
        print("build_engines.py: stopped; the old bundle and plans, if any, are untouched", file=sys.stderr)
        end_at_once_if_building(130)
        return 130
    except (ExportError, EngineError) as error:
        failure, message, code = error, str(error), error.exit_code
    except ImportError as error:
        failure, message, code = error, f"{error}. {sys.executable} lacks what building needs; {install_hint()}", 1
    except Exception as error:
        failure, message, code = error, f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1
    if options.debug:
        traceback.print_exception(failure)
    print(f"build_engines.py: {message}", file=sys.stderr)
    return code


def install_hint() -> str:
    """Another Python that has it, or how it is installed."""
    python = Path(__file__).parent / ".venv" / "bin" / "python"
    if python.is_file() and not Path(sys.prefix).samefile(python.parents[1]):
        return f"take the one that `make demo` set up: {python} {Path(__file__).name}"
    return f"install it: {install_command('export', 'cpu')}"


def end_at_once_if_building(code: int) -> None:
    """Ends the process where TensorRT 8.6, which cannot be asked to stop, is still building in a thread."""
    progress = sys.modules.get("export.tensorrt.progress")
    if progress is not None and progress.left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
