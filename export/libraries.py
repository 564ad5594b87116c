"""Keeps the libraries of the exporter from talking over its own progress."""
from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Before they are imported: no progress bars, advice or deprecation notes from torch, transformers and diffusers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="torch|onnxscript|transformers|diffusers|copyreg")
    for name in ("transformers", "diffusers", "torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
