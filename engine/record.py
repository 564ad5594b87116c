"""The record of a picture: everything that makes it again."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .bundle import Bundle
from .errors import MetadataError, shown
from .inputs import INPUTS, Arrays, inputs_of
from .inputs import from_content as inputs_from_content
from .record_fields import FIELDS
from .request import Limits, Request
from .version import __version__

UNRECORDED = frozenset({"output_type", "callback_on_step_end", "progress", "metadata"})
"""Arguments of a call that do not say what is in the picture."""


@dataclass(frozen=True)
class Model:
    """What made a picture. weights: the manifest's hash of the model's files, None where it has none; build: a hash of
    the bundle's graphs, its tokenizer and its scheduler's configuration; backend: the inference library, its version
    and the device; loaded: the textual inversions and adapters in it, with the beginnings of
    their hashes."""

    bundle: str
    family: str
    weights: str | None
    build: str
    precision: str
    backend: str
    version: str
    loaded: str = ""

    @classmethod
    def of(cls, bundle: Bundle, backend: str, loaded: str = "") -> Model:
        """`backend`: the pipeline's description; `loaded`: what it has loaded."""
        contents = bundle.contents
        files = [f"{name} {file.sha256}" for name, file in sorted(contents.files.items()) if not name.endswith(".png")]
        build = "\n".join([*files, json.dumps(contents.scheduler, sort_keys=True)])
        return cls(
            contents.name,
            contents.family.name,
            contents.source.weights,
            hashlib.sha256(build.encode()).hexdigest(),
            contents.precision,
            backend,
            __version__,
            loaded,
        )


@dataclass(frozen=True)
class Record:
    """`Pipeline.__call__(**arguments)` with the arrays of `inputs` makes so many pictures, and this one is number
    `index` of them.

    The call has the size of the one that made the picture, because numbers may depend on that in their last digits, and
    because one seed draws the noise of all pictures of a call together. It has no text of the other pictures.
    obstacles: why the same call may still make another picture.
    """

    arguments: Mapping[str, Any]
    index: int
    pictures: int
    inputs: Mapping[str, Arrays]
    model: Model
    obstacles: tuple[str, ...] = ()

    @classmethod
    def of_call(cls, request: Request, texts: bool, model: Model, interrupted: bool = False) -> list[Record]:
        """The records of a call's pictures. texts: whether the model takes some."""
        inputs, obstacles, count = inputs_of(request), _obstacles(request, interrupted), request.batch
        return [
            cls(call_arguments(request, index, texts), index, count, inputs, model, obstacles) for index in range(count)
        ]

    def content(self) -> dict[str, Any]:
        """The record as a JSON object, of the same values: dataclasses.asdict would copy them, which takes longer than
        all else that is done for a record."""
        inputs = {name: [vars(array) for array in arrays] for name, arrays in self.inputs.items()}
        return {**vars(self), "inputs": inputs, "model": vars(self.model)}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Record:
        """The record in a JSON object. The values of its arguments are not checked. MetadataError if something is
        missing, of another type, or no argument of a call that a record has."""
        arguments, model = _object(content, "arguments"), _object(content, "model")
        allowed = call_parameters() - UNRECORDED - INPUTS.keys()
        for name in arguments:
            if name not in allowed:
                raise MetadataError(
                    f"the record in the picture has the argument {shown(name)}, which this version does not know; use "
                    f"the version of LatentRT that made the picture"
                )
        index, pictures = (_count(content.get(key)) for key in ("index", "pictures"))
        if index is None or pictures is None or index >= pictures:
            raise MetadataError(f"the record in the picture is of number {shown(index)} of {shown(pictures)} pictures")
        obstacles = content.get("obstacles", [])
        if not isinstance(obstacles, list) or not all(isinstance(one, str) for one in obstacles):
            raise MetadataError(f"the record in the picture has obstacles that are no texts: {shown(obstacles)}")
        arrays = {name: inputs_from_content(name, value) for name, value in _object(content, "inputs").items()}
        return cls(arguments, index, pictures, arrays, _model(model), tuple(obstacles))


def call_arguments(request: Request, index: int, texts: bool) -> dict[str, Any]:
    """The keyword arguments of a call that makes picture number `index` again, among others like it: JSON values. What
    the call left to the model or to chance is there as it was resolved. texts: whether the model takes some."""
    arguments = {field.argument: field.value(request, index) for field in FIELDS}
    return arguments if texts else {**arguments, "prompt": None, "negative_prompt": None}


def _obstacles(request: Request, interrupted: bool) -> tuple[str, ...]:
    """Why a call with the same arguments may make another picture."""
    found = []
    if request.callback is not None:
        found.append("a callback saw the latents, and may have changed them")
    if interrupted:
        found.append("the loop was interrupted before its last step")
    return tuple(found)


def call_parameters() -> frozenset[str]:
    """The names of a call's arguments."""
    return frozenset(_signature().parameters) - {"self"}


def check_call(limits: Limits, arguments: Mapping[str, Any]) -> Request:
    """The request of `Pipeline.__call__(**arguments)`. Raises the InputErrors of engine/errors.py."""
    bound = _signature().bind(None, **arguments)
    bound.apply_defaults()
    given = dict(bound.arguments)
    del given["self"]
    given["callback"] = given.pop("callback_on_step_end")
    return Request.check(limits, **given)


def _signature() -> inspect.Signature:
    from .pipeline import Pipeline  # which imports this module

    return inspect.signature(Pipeline.__call__)


def _object(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise MetadataError(f"the record in the picture has no {key}; its A1111 text may still be right (--text)")
    return value


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _model(content: Mapping[str, Any]) -> Model:
    texts = {field.name: content.get(field.name, "" if field.name == "loaded" else None) for field in fields(Model)}
    wrong = [name for name, text in texts.items() if not isinstance(text, str) and (name, text) != ("weights", None)]
    if wrong:
        raise MetadataError(f"the record in the picture has a model whose {wrong[0]} is {shown(texts[wrong[0]])}")
    return Model(**texts)
