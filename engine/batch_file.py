"""`picture --batch-file`: calls from a file of JSON lines, each of which succeeds or fails by itself."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import call_options, read_lines
from .errors import (
    BatchFileError,
    BundleChangedError,
    DeviceLostError,
    EngineError,
    MetadataError,
    PipelineStateError,
    shown,
)
from .inputs import INPUTS
from .metadata import read
from .output import check_output, find_target, write_picture
from .pipeline import Pipeline
from .record import UNRECORDED, Model, Record, call_parameters, check_call
from .request import Request

UNSETTABLE = {*UNRECORDED, *(name for name, one in INPUTS.items() if not one.picture)}
"""Arguments of a call that a line does not have: a function, what the command line decides, and arrays."""

LAST = (BundleChangedError, DeviceLostError, PipelineStateError)
"""Errors after which no other line can succeed."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk or a used-up quota says: the next line's picture would be made for nothing."""


@dataclass(frozen=True)
class Line:
    """A call: its line's number, from 1, the arguments that the line gives, and the file of its pictures."""

    number: int
    arguments: Mapping[str, Any]
    output: str


@dataclass
class Totals:
    """Lines by what became of them. failures: their numbers."""

    made: int = 0
    skipped: int = 0
    failures: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        failed = f"{len(self.failures)} failed"
        if self.failures:
            listed = ", ".join(map(str, self.failures[:10]))
            failed += f" (line{'s' * (len(self.failures) > 1)} {listed}{', ...' * (len(self.failures) > 10)})"
        return f"lines: {self.made} made, {self.skipped} were there already, {failed}"


def settable() -> dict[str, str]:
    """The names that a line may use, and the argument of the call that each of them is: the arguments themselves, and
    the options of the command line."""
    parameters = call_parameters() - UNSETTABLE
    options = {name: action.dest for name, action in call_options().items() if action.dest in parameters}
    return {**{name: name for name in sorted(parameters)}, **options}


def parse_line(text: str, number: int, output: str, names: Mapping[str, str]) -> Line:
    """The call in a line: a JSON object with `names`, and perhaps an "output". BatchFileError if it is none.

    Pictures without an output of their own go to `output` with the line's number, so that they keep their names when
    lines are added at the end."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BatchFileError(f'it is not JSON ({error}); write an object such as {{"prompt": "a ring"}}') from error
    if not isinstance(content, dict):
        raise BatchFileError(f'it is {shown(content)}; write an object such as {{"prompt": "a ring"}}')
    path = Path(output)
    own = content.pop("output", None) or str(path.with_stem(f"{path.stem}-{number}") if path.name else path)
    if not isinstance(own, str):
        raise BatchFileError(f"output is {shown(own)}; it must be a file's name")
    arguments: dict[str, Any] = {}
    for written, value in content.items():
        name = names.get(written.replace("-", "_"))
        if name is None:
            raise BatchFileError(f"{shown(written)} is no argument; there are: output, {', '.join(sorted(names))}")
        if name in arguments:
            raise BatchFileError(f"{name} is given twice, once as {shown(written)}; give it once")
        arguments[name] = value
    return Line(number, arguments, own)


def run(
    pipeline: Pipeline,
    file: Path,
    output: str,
    defaults: Mapping[str, Any],
    tell: Callable[[str], None] | None,
    warn: Callable[[str], None],
) -> Totals:
    """Makes the pictures of a file's lines, one call a line, and writes those of a call before the next. Arguments that
    a line leaves out are in `defaults`. `tell`, if any, is called with what is written, `warn` with each failure.

    A line whose pictures are there is skipped: those that were made from the same arguments with the same model, where
    the files say it. BatchFileError if the file cannot be read; other errors are the failures of their lines, but for
    those after which nothing can be made or written.
    """
    totals, names, taken = Totals(), settable(), dict[Path, int]()
    model = Model.of(pipeline.bundle, pipeline.description, pipeline.loaded)
    for number, text in enumerate(read_lines(file, "--batch-file", "one JSON object a line", BatchFileError), 1):
        if not text.strip():
            continue
        try:
            line = parse_line(text, number, output, names)
            written = _make(pipeline, line, defaults, model, taken)
        except LAST:
            raise
        except EngineError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
                raise
            warn(f"{file}:{number}: {error}")
            totals.failures.append(number)
            continue
        totals.made += bool(written)
        totals.skipped += not written
        if tell is not None:
            for one in written:
                tell(f"{file}:{number}: wrote {one}")
    return totals


def _make(
    pipeline: Pipeline, line: Line, defaults: Mapping[str, Any], model: Model, taken: dict[Path, int]
) -> Sequence[Path]:
    """Makes and writes the pictures of a line. The files, none if they were there. `taken`: the files of earlier
    lines, by number."""
    arguments = {**defaults, **line.arguments}
    request = check_call(pipeline.limits, arguments)
    files = check_output(line.output, request.batch)
    for file in files:
        other = taken.setdefault(find_target(file), line.number)
        if other != line.number:
            raise BatchFileError(f"{file} is the file of line {other}; give this line another output")
    texts = bool(pipeline.bundle.family.tokenizers)
    seeded = arguments.get("seed") is not None
    records = Record.of_call(request, texts, model)
    if all(_is_there(file, record, request, seeded) for file, record in zip(files, records)):
        return []
    for image, file in zip(pipeline(**arguments).images, files):
        write_picture(image, file)
    return files


def _is_there(file: Path, wanted: Record, request: Request, seeded: bool) -> bool:
    """Whether a file has the picture of a record, with any seed if the call has none. Without metadata: whether it is
    there."""
    if not file.exists() or not request.metadata:
        return file.exists()
    try:
        content = read(file).record()
        found = None if content is None else Record.from_content(content)
    except MetadataError:  # another picture, which is replaced like any file that is written to
        return False
    return found is not None and _identity(found, seeded) == _identity(wanted, seeded)


def _identity(record: Record, seeded: bool) -> tuple[Any, ...]:
    """What two records of the same picture have in common, on any backend."""
    arguments = {name: value for name, value in record.arguments.items() if seeded or name != "seed"}
    return (
        arguments,
        record.index,
        record.pictures,
        record.inputs,
        record.model.weights,
        record.model.build,
        record.model.loaded,
    )
