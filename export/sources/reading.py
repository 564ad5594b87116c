"""Reads a model's files. Every error of a library becomes a named error that keeps the whole cause."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import shown

from ..errors import ExportError, UnreadableModelError, UnsafePickleError

T = TypeVar("T")

LONGEST_CAUSE = 600
"""Characters of a library's message that are kept: diffusers lists every tensor of a model that does not fit."""

CODE_IN_PICKLE = ("weights_only", "Weights only load failed", "WeightsUnpickler error")


def reading(what: Path | str, load: Callable[[], T]) -> T:
    """The result of `load`. UnsafePickleError if it raises because a pickle holds code, UnreadableModelError if it
    raises anything else."""
    try:
        return load()
    except ExportError:
        raise
    except (
        Exception
    ) as error:  # diffusers, transformers, tokenizers and torch raise many types for files that are damaged or missing
        if any(words in str(one) for one in _chain(error) for words in CODE_IN_PICKLE):
            raise unsafe_pickle(what) from error
        raise UnreadableModelError(f"{what} cannot be read: {cause(error)}") from error


def unsafe_pickle(what: Path | str) -> UnsafePickleError:
    return UnsafePickleError(
        f"{what} is a pickle that holds more than tensors, so loading it could run code; if you trust it, "
        "convert it to safetensors"
    )


def cause(error: BaseException) -> str:
    """An exception in one line: type and whole message, or which file could not be opened."""
    for one in _chain(error):
        if isinstance(one, OSError) and one.filename is not None and one.strerror:
            return f"{one.filename}: {one.strerror}"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0] if error.args else ''}"
    text = " ".join(str(error).split())
    shortened = text if len(text) <= LONGEST_CAUSE else f"{text[:LONGEST_CAUSE]} ..."
    return f"{type(error).__name__}: {shortened}" if text else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from or while handling."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UnreadableModelError where there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        fault = "missing" if isinstance(error, FileNotFoundError) else "not a file"
        raise UnreadableModelError(
            f"{file} is {fault}; the model is incomplete, so download or save it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnreadableModelError(f"{file} is not JSON ({cause(error)}); download or save the model again") from error
    except OSError as error:
        raise UnreadableModelError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise UnreadableModelError(
            f"{file} holds {shown(value)}, not an object {{...}}; download or save the model again"
        )
    return value
