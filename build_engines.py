#!/usr/bin/env python3
"""Build a bundle: the graphs of a Stable Diffusion model, ready for the runtime.

    python build_engines.py                                       the built-in model
    python build_engines.py path/to/diffusers-folder --precision fp16
    python build_engines.py sd15 --random-weights --height 512 --width 512 --batch 1
"""
from __future__ import annotations

import argparse
import re
import sys
import traceback
from pathlib import Path

from engine.contract import VAE_FACTOR, Range, Shapes
from engine.errors import EngineError
from export.errors import ExportError, UsageError

SMALLEST_SIDE = 16


def parse_range(text: str, what: str, multiple: int, smallest: int) -> Range:
    """N or MIN:OPT:MAX as a Range; UsageError says what is wrong with it."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--{what} is {text!r}; it must be N or MIN:OPT:MAX, for example {64 * multiple} or {8 * multiple}:{64 * multiple}:{128 * multiple}")
    low, best, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    for value in (low, best, high):
        if value % multiple or value < smallest:
            rule = f"a multiple of {multiple} from {smallest} up" if multiple > 1 else f"{smallest} or more"
            raise UsageError(f"--{what} {value} is not {rule}")
    if not low <= best <= high:
        raise UsageError(f"--{what} is {text!r}; MIN <= OPT <= MAX must hold")
    return Range(low, best, high)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="build_engines.py", description="Build a bundle: the graphs of a Stable Diffusion model, ready for the runtime.")
    p.add_argument("model", nargs="?", metavar="MODEL", help="a diffusers folder, a hub id, a .safetensors or .ckpt file in the CompVis layout, or a "
                   "known architecture (sd15, sd21, sd21-base) with --random-weights; default: the built-in model")
    p.add_argument("--output", type=Path, default=Path("engines"), help="the folder that bundles go to (default: engines/)")
    p.add_argument("--name", help="what the bundle is called (default: what the model is called)")
    p.add_argument("--backend", choices=["onnxruntime", "openvino"], default="onnxruntime",
                   help="openvino also measures which components may run in bf16 there (default: onnxruntime)")
    p.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    p.add_argument("--height", metavar="N", help="pixels: N, or MIN:OPT:MAX (default: around the size that the model was trained at)")
    p.add_argument("--width", metavar="N", help="pixels: N, or MIN:OPT:MAX")
    p.add_argument("--batch", metavar="N", help="pictures per call: N, or MIN:OPT:MAX (default: 1:1:8)")
    p.add_argument("--random-weights", action="store_true", help="MODEL is an architecture; its weights are seeded random numbers")
    p.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="CLIP's tokenizer for a single file (default: from the hub)")
    p.add_argument("--prediction-type", metavar="TYPE", help="epsilon or v_prediction, for a single file of an SD 2.x model that does not say")
    p.add_argument("--no-verify", action="store_true", help="do not compare with torch and diffusers; the manifest says so")
    p.add_argument("--force", action="store_true", help="build even if nothing changed")
    p.add_argument("--quiet", action="store_true", help="print errors only")
    p.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return p


def run(options: argparse.Namespace) -> None:
    """Builds what the options ask for."""
    sides = {"height": (VAE_FACTOR, SMALLEST_SIDE), "width": (VAE_FACTOR, SMALLEST_SIDE), "batch": (1, 1)}
    asked = {side: parse_range(getattr(options, side), side, *limits) for side, limits in sides.items() if getattr(options, side)}

    from export.libraries import quiet_libraries
    quiet_libraries()
    from export.build import build, default_shapes
    from export.checkpoint import resolve

    source = resolve(options.model, options.random_weights, options.tokenizer, options.prediction_type)
    if options.name is not None:
        if not re.fullmatch(r"\w[\w.-]*", options.name):
            raise UsageError(f"--name {options.name!r} is not a plain name; letters, digits, '.', '_' and '-' are allowed")
        source.name = options.name
    defaults = default_shapes(source.sample_size())
    shapes = Shapes(**{side: asked.get(side, getattr(defaults, side)) for side in sides})
    report = (lambda message: None) if options.quiet else (lambda message: print(message, flush=True))
    build(source, options.output, options.precision, shapes, openvino=options.backend == "openvino", verify=not options.no_verify, force=options.force,
          report=report)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 when the bundle is there, 2 for a mistake of the user's, 1 for a failure."""
    options = parser().parse_args(arguments)
    failure: Exception
    try:
        run(options)
        return 0
    except KeyboardInterrupt:
        print("build_engines.py: stopped; the old bundle, if any, is untouched", file=sys.stderr)
        return 130
    except (ExportError, EngineError) as error:
        failure, message, code = error, str(error), error.exit_code
    except ImportError as error:
        failure, message, code = error, f"{error}; install what building needs: pip install latentrt[export,cpu]", 1
    except Exception as error:
        failure, message, code = error, f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1
    if options.debug:
        traceback.print_exception(failure)
    print(f"build_engines.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
