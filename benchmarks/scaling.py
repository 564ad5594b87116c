"""How time and memory grow with steps, batch and pixels: each point in a process of its own, in rounds over all points
so that a drift of the machine shows as their spread, and the exponent that fits them."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import statistics
from benchmarks.latency import GUIDANCE, common_arguments, names, opened, progress, pythons, request_of, setups_of
from benchmarks.options import integer_from
from benchmarks.report import conditions, print_table, write_json
from benchmarks.sides import Request, Setup
from engine.backends import default_backend
from engine.bundle import Bundle
from engine.contract import Range
from engine.family import STABLE_DIFFUSION


def arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser)
    parser.add_argument(
        "--pictures",
        type=integer_from(1),
        default=5,
        metavar="N",
        help="for each point in each round, after the warm-up (default: 5)",
    )
    parser.add_argument("--rounds", type=integer_from(1), default=3, metavar="N", help="over all points (default: 3)")
    parser.add_argument("--plot", type=Path, metavar="FILE")


def run(options: argparse.Namespace) -> None:
    """Measures the points that the bundle allows; Ctrl-C keeps those that are complete."""
    bundle = Bundle.open(options.bundle, verify=False)
    setup = setups_of(bundle, names(options.backend or default_backend())[:1], options)[0]
    shapes = bundle.shapes
    base = Request("", 0, shapes.height.opt, shapes.width.opt, shapes.batch.opt, options.steps, GUIDANCE, "")
    points: dict[str, list[tuple[int, Request]]] = {
        "steps": [
            (steps, _with(base, steps=steps))
            for steps in sorted({max(1, options.steps // part) for part in (4, 2, 1)} | {2 * options.steps})
        ],
        "batch": [(batch, _with(base, batch=batch)) for batch in (1, 2, 4, 8) if batch in shapes.batch],
        "pixels": [
            (height * width, _with(base, height=height, width=width))
            for height, width in zip(_sides(shapes.height), _sides(shapes.width))
        ],
    }
    content: dict[str, Any] = {
        "benchmark": "scaling",
        "bundle": bundle.name,
        "backend": setup.side,
        "base": base.__dict__,
        "threads": options.threads,
        "rounds": 0,
        "interrupted": False,
    }
    measured: dict[str, dict[int, list[dict[str, Any]]]] = {
        axis: {value: [] for value, _ in requests} for axis, requests in points.items()
    }
    try:
        for number in range(1, options.rounds + 1):
            for axis, requests in points.items():
                for value, request in requests:
                    progress(f"round {number} of {options.rounds}: {axis} {value}")
                    measured[axis][value].append(measure(setup, pythons(options.python), request, options.pictures))
            content["rounds"] = number
    except KeyboardInterrupt:
        if not any(rounds for found in measured.values() for rounds in found.values()):
            raise
        content["interrupted"] = True
    progress("")
    content["against"] = {
        axis: {"points": [{axis: value, **_point(rounds)} for value, rounds in found.items() if rounds]}
        for axis, found in measured.items()
    }
    for axis, found in content["against"].items():
        found |= fit(axis, found["points"])
    show(content)
    write_json(options.json, {**statistics.as_json(content), **conditions()})
    if options.plot:
        from benchmarks.plots import scaling

        scaling(statistics.as_json(content), options.plot)


def _with(request: Request, **changes: Any) -> Request:
    return Request(**{**request.__dict__, **changes})


def _sides(side: Range) -> list[int]:
    """Half, once, one and a half times and twice the best size, as far as the range goes."""
    factor = STABLE_DIFFUSION.factor
    found = {side.opt * part // 2 // factor * factor for part in (1, 2, 3, 4)}
    return [value if value in side else side.opt for value in sorted(found)] if not side.static else [side.opt]


def measure(setup: Setup, interpreters: dict[str, str], request: Request, pictures: int) -> dict[str, Any]:
    """Seconds of the pictures of one point in one round, and peak memory."""
    with opened([setup], interpreters) as (sides, _), tempfile.TemporaryDirectory() as folder:
        samples = [sides[0].picture(request_of(request, i, sides[0], folder)) for i in range(pictures + 1)][1:]
        return {"totals": [sample["total"] for sample in samples], **sides[0].finish()}


def _point(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """A summary of all rounds of a point."""
    total = statistics.summarize([seconds for found in rounds for seconds in found["totals"]])
    memory = {
        name: max((found[name] for found in rounds if found[name] is not None), default=None)
        for name in ("peak_bytes", "device_bytes")
    }
    return {"seconds": total, "refused": statistics.refuse_noise("the time of a picture", total.spread), **memory}


def fit(axis: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """The exponents of time and memory. None if there are too few sizes."""
    usable = [point for point in points if not point["refused"]]
    sizes = [point[axis] for point in usable]
    if len(set(sizes)) < 2:
        return {"time_exponent": None, "memory_exponent": None}
    return {
        "time_exponent": statistics.fitted_exponent(sizes, [point["seconds"].p50 for point in usable]),
        "memory_exponent": statistics.fitted_exponent(sizes, [point["peak_bytes"] for point in usable]),
    }


def show(content: dict[str, Any]) -> None:
    """Prints a table for each axis."""
    for axis, found in content["against"].items():
        rows = [
            [
                point[axis],
                f"{point['seconds'].p50:.4g}",
                f"{point['seconds'].spread:.0%}",
                f"{point['peak_bytes'] / 2**30:.2f}",
                "; ".join(point["refused"]),
            ]
            for point in found["points"]
        ]
        print_table([axis, "p50 s", "spread", "peak GiB", "refused"], rows)
        if found["time_exponent"] is not None:
            print(
                f"time grows with {axis} to the power {found['time_exponent']:.2f}, memory "
                f"{found['memory_exponent']:.2f}"
            )
