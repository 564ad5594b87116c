"""TensorRT as a backend: a denoising loop that is one captured CUDA graph per step.

Everything runs in one stream, in the order in which it was started, and stays on the GPU: text embeddings go from the
text encoder to the denoiser, latents from there to the VAE. The host uploads a picture's whole table at once through
pinned memory; a step copies its row into place and launches; the host waits once, for the pixels.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...contract import LATENT_CHANNELS, SLOTS, VAE_FACTOR
from ...errors import CudaError, DeviceLostError, TensorRtError
from ...plans import NEEDED, Plans, rebuild_command
from ..interface import Decoded, Denoising
from .cuda import Device, DeviceMemory, Graph, align
from .runtime import Execution, TensorRtRuntime

EMBEDDINGS_PER_BLOCK = 64


class TensorRtBackend(TensorRtRuntime):
    """The plans of a bundle for one GPU."""

    def __init__(self, bundle: Bundle, gpu: int = 0, cuda_graphs: bool = True) -> None:
        """Loads the plans for this machine, or raises the PlanError, TensorRtError or CudaError that says why not.

        With `cuda_graphs` a step is captured when a size is used for the first time, and launched as a whole from then
        on."""
        super().__init__(gpu)
        self.rebuild, self.cuda_graphs = rebuild_command(bundle.folder), cuda_graphs
        try:
            plans = Plans.find(bundle, self.machine)
            self.profiles = plans.profiles
            self.load((component, plans.read(component)) for component in NEEDED)
            self._embeddings = Embeddings(self.device, math.prod(self.engines["text_encoder"].output_row("context")))
        except BaseException:
            self.close()
            raise

    def encode_text(self, input_ids: np.ndarray) -> Sequence[Embedding]:
        """Token ids [n, 77] int32 -> n embeddings, which stay on the GPU."""
        with self.device:
            engine, made = self.engines["text_encoder"], list[Embedding]()
            for part in slices(len(input_ids), *engine.allowed("input_ids", 0)):
                execution = engine.at({"input_ids": (part.stop - part.start, *input_ids.shape[1:])})
                self.uploads.put(execution.address["input_ids"], input_ids[part])
                execution.enqueue()
                for row in range(part.stop - part.start):
                    embedding = self._embeddings.take(execution.shape["context"][1])
                    self.stream.copy(
                        embedding.address, execution.address["context"] + row * embedding.nbytes, embedding.nbytes
                    )
                    made.append(embedding)
            return made

    def start(self, denoising: Denoising) -> DenoisingSession:
        """A loop over the evaluations of `denoising`: all that it needs is on its way to the GPU."""
        with self.device:
            return DenoisingSession(self, denoising)


class Step:
    """One denoising step of one size: the denoiser, and the new state copied back into its input; captured when it can
    be.

    Timestep, update and noise lie one behind the other in the denoiser's block, and so do they in each row of the
    table."""

    def __init__(self, backend: TensorRtBackend, execution: Execution) -> None:
        self.execution, self._backend = execution, backend
        self.graph: Graph | None = None
        self._plain = not backend.cuda_graphs
        self._table: DeviceMemory | None = None
        self._constants: dict[str, Any] = {}
        address = execution.address
        self.offsets = {name: address[name] - address["timestep"] for name in ("timestep", "mixing", "update", "noise")}

    def unchanged(self, name: str, value: Any) -> bool:
        """Whether an input holds this value already; it is taken to hold it from now on. None stands for what is never
        the same."""
        old = self._constants.get(name)
        self._constants[name] = value
        return (
            old is not None
            and value is not None
            and (np.array_equal(old, value) if isinstance(value, np.ndarray) else bool(old == value))
        )

    def table(self, nbytes: int) -> DeviceMemory:
        """Memory for a table of that size."""
        if self._table is None or self._table.nbytes < nbytes:
            if self._table is not None:
                self._backend.retire(self._table.close)
            self._constants.pop("table", None)
            self._table = self._backend.device.allocate(nbytes, "the step table")
        return self._table

    def run(self) -> None:
        """Starts one step. The first of a size runs plainly, as TensorRT wants before a capture."""
        if self.graph is not None:
            self.graph.launch(self._backend.stream)
            return
        self._enqueue()
        if not self._plain:
            self._capture()

    def _enqueue(self) -> None:
        execution = self.execution
        execution.enqueue()
        self._backend.stream.copy(
            execution.address["state"], execution.address["next_state"], execution.nbytes["state"]
        )

    def _capture(self) -> None:
        stream = self._backend.stream
        try:
            with stream.capture() as made:
                self._enqueue()
            made[0].upload(stream)
            self.graph = made[0]
        except DeviceLostError:
            raise
        except (CudaError, TensorRtError) as error:
            self._plain = True
            warnings.warn(
                f"the denoising step could not be captured as a CUDA graph ({error}); its kernels are launched one by "
                "one",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()
        if self._table is not None:
            self._table.close()


class DenoisingSession:
    """One loop. A step is a copy of a row of the table and a launch; the host never waits."""

    def __init__(self, backend: TensorRtBackend, denoising: Denoising) -> None:
        self._backend, self._latents_shape = backend, denoising.latents.shape
        batch, rows = denoising.mixing.shape
        state = (batch, SLOTS, *denoising.latents.shape[1:])
        execution = backend.engines["denoiser"].at(
            {
                "state": state,
                "row_sample": (rows,),
                "context": (rows, denoising.contexts[0].tokens, denoising.contexts[0].channels),
                "timestep": (rows,),
                "mixing": (batch, rows),
                "update": denoising.updates.shape[1:],
                "noise": denoising.latents.shape,
            }
        )
        if execution.attached is None:
            execution.attached = Step(backend, execution)
        self._step: Step = execution.attached
        self._execution = execution
        self._upload_state(denoising.latents)
        self._upload_constants(denoising)
        self._upload_table(denoising)

    def _upload_state(self, latents: np.ndarray) -> None:
        state = np.zeros(self._execution.shape["state"], np.float32)
        state[:, 0] = latents
        self._backend.uploads.put(self._execution.address["state"], state)

    def _upload_constants(self, denoising: Denoising) -> None:
        stream, address = self._backend.stream, self._execution.address
        if not self._step.unchanged("row_sample", denoising.row_sample):
            self._backend.uploads.put(address["row_sample"], denoising.row_sample)
        if not self._step.unchanged("context", list(denoising.contexts)):
            for row, embedding in enumerate(denoising.contexts):
                stream.copy(address["context"] + row * embedding.nbytes, embedding.address, embedding.nbytes)

    def _upload_table(self, denoising: Denoising) -> None:
        """The rows of the table as bytes, each laid out as the denoiser's own inputs from `timestep` on. Without noise
        they end before it, and the input keeps what it holds, which the update multiplies by 0."""
        offsets, nbytes, count = self._step.offsets, self._execution.nbytes, len(denoising.timesteps)
        parts = {
            "timestep": denoising.timesteps,
            "mixing": np.broadcast_to(denoising.mixing, (count, *denoising.mixing.shape)),
            "update": denoising.updates,
        }
        if denoising.noise is not None:
            parts["noise"] = denoising.noise
        last = list(parts)[-1]
        self._row_bytes = offsets[last] + nbytes[last]
        self._pitch = align(self._row_bytes)
        table = np.zeros((count, self._pitch), np.uint8)
        for name, values in parts.items():
            table[:, offsets[name] : offsets[name] + nbytes[name]] = (
                np.ascontiguousarray(values).reshape(count, -1).view(np.uint8)
            )
        memory = self._step.table(table.nbytes)
        self._table = memory.address
        if not self._step.unchanged("table", table if denoising.noise is None else None):
            self._backend.uploads.put(memory.address, table)

    @property
    def path(self) -> str:
        """How the steps run."""
        return "plain" if self._step.graph is None else "cuda_graph"

    def step(self, index: int) -> None:
        """Starts evaluation `index` of the table."""
        with self._backend.device:
            self._backend.stream.copy(
                self._execution.address["timestep"], self._table + index * self._pitch, self._row_bytes
            )
            self._step.run()

    @property
    def latents(self) -> np.ndarray:
        """A copy of the current latents, [B, 4, h, w]; waits for the GPU."""
        with self._backend.device:
            nbytes = math.prod(self._latents_shape) * 4
            result = self._backend.result(nbytes)
            for sample, source, size in self._samples():
                self._backend.stream.download(result.address + sample * size, source, size)
            self._backend.synchronize("waiting for the latents")
            return result.bytes[:nbytes].view(np.float32).reshape(self._latents_shape).copy()

    @latents.setter
    def latents(self, value: np.ndarray) -> None:
        with self._backend.device:
            for sample, target, _ in self._samples():
                self._backend.uploads.put(target, value[sample])

    def _samples(self) -> list[tuple[int, int, int]]:
        """For each sample its number, the address of its latents (slot 0 of the state) and their size."""
        size = math.prod(self._latents_shape[1:]) * 4
        return [(i, self._execution.address["state"] + i * SLOTS * size, size) for i in range(self._latents_shape[0])]

    def decode(self) -> Callable[[], Decoded]:
        """Starts the VAE decoder; the function that it returns waits for the pixels, the one wait of a picture."""
        with self._backend.device:
            return self._decode()

    def _decode(self) -> Callable[[], Decoded]:
        backend, engine = self._backend, self._backend.engines["vae_decoder"]
        batch, _, height, width = self._latents_shape
        image = (batch, VAE_FACTOR * height, VAE_FACTOR * width, 3)
        result = backend.result(align(math.prod(image)) + 4 * batch)
        magnitudes = result.address + align(math.prod(image))
        samples = self._samples()
        for part in slices(batch, *engine.allowed("latents", 0)):
            execution = engine.at({"latents": (part.stop - part.start, LATENT_CHANNELS, height, width)})
            for position, (_, source, size) in enumerate(samples[part]):
                backend.stream.copy(execution.address["latents"] + position * size, source, size)
            execution.enqueue()
            backend.stream.download(
                result.address + part.start * math.prod(image[1:]),
                execution.address["image"],
                execution.nbytes["image"],
            )
            backend.stream.download(
                magnitudes + 4 * part.start, execution.address["magnitude"], execution.nbytes["magnitude"]
            )

        def finish() -> Decoded:
            with backend.device:
                backend.synchronize("waiting for the pixels")
            pixels = result.bytes[: math.prod(image)].reshape(image).copy()
            start = align(math.prod(image))
            return Decoded(pixels, np.isfinite(result.bytes[start : start + 4 * batch].view(np.float32)))

        return finish


def slices(count: int, low: int, high: int) -> list[slice]:
    """0..count in parts of `low` to `high`; where the rest is too small, the last part begins earlier and repeats
    some."""
    starts = range(0, count, high)
    parts = [slice(start, min(start + high, count)) for start in starts]
    last = parts[-1]
    if last.stop - last.start < low <= count:
        parts[-1] = slice(count - low, count)
    return parts


class Embedding:
    """A text's embedding [tokens, channels] float32 on the GPU."""

    def __init__(self, address: int, tokens: int, channels: int) -> None:
        self.address, self.tokens, self.channels = address, tokens, channels
        self.nbytes = 4 * tokens * channels


class Embeddings:
    """Places for embeddings. One that nobody refers to any more gives its place to the next; that is safe without
    waiting, since the stream overwrites it after all that was started before."""

    def __init__(self, device: Device, elements: int) -> None:
        self._device, self.nbytes, self._free = device, 4 * elements, list[int]()
        self._elements = elements

    def take(self, tokens: int) -> Embedding:
        """A place for one embedding."""
        if not self._free:
            pitch = align(self.nbytes)
            block = self._device.allocate(EMBEDDINGS_PER_BLOCK * pitch, "text embeddings")
            self._free += [block.address + i * pitch for i in range(EMBEDDINGS_PER_BLOCK)]
        embedding = Embedding(self._free.pop(), tokens, self._elements // tokens)
        weakref.finalize(embedding, self._free.append, embedding.address)
        return embedding
