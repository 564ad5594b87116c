"""Puts adapters into a model before it is traced: the changes of weights that the runtime makes, in float32."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.adapters.change import Change, changed
from engine.adapters.files import files_of, read_adapter
from engine.adapters.fitting import Fitted, fit
from engine.adapters.loaded import strength, warn_of_unused
from engine.bundle import sha256
from engine.weights import Weight

from .sources.reading import reading

UNREAD = np.zeros(0, np.uint8)


class Fusion:
    """Adapters that a model has in it, each with its weight."""

    def __init__(
        self, adapters: Sequence[tuple[Path, float]], parts: Mapping[str, str], read: Callable[[str], nn.Module]
    ) -> None:
        """parts: what a source calls each part -> what files of adapters call it. read: makes a part without adapters.
        AdapterError for a file that can't be read, AdapterWeightError."""
        self._adapters, self._parts, self._read = list(adapters), dict(parts), read
        for file, weight in self._adapters:
            strength(weight, file.stem)
        self.files = tuple(one for file, _ in self._adapters for one in files_of(file))

    def __str__(self) -> str:
        """As the options of the command line, one a line."""
        return "\n".join(f"{file.resolve()}:{weight}" for file, weight in self._adapters)

    def fingerprint(self, part: str, own: str) -> str:
        """A hash of everything that determines a part with adapters in it; `own` is that of the part without."""
        if part not in self._parts:
            return own
        lines = [own]
        for file, weight in self._adapters:
            lines += [repr(weight), *(reading(one, partial(sha256, one)) for one in files_of(file))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def apply(self, part: str, model: nn.Module) -> None:
        """Changes the weights of a part. AdapterFamilyError, AdapterShapeError; a RuntimeWarning names what of a file
        is not used."""
        if part not in self._parts:
            return
        wanted: dict[str, list[tuple[Change, float, int | None]]] = {}
        for (_, weight), fitted in zip(self._adapters, self._fitted, strict=True):
            for (name, parameter), change in fitted.changes.items():
                if name == self._parts[part]:
                    wanted.setdefault(parameter, []).append((change, weight, None))
        parameters = dict(model.named_parameters())
        for name, changes in wanted.items():
            before = parameters[name].detach().numpy()
            parameters[name].data = torch.from_numpy(np.ascontiguousarray(changed(before, changes)))

    @cached_property
    def _fitted(self) -> list[Fitted]:
        """What each file changes. Every part is made once more for the names and shapes of its parameters."""
        tables = {name: _table(self._read(part)) for part, name in self._parts.items()}
        found = []
        for file, _ in self._adapters:
            found.append(fit(read_adapter(file), tables))
            warn_of_unused(file, found[-1])
        return found


def _table(model: nn.Module) -> dict[str, tuple[Weight, ...]]:
    """A part's parameters as the runtime has them, without their values."""
    return {
        name: (Weight(name, name, False, tuple(parameter.shape), "float32", UNREAD),)
        for name, parameter in model.named_parameters()
    }
