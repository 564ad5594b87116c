"""Import, process start to saved picture and installed packages of the runtime, against diffusers. Part of `overhead`.

Every measurement is a fresh process; ours and diffusers' alternate, so that a drift of the machine hits both.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.errors import SideError
from engine.backends import default_backend

REPEATS = 7
PROMPT = "a large red circle on a blue background"
STEPS = 20

IMPORT = """
import sys, time
started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
import psutil
print(seconds, psutil.Process().memory_info().rss)
"""
NOTHING = "pass"
OUR_IMPORT = "from engine import Pipeline; from engine.libraries import import_library; import_library({library!r})"
"""The imports. Ours includes the library that runs the graphs, because diffusers' includes torch."""
THEIR_IMPORT = "from diffusers import StableDiffusionPipeline"

OUR_PICTURE = """
import sys
from engine import Pipeline
result = Pipeline.load(sys.argv[1])({prompt!r}, num_inference_steps={steps}, guidance_scale=5.0, seed=0, progress=False)
result.images[0].save(sys.argv[2])
"""
THEIR_PICTURE = """
import sys
import torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, requires_safety_checker=False)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
pipeline({prompt!r}, num_inference_steps={steps}, guidance_scale=5.0, generator=generator).images[0].save(sys.argv[2])
"""


def measure_import(statement: str) -> tuple[float, int]:
    """Seconds of an import and the resident bytes of the process after it."""
    seconds, resident = _printed(IMPORT.format(statement=statement)).split()[-2:]
    return float(seconds), int(resident)


def measure_picture(code: str, model: Path, file: Path) -> float:
    """Seconds from the start of a process to a saved picture."""
    started = perf_counter()
    _printed(code.format(prompt=PROMPT, steps=STEPS), str(model), str(file))
    return perf_counter() - started


def _printed(code: str, *arguments: str) -> str:
    """The output of Python code in a process of its own. SideError if it fails."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip() or f"it ended with status {done.returncode}"
        raise SideError(f"a process that is measured failed: {words.splitlines()[-1]}")
    return done.stdout


def row(name: str, ours: list[float], theirs: list[float], digits: int = 2) -> dict[str, Any]:
    """Medians, and the median of the pairwise ratios with its spread."""
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    return {
        "what": name,
        "ours": round(statistics.median(ours), digits),
        "diffusers": round(statistics.median(theirs), digits),
        "ratio": round(statistics.median(ratios), 1),
        "ratio_min": round(ratios[0], 1),
        "ratio_max": round(ratios[-1], 1),
    }


def measure(bundle: Path) -> tuple[list[dict[str, Any]], float]:
    """Imports and pictures of both sides, taking turns; `bundle` is one of the built-in model. The rows, and the MiB of
    a bare process."""
    model = Path(__file__).parents[1] / "export" / "demo" / "model"
    our_import = OUR_IMPORT.format(library=default_backend())
    imports: dict[str, list[tuple[float, int]]] = {our_import: [], THEIR_IMPORT: []}
    pictures: dict[str, list[float]] = {OUR_PICTURE: [], THEIR_PICTURE: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS + 1):
            for statement in imports:
                measured = measure_import(statement)
                if repeat:  # the first round fills the disk cache
                    imports[statement].append(measured)
            for code, source in ((OUR_PICTURE, bundle), (THEIR_PICTURE, model)):
                seconds = measure_picture(code, source, Path(folder) / "picture.png")
                if repeat:
                    pictures[code].append(seconds)
    rows = [
        row(
            f"import, ours with {default_backend()}, s",
            [s for s, _ in imports[our_import]],
            [s for s, _ in imports[THEIR_IMPORT]],
            3,
        ),
        row(
            "memory after the import, MiB",
            [b / 2**20 for _, b in imports[our_import]],
            [b / 2**20 for _, b in imports[THEIR_IMPORT]],
            1,
        ),
        row(f"process start to saved picture ({STEPS} steps), s", pictures[OUR_PICTURE], pictures[THEIR_PICTURE]),
    ]
    return rows, round(measure_import(NOTHING)[1] / 2**20, 1)


def installed_sizes() -> list[dict[str, Any]]:
    """Packages and MiB that each choice installs, as far as it is installed here."""
    ours = ["numpy", "pillow", "tokenizers", "tqdm"]
    choices = {
        "LatentRT, ONNX Runtime": [*ours, "onnxruntime"],
        "LatentRT, OpenVINO": [*ours, "openvino"],
        "diffusers, torch": ["diffusers", "transformers", "accelerate", "torch"],
    }
    found = []
    for name, roots in choices.items():
        packages = closure(roots)
        found.append({"what": name, "packages": len(packages), "mib": round(sum(map(package_bytes, packages)) / 2**20)})
    return found


def closure(roots: list[str]) -> set[str]:
    """The installed packages among `roots` and everything that they require, without extras."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    waiting = [str(canonicalize_name(root)) for root in roots]
    while waiting:
        name = waiting.pop()
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            parsed = [Requirement(text) for text in required]
            waiting += [
                str(canonicalize_name(one.name))
                for one in parsed
                if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    return found


def package_bytes(name: str) -> int:
    """Bytes of the files of an installed package."""
    files = [Path(str(file.locate())) for file in metadata.files(name) or []]
    return sum(file.stat().st_size for file in files if file.is_file())
