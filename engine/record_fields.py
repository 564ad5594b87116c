"""The arguments of a call as a picture's file has them: in the record, and those that are simple in A1111's text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .edit import Edit
from .guidance import Guidance
from .request import Request
from .text.emphasis import EMPHASES
from .upscale import Upscale


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Field:
    """An argument of a call.

    value: what it was in a request, for the picture of that number: a JSON value, without what was left to the model or
    to chance. key: A1111's name of it, or ours where A1111 has none; without one, engine/images.py and
    engine/webui_call.py may write and read it in a form of their own. write, read: the text's value from the record's,
    and back; ValueError for what is no value of it. None and False are not written. about: the input without which the
    argument means nothing.
    """

    argument: str
    value: Callable[[Request, int], Any]
    key: str | None = None
    write: Callable[[Any], Any] = _same
    read: Callable[[Any], Any] = _same
    about: str | None = None


def _text(request: Request, index: int) -> int:
    """The number of a picture's text."""
    return index // request.images_per_prompt


def _has_inputs_of_texts(request: Request) -> bool:
    """Whether the call has inputs that may be one for each text: images or embeddings."""
    texts = request.texts
    return request.init is not None or texts.embeds is not None or texts.negative_embeds is not None


def _repeated(request: Request, value: Any) -> Any:
    """What a picture's text has, for each text of the call. Without inputs of texts, one text makes all pictures: that
    is the same call."""
    count = len(request.prompts) if _has_inputs_of_texts(request) and value is not None else 1
    return value if count == 1 else [value] * count


def _of_each_text(request: Request) -> int:
    return request.images_per_prompt if _has_inputs_of_texts(request) else request.batch


def _prompt(request: Request, index: int) -> Any:
    return None if request.texts.embeds is not None else _repeated(request, request.prompts[_text(request, index)])


def _negative_prompt(request: Request, index: int) -> Any:
    if request.texts.negative_embeds is not None:
        return None
    return _repeated(request, request.negative_prompts[_text(request, index)])


def _seed(request: Request, _: int) -> Any:
    return request.seeds[0] if len(request.seeds) == 1 else list(request.seeds)


def _strength(request: Request, _: int) -> float | None:
    """None also where the model begins with noise, whatever the image."""
    return None if request.init is None or isinstance(request.seen, (Edit, Upscale)) else request.init.strength


def _emphasis(request: Request, _: int) -> str:
    return next(name for name, one in EMPHASES.items() if one == request.texts.emphasis)


def _image_guidance_scale(request: Request, _: int) -> float | None:
    return request.seen.scale if isinstance(request.seen, Edit) else None


def _noise_level(request: Request, _: int) -> int | None:
    return request.seen.level if isinstance(request.seen, Upscale) else None


def _subseed(request: Request, _: int) -> Any:
    variation = request.variation
    return None if variation is None else plain(variation.seeds if len(variation.seeds) > 1 else variation.seeds[0])


def _subseed_strength(request: Request, _: int) -> Any:
    return None if request.variation is None else plain(request.variation.strengths)


def _hires(request: Request, index: int) -> dict[str, Any] | None:
    """The fields of `Hires` that are not the first pass's, as they were resolved."""
    hires, second = request.hires, request.second
    if hires is None or second is None:
        return None
    text = _text(request, index)
    own = {
        "prompt": second.prompts[text],
        "negative_prompt": second.negative_prompts[text],
        "guidance_scale": _guidance_scale(second.guidance),
    }
    given = {field.name: getattr(hires, field.name) for field in fields(hires)}
    return {name: plain(own.get(name, value)) for name, value in given.items() if value is not None}


def _guidance_scale(guidance: Guidance) -> Any:
    """A schedule has a number for each evaluation."""
    return guidance.scales.tolist() if guidance.scheduled else guidance.scale


FIELDS = (
    Field("prompt", _prompt),
    Field("negative_prompt", _negative_prompt),
    Field("class_labels", lambda request, index: request.class_labels[_text(request, index)], "Class"),
    Field("num_images_per_prompt", lambda request, _: _of_each_text(request)),
    Field("seed", _seed),
    Field("height", lambda request, _: request.height),
    Field("width", lambda request, _: request.width),
    Field("scheduler", lambda request, _: request.sampling.sampler),
    Field("num_inference_steps", lambda request, _: request.sampling.steps),
    Field("eta", lambda request, _: request.sampling.eta),
    Field("schedule_type", lambda request, _: request.sampling.schedule_type),
    Field("timesteps", lambda request, _: plain(request.sampling.timesteps)),
    Field("sigmas", lambda request, _: plain(request.sampling.sigmas)),
    Field("timestep_respacing", lambda *_: None),  # it said the timesteps
    Field("sampler_options", lambda request, _: {name: plain(value) for name, value in request.sampling.options}),
    Field("guidance_scale", lambda request, _: _guidance_scale(request.guidance)),
    Field("guidance_rescale", lambda request, _: request.guidance.rescale),
    Field("guidance_interval", lambda request, _: plain(request.guidance.interval)),
    Field("strength", _strength, "Denoising strength", about="image"),
    Field(
        "composite",
        lambda request, _: request.inpaint is not None and request.inpaint.composite,
        "Composite",
        write=str,
        read=lambda text: text == "True",
        about="mask_image",
    ),
    Field(
        "padding_mask_crop",
        lambda request, _: None if request.inpaint is None else request.inpaint.padding,
        "Masked area padding",
        about="mask_image",
    ),
    Field("prompt_syntax", lambda request, _: request.texts.syntax),
    Field(
        "clip_skip",
        lambda request, _: request.texts.skip or None,
        "Clip skip",
        write=lambda layers: layers + 1,
        read=lambda layers: layers - 1,
    ),
    Field("emphasis", _emphasis, "Emphasis", write=str.capitalize, read=str.lower),
    Field("image_guidance_scale", _image_guidance_scale, "Image CFG scale", about="image"),
    Field("noise_level", _noise_level, "Noise level", about="image"),
    Field("subseed", _subseed),
    Field("subseed_strength", _subseed_strength),
    Field("hires", _hires),
    Field("vae_tiling", lambda request, _: request.vae_tiling),
)
"""Every argument of a call, but for its inputs (engine/inputs.py) and for what says nothing of the picture. An argument
is added here and, as an option, in engine/arguments.py."""


def written(request: Request, index: int) -> Iterator[tuple[str, Any]]:
    """The simple fields of A1111's text of picture number `index`."""
    for field in FIELDS:
        value = field.value(request, index)
        if field.key is not None and value is not None and value is not False:
            yield field.key, field.write(value)


def plain(value: Any) -> Any:
    """A value without NumPy's types and tuples."""
    if isinstance(value, np.generic):
        return value.item()
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value
