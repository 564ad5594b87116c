"""Keeps the exporter's libraries from printing over its progress, from sending anything, and from leaving files
behind."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from contextlib import suppress

from engine.libraries import turn_telemetry_off

TORCH_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def leave_nothing_behind() -> None:
    """Turns telemetry off, and removes torch's empty folder in the temporary directory at exit. Call it before the
    libraries are imported.

    diffusers imports ONNX Runtime by itself. torch makes a folder for compiled code when it is imported and puts its
    name into the environment; one that holds nothing is removed at the end of the process, unless the user named it.
    """
    turn_telemetry_off("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
    if TORCH_FOLDER not in os.environ:
        atexit.register(_remove_empty_folder)


def _remove_empty_folder() -> None:
    with suppress(OSError):
        os.rmdir(os.environ.get(TORCH_FOLDER, ""))


def quiet_libraries() -> None:
    """Silences progress bars, advice and deprecation notes of torch, transformers and diffusers. Call it before they
    are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="torch|onnxscript|transformers|diffusers|copyreg")
    for name in ("transformers", "diffusers", "torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
