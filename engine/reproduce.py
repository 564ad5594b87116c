"""Makes a picture again from what its file says, and compares the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .bundle import Bundle
from .errors import MetadataError, ReproductionError, shown
from .infotext import Ignored
from .inputs import INPUTS, Arrays, from_files
from .manifest import SHA256
from .metadata import READ, RECORD, Metadata, reason
from .picture import psnr
from .pipeline import Pipeline
from .record import Record, call_parameters
from .webui_call import call_of


@dataclass(frozen=True)
class Plan:
    """How a picture is made again: picture number `index` of the call with these arguments. record: the file's, None if
    A1111's text said it all; ignored: what that text asks for in vain; model: its name in that text."""

    arguments: Mapping[str, Any]
    index: int
    record: Record | None = None
    ignored: tuple[Ignored, ...] = ()
    model: str | None = None


@dataclass(frozen=True, eq=False)
class Pixels:
    """The pixels of a file, [H, W, 3] uint8. lossy: whether its format changed them."""

    values: np.ndarray
    lossy: bool


@dataclass(frozen=True)
class Comparison:
    """How a picture differs from the one in the file. psnr: dB, None for pictures of different sizes; largest: of the
    differences of two values, of 255; reasons: what was different in the making."""

    equal: bool
    psnr: float | None
    largest: int | None
    reasons: tuple[str, ...]


def plan(file: Path, found: Metadata, given: Mapping[str, Any], text_only: bool = False) -> Plan:
    """What a picture file asks for. given: inputs of the call, by argument; pictures that are not given are read from
    the files that the record names. text_only: the record counts for nothing. MetadataError if the file says nothing or
    is damaged, ReproductionError if an input is missing or is another."""
    content = None if text_only else found.record()
    if content is not None:
        return _from_record(file, Record.from_content(content), given)
    if found.parameters is None:
        raise MetadataError(
            f"{file} has no settings: neither LatentRT's record nor A1111's text; pass the file as it was written"
        )
    asked = call_of(found.parameters, call_parameters(), given)
    if not {"seed", "num_inference_steps"} & asked.arguments.keys():
        raise MetadataError(f"{file} has a text, and no settings in it: {shown(found.parameters)}")
    return Plan(asked.arguments, asked.index, None, asked.ignored, asked.model)


def _from_record(file: Path, record: Record, given: Mapping[str, Any]) -> Plan:
    unknown = sorted(given.keys() - record.inputs.keys())
    if unknown:
        option = INPUTS[unknown[0]].option
        raise ReproductionError(f"the call of {file} was given no {unknown[0]}; leave out {option}")
    found = {name: from_files(file, name, arrays) for name, arrays in record.inputs.items() if name not in given}
    return Plan({**record.arguments, **found, **given}, record.index, record)


def check_family(file: Path, plan: Plan, bundle: Bundle) -> None:
    """ReproductionError for a bundle of another kind of model, which could not take the call's arguments."""
    if plan.record is None or plan.record.model.family == bundle.family.name:
        return
    model = plan.record.model
    raise ReproductionError(
        f"{file} was made with {model.bundle}, a {model.family} model, and {bundle.folder} is a {bundle.family.name} "
        "model; pass --bundle with the bundle that made it"
    )


def make_again(pipeline: Pipeline, plan: Plan, progress: bool) -> Image.Image:
    """The picture of a plan. Raises the errors of the call, and MetadataError for a record that contradicts itself."""
    arguments = dict(plan.arguments)
    if not pipeline.bundle.family.tokenizers:  # A1111's text always has a prompt, if an empty one
        arguments = {name: value for name, value in arguments.items() if value or "prompt" not in name}
    images: list[Image.Image] = pipeline(**arguments, progress=progress).images
    if plan.index >= len(images):
        raise MetadataError(
            f"the record in the picture is of number {plan.index} of a call that makes {len(images)} pictures; its "
            "A1111 text may still be right (--text)"
        )
    return images[plan.index]


def read_pixels(file: Path) -> Pixels:
    """The pixels of a picture file. MetadataError if they can't be read."""
    try:
        with Image.open(file, formats=READ) as image:
            return Pixels(np.asarray(image.convert("RGB")), image.format == "JPEG")
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise MetadataError(
            f"the pixels of {file} can't be read ({reason(error)}); pass the file as it was written"
        ) from error


def compare(then: Pixels, plan: Plan, made: Image.Image) -> Comparison:
    """The picture in a file beside the one that was made."""
    before, after = then.values, np.asarray(made)
    reasons = ["file: a JPEG does not keep the pixels"] if then.lossy else []
    reasons += differences(plan, record_of(made))
    if before.shape != after.shape:
        sizes = [f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (before, after)]
        return Comparison(False, None, None, (f"size: {sizes[0]} in the file, {sizes[1]} now", *reasons))
    largest = int(np.abs(before.astype(np.int16) - after).max())
    return Comparison(largest == 0, psnr(after, before), largest, tuple(reasons))


def record_of(made: Image.Image) -> Record:
    """The record of a picture of this process."""
    content = Metadata(None, made.info[RECORD]).record()
    assert content is not None
    return Record.from_content(content)


def differences(plan: Plan, new: Record) -> list[str]:
    """What was different when a picture was made, as far as its file says it."""
    old = plan.record
    if old is None:
        known = plan.model is None or plan.model == new.model.bundle
        other = [] if known else [f"model: {plan.model} then, {new.model.bundle} now"]
        return [*other, "settings: A1111's text, which does not say everything"]
    found = list(old.obstacles)
    then, now = asdict(old.model), asdict(new.model)
    for name in then:
        if then[name] != now[name]:
            found.append(f"{name}: {_short(then[name])} then, {_short(now[name])} now")
    found += [
        f"{name}: not the one that the picture was made from{_files(arrays)}"
        for name, arrays in old.inputs.items()
        if arrays != new.inputs.get(name)
    ]
    for name in sorted(old.arguments.keys() | new.arguments.keys()):
        before, after = old.arguments.get(name), new.arguments.get(name)
        if before != after:
            found.append(f"{name}: {shown(before)} then, {shown(after)} now")
    return found


def _files(arrays: Arrays) -> str:
    """The files of an input, if it was in some."""
    files = [f"{array.file}, SHA-256 {_short(array.sha256)}" for array in arrays if array.file is not None]
    return f" ({'; '.join(files)})" if files else ""


def _short(value: str | None) -> str:
    """A hash by its beginning."""
    return "unknown" if value is None else value[:10] if SHA256.fullmatch(value) else value or "nothing"


def report(file: Path, plan: Plan, compared: Comparison, description: str, output: Path | None) -> Iterator[str]:
    """What `python -m engine reproduce` prints, a line each."""
    source = "A1111's text" if plan.record is None else "its record"
    number = f", picture {plan.index + 1} of its call" if plan.index else ""
    yield f"made {file} again from {source}{number}, with {description}" + (f": {output}" if output else "")
    for one in plan.ignored:
        yield f"not honoured: {one.key}: {one.text} ({one.reason})"
    reasons = compared.reasons
    if compared.equal and plan.record is None:
        reasons = ()  # the text said enough
    yield _result(compared) + (", although:" if compared.equal and reasons else "")
    yield from (f"  {one}" for one in reasons)


def _result(compared: Comparison) -> str:
    if compared.equal:
        return "the pixels are equal"
    if compared.psnr is None:
        return "the pixels differ"
    return f"the pixels differ: PSNR {compared.psnr:.1f} dB, at most {compared.largest} of 255 apart"
