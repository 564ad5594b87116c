"""Reports what this machine has and which bundles and plans it can use. For each that it cannot use, it says why and
what to run.

    python -m engine doctor [--bundles engines/]

Needs only NumPy. A broken library, GPU or bundle becomes a line of the report and does not end it.
"""

from __future__ import annotations

import errno
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Generator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from .bundle import MANIFEST, Bundle
from .commands import build_anything, builder
from .errors import EngineError
from .libraries import import_library, install_command, installed
from .plans import Machine, Plans, plans_command
from .sampling.catalog import sampler_name, step_table
from .version import __version__

NVIDIA_SMI = [
    "nvidia-smi",
    "--query-gpu=name,compute_cap,memory.total,memory.free,driver_version",
    "--format=csv,noheader,nounits",
]
NVIDIA_SMI_SECONDS = 10.0


RUNTIME = {"PIL": "pillow", "tokenizers": "tokenizers", "tqdm": "tqdm"}
"""Packages that every picture needs, by the names that they are imported by."""

Report = Generator[str, None, bool]
"""Yields lines, and returns whether all is well."""


def diagnose(bundles: Path, verify: bool = False) -> Report:
    """The report, line by line. Returns True if there are bundles and each can make pictures here with at least one
    backend. `verify` reads every file of the bundles and plans and compares its SHA-256."""
    yield f"LatentRT {__version__}, Python {platform.python_version()}, NumPy {np.__version__}, {platform.platform()}"
    machines, lines = find_gpus()
    yield from lines
    absent = yield from find_libraries()
    folders, problem = find_bundles(bundles)
    if problem:
        yield f"bundles: {problem}"
    well = not problem
    for folder in folders:
        well &= yield from examine(folder, machines, absent, verify)
    return well


def find_bundles(place: Path) -> tuple[list[Path], str]:
    """The bundle at `place`, or those in it, including damaged ones, and the reason if there is none."""
    build = f"build one: {builder()} --output {shlex.quote(str(place))}"
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return [], f"there is no folder {place}; {build}"
    except NotADirectoryError:
        return [], f"{place} is not a folder; name one: python -m engine doctor --bundles engines"
    except OSError as error:
        return [], f"{place} cannot be read ({error.strerror}); allow it: chmod u+rx {shlex.quote(str(place))}"
    if MANIFEST in names:
        return [place], ""
    folders = [place / name for name in names if not name.startswith(".") and _may_be_bundle(place / name)]
    return folders, "" if folders else f"none in {place}; {build}"


def _may_be_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, was one, or cannot be looked into. A builder's unfinished folders have names with a
    dot."""
    try:
        return bool({MANIFEST, "onnx"} & set(os.listdir(folder)))
    except NotADirectoryError:
        return False
    except OSError:
        return True


def find_gpus() -> tuple[list[Machine], list[str]]:
    """The GPUs that plans can run on, and lines about all GPUs."""
    listed = list_gpus()
    lines = [f"GPU {i}: {line}" for i, line in enumerate(listed)] or ["GPU: none that nvidia-smi knows of"]
    try:
        from .backends.tensorrt.cuda import count_devices, load_driver

        load_driver()
        count = count_devices()
    except Exception as error:
        return [], [*lines, f"CUDA: {reason(error)}"]
    machines = []
    for number in range(count):
        try:
            machine, line = look_at_gpu(number)
        except Exception as error:
            lines.append(f"CUDA: GPU {number} does not answer: {reason(error)}")
            continue
        lines.append(line)
        machines += [machine] if machine else []
    return machines, lines


def look_at_gpu(number: int) -> tuple[Machine | None, str]:
    """A GPU as plans identify it (None without TensorRT), and a line about it. CudaError if it does not answer."""
    from .backends.tensorrt.cuda import Device
    from .backends.tensorrt.versions import load_tensorrt

    device = Device(number)
    with device.closing():
        free, total = device.memory()
    line = (
        f"CUDA: GPU {number} is {device.name}, compute capability {device.compute_capability}, {free / 2**30:.1f} of "
        f"{total / 2**30:.1f} GiB "
        f"free; the driver supports CUDA {device.driver_version}"
    )
    try:
        return Machine(device.name, device.compute_capability, load_tensorrt().__version__), line
    except EngineError:  # find_libraries says why
        return None, line


def list_gpus() -> list[str]:
    """One line for each GPU that nvidia-smi lists."""
    if not shutil.which("nvidia-smi"):
        return []
    try:
        done = subprocess.run(
            NVIDIA_SMI, capture_output=True, text=True, errors="replace", check=False, timeout=NVIDIA_SMI_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):  # a driver that hangs; CUDA's own words follow
        return []
    rows = (
        [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
        if done.returncode == 0
        else []
    )
    return [
        f"{row[0]}, compute capability {row[1]}, {row[2]} MiB ({row[3]} free), driver {row[4]}"
        for row in rows
        if len(row) == 5
    ]


def find_libraries() -> Generator[str, None, dict[str, str]]:
    """Yields lines about the inference libraries, without loading a graph. Returns the reason for each module that is
    not usable."""

    def tensorrt() -> str:
        from .backends.tensorrt.versions import load_tensorrt

        return str(load_tensorrt().__version__)

    def onnxruntime() -> str:
        library = import_library("onnxruntime")
        return f"{library.__version__}, providers {', '.join(library.get_available_providers())}"

    def openvino() -> str:
        library = import_library("openvino")
        core = library.Core()
        return f"{library.__version__.split('-')[0]}, {core.get_property('CPU', 'FULL_DEVICE_NAME')}" + (
            " with bfloat16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else ""
        )

    known: list[tuple[str, str, str, Callable[[], str]]] = [
        ("TensorRT", "tensorrt", "tensorrt", tensorrt),
        ("OpenVINO", "openvino", "openvino", openvino),
        ("ONNX Runtime", "onnxruntime", "cpu", onnxruntime),
    ]
    absent: dict[str, str] = {}
    for name, module, extra, describe in known:
        if not installed(module):
            absent[module] = f"not installed; {install_command(extra)}"
        else:
            try:
                yield f"{name}: {describe()}"
                continue
            except Exception as error:  # a library that is there and does not load: its own words are the diagnosis
                absent[module] = f"does not load: {reason(error)}"
        yield f"{name}: {absent[module]}"
    for package in ("cuda-bindings", "tokenizers", "pillow"):
        try:
            yield f"{package}: {version(package)}"
        except PackageNotFoundError:
            extra = "tensorrt" if package == "cuda-bindings" else "runtime"
            yield f"{package}: not installed; {install_command(extra)}"
    return absent


def examine(folder: Path, machines: list[Machine], absent: dict[str, str], verify: bool) -> Report:
    """Yields with which libraries on which GPUs a bundle can make pictures. Returns True if there is one."""
    try:
        bundle = Bundle.open(folder, verify)
        for name in bundle.manifest["files"]:
            if not os.access(folder / name, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / name))
        title = f"{folder}: {bundle.name}, {bundle.precision}, height x width {bundle.shapes}"
    except Exception as error:
        yield f"{folder}: not usable: {reason(error, folder)}"
        return False
    yield title
    complete = yield from _verdict("scheduler", partial(find_scheduler, bundle), folder)
    if bundle.family.tokenizers:
        complete &= yield from _verdict("tokenizer", partial(find_tokenizer, bundle), folder)
    runs = False
    for library in ("openvino", "onnxruntime"):
        runs |= yield from _verdict(library, partial(find_cpu_backend, bundle, library, absent), folder)
    if not machines:
        yield "  tensorrt: not usable: there is no GPU with TensorRT here (see above)"
    for number, machine in enumerate(machines):
        runs |= yield from _verdict(f"tensorrt on GPU {number}", partial(find_plans, bundle, machine, verify), folder)
    return complete and runs


class NotUsable(Exception):
    """Something in a bundle is not usable here; the message says why."""


def _verdict(what: str, look: Callable[[], str], folder: Path) -> Report:
    """One line: what was found, or why it is not usable."""
    try:
        yield f"  {what}: {look()}"
        return True
    except Exception as error:
        yield f"  {what}: not usable: {reason(error, folder)}"
        return False


def find_scheduler(bundle: Bundle) -> str:
    """The name of the model's own sampler, after it has made a table."""
    other = (
        f"name another: python -m engine picture 'a text' --bundle {shlex.quote(str(bundle.folder))} --scheduler euler"
    )
    schedule = bundle.schedule()
    try:
        name = sampler_name(None, schedule)
        step_table(name, schedule, min(20, schedule.train_timesteps))
    except EngineError as error:
        raise NotUsable(f"{error}; {other}") from error
    return name


def find_tokenizer(bundle: Bundle) -> str:
    """ "usable", after it has tokenized a text."""
    missing = [package for module, package in RUNTIME.items() if not installed(module)]
    if missing:
        raise NotUsable(f"no picture without {', '.join(missing)}; {install_command('runtime')}")
    from .text.tokenizer import ClipTokenizer

    ClipTokenizer(bundle.tokenizer_file, bundle.special_tokens)(["a text"])
    return "usable"


def find_cpu_backend(bundle: Bundle, library: str, absent: dict[str, str]) -> str:
    """ "usable", unless the library is not, or cannot run this bundle."""
    if library in absent:
        raise NotUsable(absent[library])
    if library == "onnxruntime" and bundle.precision == "bf16":
        raise NotUsable("its CPU provider has no bf16 kernels; build with --precision fp32 or fp16")
    return "usable"


def find_plans(bundle: Bundle, machine: Machine, verify: bool) -> str:
    """The sizes that the plans for a GPU serve; `verify` reads the plans."""
    plans = Plans.find(bundle, machine)
    if verify:
        for component in plans.build["components"]:
            plans.read(component)
    unchecked = [
        component
        for component, entry in plans.build["components"].items()
        if not entry.get("check", {}).get("compared")
    ]
    warning = (
        f"; the plans of {', '.join(unchecked)} were not compared with ONNX Runtime: {plans_command(bundle.folder)} "
        "--force"
        if unchecked
        else ""
    )
    return f"usable, height x width {'; '.join(str(profile) for profile in plans.profiles)}{warning}"


def reason(error: Exception, folder: Path | None = None) -> str:
    """The error in one line that ends with what to do. Named errors say that themselves; other errors come from a
    bundle's content."""
    text = " ".join(str(error).split())
    if isinstance(error, (EngineError, NotUsable)) or folder is None:
        return text or type(error).__name__
    if isinstance(error, OSError):
        place = error.filename if isinstance(error.filename, str) else str(folder)
        return f"{place} cannot be read ({error.strerror}); allow it: chmod -R u+rwX {shlex.quote(str(folder))}"
    reason = f"{type(error).__name__}: {text[:300]}"
    return f"its manifest or a file in it is damaged ({reason}); build it again: {build_anything(folder)}"
