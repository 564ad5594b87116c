"""Text to image: request, jobs, lanes, decoding, in a straight line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakSet

import numpy as np

from . import checks
from .adapters.loaded import OFF, Adapters, Strength, strength
from .backends import open_backend
from .backends.interface import Backend, Lanes
from .beginnings import Begin, Encoded, Masked, from_images, from_noise
from .bundle import Bundle, as_path, while_replaced
from .contract import Range, Shapes
from .errors import (
    AdapterBusyError,
    BusyPipelineError,
    ClosedPipelineError,
    ManifestError,
    NumericalError,
    PicklingError,
    SchedulerConfigError,
)
from .guidance import DEFAULT_SCALE, Scale
from .images import finished_images
from .job import Conditioning, Job, Row, classed, guided, jobs
from .request import Limits, Request
from .result import Clock, Result
from .text.conditioning import TextConditioning
from .text.tokenizer import ClipTokenizer

Callback = Callable[["Pipeline", int, float, dict[str, np.ndarray]], "dict[str, np.ndarray] | None"]


class Pipeline:
    """A model that makes pictures from texts. Calls from several threads wait for each other; a callback may not call
    its own pipeline.

    `limits` is what a Request is checked against. `jobs` and `lanes` are for programs that drive the loop
    themselves.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._backend = backend
        try:
            schedule = bundle.schedule()
            encode = self._text_conditioning()
        except (SchedulerConfigError, ManifestError) as error:
            raise type(error)(f"{error}. Build the bundle again: {bundle.command()}") from error
        self.limits = Limits(
            bundle.family, schedule, backend.profiles, partial(_build_command, bundle, backend), backend.encodes_images
        )
        self._encode = encode
        self._adapters = Adapters(bundle)
        self._given: WeakSet[Lanes] = WeakSet()
        """The lanes of other loops."""
        self._lock = threading.RLock()
        self._busy = self._closed = self._interrupt = False

    def _text_conditioning(self) -> TextConditioning | None:
        """None for a model without texts. Raises ManifestError."""
        bundle = self.bundle
        if not bundle.family.tokenizers:
            return None
        tokenizer = ClipTokenizer(bundle.tokenizer_file, bundle.special_tokens)
        bundle.recheck_tokenizer()
        return TextConditioning(tokenizer, self._backend)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        backend: str | None = None,
        device: str | None = None,
        cuda_graphs: bool = True,
        threads: int | None = None,
        verify: bool = True,
    ) -> Pipeline:
        """The pipeline of the bundle in `folder`.

        backend: "tensorrt", "openvino" or "onnxruntime"; None takes TensorRT where it and a GPU are found, else on the
        CPU OpenVINO where it is installed, else ONNX Runtime.
        device: "cpu", "cuda" or "cuda:N"; None is the first GPU for TensorRT and the CPU for ONNX Runtime.
        cuda_graphs: False launches every kernel of a step from the host. threads: of one operator on the CPU, None for
        every core. verify: False skips the SHA-256 of the ONNX files; that of a TensorRT plan is never skipped. Raises
        the errors of `Bundle.open`, PlanErrors, and BackendError where a library or device is missing.
        """
        checks.check_threads(threads)
        path = as_path(folder)

        def load() -> Pipeline:
            bundle = Bundle.open(path, verify)
            return cls(bundle, open_backend(bundle, backend, device, threads, cuda_graphs))

        return while_replaced(path, load)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside the block no other call runs. BusyPipelineError if this thread is inside one already, because it would
        wait for itself."""
        with self._lock:
            if self._busy:
                raise BusyPipelineError(
                    "this pipeline is in the middle of a call, and its callback (or a signal handler) called or closed "
                    "it; use a second "
                    "pipeline there, or wait until the call has returned"
                )
            self._require_open()
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedPipelineError(
                f"this pipeline was closed; load it again: Pipeline.load({str(self.bundle.folder)!r})"
            )

    def __getstate__(self) -> None:
        raise PicklingError(
            f"a pipeline holds graphs of its own process and cannot be pickled; load it in the other process: "
            f"Pipeline.load({str(self.bundle.folder)!r})"
        )

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the graphs and the cached embeddings. Later calls raise ClosedPipelineError."""
        if self._closed:
            return
        with self._turn():
            self._closed = True
            self._backend.close()
            if self._encode is not None:
                self._encode.clear()

    @property
    def description(self) -> str:
        """The library, its version and the device that this pipeline runs on."""
        return self._backend.description

    @property
    def profiles(self) -> tuple[Shapes, ...]:
        """The sizes and numbers of pictures that one call may ask for."""
        return self._backend.profiles

    @property
    def interrupt(self) -> bool:
        """A callback sets this to True to end the loop after the current step. The picture is made from the latents as
        they are then."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value  # the name that callbacks written for diffusers set

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: Scale = DEFAULT_SCALE,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        latents: np.ndarray | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        scheduler: str | None = None,
        progress: bool = True,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
        schedule_type: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        timestep_respacing: str | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        class_labels: int | Sequence[int] | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        composite: bool = False,
        padding_mask_crop: int | None = None,
    ) -> Result:
        """Makes the picture that the model's pipeline of diffusers makes from the same arguments.

        prompt, negative_prompt: for models with texts; class_labels: for models with classes, one integer for each
        picture; num_images_per_prompt: pictures of each text or class, or of a model without either;
        height, width: pixels, multiples of 8 (default: what the bundle is best at); guidance_scale: above 1 the
        negative prompt takes part; a list has a number for each step, a function (evaluation, timestep) -> number is
        called before the loop; eta: DDIM's; seed: where diffusers takes a generator on the CPU, one for all pictures or
        one for each, or None for a random one; latents: [B, 4, height/8, width/8] standard normal float32 instead of
        noise; callback_on_step_end(pipeline, evaluation, timestep, {"latents": [B, 4, h, w]}) sees diffusers' latents,
        and may write to them or return others so; scheduler: a sampler's name, a class of diffusers or A1111's label
        (None: the model's own); progress: show a bar; guidance_rescale: phi of arXiv 2305.08891; guidance_interval:
        (start, end), evaluation i of E has guidance if start <= i / E <= end, the others run without the negative
        prompt; schedule_type, timesteps, sigmas, timestep_respacing: the sampler's grid; sampler_options: its options
        by name (docs/samplers.md); image: what to start from, a path, a PIL image, an array [H, W, 3] of uint8 or of
        float in 0..1, latents [n, C, h, w], or a list: one for all pictures, for each text or for each picture;
        strength: how much of it changes, the share of the steps that are run (default: 0.8, with a mask 1);
        mask_image: white is repainted; composite: what is not white stays pixel for pixel; padding_mask_crop: paint
        only the part around the mask, with so many pixels on each side (docs/tasks.md). Raises the InputErrors of
        engine/errors.py before any work, NumericalError and not a black picture, BundleChangedError where the bundle's
        files were written to, ClosedPipelineError, and BusyPipelineError in a callback.
        """
        started = perf_counter()
        request = Request.check(self.limits, prompt, height, width, num_inference_steps, guidance_scale,
                                negative_prompt, num_images_per_prompt, eta, seed, latents, output_type,
                                callback_on_step_end, scheduler, progress, guidance_rescale, guidance_interval,
                                schedule_type, timesteps, sigmas, timestep_respacing, sampler_options,
                                class_labels, image, strength, mask_image, composite, padding_mask_crop)  # fmt: skip
        with self._turn():
            self.bundle.recheck_in_place()
            result = self._run(request, started)
            self.bundle.recheck_in_place()
        return result

    def _run(self, request: Request, started: float) -> Result:
        """Request -> jobs -> lanes -> step, step, step -> decode."""
        self.interrupt = False
        clock = Clock(self._backend.stopwatch(), started)
        made = self.jobs(request, clock.mark)
        clock.mark()
        lanes = self._lanes(len(made), request.height, request.width)
        every = range(len(made))
        for lane in every:
            lanes.admit(lane, made[lane])
        clock.mark()
        evaluations = 0
        for i in _progress(len(request.table), request.progress):
            lanes.step([i] * len(made))
            evaluations += 1
            if request.callback is not None:
                self._call_back(request, lanes, i)
            clock.mark()
            if self.interrupt:
                break
        interrupted = self.interrupt
        if interrupted:  # the latents of the last evaluation need no scale
            scale = np.float32(request.table.scales[evaluations - 1])
            lanes.replace(every, lanes.latents(every) * scale)
        if request.output_type == "latent":
            images: Any = lanes.latents(every)
            finite = np.isfinite(images).all()
        else:
            finish = lanes.decode(every)
            clock.mark()
            decoded = finish()
            images, finite = decoded.image, decoded.finite.all()
        if not finite:
            raise self._overflow(request, lanes.latents(every), evaluations)
        images = finished_images(images, request, self.bundle)
        return Result(images, clock.timings(evaluations, lanes.path), list(request.seeds), evaluations, interrupted)

    def jobs(self, request: Request, tokenized: Callable[[], None] = lambda: None) -> list[Job]:
        """Encodes the texts of a request and makes one job for each picture. `tokenized` is called after tokenizing.
        Raises ClosedPipelineError."""
        self._require_open()
        rows = self._rows(request, tokenized)
        each = [one for one in rows for _ in range(request.images_per_prompt)]
        plane = self.bundle.family.plane(request.height, request.width)
        denoiser = self.bundle.family["denoiser"]
        return jobs(
            request.table, denoiser, each, request.seeds, plane, request.latents, self._beginning(request, plane)
        )

    def _beginning(self, request: Request, plane: tuple[int, ...]) -> Begin:
        """Where the loops of a request start."""
        encoded, inpaint = self._encoded(request), request.inpaint
        if encoded is None or request.init is None:
            return from_noise(request.table, plane)
        if inpaint is None:
            return from_images(request.table, encoded)
        masks = inpaint.latent_masks(request.height, request.width, self.bundle.family.factor)
        return Masked(request.table, encoded, masks, request.mask_of, request.init.strength == 1)

    def _encoded(self, request: Request) -> Encoded | None:
        """The images that a request starts from, through the VAE encoder."""
        init = request.init
        if init is None:
            return None
        of = request.image_of
        if init.latents is not None:
            return Encoded(init.latents, None, of)
        pixels = init.pixels if request.inpaint is None else partial(request.inpaint.pixels, init)
        mean, std = self._backend.encode_image(pixels(request.height, request.width))
        return Encoded(mean, std, of)

    def _rows(self, request: Request, tokenized: Callable[[], None]) -> list[tuple[Row, ...]]:
        """The rows of a picture of each text or class."""
        if self._encode is None:
            tokenized()
            return [classed(label) for label in request.class_labels]
        texts = [*request.prompts, *(request.negative_prompts if request.guided else ())]
        encoded = self._encode(texts, tokenized)
        count = len(request.prompts)
        negatives: Sequence[Conditioning | None] = encoded[count:] or [None] * count
        scales, rescale = request.guidance.scales, request.guidance.rescale
        return [guided(prompt, negative, scales, rescale) for prompt, negative in zip(encoded, negatives)]

    def lanes(self, count: int, height: int, width: int) -> Lanes:
        """`count` free lanes for pictures of that size in pixels, for a loop of your own. One thread must drive
        them. Raises SizeError, and ClosedPipelineError."""
        self._require_open()
        limits = self.limits
        for side, value in (("height", height), ("width", width)):
            allowed = [getattr(profile, side) for profile in limits.profiles]
            checks.check_size(value, side, allowed, limits.build_command, limits.family.factor)
        lanes = self._lanes(count, height, width)
        self._given.add(lanes)
        return lanes

    def _lanes(self, count: int, height: int, width: int) -> Lanes:
        _, rows, columns = self.bundle.family.plane(height, width)
        return self._backend.lanes(count, rows, columns)

    @property
    def lora_weights(self) -> dict[str, Strength]:
        """The adapters that are on, and how strongly."""
        return self._adapters.strengths

    def load_lora(self, file: str | Path, name: str | None = None, weight: float | Mapping[str, float] = 1.0) -> str:
        """Loads an adapter (LoRA, LyCORIS, peft, diffusers: docs/adapters.md) and turns it on beside those that are on
        already. name: the file's name without its extension, if None; it is returned. weight: for all of it, or
        {"unet": ..., "text_encoder": ...}. Layers that this model lacks are a warning.

        Raises AdapterError: AdapterFamilyError for another kind of model, AdapterShapeError, AdapterNameError,
        AdapterWeightError, AdapterBusyError while lanes hold jobs; TensorFileError. The pipeline is then as before.
        """
        with self._turn():
            name, fitted = self._adapters.read(file, name)
            strengths = {**self._adapters.strengths, name: strength(weight, name)}
            self._adapters.add(name, fitted)
            try:
                self._switch(strengths)
            except BaseException:
                self._adapters.remove(name)
                raise
        return name

    def set_lora_weights(self, weights: Mapping[str, float | Mapping[str, float]]) -> None:
        """Turns exactly these adapters on; the others stay loaded, and are off. Raises the errors of `load_lora`."""
        with self._turn():
            self._switch(self._adapters.checked(weights))

    def unload_lora(self, name: str | None = None) -> None:
        """Forgets an adapter, or all of them. The model is then bit for bit as before it was loaded."""
        with self._turn():
            kept = self._adapters.without(name)
            self._switch(kept)
            self._adapters.remove(name)

    def _switch(self, strengths: Mapping[str, Strength]) -> None:
        """Brings the graphs' weights to these adapters."""
        before = self._adapters.strengths
        after = {name: one for name, one in strengths.items() if one != OFF}
        if after == before:
            return
        if any(lanes.busy for lanes in self._given):
            raise AdapterBusyError(
                "adapters can't be switched while lanes hold jobs, which would go on with other weights; release the "
                "lanes first, or use a second pipeline"
            )
        self._backend.change_weights(self._adapters.weights(after))
        self._adapters.set(after)
        if self._encode is not None:
            self._encode.clear()

    def _call_back(self, request: Request, lanes: Lanes, index: int) -> None:
        """Shows a callback the latents in diffusers' scale, and takes them over if it returned others or wrote to
        them."""
        table, every = request.table, range(request.batch)
        scale = np.float32(table.scales[index])
        shown = lanes.latents(every) * scale
        before = shown.copy()
        answer = request.callback(self, index, float(table.timesteps[index]), {"latents": shown})
        returned = checks.check_returned(answer, shown)
        if not np.array_equal(returned, before):
            lanes.replace(every, returned / scale)

    def _overflow(self, request: Request, latents: np.ndarray, evaluations: int) -> NumericalError:
        """The error for values that are not finite: it says whether the latents or the VAE decoder have them."""
        cure = "take a smaller guidance_scale, or another scheduler or number of steps"
        if self.bundle.precision != "fp32":
            cure = f"the model may overflow in {self.bundle.precision}: build it with --precision fp32, or {cure}"
        if np.isfinite(latents).all():
            return NumericalError(f"the VAE decoder's values are not finite, though its input is; {cure}")
        return NumericalError(
            f"the latents hold values that are not finite after {evaluations} evaluations at guidance_scale "
            f"{request.guidance.scale:g}; {cure}"
        )


def _build_command(bundle: Bundle, backend: Backend, **sizes: Range) -> str:
    """The command that builds a bundle, or its plans, for other sizes."""
    if backend.build_command is None:
        return bundle.command(**sizes)
    return " ".join([backend.build_command, *(f"--{side} {size}" for side, size in sizes.items())])


def _progress(count: int, shown: bool) -> Any:
    """The indices of the evaluations, with a progress bar if standard error is a terminal."""
    if not shown:
        return range(count)
    from tqdm import tqdm

    return tqdm(range(count), disable=None, desc="denoise", unit="step", leave=False)
