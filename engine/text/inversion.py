"""Textual inversion (arXiv 2208.01618): files of vectors that a word stands for."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InversionError, InversionWidthError, TensorFileError, shown
from .chunks import LENGTH
from .tensors import StoredTensor, read_safetensors
from .torch_file import ZIP, read_torch

MAX_FILE = 32 * 2**20
"""The most bytes of a .pt, .bin or .png, which are read whole. 75 vectors for SDXL take 0.6 MB."""

MAX_WORD = 200
FIRST, SECOND = "text_encoder", "text_encoder_2"
ENCODERS = {"clip_l": FIRST, "clip_g": SECOND}
"""SDXL's encoders, by the names in files."""

MODELS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's second encoder"}
PNG, PICKLE = b"\x89PNG", b"\x80"
PNG_TEXT = "sd-ti-embedding"
BUNDLED = "bundle_emb."

Found = tuple[str | None, dict[str, Any]]
"""The word in a file, if there is one, and a tensor for each text encoder."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """A word and its vectors: for each text encoder, by diffusers' name, [n, width] float32. n is the same for all."""

    word: str
    vectors: Mapping[str, np.ndarray]

    @property
    def count(self) -> int:
        """The number of tokens that the word becomes."""
        return len(next(iter(self.vectors.values())))

    def check(self, widths: Mapping[str, int]) -> None:
        """InversionWidthError unless there are vectors for each text encoder of the model, and for no other, and they
        have the width that `widths` says."""
        own = {encoder: vectors.shape[1] for encoder, vectors in self.vectors.items()}
        if own != dict(widths):
            raise InversionWidthError(
                f"the vectors of {shown(self.word)} are for {_described(own)}, and this model takes vectors for "
                f"{_described(widths)}; load an inversion that was trained for this kind of model"
            )


def load_inversion(path: str | os.PathLike[str], token: str | None = None) -> Inversion:
    """The vectors in a file: .safetensors, .pt, .bin or .png, recognised by their content.

    The word is `token`, or the one in the file, or the file's name without its extension. Read are: A1111's
    "string_to_param", also in PNG files; diffusers' {word: vectors}; "emb_params"; SDXL's "clip_l" and "clip_g"; and
    "bundle_emb." in LoRAs, where `token` chooses among several. float16, bfloat16 and float32 are taken.

    TensorFileError (or UnsafePickleError, which is one) if the file can't be read; InversionError if it holds no
    vectors, or more than the 75 that fit a chunk, or if the word can't be one.
    """
    file = Path(path)
    data = _data(file)
    try:
        found, tensors = _layout(_content(data), token)
        vectors = {encoder: _vectors(tensor) for encoder, tensor in tensors.items()}
    except (TensorFileError, InversionError) as error:
        raise type(error)(f"{file}: {error}") from error
    if len({len(array) for array in vectors.values()}) > 1:
        raise InversionError(f"{file}: the text encoders have different numbers of vectors; get the file again")
    return Inversion(_word(token or found or file.stem), vectors)


def _data(file: Path) -> memoryview:
    """A file's bytes, which are read when they are needed."""
    advice = "pass a .safetensors, .pt, .bin or .png of vectors"
    if "\0" in str(file):
        raise TensorFileError(f"{shown(str(file))} is no file's name; {advice}")
    try:
        if not file.is_file() or not file.stat().st_size:
            raise TensorFileError(f"{file} is no file, or is empty; {advice}")
        return np.memmap(file, np.uint8, "r").data
    except OSError as error:
        raise TensorFileError(f"{file} can't be read ({error.strerror}); {advice}") from error


def _content(data: memoryview) -> Any:
    start = bytes(data[:9])
    if not start.startswith((PNG, ZIP)) and (not start.startswith(PICKLE) or start.endswith(b"{")):
        return read_safetensors(data)
    if len(data) > MAX_FILE:
        raise TensorFileError(
            f"the file has {len(data) / 2**20:.0f} MiB, and at most {MAX_FILE // 2**20} are read but for .safetensors"
        )
    return _read_png(data) if start.startswith(PNG) else read_torch(data)


def _read_png(data: memoryview) -> Any:
    """A1111's PNG files: JSON in base64, as a text."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            text = image.info[PNG_TEXT]
        return json.loads(base64.b64decode(text, validate=True), object_hook=_from_json)
    except KeyError as error:
        raise InversionError(f"the picture has no text {PNG_TEXT!r}, where A1111 puts vectors") from error
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise TensorFileError(f"the picture's vectors are damaged ({shown(error)}); get the file again") from error


def _from_json(value: dict[str, Any]) -> Any:
    return np.asarray(value["TORCHTENSOR"], np.float32) if "TORCHTENSOR" in value else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (StoredTensor, np.ndarray))


def _layout(content: Any, token: str | None) -> Found:
    if _is_tensor(content):
        return None, {FIRST: content}
    if not isinstance(content, dict):
        raise _no_vectors(content)
    if "string_to_param" in content:
        return _a1111(content)
    if any(str(key).startswith(BUNDLED) for key in content):
        return _bundled(content, token)
    tensors = {str(key): value for key, value in content.items() if _is_tensor(value)}
    if tensors and tensors.keys() <= ENCODERS.keys():
        return None, {ENCODERS[key]: tensors[key] for key in ENCODERS if key in tensors}
    if "emb_params" in tensors:
        return None, {FIRST: tensors["emb_params"]}
    if len(tensors) == 1:
        ((word, tensor),) = tensors.items()
        return word, {FIRST: tensor}
    raise _no_vectors(content)


def _no_vectors(content: Any) -> InversionError:
    held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    return InversionError(
        f"this is no textual inversion: it holds {shown(held)}. Known are {{word: vectors}}, string_to_param, "
        "emb_params, clip_l with clip_g, and bundle_emb"
    )


def _a1111(content: dict[Any, Any]) -> Found:
    parameters, name = content["string_to_param"], content.get("name")
    tensors = [value for value in parameters.values() if _is_tensor(value)] if isinstance(parameters, dict) else []
    if len(tensors) != 1:
        raise InversionError(f"string_to_param holds {len(tensors)} tensors; one is read")
    return name if isinstance(name, str) else None, {FIRST: tensors[0]}


def _bundled(content: dict[Any, Any], token: str | None) -> Found:
    """kohya's LoRAs with vectors: bundle_emb.NAME.string_to_param.*, or .clip_l and .clip_g for SDXL."""
    words: dict[str, dict[str, Any]] = {}
    for key, tensor in content.items():
        name, _, part = str(key).removeprefix(BUNDLED).partition(".")
        if str(key).startswith(BUNDLED) and _is_tensor(tensor):
            words.setdefault(name, {})[ENCODERS.get(part, FIRST)] = tensor
    if token is None and len(words) == 1:
        token = next(iter(words))
    if token not in words:
        raise InversionError(f"the file has vectors for {', '.join(words)}; pass one of these as token")
    return token, words[token]


def _vectors(tensor: StoredTensor | np.ndarray) -> np.ndarray:
    if len(tensor.shape) not in (1, 2) or not 1 <= (1 if len(tensor.shape) == 1 else tensor.shape[0]) <= LENGTH:
        raise InversionError(
            f"the vectors have the shape {shown(tensor.shape)}; it must be [width], or [n, width] with n from 1 to "
            f"{LENGTH}"
        )
    array = np.atleast_2d(tensor if isinstance(tensor, np.ndarray) else tensor.values())
    if not array.shape[1] or not np.isfinite(array).all():
        raise InversionError("the vectors are empty or hold values that are not finite; the training failed")
    return np.ascontiguousarray(array)


def _word(word: str) -> str:
    if not word.strip() or len(word) > MAX_WORD or not word.isprintable():
        raise InversionError(f"the word {shown(word)} can't stand in a prompt; pass token='<my-word>'")
    return word


def _described(widths: Mapping[str, int]) -> str:
    return " and ".join(
        f"{encoder} of width {width}" + (f" ({MODELS[width]})" if width in MODELS else "")
        for encoder, width in widths.items()
    )
