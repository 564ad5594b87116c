"""Checks the options of the commands before anything is measured."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.errors import BenchmarkUsageError
from engine.argument_types import shorten
from engine.libraries import install_command, installed

PLOTS = (".png", ".svg", ".pdf")


def integer_from(smallest: int) -> Callable[[str], int]:
    """A type for argparse: integers from `smallest` up."""

    def integer(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = smallest - 1
        if number < smallest:
            raise argparse.ArgumentTypeError(f"{shorten(text)} must be an integer from {smallest} up")
        return number

    return integer


def integers_from(smallest: int) -> Callable[[str], list[int]]:
    """A type for argparse: one or more such integers, separated by commas."""
    one = integer_from(smallest)
    return lambda text: [one(part) for part in text.split(",")]


def seconds(text: str) -> float:
    """A type for argparse: a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{shorten(text)} must be a number of seconds above 0")
    return value


def check_files(options: argparse.Namespace) -> None:
    """BenchmarkUsageError if a file that will be written cannot be, or if a plot cannot be drawn."""
    for file in filter(None, (getattr(options, name, None) for name in ("json", "plot", "output"))):
        if not file.parent.is_dir():
            raise BenchmarkUsageError(
                f"{file} cannot be written: {file.parent} is not a folder; make it, or pass another file"
            )
        if file.exists() and not file.is_file():
            raise BenchmarkUsageError(f"{file} cannot be written: it is not a plain file; pass another file")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise BenchmarkUsageError(f"{file} cannot be written: there is no permission; pass another file")
    plot = getattr(options, "plot", None)
    if plot and plot.suffix.lower() not in PLOTS:
        raise BenchmarkUsageError(f"--plot is {str(plot)!r}; its name must end with {', '.join(PLOTS)}")
    if plot and not installed("matplotlib"):
        raise BenchmarkUsageError(
            f"plots need matplotlib; install it: {install_command('benchmarks')}; or leave out --plot"
        )


def check_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """BenchmarkUsageError if the disk of `folder` has fewer free bytes than `what` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BenchmarkUsageError(
            f"{folder} has {free / 1e9:.1f} GB free, and {what} needs {needed / 1e9:.1f} GB; make room, or {remedy}"
        )
