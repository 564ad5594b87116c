"""Peak memory and time of building Stable Diffusion 1.5's architecture in fp32, and of a 512 x 512 picture from its
bundle, on the CPU.

Needs 5 GB in the temporary directory (TMPDIR), which are freed however the command ends; Linux and macOS. Each command
runs in its own process; the peak is the resident set that the system counted for it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.errors import SideError
from benchmarks.options import check_room, integer_from
from benchmarks.report import conditions, print_table, write_json
from benchmarks.worker import ROOT

BUNDLE_BYTES = 5_000_000_000
"""The weights are 1.07 billion numbers of four bytes."""
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def measure(arguments: list[str], folder: str) -> tuple[float, float, list[str]]:
    """Seconds, peak resident GiB and the printed lines of a command whose temporary files go to `folder`; it ends with
    this process."""
    started, process, lines = perf_counter(), None, []
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, ENDING
    )  # or a signal could come between the start of the process and its name
    try:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": folder},
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before),
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if process is not None and process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise SideError(
            f"python {' '.join(arguments)} ended with status {process.returncode}; the reason is printed above"
        )
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return perf_counter() - started, peak_bytes / 2**30, lines


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=integer_from(1), default=2, metavar="N", help="of the picture (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(options: argparse.Namespace) -> None:
    """Builds, makes a picture, prints a table and writes the numbers."""
    check_room(
        Path(tempfile.gettempdir()),
        BUNDLE_BYTES,
        "the bundle of Stable Diffusion 1.5 in fp32",
        "name another folder: TMPDIR=FOLDER python -m benchmarks memory",
    )
    with tempfile.TemporaryDirectory() as folder:
        build = measure(
            ["build_engines.py", "sd15", "--random-weights", "--precision", "fp32", "--output", folder], folder
        )
        picture = measure(
            [
                "-m",
                "engine",
                "picture",
                "a large red circle",
                "--bundle",
                f"{folder}/sd15-random",
                "--steps",
                str(options.steps),
                "--seed",
                "0",
                "--output",
                f"{folder}/picture.png",
            ],
            folder,
        )
    rows = [
        ["build, with verification", round(build[0]), round(build[1], 1)],
        [f"512 x 512 picture, {options.steps} steps, process start to file", round(picture[0]), round(picture[1], 1)],
    ]
    print_table(["SD 1.5 architecture, random weights, fp32", "seconds", "peak GiB"], rows)
    said = {
        name: [line.replace(f"{folder}/", "") for line in lines]
        for name, lines in (("build", build[2]), ("picture", picture[2]))
    }
    write_json(options.json, {"benchmark": "memory", "rows": rows, **said, **conditions()})
