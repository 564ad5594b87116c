"""Seconds to turn an adapter on and off, beside those that loading the pipeline takes, and a step with and without it.

The adapter is a random LoRA of every linear layer of the U-Net and the text encoder. "load" is `Pipeline.load` and the
first picture, "on" is `load_lora` and the next picture, "off" is `unload_lora` and the next one: whatever is compiled
late is in each of them. The picture takes one step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.latency import progress
from benchmarks.options import integer_from
from benchmarks.report import conditions, print_table, write_json
from engine import Pipeline
from engine.bundle import Bundle
from engine.weights import read_weights

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
SIZE = 0.01
"""Of the factors' values."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, default=Path("engines/demo"), metavar="FOLDER")
    parser.add_argument("--backend", default="onnxruntime,openvino", metavar="NAMES", help="default: both of the CPU")
    parser.add_argument("--rank", type=integer_from(1), default=16, metavar="N", help="of the LoRA (default: 16)")
    parser.add_argument("--steps", type=integer_from(1), default=10, metavar="N", help="that are timed (default: 10)")
    parser.add_argument("--turns", type=integer_from(1), default=3, metavar="N", help="on and off (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(options: argparse.Namespace) -> None:
    """Measures every backend, prints a table and writes the numbers."""
    bundle = Bundle.open(options.bundle, verify=False)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.safetensors"
        layers = write_lora(bundle, file, options.rank)
        for backend in options.backend.split(","):
            progress(backend)
            found.append({"backend": backend, **measure(options, backend, file)})
    progress("")
    print_table(*table(found))
    settings = {"bundle": bundle.name, "rank": options.rank, "layers": layers, "steps": options.steps}
    write_json(options.json, {"benchmark": "adapters", **settings, "backends": found, **conditions()})


def write_lora(bundle: Bundle, file: Path, rank: int) -> int:
    """A random LoRA of a bundle's linear layers, as kohya writes it. Returns the number of layers."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for layer, rows, columns in _linear_layers(bundle):
        tensors[f"{layer}.lora_down.weight"] = (SIZE * rng.standard_normal((rank, columns))).astype(np.float32)
        tensors[f"{layer}.lora_up.weight"] = (SIZE * rng.standard_normal((rows, rank))).astype(np.float32)
    _write_safetensors(file, tensors)
    return len(tensors) // 2


def _linear_layers(bundle: Bundle) -> Iterator[tuple[str, int, int]]:
    """The name in kohya's files, rows and columns of each."""
    for component in bundle.family.components:
        if component.adapted is None:
            continue
        for parameter, (weight, *_) in read_weights(bundle.graphs[component.name]).items():
            module, _, kind = parameter.rpartition(".")
            if kind == "weight" and len(weight.shape) == 2 and "embedding" not in module:
                rows, columns = weight.shape[::-1] if weight.transposed else weight.shape
                yield PREFIXES[component.adapted] + module.replace(".", "_"), rows, columns


def _write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    header, end = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    described = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(described).to_bytes(8, "little") + described)
        for array in tensors.values():
            out.write(array.tobytes())


def measure(options: argparse.Namespace, backend: str, file: Path) -> dict[str, Any]:
    """Median seconds of one backend. A turn times steps without the adapter, switches it on, and so on."""
    loading, pipeline = _timed(lambda: _loaded(options.bundle, backend))
    on, off, plain, changed = [], [], [], []
    with pipeline:
        for _ in range(options.turns):
            plain += _steps(pipeline, options.steps)
            on.append(_timed(lambda: (pipeline.load_lora(file), _steps(pipeline, 1)))[0])
            changed += _steps(pipeline, options.steps)
            off.append(_timed(lambda: (pipeline.unload_lora(), _steps(pipeline, 1)))[0])
            plain += _steps(pipeline, options.steps)
    seconds = {"on": on, "off": off, "step": plain, "step_with": changed}
    return {"load": loading, **{name: float(np.median(values)) for name, values in seconds.items()}}


def _loaded(folder: Path, backend: str) -> Pipeline:
    pipeline = Pipeline.load(folder, backend=backend)
    _steps(pipeline, 1)
    return pipeline


def _steps(pipeline: Pipeline, count: int) -> list[float]:
    """The seconds of each step of a picture."""
    return pipeline("a ring", num_inference_steps=count, seed=0, progress=False).timings.steps


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = perf_counter()
    made = work()
    return perf_counter() - started, made


def table(found: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of the results."""
    header = ["backend", "load, s", "on, s", "on / load", "off / load", "step, s", "step with / without"]
    rows = [
        [
            one["backend"],
            f"{one['load']:.2f}",
            f"{one['on']:.2f}",
            f"{one['on'] / one['load']:.2f}",
            f"{one['off'] / one['load']:.2f}",
            f"{one['step']:.3f}",
            f"{one['step_with'] / one['step']:.3f}",
        ]
        for one in found
    ]
    return header, rows
