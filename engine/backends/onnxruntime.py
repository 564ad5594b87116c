"""ONNX Runtime on the CPU, the reference backend, or on an NVIDIA GPU through its CUDA provider."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import LATENT_CHANNELS, OUTPUTS, SLOTS, VAE_FACTOR, Shapes
from ..errors import BackendError
from .interface import Decoded, Denoising, HostStopwatch

PIXELS_PER_DECODE = 512 * 512
"""Pictures are decoded together up to this size; larger ones one by one, which costs no time and bounds the memory."""

LARGE_GRAPH = 1 << 28
"""Bytes of weights from which on ONNX Runtime's costliest optimizations are left out: for Stable Diffusion's U-Net they take
15 s and 2 GiB and give nothing, for the built-in model's 0.1 s and a fifth of the time of a step."""


class OnnxRuntimeBackend:
    """Graphs as ONNX Runtime sessions, created by `load` or when they are first needed."""

    rebuild = "build_engines.py --backend onnxruntime"

    def __init__(self, graphs: Mapping[str, Path], shapes: Shapes | None = None, threads: int | None = None, gpu: int | None = None,
                 cuda_graphs: bool = True) -> None:
        """`graphs` is the ONNX file of each component; `shapes` what they are used at: sizes that never change are told to
        ONNX Runtime, which plans ahead then; `threads` the number of threads of one operator (None takes every core); `gpu`
        the number of the GPU, None for the CPU; `cuda_graphs` is about the GPU only. Raises BackendError where ONNX Runtime or
        its CUDA provider is missing."""
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(f"ONNX Runtime cannot be imported ({error}); install it: pip install latentrt[cpu]") from error
        if gpu is not None and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise BackendError(f"ONNX Runtime {onnxruntime.__version__} here has no CUDA provider, only {', '.join(onnxruntime.get_available_providers())}; "
                               f"pip uninstall onnxruntime, then pip install latentrt[cuda]; or leave device out for the CPU")
        self._library = onnxruntime
        self._graphs, self._threads, self._gpu = graphs, threads or 0, gpu
        self._static = shapes.static() if shapes else {}
        self._cuda_graphs = cuda_graphs and gpu is not None
        self._sessions: dict[str, Any] = {}
        self._graph_ids = count(1)
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
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": str(self._gpu), "enable_cuda_graph": str(int(cuda_graph))}))
        try:
            session = library.InferenceSession(str(path), self._options(path), providers=providers)
        except Exception as error:  # ONNX Runtime's errors have no common base
            if cuda_graph:
                return self._without_cuda_graph(error)
            raise BackendError(f"ONNX Runtime {library.__version__} does not load {path}: {error}") from error
        if self._gpu is not None and "CUDAExecutionProvider" not in session.get_providers():
            raise BackendError(f"ONNX Runtime {library.__version__} did not start its CUDA provider on GPU {self._gpu} and would run {component} on the CPU; "
                               f"its log on standard error says why (CUDA or cuDNN of another version than it was built for, most often)")
        return session

    def _without_cuda_graph(self, reason: Exception) -> Any:
        """Opens the denoiser again for plain runs, and says so."""
        warnings.warn(f"ONNX Runtime does not capture the denoiser as a CUDA graph ({reason}); its steps run one by one", RuntimeWarning, stacklevel=2)
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
        pixels = latents.shape[2] * latents.shape[3] * VAE_FACTOR**2
        at_once = max(1, PIXELS_PER_DECODE // pixels)
        parts = []
        for i in range(0, len(latents), at_once):
            image, magnitude = self.run("vae_decoder", {"latents": latents[i:i + at_once]})
            parts.append((image, magnitude))
        return Decoded.join(parts)

    def on_device(self, array: np.ndarray) -> Any:
        """An OrtValue with the array's content; on the CPU it is the array itself."""
        return self._library.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *self.place)

    @property
    def place(self) -> tuple[str, int]:
        """The device in ONNX Runtime's terms."""
        return ("cpu", 0) if self._gpu is None else ("cuda", self._gpu)

    def run_options(self) -> Any:
        """Options under which one binding is captured and replayed; None where nothing is."""
        if not self._cuda_graphs:
            return None
        options = self._library.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids)))
        return options

    def stopwatch(self) -> HostStopwatch:
        return HostStopwatch()

    def close(self) -> None:
        """Frees the sessions; the next use would create them again."""
        self._sessions.clear()


class DenoisingSession:
    """The denoiser bound to its buffers. A step copies one row of the table and runs; the state goes back and forth
    between two buffers without being copied."""

    def __init__(self, backend: OnnxRuntimeBackend, denoising: Denoising) -> None:
        self._backend, self._plan, self._current = backend, denoising, 0
        self._session = backend.load("denoiser")
        batch, rows = denoising.mixing.shape
        state = np.zeros((batch, SLOTS, *denoising.latents.shape[1:]), np.float32)
        state[:, 0] = denoising.latents
        self._states = (backend.on_device(state), backend.on_device(np.zeros_like(state)))
        self._timesteps, self._updates = np.ascontiguousarray(denoising.timesteps), np.ascontiguousarray(denoising.updates)
        self._row = {"timestep": backend.on_device(np.zeros(rows, np.float32)), "update": backend.on_device(np.zeros_like(self._updates[0])),
                     "noise": backend.on_device(np.zeros((batch, LATENT_CHANNELS, *state.shape[3:]), np.float32))}
        fixed = {"row_sample": denoising.row_sample, "mixing": denoising.mixing, "context": np.stack(denoising.contexts)}
        self._inputs = {**self._row, **{name: backend.on_device(value) for name, value in fixed.items()}}
        self._bind()

    def _bind(self) -> None:
        self._bindings = []
        for state, next_state in (self._states, self._states[::-1]):
            binding = self._session.io_binding()
            for name, value in {"state": state, **self._inputs}.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("next_state", next_state)
            self._bindings.append((binding, self._backend.run_options()))

    @property
    def path(self) -> str:
        """How the steps run."""
        return "plain" if self._bindings[0][1] is None else "cuda_graph"

    def step(self, index: int) -> None:
        """Evaluation `index` of the table."""
        self._row["timestep"].update_inplace(self._timesteps[index])
        self._row["update"].update_inplace(self._updates[index])
        if self._plan.noise is not None:
            self._row["noise"].update_inplace(self._plan.noise[index])
        try:
            self._session.run_with_iobinding(*self._bindings[self._current])
        except Exception as error:
            if self.path != "cuda_graph" or index > 1:
                raise BackendError(f"ONNX Runtime failed in step {index} of the denoiser, state {self._states[0].shape()}: {error}") from error
            self._session = self._backend._without_cuda_graph(error)
            self._bind()
            return self.step(index)
        self._current = 1 - self._current

    @property
    def latents(self) -> np.ndarray:
        """A copy of the current latents, [B, 4, h, w]."""
        return self._states[self._current].numpy()[:, 0].copy()

    @latents.setter
    def latents(self, value: np.ndarray) -> None:
        state = self._states[self._current].numpy().copy()
        state[:, 0] = value
        self._states[self._current].update_inplace(state)

    def decode(self) -> Callable[[], Decoded]:
        """The VAE decoder on the current latents, run at once."""
        decoded = self._backend.decode(self.latents)
        return lambda: decoded
