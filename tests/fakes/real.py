"""What the real bindings are made of, read without a GPU: tests/test_real_bindings.py holds the fakes and our code
against it.

    api = read("10.16.1.11")       # TensorRT's Python API: pip fetches it once into build/, stub libraries stand in for
                                   TensorRT's own
    api = read_cuda()              # the same for cuda.bindings.driver

api-8.6.0.json was made by `python tests/fakes/real.py dump tensorrt`, see its first entry; that wheel has 800 MB.
As a script this file needs nothing but Python 3.10, so that it runs under other interpreters.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
FETCHED = HERE.parent.parent / "build" / "real-bindings"
CUDA_BINDINGS = ("cuda-bindings==13.5.0", "cuda-pathfinder==1.9.0")

STUBS = {
    "libnvinfer.so": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvinfer_plugin.so": ("initLibNvInferPlugins",),
    "libnvonnxparser.so": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
"""The libraries that TensorRT's bindings link against, and what they need of them."""

LIBCUDA = r"""
#include <dlfcn.h>
#include <stdio.h>
int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : 0; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "NVIDIA H200"); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0x100; return 0; }
int cuCtxPushCurrent_v2(void *context) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)0x100; return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = *total = 8ull << 30; return 0; }
int cuMemAlloc_v2(unsigned long long *pointer, size_t size) { *pointer = 0x700000000000; return size ? 0 : 1; }
int cuMemHostAlloc(void **pointer, size_t size, unsigned flags) { static char block[4096]; *pointer = block; return 0; }
int cuMemcpyHtoDAsync_v2(unsigned long long target, const void *source, size_t size, void *stream)
{ return source ? 0 : 1; }
int cuMemsetD8Async(unsigned long long target, unsigned char value, size_t size, void *stream) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)0x200; return 0; }
int cuStreamSynchronize(void *stream) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuStreamEndCapture(void *stream, void **graph) { *graph = 0; return 1; }
int cuEventCreate(void **event, unsigned flags) { *event = (void *)0x300; return 0; }
int cuEventElapsedTime(float *time, void *start, void *end) { return 400; }
int cuGetErrorName(int error, const char **text)
{ *text = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : 0; return error == 2 ? 0 : 1; }
int cuGetErrorString(int error, const char **text)
{ *text = error == 2 ? "out of memory" : 0; return error == 2 ? 0 : 1; }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    char versioned[128];
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    if (!(*function = dlsym(library, versioned))) *function = dlsym(library, name);
    return *function ? 0 : 500;
}
"""
"""A driver without a device that answers a few calls, to see what the real cuda-bindings makes of the answers."""

DUNDERS = ("__init__", "__bool__", "__len__", "__getitem__")

Signature = list[list[Any]]
"""Parameters as [name, default], None where there is none."""


class Unavailable(Exception):
    """The real thing cannot be had here."""


# Reading a module


def split_parameters(text: str) -> list[str]:
    """The parameters of a signature, cut at the commas outside of brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{<":
            depth += 1
        elif char in ")]}>":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in [*parts, text[start:].strip()] if part not in ("", "/")]


def signatures(name: str, doc: str | None) -> list[Signature]:
    """Every overload that pybind11 (`name(self: A, b: int = 0) -> C`) or Cython (`name(int b)`) wrote into a
    docstring."""
    found = []
    for match in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> .*)?$", doc or "", re.MULTILINE):
        parts = [part.partition(" = ") for part in split_parameters(match[1].replace("->", ""))]
        found.append([[declared.partition(":")[0].split(" ")[-1], default or None] for declared, _, default in parts])
    return [s for s in found if s != [["*args", None], ["**kwargs", None]]] or found


def python_signature(function: Any) -> Signature:
    return [
        [p.name, None if p.default is p.empty else repr(p.default)]
        for p in inspect.signature(function).parameters.values()
    ]


def describe(cls: type) -> dict[str, Any]:
    """{"methods": {name: signatures}, "properties": {name: it has a setter}, "members": {name: value}}"""
    members = {name: int(value) for name, value in getattr(cls, "__members__", {}).items()}
    methods: dict[str, list[Signature]] = {}
    properties: dict[str, bool] = {}
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        if name in members or (name.startswith("_") and name not in DUNDERS):
            continue
        if isinstance(value, property):
            properties[name] = value.fset is not None
        elif inspect.isfunction(value):
            methods[name] = [python_signature(value)]
        elif callable(getattr(cls, name)) and not inspect.isclass(value):
            methods[name] = signatures(name, getattr(cls, name).__doc__)
    return {"methods": methods, "properties": properties, "members": members}


def dump(module: ModuleType) -> dict[str, Any]:
    """A module: its version, all its names, functions (with the number of values in the docstring's "Returns") and
    classes."""
    functions, returns, classes = {}, {}, {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if inspect.isclass(value):
            classes[name] = describe(value)
            nested = {
                f"{name}.{inner}": cls
                for inner, cls in vars(value).items()
                if inspect.isclass(cls) and hasattr(cls, "__members__")
            }
            classes |= {inner: describe(cls) for inner, cls in nested.items()}
        elif callable(value):
            functions[name] = (
                [python_signature(value)] if inspect.isfunction(value) else signatures(name, value.__doc__)
            )
            _, _, tail = (value.__doc__ or "").partition("Returns\n-------\n")
            returns[name] = len(re.findall(r"^\w+ : ", tail.partition("\n\n")[0], re.MULTILINE))
    names = sorted(name for name in vars(module) if not name.startswith("_"))
    return {
        "version": getattr(module, "__version__", None),
        "names": names,
        "functions": functions,
        "returns": returns,
        "classes": classes,
    }


# Getting the real ones


def read(version: str) -> dict[str, Any]:
    """The API of a TensorRT version: of 8.6.0 as it was kept, of others from their wheel on PyPI."""
    if version.startswith("8."):
        return json.loads((HERE / f"api-{version}.json").read_text())
    return json.loads(
        run(
            [__file__, "dump", "tensorrt_bindings"],
            fetch(f"tensorrt_cu13_bindings=={version}"),
            make_stubs(version.split(".")[0]),
        )
    )


def read_cuda() -> dict[str, Any]:
    """The API of cuda.bindings.driver."""
    return json.loads(run([__file__, "dump", "cuda.bindings.driver"], fetch(*CUDA_BINDINGS)))


def ask_cuda(code: str) -> str:
    """What code prints that uses the real cuda.bindings.driver over a stub driver."""
    libraries = FETCHED / "stubs" / "cuda"
    compile_library(libraries / "libcuda.so.1", LIBCUDA)
    return run(["-c", code], fetch(*CUDA_BINDINGS), libraries)


def fetch(*requirements: str) -> Path:
    """A folder with these packages, installed by pip when it is first asked for."""
    folder = FETCHED / f"{requirements[0]}-{sys.version_info[0]}.{sys.version_info[1]}"
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--retries=1",
            "--no-deps",
            "--only-binary=:all:",
            "--target",
            str(unfinished),
            *requirements,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if result.returncode:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise Unavailable(
                f"pip does not install {' '.join(requirements)}: "
                f"{(result.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
        unfinished.rename(folder)
    return folder


def make_stubs(major: str) -> Path:
    """A folder with the libraries of STUBS for a major version of TensorRT."""
    folder = FETCHED / "stubs" / major
    for name, functions in STUBS.items():
        compile_library(
            folder / f"{name}.{major}", "".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions)
        )
    return folder


def compile_library(library: Path, source: str) -> None:
    code = library.with_suffix(".c")
    if library.is_file() and code.is_file() and code.read_text() == source:
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("there is no C compiler (cc) for stub libraries")
    library.parent.mkdir(parents=True, exist_ok=True)
    code.write_text(source)
    subprocess.run(
        [compiler, "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(code), "-ldl"],
        check=True,
    )


def run(arguments: list[str], site: Path, libraries: Path | None = None) -> str:
    """The output of a Python process that finds packages in `site` and shared libraries in `libraries`."""
    environment = {**os.environ, "PYTHONPATH": str(site), "LD_LIBRARY_PATH": str(libraries or "")}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise AssertionError(f"the bindings in {site} do not work:\n{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != HERE]  # where `tensorrt` is the fake
    json.dump(dump(importlib.import_module(sys.argv[2])), sys.stdout)
