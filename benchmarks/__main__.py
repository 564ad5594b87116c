"""Benchmarks:  python -m benchmarks latency --bundle engines/demo --against diffusers,diffusers-bf16"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import traceback
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.options import check_files
from engine.commands import show_what_cannot_be_printed
from engine.libraries import install_command

COMMANDS = {
    "latency": "latency per image, stage by stage, against diffusers and others",
    "overhead": "the cost around the U-Net: host time of a step, import, process start, installed size",
    "roofline": "operations and bytes of each component, and how close to the hardware it runs",
    "scaling": "time and memory against steps, batch and pixels",
    "guidance": "what guidance intervals save, and what they change",
    "parity": "how far the pictures are from float32 diffusers', by backend and precision",
    "memory": "peak memory of building and of a picture",
    "tiling": "peak memory of decoding large pictures in tiles",
    "adapters": "seconds to switch a LoRA, and a step with and without it",
    "settings": "what the settings of the libraries and the exact savings give",
    "prompt": "the time of the parser of prompts, and how it grows with their length",
    "convergence": "the order at which each solver's error falls",
    "report": "one Markdown page of the stored results",
}


def parser(chosen: str) -> argparse.ArgumentParser:
    """The parser, with the options of the chosen command only. The others may need packages that are not installed."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measurements, stored with the hardware, versions and settings that they were made with.",
    )
    commands = p.add_subparsers(dest="command", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if name == chosen:
            _module(name).arguments(command)
        command.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return p


def _module(command: str) -> Any:
    return importlib.import_module(f"benchmarks.{'page' if command == 'report' else command}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, 2 for a user's mistake, 1 for a failure, 130 for Ctrl-C before
    anything was measured."""
    words = sys.argv[1:] if arguments is None else arguments
    show_what_cannot_be_printed()
    failure: Exception
    try:
        options = parser(words[0] if words else "").parse_args(words)
        check_files(options)
        _module(options.command).run(options)
        return 0
    except KeyboardInterrupt:
        print("python -m benchmarks: stopped", file=sys.stderr)
        return 130
    except BenchmarkError as error:
        failure, message, code = error, str(error), error.exit_code
    except ImportError as error:
        failure, message, code = (
            error,
            f"{error}; install what benchmarks need: {install_command('export', 'cpu', 'benchmarks')}",
            1,
        )
    except Exception as error:
        failure, message, code = (
            error,
            f"{type(error).__name__}: {error} (run again with --debug for the traceback)",
            getattr(error, "exit_code", 1),
        )
        if hasattr(error, "exit_code"):
            message = str(error)
    if "--debug" in words:
        traceback.print_exception(failure)
    print(f"python -m benchmarks: {message}", file=sys.stderr)
    return code


def tidy_up_when_terminated() -> None:
    """Makes SIGTERM and SIGHUP end the command as Ctrl-C does, so that temporary folders and processes go with it."""
    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]

    def end(number: int, _: Any) -> None:
        for one in signals:
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    for one in signals:
        signal.signal(one, end)


if __name__ == "__main__":
    tidy_up_when_terminated()
    sys.exit(main())
