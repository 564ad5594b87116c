"""The latency of each component, and how close it is to the hardware's limits.

Operations and bytes are counted from the bundle's ONNX graphs; the rates of matrix products and copying are measured,
through the fastest library that is installed; the floor is the sum over the matrix operations of what takes longer,
arithmetic or memory, so nothing that runs them one by one is below it. Our OpenVINO backend leaves a few per cent of
them out (engine/backends/openvino/rewrites.py and openvino/parts.py); they are counted all the same, as the work that
the model asks for.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import statistics
from benchmarks.counters import count, sizes_of
from benchmarks.errors import NothingOfOursError
from benchmarks.latency import GUIDANCE, common_arguments, names, opened, parse_size, pythons, request_of, setups_of
from benchmarks.machine import copy_rate, matrix_rate
from benchmarks.options import integer_from
from benchmarks.report import conditions, print_table, write_json
from benchmarks.sides import Request
from engine.backends import default_backend
from engine.bundle import Bundle
from engine.checks import check_shapes


def arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser)
    parser.add_argument("--sizes", metavar="WxH", help="pixels (default: what the bundle is best at)")
    parser.add_argument(
        "--pictures", type=integer_from(1), default=5, metavar="N", help="after the warm-up (default: 5)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the roofline")


def run(options: argparse.Namespace) -> None:
    """Counts, measures, prints a table and writes the numbers."""
    bundle = Bundle.open(options.bundle, verify=False)
    backends = names(options.backend or default_backend())
    width, height = parse_size(options.sizes) if options.sizes else (bundle.shapes.width.opt, bundle.shapes.height.opt)
    check_shapes(height, width, 1, 2, (bundle.shapes,), bundle.command, bundle.family.factor)
    content: dict[str, Any] = {
        "benchmark": "roofline",
        "bundle": bundle.name,
        "height": height,
        "width": width,
        "batch": 1,
        "steps": options.steps,
        "threads": options.threads,
        "backends": {},
    }
    setups = setups_of(bundle, backends, options)
    missing: NothingOfOursError | None = None
    for setup in setups:
        try:
            with opened([setup], pythons(options.python)) as (sides, _), tempfile.TemporaryDirectory() as folder:
                request = Request("", 0, height, width, 1, options.steps, GUIDANCE, "")
                samples = [
                    sides[0].picture(request_of(request, i, sides[0], folder)) for i in range(options.pictures + 1)
                ][1:]
                precision = sides[0].loaded["precisions"]
        except NothingOfOursError as error:  # the others are measured without it
            missing = error
            continue
        content["backends"][setup.side] = evaluate(
            bundle, setup.side.removesuffix("-fp32"), precision, height, width, samples, options.threads
        )
    if missing and not content["backends"]:
        raise missing
    show(content)
    write_json(options.json, {**statistics.as_json(content), **conditions()})
    if options.plot:
        from benchmarks.plots import roofline

        roofline(statistics.as_json(content), options.plot)


def evaluate(
    bundle: Bundle,
    library: str,
    precisions: dict[str, str],
    height: int,
    width: int,
    samples: list[dict[str, Any]],
    threads: int,
) -> dict[str, Any]:
    """Counts, rates, floors and what was reached, for each component and for the picture."""
    device = "cuda" if library == "tensorrt" else "cpu"
    required = bundle.family.required
    bandwidth = copy_rate(device, threads)
    rates = {
        precision: matrix_rate(device, precision, threads)
        for precision in sorted({precisions[component] for component in required})
    }
    seconds = {name: [sample[name] for sample in samples] for name in required if name != "denoiser"}
    seconds["denoiser"] = [step for sample in samples for step in sample["steps"]]
    components: dict[str, Any] = {}
    for component in required:
        precision = precisions[component]
        counted = count(bundle.graphs[component], sizes_of(height, width, 1, 2), 4 if precision == "fp32" else 2)
        measured, floor = statistics.summarize(seconds[component]), counted.floor(rates[precision], bandwidth)
        components[component] = {
            "precision": precision,
            "flop": counted.flop,
            "bytes": counted.bytes,
            "weights": counted.weights,
            "seconds": measured,
            "floor": floor,
            "reached": floor / measured.p50,
            "flop_per_second": counted.flop / measured.p50,
            "flop_per_byte": counted.flop / counted.bytes,
        }
    calls = {**dict.fromkeys(required, 1), "denoiser": samples[0]["evaluations"]}
    floor, total = (
        sum(calls[name] * components[name]["floor"] for name in required),
        statistics.summarize([sample["total"] for sample in samples]),
    )
    refused = statistics.refuse_noise("the time of a picture", total.spread)
    return {
        "flop_per_second": rates,
        "bytes_per_second": bandwidth,
        "components": components,
        "refused": refused,
        "picture": {
            "evaluations": calls["denoiser"],
            "flop": sum(calls[name] * components[name]["flop"] for name in required),
            "seconds": total,
            "floor": floor,
            "reached": floor / total.p50,
        },
    }


def show(content: dict[str, Any]) -> None:
    """Prints a table for each backend."""
    for name, found in content["backends"].items():
        rates = ", ".join(
            f"{precision} {rate / 1e9:.0f} GFLOP/s" for precision, rate in found["flop_per_second"].items()
        )
        print(f"{name}: matrix products {rates}; copying {found['bytes_per_second'] / 1e9:.1f} GB/s")
        rows = [
            [
                component,
                c["precision"],
                f"{c['flop'] / 1e9:.4g}",
                f"{c['bytes'] / 1e9:.4g}",
                f"{1e3 * c['floor']:.4g}",
                f"{1e3 * c['seconds'].p50:.4g}",
                f"{c['reached']:.0%}",
            ]
            for component, c in found["components"].items()
        ]
        p = found["picture"]
        rows.append(
            [
                f"picture, {p['evaluations']} U-Net calls",
                "",
                f"{p['flop'] / 1e9:.4g}",
                "",
                f"{1e3 * p['floor']:.4g}",
                f"{1e3 * p['seconds'].p50:.4g}",
                f"{p['reached']:.0%}",
            ]
        )
        print_table(["", "precision", "GFLOP", "GB", "floor ms", "measured ms", "reached"], rows)
        for reason in found["refused"]:
            print(f"refused: {reason}")
