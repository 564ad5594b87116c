"""How far pictures are from float32 diffusers', by backend and precision: PSNR and largest difference over several
seeds."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np

from benchmarks import statistics
from benchmarks.latency import GUIDANCE, common_arguments, names, opened, progress, pythons, request_of, setups_of
from benchmarks.options import integer_from
from benchmarks.report import conditions, print_table, write_json
from benchmarks.sides import Request
from engine.backends import default_backend
from engine.bundle import Bundle
from engine.picture import psnr

REFERENCE = "diffusers-fp32"


def arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser)
    parser.add_argument(
        "--against",
        default="diffusers-bf16",
        metavar="A,B",
        help="other sides to compare with float32 diffusers (default: diffusers-bf16)",
    )
    parser.add_argument(
        "--pictures", type=integer_from(1), default=8, metavar="N", help="prompts and seeds (default: 8)"
    )


def run(options: argparse.Namespace) -> None:
    """Compares every side with float32 diffusers; Ctrl-C keeps the pictures that are complete."""
    bundle = Bundle.open(options.bundle, verify=False)
    sides = [*names(options.backend or default_backend()), *names(options.against)]
    setups = setups_of(bundle, [REFERENCE, *sides], options)
    height, width = bundle.shapes.height.opt, bundle.shapes.width.opt
    request, found, interrupted = Request("", 0, height, width, 1, options.steps, GUIDANCE, ""), [], False
    with opened(setups, pythons(options.python)) as (opened_sides, skipped), tempfile.TemporaryDirectory() as folder:
        described = {
            side.name: {"description": side.loaded["description"], "precision": side.loaded["precision"]}
            for side in opened_sides
        }
        try:
            for index in range(options.pictures):
                progress(f"picture {index + 1} of {options.pictures}")
                for side in opened_sides:
                    side.picture(request_of(request, index, side, folder))
                found.append({side.name: np.load(f"{folder}/{side.name}.npy") for side in opened_sides})
        except KeyboardInterrupt:
            if not found:
                raise
            interrupted = True
    progress("")
    content = {
        "benchmark": "parity",
        "bundle": bundle.name,
        "height": height,
        "width": width,
        "steps": options.steps,
        "scheduler": setups[0].sampler,
        "guidance_scale": GUIDANCE,
        "pictures": len(found),
        "interrupted": interrupted,
        "skipped": skipped,
        "sides": evaluate(found, described),
    }
    show(content)
    write_json(options.json, {**statistics.as_json(content), **conditions()})


def evaluate(pictures: list[dict[str, np.ndarray]], described: dict[str, dict[str, str]]) -> dict[str, Any]:
    """For every side except the reference: the lowest and the median PSNR in dB, and the largest difference of 255."""
    sides: dict[str, Any] = {}
    for name in [name for name in described if name != REFERENCE] if pictures else []:
        decibels = [psnr(made[name], made[REFERENCE]) for made in pictures]
        largest = max(int(np.abs(made[name].astype(int) - made[REFERENCE].astype(int)).max()) for made in pictures)
        sides[name] = {
            **described[name],
            "psnr_min_db": min(decibels),
            "psnr_median_db": float(np.median(decibels)),
            "max_difference": largest,
        }
    return sides


def show(content: dict[str, Any]) -> None:
    """Prints a table."""
    rows = [
        [name, side["precision"], f"{side['psnr_min_db']:.1f}", f"{side['psnr_median_db']:.1f}", side["max_difference"]]
        for name, side in content["sides"].items()
    ]
    print_table(
        [
            f"{content['pictures']} pictures beside {REFERENCE}'s",
            "precision",
            "worst PSNR dB",
            "median",
            "largest difference of 255",
        ],
        rows,
    )
