"""The fakes have the names, signatures and values of the real bindings, and our code uses what every version has.

The real bindings come from PyPI (tests/fakes/real.py); without a network or a C compiler these tests are skipped.
"""

import ast
import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .fakes import FakeCuda, make_tensorrt, real
from .fakes.cuda_types import Handle
from .fakes.tensorrt_api import Bound, Enumeration, IHostMemory

ROOT = Path(__file__).parent.parent
REAL_OF = {"8.6.0": "8.6.0", "10.16.1": "10.16.1.11", "11.4.0": "11.4.0.106"}

SWITCH = "engine/backends/tensorrt/versions.py"
"""The file with the differences between versions: what it uses must be in one of them."""

BEHIND_A_SWITCH = {
    "export/tensorrt/progress.py": {"IProgressMonitor"},
    "export/tensorrt/compiling.py": {"progress_monitor"},
}
"""Elsewhere, what is used only where versions.has_progress says that it is there."""

Api = dict[str, Any]


@functools.cache
def real_api(version: str) -> Api:
    """The real bindings of a version that the fake plays; skips the test where they cannot be had."""
    try:
        return real.read(REAL_OF[version])
    except real.Unavailable as reason:
        pytest.skip(f"no real bindings of TensorRT {version}: {reason}")


def fake_tensorrt(version: str) -> ModuleType:
    return make_tensorrt(version, FakeCuda())


def fake_members(cls: type) -> dict[str, Any]:
    """What a fake class has itself or from its templates, by name."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base not in (object, bytes, Bound, Enumeration):
            found |= vars(base)
    kept = {
        name: value
        for name, value in found.items()
        if (not name.startswith("_") or name in real.DUNDERS) and hasattr(cls, name)
    }
    return {
        name: value
        for name, value in kept.items()
        if not (cls is IHostMemory and name.startswith("__")) and not isinstance(value, (type, Enumeration))
    }


def calls(signature: real.Signature) -> set[tuple[str, ...]]:
    """The ways to call it by position: names of the parameters that are given, self left out."""
    names = [name for name, _ in signature if name != "self"]
    needed = sum(1 for name, default in signature if name != "self" and default is None)
    return {tuple(names[:count]) for count in range(needed, len(names) + 1)}


def differences(name: str, cls: type, api: Api) -> Iterator[str]:
    """Where a fake class has more than the real one."""
    described = api["classes"].get(name)
    if described is None:
        yield f"{name} does not exist"
        return
    if issubclass(cls, Enumeration):
        yield from (
            f"{name}.{member} is {described['members'].get(member)}, not {int(value)}"
            for member, value in cls.__members__.items()
            if described["members"].get(member) != int(value)
        )
        return
    for member, value in fake_members(cls).items():
        methods, properties = described["methods"], described["properties"]
        if callable(value):
            possible = {call for signature in methods.get(member, []) for call in calls(signature)}
            wrong = calls(real.python_signature(value)) - possible
            if wrong:
                yield f"{name}.{member} takes {sorted(possible)}, not {sorted(wrong)}"
        elif member not in properties:
            yield f"{name}.{member} does not exist"
        elif (not isinstance(value, property) or value.fset) and not properties[member]:
            yield f"{name}.{member} cannot be set"


@pytest.mark.parametrize("version", REAL_OF)
def test_the_fake_tensorrt_has_nothing_that_the_real_one_has_not(version):
    api, trt = real_api(version), fake_tensorrt(version)
    classes = {name: cls for name, cls in vars(trt).items() if isinstance(cls, type)} | {
        "ILogger.Severity": trt.ILogger.Severity
    }
    found = [text for name, cls in classes.items() for text in differences(name, cls, api)]
    found += [
        f"{name} does not exist"
        for name, value in vars(trt).items()
        if isinstance(value, Enumeration) and name not in api["names"]
    ]
    found += [
        f"{name}{calls(real.python_signature(value))} is not {api['functions'].get(name)}"
        for name, value in vars(trt).items()
        if callable(value)
        and not isinstance(value, type)
        and calls(real.python_signature(value)) != calls(api["functions"].get(name, [[]])[0])
    ]
    assert found == []


def test_every_difference_between_versions_that_the_fake_knows_is_one():
    """A member that the fake leaves out of a version is not in the real one either."""
    members: dict[str, set[str]] = defaultdict(set)
    for version in REAL_OF:
        for name, cls in vars(fake_tensorrt(version)).items():
            if isinstance(cls, type) and issubclass(cls, Bound):
                members[name] |= fake_members(cls).keys()
    found = []
    for version in REAL_OF:
        trt, classes = fake_tensorrt(version), real_api(version)["classes"]
        for name, names in members.items():
            have = {**classes.get(name, {}).get("methods", {}), **classes.get(name, {}).get("properties", {})}
            found += [
                f"{version} has {name}.{member}"
                for member in names
                if member in have and not hasattr(getattr(trt, name, None), member)
            ]
    assert found == []


# Our own code


@dataclass
class Uses:
    """What a file uses of TensorRT: `trt.X.Y` chains, keywords by method name, attribute names, each with a line."""

    chains: set[tuple[int, tuple[str, ...]]] = field(default_factory=set)
    keywords: set[tuple[int, str, str]] = field(default_factory=set)
    attributes: set[tuple[int, str]] = field(default_factory=set)


class Scan(ast.NodeVisitor):
    """Reads a file; `x = trt.X` makes `x.Y` a chain too."""

    def __init__(self) -> None:
        self.uses = Uses()
        self._aliases: dict[str, tuple[str, ...]] = {}

    def chain(self, node: ast.expr) -> tuple[str, ...] | None:
        """("X", "Y") for `trt.X.Y`, where trt may be an attribute (`self._trt.X.Y`); () for trt itself; None for
        anything else."""
        if isinstance(node, ast.Name):
            return () if node.id in ("trt", "tensorrt") else self._aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            if node.attr in ("trt", "_trt"):
                return ()
            before = self.chain(node.value)
            return None if before is None else (*before, node.attr)
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = (
                zip(target.elts, node.value.elts)
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                else [(target, node.value)]
            )
            for name, value in pairs:
                found = self.chain(value)
                if isinstance(name, ast.Name) and found:
                    self._aliases[name.id] = found
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.uses.attributes.add((node.lineno, node.attr))
        found = self.chain(node)
        if found:
            self.uses.chains.add((node.lineno, found))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        if name:
            self.uses.keywords |= {(node.lineno, name, keyword.arg) for keyword in node.keywords if keyword.arg}
        self.generic_visit(node)


def our_files() -> dict[str, str]:
    """Our own code that has to do with TensorRT, by path."""
    candidates = [
        file for folder in ("engine", "export", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))
    ] + sorted(ROOT.glob("*.py"))
    texts = {file.relative_to(ROOT).as_posix(): file.read_text() for file in candidates}
    return {path: text for path, text in texts.items() if re.search(r"\b_?trt\b|import tensorrt\b", text)}


def scan(text: str) -> Uses:
    visitor = Scan()
    visitor.visit(ast.parse(text))
    return visitor.uses


@functools.cache
def our_names() -> set[str]:
    """Attributes that our own classes define: those are not TensorRT's."""
    found = set()
    for path in our_files():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ClassDef):
                found |= {
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
                found |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                found.add(node.attr)
    return found | {"precision"}  # of engine.bundle.Bundle, which has nothing to do with TensorRT


def exists(chain: tuple[str, ...], api: Api) -> bool:
    """Whether the real module has `X` or `X.Y`."""
    if len(chain) == 1:
        return chain[0] in api["classes"] or chain[0] in api["names"] or chain[0] == "__version__"
    if chain[0] not in api["classes"]:
        return chain[0] in api["names"]  # of a value like trt.float32; its attributes are looked up by name
    described = api["classes"][chain[0]]
    inner = ".".join(chain[:2])
    if inner in api["classes"]:
        return len(chain) == 2 or chain[2] in api["classes"][inner]["members"]
    return any(chain[1] in described[kind] for kind in ("methods", "properties", "members")) or chain[1] in (
        "__members__",
        "__init__",
    )


def has_member(name: str, api: Api) -> bool:
    return any(name in described["methods"] or name in described["properties"] for described in api["classes"].values())


def parameters(name: str, api: Api) -> set[str]:
    """Names of the parameters of all methods of that name."""
    return {
        p
        for described in api["classes"].values()
        for signature in described["methods"].get(name, [])
        for p, _ in signature
    }


def missing_in(path: str, uses: Uses, api: Api) -> set[str]:
    """What a file uses that a version has not."""
    allowed = BEHIND_A_SWITCH.get(path, set())
    known = set().union(
        *(
            fake_members(cls)
            for version in REAL_OF
            for cls in vars(fake_tensorrt(version)).values()
            if isinstance(cls, type) and issubclass(cls, Bound)
        )
    )
    found = {
        f"{path}:{line} trt.{'.'.join(chain)}"
        for line, chain in uses.chains
        if chain[0] not in allowed and not exists(chain, api)
    }
    found |= {
        f"{path}:{line} .{name}"
        for line, name in uses.attributes
        if name in known - our_names() - allowed and not name.startswith("__") and not has_member(name, api)
    }
    return found | {
        f"{path}:{line} .{name}({keyword}=)"
        for line, name, keyword in uses.keywords
        if name in known - our_names() and has_member(name, api) and keyword not in parameters(name, api)
    }


def test_our_code_uses_only_what_all_versions_have_and_the_switch_what_one_has():
    apis = [real_api(version) for version in REAL_OF]
    found = []
    for path, text in our_files().items():
        missing = [missing_in(path, scan(text), api) for api in apis]
        found += sorted(set.intersection(*missing) if path == SWITCH else set.union(*missing))
    assert found == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "trt.BuilderFlag.FP16"),
        ("kinds = self._trt.LayerType\nkinds.FULLY_CONNECTED", "trt.LayerType.FULLY_CONNECTED"),
        ("a, b = trt.ILogger.Severity, 1\na.FATAL", "trt.ILogger.Severity.FATAL"),
        ("size = engine.device_memory_size", ".device_memory_size"),
        ("trt.IProgressMonitor", "trt.IProgressMonitor"),
        ("trt.CaffeParser()", "trt.CaffeParser"),
        ("config.set_timing_cache(cache, ignore=True)", ".set_timing_cache(ignore=)"),
    ],
)
def test_the_scan_finds_what_a_version_lacks(code, words):
    missing = set().union(*(missing_in("engine/x.py", scan(code), real_api(version)) for version in REAL_OF))
    assert any(text.endswith(words) for text in missing), missing


def test_the_scan_reads_the_files_that_use_tensorrt():
    files = our_files()
    assert scan(files[SWITCH]).chains
    assert scan(files["engine/backends/tensorrt/runtime.py"]).chains


# CUDA


@functools.cache
def real_cuda() -> Api:
    try:
        return real.read_cuda()
    except real.Unavailable as reason:
        pytest.skip(f"no real cuda-bindings: {reason}")


def test_the_fake_driver_has_the_real_ones_functions_with_their_parameters_and_values():
    api, found = real_cuda(), []
    for name, function in vars(FakeCuda().module()).items():
        if name.startswith("cu") and callable(function):
            names = [parameter for parameter, _ in real.python_signature(function)]
            actual = [parameter for parameter, _ in api["functions"].get(name, [[("missing", None)]])[0]]
            if names != actual or function.value_count != api["returns"][name]:
                found.append(
                    f"{name}({', '.join(actual)}) returns {api['returns'].get(name)} values, not ({', '.join(names)}) "
                    f"and {function.value_count}"
                )
    assert found == []


def test_the_fake_drivers_enumerations_and_constants_are_the_real_ones():
    api, found = real_cuda(), []
    for name, value in vars(FakeCuda().module()).items():
        if isinstance(value, type) and issubclass(value, int):
            found += [
                f"{name}.{member.name} is {api['classes'][name]['members'].get(member.name)}"
                for member in value
                if api["classes"][name]["members"].get(member.name) != int(member)
            ]
        elif isinstance(value, type) and issubclass(value, Handle) and name not in ("Handle", "Pointer"):
            found += [] if name in api["classes"] else [f"{name} does not exist"]
        elif isinstance(value, int) and name not in api["names"]:
            found.append(f"{name} does not exist")
    assert found == []


PROBES = """
driver.cuDeviceGetName(16, 0), driver.cuDeviceGetName(5, driver.CUdevice(0))
driver.cuInit(0), driver.cuDriverGetVersion(), driver.cuDeviceGetCount()
driver.cuDeviceGet(0)[0], driver.cuDeviceGet(7)
driver.cuGetErrorName(driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
driver.cuGetErrorString(driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
driver.cuGetErrorName(12345)
driver.cuMemGetInfo()[0], len(driver.cuMemGetInfo()), driver.cuMemGetInfo()[2]
driver.cuMemAlloc(0), type(driver.cuMemAlloc(8)[1]).__name__, type(driver.cuMemHostAlloc(8, 0)[1]).__name__
driver.cuMemAlloc(-1)
driver.cuMemAlloc("8")
driver.cuMemcpyHtoDAsync(memory, None, 8, stream)
driver.cuMemcpyHtoDAsync(memory, "text", 8, stream)
driver.cuMemcpyHtoDAsync(memory, numpy.zeros((4, 4))[:, 1], 8, stream)
driver.cuMemcpyHtoDAsync(memory, numpy.zeros(1), 8, stream)
driver.cuMemcpyHtoDAsync(int(memory), b"12345678", numpy.int64(8), int(stream))
driver.cuMemsetD8Async(memory, 300, 8, stream)
driver.cuStreamSynchronize("x")
driver.cuStreamSynchronize(stream), driver.cuStreamSynchronize(None)
driver.cuStreamIsCapturing(stream), driver.cuStreamEndCapture(stream)
driver.cuEventElapsedTime(driver.cuEventCreate(0)[1], driver.cuEventCreate(0)[1])
driver.CUdeviceptr(5) == driver.CUdeviceptr(5), driver.CUstream(5) == driver.CUstream(5), driver.CUstream(5) == 5
driver.CUdeviceptr(5) + 1
hex(driver.CUstream(5)), int(driver.CUdeviceptr(driver.CUdeviceptr(7)))
repr(driver.CUevent(5)), repr(driver.CUdeviceptr(5))
hex(driver.CUdeviceptr(5))
driver.CUstream(-1)
driver.CUstream(None)
setattr(driver.CUstream(5), "name", "x")
driver.CUresult.CUDA_SUCCESS == 0, driver.CUresult(2), driver.CUstream_flags.CU_STREAM_NON_BLOCKING | 0
"""
ASK = """
import json, numpy
answers = []
driver.cuInit(0)
driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
memory, stream = driver.cuMemAlloc(4096)[1], driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)[1]
for line in PROBES.strip().splitlines():
    try:
        answers.append(repr(eval(line)))
    except Exception as error:
        answers.append(type(error).__name__)
"""


def test_the_fake_driver_answers_in_the_form_of_the_real_bindings():
    """The real module over a stub libcuda and the fake, asked the same: the tuples, types and exceptions are the
    same."""
    try:
        told = real.ask_cuda(
            f"from cuda.bindings import driver\nPROBES = {PROBES!r}\n{ASK}\nprint(json.dumps(answers))"
        )
    except real.Unavailable as reason:
        pytest.skip(f"no real cuda-bindings: {reason}")
    scope = {"driver": FakeCuda().module(), "PROBES": PROBES}
    exec(ASK, scope)
    lines = PROBES.strip().splitlines()
    assert [*zip(lines, scope["answers"])] == [*zip(lines, json.loads(told))]
