"""Text to picture: the straight-line loop that everything else serves."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from . import request
from .backends import open_backend
from .backends.interface import Backend, Denoising, HostStopwatch, Session, Stopwatch
from .bundle import Bundle, as_path, while_replaced
from .contract import LATENT_CHANNELS, VAE_FACTOR, Range, Shapes
from .errors import (
    BusyPipelineError,
    ClosedPipelineError,
    ManifestError,
    NumericalError,
    PicklingError,
    SchedulerConfigError,
)
from .picture import Picture, format_parameters
from .sampling.noise import TorchGenerator, draw
from .sampling.samplers import LABELS, StepTable, sampler_name, step_table
from .sampling.schedule import Schedule
from .text.tokenizer import ClipTokenizer
from .version import __version__

CACHED_PROMPTS = 64
"""Prompts whose embeddings are kept; SD 1.5's take 0.24 MB each."""

Callback = Callable[["Pipeline", int, float, dict[str, np.ndarray]], "dict[str, np.ndarray] | None"]


@dataclass(frozen=True)
class Result:
    """What a call made.

    images: a list of PIL images, or [B, H, W, 3] float32 in 0..1 ("np"), or latents [B, 4, h, w] ("latent");
    timings: seconds of the device for "text_encoder", "prepare" (buffers and tables, and where a size is new, the
    denoiser's compilation), "denoise" (and "steps", a list) and "vae_decoder"; of the host for "tokenize" and "total",
    and in "host" what it took to start each of those stages, without waiting for the device; "path" is how the steps
    ran: "cuda_graph", or "plain" calls of the inference library;
    seeds: the one seed of the call or one for each picture; evaluations: how often the U-Net ran; interrupted: whether
    a callback stopped the loop.
    """

    images: Any
    timings: dict[str, Any]
    seeds: list[int]
    evaluations: int
    interrupted: bool


class Pipeline:
    """A model that makes pictures from texts. Calls from several threads wait for each other; a callback may not call
    its own pipeline."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._backend = backend
        try:
            self._schedule = Schedule.from_config(bundle.scheduler)
            self._tokenizer = ClipTokenizer(bundle.tokenizer_file, bundle.special_tokens)
        except (SchedulerConfigError, ManifestError) as error:
            raise type(error)(f"{error}. Build the bundle again: {bundle.command()}") from error
        bundle.recheck_tokenizer()
        self._contexts: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.RLock()
        self._busy = self._closed = self._interrupt = False

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
        request.check_threads(threads)
        path = as_path(folder)

        def load() -> Pipeline:
            bundle = Bundle.open(path, verify)
            return cls(bundle, open_backend(bundle, backend, device, threads, cuda_graphs))

        return while_replaced(path, load)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside it no other call runs. BusyPipelineError where this thread is inside one already: it would wait for
        itself."""
        with self._lock:
            if self._busy:
                raise BusyPipelineError(
                    "this pipeline is in the middle of a call, and its callback (or a signal handler) called or closed "
                    "it; use a second "
                    "pipeline there, or wait until the call has returned"
                )
            if self._closed:
                raise ClosedPipelineError(
                    f"this pipeline was closed; load it again: Pipeline.load({str(self.bundle.folder)!r})"
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

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
        """Frees the graphs and the cached embeddings. Whoever uses the pipeline afterwards gets a
        ClosedPipelineError."""
        if self._closed:
            return
        with self._turn():
            self._closed = True
            self._backend.close()
            self._contexts.clear()

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
        """Set to True by a callback, it ends the loop after the current step; the picture is made of what is there."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value  # the name that callbacks written for diffusers set

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        latents: np.ndarray | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        scheduler: str | None = None,
        progress: bool = True,
    ) -> Result:
        """Makes the picture that diffusers' StableDiffusionPipeline makes from the same arguments.

        prompt: one text or several; height, width: pixels, multiples of 8 (default: what the bundle is best at);
        guidance_scale: above 1 the negative prompt takes part; eta: DDIM's; seed: where diffusers takes a generator on
        the CPU: an int for all pictures, one int for each, or None for a random one; latents: [B, 4, height/8, width/8]
        standard normal float32 instead of noise; scheduler: a name of `engine.sampling.samplers.SAMPLERS`, None for the
        model's own; callback_on_step_end(pipeline, evaluation, timestep, {"latents": [B, 4, h, w]}) sees the latents
        that diffusers' has, may write to them or return others in such a dictionary; progress: a bar on a terminal.

        Raises the InputErrors of engine/errors.py before anything runs, NumericalError rather than a black picture,
        BundleChangedError where the bundle's files were written to, ClosedPipelineError, and BusyPipelineError in a
        callback.
        """
        started = perf_counter()
        prompts, negatives = request.check_prompts(prompt, negative_prompt)
        guidance_scale = request.check_guidance_scale(guidance_scale)
        batch = request.check_batch(len(prompts), num_images_per_prompt)
        rows = 2 * batch if guidance_scale > 1 else batch
        height, width = request.check_shapes(height, width, batch, rows, self._backend.profiles, self._build_command)
        steps = request.check_steps(num_inference_steps, self._schedule.train_timesteps)
        eta = request.check_eta(eta)
        seeds = request.check_seeds(secrets.randbits(32) if seed is None else seed, batch)
        output_type = request.check_output_type(output_type)
        request.check_callback(callback_on_step_end)
        shape = (batch, LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
        if latents is not None:
            latents = request.check_latents(latents, shape)
        sampler = sampler_name(scheduler, self._schedule)
        table = step_table(sampler, self._schedule, steps, eta)

        with self._turn():
            self.interrupt = False
            self.bundle.recheck_in_place()
            clock = _Clock(self._backend.stopwatch())
            texts = negatives + prompts if rows > batch else prompts
            contexts = [context for context in self._encode(texts, clock) for _ in range(num_images_per_prompt)]
            clock.mark()
            session = self._backend.start(_plan(table, seeds, latents, shape, contexts, guidance_scale))
            clock.mark()
            evaluations = 0
            for i in _progress(len(table), progress):
                session.step(i)
                if callback_on_step_end is not None:
                    self._call_back(callback_on_step_end, session, i, table)
                clock.mark()
                evaluations += 1
                if self.interrupt:
                    break
            interrupted = self.interrupt
            if interrupted:  # the latents of the last evaluation need no scale
                session.latents = session.latents * np.float32(table.scales[evaluations - 1])
            if output_type == "latent":
                images: Any = session.latents
                finite = np.isfinite(images).all()
            else:
                finish = session.decode()
                clock.mark()
                decoded = finish()
                images, finite = decoded.image, decoded.finite.all()
            timings = clock.timings(evaluations, session.path)
            if not finite:
                raise self._overflow(session, evaluations, guidance_scale)
            self.bundle.recheck_in_place()

        if output_type == "np":
            images = images.astype(np.float32) / 255
        elif output_type == "pil":
            fields = {
                "Steps": steps,
                "Sampler": LABELS[sampler],
                "CFG scale": guidance_scale,
                "Seed": seeds[0],
                "Size": f"{width}x{height}",
                "Model": self.bundle.name,
                "Precision": self.bundle.precision,
            }
            per_prompt = [(p, n) for p, n in zip(prompts, negatives) for _ in range(num_images_per_prompt)]
            images = [_picture(images[i], *per_prompt[i], fields, seeds, i) for i in range(batch)]
        timings["total"] = perf_counter() - started
        return Result(images, timings, seeds, evaluations, interrupted)

    def _encode(self, texts: list[str], clock: _Clock) -> list[Any]:
        """One embedding for each text, from the cache or together in one call of the text encoder."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._contexts]
        ids = self._tokenizer(unknown)
        clock.mark()
        found = {text: self._contexts[text] for text in texts if text in self._contexts}
        if unknown:
            found.update(zip(unknown, self._backend.encode_text(ids)))
        for text in texts:
            self._contexts[text] = found[text]
            self._contexts.move_to_end(text)
        while len(self._contexts) > CACHED_PROMPTS:
            self._contexts.popitem(last=False)
        return [found[text] for text in texts]

    def _call_back(self, callback: Callback, session: Session, index: int, table: StepTable) -> None:
        """Shows a callback the latents in diffusers' scale; they count if they are others afterwards, returned or
        written in place."""
        scale = np.float32(table.scales[index])
        shown = session.latents * scale
        before = shown.copy()
        returned = request.check_returned(
            callback(self, index, float(table.timesteps[index]), {"latents": shown}), shown
        )
        if not np.array_equal(returned, before):
            session.latents = returned / scale

    def _build_command(self, **sizes: Range) -> str:
        """The command that builds this bundle, or its plans, for other sizes."""
        if self._backend.rebuild is None:
            return self.bundle.command(**sizes)
        return " ".join([self._backend.rebuild, *(f"--{side} {size}" for side, size in sizes.items())])

    def _overflow(self, session: Session, evaluations: int, guidance_scale: float) -> NumericalError:
        """The error for a picture that has values that are not finite: whose they are."""
        cure = "take a smaller guidance_scale, or another scheduler or number of steps"
        if self.bundle.precision != "fp32":
            cure = f"the model may overflow in {self.bundle.precision}: build it with --precision fp32, or {cure}"
        if np.isfinite(session.latents).all():
            return NumericalError(f"the VAE decoder's values are not finite, though its input is; {cure}")
        return NumericalError(
            f"the latents hold values that are not finite after {evaluations} evaluations at guidance_scale "
            f"{guidance_scale:g}; {cure}"
        )


class _Clock:
    """Ends of the stages of a call, by the device and by the host: tokens, text encoder, start of the loop, each step,
    decoder."""

    def __init__(self, device: Stopwatch) -> None:
        self._device, self._host = device, HostStopwatch()
        self.mark()

    def mark(self) -> None:
        """The end of a stage, or the beginning of the first."""
        self._device.mark()
        self._host.mark()

    def timings(self, evaluations: int, path: str) -> dict[str, Any]:
        """`Result.timings` without the total; to be called when the device has finished."""
        device, host = self._device.seconds(), self._host.seconds()
        last = 3 + evaluations
        stages = [
            {"text_encoder": s[1], "prepare": s[2], "denoise": sum(s[3:last]), "vae_decoder": sum(s[last:])}
            for s in (device, host)
        ]
        return {"tokenize": host[0], **stages[0], "steps": device[3:last], "host": stages[1], "path": path}


def _plan(
    table: StepTable,
    seeds: list[int],
    latents: np.ndarray | None,
    shape: tuple[int, ...],
    contexts: Sequence[Any],
    guidance_scale: float,
) -> Denoising:
    """Noise and tables of one loop. With guidance the rows of the U-Net are all negative prompts, then all prompts."""
    generators = [TorchGenerator(seed) for seed in seeds]
    first = draw(generators, shape) if latents is None else latents
    batch, count = shape[0], len(table)
    noise = None
    if table.draws.any():
        noise = np.zeros((count, *shape), np.float32)
        for i in np.flatnonzero(table.draws):
            noise[i] = draw(generators, shape)
    one = np.eye(batch, dtype=np.float32)
    guided = len(contexts) == 2 * batch
    mixing = np.concatenate([(1 - guidance_scale) * one, guidance_scale * one], axis=1) if guided else one
    row_sample = np.arange(len(contexts), dtype=np.int32) % batch
    return Denoising(
        latents=first * np.float32(table.initial_scale),
        contexts=contexts,
        row_sample=row_sample,
        mixing=np.ascontiguousarray(mixing, np.float32),
        timesteps=np.broadcast_to(table.timesteps.astype(np.float32)[:, None], (count, batch)),
        updates=np.broadcast_to(table.updates.astype(np.float32)[:, None], (count, batch, *table.updates.shape[1:])),
        noise=noise,
    )


def _picture(
    pixels: np.ndarray, prompt: str, negative_prompt: str, fields: dict[str, Any], seeds: list[int], index: int
) -> Picture:
    """A PIL image with what is needed to make it again."""
    fields = {**fields, "Seed": seeds[index if len(seeds) > 1 else 0]}
    if len(seeds) == 1 and index > 0:
        fields["Batch index"] = index
    return Picture.from_pixels(
        pixels, format_parameters(prompt, negative_prompt, {**fields, "Version": f"LatentRT {__version__}"})
    )


def _progress(count: int, shown: bool) -> Any:
    """The numbers of the evaluations, with a bar if standard error is a terminal."""
    if not shown:
        return range(count)
    from tqdm import tqdm

    return tqdm(range(count), disable=None, desc="denoise", unit="step", leave=False)
