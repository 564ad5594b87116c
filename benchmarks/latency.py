"""Latency per image, against what a user would choose instead: the same weights, size, steps, sampler, seeds and
threads.

Every side runs in its own process. They take turns, picture by picture and in alternating order, so that a drift of the
machine hits them all; a ratio is taken within each turn. A turn in which other programs took part of the processors is
counted as disturbed and repeated. Results that cannot be believed are refused, with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import statistics
from benchmarks.errors import BenchmarkUsageError, NothingOfOursError, SkippedSide, UnknownSideError
from benchmarks.models import model_folder, sampler_of
from benchmarks.options import integer_from, integers_from, seconds
from benchmarks.quiet import allowed_share, load, others_share, wait_until_quiet
from benchmarks.report import conditions, print_table, write_json
from benchmarks.sides import OURS, SCHEDULERS, THEIRS, Request, Setup, Side
from engine.backends import default_backend
from engine.bundle import Bundle
from engine.checks import check_shapes
from engine.picture import psnr

PICTURES = 20
WARM_UPS, WARM_UP = 5, 5.0
"""The uncounted pictures of each side at the start. After so many seconds no more are begun."""
SHORT = 2.0
"""Seconds. Before a picture that takes less, one more is made that is not counted, because the caches are full of
another side's data. That made the built-in model's pictures 25 % slower in turns that began with another side."""
SLOW = 600.0
"""Seconds that one configuration may take. Slower machines make fewer pictures, but at least LEAST."""
LEAST = 3
ATTEMPTS = 3
"""How many turns are tried for each wanted one if other programs disturb."""
PATIENCE = 60.0
"""Seconds to wait for other programs after a disturbed turn."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
GUIDANCE = 7.5


def prompt(index: int) -> str:
    """Another text for every picture, so no side's cache helps. The built-in model knows texts of this kind."""
    return (
        f"a large {COLOURS[index % 8]} {SHAPES[index % 6]} on a {COLOURS[(index + 1 + index // 24 % 7) % 8]} background"
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser)
    parser.add_argument(
        "--against",
        default="diffusers,diffusers-bf16",
        metavar="A,B",
        help="diffusers, diffusers-channels-last, diffusers-bf16 (with "
        "channels_last), diffusers-compile (that compiled), diffusers-fp32, diffusers-fp32-compile, optimum; '' for "
        "nothing "
        "(default: diffusers,diffusers-bf16)",
    )
    parser.add_argument(
        "--pictures",
        type=integer_from(1),
        default=PICTURES,
        metavar="N",
        help=f"pictures of each side after the warm-up (default: {PICTURES})",
    )
    parser.add_argument(
        "--budget",
        type=seconds,
        default=SLOW,
        metavar="SECONDS",
        help=f"for one configuration; fewer pictures are made if they would take longer, at least {LEAST} (default: "
        f"{SLOW:g})",
    )
    parser.add_argument(
        "--batch", type=integers_from(1), default=[1], metavar="N,M", help="pictures per call (default: 1)"
    )
    parser.add_argument("--sizes", metavar="WxH,...", help="pixels (default: what the bundle is best at)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a bar for each side, with its stages")


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all commands that make pictures."""
    parser.add_argument("--bundle", type=Path, default=Path("engines/demo"), help="default: engines/demo")
    parser.add_argument(
        "--backend", metavar="A,B", help=f"ours: {', '.join(OURS)} (default: what Pipeline.load would choose)"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the bundle's model in the diffusers layout, if the bundle does not name its folder",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="where a model with random weights is written in that layout for the others, and found "
        "again (default: a temporary folder)",
    )
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), help="default: the model's own")
    parser.add_argument("--steps", type=integer_from(1), default=20, metavar="N", help="default: 20")
    parser.add_argument(
        "--threads",
        type=integer_from(0),
        default=0,
        metavar="N",
        help="of every side (default: each library's own choice)",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="SIDE=PATH",
        help="another interpreter for a side whose packages conflict with these",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(options: argparse.Namespace) -> None:
    """Measures every configuration, prints a table for each and writes the numbers."""
    bundle = Bundle.open(options.bundle, verify=False)
    sides = [*names(options.backend or default_backend()), *names(options.against)]
    sizes = [parse_size(text) for text in names(options.sizes)] or [(bundle.shapes.width.opt, bundle.shapes.height.opt)]
    wanted = [(width, height, batch) for width, height in sizes for batch in options.batch]
    for width, height, batch in wanted:
        check_shapes(height, width, batch, 2 * batch, (bundle.shapes,), bundle.command, bundle.family.factor)
    setups = setups_of(bundle, sides, options)
    content: dict[str, Any] = {
        "benchmark": "latency",
        "bundle": bundle.name,
        "steps": options.steps,
        "guidance_scale": GUIDANCE,
        "scheduler": setups[0].sampler,
        "threads": options.threads,
        "configurations": [],
        "interrupted": False,
    }
    try:
        for width, height, batch in wanted:
            print(f"{width} x {height}, batch {batch}, {options.steps} steps of {setups[0].sampler}", flush=True)
            request = Request("", 0, height, width, batch, options.steps, GUIDANCE, "")
            found = measure(setups, pythons(options.python), request, options.pictures, options.budget)
            content["configurations"].append(found)
            show(found)
            if found["interrupted"]:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not content["configurations"]:
            raise
        content["interrupted"] = True
    write_json(options.json, {**statistics.as_json(content), **conditions()})
    if options.plot:
        from benchmarks.plots import latency

        latency(statistics.as_json(content), options.plot)


def names(text: str | None) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of WxH."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise BenchmarkUsageError(f"--sizes has {text!r}; it must be WIDTHxHEIGHT in pixels, for example 512x512")
    return int(parts[0]), int(parts[1])


def pythons(given: Sequence[str]) -> dict[str, str]:
    """The interpreter of each side that has its own."""
    for text in given:
        if "=" not in text:
            raise BenchmarkUsageError(
                f"--python is {text!r}; it must be SIDE=PATH, for example optimum=/opt/optimum/bin/python"
            )
    return dict(text.split("=", 1) for text in given)


def setups_of(bundle: Bundle, sides: Sequence[str], options: argparse.Namespace) -> list[Setup]:
    """What each side loads. UnknownSideError for an unknown name."""
    for side in sides:
        if side not in (*OURS, *THEIRS):
            raise UnknownSideError(f"{side!r} is not known; it must be one of {', '.join((*OURS, *THEIRS))}")
    if not any(side in OURS for side in sides):
        raise NothingOfOursError(
            f"there is nothing of ours to measure; --backend must name one or more of {', '.join(OURS)}"
        )
    theirs = any(side not in OURS for side in sides)
    model = model_folder(bundle, options.model, options.cache) if theirs else Path()
    sampler = options.scheduler or sampler_of(bundle)
    return [Setup(side, str(bundle.folder.resolve()), str(model.resolve()), sampler, options.threads) for side in sides]


@contextmanager
def opened(setups: Sequence[Setup], interpreters: dict[str, str]) -> Iterator[tuple[list[Side], dict[str, str]]]:
    """The processes of all installed sides, and the reason for each that is missing. The processes end with the block.
    NothingOfOursError if none of ours is installed."""
    sides: list[Side] = []
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        for setup in sorted(setups, key=lambda setup: setup.side not in OURS):
            if setup.side not in OURS and not sides:
                break
            progress(f"loading {setup.side}")
            try:
                side = Side(setup, interpreters.get(setup.side, sys.executable))
            except SkippedSide as error:
                skipped[setup.side] = str(error)
                print(f"skipped {error}", flush=True)
                continue
            stack.callback(side.close)
            sides.append(side)
        progress("")
        if not sides:
            raise NothingOfOursError(
                f"there is nothing of ours to measure ({'; '.join(skipped.values())}); pass --backend with another of "
                f"{', '.join(OURS)}"
            )
        yield sides, skipped


def measure(
    setups: Sequence[Setup], interpreters: dict[str, str], request: Request, pictures: int, budget: float
) -> dict[str, Any]:
    """Measures one configuration: each side's times, the ratios, and what was refused. Ctrl-C ends it after the
    complete turns."""
    turns: list[dict[str, Any]] = []
    disturbed: list[dict[str, Any]] = []
    interrupted, ends = False, {}
    with opened(setups, interpreters) as (sides, skipped), tempfile.TemporaryDirectory() as folder:
        first: dict[str, Any] = {}
        usual: dict[str, float] = {}
        planned, allowed = pictures, allowed_share(setups[0].threads)
        try:
            for side in sides:
                progress(f"warming up {side.name}")
                warm = _warm_up(side, request_of(request, 0, side, folder))
                first[side.name], usual[side.name] = warm[0], warm[-1]["total"]
            seconds = sum(time * (2 if time < SHORT else 1) for time in usual.values())
            planned = max(min(pictures, LEAST), min(pictures, int(budget / max(seconds, 1e-9))))
            if planned < pictures:
                print(
                    f"{planned} pictures of each side instead of {pictures}: a turn takes about {seconds:.0f} s, and "
                    f"--budget is {budget:g} s",
                    flush=True,
                )
            started, index = perf_counter(), 0
            while len(turns) < planned and index < ATTEMPTS * planned:
                index += 1
                turn = _turn(sides if index % 2 else sides[::-1], usual, request, index, folder)
                (disturbed if turn["others_share"] > allowed else turns).append(turn)
                left = (perf_counter() - started) / index * (planned - len(turns))
                progress(
                    f"{len(turns)} of {planned} pictures of each side, {len(disturbed)} disturbed; about {left:.0f} s "
                    "left"
                )
                if disturbed and disturbed[-1] is turn:
                    wait_until_quiet(_pids(sides), PATIENCE, allowed)
        except KeyboardInterrupt:
            if not turns and not disturbed:
                raise
            interrupted = True
            print(f"\nstopped after {len(turns)} pictures of each side", flush=True)
        progress("")
        ends = {side.name: side.finish() for side in sides} if not interrupted else {}
        loaded = {side.name: side.loaded for side in sides}
    if len(turns) < min(planned, LEAST):  # then the spread has to judge
        turns, disturbed = turns + disturbed, []
    return {
        "height": request.height,
        "width": request.width,
        "batch": request.batch,
        "interrupted": interrupted,
        "skipped": skipped,
        "disturbed": len(disturbed),
        **evaluate(loaded, first, turns, ends, request.batch),
    }


def _warm_up(side: Side, request: Request) -> list[dict[str, Any]]:
    """The pictures that are not counted, at least one."""
    started, warm = perf_counter(), [side.picture(request)]
    while len(warm) < WARM_UPS and perf_counter() - started < WARM_UP:
        warm.append(side.picture(request))
    return warm


def request_of(request: Request, index: int, side: Side, folder: str) -> Request:
    return Request(**{**asdict(request), "prompt": prompt(index), "seed": index, "file": f"{folder}/{side.name}.npy"})


def _turn(sides: Sequence[Side], usual: dict[str, float], request: Request, index: int, folder: str) -> dict[str, Any]:
    """Makes one counted picture on each side. Returns the times, and the PSNR between ours and theirs."""
    before, times = load(_pids(sides)), {}
    for side in sides:
        asked = request_of(request, index, side, folder)
        if usual[side.name] < SHORT:
            side.picture(asked)
        times[side.name] = side.picture(asked)
    others = others_share(before, load(_pids(sides)))
    pixels = {side.name: np.load(f"{folder}/{side.name}.npy") for side in sides}
    decibels = {f"{a} / {b}": psnr(pixels[a], pixels[b]) for a in pixels for b in pixels if a in OURS and b not in OURS}
    return {"times": times, "psnr_db": decibels, "others_share": others}


def _pids(sides: Sequence[Side]) -> list[int]:
    return [os.getpid(), *(side.pid for side in sides)]


def evaluate(
    loaded: dict[str, Any], first: dict[str, Any], turns: Sequence[dict[str, Any]], ends: dict[str, Any], batch: int
) -> dict[str, Any]:
    """Summaries of the sides and the ratios between ours and theirs, or why there are none."""
    sides = {
        name: _side(
            name, loaded[name], first.get(name), [turn["times"][name] for turn in turns], ends.get(name, {}), batch
        )
        for name in loaded
    }
    ratios = (
        [_ratio(a, b, loaded, turns) for a in loaded for b in loaded if a in OURS and b not in OURS] if turns else []
    )
    return {"sides": sides, "ratios": ratios, "turns": list(turns)}


def _side(
    name: str,
    loaded: dict[str, Any],
    first: dict[str, Any] | None,
    samples: Sequence[dict[str, Any]],
    end: dict[str, Any],
    batch: int,
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "description": loaded["description"],
        "precision": loaded["precision"],
        "start_s": loaded["start"],
        "load_s": loaded["load"],
        "first_picture_s": first and first["total"],
        "peak_bytes": end.get("peak_bytes"),
        "device_bytes": end.get("device_bytes"),
    }
    if not samples:
        return {**summary, "refused": [f"{name} made no picture after its warm-up"]}
    refused = [
        reason
        for i, sample in enumerate(samples, 1)
        for reason in statistics.refuse_timing(f"picture {i} of {name}", sample)
    ]
    stages = {
        stage: statistics.summarize([sample[stage] for sample in samples])
        for stage in ("total", "text_encoder", "vae_decoder")
    }
    stages["step"] = statistics.summarize([step for sample in samples for step in sample["steps"]])
    refused += statistics.refuse_noise(f"the time of a picture of {name}", stages["total"].spread)
    return {
        **summary,
        "seconds": stages,
        "pictures_per_second": batch / stages["total"].p50,
        "evaluations": samples[0]["evaluations"],
        "refused": refused,
    }


def _ratio(ours: str, theirs: str, loaded: dict[str, Any], turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    samples = {name: [turn["times"][name] for turn in turns] for name in (ours, theirs)}
    decibels = [turn["psnr_db"][f"{ours} / {theirs}"] for turn in turns]
    found = statistics.pair_ratios(*([sample["total"] for sample in samples[name]] for name in (ours, theirs)))
    refused = statistics.refuse_pictures(
        ours, theirs, decibels, (loaded[ours]["precision"], loaded[theirs]["precision"])
    )
    refused += statistics.refuse_noise(f"the ratio of {theirs} to {ours}", found.spread)
    refused += [
        reason for name in samples for sample in samples[name] for reason in statistics.refuse_timing(name, sample)
    ][:1]
    return {
        "ours": ours,
        "theirs": theirs,
        "ratio": None if refused else found,
        "psnr_db": min(decibels),
        "refused": refused,
    }


def show(found: dict[str, Any]) -> None:
    """Prints a configuration."""
    rows = []
    for name, side in found["sides"].items():
        if "seconds" in side:
            stages = [side["seconds"][stage] for stage in ("total", "text_encoder", "step", "vae_decoder")]
            memory = f"{side['peak_bytes'] / 2**30:.2f}" if side["peak_bytes"] else ""
            rows.append(
                [
                    name,
                    stages[0].n,
                    *(f"{stages[0].__dict__[key]:.3f}" for key in ("min", "p50", "p90", "p99")),
                    *(f"{stage.p50:.4f}" for stage in stages[1:]),
                    f"{side['pictures_per_second']:.3g}",
                    side["evaluations"],
                    memory,
                    f"{side['first_picture_s']:.2f}",
                    f"{side['load_s']:.2f}",
                ]
            )
    if rows:
        print_table(
            [
                "side",
                "pictures",
                "min s",
                "p50",
                "p90",
                "p99",
                "text p50",
                "step p50",
                "VAE p50",
                "pictures/s",
                "U-Net calls",
                "peak GiB",
                "first s",
                "load s",
            ],
            rows,
        )
    if found.get("disturbed"):
        print(f"{found['disturbed']} turns were disturbed by other programs and are not counted")
    for ratio in found["ratios"]:
        if ratio["ratio"]:
            r = ratio["ratio"]
            print(
                f"{ratio['theirs']} takes {r.p50:.2f} times as long as {ratio['ours']} (spread {r.spread:.0%}, {r.n} "
                f"pairs, PSNR {ratio['psnr_db']:.1f} dB)"
            )
    for reason in [reason for part in (*found["sides"].values(), *found["ratios"]) for reason in part["refused"]]:
        print(f"refused: {reason}")


SILENCE = 30.0
"""Seconds between two lines of progress without a terminal."""
_last_line = [perf_counter()]


def progress(text: str) -> None:
    """Shows progress: a line that is rewritten on a terminal, and elsewhere a new line from time to time."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and perf_counter() - _last_line[0] > SILENCE:
        _last_line[0] = perf_counter()
        print(text, file=sys.stderr, flush=True)
