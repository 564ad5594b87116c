"""The denoiser on OpenVINO: compiled parts, each of which reads the buffers that earlier parts wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...contract import Component, Shape
from ...errors import BackendError
from ...job import Job
from ...tiling import Tiles
from ..host import HostLanes, nobody
from ..interface import Decoded
from .pages import Scratch
from .parts import Part


class Runner:
    """One compiled graph and one request on it. Its inputs and outputs are NumPy arrays that are bound, not copied."""

    def __init__(self, library: Any, compiled: Any, what: str, scratch: Scratch) -> None:
        self._scratch = scratch
        self._library, self._compiled, self._what = library, compiled, what
        self._request = compiled.create_infer_request()
        self._bound: dict[int | str, np.ndarray] = {}

    def bind(self, port: int | str, array: np.ndarray) -> None:
        """Binds `array`, which owns its memory, to the input or output of that name, or to the input of that number."""
        tensor = self._library.Tensor(array, shared_memory=True)
        self._bound[port] = array  # the tensor does not keep it alive
        if isinstance(port, str):
            self._request.set_tensor(port, tensor)
        else:
            self._request.set_input_tensor(port, tensor)

    def follow(self, first: int, before: Runner) -> None:
        """Binds the outputs of `before` to the inputs from number `first` on, without copies."""
        for i in range(before.count):
            self._request.set_input_tensor(first + i, before._request.get_output_tensor(i))

    @property
    def count(self) -> int:
        """The number of outputs."""
        return len(self._request.model_outputs)

    def run(self) -> None:
        """Runs the graph. BackendError if OpenVINO fails."""
        try:
            self._request.infer()
        except Exception as error:  # OpenVINO raises RuntimeError and its own types
            raise BackendError(f"OpenVINO {self._library.__version__} failed in {self._what}: {error}") from error

    def rest(self) -> None:
        """Frees the activations, and the pages of new weights that OpenVINO has copied, until the next run."""
        self._compiled.release_memory()
        self._scratch.give_back()

    def outputs(self, names: Sequence[str]) -> list[np.ndarray]:
        """Copies of the outputs."""
        return [self._request.get_tensor(name).data.copy() for name in names]


class Call:
    """One step at one size: the runners of the parts, and the arrays of a `HostCall`."""

    path = "plain"

    def __init__(
        self, denoiser: Component, shapes: Mapping[str, Shape], parts: Sequence[Part], runners: Mapping[str, Runner]
    ) -> None:
        self._state, self._parts, self.runners = denoiser.state, parts, runners
        self.states = (np.zeros(shapes[self._state.name], np.float32), np.zeros(shapes[self._state.name], np.float32))
        self.inputs = {
            tensor.name: np.zeros(shapes[tensor.name], tensor.dtype)
            for tensor in denoiser.inputs
            if tensor is not self._state
        }
        self.owner: Callable[[], HostLanes | None] = nobody
        self._reads_state: list[tuple[Runner, int]] = []
        for part in parts:
            self._connect(part, denoiser)

    def _connect(self, part: Part, denoiser: Component) -> None:
        """Binds a part's ports: to arrays, and to the outputs of the parts before it."""
        runner, samples = self.runners[part.name], len(self.states[0])
        for port, name in enumerate(part.inputs):
            if name == self._state.name:
                self._reads_state.append((runner, port))
            elif part.per_sample and denoiser.input(name).indexes == "batch":
                runner.bind(port, np.arange(samples, dtype=np.int32))
            else:
                runner.bind(port, self.inputs[name])
        port = len(part.inputs)
        for name in part.after:
            runner.follow(port, self.runners[name])
            port += self.runners[name].count

    def leave(self) -> None:
        """Takes the jobs out of the buffers."""
        if (lanes := self.owner()) is not None:
            lanes.leave()

    def enter(self) -> None:
        for part in self._parts:
            if part.often == "loop":
                self.runners[part.name].run()

    def read(self, current: int) -> np.ndarray:
        return self.states[current]

    def write(self, current: int) -> None:
        """The arrays are the buffers."""

    def run(self, current: int) -> None:
        for runner, port in self._reads_state:
            runner.bind(port, self.states[current])
        self.runners[self._parts[-1].name].bind(str(self._state.fed_by), self.states[1 - current])
        for part in self._parts:
            if part.often == "step":
                self.runners[part.name].run()

    def rest(self) -> None:
        """Frees the activations of the U-Net until the next step."""
        for part in self._parts:
            if not part.exact:
                self.runners[part.name].rest()


class OpenVinoLanes(HostLanes):
    """Lanes of which, with a large model, one component at a time holds activations, and the denoiser is compiled for
    a second size only as long as a job has evaluations with fewer rows."""

    def admit(self, lane: int, job: Job) -> None:
        super().admit(lane, job)
        if not self._together:
            self._backend.keep_steps(1 if self._fewest_rows() is None else 2)  # type: ignore[attr-defined]

    def decode(self, lanes: Sequence[int], tiles: Tiles | None = None) -> Callable[[], Decoded]:
        if self._together:
            return super().decode(lanes, tiles)
        before = [name for name in self._backend.family.required if name != "vae_decoder"]
        self._backend.rest(*before)  # type: ignore[attr-defined]
        decoded = super().decode(lanes, tiles)
        self._backend.rest("vae_decoder")  # type: ignore[attr-defined]
        return decoded
