"""Compares a bundle with torch and diffusers: every component on random inputs, then whole pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LDMTextToImagePipeline
from torch import nn

from engine import Pipeline
from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.backends.openvino.backend import OpenVinoBackend
from engine.bundle import Bundle
from engine.contract import PROMPT_TOKENS, Component, Family, Range, Sizes
from engine.errors import NumericalError
from engine.picture import Picture, psnr
from engine.sampling.catalog import sampler_name

from . import latent_diffusion, oracles
from .compare import (
    PICTURE_TOLERANCE,
    Difference,
    difference,
    differences,
    not_finite,
    random_inputs,
    tolerance,
    worst_of,
)
from .errors import VerificationError
from .graphs.tracing import EXAMPLE_SIZES
from .textless import TextlessPipeline

PROMPT = "a large red circle on a blue background"
PROMPTS = (PROMPT, "a small green star on a white background")
"""Two, to find a model that does not react to its text."""

SEED = 0
GUIDANCE = 7.5


@dataclass(frozen=True)
class Subjects:
    """What is on the pictures of a comparison: an argument of the pipeline's call, with values for one picture each,
    two of them to find a model that does not react to it. None: a picture is of nothing in particular."""

    argument: str | None
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return {"prompt": "two prompts", "class_labels": "two classes"}.get(self.argument or "", "one seed")

    def call(self, values: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a call that makes the pictures of these values."""
        if self.argument is None:
            return {"num_images_per_prompt": len(values)}
        guidance = {"guidance_scale": GUIDANCE} if self.argument == "prompt" else {}
        return {self.argument: list(values), **guidance}


def subjects_of(family: Family) -> Subjects:
    if family.tokenizers:
        return Subjects("prompt", PROMPTS)
    if family.classes is None:
        return Subjects(None, (None,))
    return Subjects("class_labels", tuple(sorted({0, family.classes - 1})))


SMALL = 50_000_000
"""Parameters of a U-Net up to which the whole picture is compared over 20 steps; larger ones take two."""


ODD_SIZES = {"batch": 1, "rows": 2, "tokens": 2 * PROMPT_TOKENS, "height": 9, "width": 16}


@dataclass(frozen=True)
class PictureDifference:
    """The largest differences of the bundle's pictures from diffusers' (float32) with the same seed, over all prompts
    (or classes, as texts)."""

    prompts: list[str]
    seed: int
    scheduler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    latents_max_abs: float
    pixels_within_1: float
    psnr_db: float


@dataclass(frozen=True)
class Reference:
    """Sets of inputs of a component and torch's outputs for them, in float32."""

    inputs: list[dict[str, np.ndarray]]
    outputs: list[list[np.ndarray]]


def reference(component: Component, module: nn.Module, sizes: Sizes) -> Reference:
    """A float32 module's outputs for two sets of random inputs. One set has odd latent sizes and two text chunks.
    `sizes` are the model's."""
    inputs = [random_inputs(component, {**one, **sizes}, seed) for seed, one in enumerate((EXAMPLE_SIZES, ODD_SIZES))]
    return Reference(inputs, [run_module(module, one) for one in inputs])


def run_module(module: nn.Module, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """A module's outputs."""
    with torch.no_grad():
        made = module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return [value.numpy() for value in (made if isinstance(made, tuple) else (made,))]


def check_component(
    component: Component, backend: OnnxRuntimeBackend | OpenVinoBackend, expected: Reference, precision: str
) -> Difference:
    """The largest difference of a component's outputs; VerificationError beyond the tolerance."""
    found = []
    for inputs, outputs in zip(expected.inputs, expected.outputs):
        made = backend.run(component.name, inputs)
        if (name := not_finite(component, made)) is not None:
            raise VerificationError(
                f"{component.name} gives values in its output {name} that are not finite; {_about_overflow(precision)}"
            )
        found.append(differences(component, made, outputs))
    worst, allowed = worst_of(found), tolerance(component, precision)
    if worst.relative_rms > allowed:
        raise VerificationError(
            f"{component.name} differs from torch by {worst.relative_rms:.2e} (relative RMS); {allowed:.0e} is "
            f"allowed in {precision}. {_about_difference(precision)}"
        )
    return worst


def _about_difference(precision: str) -> str:
    """The advice for a difference beyond the tolerance."""
    exact = (
        "This is a fault of LatentRT: please report it with the name of the model, or pass"
        if precision == "fp32"
        else "Try --precision fp32, or"
    )
    return f"The old bundle is untouched. {exact} --no-verify to keep it anyway"


def _about_overflow(precision: str) -> str:
    """The advice for values that are not finite."""
    if precision == "fp32":
        return (
            "the model overflows in fp32, so there is no precision that it works in: its weights are damaged or were "
            "not trained"
        )
    return f"the model overflows in {precision}; build with --precision fp32"


def check_picture(theirs: Pictures, folder: Path, precision: str) -> tuple[PictureDifference, Picture]:
    """Compares the bundle's pictures of the subjects with diffusers' in float32. Returns the largest differences and
    the first picture.

    The calls make as many pictures as the bundle allows, with the model's own scheduler. VerificationError beyond the
    tolerance, or if the subject makes no difference.
    """
    bundle = Bundle.open(folder, verify=False)
    ours, picture = _with_bundle(bundle, theirs, precision)
    subjects = theirs.subjects
    if _is_deaf(ours, subjects):
        raise VerificationError(
            f"the bundle does not react to the {_what(subjects)}: {subjects.values[0]!r} and {subjects.values[1]!r} "
            "give the same picture, but not with diffusers. This is a fault of LatentRT: please report it with the "
            "name of the model"
        )
    found = _compare(ours, theirs, scheduler_of(bundle))
    if found.psnr_db < PICTURE_TOLERANCE[precision]:
        raise VerificationError(
            f"the picture differs from diffusers': PSNR {found.psnr_db:.1f} dB, at least "
            f"{PICTURE_TOLERANCE[precision]:.0f} dB is allowed in {precision}. {_about_difference(precision)}"
        )
    return found, picture


def _compare(ours: Sequence[_Made], theirs: Pictures, scheduler: str) -> PictureDifference:
    pairs = list(zip(ours, theirs.made))
    subjects = theirs.subjects
    return PictureDifference(
        [str(value) for value in subjects.values] if subjects.argument else [],
        SEED,
        scheduler,
        theirs.steps,
        subjects.call(subjects.values).get("guidance_scale", 1.0),
        theirs.height,
        theirs.width,
        max(difference(our.latents, their.latents).max_abs for our, their in pairs),
        min(float((np.abs(our.pixels.astype(int) - their.pixels.astype(int)) <= 1).mean()) for our, their in pairs),
        min(psnr(our.pixels, their.pixels) for our, their in pairs),
    )


@dataclass(frozen=True)
class _Made:
    """One picture: latents [4, h, w] and pixels [H, W, 3] uint8."""

    latents: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Pictures:
    """diffusers' pictures, one of each subject, and how they were made."""

    made: list[_Made]
    height: int
    width: int
    steps: int
    subjects: Subjects


def seeds_of(pictures: Pictures) -> Sequence[int]:
    """The seeds for comparisons of several pictures: a few for a small model, one for a large one."""
    return range(4) if pictures.steps > 2 else [SEED]


def _is_deaf(pictures: Sequence[_Made], subjects: Subjects) -> bool:
    """Whether the two subjects gave equal latents."""
    return len(subjects.values) > 1 and np.array_equal(pictures[0].latents, pictures[1].latents)


def _what(subjects: Subjects) -> str:
    return "text" if subjects.argument == "prompt" else "class"


def calls(batch: Range, values: Sequence[Any] = PROMPTS) -> list[list[Any]]:
    """The values of each call that makes a picture of each with a bundle for so many pictures in a call: all in one
    call, or one a call."""
    size = min(max(len(values), batch.min), batch.max)
    return [[value] for value in values] if size == 1 else [[values[i % len(values)] for i in range(size)]]


def scheduler_of(bundle: Bundle) -> str:
    """The model's own sampler."""
    return sampler_name(None, bundle.schedule())


def _with_bundle(bundle: Bundle, theirs: Pictures, precision: str) -> tuple[list[_Made], Picture]:
    """The bundle's pictures, one of each subject at least, and the first one with its parameters."""
    made: list[_Made] = []
    pictures: list[Picture] = []
    last: dict[str, np.ndarray] = {}
    try:
        with Pipeline.load(bundle.folder, backend="onnxruntime", verify=False) as pipeline:
            for values in calls(bundle.shapes.batch, theirs.subjects.values):
                images = pipeline(
                    **theirs.subjects.call(values),
                    **oracles.beside_text(bundle.family.joins, theirs.height, theirs.width, len(values)),
                    height=theirs.height,
                    width=theirs.width,
                    num_inference_steps=theirs.steps,
                    seed=[SEED] * len(values),
                    scheduler=scheduler_of(bundle),
                    progress=False,
                    callback_on_step_end=lambda _, i, t, tensors: last.update(tensors),
                ).images
                made += [_Made(latents.copy(), np.asarray(image)) for latents, image in zip(last["latents"], images)]
                pictures += images
    except NumericalError as error:
        raise VerificationError(f"{str(error).split(';')[0]}; {_about_overflow(precision)}") from error
    return made, pictures[0]


def with_diffusers(
    pipeline: DiffusionPipeline | LDMTextToImagePipeline | TextlessPipeline, height: int, width: int
) -> Pictures:
    """diffusers' own pictures. VerificationError if the subjects make no difference."""
    small = sum(p.numel() for p in pipeline.unet.parameters()) <= SMALL
    steps = 20 if small else 2
    if isinstance(pipeline, TextlessPipeline):
        subjects = subjects_of(pipeline.family)
        made = [_draw_textless(pipeline, value or 0, (height, width), steps) for value in subjects.values]
    else:
        subjects = Subjects("prompt", PROMPTS)
        kind: Any = _draw_latent if isinstance(pipeline, LDMTextToImagePipeline) else _draw
        made = [kind(pipeline, prompt, height, width, steps) for prompt in PROMPTS]
    if _is_deaf(made, subjects):
        cure = (
            "Its tokenizer or text encoder is not the one that it was trained with" if _what(subjects) == "text" else ""
        )
        raise VerificationError(
            f"the model does not react to the {_what(subjects)}: {subjects.values[0]!r} and {subjects.values[1]!r} "
            f"give the same picture, with diffusers too. {cure}"
        )
    return Pictures(made, height, width, steps, subjects)


def _draw_textless(pipeline: TextlessPipeline, label: int, size: tuple[int, int], steps: int) -> _Made:
    sample, pixels = pipeline(label, torch.Generator().manual_seed(SEED), size, steps)
    return _Made(sample.numpy(), pixels.numpy())


def _draw_latent(pipeline: LDMTextToImagePipeline, prompt: str, height: int, width: int, steps: int) -> _Made:
    latents, values = latent_diffusion.draw(
        pipeline,
        prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
    )
    return _Made(latents.numpy(), torch.round(values * 255).to(torch.uint8).numpy())


@torch.no_grad()
def _draw(pipeline: DiffusionPipeline, prompt: str, height: int, width: int, steps: int) -> _Made:
    latents = pipeline(
        [prompt],
        **oracles.as_in_diffusers(oracles.joins_of(pipeline), height, width),
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pixels = torch.round((image / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)[0].permute(1, 2, 0)
    return _Made(latents[0].numpy(), pixels.numpy())
