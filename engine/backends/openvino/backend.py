"""OpenVINO on the CPU: the bundle's own ONNX files, compiled for the sizes that are asked for, in float32 or
bfloat16."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...contract import INPUTS, LATENT_CHANNELS, OUTPUTS, PROMPT_TOKENS, SLOTS, VAE_FACTOR, Shapes
from ...errors import BackendError
from ...libraries import import_library, install_command
from ..interface import Decoded, Denoising, HostStopwatch
from ..onnxruntime import LARGE_GRAPH, decoded_together, unchecked
from .pages import Scratch, drop_pages, pages_given_back
from .parts import fix_shapes, split
from .rewrites import REWRITES, Keep

COMPILED_SHAPES = 8
"""Sizes for which a small graph stays compiled. A large one (LARGE_GRAPH) does for its last size only: each takes
gigabytes."""

HINTS = {"fp32": "f32", "bf16": "bf16"}


class Runner:
    """One compiled graph and one request on it, whose inputs and outputs are NumPy arrays that are bound, not
    copied."""

    def __init__(self, library: Any, compiled: Any, what: str, scratch: Scratch) -> None:
        self._scratch = scratch
        self._library, self._compiled, self._request, self._what = (
            library,
            compiled,
            compiled.create_infer_request(),
            what,
        )
        self._bound: dict[int | str, np.ndarray] = {}

    def bind(self, port: int | str, array: np.ndarray) -> None:
        """Makes `array` the input or output of that name, or the input of that number, until another is bound."""
        tensor = self._library.Tensor(array, shared_memory=True)
        self._bound[port] = array  # the tensor does not keep it alive
        if isinstance(port, str):
            self._request.set_tensor(port, tensor)
        else:
            self._request.set_input_tensor(port, tensor)

    def follow(self, first: int, before: Runner) -> None:
        """Makes the outputs of `before` the inputs from number `first` on, in place."""
        for i in range(before.count):
            self._request.set_input_tensor(first + i, before._request.get_output_tensor(i))

    @property
    def count(self) -> int:
        """How many outputs there are."""
        return len(self._request.model_outputs)

    def run(self) -> None:
        """BackendError if OpenVINO fails."""
        try:
            self._request.infer()
        except Exception as error:  # OpenVINO raises RuntimeError and its own types
            raise BackendError(f"OpenVINO {self._library.__version__} failed in {self._what}: {error}") from error

    def rest(self) -> None:
        """Frees the activations until the next run, and what the first one read of the weights to copy them."""
        self._compiled.release_memory()
        self._scratch.give_back()

    def outputs(self, names: Sequence[str]) -> list[np.ndarray]:
        """Copies of the outputs."""
        return [self._request.get_tensor(name).data.copy() for name in names]


class OpenVinoBackend:
    """Graphs compiled when they are first needed at a size. The denoiser runs in five parts: see openvino/parts.py."""

    rebuild = None

    def __init__(
        self,
        graphs: Mapping[str, Path],
        shapes: Shapes | None = None,
        threads: int | None = None,
        precision: Mapping[str, str] | None = None,
        recheck: Callable[[str], None] | None = None,
    ) -> None:
        """`graphs` is the ONNX file of each component, `shapes` what they are used at, `threads` how many threads
        OpenVINO takes (None: every core), `precision` "fp32" or "bf16" for each component, fp32 where it is silent. On
        a CPU without bf16 instructions fp32 takes its place, with a warning. `recheck` raises where the files of a
        component have changed, and is called around reading them. Raises BackendError where OpenVINO is missing."""
        try:
            openvino = import_library("openvino")
        except ImportError as error:
            raise BackendError(
                f"OpenVINO cannot be imported ({error}); install it: {install_command('openvino')}"
            ) from error
        self._library, self._graphs, self._core, self._recheck = openvino, graphs, openvino.Core(), recheck or unchecked
        self.precision = {component: (precision or {}).get(component, "fp32") for component in graphs}
        if "bf16" in self.precision.values() and not self.has_bf16():
            warnings.warn(
                "this bundle was built to run in bf16 on OpenVINO; this CPU has no instructions for that, so it runs "
                "in fp32",
                RuntimeWarning,
                2,
            )
            self.precision = dict.fromkeys(graphs, "fp32")
        self.rewrites: tuple[Callable[[Any, Any, Keep], None], ...] = REWRITES
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._compiled: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self.profiles: tuple[Shapes, ...] = (shapes,) if shapes else ()
        precisions = ", ".join(f"{component} {precision}" for component, precision in self.precision.items())
        self.description = f"OpenVINO {openvino.__version__.split('-')[0]} on the CPU ({precisions})"

    def has_bf16(self) -> bool:
        """Whether this CPU has instructions for bfloat16."""
        return "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def processor(self) -> str:
        """The CPU's name."""
        return str(self._core.get_property("CPU", "FULL_DEVICE_NAME"))

    def read(self, component: str) -> Any:
        """A component's graph as an OpenVINO model, its weights mapped."""
        path = self._graphs[component]
        self._recheck(component)
        try:
            return self._core.read_model(path)
        except Exception as error:
            raise BackendError(f"OpenVINO {self._library.__version__} does not load {path}: {error}") from error

    def compile(self, component: str, model: Any, precision: str, what: str) -> Runner:
        """A model made of a component's graph, or of a part of it. OpenVINO copies the weights in an order and a
        precision of its own; those in the file, 3.3 GiB for a U-Net, and those of the rewrites, 0.7 GiB, it does not
        read again."""
        scratch = Scratch()
        for rewrite in self.rewrites:
            rewrite(self._library, model, scratch.copy)
        try:
            with pages_given_back(self._weights(component)):
                compiled = self._core.compile_model(
                    model, "CPU", {**self._options, "INFERENCE_PRECISION_HINT": HINTS[precision]}
                )
        except Exception as error:
            raise BackendError(f"OpenVINO {self._library.__version__} does not compile {what}: {error}") from error
        self._recheck(component)
        scratch.give_back()
        return Runner(self._library, compiled, what, scratch)

    def _cached(self, component: str, sizes: tuple[int, ...], make: Callable[[], Any]) -> Any:
        """What `make` compiles of a component for some sizes, kept as long as COMPILED_SHAPES says."""
        key = (component, *sizes)
        if key not in self._compiled:
            same = [other for other in self._compiled if other[0] == component]
            for other in same[: max(0, len(same) + 1 - (1 if self.is_large(component) else COMPILED_SHAPES))]:
                del self._compiled[other]  # before the next one takes as much
            self._compiled[key] = make()
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def _weights(self, component: str) -> Path:
        return Path(f"{self._graphs[component]}.data")

    def is_large(self, component: str) -> bool:
        """Whether its file has so many bytes that memory counts for more than the milliseconds that it costs to get it
        again."""
        path = self._graphs[component]
        return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) >= LARGE_GRAPH

    def load(self) -> None:
        """Compiles what a picture with guidance at the best sizes needs."""
        for shapes in self.profiles:
            batch, height, width = shapes.batch.opt, shapes.height.opt // VAE_FACTOR, shapes.width.opt // VAE_FACTOR
            self.text_encoder()
            self.denoiser(batch, 2 * batch, height, width)
            self.vae_decoder(min(batch, decoded_together(height, width)), height, width)

    def text_encoder(self) -> Runner:
        """For any number of texts: that costs it a tenth of its time, which is a hundredth of a picture's."""
        return self._cached(
            "text_encoder",
            (),
            lambda: self.compile(
                "text_encoder", self.read("text_encoder"), self.precision["text_encoder"], "the text encoder"
            ),
        )

    def denoiser(self, batch: int, rows: int, height: int, width: int, tokens: int = PROMPT_TOKENS) -> DenoiserRunners:
        """One step, compiled for these numbers of samples, U-Net rows, latent elements and tokens."""

        def read(rows: int) -> Any:
            model, plane = self.read("denoiser"), (LATENT_CHANNELS, height, width)
            fix_shapes(
                self._library,
                model,
                {
                    "state": (batch, SLOTS, *plane),
                    "row_sample": (rows,),
                    "context": (rows, tokens, model.input("context").get_partial_shape()[2].get_length()),
                    "timestep": (rows,),
                    "mixing": (batch, rows),
                    "update": (batch, SLOTS, SLOTS + 2),
                    "noise": (batch, *plane),
                },
            )
            return model

        def make() -> DenoiserRunners:
            parts = split(self._library, read(batch), read(rows))
            precision, sizes = self.precision["denoiser"], f"{batch} x {height} x {width}, {rows} U-Net rows"
            return DenoiserRunners(
                batch,
                self.compile("denoiser", parts.timestep, "fp32", f"the timestep's embedding ({sizes})"),
                self.compile("denoiser", parts.sample, precision, f"the U-Net before it sees the text ({sizes})"),
                self.compile("denoiser", parts.context, precision, f"the text's keys and values ({sizes})"),
                self.compile("denoiser", parts.unet, precision, f"the U-Net ({sizes})"),
                self.compile("denoiser", parts.sampler, "fp32", f"the sampler ({sizes})"),
            )

        return self._cached("denoiser", (batch, rows, height, width, tokens), make)

    def vae_decoder(self, batch: int, height: int, width: int) -> Runner:
        """Compiled for so many latents of that size."""
        return self._plane("vae_decoder", {"latents": (batch, LATENT_CHANNELS, height, width)})

    def _plane(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> Runner:
        def make() -> Runner:
            model = self.read(component)
            fix_shapes(self._library, model, shapes)
            return self.compile(
                component, model, self.precision[component], f"the {component} with inputs {dict(shapes)}"
            )

        return self._cached(component, tuple(size for shape in shapes.values() for size in shape), make)

    def run(self, component: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One run of a component on arrays: its outputs in the order of the contract."""
        inputs = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        if component == "denoiser":
            (batch, _, _, height, width), (rows, tokens, _) = inputs["state"].shape, inputs["context"].shape
            return [self.denoiser(batch, rows, height, width, tokens).run(inputs)]
        runner = (
            self.text_encoder()
            if component == "text_encoder"
            else self._plane(component, {name: value.shape for name, value in inputs.items()})
        )
        for name in INPUTS[component]:
            runner.bind(name, inputs[name])
        runner.run()
        return runner.outputs(OUTPUTS[component])

    def encode_text(self, input_ids: np.ndarray) -> Sequence[np.ndarray]:
        """Token ids [n, 77] int32 -> n contexts [77, C] float32."""
        return list(self.run("text_encoder", {"input_ids": input_ids})[0])

    def start(self, denoising: Denoising) -> DenoisingSession:
        """A loop over the evaluations of `denoising`, none of them done yet. It ends the one before."""
        return DenoisingSession(self, denoising)

    def decode(self, latents: np.ndarray) -> Decoded:
        """Latents [B, 4, h, w] float32 -> pixels."""
        size = decoded_together(*latents.shape[2:])
        parts = [self.run("vae_decoder", {"latents": latents[i : i + size]}) for i in range(0, len(latents), size)]
        return Decoded.join([(image, magnitude) for image, magnitude in parts])

    def rest(self, *components: str) -> None:
        """Frees the activations of components, and the pages of their files, until they run again."""
        for key, runner in self._compiled.items():
            if key[0] in components:
                runner.rest()
        for component in components:
            drop_pages(self._weights(component))

    def stopwatch(self) -> HostStopwatch:
        return HostStopwatch()

    def close(self) -> None:
        """Frees the compiled graphs."""
        self._compiled.clear()


class DenoiserRunners:
    """The parts of one denoising step, chained: each reads what the ones before wrote, where they wrote it."""

    def __init__(
        self, batch: int, timestep: Runner, sample: Runner, context: Runner, unet: Runner, sampler: Runner
    ) -> None:
        self.timestep, self.sample, self.context, self.unet, self.sampler = timestep, sample, context, unet, sampler
        sample.bind(1, np.arange(batch, dtype=np.int32))
        sample.follow(2, timestep)
        unet.follow(1, timestep)
        unet.follow(1 + timestep.count, sample)
        unet.follow(1 + timestep.count + sample.count, context)
        sampler.follow(4, unet)

    def bind(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Makes arrays the inputs of the contract; those not given stay. Only "timestep" has a row for each sample
        here."""
        ports = {
            "timestep": [(self.timestep, 0)],
            "context": [(self.context, 0)],
            "state": [(self.sample, 0), (self.sampler, 0)],
            "row_sample": [(self.unet, 0)],
            "mixing": [(self.sampler, 1)],
            "update": [(self.sampler, 2)],
            "noise": [(self.sampler, 3)],
        }
        for name, array in inputs.items():
            for runner, port in ports[name]:
                runner.bind(port, array)

    def rest(self) -> None:
        """Frees the activations of the U-Net until the next step."""
        for runner in (self.context, self.sample, self.unet):
            runner.rest()

    def step(self) -> None:
        """One evaluation; the text's part must have run."""
        self.timestep.run()
        self.sample.run()
        self.unet.run()
        self.sampler.run()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """One whole step on arrays: next_state."""
        next_state = np.empty_like(inputs["state"])
        self.bind({**inputs, "timestep": of_samples(inputs["timestep"], inputs["row_sample"], len(next_state))})
        self.sampler.bind("next_state", next_state)
        self.context.run()
        self.step()
        return next_state


def of_samples(timesteps: np.ndarray, row_sample: np.ndarray, batch: int) -> np.ndarray:
    """Timesteps [..., rows] -> [..., batch]. BackendError if the rows of a sample have different ones."""
    first = np.array([np.flatnonzero(row_sample == sample)[0] for sample in range(batch)])
    found = np.ascontiguousarray(timesteps[..., first])
    if not np.array_equal(found[..., row_sample], timesteps):
        raise BackendError(f"the rows of a sample have different timesteps: {timesteps} for the samples {row_sample}")
    return found


class DenoisingSession:
    """The denoiser bound to its buffers. A step reads its row of the table in place; the state goes back and forth
    between two buffers without being copied."""

    path = "plain"

    def __init__(self, backend: OpenVinoBackend, denoising: Denoising) -> None:
        self._backend, self._current = backend, 0
        (batch, rows), plane, context = (
            denoising.mixing.shape,
            denoising.latents.shape[1:],
            np.stack(denoising.contexts),
        )
        self._runners = backend.denoiser(batch, rows, plane[1], plane[2], context.shape[1])
        self._states = [np.zeros((batch, SLOTS, *plane), np.float32) for _ in range(2)]
        self._states[0][:, 0] = denoising.latents
        timesteps = of_samples(denoising.timesteps, denoising.row_sample, batch)
        self._rows = {
            "timestep": timesteps,
            "update": denoising.updates.copy(),
        }  # OpenVINO takes arrays that own their memory
        self._runners.bind({"row_sample": denoising.row_sample, "mixing": denoising.mixing, "context": context})
        if denoising.noise is None:
            self._runners.bind({"noise": np.zeros((batch, *plane), np.float32)})
        else:
            self._rows["noise"] = denoising.noise
        self._runners.context.run()

    def step(self, index: int) -> None:
        """Evaluation `index` of the table."""
        state, next_state = self._states[self._current], self._states[1 - self._current]
        self._runners.bind({"state": state, **{name: rows[index] for name, rows in self._rows.items()}})
        self._runners.sampler.bind("next_state", next_state)
        self._runners.step()
        self._current = 1 - self._current

    @property
    def latents(self) -> np.ndarray:
        """A copy of the current latents, [B, 4, h, w]."""
        return self._states[self._current][:, 0].copy()

    @latents.setter
    def latents(self, value: np.ndarray) -> None:
        self._states[self._current][:, 0] = value

    def decode(self) -> Callable[[], Decoded]:
        """The VAE decoder on the current latents, run at once. Of a large model one component at a time holds
        activations."""
        large = self._backend.is_large("denoiser")
        if large:
            self._backend.rest("text_encoder", "denoiser")
        decoded = self._backend.decode(self.latents)
        if large:
            self._backend.rest("vae_decoder")
        return lambda: decoded
