"""The parts of benchmarks.gpu that run TensorRT. Needs the runtime's packages only; the last line printed is JSON."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.gpu_profile import fused_attention
from benchmarks.statistics import summarize
from engine import Pipeline
from engine.backends.tensorrt.cuda import Device
from engine.backends.tensorrt.runtime import TensorRtRuntime
from engine.bundle import Bundle
from engine.picture import psnr
from engine.plans import Plans
from export.compare import as_json, differences, not_finite, tolerance
from export.tensorrt.profiles import profile_inputs

PROMPT = "a large red circle on a blue background"
GUIDANCE = 7.5
PICTURE_STEPS = 20
STEPS_TIMED = 50


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    """`statistics.Summary` in plain values."""
    return {name: round(value, 4) for name, value in asdict(summarize(milliseconds)).items()}


def check(bundle: Path, file: Path) -> dict[str, Any]:
    """Each plan on the inputs of a reference file, against torch's outputs in it."""
    reference, found = np.load(file), {}
    opened = Bundle.open(bundle, verify=False)
    for component in opened.family.components:
        name = component.name
        runtime = TensorRtRuntime(family=opened.family)
        plans = Plans.find(opened, runtime.machine)
        if name not in plans.build["components"]:
            runtime.close()
            print(f"{name}: not built")
            continue
        runtime.load([(name, plans.read(name))])
        outputs = runtime.run(name, {tensor: reference[f"{name}/{tensor}"] for tensor in component.input_names})
        runtime.close()
        worst = differences(component, outputs, [reference[f"{name}/{tensor}"] for tensor in component.output_names])
        finite, allowed = not_finite(component, outputs) is None, tolerance(component, opened.precision)
        found[name] = {
            **as_json(worst),
            "finite": finite,
            "allowed": allowed,
            "good": finite and worst.relative_rms <= allowed,
        }
        print(f"{name}: {worst.relative_rms:.2e} from torch in float32, {allowed:.0e} is allowed")
    return found


def picture(bundle: Path, file: Path, png: Path) -> dict[str, Any]:
    """Our picture against diffusers' from the same seed, and whether CUDA graphs change it."""
    expected = np.load(file)
    made: dict[str, np.ndarray] = {}
    for graphs in (True, False):
        with Pipeline.load(bundle, backend="tensorrt", cuda_graphs=graphs) as pipeline:
            result = pipeline(
                PROMPT,
                num_inference_steps=PICTURE_STEPS,
                guidance_scale=GUIDANCE,
                seed=0,
                scheduler="ddim",
                progress=False,
            )
            made[result.timings["path"]] = np.asarray(result.images[0])
            if graphs:
                result.images[0].save(png)
                path = result.timings["path"]
    found = {
        "psnr_db": round(psnr(made[path], expected), 2),
        "path": path,
        "steps": PICTURE_STEPS,
        "graph_equals_plain": len(made) == 2 and np.array_equal(made["cuda_graph"], made["plain"]),
    }
    print(f"PSNR {found['psnr_db']} dB against diffusers in float32")
    return found


def latency(bundle: Path, steps: list[int], pictures: int, warmup: int) -> dict[str, Any]:
    """Whole pictures and their stages, with CUDA graphs and without; memory, load time, first picture."""
    found: dict[str, Any] = {}
    device = Device(0)
    for graphs in (True, False):
        with device:
            free = device.memory()[0]
        started = perf_counter()
        pipeline = Pipeline.load(bundle, backend="tensorrt", cuda_graphs=graphs)
        loaded = perf_counter()
        first = pipeline(
            PROMPT,
            num_inference_steps=steps[0],
            guidance_scale=GUIDANCE,
            seed=0,
            scheduler="ddim",
            progress=False,
            output_type="np",
        )
        first_seconds = perf_counter() - loaded
        numbers = {str(count): measure(pipeline, count, pictures, warmup) for count in steps}
        with device:
            used = free - device.memory()[0]
        found["cuda_graph" if graphs else "plain"] = {
            "path": first.timings["path"],
            "description": pipeline.description,
            "load_s": round(loaded - started, 3),
            "first_picture_s": round(first_seconds, 3),
            "device_mib": round(used / 2**20, 1),
            "steps": numbers,
        }
        pipeline.close()
    with device.closing():
        return found


def measure(pipeline: Pipeline, steps: int, pictures: int, warmup: int) -> dict[str, Any]:
    """Percentiles over pictures of a new prompt each, so that the text encoder runs for each; the negative prompt is
    cached."""
    samples: dict[str, list[float]] = {
        "whole_ms": [],
        "step_ms": [],
        "text_encoder_ms": [],
        "prepare_ms": [],
        "denoise_ms": [],
        "vae_decoder_ms": [],
    }
    host = device = 0.0
    for i in range(warmup + pictures):
        started = perf_counter()
        result = pipeline(
            f"{PROMPT}, number {i}",
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            seed=i,
            scheduler="ddim",
            progress=False,
            output_type="np",
        )
        whole = perf_counter() - started
        if i < warmup:
            continue
        times = result.timings
        samples["whole_ms"].append(1000 * whole)
        samples["step_ms"] += [1000 * step for step in times["steps"]]
        for stage in ("text_encoder", "prepare", "denoise", "vae_decoder"):
            samples[f"{stage}_ms"].append(1000 * times[stage])
        host += times["host"]["prepare"] + times["host"]["denoise"]
        device += times["prepare"] + times["denoise"]
    found: dict[str, Any] = {name: percentiles(values) for name, values in samples.items()}
    found["host_share_of_step"] = round(host / device, 4)
    print(
        f"{steps} steps: picture {found['whole_ms']['p50']:.2f} ms, step {found['step_ms']['p50']:.3f} ms, VAE "
        f"{found['vae_decoder_ms']['p50']:.2f} ms, "
        f"host {found['host_share_of_step']:.1%} of the loop"
    )
    return found


@contextmanager
def denoiser(bundle: Path) -> Iterator[tuple[TensorRtRuntime, dict[str, np.ndarray]]]:
    """The denoiser's plan alone, and inputs of the size that its first profile is best at."""
    opened = Bundle.open(bundle, verify=False)
    component = opened.family["denoiser"]
    runtime = TensorRtRuntime(family=opened.family)
    try:
        plans = Plans.find(opened, runtime.machine)
        runtime.load([(component.name, plans.read(component.name))])
        sizes = runtime.engines[component.name].model_sizes
        yield runtime, profile_inputs(opened.family, component, plans.profiles[0], sizes)
    finally:
        runtime.close()


def described(runtime: TensorRtRuntime) -> dict[str, Any]:
    """The denoiser's layers by the engine inspector: how many of each kind, and those that are fused attention."""
    with runtime.device:
        told = json.loads(runtime.engines["denoiser"].inspect())
    known = [layer if isinstance(layer, dict) else {"Name": layer} for layer in told["Layers"]]
    kinds, fused = Counter(str(layer.get("LayerType", "unknown")) for layer in known), fused_attention(known)
    tactics = Counter(str(layer.get("TacticName", ""))[:80] for layer in known)
    print(f"{len(known)} layers: {dict(kinds.most_common(8))}; {len(fused)} of fused attention")
    return {
        "layers": len(known),
        "kinds": dict(kinds.most_common()),
        "fused_attention": len(fused),
        "fused_attention_names": fused[:40],
        "tactics": dict(tactics.most_common(25)),
    }


def layers(bundle: Path) -> dict[str, Any]:
    """The layers of the denoiser's plan."""
    with denoiser(bundle) as (runtime, _):
        return described(runtime)


def step(bundle: Path) -> dict[str, Any]:
    """GPU time of one evaluation of the denoiser, captured and not, and its layers."""
    with denoiser(bundle) as (runtime, inputs):
        plain = runtime.seconds("denoiser", inputs, STEPS_TIMED + 3)[3:]
        with runtime.device:
            execution, watch = (
                runtime.engines["denoiser"].at({name: value.shape for name, value in inputs.items()}),
                runtime.stopwatch(),
            )
            with runtime.stream.capture() as made:
                execution.enqueue()
            for _ in range(STEPS_TIMED + 3):
                watch.mark()
                made[0].launch(runtime.stream)
            watch.mark()
            runtime.synchronize("timing captured steps")
            captured = watch.seconds()[3:]
            made[0].close()
        found = {
            "step_ms": round(1000 * median(captured), 4),
            "plain_ms": round(1000 * median(plain), 4),
            "step": percentiles([1000 * seconds for seconds in captured]),
        }
        print(f"step {found['step_ms']:.3f} ms, plain enqueue {found['plain_ms']:.3f} ms")
        return {**found, **described(runtime)}


def once(bundle: Path) -> dict[str, Any]:
    """One plain evaluation, for ncu to look at."""
    with denoiser(bundle) as (runtime, inputs):
        runtime.run("denoiser", inputs)
        return {}


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tensorrt")
    p.add_argument("part", choices=["check", "picture", "latency", "layers", "step", "once"])
    p.add_argument("--bundle", type=Path, required=True)
    p.add_argument("--file", type=Path)
    p.add_argument("--png", type=Path)
    p.add_argument("--steps", type=lambda text: [int(n) for n in text.split(",")], default=[20])
    p.add_argument("--pictures", type=int, default=20)
    p.add_argument("--warmup", type=int, default=3)
    o = p.parse_args()
    found = (
        check(o.bundle, o.file)
        if o.part == "check"
        else picture(o.bundle, o.file, o.png)
        if o.part == "picture"
        else latency(o.bundle, o.steps, o.pictures, o.warmup)
        if o.part == "latency"
        else {"layers": layers, "step": step, "once": once}[o.part](o.bundle)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
