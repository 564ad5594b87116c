"""How TensorRT's Python API differs between the versions that the fake plays, and the manners of its pybind11 classes.

tests/test_real_bindings.py compares all of it with the real bindings, member by member.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cuda_driver import FakeCuda

VERSIONS = ("8.6.0", "10.16.1", "11.4.0")

ENUMS: dict[str, dict[str, str]] = {
    # "all" or the major versions that have it: the members in the order of their values; NAME=VALUE where a value is
    # skipped or shared
    "DataType": {
        "8": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8",
        "10 11": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4 E8M0",
    },
    "BuilderFlag": {
        "8": "FP16 INT8 DEBUG GPU_FALLBACK STRICT_TYPES REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
        "OBEY_PRECISION_CONSTRAINTS"
        " PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS ENABLE_TACTIC_HEURISTIC VERSION_COMPATIBLE "
        "EXCLUDE_LEAN_RUNTIME FP8",
        "10": "FP16 INT8 DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
        "OBEY_PRECISION_CONSTRAINTS"
        " PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8 "
        "ERROR_ON_TIMING_CACHE_MISS BF16"
        " DISABLE_COMPILATION_CACHE WEIGHTLESS STRIP_PLAN=19 REFIT_IDENTICAL WEIGHT_STREAMING INT4 REFIT_INDIVIDUAL "
        "STRICT_NANS MONITOR_MEMORY FP4"
        " EDITABLE_TIMING_CACHE DISTRIBUTIVE_INDEPENDENCE",
        "11": "DEBUG=2 GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE DIRECT_IO=11 "
        "VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME"
        " ERROR_ON_TIMING_CACHE_MISS=15 DISABLE_COMPILATION_CACHE=17 STRIP_PLAN REFIT_IDENTICAL WEIGHT_STREAMING "
        "REFIT_INDIVIDUAL=22 STRICT_NANS"
        " MONITOR_MEMORY EDITABLE_TIMING_CACHE=26 DISTRIBUTIVE_INDEPENDENCE",
    },
    "EngineCapability": {"all": "STANDARD SAFETY DLA_STANDALONE"},
    "ErrorCode": {
        "all": "SUCCESS INTERNAL_ERROR MEM_ALLOC_FAILED MODEL_DESERIALIZE_FAILED INVALID_VALUE INVALID_GRAPH "
        "INVALID_NODE UNSUPPORTED_GRAPH"
        " UNSUPPORTED_NODE"
    },
    "ExecutionContextAllocationStrategy": {"10 11": "STATIC ON_PROFILE_CHANGE USER_MANAGED"},
    "HardwareCompatibilityLevel": {"8": "NONE AMPERE_PLUS", "10 11": "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY"},
    "LayerInformationFormat": {"all": "ONELINE JSON"},
    "LayerType": {
        "8": "CONVOLUTION FULLY_CONNECTED ACTIVATION POOLING LRN SCALE SOFTMAX DECONVOLUTION CONCATENATION ELEMENTWISE "
        "PLUGIN UNARY PADDING SHUFFLE REDUCE"
        " TOPK GATHER MATRIX_MULTIPLY RAGGED_SOFTMAX CONSTANT RNN_V2 IDENTITY PLUGIN_V2 SLICE SHAPE PARAMETRIC_RELU "
        "RESIZE TRIP_LIMIT RECURRENCE"
        " ITERATOR LOOP_OUTPUT SELECT FILL QUANTIZE DEQUANTIZE CONDITION CONDITIONAL_INPUT CONDITIONAL_OUTPUT SCATTER "
        "EINSUM ASSERTION ONE_HOT"
        " NON_ZERO GRID_SAMPLE NMS REVERSE_SEQUENCE NORMALIZATION CAST",
        "10 11": "CONVOLUTION CAST ACTIVATION POOLING LRN SCALE SOFTMAX DECONVOLUTION CONCATENATION ELEMENTWISE PLUGIN "
        "UNARY PADDING SHUFFLE REDUCE TOPK"
        " GATHER MATRIX_MULTIPLY RAGGED_SOFTMAX CONSTANT IDENTITY PLUGIN_V2 SLICE SHAPE PARAMETRIC_RELU RESIZE "
        "TRIP_LIMIT RECURRENCE ITERATOR"
        " LOOP_OUTPUT SELECT FILL QUANTIZE DEQUANTIZE CONDITION CONDITIONAL_INPUT CONDITIONAL_OUTPUT SCATTER EINSUM "
        "ASSERTION ONE_HOT NON_ZERO"
        " GRID_SAMPLE NMS REVERSE_SEQUENCE NORMALIZATION PLUGIN_V3 SQUEEZE UNSQUEEZE",
    },
    "MemoryPoolType": {
        "8": "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM TACTIC_DRAM",
        "10 11": "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM TACTIC_DRAM TACTIC_SHARED_MEMORY",
    },
    "NetworkDefinitionCreationFlag": {
        "8": "EXPLICIT_BATCH EXPLICIT_PRECISION",
        "10": "EXPLICIT_BATCH STRONGLY_TYPED",
        "11": "STRONGLY_TYPED",
    },
    "OnnxParserFlag": {"10 11": "NATIVE_INSTANCENORM"},
    "PreviewFeature": {
        "8": "FASTER_DYNAMIC_SHAPES_0805 DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805 PROFILE_SHARING_0806",
        "10": "PROFILE_SHARING_0806 ALIASED_PLUGIN_IO_10_03 RUNTIME_ACTIVATION_RESIZE_10_10",
        "11": "ALIASED_PLUGIN_IO_10_03 RUNTIME_ACTIVATION_RESIZE_10_10",
    },
    "ProfilingVerbosity": {"all": "LAYER_NAMES_ONLY NONE DETAILED"},
    "Severity": {"all": "INTERNAL_ERROR ERROR WARNING INFO VERBOSE"},
    "TacticSource": {
        "8 10": "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
        "11": "EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
    },
    "TensorFormat": {"all": "LINEAR CHW2 HWC8 CHW4 CHW16 CHW32 DHWC8 CDHW32 HWC"},
    "TensorIOMode": {"all": "NONE INPUT OUTPUT"},
    "TensorLocation": {"all": "DEVICE HOST"},
}

ONLY: dict[str, dict[str, str]] = {
    # class: {versions: the members that only they have}
    "Builder": {"8 10": "platform_has_fast_fp16"},
    "IBuilderConfig": {"10 11": "progress_monitor"},
    "INetworkDefinition": {"10 11": "flags get_flag"},
    "ITensor": {},
    "ILayer": {
        "8 10": "precision precision_is_set reset_precision set_output_type output_type_is_set reset_output_type"
    },
    "OnnxParser": {"10 11": "flags set_flag get_flag clear_flag"},
    "ParserError": {"10 11": "node_name node_operator local_function_stack"},
    "ICudaEngine": {
        "8 10": "device_memory_size create_execution_context_without_device_memory",
        "10": "get_device_memory_size_for_profile",
        "10 11": "device_memory_size_v2 get_device_memory_size_for_profile_v2",
    },
    "IExecutionContext": {
        "8 10": "all_shape_inputs_specified",
        "10 11": "set_device_memory update_device_memory_size_for_shapes",
    },
}
CLASSES_ONLY = {"IProgressMonitor": "10 11"}

DATA_TYPE_NAMES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
    "fp8": "FP8",
}
"""Names that the module itself has for DataType's members, where they exist."""


def for_version(table: dict[str, str], major: str) -> str | None:
    """The entry of a table whose key names that major version, or "all"."""
    return next((value for key, value in table.items() if key == "all" or major in key.split()), None)


def missing_members(cls: str, major: str) -> set[str]:
    return {
        name for versions, names in ONLY.get(cls, {}).items() if major not in versions.split() for name in names.split()
    }


class Enumeration:
    """A member of a pybind11 enumeration: equal to its own kind only, an int by int(), no `|` and no `<<`."""

    __slots__ = ("name", "value")
    __members__: dict[str, Enumeration]

    def __init__(self, value: int) -> None:
        known = next((m for m in type(self).__members__.values() if m.value == value), None)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "name", known.name if known else "???")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"can't set attribute {name!r}")

    def __int__(self) -> int:
        return self.value

    __index__ = __hash__ = __int__

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.value == other.value  # type: ignore[attr-defined]

    def __lt__(self, other: Any) -> bool:
        return self.value < other.value if type(other) is type(self) else NotImplemented

    def __le__(self, other: Any) -> bool:
        return self.value <= other.value if type(other) is type(self) else NotImplemented

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}: {self.value}>"


def make_enum(name: str, members: str) -> type[Enumeration]:
    """An enumeration from the notation of ENUMS."""
    cls: type[Enumeration] = type(
        name, (Enumeration,), {"__slots__": (), "__members__": {}, "__module__": "tensorrt.tensorrt"}
    )
    value = -1
    for item in members.split():
        member, _, given = item.partition("=")
        value = int(given) if given else value + 1
        instance = cls.__new__(cls)
        object.__setattr__(instance, "value", value)
        object.__setattr__(instance, "name", member)
        cls.__members__[member] = instance
        setattr(cls, member, instance)
    return cls


class Missing:
    """Stands where a version lacks a member."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.owner = name, owner.__name__

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(f"'tensorrt.tensorrt.{self.owner}' object has no attribute {self.name!r}")

    def __set__(self, instance: object, value: Any) -> None:
        raise AttributeError(f"'tensorrt.tensorrt.{self.owner}' object has no attribute {self.name!r}")


class PybindType(type):
    """Classes without a constructor refuse to be called; Python subclasses must call the base's __init__."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        if not getattr(instance, "_ready", True):
            base = next(base for base in cls.__mro__ if base.__module__ == "tensorrt.tensorrt")
            raise TypeError(f"tensorrt.tensorrt.{base.__name__}.__init__() must be called when overriding __init__")
        return instance


class Bound(metaclass=PybindType):
    """Base of all classes here. Only the declared attributes exist; TensorRT itself creates most objects, by
    `_create`."""

    __slots__ = ("__weakref__",)
    _library: Library

    def __init__(self) -> None:
        raise TypeError(f"tensorrt.tensorrt.{type(self).__name__}: No constructor defined!")

    @classmethod
    def _create(cls, **fields: Any) -> Any:
        instance = object.__new__(cls)
        for name, value in fields.items():
            setattr(instance, name, value)
        return instance


class OfTheDevice(Bound):
    """Objects of a build, whose destructors want the GPU that they were made on."""

    __slots__ = ("_home",)

    @classmethod
    def _create(cls, **fields: Any) -> Any:
        return super()._create(**fields)._settle()

    def _settle(self) -> Any:
        self._home = self._library.cuda.current_ordinal()
        return self

    def __del__(self) -> None:
        home = getattr(self, "_home", None)
        if home is not None and self._library.cuda.current_ordinal() != home:
            self._library.died_elsewhere.append(type(self).__name__)


def plain_property(field_name: str, kind: type | str | None = None) -> property:
    """A property that keeps what it is given; `kind` is the type, or the name of the enumeration, that it must have."""

    def read(self: Any) -> Any:
        return getattr(self, field_name)

    def write(self: Any, value: Any) -> None:
        self._library.expect(value, kind)
        setattr(self, field_name, value)

    return property(read, write)


def fails_with(result: Any) -> Callable[[Callable], Callable]:
    """A method that returns `result` when a test makes it fail (`library.faults`); the logger hears of it."""

    def decorate(function: Callable) -> Callable:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._library.faults.hit(function.__name__):
                self._library.error(
                    getattr(self, "_logger", None), f"{function.__name__} failed because the test wants it so"
                )
                return result
            return function(self, *args, **kwargs)

        call.__name__, call.__doc__, call.__wrapped__ = function.__name__, function.__doc__, function  # type: ignore[attr-defined]
        return call

    return decorate


class Faults:
    """Which calls fail: `faults.fail("build_serialized_network", at=2)` is the second call of that method from now."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[int]] = {}
        self.calls: list[str] = []
        """Every call that could have been made to fail, in order."""

    def fail(self, name: str, at: int = 1) -> None:
        self._waiting.setdefault(name, []).append(at)

    def hit(self, name: str) -> bool:
        self.calls.append(name)
        counts = [count - 1 for count in self._waiting.get(name, [])]
        self._waiting[name] = [count for count in counts if count > 0]
        return 0 in counts


@dataclass
class Counts:
    """How much TensorRT worked."""

    builds: int = 0
    tactics_timed: int = 0
    """Layers whose kernels were measured while building: those that the timing cache did not know."""
    deserializations: int = 0
    contexts: int = 0
    enqueues: Counter[str] = field(default_factory=Counter)
    """Successful execute_async_v3 calls by engine name, captured ones too."""


class Library:
    """What the classes of one fake TensorRT share."""

    def __init__(self, version: str, cuda: FakeCuda) -> None:
        self.version, self.major, self.cuda = version, version.split(".")[0], cuda
        self.faults, self.counts = Faults(), Counts()
        self.messages: list[tuple[str, str]] = []
        """All that was logged, as (severity, text), whatever the logger kept."""
        self.died_elsewhere: list[str] = []
        """Builders' objects whose destructor ran while another GPU than the one that they were made on was current, or
        none."""
        self.cudnn = self.plugins_registered = False
        """Whether 8.6 finds cuDNN, and whether this process has registered the plugins, which the parser does too."""
        self.classes: dict[str, Any] = {}
        self.engines: weakref.WeakSet = weakref.WeakSet()
        self.contexts: weakref.WeakSet = weakref.WeakSet()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["classes"][name]
        except KeyError:
            raise AttributeError(f"TensorRT {self.version} has no {name}") from None

    def expect(self, value: Any, kind: type | str | None) -> None:
        """pybind11's answer to an argument of the wrong type."""
        wanted = self.classes[kind] if isinstance(kind, str) else kind
        number = wanted is int and hasattr(value, "__int__") and not isinstance(value, (str, float))
        if wanted is not None and not number and not isinstance(value, wanted):
            raise TypeError(f"incompatible function arguments: {value!r} is no {wanted.__name__}")

    def number(self, value: Any) -> int:
        self.expect(value, int)
        return int(value)

    def log(self, logger: Any, severity: str, text: str) -> None:
        self.messages.append((severity, text))
        if logger is not None:
            try:
                logger.log(self.Severity.__members__[severity], text)
            except Exception as error:
                print(f"[ERROR] Exception caught in log(): {error}", file=sys.stderr)

    def error(self, logger: Any, text: str) -> None:
        self.log(logger, "ERROR", text)


class ILogger(Bound):
    __slots__ = ("_ready",)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = object.__new__(cls)
        instance._ready = False
        return instance

    def __init__(self) -> None:
        self._ready = True

    def log(self, severity: Any, msg: str) -> None:
        print('[ERROR] Exception caught in log(): Tried to call pure virtual function "ILogger::log"', file=sys.stderr)


class Logger(ILogger):
    """Prints what is at least as severe as `min_severity` to stderr."""

    __slots__ = ("_min_severity",)

    def __init__(self, min_severity: Any = None) -> None:
        self._ready = True
        self._min_severity = self._library.Severity.WARNING if min_severity is None else min_severity
        self._library.expect(self._min_severity, "Severity")

    min_severity = plain_property("_min_severity", "Severity")

    def log(self, severity: Any, msg: str) -> None:
        if severity <= self._min_severity:
            print(f"[TRT] [{severity.name[0]}] {msg}", file=sys.stderr)


class IProgressMonitor(Bound):
    __slots__ = ("_ready",)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = object.__new__(cls)
        instance._ready = False
        return instance

    def __init__(self) -> None:
        self._ready = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_start"')

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::step_complete"')

    def phase_finish(self, phase_name: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_finish"')


class IProfiler(Bound):
    __slots__ = ("_ready",)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = object.__new__(cls)
        instance._ready = False
        return instance

    def __init__(self) -> None:
        self._ready = True

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProfiler::report_layer_time"')


class Dims(Bound):
    """A shape: indexable, iterable, equal to lists and tuples, but no tuple: no `+`, no hash, not comparable with
    another Dims."""

    __slots__ = ("_sizes",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Any = ()) -> None:
        if any(isinstance(size, float) or not hasattr(size, "__int__") for size in shape):
            raise TypeError(f"__init__(): incompatible constructor arguments: {shape!r}")
        self._sizes = [int(size) for size in shape]

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, arg0: Any) -> Any:
        return tuple(self._sizes[arg0]) if isinstance(arg0, slice) else self._sizes[arg0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, tuple)):
            raise TypeError(
                "__eq__(): incompatible function arguments: a Dims is comparable with a list or a tuple only"
            )
        return self._sizes == list(other)

    def __repr__(self) -> str:
        return f"({', '.join(map(str, self._sizes))})"


class IHostMemory(bytes):
    """A block of bytes with a buffer, and nothing else of bytes: memoryview(), bytes(), file.write() and hashlib take
    it, len() does not."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return memoryview(self).nbytes

    def __getattribute__(self, name: str) -> Any:
        if name == "nbytes" or name.startswith("__"):
            return object.__getattribute__(self, name)
        raise AttributeError(f"'tensorrt.tensorrt.IHostMemory' object has no attribute {name!r}")

    def __len__(self) -> int:
        raise TypeError("object of type 'tensorrt.tensorrt.IHostMemory' has no len()")

    def __getitem__(self, key: Any) -> Any:
        raise TypeError("'tensorrt.tensorrt.IHostMemory' object is not subscriptable")

    def __iter__(self) -> Any:
        raise TypeError("'tensorrt.tensorrt.IHostMemory' object is not iterable")

    def __repr__(self) -> str:
        return f"<tensorrt.tensorrt.IHostMemory of {self.nbytes} bytes>"

    __str__ = __repr__
