"""From options of the command line to pictures: subjects, seeds, the pipeline, and calls of as many pictures as it
takes."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .argument_types import shorten
from .arguments import read_prompts
from .errors import BundleError, SeedError
from .libraries import installed
from .terminal import is_terminal, note_after, say

if TYPE_CHECKING:
    from .bundle import Bundle
    from .contract import Shapes
    from .pipeline import Pipeline, Result
    from .text.request import Texts

LOADING_NOTE = 2.0
WORKING_NOTE = 10.0
"""Seconds of work after which a note on standard error says what is running."""


def open_bundle(options: argparse.Namespace) -> Bundle:
    """The bundle of the options. Its hashes are checked when its graphs are loaded."""
    from .bundle import Bundle

    return Bundle.open(options.bundle, verify=False)


def load(options: argparse.Namespace, bundle: Bundle) -> Pipeline:
    """The pipeline of a bundle with the options about backend and device."""
    from .pipeline import Pipeline

    with note_after(LOADING_NOTE, f"loading {options.bundle}", not options.quiet):
        pipeline = Pipeline.load(
            options.bundle,
            backend=options.backend or quickest_backend(bundle, options.device),
            device=options.device,
            cuda_graphs=not options.no_cuda_graphs,
            threads=options.threads,
        )
    for file, token in options.textual_inversion:
        pipeline.load_textual_inversion(file, token)
    load_adapters(pipeline, options.lora)
    return pipeline


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
    return read_prompts(options.prompt, options.prompts) if texts else options.class_labels or [None]


def read_pictures(options: argparse.Namespace) -> None:
    """Puts the pictures of --image and --mask in the place of their files, which are read once for all calls."""
    from .pixels import FromFile

    for name, option in (("image", "--image"), ("mask_image", "--mask")):
        if (file := getattr(options, name)) is not None:
            setattr(options, name, FromFile.read(file, option))


def read_inputs(options: argparse.Namespace) -> dict[str, Any]:
    """The inputs that `reproduce` is given, by argument."""
    from .inputs import load

    given = {name: load(name, file) for name, file in options.inputs.items()}
    for name in ("image", "mask_image"):
        if files := getattr(options, name):
            given[name] = [load(name, file) for file in files]
    return given


def _is_textless(folder: Path) -> bool:
    """Whether there is a bundle of a model without texts."""
    from .manifest import Manifest, read

    try:
        return not Manifest.of(read(folder)).family.tokenizers
    except BundleError:  # what is wrong with it is said when it is opened
        return False


def subject_arguments(subjects: Sequence[Subject], options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call that say what pictures of these show."""
    if isinstance(subjects[0], str):
        return {
            "prompt": subjects,
            "negative_prompt": options.negative_prompt,
            "class_labels": options.class_labels or None,
        }
    negative = options.negative_prompt or None
    if subjects[0] is None:
        return {"num_images_per_prompt": len(subjects), "negative_prompt": negative}
    return {"class_labels": subjects, "negative_prompt": negative}


def further_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The other arguments of a call, but for the seed: every option whose place in `options` has the name of an
    argument."""
    from .record import call_parameters

    names = call_parameters() - {"prompt", "negative_prompt", "class_labels", "seed"}
    found = {name: getattr(options, name) for name in sorted(names) if hasattr(options, name)}
    return {**found, "hires": second_pass(options)}


def second_pass(options: argparse.Namespace) -> dict[str, Any] | None:
    """The argument `hires` of a call. HiresError for options of a second pass without --hires."""
    from .errors import HiresError

    asked = {name: getattr(options, f"hires_{name}") for name in ("upscaler", "steps", "strength", "prompt")}
    own = {name: value for name, value in {**asked, "scheduler": options.hires_sampler}.items() if value is not None}
    if own and options.hires is None:
        raise HiresError("there are options of a second pass and no --hires; pass --hires 2, or leave them out")
    return None if options.hires is None else {**options.hires, **own}


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
        with note_after(WORKING_NOTE, doing, told and not is_terminal(sys.stderr), WORKING_NOTE):
            arguments = {**subject_arguments(subjects, options), **further_arguments(options), "seed": seeds}
            arguments["subseed"] = subseeds(options, range(made, made + size))
            result = pipeline(**arguments, progress=told)
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


def choose_picture_seeds(options: argparse.Namespace) -> list[int]:
    """The seeds of a text's pictures. Variations are all of the first one."""
    if options.subseed_strength:
        return choose_seeds(options.seed, 1) * options.count
    return choose_seeds(options.seed, options.count)


def choose_subseed(options: argparse.Namespace) -> None:
    """Makes a missing --subseed a random one, the same for all calls."""
    if options.subseed_strength and options.subseed is None:
        (options.subseed,) = choose_seeds(None, 1)


def subseeds(options: argparse.Namespace, pictures: range) -> list[int] | None:
    """The subseeds of pictures by their numbers among all."""
    if options.subseed is None:
        return None
    every = choose_seeds(options.subseed, options.count)
    return [every[number % options.count] for number in pictures]


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
    given = subject_arguments(subjects, options)
    if "prompt" in given:
        check_prompts(subjects, options.negative_prompt)
    bundle = Bundle.open(options.bundle, verify=False)
    if not bundle.family.tokenizers:
        check_no_text(given.get("prompt"), given["negative_prompt"])
    else:
        for subject in dict.fromkeys(subjects):
            texts_of(options, [subject], bundle)
    check_class_labels(given.get("class_labels"), bundle.family.classes)
    schedule = bundle.schedule()
    sampling = Sampling.check(
        schedule,
        options.scheduler,
        options.num_inference_steps,
        options.eta,
        options.schedule_type,
        options.timesteps,
        options.sigmas,
        options.timestep_respacing,
        options.sampler_options,
    )
    init, inpaint = check_beginning(
        bundle.family,
        options.image,
        options.strength,
        options.mask_image,
        options.composite,
        options.padding_mask_crop,
    )
    told = options.depth_map, options.image_guidance_scale, options.noise_level
    check_seen(bundle.family, bundle.low_resolution(), init, inpaint, *told)
    check_hires(second_pass(options), options.image)
    Variation.check(options.subseed, options.subseed_strength, 1)
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
    with most. With a mask and with the upscaler it is one: pictures of a call share a draw about the image, so that
    each would not come again from its own seed. So it is where texts name different adapters."""
    family, scale, total = pipeline.bundle.family, options.guidance_scale, len(subjects)
    if options.mask_image is not None or family.joins == "low_resolution":
        return [1]
    guided = (max(scale) if isinstance(scale, list) else scale) > 1
    rows = 1
    if family.tokenizers:
        every = [texts_of(options, [subject], pipeline.bundle) for subject in dict.fromkeys(subjects)]
        if len({texts.loras for texts in every}) > 1:
            return [1]
        rows = max(texts.rows(guided, family.most_rows) for texts in every)

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


def sheet_name(output: str) -> str:
    """The file of the contact sheet beside the pictures of an output."""
    stem, extension = os.path.splitext(output)
    return f"{stem}-grid{extension}"


def write_sheet(files: Sequence[Path], sheet: Path, count: int, quiet: bool) -> None:
    """Writes the contact sheet of finished files. If there are `count` of each text, several, each has a row."""
    from .output import write_picture
    from .sheet import contact_sheet

    write_picture(contact_sheet(files, count if count > 1 else None), sheet)
    if not quiet:
        say(f"wrote {sheet}")
