"""What this machine has, which bundles and plans it can use, and for each that it cannot, why and what to run.

    python -m engine doctor [--bundles engines/]

Needs nothing but NumPy.
"""
from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from .bundle import Bundle
from .errors import EngineError
from .libraries import import_library, installed
from .plans import Machine, Plans
from .version import __version__

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]


def diagnose(bundles: Path, verify: bool = False) -> Iterator[str]:
    """The report, line by line. `verify` reads every file of the bundles and plans and compares its SHA-256."""
    yield f"LatentRT {__version__}, Python {platform.python_version()}, NumPy {np.__version__}, {platform.platform()}"
    machines, lines = find_gpus()
    yield from lines
    yield from find_libraries()
    folders = sorted(file.parent for file in bundles.glob("*/manifest.json")) if bundles.is_dir() else []
    if (bundles / "manifest.json").is_file():
        folders = [bundles]
    if not folders:
        yield f"bundles: none in {bundles}; build one: python build_engines.py --output {bundles}"
    for folder in folders:
        yield from examine(folder, machines, verify)


def find_gpus() -> tuple[list[Machine], list[str]]:
    """The GPUs that plans could run on here, and what is to be said about them."""
    listed = list_gpus()
    lines = [f"GPU {i}: {line}" for i, line in enumerate(listed)] or ["GPU: none that nvidia-smi knows of"]
    try:
        from .backends.cuda import Device, count_devices, load_driver
        from .backends.tensorrt_versions import load_tensorrt
        load_driver()
    except EngineError as error:
        return [], [*lines, f"CUDA: {error}"]
    machines = []
    for number in range(count_devices()):
        device = Device(number)
        with device.closing():
            free, total = device.memory()
        lines.append(f"CUDA: GPU {number} is {device.name}, compute capability {device.compute_capability}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB "
                     f"free; the driver supports CUDA {device.driver_version}")
        try:
            machines.append(Machine(device.name, device.compute_capability, load_tensorrt().__version__))
        except EngineError:
            continue
    return machines, lines


def list_gpus() -> list[str]:
    """What nvidia-smi says, one line for each GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=False, timeout=30)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [f"{row[0]}, compute capability {row[1]}, {row[2]} MiB ({row[3]} free), driver {row[4]}" for row in rows if len(row) == 5]


def find_libraries() -> Iterator[str]:
    """The inference libraries, with what can be said without loading a graph."""
    def tensorrt() -> str:
        from .backends.tensorrt_versions import load_tensorrt
        return str(load_tensorrt().__version__)

    def onnxruntime() -> str:
        library = import_library("onnxruntime")
        return f"{library.__version__}, providers {', '.join(library.get_available_providers())}"

    def openvino() -> str:
        library = import_library("openvino")
        core = library.Core()
        return f"{library.__version__.split('-')[0]}, {core.get_property('CPU', 'FULL_DEVICE_NAME')}" \
            + (" with bfloat16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "")

    known: list[tuple[str, str, str, Callable[[], str]]] = [
        ("TensorRT", "tensorrt", "tensorrt", tensorrt), ("OpenVINO", "openvino", "openvino", openvino), ("ONNX Runtime", "onnxruntime", "cpu", onnxruntime)]
    for name, module, extra, describe in known:
        if not installed(module):
            yield f"{name}: not installed; pip install latentrt[{extra}]"
            continue
        try:
            yield f"{name}: {describe()}"
        except Exception as error:  # a library that is there and does not load: its own words are the diagnosis
            yield f"{name}: does not load: {error}"
    for name, package in (("cuda-bindings", "cuda-bindings"), ("tokenizers", "tokenizers"), ("pillow", "pillow")):
        try:
            yield f"{name}: {version(package)}"
        except PackageNotFoundError:
            yield f"{name}: not installed; pip install latentrt" + ("[tensorrt]" if name == "cuda-bindings" else "")


def examine(folder: Path, machines: list[Machine], verify: bool) -> Iterator[str]:
    """Whether a bundle is usable, and with which libraries on which GPUs."""
    try:
        bundle = Bundle.open(folder, verify)
    except EngineError as error:
        yield f"{folder}: not usable: {error}"
        return
    yield f"{folder}: {bundle.name}, {bundle.precision}, height x width {bundle.shapes}"
    for library, extra in (("openvino", "openvino"), ("onnxruntime", "cpu")):
        if not installed(library):
            yield f"  {library}: not usable: not installed; pip install latentrt[{extra}]"
        elif library == "onnxruntime" and bundle.precision == "bf16":
            yield "  onnxruntime: not usable: its CPU provider has no bf16 kernels; build with --precision fp32 or fp16"
        else:
            yield f"  {library}: usable"
    if not machines:
        yield "  tensorrt: not usable: there is no GPU with TensorRT here (see above)"
    for number, machine in enumerate(machines):
        try:
            plans = Plans.find(bundle, machine)
            if verify:
                for component in plans.build["components"]:
                    plans.read(component)
        except EngineError as error:
            yield f"  tensorrt on GPU {number}: not usable: {error}"
        else:
            yield f"  tensorrt on GPU {number}: usable, height x width {'; '.join(str(profile) for profile in plans.profiles)}"


def main(bundles: Path, verify: bool) -> None:
    """Prints the report."""
    for line in diagnose(bundles, verify):
        print(line)
    sys.stdout.flush()
