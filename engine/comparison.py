"""`picture --compare`: the same picture with other values of one or two arguments, on one labelled grid."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arguments import ByName, call_options
from .errors import CompareError, EngineError
from .pipeline import Pipeline
from .record import UNRECORDED, call_parameters, check_call
from .sheet import Labels

MAX_CELLS = 400


@dataclass(frozen=True)
class Axis:
    """An argument of a call with its values, and what the command line calls them."""

    argument: str
    values: tuple[Any, ...]
    labels: Labels


def comparable() -> dict[str, argparse.Action]:
    """What `--compare` takes: options of the command line that are arguments of a call."""
    allowed = call_parameters() - UNRECORDED
    return {name: action for name, action in call_options().items() if action.dest in allowed}


def check_axes(asked: Sequence[tuple[str, Sequence[str]]]) -> list[Axis]:
    """The axes that the command line asks for: one or two. CompareError."""
    if len(asked) > 2:
        raise CompareError(f"--compare is given {len(asked)} times; a grid has two axes: give it once or twice")
    axes = [_axis(name, texts) for name, texts in asked]
    total = math.prod(len(axis.values) for axis in axes)
    if total > MAX_CELLS:
        raise CompareError(f"--compare asks for {total} pictures; at most {MAX_CELLS} go on one grid")
    if len(axes) == 2 and axes[0].argument == axes[1].argument:
        raise CompareError(f"--compare names {axes[0].argument} twice; give all its values to one of them")
    return axes


def _axis(name: str, texts: Sequence[str]) -> Axis:
    known = comparable()
    if name not in known:
        raise CompareError(f"--compare {name!r} is no argument of a call; there are: {', '.join(sorted(known))}")
    action = known[name]
    return Axis(action.dest, tuple(_value(name, action, text) for text in texts), Labels(name, texts))


def _value(name: str, action: argparse.Action, text: str) -> Any:
    """A value as the option would have it. CompareError for one that it would refuse."""
    if action.nargs == 0:  # a flag
        if text.lower() not in ("true", "false"):
            raise CompareError(f"--compare {name}: {text!r} is neither true nor false")
        return text.lower() == "true"
    try:
        value: Any = action.type(text) if callable(action.type) else text
    except argparse.ArgumentTypeError as error:
        raise CompareError(f"--compare {name}: {error}") from error
    if action.choices is not None and value not in action.choices:
        raise CompareError(f"--compare {name}: {text!r} is none of {', '.join(map(str, action.choices))}")
    if isinstance(action, ByName):
        key, named = value
        return {key: named}
    return value


def cells(axes: Sequence[Axis], arguments: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The arguments of each call: rows for the second axis, columns for the first. An argument that is a dictionary
    keeps what the axis doesn't name."""
    across = axes[0]
    down = axes[1] if len(axes) > 1 else Axis("", (None,), Labels("", [""]))
    return [
        [_set(_set(arguments, down.argument, low), across.argument, high) for high in across.values]
        for low in down.values
    ]


def _set(arguments: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    if not name:
        return dict(arguments)
    if isinstance(value, dict):
        value = {**(arguments.get(name) or {}), **value}
    return {**arguments, name: value}


def check_cells(pipeline: Pipeline, axes: Sequence[Axis], rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """CompareError for the first call whose arguments don't go together, before any picture is made."""
    for row, calls in enumerate(rows):
        for column, arguments in enumerate(calls):
            try:
                check_call(pipeline.limits, arguments)
            except EngineError as error:
                places = [f"{axis.labels.name}={axis.labels.values[i]}" for axis, i in zip(axes, (column, row))]
                raise CompareError(f"--compare {', '.join(places)}: {error}") from error
