"""A1111's text of a picture's settings, which the field's tools read: written and read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .errors import MetadataError, shown

Value = str | int | float | tuple[int, int] | Mapping[str, str]

FIRST_KEYS = (
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Image CFG scale",
    "Seed",
    "Face restoration",
    "Size",
    "Model hash",
    "Model",
    "FP8 weight",
    "Cache FP16 weight for LoRA",
    "VAE hash",
    "VAE",
    "Variation seed",
    "Variation seed strength",
    "Seed resize from",
    "Denoising strength",
    "Conditional mask weight",
    "Clip skip",
    "ENSD",
    "Token merging ratio",
    "Token merging ratio hr",
    "Init image hash",
    "RNG",
    "NGMS",
    "Tiling",
)
"""A1111's order. Other keys follow in the order that they are given in."""

LAST_KEYS = ("Version", "User")

INTEGERS = {
    "Steps",
    "Seed",
    "Variation seed",
    "Clip skip",
    "ENSD",
    "Hires steps",
    "Mask blur",
    "Masked area padding",
    "Batch size",
    "Batch index",
    "Class",
    "Noise level",
}
FLOATS = {
    "CFG scale",
    "Image CFG scale",
    "Variation seed strength",
    "Denoising strength",
    "Conditional mask weight",
    "Token merging ratio",
    "Token merging ratio hr",
    "Hires CFG Scale",
    "Hires upscale",
    "NGMS",
    "Eta",
    "Eta DDIM",
    "Sigma churn",
    "Sigma tmin",
    "Sigma tmax",
    "Sigma noise",
    "Rescale CFG",
    "Refiner switch at",
    "Schedule max sigma",
    "Schedule min sigma",
    "Schedule rho",
    "CFG rescale",
}

SAMPLER_OPTIONS = {
    "Eta": "eta",
    "Sigma churn": "s_churn",
    "Sigma tmin": "s_tmin",
    "Sigma tmax": "s_tmax",
    "Sigma noise": "s_noise",
    "Schedule rho": "rho",
}
"""A1111's keys of options that our samplers have, and our names of them."""

SIZES = {"Size", "Seed resize from", "Hires resize"}
TABLES = {"Lora hashes", "TI hashes"}
"""Values that are not text: "512x768" is (512, 768), and "name: hash, name: hash" a dictionary."""

DEFAULTS: dict[str, Value] = {"Clip skip": 1, "RNG": "GPU", "Emphasis": "Original"}
"""What a text without the key means, and what is therefore not written."""

DESCRIPTIONS = frozenset({"Model", "Model hash", "VAE", "VAE hash", "Precision", "Version", "User"})
"""What says how a picture came to be, and asks for nothing."""

NEGATIVE = "Negative prompt:"
MIN_PAIRS = 3
"""The fewest pairs that make the last line one of settings and not of the prompt."""

MAX_CHARACTERS = 2**20
KEY = re.compile(r"\s*(\w[\w \-/]+):[ \t]*")
FLAG = re.compile(r"\s*(\w[\w \-/]*)(?:,|$)")
QUOTED = re.compile(r'("(?:\\.|[^\\"])*")[ \t]*(?:,|$)')


@dataclass(frozen=True)
class Settings:
    """A picture's settings: its prompts, and values by A1111's keys. Keys in INTEGERS, FLOATS, SIZES and TABLES have
    values of these types, all others have text."""

    prompt: str
    negative_prompt: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Ignored:
    """A setting that is not honoured, as it was written, and why."""

    key: str
    text: str
    reason: str


def parameters_text(settings: Settings) -> str:
    """Prompt, negative prompt, then `Key: value` pairs in A1111's order. Values with , : or a line break are quoted as
    JSON. An empty negative prompt and values in DEFAULTS are left out."""
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"{NEGATIVE} {settings.negative_prompt}")
    written = {key: value for key, value in settings.values.items() if DEFAULTS.get(key) != value}
    middle = [key for key in written if key not in FIRST_KEYS and key not in LAST_KEYS]
    pairs = [_pair(key, as_text(written[key])) for key in (*FIRST_KEYS, *middle, *LAST_KEYS) if key in written]
    return "\n".join([*lines, ", ".join(pairs)]).strip()


def parse_parameters(text: str, honoured: frozenset[str]) -> tuple[Settings, tuple[Ignored, ...]]:
    """The settings in A1111's text, with A1111's defaults, and those of them that this program doesn't honour: keys
    that are neither in `honoured` nor descriptions, what is no value of its key, and noise of another generator than
    the CPU's. MetadataError for texts of more than 2**20 characters.

    The last line has the settings if there are three pairs or more in it; otherwise everything is the prompt.
    """
    if len(text) > MAX_CHARACTERS:
        raise MetadataError(f"the picture's text has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    lines = text.strip().split("\n")
    pairs = list(_pairs(lines[-1]))
    if sum(value is not None for _, value in pairs) < MIN_PAIRS:
        return Settings(*_prompts(lines)), ()
    values, ignored = dict(DEFAULTS), []
    for key, written in pairs:
        shown_text = key if written is None else _unquoted(written)
        value = _read(key, shown_text)
        if value is None:
            ignored.append(Ignored(key, shown_text, "this is no value of it"))
            continue
        values[key] = value
        if key not in honoured | DESCRIPTIONS and DEFAULTS.get(key) != value:
            ignored.append(Ignored(key, shown_text, "there is no such setting here"))
    if "RNG" in honoured and values["RNG"] != "CPU":
        ignored.append(Ignored("RNG", str(values["RNG"]), "noise is drawn as on the CPU, so the picture is another"))
    return Settings(*_prompts(lines[:-1]), values), tuple(ignored)


def _prompts(lines: list[str]) -> tuple[str, str]:
    """The prompt, and the negative prompt, which begins where a line does."""
    for number, line in enumerate(lines):
        if line.startswith(NEGATIVE):
            negative = "\n".join([line.removeprefix(NEGATIVE), *lines[number + 1 :]])
            return "\n".join(lines[:number]).strip(), negative.strip()
    return "\n".join(lines).strip(), ""


def _pair(key: str, value: str) -> str:
    return key if key == value else f"{key}: {_quoted(value)}"


def as_text(value: Value) -> str:
    """A value as the text has it."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, tuple):
        return f"{value[0]}x{value[1]}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {hash_}" for name, hash_ in value.items())
    return str(value)


def _quoted(text: str) -> str:
    plain = not re.search(r'[,\n:"]', text) and text == text.strip()
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _pairs(line: str) -> Iterator[tuple[str, str | None]]:
    """Keys and values of a line of settings. The value is None for a key alone, which is its own value. What is
    neither is passed over, to the next comma."""
    place = 0
    while place < len(line):
        key, flag = KEY.match(line, place), FLAG.match(line, place)
        quoted = QUOTED.match(line, key.end()) if key else None
        if quoted is not None and key is not None:
            yield key[1], quoted[1]
            place = quoted.end()
            continue
        comma = line.find(",", place)
        end = len(line) if comma < 0 else comma
        if key is not None and key.end() <= end:
            yield key[1], line[key.end() : end].strip()
        elif flag is not None:
            yield flag[1], None
        place = end + 1


def _read(key: str, text: str) -> Value | None:
    """The value of a key. None if the text isn't one."""
    try:
        if key in INTEGERS:
            return int(text)
        if key in FLOATS:
            return float(text) if math.isfinite(float(text)) else None
        if key in SIZES:
            width, height = text.split("x")
            return int(width), int(height)
        if key in TABLES:
            return dict(_named(item) for item in text.split(", "))
    except ValueError:
        return None
    return text


def _named(item: str) -> tuple[str, str]:
    name, colon, value = item.rpartition(": ")
    if not colon:
        raise ValueError(f"{shown(item)} is not `name: hash`")
    return name, value
