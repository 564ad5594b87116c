"""Bundle against torch and diffusers: every component on random inputs, then a whole picture."""
from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import nn

from engine import Pipeline
from engine.backends.onnxruntime import OnnxRuntimeBackend
from engine.backends.openvino import OpenVinoBackend
from engine.bundle import Bundle
from engine.contract import OUTPUTS, SLOTS
from engine.errors import UnknownSchedulerError
from engine.picture import Picture, psnr
from engine.samplers import sampler_name
from engine.schedule import Schedule

from .checkpoint import Source
from .compare import PICTURE_TOLERANCE, Difference, compared, difference, tolerance
from .errors import VerificationError
from .to_onnx import Example, example

PROMPT = "a large red circle on a blue background"
SEED = 0
GUIDANCE = 7.5
SMALL = 50_000_000
"""Parameters of a U-Net up to which the whole picture is compared over 20 steps; larger ones take two."""


@dataclass(frozen=True)
class PictureDifference:
    """A picture of the bundle beside diffusers' (float32) from the same seed."""

    prompt: str
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
    """What a float32 module makes of two sets of random inputs, of which one has odd latent sizes and two text chunks."""
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


def check_component(component: str, backend: OnnxRuntimeBackend | OpenVinoBackend, expected: Reference, precision: str) -> Difference:
    """The largest difference of a component's outputs; VerificationError beyond the tolerance."""
    found = []
    for one, outputs in zip(expected.inputs, expected.outputs):
        made = backend.run(component, {name: value.numpy() for name, value in one.inputs.items()})
        for name, actual, wanted in zip(OUTPUTS[component], made, outputs):
            actual, wanted = compared(component, name, actual), compared(component, name, wanted)
            if not np.isfinite(actual.astype(np.float32)).all():
                raise VerificationError(f"{component} gives values that are not finite in its output {name}; build with --precision fp32 or bf16")
            found.append(difference(actual, wanted))
    worst = Difference(max(d.max_abs for d in found), max(d.relative_rms for d in found))
    allowed = tolerance(component, precision)
    if worst.relative_rms > allowed:
        raise VerificationError(f"{component} differs from torch by {worst.relative_rms:.2e} (relative RMS); {allowed:.0e} is "
                                f"allowed in {precision}. The old bundle is untouched. Try --precision fp32, or --no-verify to keep it anyway")
    return worst


def check_picture(source: Source, folder: Path, precision: str) -> tuple[PictureDifference, Picture]:
    """A whole picture of the bundle against diffusers in float32: the numbers, and the picture. VerificationError beyond
    the tolerance."""
    bundle = Bundle.open(folder, verify=False)
    height, width = bundle.shapes.height.opt, bundle.shapes.width.opt
    scheduler = scheduler_of(bundle)
    latents, pixels, steps = _with_diffusers(source, scheduler, height, width)
    gc.collect()
    final: dict[str, np.ndarray] = {}
    with Pipeline.load(folder, backend="onnxruntime", verify=False) as pipeline:
        made = pipeline(PROMPT, height, width, steps, GUIDANCE, seed=SEED, scheduler=scheduler, progress=False,
                        callback_on_step_end=lambda _, i, t, tensors: final.update(tensors))
    picture = made.images[0]
    ours = np.asarray(picture)
    found = PictureDifference(
        PROMPT, SEED, scheduler, steps, GUIDANCE, height, width, difference(final["latents"], latents).max_abs,
        float((np.abs(ours.astype(int) - pixels.astype(int)) <= 1).mean()), psnr(ours, pixels))
    if found.psnr_db < PICTURE_TOLERANCE[precision]:
        raise VerificationError(f"the picture differs from diffusers': PSNR {found.psnr_db:.1f} dB, at least {PICTURE_TOLERANCE[precision]:.0f} dB is "
                                f"allowed in {precision}. The old bundle is untouched. Try --precision fp32, or --no-verify to keep it anyway")
    return found, picture


def scheduler_of(bundle: Bundle) -> str:
    """The model's own sampler, DDIM where there is none of that name."""
    try:
        return sampler_name(None, Schedule.from_config(bundle.scheduler))
    except UnknownSchedulerError:
        return "ddim"


def _with_diffusers(source: Source, scheduler: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Latents [1, 4, h, w], pixels [H, W, 3] uint8 and the number of steps of diffusers' own run."""
    pipeline = source.pipeline()
    if scheduler == "ddim":
        pipeline.scheduler = diffusers.DDIMScheduler.from_config({**pipeline.scheduler.config, "clip_sample": False})
    steps = 20 if sum(p.numel() for p in pipeline.unet.parameters()) <= SMALL else 2
    with torch.no_grad():
        latents = pipeline(PROMPT, height=height, width=width, num_inference_steps=steps, guidance_scale=GUIDANCE,
                           generator=torch.Generator().manual_seed(SEED), output_type="latent").images
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pixels = torch.round((image / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)[0].permute(1, 2, 0)
    return latents.numpy(), pixels.numpy(), steps
