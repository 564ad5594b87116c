"""ONNX Runtime on the CPU, the reference backend, or on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import OUTPUTS, SLOTS, VAE_FACTOR, Shapes, dtype
from ..errors import BackendError
from ..libraries import import_library, install_command
from .interface import Decoded, Denoising, HostStopwatch

PIXELS_PER_DECODE = 512 * 512
"""Pictures are decoded together up to this size; larger ones one by one, which costs no time and bounds the memory."""

SHAPES_KEPT = 4
"""Sizes whose buffers stay, and on a GPU whose steps are captured."""

LARGE_GRAPH = 1 << 28
"""Bytes of weights from which on ONNX Runtime's costliest optimizations are left out: for Stable Diffusion's U-Net they
take 15 s and 2 GiB and give nothing, for the built-in model's 0.1 s and a fifth of the time of a step."""


def decoded_together(height: int, width: int) -> int:
    """How many latents of that size go through the VAE at once."""
    return max(1, PIXELS_PER_DECODE // (height * width * VAE_FACTOR**2))


def unchecked(component: str) -> None:
    """For graphs that belong to no bundle yet."""


class OnnxRuntimeBackend:
    """Graphs as ONNX Runtime sessions, created by `load` or when they are first needed."""

    rebuild = None

    def __init__(
        self,
        graphs: Mapping[str, Path],
        shapes: Shapes | None = None,
        threads: int | None = None,
        gpu: int | None = None,
        cuda_graphs: bool = True,
        recheck: Callable[[str], None] | None = None,
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
        self._graphs, self._threads, self._gpu, self._recheck = graphs, threads or 0, gpu, recheck or unchecked
        self._static = shapes.static() if shapes else {}
        self._cuda_graphs = cuda_graphs and gpu is not None
        self._sessions: dict[str, Any] = {}
        self._graph_ids = count(1)
        self._loops: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Loop] = OrderedDict()
        self.profiles: tuple[Shapes, ...] = (shapes,) if shapes else ()
        self.description = f"ONNX Runtime {onnxruntime.__version__} on {'the CPU' if gpu is None else f'GPU {gpu}'}"

    def load(self, component: str) -> Any:
        """The session of a component."""
        if component not in self._sessions:
            self._sessions[component] = self._open(component, self._cuda_graphs and component == "denoiser")
        return self._sessions[component]

    def _open(self, component: str, cuda_graph: bool) -> Any:
        path, library = self._graphs[component], self._library
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._gpu is not None:
            providers.insert(
                0, ("CUDAExecutionProvider", {"device_id": str(self._gpu), "enable_cuda_graph": str(int(cuda_graph))})
            )
        self._recheck(component)
        try:
            session = library.InferenceSession(str(path), self._options(path), providers=providers)
        except Exception as error:  # ONNX Runtime's errors have no common base
            if cuda_graph:
                return self.without_cuda_graph(error)
            raise BackendError(f"ONNX Runtime {library.__version__} does not load {path}: {error}") from error
        self._recheck(component)
        if self._gpu is not None and "CUDAExecutionProvider" not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime {library.__version__} did not start its CUDA provider on GPU {self._gpu} and would run "
                f"{component} on the CPU; "
                "its log on standard error says why (CUDA or cuDNN of another version than it was built for, most "
                "often)"
            )
        return session

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
            return session.run(list(OUTPUTS[component]), inputs)
        except Exception as error:
            shapes = {name: value.shape for name, value in inputs.items()}
            raise BackendError(f"ONNX Runtime failed in {component} with inputs {shapes}: {error}") from error

    def encode_text(self, input_ids: np.ndarray) -> Sequence[np.ndarray]:
        """Token ids [n, 77] int32 -> n contexts [77, C] float32."""
        return list(self.run("text_encoder", {"input_ids": input_ids})[0])

    def start(self, denoising: Denoising) -> DenoisingSession:
        """A loop over the evaluations of `denoising`, none of them done yet."""
        return DenoisingSession(self, denoising)

    def decode(self, latents: np.ndarray) -> Decoded:
        """Latents [B, 4, h, w] float32 -> pixels."""
        size, parts = decoded_together(*latents.shape[2:]), []
        for i in range(0, len(latents), size):
            image, magnitude = self.run("vae_decoder", {"latents": latents[i : i + size]})
            parts.append((image, magnitude))
        return Decoded.join(parts)

    def on_device(self, array: np.ndarray) -> Any:
        """An OrtValue with the array's content; on the CPU it is the array itself."""
        return self._library.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *self.place)

    @property
    def place(self) -> tuple[str, int]:
        """The device in ONNX Runtime's terms."""
        return ("cpu", 0) if self._gpu is None else ("cuda", self._gpu)

    def loop(self, shapes: Mapping[str, tuple[int, ...]]) -> Loop:
        """The denoiser's buffers for inputs of these shapes; those of the last sizes are kept."""
        key = tuple(shapes.items())
        if key not in self._loops:
            while len(self._loops) >= SHAPES_KEPT:
                self._loops.popitem(last=False)
            self._loops[key] = Loop(self, shapes)
        self._loops.move_to_end(key)
        return self._loops[key]

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
        self._loops.clear()
        self._sessions.clear()


class Loop:
    """The denoiser's buffers for one size, bound once: the state goes back and forth between two of them without being
    copied, so there are two bindings, and with CUDA graphs two graphs. The backend keeps it, so it does not keep the
    backend."""

    def __init__(self, backend: OnnxRuntimeBackend, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.inputs = {
            name: backend.on_device(np.zeros(shape, dtype(name))) for name, shape in shapes.items() if name != "state"
        }
        self.states = [backend.on_device(np.zeros(shapes["state"], np.float32)) for _ in range(2)]
        self.bind(backend)

    def bind(self, backend: OnnxRuntimeBackend) -> None:
        """Binds the buffers to the denoiser's session."""
        self._session, self._bindings = backend.load("denoiser"), []
        for state, next_state in (self.states, self.states[::-1]):
            binding = self._session.io_binding()
            for name, value in {"state": state, **self.inputs}.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("next_state", next_state)
            self._bindings.append((binding, backend.run_options()))

    @property
    def captured(self) -> bool:
        """Whether the steps are CUDA graphs."""
        return self._bindings[0][1] is not None

    def run(self, backend: OnnxRuntimeBackend, current: int) -> None:
        """One step from state `current` to the other. The first two may show that ONNX Runtime cannot capture them."""
        try:
            self._session.run_with_iobinding(*self._bindings[current])
        except Exception as error:
            if not self.captured:
                raise BackendError(
                    f"ONNX Runtime failed in the denoiser with state {self.states[0].shape()}: {error}"
                ) from error
            backend.without_cuda_graph(error)
            self.bind(backend)
            self.run(backend, current)


class DenoisingSession:
    """One loop. A step copies one row of the table and runs."""

    def __init__(self, backend: OnnxRuntimeBackend, denoising: Denoising) -> None:
        self._backend, self._plan, self._current = backend, denoising, 0
        batch = len(denoising.latents)
        state = np.zeros((batch, SLOTS, *denoising.latents.shape[1:]), np.float32)
        state[:, 0] = denoising.latents
        self._timesteps, self._updates = (
            np.ascontiguousarray(denoising.timesteps),
            np.ascontiguousarray(denoising.updates),
        )
        fixed = {
            "row_sample": denoising.row_sample,
            "mixing": denoising.mixing,
            "context": np.stack(denoising.contexts),
        }
        row = {"timestep": self._timesteps[0], "update": self._updates[0], "noise": denoising.latents}
        self._loop = backend.loop({name: value.shape for name, value in {"state": state, **fixed, **row}.items()})
        self._loop.states[0].update_inplace(state)
        for name, value in fixed.items():
            self._loop.inputs[name].update_inplace(value)

    @property
    def path(self) -> str:
        """How the steps run."""
        return "cuda_graph" if self._loop.captured else "plain"

    def step(self, index: int) -> None:
        """Evaluation `index` of the table."""
        inputs = self._loop.inputs
        inputs["timestep"].update_inplace(self._timesteps[index])
        inputs["update"].update_inplace(self._updates[index])
        if self._plan.noise is not None:
            inputs["noise"].update_inplace(self._plan.noise[index])
        self._loop.run(self._backend, self._current)
        self._current = 1 - self._current

    @property
    def latents(self) -> np.ndarray:
        """A copy of the current latents, [B, 4, h, w]."""
        return self._loop.states[self._current].numpy()[:, 0].copy()

    @latents.setter
    def latents(self, value: np.ndarray) -> None:
        state = self._loop.states[self._current].numpy().copy()
        state[:, 0] = value
        self._loop.states[self._current].update_inplace(state)

    def decode(self) -> Callable[[], Decoded]:
        """The VAE decoder on the current latents, run at once."""
        decoded = self._backend.decode(self.latents)
        return lambda: decoded
