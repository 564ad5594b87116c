"""OpenVINO on the CPU. It compiles the bundle's ONNX files for the sizes that calls ask for, in float32 or bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...contract import DYNAMIC, Family, Shape, Shapes, Sizes
from ...errors import BackendError
from ...family import STABLE_DIFFUSION
from ...job import Conditioning
from ...libraries import import_library, install_command
from ..host import HostCoder, decoded_together
from ..interface import HostStopwatch
from ..onnxruntime.backend import LARGE_GRAPH, unchecked
from ..packing import smallest
from ..recent import Recent
from .pages import Scratch, drop_pages, pages_given_back
from .parts import fix_shapes, split
from .rewrites import REWRITES, Keep
from .step import Call, OpenVinoLanes, Runner
from .weights import replace_weights

COMPILED_SHAPES = 8
"""The number of sizes for which a small graph stays compiled. A large one (LARGE_GRAPH) stays compiled for its last
size only, because each takes gigabytes, and for two sizes while a picture needs both."""

HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoBackend(HostCoder):
    """Graphs compiled when they are first needed at a size. The denoiser runs in five parts: see openvino/parts.py."""

    build_command = None

    def __init__(
        self,
        graphs: Mapping[str, Path],
        shapes: Shapes | None = None,
        threads: int | None = None,
        precision: Mapping[str, str] | None = None,
        recheck: Callable[[str], None] | None = None,
        family: Family = STABLE_DIFFUSION,
    ) -> None:
        """graphs: the ONNX file of each component. shapes: the sizes that calls may ask for. threads: None for every
        core. precision: "fp32" or "bf16" for each component, fp32 by default; a CPU without bf16 instructions runs fp32
        instead, with a warning. recheck: called before and after the files of a component are read, raises if they have
        changed. Raises BackendError if OpenVINO is missing."""
        try:
            openvino = import_library("openvino")
        except ImportError as error:
            raise BackendError(
                f"OpenVINO cannot be imported ({error}); install it: {install_command('openvino')}"
            ) from error
        self._library, self.graphs, self._core, self._recheck = openvino, graphs, openvino.Core(), recheck or unchecked
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
        self.family = family
        kept = {component: 1 if self.is_large(component) else COMPILED_SHAPES for component in graphs}
        self._runners: dict[str, Recent[tuple[int, ...], Runner]] = {name: Recent(size) for name, size in kept.items()}
        self._calls: Recent[tuple[int, ...], Call] = Recent(kept.get("denoiser", 1), Call.leave)
        self._changed: Mapping[str, Mapping[str, np.ndarray]] = {}
        """Weights that are not the bundle's."""
        self._latest: Sizes | None = None
        """The sizes for which the denoiser was compiled last."""
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
        path = self.graphs[component]
        self._recheck(component)
        try:
            model = self._core.read_model(path)
        except Exception as error:
            raise BackendError(f"OpenVINO {self._library.__version__} does not load {path}: {error}") from error
        if component in self._changed:
            replace_weights(self._library, model, self._changed[component])
        return model

    def change_weights(self, weights: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """See `Backend.change_weights`. The components that change are compiled again, the denoiser for the sizes that
        it was used at last."""
        before, self._changed = self._changed, weights
        components = {*weights, *before}
        try:
            self._compile_again(components)
        except BaseException:
            self._changed = before
            self._compile_again(components)
            raise

    def _compile_again(self, components: Collection[str]) -> None:
        """The old graphs are freed first: two of a large model may be too much."""
        for component in components:
            self._runners[component].clear()
        if "text_encoder" in components:
            self.runner("text_encoder", {})
        if "denoiser" in components:
            self._calls.clear()
            if self._latest is not None:
                self.call(self._latest)

    def compile(self, component: str, model: Any, precision: str, what: str) -> Runner:
        """Compiles a model that was made from a component's graph or a part of it. OpenVINO copies the weights into a
        layout of its own. It does not read those in the file (3.3 GiB for a U-Net) and those of the rewrites (0.7 GiB)
        again, so their pages are given back."""
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

    def _weights(self, component: str) -> Path:
        return Path(f"{self.graphs[component]}.data")

    def is_large(self, component: str) -> bool:
        """Whether a component's weights are so large that memory matters more than the milliseconds it takes to read
        them again."""
        path = self.graphs[component]
        return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) >= LARGE_GRAPH

    def load(self) -> None:
        """Compiles everything for one picture with guidance at the best size, or for the best batch of a small
        model."""
        for shapes in self.profiles:
            best = shapes.sizes(self.family.factor)
            pictures = 1 if self.is_large("denoiser") else best["batch"]
            height, width = shapes.height.opt, shapes.width.opt
            batch, rows = smallest(pictures, self.family.most_rows * pictures, height, width, self.profiles)
            self.call({**best, "batch": batch, "rows": rows})
            if self.family.tokenizers:
                self.runner("text_encoder", {})
            together = decoded_together(best["height"], best["width"], self.family.factor)
            self.runner("vae_decoder", {**best, "batch": min(best["batch"], together)})

    def runner(self, component: str, sizes: Sizes) -> Runner:
        """A component compiled for these sizes. The number of rows stays dynamic: that makes the text encoder 10 %
        slower, which takes 1 % of the time of a picture."""
        fixed = {name: sizes[name] for name in DYNAMIC if name in self.family[component].dimensions and name != "rows"}
        return self._runners[component].get(tuple(fixed.values()), lambda: self._compile_whole(component, fixed))

    def _compile_whole(self, component: str, sizes: Sizes) -> Runner:
        model, what = self.read(component), f"the {component}"
        if sizes:
            fix_shapes(self._library, model, self._shapes(component, model, sizes))
            what += f" at {dict(sizes)}"
        return self.compile(component, model, self.precision[component], what)

    def _shapes(self, component: str, model: Any, sizes: Sizes) -> dict[str, Shape]:
        """The shapes of a model's inputs at these sizes. The model's own sizes are read off it."""
        known = {
            name: [size.get_length() if size.is_static else None for size in model.input(name).get_partial_shape()]
            for name in self.family[component].input_names
        }
        return self.family[component].shapes({**sizes, **self.family[component].model_sizes(known)})

    def call(self, sizes: Sizes) -> Call:
        """The denoiser at these sizes, with its buffers."""
        key = tuple(sizes[name] for name in DYNAMIC if name in self.family["denoiser"].dimensions)
        return self._calls.get(key, lambda: self._compile_parts(sizes))

    def keep_steps(self, count: int) -> None:
        """The denoiser stays compiled for so many sizes from now on."""
        self._calls.resize(count)

    def _compile_parts(self, sizes: Sizes) -> Call:
        denoiser, (one, model) = self.family["denoiser"], (self.read("denoiser") for _ in range(2))
        self._latest = dict(sizes)
        shapes = self._shapes("denoiser", model, sizes)
        fix_shapes(self._library, one, self._shapes("denoiser", one, {**sizes, "rows": sizes["batch"]}))
        fix_shapes(self._library, model, shapes)
        parts = split(self._library, denoiser, one, model)
        runners = {}
        for part in parts:
            precision = "fp32" if part.exact else self.precision["denoiser"]
            runners[part.name] = self.compile(
                "denoiser", part.model, precision, f"the denoiser's {part.name} at {sizes}"
            )
        return Call(denoiser, shapes, parts, runners)

    def run(self, component: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Runs a component on arrays. Returns its outputs in the order of the contract."""
        tensors = self.family[component]
        sizes = tensors.sizes({name: value.shape for name, value in inputs.items()})
        if any(tensor.fed_by for tensor in tensors.inputs):
            return [self._run_step(sizes, inputs)]
        runner = self.runner(component, sizes)
        for name in tensors.input_names:
            runner.bind(name, np.array(inputs[name], order="C"))
        runner.run()
        return runner.outputs(tensors.output_names)

    def _run_step(self, sizes: Sizes, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Runs one whole step on arrays. Returns the next state."""
        call = self.call(sizes)
        call.leave()
        for name, array in call.inputs.items():
            array[...] = inputs[name]
        call.states[0][...] = inputs[self.family["denoiser"].state.name]
        call.enter()
        call.run(0)
        return call.states[1].copy()

    def encode_text(self, inputs: Mapping[str, np.ndarray]) -> Sequence[Conditioning]:
        """See `Backend.encode_text`."""
        names = self.family["text_encoder"].output_names
        return [dict(zip(names, one)) for one in zip(*self.run("text_encoder", dict(inputs)))]

    def lanes(self, count: int, height: int, width: int) -> OpenVinoLanes:
        """See `Backend.lanes`."""
        return OpenVinoLanes(self, count, height, width, together=not self.is_large("denoiser"))

    def rest(self, *components: str) -> None:
        """Frees the activations of components and the pages of their files, until they run again."""
        for component in components:
            for runner in self._runners[component]:
                runner.rest()
        if "denoiser" in components:
            for call in self._calls:
                call.rest()
        for component in components:
            drop_pages(self._weights(component))

    def stopwatch(self) -> HostStopwatch:
        return HostStopwatch()

    def close(self) -> None:
        """Frees the compiled graphs."""
        self._calls.clear()
        for runners in self._runners.values():
            runners.clear()
