"""The runtime from a shell.

    python -m engine picture "a large red circle on a blue background" --bundle engines/demo
    python -m engine doctor
"""
from __future__ import annotations

import argparse
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import EngineError, OutputFileError

if TYPE_CHECKING:
    from .pipeline import Pipeline, Result


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m engine", description="Pictures from texts, without torch.")
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("picture", help="make a picture from a text")
    c.add_argument("prompt")
    c.add_argument("--bundle", type=Path, default=Path("engines/demo"), help="default: engines/demo")
    c.add_argument("--output", type=Path, default=Path("picture.png"), help="a PNG file; several pictures get numbers (default: picture.png)")
    c.add_argument("--negative-prompt", default="", metavar="TEXT")
    c.add_argument("--steps", type=int, default=20, metavar="N")
    c.add_argument("--guidance-scale", type=float, default=7.5, metavar="G")
    c.add_argument("--seed", type=int, default=None, metavar="N", help="default: a random one")
    c.add_argument("--scheduler", default=None, metavar="NAME", help="default: the model's own")
    c.add_argument("--height", type=int, default=None, metavar="PIXELS")
    c.add_argument("--width", type=int, default=None, metavar="PIXELS")
    c.add_argument("--count", type=int, default=1, metavar="N", help="pictures to make")
    c.add_argument("--backend", default=None, metavar="NAME", help="tensorrt, openvino or onnxruntime (default: by what the machine has)")
    c.add_argument("--device", default=None, metavar="NAME", help="cpu, cuda or cuda:N (default: by the backend)")
    c.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel of a step from the host")
    c.add_argument("--threads", type=int, default=None, metavar="N", help="default: every core")
    c.add_argument("--quiet", action="store_true", help="print errors only")
    c.add_argument("--debug", action="store_true", help="print the traceback of an error")
    c = commands.add_parser("doctor", help="say what this machine has and which bundles it can use")
    c.add_argument("--bundles", type=Path, default=Path("engines"), metavar="FOLDER", help="a bundle, or a folder of bundles (default: engines/)")
    c.add_argument("--verify", action="store_true", help="read every file and compare its SHA-256")
    c.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return p


def picture(options: argparse.Namespace) -> None:
    """Makes the pictures, writes them and prints where, how long it took and how far the bundle is from diffusers."""
    from .pipeline import Pipeline
    if not options.output.parent.is_dir():
        raise OutputFileError(f"{options.output} cannot be written: {options.output.parent} is not a folder; make it, or pass another --output")
    with Pipeline.load(options.bundle, backend=options.backend, device=options.device, cuda_graphs=not options.no_cuda_graphs,
                       threads=options.threads) as pipeline:
        result = pipeline(
            options.prompt, options.height, options.width, options.steps, options.guidance_scale, options.negative_prompt, options.count,
            seed=options.seed, scheduler=options.scheduler, progress=not options.quiet)
        files = [options.output if options.count == 1 else options.output.with_stem(f"{options.output.stem}-{i}") for i in range(options.count)]
        for image, file in zip(result.images, files):
            write_png(image, file)
        if not options.quiet:
            print(summary(pipeline, result, files))


def write_png(image: object, file: Path) -> None:
    """Writes a temporary file and renames it, so that a failure leaves what was there. OutputFileError if it cannot."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        image.save(unfinished, format="PNG")  # type: ignore[attr-defined]
        os.replace(unfinished, file)
    except OSError as error:
        raise OutputFileError(f"{file} cannot be written ({error.strerror}); pass another --output") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def summary(pipeline: Pipeline, result: Result, files: list[Path]) -> str:
    """What a user wants to know about a run, in lines."""
    times, verification = result.timings, pipeline.bundle.manifest["verification"]
    mean_step = 1000 * sum(times["steps"]) / len(times["steps"])
    lines = [f"wrote {file}" for file in files]
    lines.append(f"seed {', '.join(map(str, result.seeds))}; {pipeline.description}{', CUDA graph' if times['path'] == 'cuda_graph' else ''}")
    lines.append(f"tokenize {1000 * times['tokenize']:.1f} ms, text encoder {1000 * times['text_encoder']:.1f} ms, denoise "
                 f"{1000 * times['denoise']:.1f} ms ({len(times['steps'])} steps of {mean_step:.1f} ms), VAE decoder "
                 f"{1000 * times['vae_decoder']:.1f} ms, total {1000 * times['total']:.1f} ms")
    if verification["done"]:
        p = verification["picture"]
        lines.append(f"when built, this bundle's picture was diffusers': {p['pixels_within_1']:.2%} of the values within 1 of 255, PSNR "
                     f"{p['psnr_db']:.1f} dB, latents within {p['latents_max_abs']:.1e} ({p['steps']} steps, {p['scheduler']}, seed {p['seed']})")
    else:
        lines.append("this bundle was built with --no-verify: nobody compared it with diffusers")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0, 2 for a mistake of the user's, 1 for a failure."""
    options = parser().parse_args(arguments)
    failure: Exception
    try:
        if options.command == "doctor":
            from . import doctor
            doctor.main(options.bundles, options.verify)
        else:
            picture(options)
        return 0
    except KeyboardInterrupt:
        print("python -m engine: stopped", file=sys.stderr)
        return 130
    except EngineError as error:
        failure, message, code = error, str(error), error.exit_code
    except Exception as error:
        failure, message, code = error, f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1
    if options.debug:
        traceback.print_exception(failure)
    print(f"python -m engine: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
