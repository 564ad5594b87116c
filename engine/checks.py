"""Checks the arguments of a call. Every function returns its argument in a usable form or raises a named error."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .contract import MAX_STEPS, PROMPT_TOKENS, Range, Shapes
from .errors import (
    BatchError,
    CallbackError,
    ClassLabelError,
    GuidanceError,
    LatentsError,
    OutputTypeError,
    PromptError,
    PromptLengthError,
    SamplerOptionError,
    SeedError,
    SizeError,
    StepsError,
    ThreadsError,
    TimestepsError,
    shown,
)
from .manifest import LARGEST_BATCH, LARGEST_SIDE, SMALLEST_SIDE

MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = 2**64 - 1
MAX_GUIDANCE = 1000.0
MAX_LATENT = 1e6
"""Far above the latents of any sampler (at most 4096), and far below the overflow of float32."""
MAX_THREADS = 1024
OUTPUT_TYPES = ("pil", "np", "latent")

BuildCommand = Callable[..., str]
"""build_command(height=Range, ...): the command that builds for these sizes."""


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_prompt(text: Any, what: str = "prompt") -> str:
    """A string of valid Unicode, at most 10,000 characters."""
    if not isinstance(text, str):
        raise PromptError(f"{what} is a {type(text).__name__}, not a string; pass a string or a list of strings")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise PromptError(
            f"{what} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are taken. CLIP reads the first 77 "
            "tokens only"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} is not valid UTF-8: character {error.start} is {text[error.start]!r}, half of a surrogate pair; "
            f"decode the text it came from properly"
        ) from error
    return text


def check_prompts(prompt: Any, negative_prompt: Any) -> tuple[list[str], list[str]]:
    """The prompts of a call and, for each, its negative prompt ("" where there is none)."""
    if prompt is None:
        raise PromptError("prompt is missing; pass a string or a list of strings")
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    if not prompts:
        raise PromptError("prompt is an empty list; pass at least one string")
    if negative_prompt is None:
        negative_prompt = ""
    negatives = (
        list(negative_prompt) if isinstance(negative_prompt, (list, tuple)) else [negative_prompt] * len(prompts)
    )
    if len(negatives) != len(prompts):
        raise PromptError(
            f"there are {len(negatives)} negative prompts for {len(prompts)} prompts; pass one for all, or one for each"
        )
    return [check_prompt(text) for text in prompts], [check_prompt(text, "negative_prompt") for text in negatives]


def check_no_text(prompt: Any, negative_prompt: Any) -> None:
    """PromptError if a model without texts is given one."""
    for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if value is not None:
            raise PromptError(
                f"{name} is {shown(value)}, and this model makes pictures without texts; leave it out, and pass "
                "num_images_per_prompt for the number of pictures"
            )


def check_class_labels(value: Any, classes: int | None) -> list[int | None]:
    """The class of each picture; [None] for a model without classes. An integer is one picture."""
    if classes is None:
        if value is not None:
            raise ClassLabelError(f"class_labels is {shown(value)}, and this model has no classes; leave it out")
        return [None]
    allowed = f"this model has the classes 0 to {classes - 1}"
    several = isinstance(value, (list, tuple, range)) or (isinstance(value, np.ndarray) and value.ndim == 1)
    labels = list(value) if several else [value]
    if value is None or not labels:
        raise ClassLabelError(
            f"class_labels is {'missing' if value is None else 'empty'}; {allowed}: pass one for each picture (with "
            "--class-label N on the command line)"
        )
    for label in labels:
        if not _is_int(label) or not 0 <= label < classes:
            raise ClassLabelError(f"class label {shown(label)} is not an integer of this model: {allowed}")
    return [int(label) for label in labels]


def check_batch(prompts: int, images_per_prompt: Any) -> int:
    """The number of pictures in a call."""
    if not _is_int(images_per_prompt) or not 1 <= images_per_prompt <= LARGEST_BATCH:
        raise BatchError(
            f"num_images_per_prompt is {shown(images_per_prompt)}; it must be an integer from 1 to {LARGEST_BATCH}"
        )
    return prompts * int(images_per_prompt)


def check_shapes(
    height: Any, width: Any, batch: int, rows: int, profiles: Sequence[Shapes], build_command: BuildCommand, factor: int
) -> tuple[int, int]:
    """Height and width in pixels, if one of the profiles serves them. None becomes the best size of the first profile
    that serves so many pictures. `build_command` makes the command for other sizes. `factor` is the family's."""
    fitting = [
        profile for profile in profiles if batch in profile.batch and (profile.rows is None or rows in profile.rows)
    ]
    if not fitting:
        raise _batch_error(batch, rows, profiles, build_command)
    best = fitting[0]
    heights, widths = [profile.height for profile in fitting], [profile.width for profile in fitting]
    height = check_size(best.height.opt if height is None else height, "height", heights, build_command, factor)
    width = check_size(best.width.opt if width is None else width, "width", widths, build_command, factor)
    if not any(profile.allows(height, width, batch, rows) for profile in fitting):
        known = "; ".join(str(profile) for profile in profiles)
        raise SizeError(
            f"height {height} and width {width} are not allowed together; this bundle was built for height x width "
            f"{known}. "
            f"Build for them: {build_command(height=Range(height, height, height), width=Range(width, width, width))}"
        )
    return height, width


def _batch_error(batch: int, rows: int, profiles: Sequence[Shapes], build_command: BuildCommand) -> BatchError:
    allowed = " or ".join(dict.fromkeys(describe_range(profile.batch) for profile in profiles))
    if any(batch in profile.batch for profile in profiles):
        known = " or ".join(
            dict.fromkeys(describe_range(profile.rows) for profile in profiles if profile.rows is not None)
        )
        how = "with guidance and prompts of several parts" if rows > 2 * batch else "with guidance"
        return BatchError(
            f"{batch} pictures {how if rows > batch else 'without guidance'} are {rows} rows of the U-Net; this "
            f"bundle was built for {known}. "
            f"Build for that: {build_command(rows=Range(rows, rows, rows))}"
        )
    low, high = min(profile.batch.min for profile in profiles), max(profile.batch.max for profile in profiles)
    wider = Range(min(low, batch), profiles[0].batch.opt, max(high, batch))
    return BatchError(
        f"prompts times num_images_per_prompt are {batch} pictures in one call; this bundle was built for {allowed}. "
        f"Split the call, or build for that: {build_command(batch=wider)}"
    )


def check_tokens(lengths: Sequence[int], profiles: Sequence[Shapes], build_command: BuildCommand) -> None:
    """PromptLengthError unless the plans serve a call with texts of these numbers of tokens."""
    if not profiles or any(profile.tokens(math.lcm(*lengths)) is not None for profile in profiles):
        return
    longest = -(-max(lengths) // PROMPT_TOKENS)
    most = max(1 if one.chunks is None else one.chunks.max for one in profiles)
    raise PromptLengthError(
        f"the prompts take up to {max(lengths)} tokens, {longest} chunks of {PROMPT_TOKENS}, and the plans were built "
        f"for up to {most}. Write a shorter prompt, or build for that: "
        f"{build_command(prompt_chunks=Range(1, 1, longest))}"
    )


def describe_range(allowed: Range) -> str:
    return f"{allowed.opt}" if allowed.static else f"{allowed.min} to {allowed.max}"


def check_size(value: Any, side: str, allowed: Sequence[Range], build_command: BuildCommand, factor: int) -> int:
    """Height or width in pixels: a multiple of `factor` in one of the ranges."""
    described = " or ".join(dict.fromkeys(describe_sizes(one, factor) for one in allowed))
    if not _is_int(value):
        raise SizeError(f"{side} is {shown(value)}, not an integer; this bundle allows {described}")
    if abs(value) > LARGEST_SIDE:
        raise SizeError(
            f"{side} is {shown(value)}; this bundle allows {described}, and no bundle more than {LARGEST_SIDE}"
        )
    if value % factor == 0 and any(value in one for one in allowed):
        return int(value)
    below, above = value // factor * factor, -(-value // factor) * factor
    candidates = sorted({min(max(near, one.min), one.max) for one in allowed for near in (below, above)})
    nearest = [
        max((c for c in candidates if c <= value), default=candidates[0]),
        min((c for c in candidates if c >= value), default=candidates[-1]),
    ]
    named = (
        f"the nearest size that this bundle allows is {nearest[0]}"
        if nearest[0] == nearest[1]
        else f"the nearest sizes that this bundle allows are {nearest[0]} and {nearest[1]}"
    )
    fault = f"not a multiple of {factor}" if value % factor else "not a size that this bundle was built for"
    raise SizeError(
        f"{side} {value} is {fault}; {named} ({described}){_build_for(above, side, allowed, build_command)}"
    )


def _build_for(size: int, side: str, allowed: Sequence[Range], build_command: BuildCommand) -> str:
    """The command that builds for that size too, if a bundle can serve it."""
    if size < SMALLEST_SIDE or any(size in one for one in allowed):
        return ""
    first = allowed[0]
    wider = Range(size, size, size) if first.static else Range(min(first.min, size), first.opt, max(first.max, size))
    return f". Build for {size}: {build_command(**{side: wider})}"


def describe_sizes(allowed: Range, factor: int) -> str:
    return f"{allowed.opt} only" if allowed.static else f"multiples of {factor} from {allowed.min} to {allowed.max}"


def check_steps(value: Any, train_timesteps: int) -> int:
    """An integer from 1 to 1000, and not more than the model was trained with."""
    highest = min(MAX_STEPS, train_timesteps)
    if not _is_int(value) or not 1 <= value <= highest:
        raise StepsError(
            f"num_inference_steps is {shown(value)}; it must be an integer from 1 to {highest}. 20 to 50 are usual"
        )
    return int(value)


def check_falling(value: Any, what: str, least: int) -> tuple[float, ...] | None:
    """`timesteps` or `sigmas` of a call: from `least` to 1001 finite numbers. Whether they fall, and are the model's,
    the sampler's grid finds out."""
    if value is None:
        return None
    listed = isinstance(value, (list, tuple, range)) or (isinstance(value, np.ndarray) and value.ndim == 1)
    numbers = list(value) if listed else []
    if not least <= len(numbers) <= MAX_STEPS + 1 or not all(map(_is_finite, numbers)):
        raise TimestepsError(
            f"{what} are {shown(value)}; pass a list of {least} to {MAX_STEPS + 1} finite numbers that fall"
        )
    return tuple(float(number) for number in numbers)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and abs(value) <= MAX_LATENT


def check_sampler_options(value: Any) -> dict[str, Any]:
    """Options by name. Which there are, and their values, the sampler knows."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise SamplerOptionError(
            f"sampler_options are {shown(value)}; pass a dictionary such as {{'s_churn': 10}}; "
            f"`python -m engine samplers NAME` lists a sampler's"
        )
    return dict(value)


def check_number(value: Any, name: str, low: float, high: float, usual: str) -> float:
    """A number from `low` to `high`."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise GuidanceError(f"{name} is {shown(value)}; it must be a number from {low:g} to {high:g}. {usual}")
    return float(value)


def check_guidance_scale(value: Any, name: str = "guidance_scale") -> float:
    """A number from -1000 to 1000."""
    return check_number(
        value,
        name,
        -MAX_GUIDANCE,
        MAX_GUIDANCE,
        "3 to 12 are usual; 1 and less do without the negative prompt",
    )


def check_guidance_rescale(value: Any) -> float:
    """A number from 0 to 1."""
    return check_number(value, "guidance_rescale", 0.0, 1.0, "0 is without, 0.7 is usual")


def check_guidance_interval(value: Any) -> tuple[float, float]:
    """Two numbers, 0 <= start <= end <= 1."""
    pair = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1)
    if not pair or len(value) != 2:
        raise GuidanceError(
            f"guidance_interval is {shown(value)}; it must be (start, end), parts of the loop from 0 to 1, such as "
            "(0.2, 0.8), or None for all of it"
        )
    usual = "0 is the first step"
    start, end = (check_number(one, f"guidance_interval[{i}]", 0.0, 1.0, usual) for i, one in enumerate(value))
    if start > end:
        raise GuidanceError(f"guidance_interval is {shown(value)}; it must not end before it starts")
    return start, end


def check_eta(value: Any) -> float:
    """A number from 0 to 1."""
    return check_number(value, "eta", 0.0, 1.0, "0 is DDIM without noise, 1 as much noise as DDPM's")


def check_seeds(seed: Any, batch: int, what: str = "seed") -> list[int]:
    """One seed for all pictures of a call, or one for each."""
    several = isinstance(seed, (list, tuple, range)) or (isinstance(seed, np.ndarray) and seed.ndim == 1)
    if several and len(seed) != batch:
        raise SeedError(
            f"there are {len(seed)} {what}s for {batch} pictures; pass one integer, or one for each picture"
        )
    seeds = list(seed) if several else [seed]
    for value in seeds:
        if not _is_int(value) or not 0 <= value <= MAX_SEED:
            raise SeedError(f"{what} {shown(value)} is not an integer from 0 to 2**64 - 1")
    return [int(value) for value in seeds]


def check_latents(value: Any, shape: tuple[int, ...], what: str = "latents") -> np.ndarray:
    """A float array of that shape with values up to 1e6, as float32."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or isinstance(value, np.ma.MaskedArray):
        kind = f"an array of {value.dtype}" if type(value) is np.ndarray else f"a {type(value).__name__}"
        raise LatentsError(f"{what} are {kind}; pass a NumPy array of float32 with shape {shape}")
    if value.shape != shape:
        raise LatentsError(
            f"{what} have shape {value.shape} instead of {shape}: pictures, channels, and the latents' height and width"
        )
    if not np.isfinite(value).all():
        raise LatentsError(
            f"{what} hold {int((~np.isfinite(value)).sum())} values that are NaN or infinite; they must all be finite"
        )
    if value.size and (largest := float(np.abs(value).max())) > MAX_LATENT:
        raise LatentsError(
            f"{what} hold values up to {largest:.1e}; at most {MAX_LATENT:.0e} is allowed, and standard normal ones "
            "are below 6"
        )
    return np.ascontiguousarray(value, np.float32)


def check_output_type(value: Any) -> str:
    """One of "pil", "np", "latent"."""
    if not isinstance(value, str) or value not in OUTPUT_TYPES:
        raise OutputTypeError(f"output_type is {shown(value)}; it must be one of {', '.join(map(repr, OUTPUT_TYPES))}")
    return value


def check_threads(value: Any) -> None:
    """None, or an integer from 1 to 1024."""
    if value is not None and (not _is_int(value) or not 1 <= value <= MAX_THREADS):
        raise ThreadsError(
            f"threads is {shown(value)}; it must be an integer from 1 to {MAX_THREADS}, or None for every core"
        )


def check_callback(callback: Any) -> None:
    """None, or something that can be called with a pipeline, an evaluation, a timestep and a dictionary."""
    if callback is None:
        return
    if not callable(callback):
        raise CallbackError(
            f"callback_on_step_end is {shown(callback)}, which cannot be called; pass a function of (pipeline, "
            "evaluation, timestep, tensors)"
        )
    if fault := _refuses(callback, None, 0, 0.0, {}):
        raise CallbackError(
            "callback_on_step_end is called with (pipeline, evaluation, timestep, tensors), which it does not take: "
            f"{fault}"
        ) from fault


def check_guidance_function(function: Callable[..., Any]) -> None:
    """Something that can be called with an evaluation and a timestep."""
    if fault := _refuses(function, 0, 0.0):
        raise GuidanceError(
            f"guidance_scale is called with (evaluation, timestep), which it does not take: {fault}; pass a function "
            "of both, a list, or a number"
        ) from fault


def _refuses(function: Callable[..., Any], *arguments: Any) -> TypeError | None:
    """What is wrong with calling a function like this, as far as its signature tells."""
    try:
        inspect.signature(function).bind(*arguments)
    except ValueError:  # a function of an extension module, which does not tell
        return None
    except TypeError as error:
        return error
    return None


def check_returned(returned: Any, given: np.ndarray) -> np.ndarray:
    """The latents after a callback: those that it returned, or `given`, which it may have written to."""
    if returned is None:
        returned = {}
    if not isinstance(returned, Mapping):
        raise CallbackError(
            f"callback_on_step_end returned {shown(returned)}; it must return None or a dictionary like {{'latents': "
            f"array}}"
        )
    if unknown := [key for key in returned if not isinstance(key, str) or key != "latents"]:
        raise CallbackError(
            f"callback_on_step_end returned a dictionary with {', '.join(map(shown, unknown))}; only 'latents' can be "
            "changed"
        )
    return check_latents(returned.get("latents", given), given.shape, "latents returned by the callback")
