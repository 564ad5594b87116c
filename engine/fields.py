"""Reads values of the expected type from an untrusted JSON file. An error names the field that is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

from .contract import Range
from .errors import ManifestError


class Field:
    """A value of a manifest and its path. The methods return it as the type in their name, or raise ManifestError."""

    def __init__(self, value: Any, path: str = "") -> None:
        self.value, self._path = value, path

    def fail(self, rule: str) -> ManifestError:
        """The error for a value that breaks `rule`."""
        huge = isinstance(self.value, int) and abs(self.value) >= 10**20
        shown = "a huge integer" if huge else json.dumps(self.value, default=repr)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ManifestError(f"{self._path or 'the whole'} is {shown}; it must be {rule}")

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        return self.value

    def __getitem__(self, key: str) -> Field:
        """The field of that name in an object."""
        path = f"{self._path}.{key}" if self._path else key
        fields = self.object()
        if key not in fields:
            raise ManifestError(f"{path} is missing")
        return Field(fields[key], path)

    def __contains__(self, key: str) -> bool:
        return key in self.object()

    def items(self) -> list[tuple[str, Field]]:
        return [(key, self[key]) for key in self.object()]

    def text(self, allowed: tuple[str, ...] = ()) -> str:
        """A string that is not empty. If `allowed` is given, one of those."""
        if not isinstance(self.value, str) or (allowed and self.value not in allowed):
            raise self.fail(f"one of {', '.join(map(repr, allowed))}" if allowed else "a string")
        if not self.value or len(self.value) > 4096:
            raise self.fail("a string of 1 to 4096 characters")
        return self.value

    def integer(self, low: int, high: int) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not low <= self.value <= high:
            raise self.fail(f"an integer from {low} to {high}")
        return self.value

    def number(self) -> float:
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool) or not math.isfinite(self.value):
            raise self.fail("a finite number")
        return float(self.value)

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.fail("true or false")
        return self.value

    def range(self, low: int, high: int, multiple: int = 1) -> Range:
        """A list [min, opt, max] as a Range."""
        if not isinstance(self.value, list) or len(self.value) != 3:
            raise self.fail("a list of three integers, min, opt and max")
        smallest, best, largest = (
            Field(value, f"{self._path}[{i}]").integer(low, high) for i, value in enumerate(self.value)
        )
        if not smallest <= best <= largest or any(side % multiple for side in (smallest, best, largest)):
            raise self.fail(f"min <= opt <= max, each a multiple of {multiple}")
        return Range(smallest, best, largest)
