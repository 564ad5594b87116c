"""TensorRT as a backend: a denoising loop that is one captured CUDA graph per step.

Everything runs in one stream, in the order in which it was started, and stays on the GPU: text embeddings go from the
text encoder to the denoiser, latents from there to the VAE. A step copies what it takes through pinned memory and
launches; the host waits once a picture, for the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...bundle import Bundle
from ...contract import Sizes, Tensor
from ...errors import AdapterError
from ...job import Conditioning
from ...plans import Plans, plans_command
from ..interface import Decoded, encode_in_parts
from .cuda import align
from .engines import Execution
from .lanes import TensorRtLanes
from .pinned import Result
from .places import Places
from .runtime import TensorRtRuntime
from .steps import Step

EMBEDDINGS_PER_BLOCK = 64


class TensorRtBackend(TensorRtRuntime):
    """The plans of a bundle for one GPU."""

    def __init__(self, bundle: Bundle, gpu: int = 0, cuda_graphs: bool = True) -> None:
        """Loads the plans for this machine, or raises the PlanError, TensorRtError or CudaError that says why not.

        With `cuda_graphs` a step is captured when a size is used for the first time, and launched as a whole from then
        on."""
        super().__init__(gpu, bundle.family)
        self.build_command, self.cuda_graphs = plans_command(bundle.folder), cuda_graphs
        self._bundle_command = bundle.command()
        self._embeddings = Places(self.device, EMBEDDINGS_PER_BLOCK, "text embeddings")
        self.states = Places(self.device, 1, "pictures that wait")
        try:
            plans = Plans.find(bundle, self.machine)
            self.profiles = plans.profiles
            optional = [name for name in plans.build["components"] if name not in self.family.required]
            wanted = [*self.family.required, *optional]
            self.load((component, plans.read(component)) for component in wanted)
            self._model_sizes = self.engines["denoiser"].model_sizes
        except BaseException:
            self.close()
            raise

    def encode_text(self, inputs: Mapping[str, np.ndarray]) -> Sequence[Conditioning]:
        """The text encoder's inputs, for n texts -> one embedding for each, which stays on the GPU."""
        engine, made = self.engines["text_encoder"], list[Conditioning]()
        count = len(next(iter(inputs.values())))
        with self.device:
            low, high = engine.allowed(engine.component.inputs[0].name, 0)
            for part in slices(count, high):
                texts = part.stop - part.start
                execution = engine.at({name: (max(low, texts), *ids.shape[1:]) for name, ids in inputs.items()})
                for name, ids in inputs.items():
                    self.uploads.put(execution.address[name], ids[part])
                execution.enqueue()
                made += [self._embedding(execution, row) for row in range(texts)]
        return made

    def _embedding(self, execution: Execution, row: int) -> Conditioning:
        """One text's part of the text encoder's outputs, each in a place of its own."""
        conditioning = {}
        for name in execution.component.output_names:
            source, nbytes = execution.part(name, row)
            conditioning[name] = self._embeddings.take(nbytes)
            self.stream.copy(conditioning[name].address, source, nbytes)
        return conditioning

    @property
    def encodes_images(self) -> bool:
        """See `Backend.encodes_images`."""
        return "vae_encoder" in self.engines

    def encode_image(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Backend.encode_image`. Waits for the GPU."""
        engine = self.engines["vae_encoder"]
        low, high = engine.allowed(engine.component.inputs[0].name, 0, images.shape)

        def run(some: np.ndarray) -> list[np.ndarray]:
            idle = np.zeros((max(0, low - len(some)), *some.shape[1:]), np.float32)
            outputs = dict(zip(engine.outputs, self.run("vae_encoder", {"image": np.concatenate([some, idle])})))
            return [outputs[name][: len(some)] for name in engine.component.output_names]

        return encode_in_parts(run, images, high)

    def change_weights(self, weights: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Raises AdapterError: the weights are in the plans."""
        raise AdapterError(
            "TensorRT's plans are built with their weights, and are not refitted yet; build the model with the adapter "
            f"in it: {self._bundle_command} --lora FILE:WEIGHT && {self.build_command}"
        )

    def lanes(self, count: int, height: int, width: int) -> TensorRtLanes:
        """So many free lanes for latents of h x w elements."""
        return TensorRtLanes(self, count, height, width)

    def denoising(self, sizes: Sizes) -> Step:
        """The denoising step at these sizes."""
        engine = self.engines["denoiser"]
        execution = engine.at(engine.component.shapes({**sizes, **self._model_sizes}))
        if execution.attached is None:
            execution.attached = Step(self, execution)
        assert isinstance(execution.attached, Step)
        return execution.attached

    def decode(self, latents: np.ndarray) -> Decoded:
        """See `Backend.decode`. Waits for the GPU."""
        return self.start_decode(list(latents), *latents.shape[2:])()

    def start_decode(self, latents: Sequence[int | np.ndarray], height: int, width: int) -> Callable[[], Decoded]:
        """Starts the VAE decoder. `latents` are those of each picture, [C, h, w]: where they lie on the GPU, or
        themselves. The function that this returns waits for the pixels, the one wait of a picture."""
        engine = self.engines["vae_decoder"]
        sizes = {"batch": len(latents), "height": height, "width": width}
        download = Download(engine.component.outputs, sizes)
        with self.device:
            result = self.results.take(download.nbytes)
            (tensor,) = engine.component.inputs
            low, high = engine.allowed(tensor.name, 0, tensor.shape(sizes))
            for part in slices(len(latents), high):
                execution = self._decoded(latents[part], {**sizes, "batch": max(low, part.stop - part.start)})
                download.start(self, execution, part, result)
            result.end()

        def finish() -> Decoded:
            with self.device:
                result.wait("waiting for the pixels")
                self.sweep()
            image, magnitude = download.arrays(result)
            return Decoded.join([(image, magnitude)])

        return finish

    def _decoded(self, latents: Sequence[int | np.ndarray], sizes: Sizes) -> Execution:
        """One run of the VAE decoder, started."""
        engine = self.engines["vae_decoder"]
        execution = engine.at(engine.component.shapes(sizes))
        for position, source in enumerate(latents):
            target, nbytes = execution.part(engine.component.input_names[0], position)
            if isinstance(source, int):
                self.stream.copy(target, source, nbytes)
            else:
                self.uploads.put(target, source)
        execution.enqueue()
        return execution


class Download:
    """The outputs of n samples in pinned memory: each output's samples side by side, one output behind the other."""

    def __init__(self, outputs: Sequence[Tensor], sizes: Sizes) -> None:
        self._outputs, self._shapes = outputs, [tensor.shape(sizes) for tensor in outputs]
        self._starts, self.nbytes = list[int](), 0
        for tensor, shape in zip(outputs, self._shapes):
            self._starts.append(self.nbytes)
            self.nbytes += align(math.prod(shape) * np.dtype(tensor.dtype).itemsize)

    def start(self, backend: TensorRtBackend, execution: Execution, part: slice, result: Result) -> None:
        """Starts copying a part of the samples, which come first in the execution."""
        for tensor, start in zip(self._outputs, self._starts):
            source, nbytes = execution.part(tensor.name, 0)
            target = result.address + start + part.start * nbytes
            backend.stream.download(target, source, (part.stop - part.start) * nbytes)

    def arrays(self, result: Result) -> list[np.ndarray]:
        """Copies of the outputs, when all is there."""
        arrays = []
        for tensor, shape, start in zip(self._outputs, self._shapes, self._starts):
            nbytes = math.prod(shape) * np.dtype(tensor.dtype).itemsize
            arrays.append(result.bytes[start : start + nbytes].copy().view(tensor.dtype).reshape(shape))
        return arrays


def slices(count: int, high: int) -> list[slice]:
    """0..count in parts of up to `high`."""
    return [slice(start, min(start + high, count)) for start in range(0, count, high)]
