"""The weights of a bundle's graphs, by the names of the model's parameters. `onnx/NAME.onnx.weights.json` is their
table; export/graphs/weights.py writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ManifestError

STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
"""The types of weights, with NumPy's. It has no bfloat16, so its bits stand for it."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight in a graph. name: the graph's. parameter: the model's. shape: the graph's. values: its bytes, mapped."""

    name: str
    parameter: str
    transposed: bool
    shape: tuple[int, ...]
    dtype: str
    values: np.ndarray

    def read(self) -> np.ndarray:
        """Its values in float32, in the shape that the graph has, or the transposed one."""
        stored = self.values.view(STORED[self.dtype])
        wide = (stored.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bfloat16" else stored
        array = np.array(wide, np.float32).reshape(self.shape)
        return array.T if self.transposed else array

    def packed(self, array: np.ndarray) -> np.ndarray:
        """float32 values as `read` returns them -> as the graph has them. bfloat16 comes back as its bits, uint16."""
        array = np.ascontiguousarray((array.T if self.transposed else array).reshape(self.shape), np.float32)
        if self.dtype != "bfloat16":
            return array.astype(STORED[self.dtype])
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def table_file(graph: Path) -> Path:
    """The table of a graph's weights."""
    return graph.with_name(f"{graph.name}.weights.json")


def read_weights(graph: Path) -> dict[str, tuple[Weight, ...]]:
    """The weights that hold each parameter, in the model's order of parameters. ManifestError if the table is
    missing or damaged."""
    file = table_file(graph)
    data = graph.with_name(f"{graph.name}.data")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        stored = np.memmap(data, np.uint8, "r") if data.exists() else np.zeros(0, np.uint8)
        weights = [_weight(row, stored) for row in rows]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ManifestError(f"{file} can't be read ({error})") from error
    found: dict[str, tuple[Weight, ...]] = {}
    for weight in weights:
        found[weight.parameter] = (*found.get(weight.parameter, ()), weight)
    return found


def _weight(row: Mapping[str, Any], stored: np.ndarray) -> Weight:
    shape, dtype = tuple(map(int, row["shape"])), str(row["dtype"])
    nbytes = math.prod(shape) * np.dtype(STORED[dtype]).itemsize
    values = stored[int(row["offset"]) :][:nbytes]
    if len(values) != nbytes:
        raise ValueError(f"{row['name']} has {len(values)} bytes instead of {nbytes}")
    return Weight(str(row["name"]), str(row["parameter"]), bool(row["transposed"]), shape, dtype, values)
