"""Traces that the tests share: what torch.onnx.export writes for a module is kept in build/, and copied for the next
module that is equal."""

import hashlib
import shutil
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

from engine.contract import Component, Sizes
from export.graphs.tracing import OPSET, export_onnx

ROOT = Path(__file__).parent.parent
TRACES = ROOT / "build" / "test-engines" / "traces"
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
OF_THE_FILE = {"_class_name", "_diffusers_version", "_use_default_values"}
"""What diffusers notes of the file that a configuration was read from, and a list of names in no fixed order."""
PLAIN = (bool, int, float, str, list, tuple, torch.dtype)


@lru_cache(maxsize=1)
def code() -> str:
    """The source of all that traces, and the versions of the libraries."""
    files = [*sorted((ROOT / "export" / "graphs").glob("*.py")), ROOT / "engine" / "contract.py"]
    return "\n".join([*(file.read_text() for file in files), *(f"{name} {version(name)}" for name in LIBRARIES)])


def plain(values: dict) -> dict:
    """Those that are numbers or words, without the folder that a model came from and OF_THE_FILE."""
    told = (key for key in sorted(values) if isinstance(values[key], PLAIN))
    return {key: values[key] for key in told if "name_or_path" not in key and key not in OF_THE_FILE}


def settings(module: torch.nn.Module) -> str:
    """What a module's graph depends on besides its tensors: class, attributes and configuration of each part."""
    parts = []
    for name, part in module.named_modules():
        config = getattr(part, "config", {})
        attention = getattr(
            config, "_attn_implementation", ""
        )  # transformers' choice of a kernel, not in its dictionary
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        parts.append(f"{name} {type(part).__qualname__} {plain(vars(part))} {plain(config)} {attention}")
        if (processor := getattr(part, "processor", None)) is not None:
            parts.append(f"{name} {type(processor).__qualname__} {plain(vars(processor))}")
    return "\n".join(parts)


def fingerprint(component: Component, module: torch.nn.Module, sizes: Sizes, opset: int) -> str:
    """Equal for modules that give the same graph and the same weights."""
    found = hashlib.sha256("\n".join([code(), repr(component), str(opset), settings(module), str(sizes)]).encode())
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        found.update(f"{name} {value.shape} {value.dtype}".encode())
        found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def kept(key: str, write: Callable[[Path], None]) -> Path:
    """The folder of that key, which `write` has filled, in this run or an earlier one."""
    folder = TRACES / key
    TRACES.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write(unfinished)
            unfinished.rename(folder)
    return folder


def shared_export(component: Component, module: torch.nn.Module, sizes: Sizes, file: Path, opset: int = OPSET) -> None:
    """`export_onnx`, run once for all equal modules. Every caller gets files of its own, to damage as it likes."""
    name = f"{component.name}.onnx"
    folder = kept(
        fingerprint(component, module, sizes, opset),
        lambda folder: export_onnx(component, module, sizes, folder / name, opset),
    )
    for part in (name, f"{name}.data"):
        shutil.copyfile(folder / part, file.with_name(file.name + part.removeprefix(name)))
