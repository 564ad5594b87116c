"""Peak memory and time of Stable Diffusion's VAE decoder with random weights, in tiles and whole, on the CPU.

Each picture is decoded in a process of its own; the peak is the resident set that the system counted for it, with the
library and the weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.memory import measure
from benchmarks.options import check_room, integer_from
from benchmarks.report import conditions, print_table, write_json
from engine.family import STABLE_DIFFUSION
from engine.tiling import TILE

GRAPH_BYTES = 400_000_000
"""The decoder has 49.5 million weights of four bytes."""

WHOLE = (512, 1024)
"""Sides of pictures that are decoded at once: more needs tens of gigabytes."""
HEADER = ["VAE decoder of SD 1.5, random weights, fp32", "pixels", "how", "seconds", "peak GiB"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--side", type=integer_from(8), default=2048, metavar="PIXELS", help="of the tiled picture (default: 2048)"
    )
    parser.add_argument("--backend", default="onnxruntime,openvino", metavar="NAMES", help="default: both of the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(options: argparse.Namespace) -> None:
    """Traces the decoder, decodes, prints a table and writes the numbers."""
    check_room(
        Path(tempfile.gettempdir()),
        GRAPH_BYTES,
        "the decoder of Stable Diffusion in fp32",
        "name another folder: TMPDIR=FOLDER python -m benchmarks tiling",
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        graph = _trace(Path(folder))
        for backend in options.backend.split(","):
            for side, tile in [*((side, 0) for side in WHOLE), (options.side, TILE)]:
                _, peak, lines = measure(
                    ["-m", "benchmarks.tiling_worker", str(graph), backend, str(side), str(tile)], folder
                )
                how = f"tiles of {tile}" if tile else "whole"
                rows.append([backend, f"{side} x {side}", how, float(lines[-1].split()[0]), round(peak, 2)])
    print_table(HEADER, rows)
    write_json(options.json, {"benchmark": "tiling", "rows": rows, **conditions()})


def _trace(folder: Path) -> Path:
    import torch

    from export.graphs.tracing import export_onnx
    from export.graphs.vae import VaeDecoder
    from export.sources.random_weights import RandomWeights

    source, file = RandomWeights("sd15"), folder / "vae_decoder.onnx"
    module = VaeDecoder(source.vae(), torch.float32)
    export_onnx(STABLE_DIFFUSION["vae_decoder"], module, source.sizes(), file)
    return file
