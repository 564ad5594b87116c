"""ONNX Runtime on the CPU, the reference backend, or on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ...contract import DYNAMIC, Family, Shapes, Sizes
from ...errors import BackendError
from ...family import STABLE_DIFFUSION
from ...job import Conditioning
from ...libraries import import_library, install_command
from ..host import HostCoder, decoded_together
from ..interface import Decoded, HostStopwatch
from ..recent import Recent
from .call import Call, DeviceCall, OnnxRuntimeLanes
from .device import Copier, DeviceArray

SHAPES_KEPT = 8
"""Sizes whose buffers stay, and on a GPU whose steps are captured: the five of one number of pictures (packing.PARTS),
and others."""

LARGE_GRAPH = 1 << 28
"""Bytes of weights from which on ONNX Runtime's costliest optimizations are left out: for Stable Diffusion's U-Net they
take 15 s and 2 GiB and give nothing, for the built-in model's 0.1 s and a fifth of the time of a step."""


def unchecked(component: str) -> None:
    """For graphs that belong to no bundle yet."""


class OnnxRuntimeBackend(HostCoder):
    """Graphs as ONNX Runtime sessions, created by `load` or when they are first needed."""

    build_command = None

    def __init__(
        self,
        graphs: Mapping[str, Path],
        shapes: Shapes | None = None,
        threads: int | None = None,
        gpu: int | None = None,
        cuda_graphs: bool = True,
        recheck: Callable[[str], None] | None = None,
        family: Family = STABLE_DIFFUSION,
    ) -> None:
        """`graphs` is the ONNX file of each component; `shapes` what they are used at: sizes that never change are told
        to ONNX Runtime, which plans ahead then; `threads` the number of threads of one operator (None takes every
        core); `gpu` the number of the GPU, None for the CPU; `cuda_graphs` is about the GPU only; `recheck` raises
        where the files of a component have changed, and is called around reading them. Raises BackendError where ONNX
        Runtime or its CUDA provider is missing."""
        try:
            onnxruntime = import_library("onnxruntime")
        except ImportError as error:
            raise BackendError(
                f"ONNX Runtime cannot be imported ({error}); install it: {install_command('cpu')}"
            ) from error
        if gpu is not None and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} here has no CUDA provider, only "
                f"{', '.join(onnxruntime.get_available_providers())}; "
                f"run: python -m pip uninstall -y onnxruntime && {install_command('cuda')}; or leave device out for "
                "the CPU"
            )
        if gpu is not None:
            with redirect_stdout(StringIO()):  # it prints what it does not find; whether CUDA started is checked below
                onnxruntime.preload_dlls()
        self._library = onnxruntime
        self.graphs, self._threads, self._gpu, self._recheck = graphs, threads or 0, gpu, recheck or unchecked
        self.family, self._static = family, shapes.static(family.factor) if shapes else {}
        self._cuda_graphs = cuda_graphs and gpu is not None
        self._resident = gpu is not None
        self._sessions: dict[str, Any] = {}
        self._changed: Mapping[str, Mapping[str, Any]] = {}
        """Weights that are not the bundle's, as OrtValues. A session reads them where they are."""
        self._graph_ids = count(1)
        self._calls: Recent[tuple[int, ...], Call] = Recent(SHAPES_KEPT, Call.leave)
        self.profiles: tuple[Shapes, ...] = (shapes,) if shapes else ()
        self.description = f"ONNX Runtime {onnxruntime.__version__} on {'the CPU' if gpu is None else f'GPU {gpu}'}"

    def load(self, component: str) -> Any:
        """The session of a component."""
        if component not in self._sessions:
            self._sessions[component] = self._open(component, self._cuda_graphs and component == "denoiser")
        return self._sessions[component]

    def _open(self, component: str, cuda_graph: bool) -> Any:
        path, library = self.graphs[component], self._library
        self._recheck(component)
        try:
            options, changed = self._options(path), self._changed.get(component, {})
            options.add_external_initializers(list(changed), list(changed.values()))
            session = library.InferenceSession(str(path), options, providers=self._providers(cuda_graph))
        except Exception as error:  # ONNX Runtime's errors have no common base
            if cuda_graph:
                return self.without_cuda_graph(error)
            raise BackendError(f"ONNX Runtime {library.__version__} does not load {path}: {error}") from error
        self._recheck(component)
        if self._gpu is not None and "CUDAExecutionProvider" not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime {library.__version__} did not start its CUDA provider on GPU {self._gpu} and would run "
                f"{component} on the CPU; "
                "its log on standard error says why (usually CUDA or cuDNN have another version than it was built for)"
            )
        return session

    def change_weights(self, weights: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """See `Backend.change_weights`. The components that change are loaded again."""
        make, before = self._library.OrtValue.ortvalue_from_numpy, self._changed
        components = {*weights, *before}
        self._changed = {component: {name: make(a) for name, a in some.items()} for component, some in weights.items()}
        try:
            self._load_again(components)
        except BaseException:
            self._changed = before
            self._load_again(components)
            raise

    def _load_again(self, components: Iterable[str]) -> None:
        """The old sessions are freed first: two of a large model may be too much."""
        self._calls.clear()
        for component in components:
            self._sessions.pop(component, None)
        for component in components:
            self.load(component)

    def _providers(self, cuda_graph: bool) -> list[Any]:
        if self._gpu is None:
            return ["CPUExecutionProvider"]
        options = {"device_id": str(self._gpu), "enable_cuda_graph": str(int(cuda_graph))}
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]

    def without_cuda_graph(self, reason: Exception) -> Any:
        """Opens the denoiser again for plain runs, and says so."""
        warnings.warn(
            f"ONNX Runtime does not capture the denoiser as a CUDA graph ({reason}); its steps run one by one",
            RuntimeWarning,
            stacklevel=2,
        )
        self._cuda_graphs = False
        self._sessions["denoiser"] = self._open("denoiser", False)
        return self._sessions["denoiser"]

    def _options(self, path: Path) -> Any:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # it keeps 2 GiB more for SD 1.5 at 512 x 512, and saves no time
        weights = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        levels = self._library.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC if weights >= LARGE_GRAPH else levels.ORT_ENABLE_ALL
        for name, size in self._static.items():
            options.add_free_dimension_override_by_name(name, size)
        return options

    def run(self, component: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One plain run of a component: its outputs in the order of the contract."""
        session = self.load(component)
        try:
            return session.run(list(self.family[component].output_names), inputs)
        except Exception as error:
            shapes = {name: value.shape for name, value in inputs.items()}
            raise BackendError(f"ONNX Runtime failed in {component} with inputs {shapes}: {error}") from error

    def encode_text(self, inputs: Mapping[str, np.ndarray]) -> Sequence[Conditioning]:
        """The text encoder's inputs, for n texts -> one embedding for each. On a GPU they stay there."""
        names = self.family["text_encoder"].output_names
        if not self._resident:
            return [dict(zip(names, one)) for one in zip(*self.run("text_encoder", dict(inputs)))]
        binding = self.load("text_encoder").io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name, *self.place)
        self._run_bound("text_encoder", binding)
        found = dict(zip(names, binding.get_outputs()))
        count = len(next(iter(inputs.values())))
        return [
            {name: DeviceArray(value, tuple(value.shape()[1:]), i) for name, value in found.items()}
            for i in range(count)
        ]

    def lanes(self, count: int, height: int, width: int) -> OnnxRuntimeLanes:
        """So many free lanes for latents of h x w elements."""
        return OnnxRuntimeLanes(self, count, height, width)

    def call(self, sizes: Sizes) -> Call:
        """The denoiser's buffers at these sizes; those of the most recent sizes are kept."""
        kind = DeviceCall if self._resident else Call
        return self._calls.get(tuple(sizes[name] for name in DYNAMIC), lambda: kind(self, sizes))

    def decode_on_device(self, latents: Sequence[DeviceArray]) -> Decoded:
        """Latents [C, h, w] on the device -> pixels, which alone come back."""
        plane = latents[0].shape
        size, parts = decoded_together(plane[1], plane[2], self.family.factor), []
        for i in range(0, len(latents), size):
            some = latents[i : i + size]
            together = self.on_device(np.zeros((len(some), *plane), np.float32))
            for number, source in enumerate(some):
                target = DeviceArray(together, plane, number)
                self.copier.copy(target.address, source.address, source.elements)
            binding = self.load("vae_decoder").io_binding()
            (latents_input,) = self.family["vae_decoder"].input_names
            binding.bind_ortvalue_input(latents_input, together)
            for name in self.family["vae_decoder"].output_names:
                binding.bind_output(name)
            self._run_bound("vae_decoder", binding)
            image, magnitude = binding.copy_outputs_to_cpu()
            parts.append((image, magnitude))
        return Decoded.join(parts)

    def _run_bound(self, component: str, binding: Any) -> None:
        try:
            self.load(component).run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {component}: {error}") from error

    @cached_property
    def copier(self) -> Copier:
        """Copies on the device."""
        return Copier(self._library, self._library.SessionOptions(), self._providers(cuda_graph=False), self.place)

    def input_shapes(self, component: str) -> dict[str, list[int | None]]:
        """The shapes of a graph's inputs, with None for what a call chooses."""
        inputs = self.load(component).get_inputs()
        return {one.name: [size if isinstance(size, int) else None for size in one.shape] for one in inputs}

    def on_device(self, array: np.ndarray) -> Any:
        """An OrtValue with the array's content; on the CPU it is the array itself, unless values are kept apart there
        as they are on a GPU."""
        source = array.copy() if self._resident else array
        return self._library.OrtValue.ortvalue_from_numpy(source, *self.place)

    @property
    def place(self) -> tuple[str, int]:
        """The device in ONNX Runtime's terms."""
        return ("cpu", 0) if self._gpu is None else ("cuda", self._gpu)

    def run_options(self) -> Any:
        """Options under which one binding is captured and replayed; None where nothing is. ONNX Runtime never destroys
        a graph, so the first sizes get theirs and later ones run plainly."""
        if not self._cuda_graphs:
            return None
        number = next(self._graph_ids)
        options = self._library.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number) if number <= 2 * SHAPES_KEPT else "-1")
        return options

    def stopwatch(self) -> HostStopwatch:
        return HostStopwatch()

    def close(self) -> None:
        """Frees the sessions and buffers."""
        self._calls.clear()
        self._sessions.clear()
