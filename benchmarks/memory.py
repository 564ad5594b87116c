"""Peak memory and time of building Stable Diffusion 1.5's architecture in fp32, and of a 512 x 512 picture from its bundle, on the CPU.

Needs 5 GB of disk; Linux and macOS. Each command runs in its own process; the peak is the resident set that the system counted for it.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.errors import SideError
from benchmarks.report import conditions, print_table, write_json
from benchmarks.worker import ROOT


def measure(arguments: list[str]) -> tuple[float, float, list[str]]:
    """Seconds, peak resident GiB and the printed lines of a command."""
    started = perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SideError(f"python {' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}; what it printed above says why")
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return perf_counter() - started, peak_bytes / 2**30, lines


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=2, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(options: argparse.Namespace) -> None:
    """Builds, makes a picture, prints a table and writes the numbers."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        build = measure(["build_engines.py", "sd15", "--random-weights", "--precision", "fp32", "--output", folder])
        picture = measure(["-m", "engine", "picture", "a large red circle", "--bundle", f"{folder}/sd15-random", "--steps", str(options.steps), "--seed", "0",
                           "--output", f"{folder}/picture.png"])
    rows = [["build, with verification", round(build[0]), round(build[1], 1)],
            [f"512 x 512 picture, {options.steps} steps, process start to file", round(picture[0]), round(picture[1], 1)]]
    print_table(["SD 1.5 architecture, random weights, fp32", "seconds", "peak GiB"], rows)
    said = {name: [line.replace(f"{folder}/", "") for line in lines] for name, lines in (("build", build[2]), ("picture", picture[2]))}
    write_json(options.json, {"benchmark": "memory", "rows": rows, **said, **conditions()})
