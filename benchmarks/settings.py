"""Measures settings of the libraries and the exact savings: one change at a time, against the library's first setting.

The denoiser runs at the bundle's best size with guidance. Both settings have a process of their own and take turns, so
that a drift of the machine hits both, and the ratio is taken turn by turn. The exact savings are those of the OpenVINO
backend: the graph is cut in parts, so that what follows from the text alone runs once a loop instead of once a step,
and what does not depend on the text once for both rows of a sample; and it is rewritten to need fewer operations. What
follows from the timestep alone could run for all steps together: its time is a column.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import statistics
from benchmarks.errors import BenchmarkUsageError
from benchmarks.latency import SHORT, progress
from benchmarks.options import integer_from
from benchmarks.report import conditions, print_table, write_json
from benchmarks.worker import Worker, peak_bytes, serve
from engine.bundle import Bundle
from engine.contract import SLOTS, Range, Shapes
from engine.family import STABLE_DIFFUSION
from engine.libraries import import_library, installed
from export.compare import random_inputs

ONNXRUNTIME: dict[str, dict[str, Any]] = {
    "as the backend does": {},
    "optimization off": {"level": "ORT_DISABLE_ALL"},
    "optimization basic": {"level": "ORT_ENABLE_BASIC"},
    "optimization all": {"level": "ORT_ENABLE_ALL"},
    "memory arena on": {"arena": True},
    "shapes static": {"static": True},
    "1 thread": {"threads": 1},
    "threads do not spin": {"spin": False},
}
OPENVINO: dict[str, dict[str, Any]] = {
    "one graph, dynamic shapes": {"cut": False, "static": False, "rewrites": False},
    "one graph, static shapes": {"cut": False, "static": True, "rewrites": False},
    "in parts, nothing shared by rows, not rewritten": {"cut": True, "rewrites": False, "share": False},
    "in parts, not rewritten": {"cut": True, "rewrites": False},
    "in parts": {"cut": True},
    "in parts, 1 thread": {"cut": True, "threads": 1},
}
SETTLE = 0.2
"""Seconds that a setting runs before it counts: after a run ONNX Runtime's threads wait busily for a while, on the
processors of the other."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, default=Path("engines/demo"), help="default: engines/demo")
    parser.add_argument(
        "--turns",
        type=integer_from(1),
        default=20,
        metavar="N",
        help="of each setting and the first one of its library (default: 20)",
    )
    parser.add_argument("--runs", type=integer_from(1), default=20, metavar="N", help="in each turn (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(options: argparse.Namespace) -> None:
    """Measures every setting, prints tables and writes the numbers; Ctrl-C keeps the settings that are complete."""
    bundle = Bundle.open(options.bundle, verify=False)
    height, width = bundle.shapes.height.opt, bundle.shapes.width.opt
    found: list[dict[str, Any]] = []
    interrupted = False
    groups, skipped = _groups()
    for reason in skipped.values():
        print(f"skipped {reason}", flush=True)
    try:
        for (library, precision), settings in groups.items():
            job = {
                "graph": str(bundle.graphs["denoiser"]),
                "library": library,
                "precision": precision,
                "height": height,
                "width": width,
            }
            for row in _measure(job, settings, options.turns, options.runs):
                found.append(row)
    except KeyboardInterrupt:
        if not found:
            raise
        interrupted = True
    progress("")
    tables = [rows for rows in (found, sampler_table(height, width)) if rows]
    for rows in tables:
        print_table(
            list(rows[0]),
            [[f"{value:.4g}" if isinstance(value, float) else value for value in row.values()] for row in rows],
        )
    write_json(
        options.json,
        {
            "benchmark": "settings",
            "bundle": bundle.name,
            "turns": options.turns,
            "runs": options.runs,
            "interrupted": interrupted,
            "skipped": skipped,
            "tables": statistics.as_json(tables),
            **conditions(),
        },
    )


def _groups() -> tuple[dict[tuple[str, str], dict[str, dict[str, Any]]], dict[str, str]]:
    """The settings that this machine can run, by library and precision, and the reasons for those that it cannot
    run."""
    groups = {("onnxruntime", "fp32"): ONNXRUNTIME, ("openvino", "fp32"): OPENVINO, ("openvino", "bf16"): OPENVINO}
    skipped = {library: f"{library}: {library} is not installed" for library, _ in groups if not installed(library)}
    if "openvino" not in skipped:
        from engine.backends.openvino.backend import OpenVinoBackend

        if not OpenVinoBackend({}).has_bf16():
            skipped["openvino bf16"] = "openvino in bf16: this CPU has no instructions for it"
            del groups["openvino", "bf16"]
    groups = {key: settings for key, settings in groups.items() if key[0] not in skipped}
    if not groups:
        raise BenchmarkUsageError(f"there is nothing to measure ({'; '.join(skipped.values())})")
    return groups, skipped


def _measure(
    job: dict[str, Any], settings: dict[str, dict[str, Any]], turns: int, runs: int
) -> Iterator[dict[str, Any]]:
    """A row for each setting of a library. The first one is measured against itself."""
    with closing(Setting({**job, **next(iter(settings.values()))})) as first:
        for number, (name, change) in enumerate(settings.items(), 1):
            progress(f"{job['library']}, {job['precision']}: {name} ({number} of {len(settings)})")
            with closing(Setting({**job, **change})) as setting:
                pairs = [_turn(first, setting, runs, forward=turn % 2 == 0) for turn in range(turns)]
                yield _row(job, name, setting.loaded, setting.peak(), pairs)


def _turn(first: Setting, setting: Setting, runs: int, forward: bool) -> tuple[float, float]:
    """Seconds of a step of both, in this order or the other."""
    seconds = {one: one.step(runs) for one in ((first, setting) if forward else (setting, first))}
    return seconds[first], seconds[setting]


def _row(
    job: dict[str, Any], name: str, loaded: dict[str, float], peak: int, pairs: list[tuple[float, float]]
) -> dict[str, Any]:
    share = statistics.pair_ratios(*zip(*pairs))
    refused = statistics.refuse_noise("the ratio", share.spread)
    return {
        "library": job["library"],
        "precision": job["precision"],
        "setting": name,
        "create s": loaded["create"],
        "step ms": 1e3 * float(np.median([step for _, step in pairs])),
        "of the first": "refused" if refused else share.p50,
        "spread": share.spread,
        "text ms": 1e3 * loaded["loop"],
        "timestep ms": 1e3 * loaded["exact"],
        "before the text ms": 1e3 * loaded["sample"],
        "peak GiB": peak / 2**30,
    }


class Setting(Worker):
    """A process with one setting."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(f"{job['library']} with {job}", "benchmarks.settings")
        self.loaded = self.ask(job)

    def step(self, runs: int) -> float:
        """Seconds, the median of so many steps, after some that are not counted where they are short."""
        return float(self.ask({"runs": runs})["step"])

    def peak(self) -> int:
        """Bytes."""
        return int(self.ask({"finish": True})["peak_bytes"])


class Service:
    """The process's answers."""

    def __init__(self) -> None:
        self._step: Callable[[], Any] | None = None
        self._usual = 0.0

    def __call__(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._step is None:
            started = perf_counter()
            self._step, parts = (_onnxruntime if question["library"] == "onnxruntime" else _openvino)(question)
            created = perf_counter() - started
            self._usual = _median(self._step, 1)
            return {
                "create": created,
                "loop": 0.0,
                "exact": 0.0,
                "sample": 0.0,
                **{name: _median(part, 5) for name, part in parts.items()},
            }
        if "finish" in question:
            return {"peak_bytes": peak_bytes()}
        settled = perf_counter() + SETTLE
        while self._usual < SHORT and perf_counter() < settled:
            self._step()
        self._usual = _median(self._step, question["runs"])
        return {"step": self._usual}


DENOISER = STABLE_DIFFUSION["denoiser"]


def sizes_of(height: int, width: int, batch: int = 1) -> dict[str, int]:
    """The graphs' dimensions for one step with two rows: one guided picture of so many pixels, or two pictures."""
    ranges = (Range(size, size, size) for size in (height, width, batch, 2))
    return Shapes(*ranges).sizes(STABLE_DIFFUSION.factor)


def inputs_of(context_size: int, height: int, width: int, batch: int = 1) -> dict[str, np.ndarray]:
    """Random inputs of one step at `sizes_of`."""
    return random_inputs(DENOISER, {**sizes_of(height, width, batch), "context_size": context_size})


def _median(run: Callable[[], Any], runs: int) -> float:
    times = []
    for _ in range(runs):
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return float(np.median(times))


def _onnxruntime(job: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    from engine.backends.onnxruntime.backend import OnnxRuntimeBackend

    graph, onnxruntime = Path(job["graph"]), import_library("onnxruntime")
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
        for name, size in sizes_of(job["height"], job["width"]).items():
            options.add_free_dimension_override_by_name(name, size)
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    (context_size,) = (value.shape[2] for value in session.get_inputs() if value.name == "context")
    inputs = inputs_of(context_size, job["height"], job["width"])
    return (lambda: session.run(None, inputs)), {}


def _openvino(job: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    from engine.backends.openvino.backend import OpenVinoBackend
    from engine.backends.openvino.parts import fix_shapes

    backend = OpenVinoBackend(
        {"denoiser": Path(job["graph"])}, threads=job.get("threads"), precision={"denoiser": job["precision"]}
    )
    if not job.get("rewrites", True):
        backend.rewrites = ()
    batch = 1 if job.get("share", True) else 2  # two pictures without guidance have as many rows, and nothing to share
    model = backend.read("denoiser")
    inputs = inputs_of(model.input("context").get_partial_shape()[2].get_length(), job["height"], job["width"], batch)
    if job["cut"]:
        del model
        backend.run("denoiser", inputs)
        call = backend.call(sizes_of(job["height"], job["width"], batch))
        return (lambda: call.run(0)), {name: runner.run for name, runner in call.runners.items()}
    if job["static"]:
        fix_shapes(backend._library, model, {name: value.shape for name, value in inputs.items()})
    runner = backend.compile("denoiser", model, job["precision"], "the denoiser")
    del model
    for name, value in inputs.items():
        runner.bind(name, value)
    return runner.run, {}


def sampler_table(height: int, width: int, runs: int = 300) -> list[dict[str, Any]]:
    """Seconds of guidance and the sampler's update alone, in several forms."""
    inputs = inputs_of(1, height, width)
    rows = np.random.default_rng(1).standard_normal((2, inputs["noise"].size)).astype(np.float32)
    columns = np.empty((1, SLOTS + 2, rows.shape[1]), np.float32)
    next_state = np.empty((1, SLOTS, rows.shape[1]), np.float32)

    def with_numpy() -> None:
        columns[:, :SLOTS] = inputs["state"].reshape(1, SLOTS, -1)
        np.matmul(inputs["mixing"], rows, out=columns[:, SLOTS])
        columns[:, SLOTS + 1] = inputs["noise"].reshape(1, -1)
        np.matmul(inputs["update"], columns, out=next_state)

    forms = {
        "NumPy": with_numpy,
        **{
            f"{name}, {form}": sampler_graph(form, inputs, rows, library)
            for library, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO"))
            if installed(library)
            for form in ("MatMul", "Mul and ReduceSum")
        },
    }
    for form in forms.values():
        form()
    return [{"guidance and sampler alone": name, "µs": 1e6 * _median(form, runs)} for name, form in forms.items()]


def sampler_graph(form: str, inputs: dict[str, np.ndarray], rows: np.ndarray, library: str) -> Callable[[], Any]:
    """The denoiser's last operations as a graph of their own, with matrix products or with elementwise ones and
    sums."""
    from onnx import TensorProto, helper

    size = rows.shape[1]
    feeds = {
        "state": inputs["state"].reshape(1, SLOTS, size),
        "output": rows,
        "mixing": inputs["mixing"],
        "rescale": np.zeros_like(inputs["rescale"]),
        "update": inputs["update"],
        "noise": inputs["noise"].reshape(1, 1, size),
    }
    node = helper.make_node
    weights = [
        node("Unsqueeze", ["mixing", "one"], ["guiding"]),
        node("Unsqueeze", ["rescale", "one"], ["keeping"]),
        node("Concat", ["guiding", "keeping"], ["weights"], axis=1),
    ]
    if form == "MatMul":
        nodes = [
            *weights,
            node("MatMul", ["weights", "output"], ["mixed"]),
            *_rescaled(node),
            node("Concat", ["state", "guided", "noise"], ["columns"], axis=1),
            node("MatMul", ["update", "columns"], ["next"]),
        ]
    else:
        nodes = [
            *weights,
            node("Unsqueeze", ["weights", "three"], ["factors"]),
            node("Mul", ["factors", "output"], ["weighted"]),
            node("ReduceSum", ["weighted", "two"], ["mixed"], keepdims=0),
            *_rescaled(node),
            node("Concat", ["state", "guided", "noise"], ["columns"], axis=1),
            node("Unsqueeze", ["update", "three"], ["coefficients"]),
            node("Unsqueeze", ["columns", "one"], ["wide"]),
            node("Mul", ["coefficients", "wide"], ["terms"]),
            node("ReduceSum", ["terms", "two"], ["next"], keepdims=0),
        ]
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in feeds.items()]
    used = {name for one in nodes for name in one.input}
    constants = [
        helper.make_tensor(name, TensorProto.INT64, [1], [number])
        for number, name in enumerate(("zero", "one", "two", "three"))
        if name in used
    ] + [
        helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        for name, value in (("unit", 1.0), ("size", size), ("least", 1e-20))
    ]
    graph = helper.make_graph(
        nodes, "sampler", kinds, [helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, SLOTS, size])], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    if library == "onnxruntime":
        session = import_library("onnxruntime").InferenceSession(model, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feeds)
    core = import_library("openvino").Core()
    request = core.compile_model(
        core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    ).create_infer_request()
    for name, value in feeds.items():
        request.get_tensor(name).data[:] = value
    return lambda: request.infer()


def _rescaled(node: Callable[..., Any]) -> list[Any]:
    """The operations of `export.graphs.denoiser.guide` after `mixed` [1, 2, size], which make `guided` [1, 1, size]."""
    return [
        node("ReduceSum", ["mixed", "two"], ["sum"], keepdims=1),
        node("Div", ["sum", "size"], ["mean"]),
        node("Sub", ["mixed", "mean"], ["centered"]),
        node("Mul", ["centered", "centered"], ["squared"]),
        node("ReduceSum", ["squared", "two"], ["squares"], keepdims=1),
        node("Slice", ["squares", "zero", "one", "one"], ["own"]),
        node("Slice", ["squares", "one", "two", "one"], ["reference"]),
        node("Max", ["own", "least"], ["divisor"]),
        node("Div", ["reference", "divisor"], ["ratio"]),
        node("Sqrt", ["ratio"], ["root"]),
        node("ReduceSum", ["rescale", "one"], ["phi"], keepdims=1),
        node("Sub", ["unit", "phi"], ["rest"]),
        node("Add", ["root", "rest"], ["factor"]),
        node("Slice", ["mixed", "zero", "one", "one"], ["plain"]),
        node("Mul", ["plain", "factor"], ["guided"]),
    ]


if __name__ == "__main__":
    serve(Service())
