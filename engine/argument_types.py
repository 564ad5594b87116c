"""The types of options: what a text of the command line means. No library is imported here, because --help should
appear at once."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class ByName(argparse.Action):
    """Puts each NAME=VALUE of an option that may be repeated into a dictionary."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        name, value = values
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: value})


def shorten(text: str, characters: int = 60) -> str:
    """A quoted text for a message, cut to so many characters."""
    return repr(text if len(text) <= characters else text[:characters] + "...")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument's type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        written = re.fullmatch(r"[+-]?[0-9]+", text.strip())
        value = int(text) if written and len(text) <= 40 else low - 1  # Python refuses to read thousands of digits
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not a whole number from {low} to {high}")
        return value

    return parse


def number(low: float = -math.inf) -> Callable[[str], float]:
    """An argument's type: a finite number, at least `low`."""

    def parse(text: str) -> float:
        value = math.nan
        with suppress(ValueError):
            value = float(text)
        if not math.isfinite(value) or value < low:
            floor = f" from {low:g} up" if math.isfinite(low) else ""
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not a finite number{floor}")
        return value

    return parse


def scales(text: str) -> float | list[float]:
    """An argument's type: a finite number, or several with commas between them."""
    values = numbers(text)
    return values[0] if len(values) == 1 else values


def interval(text: str) -> tuple[float, float]:
    """An argument's type: two finite numbers with a colon between them."""
    parts = text.split(":")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not START:END, such as 0.2:0.8")
    return number()(parts[0]), number()(parts[1])


def numbers(text: str) -> list[float]:
    """An argument's type: finite numbers with commas between them."""
    return [number()(part) for part in text.split(",")]


def option(text: str) -> tuple[str, bool | int | float | str]:
    """An argument's type: a name and its value, which is true, false, a number or a word."""
    name, equals, written = (part.strip() for part in text.partition("="))
    if not (name and equals and written):
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not like NAME=VALUE")
    if written.lower() in ("true", "false"):
        return name, written.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(written)
    return name, written


def axis(text: str) -> tuple[str, list[str]]:
    """An argument's type: a name and its values. They are separated by semicolons if there is one, else by commas."""
    name, equals, written = text.partition("=")
    values = [value.strip() for value in written.split(";" if ";" in written else ",")]
    if not (name.strip() and equals and all(values)):
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not like NAME=VALUE,VALUE")
    return name.strip().lstrip("-").replace("-", "_"), values


def given_input(text: str) -> tuple[str, Path]:
    """An argument's type: a name and a file."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not like NAME=FILE")
    return name, path(file)


def device(text: str) -> str:
    """An argument's type: "cpu", "cuda" or "cuda:N"."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", text):
        raise argparse.ArgumentTypeError(f"{shorten(text)} is none of cpu, cuda and cuda:N with the number of a GPU")
    return text


def path(text: str) -> Path:
    """An argument's type: a name that a file can have; ~ is the home folder."""
    with suppress(RuntimeError):  # no user of that name: the file is called ~something
        text = os.path.expanduser(text)
    try:
        os.stat(text)
    except ValueError as error:  # NUL, halves of surrogate pairs
        raise argparse.ArgumentTypeError(f"{shorten(text)} cannot be a file's name") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is too long for a file's name") from error
    if not text:
        raise argparse.ArgumentTypeError("'' names no file")
    return Path(text)


def enlargement(text: str) -> dict[str, float | int]:
    """An argument's type: a factor, or WIDTHxHEIGHT in pixels; the arguments of `Hires`."""
    if re.fullmatch(r"[0-9]{1,5}x[0-9]{1,5}", text):
        width, height = map(int, text.split("x"))
        return {"width": width, "height": height}
    return {"scale": number(low=1.0)(text)}


def inversion(text: str) -> tuple[Path, str | None]:
    """An argument's type: a file, and after the last "=" a word."""
    file, equals, token = text.rpartition("=")
    if not equals:
        return path(text), None
    if not token:
        raise argparse.ArgumentTypeError(f"{shorten(text)} has no word after the '='; write FILE=TOKEN, or FILE alone")
    return path(file), token


def adapter(text: str) -> tuple[Path, float]:
    """An argument's type: a file, and after the last ":" its weight, which is 1 if there is none."""
    file, _, written = text.rpartition(":")
    if not file or not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", written):
        return path(text), 1.0
    return path(file), float(written)
