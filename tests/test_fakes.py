"""The fakes' own teeth: every mistake that they are there to catch is made here once, and caught."""

import ctypes
import gc
import json
import sys
import threading
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.backends.tensorrt import versions as tensorrt_versions

from .fakes import VERSIONS, Device, Machine, install
from .fakes.tensorrt_plan import Executable, read_plan

SIZE = 1024


@pytest.fixture(params=VERSIONS)
def every_machine(request):
    with install(request.param) as machine:
        yield machine


@pytest.fixture
def machine():
    with install() as machine:
        yield machine


@pytest.fixture
def cuda(machine) -> "Cuda":
    return Cuda(machine)


class Cuda:
    """Driver calls by short names: `cuda.memory(64)` is the value of a call that must work, `cuda.error(...)` the name
    of an error."""

    def __init__(self, machine: Machine, current: bool = True) -> None:
        self.fake, self.driver = machine.cuda, sys.modules["cuda.bindings.driver"]
        if current:
            self("cuInit", 0)
            self("cuCtxPushCurrent", self("cuDevicePrimaryCtxRetain", 0))

    def __call__(self, function: str, *args):
        status, *values = getattr(self.driver, function)(*args)
        assert status == self.driver.CUresult.CUDA_SUCCESS, self.fake.log[-1]
        return values[0] if len(values) == 1 else values

    def error(self, function: str, *args) -> str:
        return getattr(self.driver, function)(*args)[0].name.removeprefix("CUDA_ERROR_")

    def memory(self, size: int = SIZE):
        return self("cuMemAlloc", size)

    def pinned(self, size: int = SIZE) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self("cuMemHostAlloc", size, 0)))

    def stream(self):
        return self("cuStreamCreate", self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def begin(self, stream, mode: str = "THREAD_LOCAL") -> None:
        self("cuStreamBeginCapture", stream, self.driver.CUstreamCaptureMode[f"CU_STREAM_CAPTURE_MODE_{mode}"])

    def graph(self, stream):
        """Ends a capture: the executable graph."""
        captured = self("cuStreamEndCapture", stream)
        executable = self("cuGraphInstantiate", captured, 0)
        self("cuGraphDestroy", captured)
        return executable


def test_nothing_works_before_cuInit_and_without_a_context(machine):
    cuda = Cuda(machine, current=False)
    assert cuda.error("cuMemAlloc", 1) == "NOT_INITIALIZED"
    cuda("cuInit", 0)
    assert cuda.error("cuMemAlloc", 1) == "INVALID_CONTEXT"
    cuda("cuCtxPushCurrent", cuda("cuDevicePrimaryCtxRetain", 0))
    errors = []
    thread = threading.Thread(target=lambda: errors.append(cuda.error("cuMemAlloc", 1)))
    thread.start()
    thread.join()
    assert errors == ["INVALID_CONTEXT"]


def test_a_machine_without_a_driver_or_without_a_device_says_so():
    with install(driver=False) as machine, pytest.raises(RuntimeError, match="NVIDIA driver library"):
        Cuda(machine)
    with install(devices=[]) as machine:
        assert Cuda(machine, current=False).error("cuInit", 0) == "NO_DEVICE"


def test_results_are_shaped_as_the_real_module_shapes_them(cuda):
    driver = cuda.driver
    assert driver.cuDeviceGetName(16, 0) == (0, b"NVIDIA H200\0    ")
    assert driver.cuDeviceGet(7) == (driver.CUresult.CUDA_ERROR_INVALID_DEVICE, None)
    assert driver.cuMemGetInfo() == (0, 8 << 30, 8 << 30)
    assert driver.CUdeviceptr(5) != driver.CUdeviceptr(5)
    with pytest.raises(TypeError):
        driver.CUdeviceptr(5) + 1
    with pytest.raises(AttributeError):
        driver.CUstream(5).name = "x"


def test_the_host_that_reads_too_early_sees_what_was_there_before(cuda):
    memory, stream, source, target = cuda.memory(), cuda.stream(), cuda.pinned(), cuda.pinned()
    source[:], target[:] = 7, 0
    cuda("cuMemcpyHtoDAsync", memory, source.ctypes.data, SIZE, stream)
    cuda("cuMemcpyDtoHAsync", target.ctypes.data, memory, SIZE, stream)
    assert not target.any()
    cuda("cuStreamSynchronize", stream)
    assert (target == 7).all()


def test_the_host_that_overwrites_pinned_memory_too_early_changes_what_is_copied(cuda):
    memory, stream, host = cuda.memory(), cuda.stream(), cuda.pinned()
    host[:] = 1
    cuda("cuMemcpyHtoDAsync", memory, host.ctypes.data, SIZE, stream)
    host[:] = 2
    cuda("cuMemcpyDtoHAsync", host.ctypes.data, memory, SIZE, stream)
    cuda("cuStreamSynchronize", stream)
    assert (host == 2).all()


def test_on_an_eager_machine_the_host_that_fills_memory_after_the_copy_was_started_is_too_late():
    with install(eager=True) as machine:
        cuda = Cuda(machine)
        memory, stream, host = cuda.memory(), cuda.stream(), cuda.pinned()
        cuda("cuMemcpyHtoDAsync", memory, host.ctypes.data, SIZE, stream)
        host[:] = 1
        cuda("cuMemcpyDtoHAsync", host.ctypes.data, memory, SIZE, stream)
        assert (host == 0xFF).all()


def test_new_memory_holds_no_numbers(cuda):
    stream, host = cuda.stream(), cuda.pinned()
    cuda("cuMemcpyDtoHAsync", host.ctypes.data, cuda.memory(), SIZE, stream)
    cuda("cuStreamSynchronize", stream)
    assert np.isnan(host.view(np.float32)).all()
    assert np.isnan(host.view(np.float16)).all()


def test_streams_run_on_their_own_until_an_event_ties_them(cuda):
    first, second, memory, host = cuda.stream(), cuda.stream(), cuda.memory(), cuda.pinned()
    cuda("cuMemsetD8Async", memory, 5, SIZE, first)
    event = cuda("cuEventCreate", 0)
    cuda("cuEventRecord", event, first)
    cuda("cuMemcpyDtoHAsync", host.ctypes.data, memory, SIZE, second)
    cuda("cuStreamSynchronize", second)
    assert (host == 0xFF).all()
    cuda("cuStreamWaitEvent", second, event, 0)
    cuda("cuMemcpyDtoHAsync", host.ctypes.data, memory, SIZE, second)
    cuda("cuStreamSynchronize", second)
    assert (host == 5).all()


def test_copies_and_waits_are_counted(cuda):
    memory, stream, host = cuda.memory(), cuda.stream(), cuda.pinned()
    for _ in range(3):
        cuda("cuMemcpyHtoDAsync", memory, host.ctypes.data, 8, stream)
    cuda("cuMemcpyDtoDAsync", memory, int(memory) + 512, 16, stream)
    cuda("cuMemcpyHtoDAsync", memory, np.zeros(2), 16, stream)
    cuda("cuStreamSynchronize", stream)
    counts = cuda.fake.counts
    assert counts.copies == {"H2D": 4, "D2D": 1}
    assert counts.copied_bytes == {"H2D": 40, "D2D": 16}
    assert (counts.synchronizations, counts.pageable_copies) == (1, 1)


def test_pageable_memory_is_copied_when_it_is_given(cuda):
    memory, stream, pageable, pinned = cuda.memory(), cuda.stream(), np.full(SIZE, 3, np.uint8), cuda.pinned()
    cuda("cuMemcpyHtoDAsync", memory, pageable, SIZE, stream)
    pageable[:] = 4
    cuda("cuMemcpyDtoHAsync", pinned.ctypes.data, memory, SIZE, stream)
    cuda("cuMemcpyDtoHAsync", pageable, memory, SIZE, stream)
    assert (pageable == 3).all()
    assert (pinned == 3).all()


@pytest.mark.parametrize(
    "arguments",
    [
        lambda memory, host: (memory, 0, 8),
        lambda memory, host: (memory, int(memory), 8),
        lambda memory, host: (host.ctypes.data, host.ctypes.data, 8),
        lambda memory, host: (int(memory) + SIZE - 4, host.ctypes.data, 8),
        lambda memory, host: (memory, host.ctypes.data + SIZE - 4, 8),
        lambda memory, host: (int(memory) + SIZE, host.ctypes.data, 1),
        lambda memory, host: (0, host.ctypes.data, 1),
    ],
    ids=[
        "from NULL",
        "from the device",
        "to the host",
        "past the end",
        "from past the end",
        "behind the end",
        "to NULL",
    ],
)
def test_a_copy_with_wrong_pointers_is_refused_at_once(cuda, arguments):
    assert cuda.error("cuMemcpyHtoDAsync", *arguments(cuda.memory(), cuda.pinned()), cuda.stream()) == "INVALID_VALUE"


def test_memory_that_is_freed_before_its_work_ran_breaks_the_context_for_good(cuda):
    memory, stream = cuda.memory(), cuda.stream()
    cuda("cuMemsetD8Async", memory, 0, SIZE, stream)
    cuda("cuMemFree", memory)
    assert cuda.error("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"
    assert cuda.error("cuMemAlloc", 1) == "ILLEGAL_ADDRESS"
    assert "allocated at test_fakes.py" in cuda.fake.log[0]


def test_pinned_memory_that_is_freed_before_its_copy_ran_breaks_the_context(cuda):
    memory, stream, host = cuda.memory(), cuda.stream(), cuda.pinned()
    cuda("cuMemcpyHtoDAsync", memory, host.ctypes.data, SIZE, stream)
    cuda("cuMemFreeHost", host.ctypes.data)
    assert cuda.error("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"


def test_freeing_twice_or_freeing_a_piece_is_refused(cuda):
    memory, host = cuda.memory(), cuda.pinned()
    assert cuda.error("cuMemFree", int(memory) + 256) == "INVALID_VALUE"
    assert cuda.error("cuMemFreeHost", int(memory)) == "INVALID_VALUE"
    cuda("cuMemFree", memory)
    cuda("cuMemFreeHost", host.ctypes.data)
    assert cuda.error("cuMemFree", memory) == "INVALID_VALUE"
    assert cuda.error("cuMemFreeHost", host.ctypes.data) == "INVALID_VALUE"


def test_the_memory_of_a_device_ends_and_comes_back():
    with install(devices=[Device(memory=1 << 20)]) as machine:
        cuda = Cuda(machine)
        memory = cuda.memory(1 << 19)
        assert cuda.error("cuMemAlloc", (1 << 19) + 1) == "OUT_OF_MEMORY"
        assert cuda("cuMemGetInfo") == [1 << 19, 1 << 20]
        cuda("cuMemFree", memory)
        cuda.memory(1 << 20)


def test_devices_do_not_see_each_others_memory_and_streams():
    with install(devices=[Device(), Device("NVIDIA L4", (8, 9))]) as machine:
        cuda = Cuda(machine)
        memory, stream = cuda.memory(), cuda.stream()
        cuda("cuCtxPushCurrent", cuda("cuDevicePrimaryCtxRetain", 1))
        assert cuda.error("cuMemsetD8Async", memory, 0, 8, cuda.stream()) == "INVALID_VALUE"
        assert cuda.error("cuMemsetD8Async", memory, 0, 8, stream) == "INVALID_CONTEXT"
        assert cuda.error("cuMemFree", memory) == "INVALID_VALUE"
        cuda("cuCtxPopCurrent")
        cuda("cuMemsetD8Async", memory, 0, 8, stream)


def test_events_tell_time_once_they_are_passed(cuda):
    stream, start, end = cuda.stream(), cuda("cuEventCreate", 0), cuda("cuEventCreate", 0)
    untimed = cuda("cuEventCreate", cuda.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
    assert cuda.error("cuEventElapsedTime", start, end) == "INVALID_HANDLE"
    for event in (start, untimed, end):
        cuda("cuEventRecord", event, stream)
    assert cuda.error("cuEventElapsedTime", start, end) == "NOT_READY"
    assert cuda.error("cuEventQuery", end) == "NOT_READY"
    cuda("cuEventSynchronize", end)
    assert 0 <= cuda("cuEventElapsedTime", start, end) < 1000
    assert cuda.error("cuEventElapsedTime", start, untimed) == "INVALID_HANDLE"


def test_polling_comes_to_an_end(cuda):
    stream, memory = cuda.stream(), cuda.memory()
    for _ in range(3):
        cuda("cuMemsetD8Async", memory, 0, 8, stream)
    assert [cuda.error("cuStreamQuery", stream) for _ in range(2)] == ["NOT_READY"] * 2
    cuda("cuStreamQuery", stream)


def test_captured_work_runs_when_it_is_launched_and_not_before(cuda):
    memory, stream, host = cuda.memory(), cuda.stream(), cuda.pinned()
    cuda.begin(stream)
    cuda("cuMemcpyHtoDAsync", memory, host.ctypes.data, SIZE, stream)
    cuda.fake.launch(int(stream), "add one", lambda device: device.view(int(memory), SIZE).__iadd__(1))
    cuda("cuMemcpyDtoHAsync", host.ctypes.data, memory, SIZE, stream)
    graph = cuda.graph(stream)
    host[:] = 0
    cuda("cuStreamSynchronize", stream)
    assert not host.any()
    for _ in range(3):
        cuda("cuGraphLaunch", graph, stream)
    cuda("cuStreamSynchronize", stream)
    assert (host == 3).all()
    assert (cuda.fake.counts.graph_launches, cuda.fake.counts.kernels["add one"]) == (3, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda cuda, stream: ("cuStreamSynchronize", stream),
        lambda cuda, stream: ("cuStreamQuery", stream),
        lambda cuda, stream: ("cuMemAlloc", 8),
        lambda cuda, stream: ("cuCtxSynchronize",),
        lambda cuda, stream: ("cuMemHostAlloc", 8, 0),
    ],
    ids=["synchronize", "query", "alloc", "device", "pinned"],
)
def test_a_capture_in_which_the_host_waits_or_allocates_is_invalid(cuda, call):
    stream = cuda.stream()
    cuda.begin(stream)
    assert cuda.error(*call(cuda, stream)) == "STREAM_CAPTURE_UNSUPPORTED"
    assert cuda("cuStreamIsCapturing", stream) == 2
    assert cuda.driver.cuStreamEndCapture(stream) == (cuda.driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None)
    cuda("cuStreamSynchronize", stream)


def test_a_relaxed_capture_lets_the_host_allocate(cuda):
    stream = cuda.stream()
    cuda.begin(stream, "RELAXED")
    assert cuda.memory()
    assert cuda.graph(stream)


def test_a_global_capture_is_spoilt_by_another_thread_and_a_thread_local_one_is_not(cuda):
    context, stream = cuda("cuCtxGetCurrent"), cuda.stream()

    def allocate() -> None:
        cuda.driver.cuCtxPushCurrent(context)
        cuda.driver.cuMemAlloc(8)

    for mode, outcome in (("THREAD_LOCAL", "SUCCESS"), ("GLOBAL", "STREAM_CAPTURE_INVALIDATED")):
        cuda.begin(stream, mode)
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
        assert cuda.error("cuStreamEndCapture", stream).removeprefix("CUDA_") == outcome


def test_pageable_memory_spoils_a_capture(cuda):
    stream, memory = cuda.stream(), cuda.memory()
    cuda.begin(stream)
    assert cuda.error("cuMemcpyHtoDAsync", memory, np.zeros(8), 8, stream) == "STREAM_CAPTURE_UNSUPPORTED"
    assert cuda.error("cuMemsetD8Async", memory, 0, 8, stream) == "STREAM_CAPTURE_INVALIDATED"
    assert cuda.error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_INVALIDATED"


def test_the_default_stream_cannot_be_captured(cuda):
    assert (
        cuda.error("cuStreamBeginCapture", 0, cuda.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        == "STREAM_CAPTURE_UNSUPPORTED"
    )


def test_a_second_stream_joins_a_capture_by_an_event_and_must_come_back(cuda):
    first, second, event, memory = cuda.stream(), cuda.stream(), cuda("cuEventCreate", 2), cuda.memory()
    for comes_back in (False, True):
        cuda.begin(first)
        cuda("cuEventRecord", event, first)
        cuda("cuStreamWaitEvent", second, event, 0)
        cuda("cuMemsetD8Async", memory, 1, 8, second)
        if comes_back:
            cuda("cuEventRecord", event, second)
            cuda("cuStreamWaitEvent", first, event, 0)
            cuda.graph(first)
        else:
            assert cuda.error("cuStreamEndCapture", first) == "STREAM_CAPTURE_UNJOINED"


def test_a_graph_that_is_launched_after_its_memory_was_freed_breaks_the_context(cuda):
    stream, memory = cuda.stream(), cuda.memory()
    cuda.begin(stream)
    cuda("cuMemsetD8Async", memory, 0, 8, stream)
    graph = cuda.graph(stream)
    cuda("cuMemFree", memory)
    cuda("cuGraphLaunch", graph, stream)
    assert cuda.error("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"


def test_destroyed_objects_are_refused(cuda):
    stream, event = cuda.stream(), cuda("cuEventCreate", 0)
    cuda.begin(stream)
    graph = cuda.graph(stream)
    cuda("cuGraphExecDestroy", graph)
    cuda("cuEventDestroy", event)
    assert cuda.error("cuGraphLaunch", graph, stream) == "INVALID_VALUE"
    assert cuda.error("cuEventRecord", event, stream) == "INVALID_HANDLE"
    cuda("cuStreamDestroy", stream)
    assert cuda.error("cuStreamSynchronize", stream) == "INVALID_HANDLE"


def test_a_kernel_that_leaves_its_memory_or_raises_breaks_the_context(cuda):
    memory, stream = cuda.memory(), cuda.stream()
    cuda.fake.launch(int(stream), "overrun", lambda device: device.view(int(memory) + 8, SIZE))
    assert cuda.error("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"


def test_everything_that_is_not_freed_is_listed(cuda):
    memory, host, stream, event = cuda.memory(), cuda.pinned(), cuda.stream(), cuda("cuEventCreate", 0)
    cuda.begin(stream)
    graph = cuda.graph(stream)
    assert cuda.fake.live().keys() == {
        "device memory",
        "pinned memory",
        "streams",
        "events",
        "executable graphs",
        "contexts",
    }
    cuda("cuGraphExecDestroy", graph)
    cuda("cuMemFree", memory)
    cuda("cuMemFreeHost", host.ctypes.data)
    cuda("cuStreamDestroy", stream)
    cuda("cuEventDestroy", event)
    cuda("cuCtxPopCurrent")
    cuda("cuDevicePrimaryCtxRelease", 0)
    assert cuda.fake.live() == {}


def test_any_call_can_be_made_to_fail(cuda):
    result = cuda.driver.CUresult
    cuda.fake.fail("cuMemAlloc", result.CUDA_ERROR_OUT_OF_MEMORY, at=2)
    assert [cuda.driver.cuMemAlloc(8)[0] for _ in range(3)] == [
        result.CUDA_SUCCESS,
        result.CUDA_ERROR_OUT_OF_MEMORY,
        result.CUDA_SUCCESS,
    ]
    cuda.fake.fail("cuEventCreate", result.CUDA_ERROR_LAUNCH_FAILED)
    assert cuda.error("cuEventCreate", 0) == cuda.error("cuMemAlloc", 8) == "LAUNCH_FAILED"
    assert cuda.fake.calls[-2:] == ["cuEventCreate", "cuMemAlloc"]


def test_modules_are_put_back():
    before = {name: sys.modules.get(name) for name in ("tensorrt", "cuda", "cuda.bindings", "cuda.bindings.driver")}
    with install() as machine:
        import tensorrt
        from cuda.bindings import driver

        assert isinstance(tensorrt, ModuleType)
        assert tensorrt is machine.tensorrt
        assert driver.cuDriverGetVersion()[1] == 13000
    assert {name: sys.modules.get(name) for name in before} == before


# TensorRT


def model(dtype: int = TensorProto.FLOAT, uint8: bool = False, operator: str = "Mul") -> onnx.ModelProto:
    """y = cast(x) * weight, with x [n, 4] and y of type `dtype`; as uint8, with another cast around."""
    outer = TensorProto.UINT8 if uint8 else dtype
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=dtype, name="first"),
        helper.make_node(operator, ["a", "weight"], ["b"], name="multiply"),
        helper.make_node("Cast", ["b"], ["y"], to=outer, name="last"),
    ]
    weight = numpy_helper.from_array(np.arange(4, dtype=helper.tensor_dtype_to_np_dtype(dtype)), "weight")
    x, y = (helper.make_tensor_value_info(name, outer, ["n", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Build:
    """A build in steps; `plan()` does what is left."""

    def __init__(self, machine: Machine, proto: onnx.ModelProto | None = None) -> None:
        self.trt = trt = machine.tensorrt
        self.logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        self.builder = trt.Builder(self.logger)
        flags = trt.NetworkDefinitionCreationFlag
        self.network = self.builder.create_network(
            1 << int(flags.STRONGLY_TYPED if hasattr(flags, "STRONGLY_TYPED") else flags.EXPLICIT_BATCH)
        )
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.parsed = self.parser.parse((proto or model()).SerializeToString())
        self.config = self.builder.create_builder_config()
        self.config.clear_flag(trt.BuilderFlag.TF32)

    def profile(self, low: int = 1, best: int = 2, high: int = 4) -> "Build":
        profile = self.builder.create_optimization_profile()
        profile.set_shape("x", (low, 4), (best, 4), (high, 4))
        self.config.add_optimization_profile(profile)
        return self

    def plan(self):
        return self.builder.build_serialized_network(self.network, self.config)


class Loaded:
    """An engine on a device: `run(x)` is what it computes, `bind()` gives it memory."""

    def __init__(self, machine: Machine, plan: object) -> None:
        self.cuda = Cuda(machine)
        self.stream = self.cuda.stream()
        self.trt = machine.tensorrt
        self.logger = self.trt.Logger(self.trt.Logger.INTERNAL_ERROR)
        self.engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()

    def bind(self, n: int) -> None:
        assert self.context.set_input_shape("x", (n, 4))
        self.memory = {name: self.cuda.memory() for name in "xy"}
        for name, address in self.memory.items():
            assert self.context.set_tensor_address(name, int(address))

    def run(self, x: np.ndarray) -> np.ndarray:
        self.bind(len(x))
        host = self.cuda.pinned(x.nbytes).view(x.dtype).reshape(x.shape)
        host[:] = x
        self.cuda("cuMemcpyHtoDAsync", self.memory["x"], host.ctypes.data, x.nbytes, self.stream)
        assert self.context.execute_async_v3(int(self.stream))
        self.cuda("cuMemcpyDtoHAsync", host.ctypes.data, self.memory["y"], x.nbytes, self.stream)
        self.cuda("cuStreamSynchronize", self.stream)
        return host.copy()


@pytest.fixture
def loaded(machine) -> Loaded:
    return Loaded(machine, Build(machine).profile().plan())


def last_error(machine: Machine) -> str:
    return next(text for severity, text in reversed(machine.library.messages) if severity == "ERROR")


def test_a_plan_computes_what_the_graph_says(every_machine):
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    loaded = Loaded(every_machine, Build(every_machine).profile().plan())
    assert np.array_equal(loaded.run(x), x * np.arange(4, dtype=np.float32))
    assert every_machine.library.counts.enqueues.total() == 1


def test_a_uint8_picture_goes_through_casts(every_machine):
    x = np.arange(8, dtype=np.uint8).reshape(2, 4)
    assert np.array_equal(
        Loaded(every_machine, Build(every_machine, model(uint8=True)).profile().plan()).run(x),
        x * np.arange(4, dtype=np.uint8),
    )


def test_every_version_has_its_own_names_and_no_others(every_machine):
    trt, major = every_machine.tensorrt, every_machine.library.major
    engine = Loaded(every_machine, Build(every_machine).profile().plan()).engine
    assert hasattr(trt, "IProgressMonitor") == hasattr(engine, "device_memory_size_v2") == (major != "8")
    assert hasattr(trt.BuilderFlag, "FP16") == hasattr(engine, "device_memory_size") == (major != "11")
    for thing in (engine, Build(every_machine).config, trt.Logger()):
        with pytest.raises(AttributeError):
            thing.some_name_of_another_version = 1
    if major == "8":
        with pytest.raises(TypeError):
            engine.create_execution_context(None)


def test_objects_behave_as_those_of_pybind11(machine):
    trt = machine.tensorrt
    assert trt.DataType.FLOAT != 0
    assert trt.float32 == trt.DataType.FLOAT
    assert 1 << int(trt.BuilderFlag.TF32) == 64
    with pytest.raises(TypeError):
        1 << trt.BuilderFlag.TF32
    with pytest.raises(TypeError, match="No constructor"):
        trt.IBuilderConfig()
    with pytest.raises(TypeError):
        trt.Builder(None)

    class Forgetful(trt.ILogger):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        Forgetful()
    shape = trt.Dims((1, 2))
    assert (shape, tuple(shape), shape[:1]) == ((1, 2), (1, 2), (1,))
    with pytest.raises(TypeError):
        shape + (3,)
    with pytest.raises(TypeError):
        shape == trt.Dims((1, 2))  # noqa: B015
    plan = Build(machine).profile().plan()
    assert plan.nbytes == len(bytes(plan)) == memoryview(plan).nbytes
    with pytest.raises(TypeError):
        len(plan)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda build: None, "no optimization profile"),
        (
            lambda build: build.config.add_optimization_profile(build.builder.create_optimization_profile()),
            "missing values",
        ),
        (lambda build: setattr(build.network.get_input(0), "shape", (3, 4)) or build.profile(), "do not fit"),
        (lambda build: build.profile().network.unmark_output(build.network.get_output(0)), "at least one output"),
    ],
    ids=["no profile", "empty profile", "profile against a fixed dimension", "no output"],
)
def test_a_build_that_cannot_be_gives_none_and_says_why(every_machine, spoil, words):
    build = Build(every_machine)
    spoil(build)
    assert build.plan() is None
    assert words in last_error(every_machine)


def test_a_profile_that_contradicts_itself_raises(machine):
    with pytest.raises(RuntimeError, match="inconsistent"):
        Build(machine).profile(low=3, best=2)


def test_uint8_elsewhere_than_at_a_cast_fails_the_build(every_machine):
    proto = model(uint8=True)
    proto.graph.node[2].CopyFrom(helper.make_node("Cast", ["b"], ["c"], to=TensorProto.UINT8))
    proto.graph.node.append(helper.make_node("Identity", ["c"], ["y"], name="copy"))
    assert Build(every_machine, proto).profile().plan() is None
    assert "UINT8 output y comes from Identity copy" in last_error(every_machine)


def test_precision_is_a_flag_for_8_and_the_graphs_for_11(every_machine):
    build = Build(every_machine, model(TensorProto.FLOAT16)).profile()
    if every_machine.library.major == "8":
        assert build.plan() is None
        assert "fp16 is not configured" in last_error(every_machine)
        build.config.set_flag(build.trt.BuilderFlag.FP16)
        build.network.get_layer(1).precision = build.trt.DataType.FLOAT
    elif every_machine.library.major == "10":
        build.config.set_flag(build.trt.BuilderFlag.FP16)
        assert build.plan() is None
        assert "strongly typed" in last_error(every_machine)
        build.config.clear_flag(build.trt.BuilderFlag.FP16)
    else:
        assert not hasattr(build.network.get_layer(1), "precision")
        with pytest.raises(AttributeError):
            build.network.get_layer(1).precision = build.trt.DataType.FLOAT
    assert build.plan() is not None


def test_8_without_explicit_batch_parses_nothing():
    with install("8.6.0") as machine:
        trt = machine.tensorrt
        logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        parser = trt.OnnxParser(trt.Builder(logger).create_network(), logger)
        assert not parser.parse(model().SerializeToString())
        assert "explicit batch" in parser.get_error(0).desc()


def test_the_parser_names_what_it_cannot_read(every_machine, tmp_path):
    build = Build(every_machine, model(operator="Swish"))
    error = build.parser.get_error(0)
    assert not build.parsed
    assert error.node() == 1
    assert "Swish" in error.desc()
    assert not build.parser.parse_from_file(str(tmp_path / "missing.onnx"))
    assert build.parser.num_errors == 2


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (helper.make_node("Shape", ["x"], ["s"], start=1, end=2, name="measure"), "Shape with start or end"),
        (helper.make_node("ReduceMean", ["x", "axes"], ["s"], name="mean"), "ReduceMean with its axes as an input"),
        (helper.make_node("Gelu", ["x"], ["s"], name="gelu"), "No importer registered for op: Gelu"),
    ],
)
def test_8_refuses_what_its_parser_does_not_know_or_misreads(every_machine, node, words):
    proto = model()
    proto.graph.node.append(node)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    build = Build(every_machine, proto)
    assert build.parsed == (every_machine.library.major != "8")
    if not build.parsed:
        assert words in build.parser.get_error(0).desc()
        assert build.parser.get_error(0).node() == 3


def norm_model() -> onnx.ModelProto:
    """y = instance_norm(x), with x [n, 2, 8] and an epsilon, scale and bias that nobody guesses."""
    node = helper.make_node("InstanceNormalization", ["x", "scale", "bias"], ["y"], name="norm", epsilon=0.25)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2, 8]) for name in "xy")
    weights = [
        numpy_helper.from_array(np.array(values, np.float32), name)
        for name, values in (("scale", (1, 3)), ("bias", (-1, 2)))
    ]
    return helper.make_model(
        helper.make_graph([node], "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )


def norm_build(machine: Machine) -> Build:
    build = Build(machine, norm_model())
    profile = build.builder.create_optimization_profile()
    profile.set_shape("x", *[(2, 2, 8)] * 3)
    build.config.add_optimization_profile(profile)
    return build


def test_8_makes_a_plugin_of_instance_normalization_that_wants_cudnn_and_registration():
    with install("8.6.0") as machine:
        build, trt = norm_build(machine), machine.tensorrt
        layer = next(layer for layer in build.network if layer.type == trt.LayerType.PLUGIN_V2)
        assert not hasattr(layer, "plugin")
        layer.__class__ = trt.IPluginV2Layer
        assert layer.plugin.plugin_type == "InstanceNormalization_TRT"
        assert build.plan() is None
        assert "initialize: 15" in last_error(machine)
        machine.library.cudnn = True
        plan = bytes(build.plan())
    with install("8.6.0") as machine:
        trt = machine.tensorrt
        runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
        assert runtime.deserialize_cuda_engine(plan) is None
        assert "could not find plugin: InstanceNormalization_TRT" in last_error(machine)
        trt.init_libnvinfer_plugins(None, "")
        assert runtime.deserialize_cuda_engine(plan) is not None


def test_what_is_read_of_the_plugin_is_what_the_real_one_writes():
    """Bytes of TensorRT 8.6.0's own plugin, made with epsilon 1e-6, scales 1, 2, 3 and biases 4, 5, 6."""
    content = bytes.fromhex(
        "bd3786350300000003000000000000000000803f00000040000040400300000000000000000080400000a0400000c0400000000000000000"
    )
    epsilon, scale, bias = tensorrt_versions.read_instance_norm(content)
    assert (round(epsilon, 12), *scale, *bias) == (1e-6, 1, 2, 3, 4, 5, 6)


def test_the_normalization_in_the_plugins_place_computes_what_the_graph_says():
    with install("8.6.0") as machine:
        build = norm_build(machine)
        constants = tensorrt_versions.replace_plugins(machine.tensorrt, build.network)
        plan = read_plan(bytes(build.plan()))
        assert plan.header["plugins"] == []
        assert [layer["LayerType"] for layer in plan.header["layers"]].count("NORMALIZATION") == 1
        x = np.random.default_rng(0).standard_normal((2, 2, 8)).astype(np.float32)
        wanted = Executable(norm_model().SerializeToString()).run({"x": x})["y"]
        assert np.array_equal(Executable(plan.model).run({"x": x})["y"], wanted)
        del constants
        gc.collect()
        assert build.plan() is None
        assert "were freed before the build" in last_error(machine)


def test_tf32_must_be_cleared(every_machine):
    build = Build(every_machine).profile()
    build.config.set_flag(build.trt.BuilderFlag.TF32)
    assert build.plan() is None
    assert "TF32 is set, as it is by default" in last_error(every_machine)


@pytest.mark.parametrize(
    ("dtype", "size", "good"),
    [(TensorProto.FLOAT16, 64, True), (TensorProto.FLOAT16, 512, False), (TensorProto.FLOAT, 64, False)],
)
def test_attention_as_one_operator_wants_half_precision_and_a_head_that_a_kernel_takes(machine, dtype, size, good):
    inputs = [helper.make_tensor_value_info(name, dtype, [1, 2, 4, size]) for name in "qkv"]
    graph = helper.make_graph(
        [helper.make_node("Attention", list("qkv"), ["y"], name="attend")],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", dtype, [1, 2, 4, size])],
    )
    build = Build(machine, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    assert build.parsed
    assert (build.plan() is not None) == good
    assert good or "Could not find any implementation for node attend: Attention " in last_error(machine)


def test_weights_beside_the_file_are_found(machine, tmp_path):
    onnx.save_model(model(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    build = Build(machine)
    assert build.parser.parse_from_file(str(tmp_path / "m.onnx"))
    assert build.profile().plan() is not None
    (tmp_path / "m.data").unlink()
    assert not build.parser.parse_from_file(str(tmp_path / "m.onnx"))


@pytest.mark.parametrize("stop_at", [None, "step", "raise"])
def test_the_progress_monitor_sees_nested_phases_and_can_stop_the_build(machine, stop_at, capsys):
    seen = []

    class Monitor(machine.tensorrt.IProgressMonitor):
        def phase_start(self, phase_name, parent_phase, num_steps):
            seen.append(("start", phase_name, parent_phase))

        def step_complete(self, phase_name, step):
            if stop_at == "raise":
                raise KeyError("x")
            return stop_at is None

        def phase_finish(self, phase_name):
            seen.append(("finish", phase_name, None))

    build = Build(machine).profile()
    build.config.progress_monitor = Monitor()
    assert (build.plan() is None) == (stop_at is not None)
    assert seen == [
        ("start", "Building engine", None),
        ("start", "Timing tactics", "Building engine"),
        ("finish", "Timing tactics", None),
        ("finish", "Building engine", None),
    ]


def test_a_timing_cache_saves_the_timing(machine):
    build, counts = Build(machine).profile(), machine.library.counts
    cache = build.config.create_timing_cache(b"")
    assert build.config.set_timing_cache(cache, False)
    build.plan()
    assert counts.tactics_timed == 3
    again = Build(machine).profile()
    assert again.config.set_timing_cache(again.config.create_timing_cache(cache.serialize()), ignore_mismatch=False)
    again.plan()
    assert counts.tactics_timed == 3


def test_a_timing_cache_of_another_version_or_gpu_is_refused(machine):
    foreign = bytes(Build(machine).config.create_timing_cache(b"").serialize())
    for version, device in (("11.4.0", Device()), ("10.16.1", Device("NVIDIA L4", (8, 9)))):
        with install(version, [device]) as other:
            config = Build(other).config
            assert not config.set_timing_cache(config.create_timing_cache(foreign), False)
            assert not config.set_timing_cache(config.create_timing_cache(b"rubbish"), True)


def test_a_plan_of_another_version_or_capability_or_a_broken_one_gives_none(machine):
    plan = bytes(Build(machine).profile().plan())
    changed = plan[:-8] + bytes([plan[-8] ^ 1]) + plan[-7:]
    for version, device, content, words in (
        ("11.4.0", Device(), plan, "Version tag"),
        ("10.16.1", Device("NVIDIA L4", (8, 9)), plan, "incompatible device"),
        ("10.16.1", Device(), plan[:-1], "Serialization"),
        ("10.16.1", Device(), changed, "Serialization"),
        ("10.16.1", Device(), b"not a plan", "Magic tag"),
    ):
        with install(version, [device]) as other:
            logger = other.tensorrt.Logger(other.tensorrt.Logger.INTERNAL_ERROR)
            assert other.tensorrt.Runtime(logger).deserialize_cuda_engine(content) is None
            assert words in last_error(other)
            assert other.cuda.live() == {}


def test_a_plan_of_another_gpu_of_the_same_capability_loads_with_a_warning(machine):
    plan = bytes(Build(machine).profile().plan())
    with install(devices=[Device("NVIDIA H100")]) as other:
        assert (
            other.tensorrt.Runtime(other.tensorrt.Logger(other.tensorrt.Logger.ERROR)).deserialize_cuda_engine(plan)
            is not None
        )
        assert "different models of devices" in other.library.messages[-1][1]


def test_shapes_outside_of_the_profile_are_refused(loaded, machine):
    for name, shape in (("x", (5, 4)), ("x", (2, 3)), ("x", (2,)), ("y", (2, 4)), ("z", (2, 4))):
        assert not loaded.context.set_input_shape(name, shape)
    assert not loaded.context.set_tensor_address("z", 256)
    with pytest.raises(RuntimeError):
        loaded.context.set_optimization_profile_async(1, int(loaded.stream))


def test_work_is_not_enqueued_before_all_is_set(loaded, machine):
    def refused() -> str:
        assert not loaded.context.execute_async_v3(int(loaded.stream))
        return last_error(machine)

    assert loaded.context.infer_shapes() == ["x"]
    assert "shape of input tensor x" in refused()
    loaded.context.set_input_shape("x", (2, 4))
    assert "Address is not set" in refused()
    loaded.bind(2)
    loaded.context.set_tensor_address("y", int(loaded.memory["y"]) + 16)
    assert "aligned" in refused()
    loaded.context.set_tensor_address("y", int(loaded.memory["y"]))
    assert loaded.context.execute_async_v3(int(loaded.stream))


def test_an_output_in_too_little_memory_breaks_the_context(loaded):
    loaded.bind(2)
    loaded.context.set_tensor_address("y", int(loaded.cuda.memory(16)))
    assert loaded.context.execute_async_v3(int(loaded.stream))
    assert loaded.cuda.error("cuStreamSynchronize", loaded.stream) == "ILLEGAL_ADDRESS"


def test_host_memory_as_an_address_breaks_the_context(loaded):
    loaded.bind(2)
    loaded.context.set_tensor_address("x", loaded.cuda.pinned().ctypes.data)
    assert loaded.context.execute_async_v3(int(loaded.stream))
    assert loaded.cuda.error("cuStreamSynchronize", loaded.stream) == "ILLEGAL_ADDRESS"


def test_an_output_over_an_input_spoils_the_result(loaded):
    loaded.bind(2)
    loaded.cuda("cuMemsetD8Async", loaded.memory["x"], 0, SIZE, loaded.stream)
    loaded.context.set_tensor_address("y", int(loaded.memory["x"]))
    assert loaded.context.execute_async_v3(int(loaded.stream))
    host = loaded.cuda.pinned(32)
    loaded.cuda("cuMemcpyDtoHAsync", host.ctypes.data, loaded.memory["x"], 32, loaded.stream)
    loaded.cuda("cuStreamSynchronize", loaded.stream)
    assert np.isnan(host.view(np.float32)).all()


def test_a_capture_wants_a_plain_enqueue_first(loaded, machine):
    loaded.bind(2)
    loaded.cuda.begin(loaded.stream)
    assert not loaded.context.execute_async_v3(int(loaded.stream))
    assert "enqueue once before a capture" in last_error(machine)
    assert loaded.cuda.error("cuStreamEndCapture", loaded.stream) == "STREAM_CAPTURE_INVALIDATED"
    assert loaded.context.execute_async_v3(int(loaded.stream))
    loaded.cuda.begin(loaded.stream)
    assert loaded.context.execute_async_v3(int(loaded.stream))
    loaded.cuda("cuGraphLaunch", loaded.cuda.graph(loaded.stream), loaded.stream)
    loaded.cuda("cuStreamSynchronize", loaded.stream)
    assert machine.cuda.counts.kernels == {loaded.engine.name: 2}


@pytest.mark.parametrize("lost", ["context", "engine"])
def test_a_graph_that_outlives_its_context_or_engine_breaks_the_context(loaded, lost):
    loaded.bind(2)
    assert loaded.context.execute_async_v3(int(loaded.stream))
    loaded.cuda.begin(loaded.stream)
    assert loaded.context.execute_async_v3(int(loaded.stream))
    graph = loaded.cuda.graph(loaded.stream)
    loaded.context = None
    if lost == "engine":
        loaded.engine = None
    gc.collect()
    loaded.cuda("cuGraphLaunch", graph, loaded.stream)
    assert loaded.cuda.error("cuStreamSynchronize", loaded.stream) == "ILLEGAL_ADDRESS"


def test_a_context_on_memory_of_ours_must_be_given_enough(every_machine):
    loaded = Loaded(every_machine, Build(every_machine).profile().plan())
    trt, engine = every_machine.tensorrt, loaded.engine
    old = every_machine.library.major == "8"
    make = (
        engine.create_execution_context_without_device_memory
        if old
        else lambda: engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    )
    del loaded.context
    loaded.context = make()
    needed = engine.device_memory_size if old else engine.device_memory_size_v2
    loaded.bind(4)
    assert not loaded.context.execute_async_v3(int(loaded.stream))
    assert "device memory" in last_error(every_machine)
    scratch = int(loaded.cuda.memory(needed))
    if old:
        loaded.context.device_memory = scratch
    else:
        loaded.context.set_device_memory(scratch, needed)
        assert 0 < loaded.context.update_device_memory_size_for_shapes() <= needed
    assert loaded.context.execute_async_v3(int(loaded.stream))
    loaded.cuda("cuStreamSynchronize", loaded.stream)


def test_before_9_contexts_do_not_share_a_profile_unless_told_to():
    with install("8.6.0") as machine:
        build = Build(machine).profile()
        loaded = Loaded(machine, build.plan())
        second = loaded.engine.create_execution_context()
        assert second.active_optimization_profile == -1
        assert not second.set_input_shape("x", (2, 4))
        build.config.set_preview_feature(machine.tensorrt.PreviewFeature.PROFILE_SHARING_0806, True)
        shared = machine.tensorrt.Runtime(build.logger).deserialize_cuda_engine(build.plan())
        contexts = [shared.create_execution_context() for _ in range(2)]
        assert all(context.set_input_shape("x", (2, 4)) for context in contexts)


def test_engines_and_contexts_hold_memory_until_they_are_dropped(machine):
    loaded = Loaded(machine, Build(machine).profile().plan())
    assert len(machine.cuda.live()["device memory"]) == 2
    del loaded.context
    assert len(machine.cuda.live()["device memory"]) == 1
    del loaded.engine
    assert "device memory" not in machine.cuda.live()


def test_too_little_device_memory_gives_no_engine_or_no_context(machine):
    plan = bytes(Build(machine).profile().plan())
    with install(devices=[Device(memory=256)]) as small:
        engine = small.tensorrt.Runtime(
            small.tensorrt.Logger(small.tensorrt.Logger.INTERNAL_ERROR)
        ).deserialize_cuda_engine(plan)
        assert engine.create_execution_context() is None
        assert "OutOfMemory" in last_error(small)
    with install(devices=[Device(memory=16)]) as tiny:
        assert (
            tiny.tensorrt.Runtime(tiny.tensorrt.Logger(tiny.tensorrt.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(
                plan
            )
            is None
        )
        assert "OutOfMemory" in last_error(tiny)


def test_a_build_needs_no_current_context_but_a_driver(machine):
    assert Build(machine).profile().plan() is not None
    with install(driver=False) as other, pytest.raises(TypeError, match="factory function returned nullptr"):
        other.tensorrt.Runtime(other.tensorrt.Logger(other.tensorrt.Logger.INTERNAL_ERROR))


@pytest.mark.parametrize(
    ("method", "result"),
    [
        ("create_network", None),
        ("create_builder_config", None),
        ("build_serialized_network", None),
        ("deserialize_cuda_engine", None),
        ("create_execution_context", None),
        ("set_input_shape", False),
        ("set_tensor_address", False),
        ("execute_async_v3", False),
        ("parse", False),
    ],
)
def test_every_step_can_be_made_to_fail(machine, method, result):
    build = Build(machine).profile()
    loaded = Loaded(machine, build.plan())
    loaded.bind(2)
    calls = {
        "create_network": build.builder.create_network,
        "create_builder_config": build.builder.create_builder_config,
        "build_serialized_network": build.plan,
        "deserialize_cuda_engine": lambda: machine.tensorrt.Runtime(build.logger).deserialize_cuda_engine(
            loaded.engine.serialize()
        ),
        "create_execution_context": loaded.engine.create_execution_context,
        "set_input_shape": lambda: loaded.context.set_input_shape("x", (2, 4)),
        "set_tensor_address": lambda: loaded.context.set_tensor_address("x", 256),
        "parse": lambda: build.parser.parse(model().SerializeToString()),
        "execute_async_v3": lambda: loaded.context.execute_async_v3(int(loaded.stream)),
    }
    before = len(machine.library.messages)
    machine.library.faults.fail(method)
    assert calls[method]() is result
    assert len(machine.library.messages) > before
    assert calls[method]() is not result


def test_the_inspector_tells_layers_as_detailed_as_they_were_kept(machine):
    for verbosity, first in (("DETAILED", dict), ("LAYER_NAMES_ONLY", str)):
        build = Build(machine).profile()
        build.config.profiling_verbosity = machine.tensorrt.ProfilingVerbosity.__members__[verbosity]
        engine = machine.tensorrt.Runtime(build.logger).deserialize_cuda_engine(build.plan())
        layers = json.loads(
            engine.create_engine_inspector().get_engine_information(machine.tensorrt.LayerInformationFormat.JSON)
        )["Layers"]
        assert len(layers) == engine.num_layers == 3
        assert isinstance(layers[0], first)
