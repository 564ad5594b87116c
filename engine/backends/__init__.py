"""Chooses and opens the inference library that runs a bundle."""

from __future__ import annotations

import re

from ..bundle import Bundle
from ..errors import DeviceError, UnknownBackendError, shown
from ..libraries import installed
from .interface import Backend

BACKENDS = ("tensorrt", "openvino", "onnxruntime")


def open_backend(
    bundle: Bundle, name: str | None, device: str | None, threads: int | None, cuda_graphs: bool
) -> Backend:
    """The backend of that name with the bundle's graphs loaded; see `Pipeline.load`."""
    if name is not None and not (isinstance(name, str) and name in BACKENDS):
        raise UnknownBackendError(
            f"backend is {shown(name)}; it must be one of {', '.join(map(repr, BACKENDS))}, or None to choose by what "
            "the machine has"
        )
    gpu = gpu_number(device)
    name = name or default_backend(device)
    if name == "tensorrt":
        if device == "cpu":
            raise DeviceError(
                "device is 'cpu', and TensorRT runs on NVIDIA GPUs only; pass device='cuda' or backend='onnxruntime'"
            )
        from .tensorrt.backend import TensorRtBackend

        return TensorRtBackend(bundle, gpu or 0, cuda_graphs)
    if name == "openvino":
        if gpu is not None:
            raise DeviceError(
                f"device is {device!r}, and the OpenVINO backend runs on the CPU only; pass device='cpu', or another "
                "backend"
            )
        from .openvino.backend import OpenVinoBackend

        openvino = OpenVinoBackend(
            bundle.graphs, bundle.shapes, threads, openvino_precision(bundle), bundle.recheck, bundle.family
        )
        openvino.load()
        return openvino
    from .onnxruntime.backend import OnnxRuntimeBackend

    backend = OnnxRuntimeBackend(bundle.graphs, bundle.shapes, threads, gpu, cuda_graphs, bundle.recheck, bundle.family)
    for component in bundle.family.required:
        backend.load(component)
    return backend


def default_backend(device: str | None = None) -> str:
    """TensorRT if it and a GPU are found. Otherwise OpenVINO, if the device is the CPU and OpenVINO is installed.
    Otherwise ONNX Runtime."""
    if device != "cpu" and tensorrt_is_usable():
        return "tensorrt"
    return "openvino" if gpu_number(device) is None and installed("openvino") else "onnxruntime"


def openvino_precision(bundle: Bundle) -> dict[str, str]:
    """The precision that the builder chose for each component on OpenVINO. Empty if it measured none."""
    return dict(bundle.manifest["openvino"]["precision"]) if "openvino" in bundle.manifest else {}


def gpu_number(device: str | None) -> int | None:
    """N of "cuda:N", 0 of "cuda", None of "cpu" and None. DeviceError for anything else."""
    if device is None or (isinstance(device, str) and device == "cpu"):
        return None
    kind, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind != "cuda" or not (re.fullmatch(r"[0-9]{1,3}", number) or device == "cuda"):
        raise DeviceError(
            f"device is {shown(device)}; it must be 'cpu', 'cuda', 'cuda:N' with the number of a GPU, or None"
        )
    return int(number or 0)


def tensorrt_is_usable() -> bool:
    """Whether TensorRT, CUDA's Python bindings and a GPU are here."""
    if not (installed("tensorrt") and installed("cuda")):
        return False
    from .tensorrt.cuda import count_devices

    return count_devices() > 0
