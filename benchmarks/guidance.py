"""What guidance intervals save and what they change: seconds per picture beside guidance at every evaluation, PSNR to
that picture, and for the built-in model how many pictures show what they were asked for.

Each scene is made with every interval in turn, one picture a call, and the turns begin with another interval each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import statistics
from benchmarks.latency import GUIDANCE, progress
from benchmarks.options import integer_from
from benchmarks.report import conditions, print_table, write_json
from engine import Pipeline
from engine.argument_types import interval, number
from engine.guidance import inside_interval
from engine.picture import psnr
from export.demo.judge import judge, scenes_to_ask_for
from export.demo.pictures import Scene, caption

INTERVALS = "0:0.25,0:0.5,0:0.75,0.25:0.75,0.25:1,0.5:1"
FULL = (0.0, 1.0)
Interval = tuple[float, float]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, default=Path("engines/demo"), metavar="FOLDER")
    parser.add_argument("--backend", metavar="NAME", help="default: as for a picture")
    parser.add_argument("--threads", type=integer_from(0), metavar="N", help="default: every core")
    parser.add_argument("--steps", type=integer_from(1), default=20, metavar="N", help="default: 20")
    parser.add_argument("--guidance-scale", type=number(low=1.0), default=GUIDANCE, metavar="G", help="default: 7.5")
    parser.add_argument("--intervals", type=intervals, default=intervals(INTERVALS), metavar="START:END,...")
    parser.add_argument("--pictures", type=integer_from(1), default=96, metavar="N", help="scenes (default: 96)")
    parser.add_argument("--json", type=Path, metavar="FILE")


def intervals(text: str) -> list[Interval]:
    """A type for argparse: intervals, separated by commas."""
    return [interval(one) for one in text.split(",")]


def run(options: argparse.Namespace) -> None:
    """Measures the intervals; Ctrl-C keeps the scenes that are complete."""
    wanted = [FULL, *(one for one in options.intervals if one != FULL)]
    scenes = [list(scenes_to_ask_for())[i % 96] for i in range(options.pictures)]
    turns: list[list[tuple[float, np.ndarray]]] = []
    with Pipeline.load(options.bundle, backend=options.backend, threads=options.threads or None) as pipeline:
        interrupted = _measure(pipeline, scenes, wanted, options, turns)
        content: dict[str, Any] = {
            "benchmark": "guidance",
            "bundle": pipeline.bundle.name,
            "backend": pipeline.description,
            "steps": options.steps,
            "guidance_scale": options.guidance_scale,
            "pictures": len(turns),
            "judged": pipeline.bundle.name == "demo",
            "interrupted": interrupted,
        }
    content["intervals"] = evaluate(scenes, wanted, turns, options.steps, content["judged"])
    show(content)
    write_json(options.json, {**statistics.as_json(content), **conditions()})


def _measure(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    wanted: Sequence[Interval],
    options: argparse.Namespace,
    turns: list[list[tuple[float, np.ndarray]]],
) -> bool:
    """Adds the seconds and the picture of each interval to `turns`, scene by scene. Whether Ctrl-C ended it."""
    for one in wanted:
        picture(pipeline, scenes[0], 0, one, options)  # compiles what it needs
    try:
        for index, scene in enumerate(scenes):
            progress(f"scene {index + 1} of {len(scenes)}")
            order = [(index + i) % len(wanted) for i in range(len(wanted))]
            made = {i: picture(pipeline, scene, index, wanted[i], options) for i in order}
            turns.append([made[i] for i in range(len(wanted))])
    except KeyboardInterrupt:
        if not turns:
            raise
        return True
    finally:
        progress("")
    return False


def picture(
    pipeline: Pipeline, scene: Scene, seed: int, one: Interval, options: argparse.Namespace
) -> tuple[float, np.ndarray]:
    """Seconds of a call, and its picture [H, W, 3] uint8."""
    started = perf_counter()
    result = pipeline(
        caption(scene),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        seed=seed,
        progress=False,
        guidance_interval=one,
    )
    return perf_counter() - started, np.asarray(result.images[0])


def evaluate(
    scenes: Sequence[Scene],
    wanted: Sequence[Interval],
    turns: Sequence[Sequence[tuple[float, np.ndarray]]],
    steps: int,
    judged: bool,
) -> list[dict[str, Any]]:
    """For each interval: the share of the U-Net's rows that are left, the ratio of its seconds to those of guidance
    everywhere, scene by scene, and what it changes."""
    found = []
    for place, one in enumerate(wanted):
        seconds = [turn[place][0] for turn in turns]
        pictures = [turn[place][1] for turn in turns]
        decibels = [psnr(made, turn[0][1]) for made, turn in zip(pictures, turns)]
        right = [judge(made).agrees(scene) for made, scene in zip(pictures, scenes)] if judged else []
        found.append(
            {
                "interval": list(one),
                "rows": (1 + inside_interval(one, steps).mean()) / 2,
                "seconds": statistics.summarize(seconds),
                "ratio": statistics.pair_ratios([turn[0][0] for turn in turns], seconds),
                "psnr_median_db": float(np.median(decibels)),
                "psnr_min_db": min(decibels),
                "right": sum(right) if judged else None,
            }
        )
    return found


def table(content: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of the results."""
    header = ["guidance in", "rows of the U-Net", "seconds, ratio", "median PSNR dB", f"right of {content['pictures']}"]
    rows = [
        [
            "{:g} to {:g}".format(*one["interval"]),
            f"{one['rows']:.3f}",
            f"{one['ratio']['p50']:.3f}",
            "same" if one["interval"] == list(FULL) else f"{one['psnr_median_db']:.1f}",
            "not judged" if one["right"] is None else one["right"],
        ]
        for one in content["intervals"]
    ]
    return header, rows


def show(content: dict[str, Any]) -> None:
    """Prints a table."""
    print_table(*table(statistics.as_json(content)))
