"""Requests: the arguments of a call, checked once, before any work starts."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from . import checks
from .contract import Family, Shapes
from .errors import BatchError, HiresError, ImageError, PromptError, SizeError, TimestepsError
from .guidance import Guidance, Scale, check_guidance, without_text
from .hires import PIXELS, Hires, check_hires
from .init_image import InitImage, check_strength, each_of
from .inpainting import Inpaint, check_beginning
from .sampling.catalog import checked_options, sampler_name, schedule_type_name, step_table
from .sampling.respacing import space_timesteps
from .sampling.schedule import Schedule
from .sampling.table import StepTable
from .sampling.watched import watched
from .seen import Seen, check_seen
from .text.request import NO_TEXTS, Reads, Texts, counted_steps
from .tiling import check_tiling
from .variation import Variation

TABLES_KEPT = 32
"""Step tables of one model that are kept; one of 50 steps takes 10 kB."""


@dataclass(frozen=True)
class Sampling:
    """What a call asks of a sampler: the arguments of `step_table`."""

    sampler: str
    steps: int
    eta: float
    schedule_type: str | None
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    options: tuple[tuple[str, Any], ...]
    start: int = 0
    """The step that the loop starts with, for image to image."""

    @classmethod
    def check(
        cls,
        schedule: Schedule,
        scheduler: str | None,
        num_inference_steps: Any,
        eta: Any,
        schedule_type: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        timestep_respacing: str | None = None,
        sampler_options: Mapping[str, Any] | None = None,
    ) -> Sampling:
        """Those arguments of `Pipeline.__call__`, checked as far as it goes without the table."""
        steps = checks.check_steps(num_inference_steps, schedule.train_timesteps)
        eta = checks.check_eta(eta)
        name = sampler_name(scheduler, schedule)
        kind = None if schedule_type is None else schedule_type_name(schedule_type)
        own = checks.check_falling(timesteps, "timesteps", 1)
        if timestep_respacing is not None:
            if own is not None:
                raise TimestepsError("timesteps and timestep_respacing both say the timesteps; pass one of them")
            own = space_timesteps(timestep_respacing, schedule.train_timesteps)
        options = checked_options(name, kind, checks.check_sampler_options(sampler_options))
        return cls(name, steps, eta, kind, own, checks.check_falling(sigmas, "sigmas", 2), options)

    @property
    def count(self) -> int:
        """The number of steps. As in diffusers, a call's own timesteps or noise levels say it."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return self.steps if self.sigmas is None else len(self.sigmas) - 1

    @property
    def run(self) -> int:
        """The number of steps that are run."""
        return self.count - self.start

    def table(self, schedule: Schedule) -> StepTable:
        """The step table on a model's noise schedule, which nobody can change: calls share it."""
        table = step_table(
            self.sampler,
            schedule,
            self.steps,
            self.eta,
            self.start,
            schedule_type=self.schedule_type,
            timesteps=self.timesteps,
            sigmas=self.sigmas,
            options=self.options,
        )
        for field in fields(table):
            if isinstance(array := getattr(table, field.name), np.ndarray):
                array.flags.writeable = False
        return table


def late(sampling: Sampling, init: InitImage | None) -> Sampling:
    """The sampling from the step on with which a loop from an image starts. StrengthError if none is left."""
    return sampling if init is None else replace(sampling, start=init.first_step(sampling.count))


@dataclass(frozen=True)
class Limits:
    """What a loaded model allows: its family, its noise schedule and the sizes that it serves.
    `build_command(height=Range, ...)` is the command that builds for other sizes. reads: what its text encoder
    reads."""

    family: Family
    schedule: Schedule
    profiles: tuple[Shapes, ...]
    build_command: checks.BuildCommand
    encodes_images: bool
    """Whether there is a VAE encoder, which image to image needs."""
    reads: Reads = NO_TEXTS
    low_resolution: tuple[Schedule, int] | None = None
    """`Bundle.low_resolution`."""

    @cached_property
    def table(self) -> Callable[[Sampling], StepTable]:
        """table(sampling): the step table. Recent ones are kept: one takes 10 microseconds a step to make,
        more than anything else that the host does for a step. Threads may call it at the same time."""
        return lru_cache(TABLES_KEPT)(partial(Sampling.table, schedule=self.schedule))


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request for pictures.

    prompts, negative_prompts: one of each for every text, for `images_per_prompt` pictures; a model without texts has
    an empty prompt for each class, or one; guided: whether the negative prompts take part; class_labels: one for each
    prompt, None for a model without classes; height, width: pixels; seeds: one for all pictures, or one for each;
    latents: [B, C, h, w] standard normal float32, or None for noise; init: the images to start from, or None;
    inpaint: what of these is repainted, None for all; seen: what the U-Net sees beside the latents, None for nothing;
    sampling: the sampler and its grid, with the `table`; texts: the prompts in their syntax, and embeddings; variation:
    what changes the first noise, or None; hires: what is asked of a second pass, or None; second: that pass, whose
    `init` has no picture yet; vae_tiling: whether pictures go through the VAE in tiles, or their side in pixels;
    x0_slots: with a callback, where each evaluation leaves the predicted clean latents; steps_before: of a first
    pass; metadata: whether pictures hold their settings.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    images_per_prompt: int
    height: int
    width: int
    steps: int
    guidance: Guidance
    seeds: tuple[int, ...]
    latents: np.ndarray | None
    sampling: Sampling
    table: StepTable
    output_type: str
    callback: Any
    progress: bool
    class_labels: tuple[int | None, ...]
    texts: Texts
    init: InitImage | None = None
    inpaint: Inpaint | None = None
    seen: Seen | None = None
    variation: Variation | None = None
    hires: Hires | None = None
    second: Request | None = None
    vae_tiling: bool | int | None = None
    x0_slots: tuple[int | None, ...] | None = None
    steps_before: int = 0
    metadata: bool = True

    @property
    def image_of(self) -> tuple[int, ...]:
        """The image of each picture."""
        return () if self.init is None else self.init.of(len(self.prompts), self.images_per_prompt)

    @property
    def mask_of(self) -> tuple[int, ...]:
        """The mask of each picture."""
        if self.inpaint is None:
            return ()
        return each_of("masks", len(self.inpaint.masks), len(self.prompts), self.images_per_prompt)

    @property
    def batch(self) -> int:
        """The number of pictures."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def guided(self) -> bool:
        """Whether guidance takes part in any evaluation: arXiv 2207.12598's w + 1 is more than 1."""
        return self.guidance.used

    @classmethod
    def check(
        cls,
        limits: Limits,
        prompt: str | Sequence[str] | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        guidance_scale: Scale,
        negative_prompt: str | Sequence[str] | None,
        num_images_per_prompt: int,
        eta: float,
        seed: int | Sequence[int] | None,
        latents: np.ndarray | None,
        output_type: str,
        callback: Any,
        scheduler: str | None,
        progress: bool,
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
    ) -> Request:
        """The arguments of `Pipeline.__call__`, checked. Raises the InputErrors of engine/errors.py."""
        labels = checks.check_class_labels(class_labels, limits.family.classes)
        embeds = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
        }
        if limits.family.tokenizers:
            texts = Texts.check(
                limits.reads, prompt, negative_prompt, prompt_syntax, clip_skip, emphasis_mode=emphasis, **embeds
            )
            labels *= len(texts.prompts)
        else:
            checks.check_no_text(prompt, negative_prompt)
            texts = Texts.none(len(labels), clip_skip=clip_skip, **embeds)
        batch = checks.check_batch(len(texts.prompts), num_images_per_prompt)
        sampling = Sampling.check(
            limits.schedule,
            scheduler,
            num_inference_steps,
            eta,
            schedule_type,
            timesteps,
            sigmas,
            timestep_respacing,
            sampler_options,
        )
        init, inpaint = check_beginning(
            limits.family, image, strength, mask_image, composite, padding_mask_crop, output_type
        )
        seen = check_seen(
            limits.family, limits.low_resolution, init, inpaint, depth_map, image_guidance_scale, noise_level
        )
        if init is not None:
            _require_encoder(limits, init)
            init.of(len(texts.prompts), int(num_images_per_prompt))
        if inpaint is not None:
            each_of("masks", len(inpaint.masks), len(texts.prompts), int(num_images_per_prompt))
        sampling = late(sampling, init)
        table, x0_slots = _table(limits, sampling, callback is not None)
        guidance = check_guidance(guidance_scale, guidance_rescale, guidance_interval, sampling.run, table.timesteps)
        if not limits.family.tokenizers:
            guidance = without_text(guidance)
        hires = check_hires(hires, image)
        counted = counted_steps(sampling.run, len(guidance.scales))
        texts.check_loop(counted, guidance.used, 0 if hires is None else hires.steps or counted)
        rows = _rows(limits, texts, guidance, batch, int(num_images_per_prompt))
        whole = inpaint is None or inpaint.padding is None
        height, width = _size(limits, height, width, batch, rows, init if whole else None)
        if inpaint is not None:
            inpaint.crop(height, width)
        seeds = checks.check_seeds(secrets.randbits(32) if seed is None else seed, batch)
        checks.check_output_type(output_type)
        checks.check_callback(callback)
        if latents is not None:
            latents = checks.check_latents(latents, (batch, *limits.family.plane(height, width)))
        request = cls(
            prompts=texts.prompts,
            negative_prompts=texts.negatives,
            images_per_prompt=int(num_images_per_prompt),
            height=height,
            width=width,
            steps=sampling.count,
            guidance=guidance,
            seeds=tuple(seeds),
            latents=latents,
            sampling=sampling,
            table=table,
            x0_slots=x0_slots,
            output_type=output_type,
            callback=callback,
            progress=progress,
            class_labels=tuple(labels),
            texts=texts,
            init=init,
            inpaint=inpaint,
            seen=seen,
            variation=Variation.check(subseed, subseed_strength, batch),
            hires=hires,
            vae_tiling=check_tiling(vae_tiling, limits.family.factor),
            metadata=metadata,
        )
        return request if hires is None else replace(request, second=_second_pass(limits, request, hires))


def _table(limits: Limits, sampling: Sampling, watch: bool) -> tuple[StepTable, tuple[int | None, ...] | None]:
    """The step table, and for a callback the slots in which it leaves x0."""
    if not watch:
        return limits.table(sampling), None
    made = watched(limits.table(sampling), limits.schedule.prediction_type)
    return made.table, made.slots


def _rows(limits: Limits, texts: Texts, guidance: Guidance, batch: int, images_per_prompt: int) -> int:
    """The U-Net's rows for a call of so many pictures."""
    if not limits.family.tokenizers:
        return batch
    return texts.rows(guidance.used, limits.family.most_rows) * images_per_prompt


def _second_pass(limits: Limits, first: Request, hires: Hires) -> Request:
    """The request of a second pass, whose image is not there yet."""
    init = InitImage((), None, check_strength(hires.strength))
    if hires.mode == PIXELS:
        _require_encoder(limits, init)
    sampling = late(_second_sampling(limits, first, hires), init)
    table, slots = _table(limits, sampling, first.callback is not None)
    texts = _with_prompts(limits, first, hires)
    second = replace(texts, sampling=sampling, table=table, x0_slots=slots, steps=sampling.count)
    guidance = _second_guidance(limits, second, hires)
    rows = _rows(limits, second.texts, guidance, first.batch, first.images_per_prompt)
    before = counted_steps(first.sampling.run, len(first.guidance.scales))
    height, width = hires.size(first.height, first.width, limits.family.factor)
    try:
        height, width = checks.check_shapes(
            height, width, first.batch, rows, limits.profiles, limits.build_command, limits.family.factor
        )
    except (SizeError, BatchError) as error:
        raise type(error)(f"the second pass of hires: {error}") from error
    return replace(
        second,
        height=height,
        width=width,
        guidance=guidance,
        init=init,
        latents=None,
        variation=None,
        steps_before=before,
    )


def _second_sampling(limits: Limits, first: Request, hires: Hires) -> Sampling:
    """That of the first pass, with what the second has of its own. Another sampler has options of its own."""
    own = first.sampling
    if hires.scheduler is None and hires.schedule_type is None and hires.steps is None:
        return own
    same = hires.scheduler is None
    return Sampling.check(
        limits.schedule,
        own.sampler if hires.scheduler is None else hires.scheduler,
        own.count if hires.steps is None else hires.steps,
        own.eta,
        own.schedule_type if hires.schedule_type is None and same else hires.schedule_type,
        sampler_options=dict(own.options) if same else None,
    )


def _with_prompts(limits: Limits, first: Request, hires: Hires) -> Request:
    """The first pass with the texts of the second."""
    if not limits.family.tokenizers:
        checks.check_no_text(hires.prompt, hires.negative_prompt)
    texts = first.texts.again(
        _second_texts("prompts", hires.prompt, first.prompts),
        _second_texts("negative prompts", hires.negative_prompt, first.negative_prompts),
    )
    return replace(first, texts=texts, prompts=texts.prompts, negative_prompts=texts.negatives)


def _second_texts(what: str, given: Any, first: Sequence[str]) -> list[Any] | None:
    """The texts of the second pass, as many as of the first; None for the same. PromptError for another number."""
    if given is None:
        return None
    if not isinstance(given, (list, tuple)):
        return [given] * len(first)
    if len(given) != len(first):
        raise PromptError(
            f"hires has {len(given)} {what} for {len(first)} of the first pass; pass one for all, or one for each"
        )
    return list(given)


def _second_guidance(limits: Limits, second: Request, hires: Hires) -> Guidance:
    """The guidance of the second pass's evaluations. HiresError where the first pass's is a schedule of its own
    evaluations and the second has none."""
    own = second.guidance
    if hires.guidance_scale is None and own.scheduled:
        raise HiresError(
            "guidance_scale is a schedule for the steps of the first pass; give hires a guidance_scale of its own"
        )
    scale = own.scale if hires.guidance_scale is None else hires.guidance_scale
    made = check_guidance(scale, own.rescale, own.interval, second.sampling.run, second.table.timesteps)
    return made if limits.family.tokenizers else without_text(made)


def _require_encoder(limits: Limits, init: InitImage) -> None:
    """ImageError where a call starts from a picture and there is no VAE encoder."""
    if init.latents is not None or limits.encodes_images or limits.family.joins == "low_resolution":
        return
    if "vae_encoder" in limits.family.names:
        raise ImageError(
            "this pipeline has no VAE encoder, so it can't start from a picture; build it: " + limits.build_command()
        )
    raise ImageError(
        "this model has no VAE encoder, so it can't start from a picture; leave image out, or take a bundle of Stable "
        "Diffusion"
    )


def _size(
    limits: Limits, height: int | None, width: int | None, batch: int, rows: int, init: InitImage | None
) -> tuple[int, int]:
    """Height and width of a call: as it says, else the image's, else what the bundle is best at. SizeError."""
    factor = limits.family.factor
    stretches = init is not None and init.latents is None and height is None and width is None
    if init is not None:
        own = init.size(factor)
        height, width = own[0] if height is None else height, own[1] if width is None else width
        if init.latents is not None and (height, width) != own:
            raise ImageError(f"the latents in image are of {own[1]} x {own[0]} pixels; leave height and width out")
    try:
        return checks.check_shapes(height, width, batch, rows, limits.profiles, limits.build_command, factor)
    except SizeError as error:
        if stretches:
            raise SizeError(f"{error}; or pass height and width, to which the image is then resized") from error
        raise
