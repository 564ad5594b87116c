"""What commands print: results on standard output, notes on standard error."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import perf_counter

from .errors import OutputFileError


def say(text: str | None) -> None:
    """Prints a line; None flushes what argparse has printed. A closed pipe is no failure: the command does its work all
    the same. OutputFileError for a full disk."""
    if sys.stdout is None:
        return
    try:
        print(text or "", end="" if text is None else "\n", flush=True)
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OutputFileError(f"standard output cannot be written ({error.strerror})") from error


def warn(text: str) -> None:
    """Prints a line on standard error, if there is one."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def note_after(seconds: float, text: str, wanted: bool, every: float | None = None) -> Iterator[None]:
    """Prints a note on standard error if the block takes longer than `seconds`, and again after each `every`
    seconds."""
    finished, started = threading.Event(), perf_counter()

    def tell() -> None:
        pause: float | None = seconds
        while not finished.wait(pause):
            with suppress(OSError, ValueError):
                print(f"{text} ({perf_counter() - started:.0f} s so far)", file=sys.stderr, flush=True)
            pause = every

    if wanted:
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def is_terminal(stream: object) -> bool:
    """Whether a stream shows a person what is written to it. None is none."""
    return bool(stream) and stream.isatty()  # type: ignore[attr-defined]
