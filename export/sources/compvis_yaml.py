"""The .yaml beside a checkpoint: what CompVis' and Stability's configurations say that no tensor does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.errors import shown

from ..errors import UnreadableModelError, UnsupportedModelError
from .reading import cause
from .weights import stem

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction"}
SCHEDULES = {"linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sqrt_linear": "linear"}
"""Their names of schedules, and diffusers'. "linear" is linear in the root of beta."""

CLIP, OPEN_CLIP = "FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder"
LAYERS = {CLIP: ("last",), OPEN_CLIP: ("last", "penultimate")}
"""The supported text encoders, and which of their layers may be the conditioning. The first is the default."""


@dataclass(frozen=True)
class Settings:
    """What the file says; None where it says nothing. text_encoder: CLIP or OPEN_CLIP. schedule: the options of
    scheduler_config.json. The numbers of groups and `text_heads` are ours: CompVis' classes have fixed ones."""

    prediction_type: str | None = None
    image_size: int | None = None
    scale_factor: float | None = None
    in_channels: int | None = None
    context_dim: int | None = None
    heads: int | None = None
    head_channels: int | None = None
    groups: int | None = None
    vae_groups: int | None = None
    text_encoder: str | None = None
    text_layer: str | None = None
    text_heads: int | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)


SILENT = Settings()
"""What no file says."""


def beside(checkpoint: Path) -> Path | None:
    """The configuration of a checkpoint: the file of its name that ends in .yaml or .yml."""
    files = (checkpoint.with_name(stem(checkpoint) + suffix) for suffix in (".yaml", ".yml"))
    return next((file for file in files if file.is_file()), None)


def read(file: Path) -> Settings:
    """What a configuration says. UnreadableModelError for what is no configuration, UnsupportedModelError for a model
    or an option that is not supported."""
    model = _section(_load(file), "model.params", file)
    unet = _section(model, "unet_config.params", file)
    vae = _section(model, "first_stage_config.params.ddconfig", file)
    text = _section(model, "cond_stage_config.params", file)
    kind = _text_encoder(_section(model, "cond_stage_config", file), file)
    heads = unet.get("num_heads")
    return Settings(
        prediction_type=_one_of(model, "parameterization", PREDICTION_TYPES, file),
        image_size=_integer(model, "image_size", file),
        scale_factor=_number(model, "scale_factor", file),
        in_channels=_integer(unet, "in_channels", file),
        context_dim=_integer(unet, "context_dim", file),
        heads=None if heads == -1 else _integer(unet, "num_heads", file),
        head_channels=_integer(unet, "num_head_channels", file),
        groups=_integer(unet, "num_groups", file),
        vae_groups=_integer(vae, "num_groups", file),
        text_encoder=kind,
        text_layer=None if kind is None else _layer(text, kind, file),
        text_heads=_integer(text, "num_heads", file),
        schedule=_schedule(model, file),
    )


def _load(file: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UnreadableModelError(
            f"{file} is not plain YAML ({cause(error)}); repair it, or move it away: a .yaml beside a checkpoint is "
            "its configuration"
        ) from error
    except OSError as error:
        raise UnreadableModelError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise UnreadableModelError(
            f"{file} holds no `model:`, so it is not a configuration of CompVis' kind; move it away, or get the one "
            "that belongs to the checkpoint"
        )
    return value


def _section(value: Mapping[str, Any], path: str, file: Path) -> Mapping[str, Any]:
    """The mapping at a path of names; an empty one where there is none."""
    for name in path.split("."):
        found = value.get(name)
        if found is not None and not isinstance(found, dict):
            raise UnreadableModelError(f"{file} has {name}={shown(found)}; it must be a mapping")
        value = found or {}
    return value


def _number(section: Mapping[str, Any], name: str, file: Path) -> float | None:
    """A number above 0. YAML 1.1 reads 1e-4 as a text."""
    value = section.get(name)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UnreadableModelError(f"{file} has {name}={shown(value)}; it must be a number above 0")
    return number


def _integer(section: Mapping[str, Any], name: str, file: Path) -> int | None:
    number = _number(section, name, file)
    if number is not None and number != int(number):
        raise UnreadableModelError(f"{file} has {name}={shown(section[name])}; it must be an integer")
    return None if number is None else int(number)


def _one_of(section: Mapping[str, Any], name: str, known: Mapping[str, str], file: Path) -> str | None:
    value = section.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or value not in known:
        raise UnsupportedModelError(f"{file} has {name}={shown(value)}; supported are {', '.join(known)}")
    return known[value]


def _text_encoder(section: Mapping[str, Any], file: Path) -> str | None:
    target = section.get("target")
    if target is None:
        return None
    name = str(target).rpartition(".")[2]
    if name not in LAYERS:
        raise UnsupportedModelError(
            f"{file} has the conditioning stage {shown(target)}; supported are {' and '.join(LAYERS)}"
        )
    return name


def _layer(section: Mapping[str, Any], kind: str, file: Path) -> str:
    layer = section.get("layer", LAYERS[kind][0])
    if layer not in LAYERS[kind]:
        raise UnsupportedModelError(
            f"{file} has layer={shown(layer)} of {kind}; supported is {' or '.join(LAYERS[kind])}"
        )
    return str(layer)


def _schedule(model: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The options of scheduler_config.json, with the defaults of CompVis' DDPM where the file names one of them."""
    given = {"beta_schedule", "linear_start", "linear_end", "timesteps"} & model.keys()
    if not given:
        return {}
    start = _number(model, "linear_start", file) or 1e-4
    end = _number(model, "linear_end", file) or 2e-2
    count = _integer(model, "timesteps", file) or 1000
    if model.get("beta_schedule") == "sqrt":
        betas = torch.linspace(start, end, count, dtype=torch.float64).sqrt()
        return {"num_train_timesteps": count, "trained_betas": betas.tolist()}
    found = _one_of(model, "beta_schedule", {**SCHEDULES, "sqrt": "sqrt"}, file) or "scaled_linear"
    return {"num_train_timesteps": count, "beta_schedule": found, "beta_start": start, "beta_end": end}
