"""What the settings of the libraries give, and what the exact savings do: one change at a time, each in a process of its own.

The denoiser runs at the bundle's best size with guidance. The exact savings are those of the OpenVINO backend: the graph is cut in
parts, so that what follows from the text alone runs once a loop instead of once a step, and what does not depend on the text once
for both rows of a sample; and it is rewritten to need fewer operations. What follows from the timestep alone could run for all
steps together: its time is a column.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import statistics
from benchmarks.errors import SideError
from benchmarks.latency import progress
from benchmarks.report import conditions, print_table, write_json
from benchmarks.sides import ROOT, peak_bytes
from engine.bundle import Bundle
from engine.contract import LATENT_CHANNELS, PROMPT_TOKENS, SLOTS, VAE_FACTOR

ONNXRUNTIME: dict[str, dict[str, Any]] = {
    "as the backend does": {}, "optimization off": {"level": "ORT_DISABLE_ALL"}, "optimization basic": {"level": "ORT_ENABLE_BASIC"},
    "optimization all": {"level": "ORT_ENABLE_ALL"}, "memory arena on": {"arena": True}, "shapes static": {"static": True}, "1 thread": {"threads": 1},
    "threads do not spin": {"spin": False},
}
OPENVINO: dict[str, dict[str, Any]] = {
    "one graph, dynamic shapes": {"cut": False, "static": False, "rewrites": False},
    "one graph, static shapes": {"cut": False, "static": True, "rewrites": False},
    "in parts, nothing shared by rows, not rewritten": {"cut": True, "rewrites": False, "share": False},
    "in parts, not rewritten": {"cut": True, "rewrites": False},
    "in parts": {"cut": True}, "in parts, 1 thread": {"cut": True, "threads": 1},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, default=Path("engines/demo"), help="default: engines/demo")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="of each setting in each round (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all settings, in turn (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(options: argparse.Namespace) -> None:
    """Measures every setting in turn, prints tables and writes the numbers; Ctrl-C keeps the rounds that are complete."""
    bundle = Bundle.open(options.bundle, verify=False)
    jobs = {("onnxruntime", "fp32", name): change for name, change in ONNXRUNTIME.items()}
    jobs |= {("openvino", precision, name): change for precision in ("fp32", "bf16") for name, change in OPENVINO.items()}
    rounds: list[dict[tuple[str, str, str], dict[str, Any]]] = []
    interrupted = False
    try:
        for number in range(options.rounds):
            found = {}
            for key, change in jobs.items():
                progress(f"round {number + 1} of {options.rounds}: {', '.join(key)}")
                found[key] = _in_process({"graph": str(bundle.graphs["denoiser"]), "library": key[0], "precision": key[1], "runs": options.runs,
                                          "height": bundle.shapes.height.opt, "width": bundle.shapes.width.opt, **change})
            rounds.append(found)
    except KeyboardInterrupt:
        interrupted = True
    progress("")
    tables = [table(rounds), sampler_table(bundle.shapes.height.opt, bundle.shapes.width.opt)]
    for rows in tables:
        print_table(list(rows[0]), [[f"{value:.4g}" if isinstance(value, float) else value for value in row.values()] for row in rows])
    samples = [{" / ".join(key): value for key, value in found.items()} for found in rounds]
    write_json(options.json, {"benchmark": "settings", "bundle": bundle.name, "interrupted": interrupted, "tables": statistics.as_json(tables),
                              "rounds": statistics.as_json(samples), **conditions()})


def table(rounds: list[dict[tuple[str, str, str], dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each setting: medians over the rounds, and the time of a step as a share of that of its library's first setting."""
    rows = []
    for key in rounds[0] if rounds else []:
        library, precision, name = key
        base = next(other for other in rounds[0] if other[:2] == key[:2])
        middle = {field: float(np.median([found[key][field] for found in rounds])) for field in ("create", "step", "context", "timestep", "sample")}
        share = statistics.summarize([found[key]["step"] / found[base]["step"] for found in rounds])
        rows.append({"library": library, "precision": precision, "setting": name, "create s": middle["create"], "step ms": 1e3 * middle["step"],
                     "of the first": share.p50, "spread": share.spread, "text ms": 1e3 * middle["context"], "timestep ms": 1e3 * middle["timestep"],
                     "before the text ms": 1e3 * middle["sample"],
                     "peak GiB": max(found[key]["peak"] for found in rounds) / 2**30})
    return rows


def _in_process(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.settings", json.dumps(job)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SideError(f"the process for {job} ended with status {done.returncode}; what it printed above says why")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def inputs_of(context_size: int, height: int, width: int, batch: int = 1) -> dict[str, np.ndarray]:
    """Random inputs of one step with two rows for one guided picture of so many pixels, or for two pictures."""
    random, plane = np.random.default_rng(0), (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
    shapes = {"state": (batch, SLOTS, *plane), "context": (2, PROMPT_TOKENS, context_size), "mixing": (batch, 2), "update": (batch, SLOTS, SLOTS + 2),
              "noise": (batch, *plane)}
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**made, "row_sample": np.arange(2, dtype=np.int32) % batch, "timestep": np.full(2, 500.0, np.float32)}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds to create and for each run (median), peak memory; of the parts too, where the graph was cut."""
    started = perf_counter()
    step, parts = (_onnxruntime if job["library"] == "onnxruntime" else _openvino)(job)
    found = {"create": perf_counter() - started, "context": 0.0, "timestep": 0.0, "sample": 0.0}
    found |= {name: _median(part, job["runs"]) for name, part in {**parts, "step": step}.items()}
    return {**found, "peak": peak_bytes()}


def _median(run: Callable[[], Any], runs: int) -> float:
    run()
    times = []
    for _ in range(runs):
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return float(np.median(times))


def _onnxruntime(job: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    import onnxruntime

    from engine.backends.onnxruntime import OnnxRuntimeBackend
    graph = Path(job["graph"])
    options = OnnxRuntimeBackend({"denoiser": graph})._options(graph)
    if "level" in job:
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, job["level"])
    if "arena" in job:
        options.enable_cpu_mem_arena = job["arena"]
    if "threads" in job:
        options.intra_op_num_threads = job["threads"]
    if "spin" in job:
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(job["spin"])))
    if job.get("static"):
        sizes = {"batch": 1, "rows": 2, "tokens": PROMPT_TOKENS, "height": job["height"] // VAE_FACTOR, "width": job["width"] // VAE_FACTOR}
        for name, size in sizes.items():
            options.add_free_dimension_override_by_name(name, size)
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    context_size = next(value.shape[2] for value in session.get_inputs() if value.name == "context")
    inputs = inputs_of(context_size, job["height"], job["width"])
    return (lambda: session.run(None, inputs)), {}


def _openvino(job: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    from engine.backends.openvino import OpenVinoBackend
    from engine.backends.openvino_parts import fix_shapes
    backend = OpenVinoBackend({"denoiser": Path(job["graph"])}, threads=job.get("threads"), precision={"denoiser": job["precision"]})
    if not job.get("rewrites", True):
        backend.rewrites = ()
    batch = 1 if job.get("share", True) else 2  # two pictures without guidance have as many rows, and nothing to share
    model = backend.read("denoiser")
    inputs = inputs_of(model.input("context").get_partial_shape()[2].get_length(), job["height"], job["width"], batch)
    if job["cut"]:
        del model
        runners = backend.denoiser(batch, 2, *inputs["noise"].shape[2:])
        runners.run(inputs)
        return runners.step, {"context": runners.context.run, "timestep": runners.timestep.run, "sample": runners.sample.run}
    if job["static"]:
        fix_shapes(backend._library, model, {name: value.shape for name, value in inputs.items()})
    runner = backend.compile("denoiser", model, job["precision"], "the denoiser")
    del model
    for name, value in inputs.items():
        runner.bind(name, value)
    return runner.run, {}


def sampler_table(height: int, width: int, runs: int = 300) -> list[dict[str, Any]]:
    """What guidance and the sampler's update take alone, in several forms."""
    inputs = inputs_of(1, height, width)
    rows = np.random.default_rng(1).standard_normal((2, inputs["noise"].size)).astype(np.float32)
    columns = np.empty((1, SLOTS + 2, rows.shape[1]), np.float32)
    next_state = np.empty((1, SLOTS, rows.shape[1]), np.float32)

    def with_numpy() -> None:
        columns[:, :SLOTS] = inputs["state"].reshape(1, SLOTS, -1)
        np.matmul(inputs["mixing"], rows, out=columns[:, SLOTS])
        columns[:, SLOTS + 1] = inputs["noise"].reshape(1, -1)
        np.matmul(inputs["update"], columns, out=next_state)

    forms = {"NumPy": with_numpy, **{f"ONNX Runtime, {form}": _sampler_graph(form, inputs, rows, "onnxruntime") for form in ("MatMul", "Mul and ReduceSum")},
             **{f"OpenVINO, {form}": _sampler_graph(form, inputs, rows, "openvino") for form in ("MatMul", "Mul and ReduceSum")}}
    return [{"guidance and sampler alone": name, "µs": 1e6 * _median(form, runs)} for name, form in forms.items()]


def _sampler_graph(form: str, inputs: dict[str, np.ndarray], rows: np.ndarray, library: str) -> Callable[[], Any]:
    """The denoiser's last operations as a graph of their own, with matrix products or with elementwise ones and sums."""
    from onnx import TensorProto, helper
    size = rows.shape[1]
    feeds = {"state": inputs["state"].reshape(1, SLOTS, size), "output": rows, "mixing": inputs["mixing"], "update": inputs["update"],
             "noise": inputs["noise"].reshape(1, 1, size)}
    node = helper.make_node
    if form == "MatMul":
        nodes = [node("MatMul", ["mixing", "output"], ["mixed"]), node("Unsqueeze", ["mixed", "one"], ["guided"]),
                 node("Concat", ["state", "guided", "noise"], ["columns"], axis=1), node("MatMul", ["update", "columns"], ["next"])]
    else:
        nodes = [node("Unsqueeze", ["mixing", "two"], ["weights"]), node("Mul", ["weights", "output"], ["weighted"]),
                 node("ReduceSum", ["weighted", "one"], ["guided"], keepdims=1), node("Concat", ["state", "guided", "noise"], ["columns"], axis=1),
                 node("Unsqueeze", ["update", "three"], ["factors"]), node("Unsqueeze", ["columns", "one"], ["wide"]),
                 node("Mul", ["factors", "wide"], ["terms"]), node("ReduceSum", ["terms", "two"], ["next"], keepdims=0)]
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in feeds.items()]
    axes = [helper.make_tensor(name, TensorProto.INT64, [1], [number]) for number, name in enumerate(("one", "two", "three"), 1)
            if any(name in one.input for one in nodes)]
    graph = helper.make_graph(nodes, "sampler", kinds, [helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, SLOTS, size])], axes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    if library == "onnxruntime":
        import onnxruntime
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feeds)
    import openvino
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    for name, value in feeds.items():
        request.get_tensor(name).data[:] = value
    return lambda: request.infer()


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
