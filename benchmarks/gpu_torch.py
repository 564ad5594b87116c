"""The parts of benchmarks.gpu that run torch: references in float32, and diffusers' latency. The last line printed is
JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import diffusers
import numpy as np
import torch

from benchmarks.gpu_tensorrt import GUIDANCE, PICTURE_STEPS, PROMPT, percentiles
from engine.contract import Range, Shapes
from engine.family import STABLE_DIFFUSION
from export.compare import random_inputs
from export.graphs.recipes import RECIPES
from export.libraries import quiet_libraries
from export.sources.checkpoint import Source, resolve


def reference(source: Source, side: int, file: Path, device: str) -> dict[str, Any]:
    """Random inputs of every component, and torch's outputs for them in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    arrays: dict[str, np.ndarray] = {}
    for component in STABLE_DIFFUSION.components:
        recipe = RECIPES[component.name]
        inputs = random_inputs(component, picture_sizes(source, side))
        module = recipe.module(source.load(recipe.part), torch.float32).to(device)
        with torch.no_grad():
            made = module(**{name: torch.from_numpy(value).to(device) for name, value in inputs.items()})
        outputs = made if isinstance(made, tuple) else (made,)
        arrays |= {f"{component.name}/{name}": value for name, value in inputs.items()}
        named = zip(component.output_names, outputs)
        arrays |= {f"{component.name}/{name}": value.cpu().numpy() for name, value in named}
        del module, made, outputs
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return {"file": str(file)}


def picture_sizes(source: Source, side: int) -> dict[str, int]:
    """The sizes of every dimension for one guided picture of `side` x `side` pixels."""
    pixels, one = Range(side, side, side), Range(1, 1, 1)
    return {**Shapes(pixels, pixels, one).sizes(STABLE_DIFFUSION.factor), **source.sizes()}


def prepared(source: Source, device: str, dtype: torch.dtype) -> Any:
    """diffusers' pipeline with DDIM, without a progress bar."""
    pipeline = source.pipeline()
    pipeline.scheduler = diffusers.DDIMScheduler.from_config({**pipeline.scheduler.config, "clip_sample": False})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def picture(source: Source, side: int, file: Path, device: str) -> dict[str, Any]:
    """diffusers' picture in float32, from noise that is drawn on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    made = prepared(source, device, torch.float32)(
        PROMPT,
        height=side,
        width=side,
        num_inference_steps=PICTURE_STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    )
    np.save(file, np.asarray(made.images[0]))
    return {"file": str(file)}


def latency(
    source: Source, side: int, mode: str, device: str, steps: list[int], pictures: int, warmup: int
) -> dict[str, Any]:
    """Whole pictures in fp16 with channels_last, eager or compiled; a step is the slope over two numbers of steps."""
    gpu = device != "cpu"
    pipeline = prepared(source, device, torch.float16 if gpu else torch.float32)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    if mode != "eager":
        pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode, fullgraph=True)

    def make(index: int, count: int) -> float:
        started = perf_counter()
        pipeline(
            f"{PROMPT}, number {index}",
            height=side,
            width=side,
            num_inference_steps=count,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(index),
            output_type="np",
        )
        if gpu:
            torch.cuda.synchronize()
        return 1000 * (perf_counter() - started)

    first = make(0, steps[0])
    found: dict[str, Any] = {}
    for count in steps:
        samples = [make(i, count) for i in range(warmup + pictures)][warmup:]
        found[str(count)] = {"whole_ms": percentiles(samples)}
        print(f"{mode}, {count} steps: picture {found[str(count)]['whole_ms']['p50']:.2f} ms", flush=True)
    result = {
        "mode": mode,
        "first_picture_s": round(first / 1000, 2),
        "steps": found,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1) if gpu else None,
    }
    if len(steps) > 1:
        medians = [found[str(count)]["whole_ms"]["p50"] for count in steps]
        result["step_ms_by_slope"] = round(statistics.linear_regression(steps, medians).slope, 4)
    return result


def step(source: Source, side: int, mode: str, device: str, repeats: int = 50) -> dict[str, Any]:
    """One evaluation of diffusers' U-Net with guidance (2 rows) in fp16 with channels_last, eager or compiled."""
    gpu = device != "cpu"
    dtype = torch.float16 if gpu else torch.float32
    loaded: Any = source.load("unet")
    unet = loaded.to(device, dtype, memory_format=torch.channels_last).eval()
    text_shape = STABLE_DIFFUSION["denoiser"].shapes(picture_sizes(source, side))["context"]
    sample = torch.randn(2, *STABLE_DIFFUSION.plane(side, side), device=device, dtype=dtype)
    text = torch.randn(text_shape, device=device, dtype=dtype)
    timestep = torch.tensor([500, 500], device=device)
    run = unet if mode == "eager" else torch.compile(unet, mode=mode, fullgraph=True)
    samples = []
    with torch.no_grad():
        for _ in range(5 + (repeats if gpu else 3)):
            if gpu:
                torch.cuda.synchronize()
            started = perf_counter()
            run(sample, timestep, encoder_hidden_states=text)
            if gpu:
                torch.cuda.synchronize()
            samples.append(1000 * (perf_counter() - started))
    found = {
        "mode": mode,
        "step_ms": round(statistics.median(samples[5:]), 4),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    print(f"{mode}: U-Net {found['step_ms']:.3f} ms", flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu_torch")
    p.add_argument("part", choices=["reference", "picture", "latency", "step"])
    p.add_argument(
        "--model", default="", help="a known architecture, with random weights; nothing is the built-in model"
    )
    p.add_argument("--side", type=int, required=True)
    p.add_argument("--device", default="cuda")
    p.add_argument("--file", type=Path)
    p.add_argument("--mode", choices=["eager", "max-autotune", "reduce-overhead"], default="eager")
    p.add_argument("--steps", type=lambda text: [int(n) for n in text.split(",")], default=[20])
    p.add_argument("--pictures", type=int, default=20)
    p.add_argument("--warmup", type=int, default=3)
    o = p.parse_args()
    if o.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} has no CUDA here; install a build that has, or try the command out with "
            "--torch-device cpu"
        )
    quiet_libraries()
    source = resolve(o.model or None, bool(o.model))
    found = (
        step(source, o.side, o.mode, o.device)
        if o.part == "step"
        else reference(source, o.side, o.file, o.device)
        if o.part == "reference"
        else picture(source, o.side, o.file, o.device)
        if o.part == "picture"
        else latency(source, o.side, o.mode, o.device, o.steps, o.pictures, o.warmup)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
