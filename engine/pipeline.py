"""Text to image: request, jobs, lanes, decoding, in a straight line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakSet

import numpy as np
from PIL import Image

from . import checks
from .adapters.loaded import Adapters, Given, Strength, Weights
from .backends import open_backend
from .backends.interface import Backend, Decoded, Lanes
from .beginnings import Begin, Encode, Encoded, from_images, from_noise
from .bundle import Bundle, as_path, while_replaced
from .contract import Range, Shapes
from .edit import Edit
from .errors import (
    AdapterBusyError,
    AdapterError,
    BusyPipelineError,
    ClosedPipelineError,
    InversionError,
    ManifestError,
    NumericalError,
    PicklingError,
    PreviewError,
    SchedulerConfigError,
)
from .guidance import DEFAULT_SCALE, Scale
from .hires import PIXELS, Hires
from .images import finished_images
from .job import Job, Row, classed, guided, jobs
from .preview import LatentColours, StepTensors
from .request import Limits, Request
from .resize import resize
from .result import Clock, Result
from .sampling.noise import TorchGenerator
from .text.conditioning import TextConditioning
from .text.inversion import load_inversion
from .text.request import Reads
from .text.rows import picture_rows
from .text.table import TokenTable
from .text.tokenizer import ClipTokenizer
from .tiling import Tiles

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
            schedule, low_resolution = bundle.schedule(), bundle.low_resolution()
            encode = self._text_conditioning()
        except (SchedulerConfigError, ManifestError) as error:
            raise type(error)(f"{error}. Build the bundle again: {bundle.command()}") from error
        reads = Reads() if encode is None else Reads(encode.table.width, bundle.contents.text_layers)
        build_command = partial(_build_command, bundle, backend)
        self.limits = Limits(
            bundle.family, schedule, backend.profiles, build_command, backend.encodes_images, reads, low_resolution
        )
        self._encode = encode
        self._colours: LatentColours | None = None
        self._adapters = Adapters(bundle, self._change_weights)
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
        table = TokenTable(bundle.token_table_file)
        bundle.recheck_tokenizer()
        return TextConditioning(tokenizer, table, self._backend, bundle.family)

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
    def loaded(self) -> str:
        """The textual inversions and adapters that are loaded, with the beginnings of their hashes, and how strongly
        the latter are on in every call."""
        words = {} if self._encode is None else self._encode.table.hashes
        inversions = [f"textual inversion {word!r} {digest[:10]}" for word, digest in sorted(words.items())]
        return ", ".join([*inversions, *self._adapters.described()])

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
        prompt_syntax: str = "plain",
        clip_skip: int | None = None,
        emphasis: str = "original",
        prompt_embeds: np.ndarray | None = None,
        negative_prompt_embeds: np.ndarray | None = None,
        pooled_prompt_embeds: np.ndarray | None = None,
        depth_map: Any = None,
        image_guidance_scale: float | None = None,
        noise_level: int | None = None,
        subseed: int | Sequence[int] | None = None,
        subseed_strength: float | Sequence[float] | None = None,
        hires: Hires | None = None,
        vae_tiling: bool | int | None = None,
        metadata: bool = True,
    ) -> Result:
        """Makes the picture that the model's pipeline of diffusers makes from the same arguments.

        prompt, negative_prompt: for models with texts; class_labels: for models with classes, one integer for each
        picture; num_images_per_prompt: pictures of each text or class, or of a model without either; height, width:
        pixels, multiples of 8 (default: what the bundle is best at); guidance_scale: above 1 the negative prompt takes
        part; a list has a number for each step, a function (evaluation, timestep) -> number is called before the loop;
        eta: DDIM's; seed: where diffusers takes a generator on the CPU, one for all pictures or one for each, or None
        for a random one; latents: [B, 4, height/8, width/8] standard normal float32 instead of noise;
        callback_on_step_end(pipeline, evaluation, timestep, {"latents": [B, 4, h, w]}) sees diffusers' latents, and may
        write to them or return others so; the dictionary has a `preview()` (engine/preview.py); scheduler: a sampler's
        name, a class of diffusers or A1111's label (None: the model's own); progress: show a bar; guidance_rescale: phi
        of arXiv 2305.08891; guidance_interval: (start, end), evaluation i of E has guidance if start <= i / E <= end,
        the others run without the negative prompt; schedule_type, timesteps, sigmas, timestep_respacing: the sampler's
        grid; sampler_options: its options by name (docs/samplers.md); image: what to start from, a path, a PIL image,
        an array [H, W, 3] of uint8 or of float in 0..1, latents [n, C, h, w], or a list: one for all pictures, for each
        text or for each picture; strength: how much of it changes, the share of the steps that are run (default: 0.8,
        with a mask 1); mask_image: white is repainted; composite: what is not white stays pixel for pixel;
        padding_mask_crop: paint only the part around the mask, with so many pixels on each side; depth_map: for
        depth models, arrays [H, W] or pictures of which the lighter is nearer; image_guidance_scale: of InstructPix2Pix
        (default: 1.5); noise_level: of the noise that the upscaler's image gets (default: 20); subseed,
        subseed_strength: a variation, how far the noise of the seed goes towards that of another one, 0 to 1; hires: a
        second pass at a larger size; vae_tiling: whether the VAE takes a picture in tiles, or their side in pixels
        (None: above 1024 x 1024 pixels) (docs/tasks.md); prompt_syntax: "plain", or "a1111" for
        brackets, AND, schedules and any length, with its `emphasis`: "original", "no norm" or "ignore"
        (docs/prompts.md); clip_skip: the text encoder's last layers that are left out, with "plain" not for the
        negative prompt; prompt_embeds, negative_prompt_embeds: [prompts, T, C] float32 in place of texts;
        pooled_prompt_embeds: for models that take some; metadata: whether the pictures hold their settings. Raises the
        InputErrors of engine/errors.py before any work, AdapterErrors for tags (docs/adapters.md), NumericalError and
        not a black picture, BundleChangedError where the bundle's files were written to, ClosedPipelineError, and
        BusyPipelineError in a callback.
        """
        started = perf_counter()
        request = Request.check(self.limits, prompt, height, width, num_inference_steps, guidance_scale,
                                negative_prompt, num_images_per_prompt, eta, seed, latents, output_type,
                                callback_on_step_end, scheduler, progress, guidance_rescale, guidance_interval,
                                schedule_type, timesteps, sigmas, timestep_respacing, sampler_options,
                                class_labels, image, strength, mask_image, composite, padding_mask_crop,
                                prompt_syntax=prompt_syntax, clip_skip=clip_skip, emphasis=emphasis,
                                prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
                                pooled_prompt_embeds=pooled_prompt_embeds,
                                depth_map=depth_map, image_guidance_scale=image_guidance_scale,
                                noise_level=noise_level,
                                subseed=subseed, subseed_strength=subseed_strength, hires=hires,
                                vae_tiling=vae_tiling, metadata=metadata)  # fmt: skip
        with self._turn():
            self.bundle.recheck_in_place()
            result = self._run(request, started)
            self.bundle.recheck_in_place()
        return result

    def _run(self, request: Request, started: float) -> Result:
        """Request -> loop -> decode, with hires a second loop in between."""
        self.interrupt = False
        clock = Clock(self._backend.stopwatch(), started)
        for one in (request, request.second):
            if one is not None:
                self._adapters.needed(one.texts.loras)
        generators = [TorchGenerator(seed) for seed in request.seeds]
        last, (lanes, evaluations) = request, self._loop(request, generators, clock)
        if request.second is not None and not self.interrupt:
            last = self._enlarged(request, request.second, lanes)
            clock.mark("prepare")
            lanes, more = self._loop(last, generators, clock, evaluations)
            evaluations += more
        every, interrupted = range(request.batch), self.interrupt
        if request.output_type == "latent":
            images: Any = lanes.latents(every)
            finite = np.isfinite(images).all()
        else:
            finish = self._decode(last, lanes)
            clock.mark("vae_decoder")
            decoded = finish()
            images, finite = decoded.image, decoded.finite.all()
        if not finite:
            raise self._overflow(request, lanes.latents(every), evaluations)
        images = finished_images(images, request, self.bundle, self.description, interrupted, self.loaded)
        return Result(images, clock.timings(lanes.path), list(request.seeds), evaluations, interrupted)

    def _loop(
        self, request: Request, generators: Sequence[TorchGenerator], clock: Clock, before: int = 0
    ) -> tuple[Lanes, int]:
        """Jobs -> lanes -> step, step, step. The lanes at the end, and how many evaluations were run. `before` were run
        in a first pass."""
        if self._adapters.turn_on(request.texts.loras):
            clock.mark("prepare")
        made = self.jobs(request, partial(clock.mark, "tokenize"), generators)
        clock.mark("text_encoder")
        lanes = self._lanes(len(made), request.height, request.width)
        every = range(len(made))
        for lane in every:
            lanes.admit(lane, made[lane])
        clock.mark("prepare")
        evaluations = 0
        for i in _progress(len(request.table), request.progress):
            lanes.step([i] * len(made))
            evaluations += 1
            if request.callback is not None:
                self._call_back(request, lanes, i, before)
            clock.mark("denoise")
            if self.interrupt:
                break
        if self.interrupt:  # the latents of the last evaluation need no scale
            scale = np.float32(request.table.scales[evaluations - 1])
            lanes.replace(every, lanes.latents(every) * scale)
        return lanes, evaluations

    def _decode(self, request: Request, lanes: Lanes) -> Callable[[], Decoded]:
        """Starts the decoder on all lanes' latents; see `Lanes.decode`."""
        return lanes.decode(range(request.batch), self._tiles(request))

    def _tiles(self, request: Request) -> Tiles | None:
        limits = self.limits
        return Tiles.of(request.vae_tiling, request.height, request.width, limits.family.factor, limits.profiles)

    def _enlarged(self, first: Request, second: Request, lanes: Lanes) -> Request:
        """The second pass, with what the first has made at its size to start from."""
        every = range(first.batch)
        assert first.hires is not None
        assert second.init is not None
        if first.hires.mode == PIXELS:
            pictures = tuple(Image.fromarray(pixels) for pixels in self._decode(first, lanes)().image)
            init = replace(second.init, pictures=pictures)
        else:
            _, rows, columns = self.bundle.family.plane(second.height, second.width)
            init = replace(second.init, latents=resize(lanes.latents(every), rows, columns, first.hires.mode))
        for lane in every:
            lanes.release(lane)
        return replace(second, init=init)

    def jobs(
        self,
        request: Request,
        tokenized: Callable[[], None] = lambda: None,
        generators: Sequence[TorchGenerator] | None = None,
    ) -> list[Job]:
        """Encodes the texts of a request and makes one job for each picture. `tokenized` is called after tokenizing.
        generators: for a second pass, those that the first has drawn from. Raises ClosedPipelineError,
        PromptLengthError for texts that are too long for the plans, and AdapterError unless the adapters that the texts
        name are on."""
        self._require_open()
        if not self._adapters.are_on(request.texts.loras):
            raise AdapterError(
                "the request needs other adapters than those that are on; call pipeline.switch_loras(request) first"
            )
        if generators is None:
            generators = [TorchGenerator(seed) for seed in request.seeds]
        rows = self._rows(request, tokenized)
        each = [one for one in rows for _ in range(request.images_per_prompt)]
        plane = self.bundle.family.plane(request.height, request.width)
        denoiser = self.bundle.family["denoiser"]
        begin = self._beginning(request, plane)
        made = jobs(request.table, denoiser, each, generators, plane, request.latents, begin, request.variation)
        checks.check_tokens([job.tokens for job in made], self.limits.profiles, self.limits.build_command)
        return made

    def _beginning(self, request: Request, plane: tuple[int, ...]) -> Begin:
        """Where the loops of a request start."""
        encode = self._encode_image(request)
        beginner = request.seen or request.inpaint
        if beginner is not None:
            return beginner.begin(request, plane, encode)
        if request.init is None:
            return from_noise(request.table, plane)
        encoded = Encoded.of_images(request.init, request.height, request.width, request.image_of, encode)
        return from_images(request.table, encoded)

    def _encode_image(self, request: Request) -> Encode:
        """The VAE encoder, in tiles where the request takes some."""
        tiles = self._tiles(request)
        return self._backend.encode_image if tiles is None else partial(tiles.encode, self._backend.encode_image)

    def _rows(self, request: Request, tokenized: Callable[[], None]) -> list[tuple[Row, ...]]:
        """The rows of a picture of each text or class."""
        if self._encode is None:
            tokenized()
            return [classed(label) for label in request.class_labels]
        guidance = request.guidance
        guide = request.seen.rows if isinstance(request.seen, Edit) else guided
        return picture_rows(
            request.texts,
            self._encode,
            guidance.scales,
            guidance.rescale,
            request.sampling.run,
            request.steps_before,
            guide,
            tokenized,
        )

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Makes a word stand for the vectors in a file (docs/prompts.md), in every prompt from now on. Returns the
        word, which is `token` or the file's. Raises TensorFileError, InversionError, and InversionWidthError for
        another model's."""
        with self._turn():
            inversion = load_inversion(path, token)
            self._table().add(inversion)
        return inversion.word

    def unload_textual_inversion(self, token: str) -> None:
        """Makes a word what it was before. InversionError if it has no vectors."""
        with self._turn():
            self._table().remove(token)

    def _table(self) -> TokenTable:
        if self._encode is None:
            raise InversionError("this model makes pictures without texts, so no word can stand for anything")
        return self._encode.table

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
        """The adapters that are on in every call, and how strongly."""
        return dict(self._adapters.base)

    def load_lora(self, file: str | Path, name: str | None = None, weight: Given = 1.0) -> str:
        """Loads an adapter (LoRA, LyCORIS, peft, diffusers: docs/adapters.md) and turns it on beside those that are on
        already. name: the file's name without its extension, if None; it is returned. weight: for all of it, or
        {"unet": ..., "text_encoder": ...}; 0 for an adapter that only tags in prompts turn on. Layers that this model
        lacks are a warning.

        Raises AdapterError: AdapterFamilyError for another kind of model, AdapterShapeError, AdapterNameError,
        AdapterWeightError, AdapterBusyError while lanes hold jobs; TensorFileError. The pipeline is then as before.
        """
        with self._turn():
            return self._adapters.load(file, name, weight)

    def set_lora_weights(self, weights: Mapping[str, Given]) -> None:
        """Turns exactly these adapters on; the others stay loaded, and are off. Raises the errors of `load_lora`."""
        with self._turn():
            self._adapters.set_base(weights)

    def unload_lora(self, name: str | None = None) -> None:
        """Forgets an adapter, or all of them. The model is then bit for bit as before it was loaded."""
        with self._turn():
            self._adapters.unload(name)

    def switch_loras(self, request: Request) -> None:
        """Turns on the adapters that a request's tags name, on top of those of every call: what `jobs` needs. Raises
        AdapterNameError, and AdapterBusyError while lanes hold jobs and other adapters are on."""
        with self._turn():
            self._adapters.turn_on(request.texts.loras)

    def _change_weights(self, changed: Callable[[], Weights]) -> None:
        """Brings the graphs to other weights."""
        if any(lanes.busy for lanes in self._given):
            raise AdapterBusyError(
                "adapters can't be switched while lanes hold jobs, which would go on with other weights; release the "
                "lanes first, or use a second pipeline"
            )
        self._backend.change_weights(changed())
        if self._encode is not None:
            self._encode.clear()

    def _call_back(self, request: Request, lanes: Lanes, index: int, before: int) -> None:
        """Shows a callback the latents in diffusers' scale, and takes them over if it returned others or wrote to
        them."""
        table, every = request.table, range(request.batch)
        scale = np.float32(table.scales[index])
        shown = lanes.latents(every) * scale
        untouched = shown.copy()
        tensors = StepTensors(shown, partial(self._x0, request, lanes, index), self._latent_colours)
        answer = request.callback(self, before + index, float(table.timesteps[index]), tensors)
        returned = checks.check_returned(answer, shown)
        if not np.array_equal(returned, untouched):
            lanes.replace(every, returned / scale)

    def _x0(self, request: Request, lanes: Lanes, index: int) -> np.ndarray:
        """The clean latents that the model predicts at an evaluation."""
        assert request.x0_slots is not None
        slot = request.x0_slots[index]
        if slot is None:
            raise PreviewError(
                f"sampler {request.sampling.sampler!r} leaves no room for x0 at evaluation {index}; ask at another "
                "one, or take another sampler"
            )
        return lanes.latents(range(request.batch), slot)

    def _latent_colours(self) -> LatentColours:
        if self._colours is None:
            self._colours = LatentColours.of(self._backend, self.bundle.family)
        return self._colours

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
    options = [f"--{name.replace('_', '-')} {size}" for name, size in sizes.items()]
    return " ".join([backend.build_command, *options])


def _progress(count: int, shown: bool) -> Any:
    """The indices of the evaluations, with a progress bar if standard error is a terminal."""
    if not shown:
        return range(count)
    from tqdm import tqdm

    return tqdm(range(count), disable=None, desc="denoise", unit="step", leave=False)
