"""The adapters of a pipeline: those that are loaded, and how strongly each is on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from weakref import WeakMethod

import numpy as np

from ..bundle import Bundle, sha256
from ..errors import AdapterError, AdapterNameError, AdapterWeightError, ManifestError, shown
from ..text.prompt import Lora
from ..weights import Weight, read_weights
from .change import Change, changed
from .files import read_adapter
from .fitting import Fitted, Target, fit

Weights = Mapping[str, Mapping[str, np.ndarray]]
"""Changed weights: by component, by the weight's name in the graph."""

MOST = 100.0
"""The largest weight of an adapter, either way."""

SHOWN = 5


@dataclass(frozen=True)
class Strength:
    """How strongly an adapter is on. rank: of a LoRA, only the first so many ranks count."""

    unet: float
    text_encoder: float
    rank: int | None = None

    def of(self, part: str) -> float:
        return self.unet if part == "unet" else self.text_encoder


Given = float | Mapping[str, float]
"""A weight as users write it: one for all of an adapter, or one for each part."""


class Adapters:
    """The adapters of one bundle, by the user's names. `base` is on in every call. The tags of a call come on top, and
    stay on until a call needs another set, because switching takes seconds. Nothing is read before the first adapter is
    loaded."""

    def __init__(self, bundle: Bundle, change: Callable[[Callable[[], Weights]], None]) -> None:
        """`change` brings the graphs to the weights that it is given a function for. Its object owns this one, so it is
        not kept alive here."""
        self._bundle, self._change = bundle, WeakMethod(change)
        self._fitted: dict[str, Fitted] = {}
        self._hashes: dict[str, str] = {}
        self.base: dict[str, Strength] = {}
        self._on: dict[str, Strength] = {}

    def load(self, path: str | os.PathLike[str], name: str | None, weight: Given) -> str:
        """Reads a file and turns it on beside those that are on in every call. Returns its name."""
        name, fitted = self._read(path, name)
        base = {**self.base, name: strength(weight, name)}
        self._fitted[name] = fitted
        try:
            self._rebase(base)
        except BaseException:
            del self._fitted[name]
            raise
        self._hashes[name] = sha256(fitted.file)
        return name

    def set_base(self, weights: Mapping[str, Given]) -> None:
        """Turns exactly these on, in every call."""
        if not isinstance(weights, Mapping):
            raise AdapterWeightError(f"the weights of adapters are {shown(weights)}; pass a dictionary, name to weight")
        for name in weights:
            self._require(name)
        self._rebase({name: strength(weight, name) for name, weight in weights.items()})

    def unload(self, name: str | None) -> None:
        """Forgets one adapter, or with None all of them."""
        if name is not None:
            self._require(name)
        gone = set(self._fitted) if name is None else {name}
        self._rebase({other: one for other, one in self.base.items() if other not in gone})
        for other in gone:
            del self._fitted[other]
            del self._hashes[other]

    def described(self) -> list[str]:
        """Each adapter with the beginning of its file's hash and its weights in every call."""
        found = []
        for name, digest in sorted(self._hashes.items()):
            on = self.base.get(name)
            weights = "" if on is None else f" at {on.unet:g}, text encoder {on.text_encoder:g}"
            found.append(f"adapter {name!r} {digest[:10]}{weights}")
        return found

    def needed(self, tags: Iterable[Lora]) -> dict[str, Strength]:
        """What is on in a call with these tags: a tag's weights count in place of the base's."""
        tagged = {}
        for tag in tags:
            self._require(tag.name)
            tagged[tag.name] = Strength(_number(tag.unet, tag.name), _number(tag.text_encoder, tag.name), tag.rank)
        return _those_on({**self.base, **tagged})

    def are_on(self, tags: Iterable[Lora]) -> bool:
        """Whether the graphs have the weights that a call with these tags needs."""
        return self.needed(tags) == self._on

    def turn_on(self, tags: Iterable[Lora]) -> bool:
        """Brings the graphs to what a call with these tags needs. Returns whether they had to change."""
        return self._switch(self.needed(tags))

    def _rebase(self, base: Mapping[str, Strength]) -> None:
        on = _those_on(base)
        self._switch(on)
        self.base = on

    def _switch(self, on: dict[str, Strength]) -> bool:
        if on == self._on:
            return False
        change = self._change()
        assert change is not None
        change(partial(self._weights, on))
        self._on = on
        return True

    def _weights(self, strengths: Mapping[str, Strength]) -> dict[str, dict[str, np.ndarray]]:
        """The weights of the graphs that differ from the bundle's, with these adapters on. They are computed from the
        bundle's, never from those before; the names' order is that of the sum, so that equal sets are equal bits."""
        wanted: dict[Target, list[tuple[Change, float, int | None]]] = {}
        for name, one in sorted(strengths.items()):
            for (part, parameter), change in self._fitted[name].changes.items():
                if one.of(part):
                    wanted.setdefault((part, parameter), []).append((change, one.of(part), one.rank))
        components = {component.adapted: component.name for component in self._bundle.family.components}
        found: dict[str, dict[str, np.ndarray]] = {}
        for (part, parameter), changes in wanted.items():
            for weight in self._tables[part][parameter]:
                made = weight.packed(changed(weight.read(), changes))
                found.setdefault(components[part], {})[weight.name] = made
        return found

    @cached_property
    def _tables(self) -> dict[str, dict[str, tuple[Weight, ...]]]:
        """The weights of each part that adapters change, by the part's name in files."""
        found = {}
        for component in self._bundle.family.components:
            if component.adapted and component.name in self._bundle.graphs:
                found[component.adapted] = read_weights(self._bundle.graphs[component.name])
        if not found:
            raise AdapterError(
                f"{self._bundle.folder} is of a family whose weights adapters don't change ("
                f"{self._bundle.family.name}); use a bundle of Stable Diffusion"
            )
        return found

    def _read(self, path: str | os.PathLike[str], name: str | None) -> tuple[str, Fitted]:
        """The name and what the file changes. Warns of keys that change nothing."""
        if not isinstance(path, (str, os.PathLike)):
            raise AdapterError(f"the file of an adapter is {shown(path)}; pass a path")
        name = Path(path).stem if name is None else name
        if not isinstance(name, str) or not name.strip():
            raise AdapterNameError(f"the name of an adapter is {shown(name)}; pass a text that is not empty")
        if name in self._fitted:
            raise AdapterNameError(
                f"an adapter named {name!r} is loaded already; pass another name=, or unload_lora({name!r})"
            )
        try:
            tables = self._tables
        except ManifestError as error:
            raise ManifestError(f"{error}. Build the bundle again: {self._bundle.command()}") from error
        fitted = fit(read_adapter(path), tables)
        warn_of_unused(path, fitted)
        return name, fitted

    def _require(self, name: str) -> None:
        if name not in self._fitted:
            loaded = f"loaded are {', '.join(map(repr, self._fitted))}" if self._fitted else "none is loaded"
            raise AdapterNameError(
                f"no adapter is named {shown(name)}; {loaded}. Load it: pipeline.load_lora(FILE, name={shown(name)}), "
                "or on the command line --lora FILE, whose name is the file's without its extension"
            )


def _those_on(strengths: Mapping[str, Strength]) -> dict[str, Strength]:
    return {name: one for name, one in strengths.items() if one.unet or one.text_encoder}


def warn_of_unused(path: str | os.PathLike[str], fitted: Fitted) -> None:
    """A RuntimeWarning that names the keys of a file that change nothing in this model, if there are some."""
    unused = fitted.unused
    if not unused:
        return
    more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
    warnings.warn(
        f"{path}: these change nothing in this model: {', '.join(unused[:SHOWN])}{more}",
        RuntimeWarning,
        stacklevel=5,
    )


def strength(weight: Given, name: str) -> Strength:
    """AdapterWeightError unless it is a finite number, or one for each of "unet" and "text_encoder"."""
    if isinstance(weight, Mapping):
        if not weight.keys() <= {"unet", "text_encoder"}:
            raise AdapterWeightError(
                f"the weight of {name!r} is for {', '.join(map(shown, weight))}; parts are 'unet' and 'text_encoder'"
            )
        return Strength(_number(weight.get("unet", 0.0), name), _number(weight.get("text_encoder", 0.0), name))
    number = _number(weight, name)
    return Strength(number, number)


def _number(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise AdapterWeightError(f"the weight of {name!r} is {shown(value)}; pass a number from -{MOST:g} to {MOST:g}")
    if not math.isfinite(value) or abs(value) > MOST:
        raise AdapterWeightError(f"the weight of {name!r} is {value:g}; pass a number from -{MOST:g} to {MOST:g}")
    return float(value)
