"""The runtime from a shell.

python -m engine picture "a large red circle on a blue background" --bundle engines/demo
python -m engine reproduce circle.png --bundle engines/demo
python -m engine samplers
python -m engine doctor
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from .arguments import MAX_PICTURES, parse, program
from .commands import show_what_cannot_be_printed
from .errors import BatchError, BatchFileError, CompareError, EngineError, OutputFileError
from .libraries import install_command
from .making import (
    check_call,
    choose_picture_seeds,
    choose_seeds,
    choose_subseed,
    further_arguments,
    load,
    make,
    open_bundle,
    read_inputs,
    read_pictures,
    read_subjects,
    sheet_name,
    write_sheet,
)
from .terminal import say, warn


def picture(options: argparse.Namespace) -> int:
    """Makes and writes the pictures. Prints their files, the timings and the bundle's differences from diffusers."""
    from .output import check_output

    read_pictures(options)
    choose_subseed(options)
    if options.compare or options.batch_file is not None:
        return compare(options) if options.batch_file is None else batch(options)
    subjects = read_subjects(options)
    total = len(subjects) * options.count
    if total > MAX_PICTURES:
        raise BatchError(
            f"{len(subjects)} texts with --count {options.count} are {total} pictures; one run makes at most "
            f"{MAX_PICTURES}"
        )
    files = check_output(options.output, total)
    sheet = check_output(sheet_name(options.output), 1)[0] if options.grid else None
    wanted = list(
        zip(
            [subject for subject in subjects for _ in range(options.count)],
            choose_picture_seeds(options) * len(subjects),
            files,
        )
    )
    with load(options, check_call(options, subjects)) as pipeline:
        results = make(pipeline, wanted, options)
        if sheet is not None:
            write_sheet(files, sheet, options.count if len(subjects) > 1 else 1, options.quiet)
        if not options.quiet:
            from .summary import summarize

            say(summarize(pipeline.bundle.manifest, pipeline.description, results))
    return 0


def compare(options: argparse.Namespace) -> int:
    """Makes and writes the grid of --compare."""
    from .comparison import cells, check_axes, check_cells
    from .output import check_output, write_picture
    from .sheet import labelled_grid

    axes = check_axes(options.compare)
    file = check_output(options.output, 1)[0]
    arguments = {**one_call(options), "seed": choose_seeds(options.seed, 1)[0]}
    with load(options, open_bundle(options)) as pipeline:
        rows = cells(axes, arguments)
        check_cells(pipeline, axes, rows)
        pictures = [[pipeline(**call).images[0] for call in row] for row in rows]
    write_picture(labelled_grid(pictures, *(axis.labels for axis in axes)), file)
    if not options.quiet:
        say(f"wrote {file} ({sum(map(len, rows))} pictures, seed {arguments['seed']})")
    return 0


def batch(options: argparse.Namespace) -> int:
    """Makes and writes the pictures of --batch-file. Returns 1 if a line failed."""
    from .batch_file import run

    defaults = {**one_call(options), "seed": options.seed}
    with load(options, open_bundle(options)) as pipeline:
        totals = run(pipeline, options.batch_file, options.output, defaults, None if options.quiet else say, warn)
    if not options.quiet:
        say(str(totals))
    return 1 if totals.failures else 0


def one_call(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call of one picture, but for the seed. CompareError or BatchFileError for options that make
    several."""
    given_file = options.batch_file is not None
    mode, error = ("--batch-file", BatchFileError) if given_file else ("--compare", CompareError)
    several = {
        "--compare": given_file and options.compare,
        "--prompts": options.prompts is not None,
        "--count": options.count > 1,
        "--grid": options.grid,
        "several texts": len(options.prompt) > 1,
        "several classes": len(options.class_labels) > 1,
    }
    for what, given in several.items():
        if given:
            raise error(f"{what} cannot be used with {mode}; leave {'it' if what[0] == '-' else 'all but one'} out")
    arguments = {
        **further_arguments(options),
        "negative_prompt": options.negative_prompt or None,
        "progress": not options.quiet,
    }
    if options.prompt:
        arguments["prompt"] = options.prompt[0]
    if options.class_labels:
        arguments["class_labels"] = options.class_labels[0]
    return arguments


def reproduce(options: argparse.Namespace) -> int:
    """Makes a picture again and says whether its pixels are equal. Returns 0 if they are, else 3."""
    from . import reproduce as again
    from .metadata import read
    from .output import check_output, write_picture

    output = None if options.output is None else check_output(options.output, 1)[0]
    plan = again.plan(options.picture, read(options.picture), read_inputs(options), options.text)
    before = again.read_pixels(options.picture)
    bundle = open_bundle(options)
    again.check_family(options.picture, plan, bundle)
    with load(options, bundle) as pipeline:
        made = again.make_again(pipeline, plan, not options.quiet)
        description = pipeline.description
    if output is not None:
        write_picture(made, output)
    compared = again.compare(before, plan, made)
    if not options.quiet:
        for line in again.report(options.picture, plan, compared, description, output):
            say(line)
    return 0 if compared.equal else 3


def samplers(options: argparse.Namespace) -> int:
    """Prints the samplers, or what the named ones take."""
    from .sampling.listing import describe, overview

    for line in describe(options.names) if options.names else overview():
        say(line)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Prints the report. Returns 0 if every bundle can make pictures here, 1 if one cannot or there is none."""
    from .doctor import diagnose

    report = diagnose(options.bundles, options.verify)
    while True:
        try:
            say(next(report))
        except StopIteration as end:
            return 0 if end.value else 1


def in_words_of_the_shell(message: str) -> str:
    """A message of the Python interface, with arguments written as options of the command."""
    return re.sub(r"\b(backend|device)='([\w:]+)'", r"--\1 \2", message)


def what_to_install(error: ImportError, arguments: list[str]) -> str:
    """The message for a missing package: which Python lacks it, and which one has it or how to install it."""
    environment = Path(__file__).parents[1] / ".venv"
    python = environment / "bin" / "python"
    if python.exists() and environment.resolve() != Path(sys.prefix).resolve():
        shown = os.path.relpath(python) if environment.parent == Path.cwd() else str(python)
        command = shlex.join([shown, "-m", "engine", *arguments])
        remedy = f"`make demo` has installed what is needed for another Python: {command}"
    else:
        command = shlex.quote(sys.executable) + install_command("runtime", "cpu").removeprefix("python")
        remedy = f"install what is needed: {command}"
    return f"{sys.executable} cannot import {error.name or 'a package'} ({error}); {remedy}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, 2 for a user's mistake, 1 for a failure, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    show_what_cannot_be_printed()
    try:
        options = parse(arguments)
    except SystemExit:
        with suppress(OutputFileError):
            say(None)
        raise
    failure: Exception
    try:
        return {"picture": picture, "reproduce": reproduce, "samplers": samplers, "doctor": doctor}[options.command](
            options
        )
    except KeyboardInterrupt:
        message, code = "stopped", 130
    except EngineError as error:
        failure, message, code = error, in_words_of_the_shell(str(error)), error.exit_code
    except ImportError as error:
        failure, message, code = error, what_to_install(error, arguments), 1
    except Exception as error:
        failure, message, code = error, f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1
    with suppress(OSError):
        if options.debug and code != 130:
            traceback.print_exception(failure)
        print(f"{program()}: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
