"""Tensors in files, and the safetensors format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TensorFileError, shown

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""The types of tensors, by safetensors' names, and the bytes of one value."""

MAX_HEADER = 2**24
"""The most bytes of a safetensors header. A LoRA's, with the tags of its training, takes up to a few million."""

MAX_DIMENSIONS = 8

METADATA = "__metadata__"


@dataclass(eq=False)
class Storage:
    """The bytes of one tensor or of several. `data` comes later than the tensors in torch's old files."""

    dtype: str
    data: memoryview


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A contiguous tensor in a file. It takes no memory of its own until `values` is called. offset: in values of the
    storage."""

    storage: Storage
    shape: tuple[int, ...]
    offset: int = 0

    def number(self) -> float:
        """The one number of a tensor, of whatever type. TensorFileError if it has more or fewer."""
        kinds = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}
        kind = kinds.get(self.storage.dtype)
        if math.prod(self.shape) != 1:
            raise TensorFileError(
                f"a tensor has the shape {shown(self.shape)} where one number belongs; get the file again"
            )
        if kind is None:
            return float(self.values().reshape(()))
        size = BYTES[self.storage.dtype]
        return float(np.frombuffer(self.storage.data[self.offset * size : (self.offset + 1) * size], kind)[0])

    def values(self) -> np.ndarray:
        """The tensor as float32. TensorFileError for types other than float16, bfloat16 and float32, and if the file
        is too short for it."""
        dtype = self.storage.dtype
        if dtype not in ("F32", "F16", "BF16"):
            raise TensorFileError(f"a tensor has the type {dtype}; save it as float32, float16 or bfloat16")
        count, size = math.prod(self.shape), BYTES[dtype]
        data = self.storage.data[self.offset * size : (self.offset + count) * size]
        if len(data) != count * size:
            raise TensorFileError(
                f"a tensor of the shape {shown(self.shape)} takes {shown(count * size)} bytes, and the file has "
                f"{len(data)} for it: it is damaged; get it again"
            )
        if dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype(np.float32).reshape(self.shape)


def read_safetensors(data: memoryview) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. TensorFileError if it is damaged.

    Source: huggingface/safetensors, "Format".
    """
    header, body = _header(data)
    return {name: _tensor(name, entry, body) for name, entry in header.items() if name != METADATA}


def safetensors_metadata(data: memoryview) -> dict[str, str]:
    """The texts that a safetensors file has beside its tensors."""
    found = _header(data)[0].get(METADATA)
    texts = found if isinstance(found, Mapping) else {}
    return {key: value for key, value in texts.items() if isinstance(value, str)}


def _header(data: memoryview) -> tuple[dict[str, Any], memoryview]:
    """The header, and what it describes."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise TensorFileError(f"the header would take {length} bytes: this is no safetensors file, or it is damaged")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise TensorFileError("the header is not JSON: this is no safetensors file, or it is damaged") from error
    if not isinstance(header, dict):
        raise TensorFileError("the header is no JSON object: this is no safetensors file, or it is damaged")
    return header, data[8 + length :]


def _tensor(name: str, entry: Any, data: memoryview) -> StoredTensor:
    fields = entry if isinstance(entry, Mapping) else {}
    shape, offsets = naturals(fields.get("shape")), naturals(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or not offsets[0] <= offsets[1] <= len(data):
        raise TensorFileError(f"the tensor {shown(name)} is not described as safetensors asks; get the file again")
    return StoredTensor(Storage(str(fields.get("dtype")), data[offsets[0] : offsets[1]]), shape)


def naturals(values: Any) -> tuple[int, ...] | None:
    """The numbers in a list or tuple of at most 8, if they are sizes: integers from 0."""
    if type(values) not in (list, tuple) or len(values) > MAX_DIMENSIONS:
        return None
    return tuple(values) if all(type(value) is int and value >= 0 for value in values) else None
