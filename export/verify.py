"""Bundle against torch and diffusers: every component on random inputs, then a whole picture."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine import Pipeline
from engine.backends.onnxruntime import OnnxRuntimeBackend
from engine.backends.openvino.backend import OpenVinoBackend
from engine.bundle import Bundle
from engine.contract import OUTPUTS, SLOTS, Range
from engine.errors import NumericalError
from engine.picture import Picture, psnr
from engine.sampling.samplers import sampler_name
from engine.sampling.schedule import Schedule

from .compare import PICTURE_TOLERANCE, Difference, compared, difference, tolerance
from .errors import VerificationError
from .graphs.tracing import Example, example
from .sources.checkpoint import Source

PROMPT = "a large red circle on a blue background"
PROMPTS = (PROMPT, "a small green star on a white background")
"""Two, so that a model which does not react to its text is found out."""

SEED = 0
GUIDANCE = 7.5
SMALL = 50_000_000
"""Parameters of a U-Net up to which the whole picture is compared over 20 steps; larger ones take two."""


@dataclass(frozen=True)
class PictureDifference:
    """Pictures of the bundle beside diffusers' (float32) from the same seed: the worst of all prompts."""

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
    """Inputs of a component and what torch makes of them, in float32."""

    inputs: list[Example]
    outputs: list[list[np.ndarray]]


def reference(component: str, module: nn.Module, context_size: int) -> Reference:
    """What a float32 module makes of two sets of random inputs, of which one has odd latent sizes and two text
    chunks."""
    second = {"batch": 1, "rows": 2, "height": 9, "width": 16, "seed": 1}
    inputs = [example(component, context_size), example(component, context_size, **second, tokens=154)]
    outputs = []
    for one in inputs:
        if component == "denoiser":  # one slot shows the guided output alone, or a difference there would drown
            one.inputs["update"][:, 0] = 0.0
            one.inputs["update"][:, 0, SLOTS] = 1.0
        with torch.no_grad():
            made = module(**one.inputs)
        outputs.append([value.numpy() for value in (made if isinstance(made, tuple) else (made,))])
    return Reference(inputs, outputs)


def check_component(
    component: str, backend: OnnxRuntimeBackend | OpenVinoBackend, expected: Reference, precision: str
) -> Difference:
    """The largest difference of a component's outputs; VerificationError beyond the tolerance."""
    found = []
    for one, outputs in zip(expected.inputs, expected.outputs):
        made = backend.run(component, {name: value.numpy() for name, value in one.inputs.items()})
        for name, actual, wanted in zip(OUTPUTS[component], made, outputs):
            actual, wanted = compared(component, name, actual), compared(component, name, wanted)
            if not np.isfinite(actual.astype(np.float32)).all():
                raise VerificationError(
                    f"{component} gives values in its output {name} that are not finite; {_about_overflow(precision)}"
                )
            found.append(difference(actual, wanted))
    worst = Difference(max(d.max_abs for d in found), max(d.relative_rms for d in found))
    allowed = tolerance(component, precision)
    if worst.relative_rms > allowed:
        raise VerificationError(
            f"{component} differs from torch by {worst.relative_rms:.2e} (relative RMS); {allowed:.0e} is "
            f"allowed in {precision}. {_about_difference(precision)}"
        )
    return worst


def _about_difference(precision: str) -> str:
    """What to do about a difference beyond the tolerance."""
    exact = (
        "This is a fault of LatentRT: please report it with the name of the model, or pass"
        if precision == "fp32"
        else "Try --precision fp32, or"
    )
    return f"The old bundle is untouched. {exact} --no-verify to keep it anyway"


def _about_overflow(precision: str) -> str:
    """What to do about values that are not finite."""
    if precision == "fp32":
        return (
            "the model overflows in fp32, so there is no precision that it works in: its weights are damaged or were "
            "not trained"
        )
    return f"the model overflows in {precision}; build with --precision fp32"


def check_picture(source: Source, folder: Path, precision: str) -> tuple[PictureDifference, Picture]:
    """Pictures of two prompts by the bundle against diffusers' in float32: the worst numbers, and the first picture.

    They are made in calls of as many pictures as the bundle takes, with the model's own scheduler. VerificationError
    beyond the tolerance, and where the prompt makes no difference.
    """
    bundle = Bundle.open(folder, verify=False)
    height, width, scheduler = bundle.shapes.height.opt, bundle.shapes.width.opt, scheduler_of(bundle)
    theirs, steps = _with_diffusers(source, height, width)
    if _is_deaf(theirs):
        raise VerificationError(
            f"the model does not react to the text: {PROMPTS[0]!r} and {PROMPTS[1]!r} give the same picture, with "
            "diffusers too. "
            f"Its tokenizer or text encoder is not the one that it was trained with"
        )
    gc.collect()
    ours, picture = _with_bundle(folder, bundle.shapes.batch, height, width, steps, scheduler, precision)
    if _is_deaf(ours):
        raise VerificationError(
            f"the bundle does not react to the text: {PROMPTS[0]!r} and {PROMPTS[1]!r} give the same picture, but not "
            "with diffusers. "
            f"This is a fault of LatentRT: please report it with the name of the model"
        )
    found = PictureDifference(
        list(PROMPTS),
        SEED,
        scheduler,
        steps,
        GUIDANCE,
        height,
        width,
        max(difference(our.latents, their.latents).max_abs for our, their in zip(ours, theirs)),
        min(
            float((np.abs(our.pixels.astype(int) - their.pixels.astype(int)) <= 1).mean())
            for our, their in zip(ours, theirs)
        ),
        min(psnr(our.pixels, their.pixels) for our, their in zip(ours, theirs)),
    )
    if found.psnr_db < PICTURE_TOLERANCE[precision]:
        raise VerificationError(
            f"the picture differs from diffusers': PSNR {found.psnr_db:.1f} dB, at least "
            f"{PICTURE_TOLERANCE[precision]:.0f} dB is "
            f"allowed in {precision}. {_about_difference(precision)}"
        )
    return found, picture


@dataclass(frozen=True)
class _Made:
    """One picture: latents [4, h, w] and pixels [H, W, 3] uint8."""

    latents: np.ndarray
    pixels: np.ndarray


def _is_deaf(pictures: list[_Made]) -> bool:
    """Whether the first two prompts gave equal latents."""
    return np.array_equal(pictures[0].latents, pictures[1].latents)


def calls(batch: Range) -> list[list[str]]:
    """The prompts of the calls that make PROMPTS with a bundle for so many pictures at a time: together, or one by
    one."""
    size = min(max(len(PROMPTS), batch.min), batch.max)
    return [[prompt] for prompt in PROMPTS] if size == 1 else [[PROMPTS[i % len(PROMPTS)] for i in range(size)]]


def scheduler_of(bundle: Bundle) -> str:
    """The model's own sampler."""
    return sampler_name(None, Schedule.from_config(bundle.scheduler))


def _with_bundle(
    folder: Path, batch: Range, height: int, width: int, steps: int, scheduler: str, precision: str
) -> tuple[list[_Made], Picture]:
    """The bundle's pictures, one of each prompt at least, and the first one with its parameters."""
    made: list[_Made] = []
    pictures: list[Picture] = []
    last: dict[str, np.ndarray] = {}
    try:
        with Pipeline.load(folder, backend="onnxruntime", verify=False) as pipeline:
            for prompts in calls(batch):
                images = pipeline(
                    prompts,
                    height,
                    width,
                    steps,
                    GUIDANCE,
                    seed=[SEED] * len(prompts),
                    scheduler=scheduler,
                    progress=False,
                    callback_on_step_end=lambda _, i, t, tensors: last.update(tensors),
                ).images
                made += [_Made(latents.copy(), np.asarray(image)) for latents, image in zip(last["latents"], images)]
                pictures += images
    except NumericalError as error:
        raise VerificationError(f"{str(error).split(';')[0]}; {_about_overflow(precision)}") from error
    return made, pictures[0]


def _with_diffusers(source: Source, height: int, width: int) -> tuple[list[_Made], int]:
    """diffusers' own pictures, one of each prompt, and the number of steps."""
    pipeline = source.pipeline()
    steps = 20 if sum(p.numel() for p in pipeline.unet.parameters()) <= SMALL else 2
    made = []
    for prompt in PROMPTS:
        with torch.no_grad():
            latents = pipeline(
                prompt,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(SEED),
                output_type="latent",
            ).images
            image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        pixels = torch.round((image / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)[0].permute(1, 2, 0)
        made.append(_Made(latents[0].numpy(), pixels.numpy()))
    return made, steps
