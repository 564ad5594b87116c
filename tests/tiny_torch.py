"""Runs a module that knows one architecture more, "tiny": the U-Net of the tests' models.

python -m tests.tiny_torch -m benchmarks.gpu_graphs --model tiny ...
"""

import runpy
import sys
from dataclasses import replace

from export.sources.presets import ARCHITECTURES

from .models import UNET

ARCHITECTURES["tiny"] = replace(
    ARCHITECTURES["sd15"], unet={**UNET, "attention_head_dim": 2}
)  # heads of 16 and 32, as fused attention wants them
if __name__ == "__main__":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
