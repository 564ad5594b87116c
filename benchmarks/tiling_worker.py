"""Decodes one picture of random latents, in tiles or whole, and prints the seconds: a process of its own for
`benchmarks/tiling.py`, so that the system counts its memory."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from engine.backends.host import HostCoder
from engine.backends.interface import decode_in_tiles
from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.backends.openvino.backend import OpenVinoBackend
from engine.family import STABLE_DIFFUSION
from engine.tiling import Tiles


def main(graph: str, backend: str, side: int, tile: int) -> None:
    """`side` and `tile` in pixels; a tile of 0 decodes the whole picture at once."""
    kinds = {"onnxruntime": OnnxRuntimeBackend, "openvino": OpenVinoBackend}
    coder: HostCoder = kinds[backend]({"vae_decoder": Path(graph)})
    factor = STABLE_DIFFUSION.factor
    latents = np.random.default_rng(0).standard_normal((1, 4, side // factor, side // factor), np.float32)
    tiles = Tiles.of(tile or False, side, side, factor, ())
    started = perf_counter()
    decoded = coder.decode(latents) if tiles is None else decode_in_tiles(coder.decode, latents, tiles)
    print(f"{perf_counter() - started:.1f} {decoded.image.shape}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
