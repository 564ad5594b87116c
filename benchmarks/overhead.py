"""The cost around the U-Net: host time of a step, import, process start to picture, installed size; ours and
diffusers'.

The host time of a step is that outside the U-Net call, at 64 x 64 latents and batch 1. Both loops run for real,
through their public pipelines, with a U-Net call that takes no time: ours with a session that returns at once,
diffusers with a module that returns a tensor made beforehand. diffusers' guidance and sampler run on the host and so
count; ours are part of the graph, and what they cost there is measured apart, on one graph of nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import weight
from benchmarks.errors import BenchmarkUsageError
from benchmarks.report import conditions, print_table, write_json
from benchmarks.settings import inputs_of, sampler_graph
from engine.bundle import Bundle
from engine.libraries import install_command, installed

STEPS = 200
REPEATS = 7
SIZE = 512
PROMPT = "a large red circle on a blue background"


class InstantSession:
    """Replaces an ONNX Runtime session; its runs take no time."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def get_inputs(self) -> Any:
        return self._real.get_inputs()

    def io_binding(self) -> Any:
        return self._real.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        pass


def seconds_per_step(run: Callable[[int], None]) -> list[float]:
    """Seconds that one more step adds to a whole call, including the tables and the noise that are made before the
    loop. One number for each repeat."""

    def seconds(steps: int) -> float:
        started = perf_counter()
        run(steps)
        return perf_counter() - started

    seconds(10)
    return [(seconds(STEPS) - seconds(1)) / (STEPS - 1) for _ in range(REPEATS)]


def ours(bundle: Path, scheduler: str) -> list[float]:
    """Seconds per step of our loop, one number for each repeat."""
    from engine import Pipeline

    with Pipeline.load(bundle, backend="onnxruntime") as pipeline:
        backend: Any = pipeline._backend
        backend._sessions["denoiser"] = InstantSession(backend.load("denoiser"))

        def run(steps: int) -> None:
            pipeline(PROMPT, SIZE, SIZE, steps, seed=0, scheduler=scheduler, output_type="latent", progress=False)

        return seconds_per_step(run)


def diffusers(scheduler_class: str) -> list[float]:
    """Seconds per step of diffusers' loop: scheduler, guidance, concatenation, callbacks."""
    import diffusers as library
    import torch

    from export.sources.checkpoint import resolve

    pipeline = resolve(None).pipeline()
    pipeline.scheduler = getattr(library, scheduler_class).from_config(pipeline.scheduler.config)
    output = torch.randn(2, 4, SIZE // 8, SIZE // 8)
    pipeline.unet.forward = lambda *arguments, **options: (output,)

    def run(steps: int) -> None:
        pipeline(
            PROMPT,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )

    return seconds_per_step(run)


def sampler_graph_seconds() -> float:
    """Seconds of guidance and sampler inside the graph: the denoiser's last operations alone, in ONNX Runtime."""
    inputs = inputs_of(1, SIZE, SIZE)
    run = sampler_graph("MatMul", inputs, np.ones((2, inputs["noise"].size), np.float32), "onnxruntime")
    for _ in range(20):
        run()
    started = perf_counter()
    for _ in range(STEPS):
        run()
    return (perf_counter() - started) / STEPS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bundle",
        type=Path,
        default=Path("engines/demo"),
        help="a bundle of the built-in model (default: engines/demo)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(options: argparse.Namespace) -> None:
    """Measures all of it, prints tables and writes the numbers."""
    Bundle.open(options.bundle, verify=False)
    if not installed("psutil"):
        raise BenchmarkUsageError(
            f"the memory of a process is measured with psutil; install it: {install_command('benchmarks')}"
        )
    from export.libraries import quiet_libraries

    quiet_libraries()
    rows, in_graph = steps_outside_unet()
    print_table(["scheduler", "ours, µs a step", "diffusers, µs a step", "ratio"], [list(row.values()) for row in rows])
    print(f"guidance and sampler inside our graph: {in_graph} µs a step more")
    processes, bare = weight.measure(options.bundle)
    print_table(["", "ours", "diffusers", "ratio", "lowest", "highest"], [list(row.values()) for row in processes])
    print(f"a bare Python process with psutil takes {bare} MiB")
    sizes = weight.installed_sizes()
    print_table(["installed", "packages", "MiB"], [list(row.values()) for row in sizes])
    write_json(
        options.json,
        {
            "benchmark": "overhead",
            "latents": f"{SIZE // 8}x{SIZE // 8}",
            "batch": 1,
            "steps": STEPS,
            "repeats": REPEATS,
            "rows": rows,
            "sampler_in_graph_us": in_graph,
            "processes": processes,
            "bare_process_mib": bare,
            "installed": sizes,
            **conditions(),
        },
    )


def steps_outside_unet() -> tuple[list[dict[str, Any]], float]:
    """Microseconds a step of both loops for some samplers, and of guidance and sampler in the graph."""
    from engine.contract import Range, Shapes
    from export.build import build
    from export.sources.checkpoint import resolve

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        side = Range(64, 64, SIZE)
        bundle = build(
            resolve(None),
            Path(folder),
            "fp32",
            Shapes(side, side, Range(1, 1, 1)),
            verify=False,
            report=lambda message: None,
        ).folder
        for name, scheduler_class in (
            ("ddim", "DDIMScheduler"),
            ("euler_a", "EulerAncestralDiscreteScheduler"),
            ("dpmpp_2m", "DPMSolverMultistepScheduler"),
            ("pndm", "PNDMScheduler"),
        ):
            a, b = statistics.median(ours(bundle, name)), statistics.median(diffusers(scheduler_class))
            rows.append(
                {
                    "scheduler": name,
                    "ours_us": round(1e6 * a, 1),
                    "diffusers_us": round(1e6 * b, 1),
                    "ratio": round(b / a, 1),
                }
            )
    return rows, round(1e6 * sampler_graph_seconds(), 1)
