"""The call that A1111's settings of a picture ask for, and those of them that it cannot honour."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import ScheduleTypeError
from .hires import is_upscaler
from .infotext import DEFAULTS, SAMPLER_OPTIONS, Ignored, Settings, as_text, parse_parameters
from .inputs import INPUTS
from .record_fields import FIELDS
from .sampling.catalog import SAMPLERS, Found, find, sampler_parameters, schedule_type_name, schedule_types

Translation = tuple[str, Callable[[Any], Any]]
"""An argument of the call, and its value from the setting's. ValueError if there is none."""


def _same(value: Any) -> Any:
    return value


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split()]


def _interval(text: str) -> list[float]:
    start, _, end = text.partition(" to ")
    return [float(start), float(end)]


TRANSLATIONS: Mapping[str, Translation] = {
    "Steps": ("num_inference_steps", _same),
    "CFG scale": ("guidance_scale", _same),
    "CFG schedule": ("guidance_scale", _numbers),
    "CFG rescale": ("guidance_rescale", _same),
    "CFG interval": ("guidance_interval", _interval),
    "Seed": ("seed", _same),
    "Eta DDIM": ("eta", _same),
    "Variation seed": ("subseed", _same),
    "Variation seed strength": ("subseed_strength", _same),
    "Timesteps": ("timesteps", _numbers),
    "Sigmas": ("sigmas", _numbers),
    **{field.key: (field.argument, field.read) for field in FIELDS if field.key is not None},
}
"""What a setting is in a call; of two for the same argument, the later one."""

ABOUT = {field.key: field.about for field in FIELDS if field.key is not None and field.about is not None}
"""The input without which a setting means nothing."""

HIRES = {
    "Hires upscale": "scale",
    "Hires upscaler": "upscaler",
    "Hires steps": "steps",
    "Denoising strength": "strength",
    "Hires sampler": "scheduler",
    "Hires scheduler": "scheduler",
    "Hires CFG Scale": "guidance_scale",
    "Hires prompt": "prompt",
    "Hires negative prompt": "negative_prompt",
}
"""A1111's keys of a second pass and our own, and the fields of `Hires`; of two for one field, the later one."""

SPECIAL = (
    *HIRES,
    "Hires resize",
    "Sampler",
    "Scheduler",
    "Schedule type",
    *SAMPLER_OPTIONS,
    "Size",
    "RNG",
    "Batch size",
    "Batch index",
)
"""Settings that need more than a translation."""


@dataclass(frozen=True)
class Asked:
    """What A1111's text asks for: the arguments of a call, the number of the picture in it, the settings that are not
    honoured, and the model's name, None where the text has none."""

    arguments: Mapping[str, Any]
    index: int
    ignored: tuple[Ignored, ...]
    model: str | None


def call_of(text: str, parameters: Collection[str], given: Mapping[str, Any]) -> Asked:
    """What A1111's text asks for of a call that has these `parameters`, with the inputs that are `given`. What the text
    leaves out is the call's default. MetadataError for a text that is too long."""
    known = {key: one for key, one in TRANSLATIONS.items() if one[0] in parameters}
    settings, ignored = parse_parameters(text, frozenset({*known, *SPECIAL}))
    arguments: dict[str, Any] = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
    if "prompt_syntax" in parameters:
        arguments["prompt_syntax"] = "a1111"
    hires, wrong = _second_pass(settings)
    if hires is not None:
        arguments["hires"] = hires
        values = {key: value for key, value in settings.values.items() if key != "Denoising strength"}
        settings = replace(settings, values=values)
    translated, untranslated = _translate(settings, known, given)
    wrong += untranslated
    size = settings.values.get("Size")
    if isinstance(size, tuple):
        arguments |= {"width": size[0], "height": size[1]}
    sampler, refused = _sampler(settings)
    arguments |= {**translated, **sampler, **given}
    index, count = settings.values.get("Batch index", 0), settings.values.get("Batch size", 1)
    if isinstance(index, int) and isinstance(count, int) and 0 <= index < count:
        arguments["num_images_per_prompt"] = count
    else:
        wrong.append(Ignored("Batch index", str(index), f"the call makes {count} pictures"))
        index = 0
    model = settings.values.get("Model")
    return Asked(arguments, index, (*ignored, *wrong, *refused), None if model is None else str(model))


def _second_pass(settings: Settings) -> tuple[dict[str, Any] | None, list[Ignored]]:
    """The argument `hires`, of which "Denoising strength" is then."""
    values, refused = settings.values, []
    if not {"Hires upscale", "Hires resize"} & values.keys():
        return None, []
    hires = {name: values[key] for key, name in HIRES.items() if key in values}
    if isinstance(size := values.get("Hires resize"), tuple):
        hires = {
            **{name: value for name, value in hires.items() if name != "scale"},
            "width": size[0],
            "height": size[1],
        }
    if "upscaler" in hires and not is_upscaler(hires["upscaler"]):
        given = as_text(hires.pop("upscaler"))
        refused.append(Ignored("Hires upscaler", given, "there is no such upscaler here, so bilinear is taken"))
    return hires, refused


def _translate(
    settings: Settings, known: Mapping[str, Translation], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Ignored]]:
    """The arguments that settings are, and the settings that are no values of them or are about an input that is not
    given."""
    arguments, wrong = {}, []
    for key, (name, translate) in known.items():
        value = settings.values.get(key)
        if value is None or value == DEFAULTS.get(key):
            continue
        if key in ABOUT and ABOUT[key] not in given:
            wrong.append(
                Ignored(key, as_text(value), f"the text has no {ABOUT[key]}; pass {INPUTS[ABOUT[key]].option}")
            )
            continue
        try:
            arguments[name] = translate(value)
        except ValueError:
            wrong.append(Ignored(key, as_text(value), "this is no value of it"))
    return arguments, wrong


def _sampler(settings: Settings) -> tuple[dict[str, Any], list[Ignored]]:
    """The sampler with its schedule type and options. A1111's label means A1111's sampler; our own name, where the text
    has it, goes before it."""
    own, label = settings.values.get("Scheduler"), settings.values.get("Sampler")
    name = own if own in SAMPLERS else label
    found = find(name) if isinstance(name, str) else None
    if found is None:
        reason = "there is no such sampler here, so the model's own is taken"
        return {}, [] if name is None else [Ignored("Sampler", str(name), reason)]
    kind, refused = _schedule_type(settings, found)
    takes, options = sampler_parameters(found, kind), {}
    for key, option in SAMPLER_OPTIONS.items():
        if key not in settings.values:
            continue
        if option in takes and takes[option].right(settings.values[key]):
            options[option] = settings.values[key]
        else:
            refused.append(Ignored(key, str(settings.values[key]), f"{name} does not take it"))
    return {"scheduler": name, "schedule_type": kind, "sampler_options": options}, refused


def _schedule_type(settings: Settings, found: Found) -> tuple[str | None, list[Ignored]]:
    asked = settings.values.get("Schedule type")
    if asked is None:
        return None, []
    try:
        kind = schedule_type_name(asked)
    except ScheduleTypeError:
        return None, [Ignored("Schedule type", str(asked), "there is no such schedule type here")]
    if kind in (None, found.said_type):
        return None, []
    if kind not in schedule_types(found):
        return None, [Ignored("Schedule type", str(asked), f"{found.sampler.label} has a grid of its own")]
    return kind, []
