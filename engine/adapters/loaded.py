"""The adapters of a pipeline: those that are loaded, and how strongly each is on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..bundle import Bundle
from ..errors import AdapterError, AdapterNameError, AdapterWeightError, ManifestError, shown
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


OFF = Strength(0.0, 0.0)


class Adapters:
    """The adapters of one bundle. Names are the user's. Nothing is read before the first is loaded."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._fitted: dict[str, Fitted] = {}
        self._strengths: dict[str, Strength] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._fitted)

    @property
    def strengths(self) -> dict[str, Strength]:
        """Those that are on."""
        return {name: strength for name, strength in self._strengths.items() if strength != OFF}

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

    def read(self, path: str | os.PathLike[str], name: str | None) -> tuple[str, Fitted]:
        """Reads a file and finds what it changes. Warns of keys that change nothing."""
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
        if fitted.unused:
            more = f" and {len(fitted.unused) - SHOWN} more" if len(fitted.unused) > SHOWN else ""
            warnings.warn(
                f"{path}: {len(fitted.unused)} layers change nothing in this model: "
                f"{', '.join(fitted.unused[:SHOWN])}{more}",
                RuntimeWarning,
                stacklevel=4,
            )
        return name, fitted

    def add(self, name: str, fitted: Fitted) -> None:
        self._fitted[name] = fitted

    def remove(self, name: str | None) -> None:
        """One adapter, or with None all of them."""
        if name is None:
            self._fitted.clear()
            self._strengths.clear()
            return
        self._require(name)
        del self._fitted[name]
        self._strengths.pop(name, None)

    def without(self, name: str | None) -> dict[str, Strength]:
        """The strengths after `remove(name)`."""
        if name is None:
            return {}
        self._require(name)
        return {other: strength for other, strength in self.strengths.items() if other != name}

    def checked(self, weights: Mapping[str, float | Mapping[str, float]]) -> dict[str, Strength]:
        """The strengths that a call's weights mean."""
        if not isinstance(weights, Mapping):
            raise AdapterWeightError(f"the weights of adapters are {shown(weights)}; pass a dictionary, name to weight")
        for name in weights:
            self._require(name)
        return {name: strength(weight, name) for name, weight in weights.items()}

    def set(self, strengths: Mapping[str, Strength]) -> None:
        self._strengths = dict(strengths)

    def _require(self, name: str) -> None:
        if name not in self._fitted:
            loaded = f"loaded are {', '.join(map(repr, self._fitted))}" if self._fitted else "none is loaded"
            raise AdapterNameError(
                f"no adapter is named {shown(name)}; {loaded}. Load it: pipeline.load_lora(FILE, name={shown(name)})"
            )

    def weights(self, strengths: Mapping[str, Strength]) -> dict[str, dict[str, np.ndarray]]:
        """The weights of the graphs that differ from the bundle's, with these adapters on. They are computed from the
        bundle's, never from those before."""
        wanted: dict[Target, list[tuple[Change, float, int | None]]] = {}
        for name, one in strengths.items():
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


def strength(weight: float | Mapping[str, float], name: str) -> Strength:
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
