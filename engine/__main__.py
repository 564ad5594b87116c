"""The runtime from a shell.

python -m engine picture "a large red circle on a blue background" --bundle engines/demo
python -m engine samplers
python -m engine doctor
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .arguments import MAX_PICTURES, parse, program, read_prompts, shorten
from .commands import show_what_cannot_be_printed
from .errors import BatchError, BundleError, EngineError, OutputFileError, SeedError
from .libraries import install_command, installed

if TYPE_CHECKING:
    from .bundle import Bundle
    from .contract import Shapes
    from .pipeline import Pipeline, Result
    from .text.request import Texts

LOADING_NOTE = 2.0
WORKING_NOTE = 10.0
"""Seconds of work after which a note on standard error says what is running."""


def picture(options: argparse.Namespace) -> int:
    """Makes and writes the pictures. Prints their files, the timings and the bundle's differences from diffusers."""
    from .output import check_output

    subjects = read_subjects(options)
    total = len(subjects) * options.count
    if total > MAX_PICTURES:
        raise BatchError(
            f"{len(subjects)} texts with --count {options.count} are {total} pictures; one run makes at most "
            f"{MAX_PICTURES}"
        )
    files = check_output(options.output, total)
    wanted = list(
        zip(
            [subject for subject in subjects for _ in range(options.count)],
            choose_picture_seeds(options) * len(subjects),
            files,
        )
    )
    if options.subseed_strength and options.subseed is None:
        (options.subseed,) = choose_seeds(None, 1)
    read_pictures(options)
    bundle = check_call(options, subjects)

    from .pipeline import Pipeline

    with note_after(LOADING_NOTE, f"loading {options.bundle}", not options.quiet):
        pipeline = Pipeline.load(
            options.bundle,
            backend=options.backend or quickest_backend(bundle, options.device),
            device=options.device,
            cuda_graphs=not options.no_cuda_graphs,
            threads=options.threads,
        )
    with pipeline:
        for file, token in options.textual_inversion:
            pipeline.load_textual_inversion(file, token)
        load_adapters(pipeline, options.lora)
        results = make(pipeline, wanted, options)
        if not options.quiet:
            from .summary import summarize

            say(summarize(pipeline.bundle.manifest, pipeline.description, results))
    return 0


def load_adapters(pipeline: Pipeline, given: Sequence[tuple[Path, float]]) -> None:
    """Loads all adapters, then turns them on together: each switch takes seconds."""
    weights = {pipeline.load_lora(file, weight=0): weight for file, weight in given}
    if any(weights.values()):
        pipeline.set_lora_weights(weights)


Subject = str | int | None
"""What a picture is of: a text; a class, or nothing in particular, for a model without texts."""


def read_subjects(options: argparse.Namespace) -> Sequence[Subject]:
    """The texts of the command line. For a model without texts its classes, or one None."""
    texts = options.prompt or options.prompts or not _is_textless(options.bundle)
    return read_prompts(options.prompt, options.prompts) if texts else options.class_label or [None]


def read_pictures(options: argparse.Namespace) -> None:
    """Puts the pictures of --image and --mask in the place of their files, which are read once for all calls."""
    from .pixels import read_image

    for name in ("image", "mask"):
        if (file := getattr(options, name)) is not None:
            setattr(options, name, read_image(file, f"--{name}"))


def _is_textless(folder: Path) -> bool:
    """Whether there is a bundle of a model without texts."""
    from .manifest import Manifest, read

    try:
        return not Manifest.of(read(folder)).family.tokenizers
    except BundleError:  # what is wrong with it is said when it is opened
        return False


def call_arguments(subjects: Sequence[Subject], options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call for pictures of these."""
    if isinstance(subjects[0], str):
        return {
            "prompt": subjects,
            "negative_prompt": options.negative_prompt,
            "class_labels": options.class_label or None,
            "prompt_syntax": options.prompt_syntax,
            "emphasis": options.emphasis,
            "clip_skip": options.clip_skip,
        }
    negative = options.negative_prompt or None
    given = {"negative_prompt": negative, "clip_skip": options.clip_skip}
    if subjects[0] is None:
        return {"num_images_per_prompt": len(subjects), **given}
    return {"class_labels": subjects, **given}


def make(pipeline: Pipeline, wanted: Sequence[tuple[Subject, int, Path]], options: argparse.Namespace) -> list[Result]:
    """Makes the pictures of texts (or classes) and seeds in as few calls as the bundle allows. Writes the pictures of
    each call when it ends. Returns the results, without the images."""
    from dataclasses import replace

    from .output import write_picture

    results: list[Result] = []
    made, total, told = 0, len(wanted), not options.quiet
    for size in split(total, call_sizes(pipeline, options, [subject for subject, _, _ in wanted])):
        subjects, seeds, files = zip(*wanted[made : made + size])
        doing = (
            f"making picture {made + 1} of {total}"
            if size == 1
            else f"making pictures {made + 1} to {made + size} of {total}"
        )
        with note_after(WORKING_NOTE, doing, told and not _is_terminal(sys.stderr), WORKING_NOTE):
            result = pipeline(
                **call_arguments(subjects, options),
                height=options.height,
                width=options.width,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                eta=options.eta,
                seed=seeds,
                scheduler=options.scheduler,
                progress=told,
                guidance_rescale=options.guidance_rescale,
                guidance_interval=options.guidance_interval,
                schedule_type=options.schedule_type,
                timesteps=options.timesteps,
                sigmas=options.sigmas,
                timestep_respacing=options.timestep_respacing,
                sampler_options=dict(options.sampler_option),
                image=options.image,
                strength=options.strength,
                mask_image=options.mask,
                composite=options.composite,
                padding_mask_crop=options.padding_mask_crop,
                depth_map=options.depth_map,
                image_guidance_scale=options.image_guidance_scale,
                noise_level=options.noise_level,
                **second_pass(options, range(made, made + size)),
            )
        for subject, seed, file, image in zip(subjects, seeds, files, result.images):
            write_picture(image, file)
            if told:
                say(f"wrote {file}" + (f" (seed {seed}{_named(subject)})" if total > 1 else ""))
        results.append(replace(result, images=None))
        made += size
    return results


def _named(subject: Subject) -> str:
    if subject is None:
        return ""
    return f", {shorten(subject)}" if isinstance(subject, str) else f", class {subject}"


def choose_picture_seeds(options: argparse.Namespace) -> list[int]:
    """The seeds of a text's pictures. Variations are all of the first one."""
    if options.subseed_strength:
        return choose_seeds(options.seed, 1) * options.count
    return choose_seeds(options.seed, options.count)


def second_pass(options: argparse.Namespace, pictures: range) -> dict[str, Any]:
    """The arguments of a call about variations and a second pass. `pictures` are its numbers among all."""
    from .errors import HiresError
    from .hires import Hires

    asked = {name: getattr(options, f"hires_{name}") for name in ("upscaler", "steps", "strength", "prompt")}
    own = {name: value for name, value in {**asked, "scheduler": options.hires_sampler}.items() if value is not None}
    if own and options.hires is None:
        raise HiresError("there are options of a second pass and no --hires; pass --hires 2, or leave them out")
    subseeds = None
    if options.subseed is not None:
        every = choose_seeds(options.subseed, options.count)
        subseeds = [every[number % options.count] for number in pictures]
    return {
        "hires": None if options.hires is None else Hires(**options.hires, **own),
        "subseed": subseeds,
        "subseed_strength": options.subseed_strength,
    }


def choose_seeds(first: int | None, count: int) -> list[int]:
    """The seeds of a text's pictures: `first` and those after it; a random one if there is none. SeedError past the
    last seed."""
    import secrets

    first = secrets.randbits(32) if first is None else first
    if first + count > 2**64:
        raise SeedError(
            f"--seed {first} with --count {count} goes beyond the last seed, {2**64 - 1}; take a smaller --seed"
        )
    return list(range(first, first + count))


def check_call(options: argparse.Namespace, subjects: Sequence[Subject]) -> Bundle:
    """The bundle, after all checks that need no graph to be loaded. The pipeline checks the rest."""
    from .adapters.files import read_adapter
    from .bundle import Bundle
    from .checks import check_class_labels, check_no_text, check_prompts
    from .guidance import check_guidance
    from .hires import check_hires
    from .inpainting import check_beginning
    from .request import Sampling, late
    from .seen import check_seen
    from .text.inversion import load_inversion
    from .variation import Variation

    for file, token in options.textual_inversion:
        load_inversion(file, token)
    for file, _ in options.lora:
        read_adapter(file)
    given = call_arguments(subjects, options)
    if "prompt" in given:
        check_prompts(subjects, options.negative_prompt)
    bundle = Bundle.open(options.bundle, verify=False)
    if not bundle.family.tokenizers:
        check_no_text(given.get("prompt"), given["negative_prompt"])
    else:
        texts_of(options, subjects, bundle)
    check_class_labels(given.get("class_labels"), bundle.family.classes)
    schedule = bundle.schedule()
    sampling = Sampling.check(
        schedule,
        options.scheduler,
        options.steps,
        options.eta,
        options.schedule_type,
        options.timesteps,
        options.sigmas,
        options.timestep_respacing,
        dict(options.sampler_option),
    )
    init, inpaint = check_beginning(
        bundle.family, options.image, options.strength, options.mask, options.composite, options.padding_mask_crop
    )
    told = options.depth_map, options.image_guidance_scale, options.noise_level
    check_seen(bundle.family, bundle.low_resolution(), init, inpaint, *told)
    asked = second_pass(options, range(1))
    check_hires(asked["hires"], options.image)
    Variation.check(asked["subseed"], options.subseed_strength, 1)
    sampling = late(sampling, init)
    table = sampling.table(schedule)
    check_guidance(
        options.guidance_scale, options.guidance_rescale, options.guidance_interval, sampling.run, table.timesteps
    )
    return bundle


def texts_of(options: argparse.Namespace, subjects: Sequence[Subject], bundle: Bundle) -> Texts:
    """The texts, checked."""
    from .text.request import Reads, Texts

    reads, given = Reads(layers=bundle.contents.text_layers), (options.prompt_syntax, options.clip_skip)
    return Texts.check(reads, list(subjects), options.negative_prompt, *given, options.emphasis)


def quickest_backend(bundle: Bundle, device: str | None) -> str | None:
    """The backend with the shortest time from process start to the first picture: ONNX Runtime for a small model on the
    CPU, because OpenVINO takes longer to compile it than to run it. None leaves the choice to `Pipeline.load`."""
    from .backends import gpu_number, tensorrt_is_usable
    from .backends.onnxruntime.backend import LARGE_GRAPH

    if (
        gpu_number(device) is not None
        or (device != "cpu" and tensorrt_is_usable())
        or bundle.precision == "bf16"
        or not installed("onnxruntime")
    ):
        return None
    graph = bundle.graphs["denoiser"]
    size = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
    return "onnxruntime" if size < LARGE_GRAPH else None


def call_sizes(pipeline: Pipeline, options: argparse.Namespace, subjects: Sequence[Subject]) -> list[int]:
    """How many pictures of these, up to all, one call may make with these options: as if each had the rows of the one
    with most."""
    scale, total = options.guidance_scale, len(subjects)
    guided = (max(scale) if isinstance(scale, list) else scale) > 1
    rows = 1
    if pipeline.bundle.family.tokenizers:
        distinct = dict.fromkeys(subjects)
        rows = max(texts_of(options, [subject], pipeline.bundle).rows(guided) for subject in distinct)

    def serves(profile: Shapes, batch: int) -> bool:
        sides = (options.height is None or options.height in profile.height) and (
            options.width is None or options.width in profile.width
        )
        return sides and batch in profile.batch and (profile.rows is None or rows * batch in profile.rows)

    profiles = pipeline.profiles
    largest = min(total, max(profile.batch.max for profile in profiles))
    return [batch for batch in range(1, largest + 1) if any(serves(profile, batch) for profile in profiles)]


def split(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` as a sum of as few `sizes` as possible, of about equal ones if that needs no more. [total] if there is no
    such sum."""
    calls, last = [0.0], [0]
    for n in range(1, total + 1):
        fewest = min(((calls[n - size], size) for size in sizes if size <= n), default=(math.inf, 0))
        calls.append(fewest[0] + 1)
        last.append(fewest[1])
    if calls[total] == math.inf:
        return [total]
    best: list[int] = []
    while total > sum(best):
        best.append(last[total - sum(best)])
    small, larger = divmod(total, len(best))
    equal = [small + 1] * larger + [small] * (len(best) - larger)
    return equal if set(equal) <= set(sizes) else best


def samplers(options: argparse.Namespace) -> int:
    """Prints the samplers, or what the named ones take."""
    from .sampling.listing import describe, overview

    for line in describe(options.names) if options.names else overview():
        say(line)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Prints the report. Returns 0 if every bundle can make pictures here, 1 if one cannot or there is none."""
    from .doctor import diagnose

    report = diagnose(options.bundles, options.verify)
    while True:
        try:
            say(next(report))
        except StopIteration as end:
            return 0 if end.value else 1


def say(text: str | None) -> None:
    """Prints a line; None flushes what argparse has printed. A closed pipe is no failure: the command does its work all
    the same. OutputFileError for a full disk."""
    if sys.stdout is None:
        return
    try:
        print(text or "", end="" if text is None else "\n", flush=True)
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OutputFileError(f"standard output cannot be written ({error.strerror})") from error


@contextmanager
def note_after(seconds: float, text: str, wanted: bool, every: float | None = None) -> Iterator[None]:
    """Prints a note on standard error if the block takes longer than `seconds`, and again after each `every`
    seconds."""
    finished, started = threading.Event(), perf_counter()

    def tell() -> None:
        pause: float | None = seconds
        while not finished.wait(pause):
            with suppress(OSError, ValueError):
                print(f"{text} ({perf_counter() - started:.0f} s so far)", file=sys.stderr, flush=True)
            pause = every

    if wanted:
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def _is_terminal(stream: object) -> bool:
    return bool(stream) and stream.isatty()  # type: ignore[attr-defined]


def in_words_of_the_shell(message: str) -> str:
    """A message of the Python interface, with arguments written as options of the command."""
    return re.sub(r"\b(backend|device)='([\w:]+)'", r"--\1 \2", message)


def what_to_install(error: ImportError, arguments: list[str]) -> str:
    """The message for a missing package: which Python lacks it, and which one has it or how to install it."""
    environment = Path(__file__).parents[1] / ".venv"
    python = environment / "bin" / "python"
    if python.exists() and environment.resolve() != Path(sys.prefix).resolve():
        shown = os.path.relpath(python) if environment.parent == Path.cwd() else str(python)
        command = shlex.join([shown, "-m", "engine", *arguments])
        remedy = f"`make demo` has installed what is needed for another Python: {command}"
    else:
        command = shlex.quote(sys.executable) + install_command("runtime", "cpu").removeprefix("python")
        remedy = f"install what is needed: {command}"
    return f"{sys.executable} cannot import {error.name or 'a package'} ({error}); {remedy}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, 2 for a user's mistake, 1 for a failure, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    show_what_cannot_be_printed()
    try:
        options = parse(arguments)
    except SystemExit:
        with suppress(OutputFileError):
            say(None)
        raise
    failure: Exception
    try:
        return {"picture": picture, "samplers": samplers, "doctor": doctor}[options.command](options)
    except KeyboardInterrupt:
        message, code = "stopped", 130
    except EngineError as error:
        failure, message, code = error, in_words_of_the_shell(str(error)), error.exit_code
    except ImportError as error:
        failure, message, code = error, what_to_install(error, arguments), 1
    except Exception as error:
        failure, message, code = error, f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1
    with suppress(OSError):
        if options.debug and code != 130:
            traceback.print_exception(failure)
        print(f"{program()}: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
