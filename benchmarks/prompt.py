"""How long the parser of A1111's prompt language takes, and how that grows with the prompt's length."""

from __future__ import annotations

import argparse
from functools import partial
from time import process_time
from timeit import repeat

from benchmarks.options import integer_from
from benchmarks.report import print_table
from benchmarks.statistics import Summary, summarize
from engine.text.prompt import parse

LENGTH, TIMES = 10_000, 10
"""Characters of the shorter prompt, and how many times as long the longer one is."""

UNITS = {
    "as people write": "masterpiece, a [red:blue:0.4] circle on a (green:1.2) field, soft light, 8k, ",
    "without marks": "a large red circle on a blue background ",
    "switches": "[a:b:0.5] ",
    "open brackets": "[(",
    "parts": "a:0.5 AND ",
    "tags": "<lora:a:0.5> ",
}
"""What each prompt repeats."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=integer_from(1), default=100, metavar="N", help="of each prompt (default: 100)"
    )


def run(options: argparse.Namespace) -> None:
    """Prints, for each kind of prompt, the time of the shorter one, and the ratio of the longer one's best to its."""
    rows = []
    for kind, unit in UNITS.items():
        short, long = seconds(unit, LENGTH, options.rounds), seconds(unit, TIMES * LENGTH, options.rounds)
        rows.append([kind, f"{1e3 * short.min:.2f}", f"{1e3 * short.p50:.2f}", f"{long.min / short.min:.1f}"])
    print_table(["prompt", f"ms for {LENGTH} characters, best", "median", f"ratio for {TIMES} times as many"], rows)


def seconds(unit: str, length: int, rounds: int) -> Summary:
    """Of the processor, for parsing a prompt of that length. As `timeit` does, without collecting garbage."""
    text = (unit * length)[:length]
    return summarize(repeat(partial(parse, text), timer=process_time, repeat=rounds, number=1))
