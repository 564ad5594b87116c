"""Measures the hardware's best rates of matrix products and of copying."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.errors import BenchmarkUsageError
from engine.libraries import import_library, installed

MATRIX_SIDES = (1024, 2048, 4096)
"""The sizes of the square matrices. The fastest counts."""
COPY_BYTES = 1 << 28
SECONDS = 1.0
"""Seconds for which each of them is repeated."""


def matrix_rate(device: str, precision: str, threads: int = 0, seconds: float = SECONDS) -> float:
    """FLOP per second of a product of square matrices on "cpu" or "cuda", through the fastest of the libraries that are
    installed."""
    products = PRODUCTS[device, precision]
    here = {library: make for library, make in products.items() if installed(library)}
    if not here:
        raise BenchmarkUsageError(
            f"the rate of {precision} on {device} needs one of {', '.join(products)}, and none of them is installed"
        )
    sides = [4 * side for side in MATRIX_SIDES] if device == "cuda" else MATRIX_SIDES
    return max(
        2 * side**3 / _fastest(make(side, precision, threads), seconds) for make in here.values() for side in sides
    )


def copy_rate(device: str, threads: int = 0, seconds: float = SECONDS) -> float:
    """Bytes per second of copying a large array, read and write counted, on "cpu" or "cuda"."""
    if device == "cuda":
        import torch

        source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)

        def copy_on_gpu() -> None:
            target.copy_(source)
            torch.cuda.synchronize()

        return 2 * COPY_BYTES / _fastest(copy_on_gpu, seconds)
    workers = threads or os.cpu_count() or 1
    parts = [np.ones(COPY_BYTES // 8 // workers) for _ in range(2 * workers)]
    with ThreadPoolExecutor(workers) as pool:
        return 2 * COPY_BYTES / _fastest(lambda: list(pool.map(np.copyto, parts[:workers], parts[workers:])), seconds)


def _fastest(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of the runs that fit into so many seconds, but at least two."""
    run()
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return min(times)


def _product(side: int, element: int) -> bytes:
    """An ONNX graph of one matrix product."""
    from onnx import helper

    kinds = [helper.make_tensor_value_info(name, element, [side, side]) for name in ("a", "b", "c")]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", kinds[:2], kinds[2:])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    )


def _onnxruntime(side: int, precision: str, threads: int) -> Callable[[], Any]:
    from onnx import TensorProto

    onnxruntime = import_library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _product(side, TensorProto.FLOAT), options, providers=["CPUExecutionProvider"]
    )
    a = np.ones((side, side), np.float32)
    return lambda: session.run(None, {"a": a, "b": a})


def _openvino(side: int, precision: str, threads: int) -> Callable[[], Any]:
    from onnx import TensorProto

    openvino = import_library("openvino")
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f32", "bf16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    request = core.compile_model(
        core.read_model(_product(side, TensorProto.FLOAT)), "CPU", options
    ).create_infer_request()
    for name in ("a", "b"):
        request.get_tensor(name).data[:] = 1.0
    return lambda: request.infer()


def _cuda(side: int, precision: str, threads: int) -> Callable[[], Any]:
    import torch

    a = torch.ones(
        side,
        side,
        dtype={"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision],
        device="cuda",
    )
    b = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, a, out=b)
        torch.cuda.synchronize()

    return run


PRODUCTS: dict[tuple[str, str], dict[str, Callable[[int, str, int], Callable[[], Any]]]] = {
    **{("cpu", precision): {"openvino": _openvino, "onnxruntime": _onnxruntime} for precision in ("fp32", "fp16")},
    ("cpu", "bf16"): {"openvino": _openvino},
    **{("cuda", precision): {"torch": _cuda} for precision in ("fp32", "fp16", "bf16")},
}
"""The libraries that multiply matrices, by device and the precision of the graph; those of fp16 compute in fp32 on a
CPU."""
