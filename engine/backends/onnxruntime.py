"""ONNX Runtime on the CPU: the reference backend."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import LATENT_CHANNELS, OUTPUTS, SLOTS, VAE_FACTOR
from ..errors import BackendError

PIXELS_PER_DECODE = 512 * 512
"""Pictures are decoded together up to this size; larger ones one by one, which costs no time and bounds the memory."""

LARGE_GRAPH = 1 << 28
"""Bytes of weights from which on ONNX Runtime's costliest optimizations are left out: for Stable Diffusion's U-Net they take
15 s and 2 GiB and give nothing, for the built-in model's 0.1 s and a fifth of the time of a step."""


@dataclass(frozen=True)
class Denoising:
    """All that the device needs for one denoising loop: E evaluations, B samples, N U-Net rows.

    latents [B, 4, h, w]; context [N, S, C]; row_sample [N] int32; mixing [B, N]; timesteps [E, N];
    updates [E, B, K, K+2]; noise [E, B, 4, h, w] or None for samplers without; float32 unless said otherwise.
    """

    latents: np.ndarray
    context: np.ndarray
    row_sample: np.ndarray
    mixing: np.ndarray
    timesteps: np.ndarray
    updates: np.ndarray
    noise: np.ndarray | None


class OnnxRuntimeBackend:
    """Graphs as ONNX Runtime sessions, created by `load` or when they are first needed."""

    def __init__(self, graphs: Mapping[str, Path], threads: int | None = None, static: Mapping[str, int] | None = None) -> None:
        """`graphs` is the ONNX file of each component, `threads` the number of threads of one operator (None takes every
        core), and `static` dimensions that never change, by name: told to ONNX Runtime, they let it plan ahead."""
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(f"ONNX Runtime cannot be imported ({error}); install it: pip install latentrt[cpu]") from error
        self._library = onnxruntime
        self._graphs = graphs
        self._threads, self._static = threads or 0, static or {}
        self._sessions: dict[str, Any] = {}

    def load(self, component: str) -> Any:
        """The session of a component."""
        if component not in self._sessions:
            path = self._graphs[component]
            try:
                self._sessions[component] = self._library.InferenceSession(str(path), self._options(path), providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's errors have no common base
                raise BackendError(f"ONNX Runtime {self._library.__version__} does not load {path}: {error}") from error
        return self._sessions[component]

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

    def encode_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Token ids [N, 77] int32 -> context [N, 77, C] float32."""
        return self.run("text_encoder", {"input_ids": input_ids})[0]

    def start(self, denoising: Denoising) -> DenoisingSession:
        """A loop over the evaluations of `denoising`, none of them done yet."""
        return DenoisingSession(self.load("denoiser"), denoising)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [B, 4, h, w] float32 -> pixels [B, 8h, 8w, 3] uint8."""
        pixels = latents.shape[2] * latents.shape[3] * VAE_FACTOR**2
        at_once = max(1, PIXELS_PER_DECODE // pixels)
        slices = [self.run("vae_decoder", {"latents": latents[i:i + at_once]})[0] for i in range(0, len(latents), at_once)]
        return slices[0] if len(slices) == 1 else np.concatenate(slices)

    def close(self) -> None:
        """Frees the sessions; the next use would create them again."""
        self._sessions.clear()


class DenoisingSession:
    """The denoiser bound to its buffers. A step copies one row of the table and runs; the state goes back and forth
    between two buffers without being copied."""

    def __init__(self, session: Any, denoising: Denoising) -> None:
        self._session, self._plan, self._current = session, denoising, 0
        batch, rows = denoising.mixing.shape
        state = np.zeros((batch, SLOTS, *denoising.latents.shape[1:]), np.float32)
        state[:, 0] = denoising.latents
        self._states = (state, np.zeros_like(state))
        self._timestep = np.zeros(rows, np.float32)
        self._update = np.zeros(denoising.updates.shape[1:], np.float32)
        self._noise = np.zeros((batch, LATENT_CHANNELS, *state.shape[3:]), np.float32)
        self._bindings = [self._bind(self._states[i], self._states[1 - i]) for i in (0, 1)]

    def _bind(self, state: np.ndarray, next_state: np.ndarray) -> Any:
        binding = self._session.io_binding()
        inputs = {"state": state, "row_sample": self._plan.row_sample, "context": self._plan.context, "timestep": self._timestep,
                  "mixing": self._plan.mixing, "update": self._update, "noise": self._noise}
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("next_state", "cpu", 0, np.float32, list(next_state.shape), next_state.ctypes.data)
        return binding

    def step(self, index: int) -> None:
        """Evaluation `index` of the table."""
        self._timestep[:] = self._plan.timesteps[index]
        self._update[:] = self._plan.updates[index]
        if self._plan.noise is not None:
            self._noise[:] = self._plan.noise[index]
        try:
            self._session.run_with_iobinding(self._bindings[self._current])
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in step {index} of the denoiser, state {self._states[0].shape}: {error}") from error
        self._current = 1 - self._current

    @property
    def latents(self) -> np.ndarray:
        """The current latents, [B, 4, h, w]: a view that the next step but one overwrites."""
        return self._states[self._current][:, 0]

    @latents.setter
    def latents(self, value: np.ndarray) -> None:
        self._states[self._current][:, 0] = value
