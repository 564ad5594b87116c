"""Prints tables, and stores results in a JSON file with the conditions of the run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "optimum-onnx",
    "numpy",
    "pillow",
    "tokenizers",
)

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def conditions(module: str = "benchmarks") -> dict[str, Any]:
    """Hardware, clocks, driver, versions, command line (of `python -m module`), commit and time of this run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "clocks": _clocks(),
        "gpu": gpu(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The processor's name, and which of INSTRUCTIONS it has. Processors of one name differ in them, and so do their
    times."""
    info = Path("/proc/cpuinfo")
    first = info.read_text().split("\n\n", 1)[0] if info.is_file() else ""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    has = set(fields.get("flags", "").split())
    found = [name for name in INSTRUCTIONS if name in has]
    return f"{fields['model name']} ({', '.join(found) or 'none of ' + ', '.join(INSTRUCTIONS)})"


def _clocks() -> dict[str, Any]:
    """MHz of the cores now, and the governor that sets them, as far as the system tells."""
    info, governor = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    lines = info.read_text().splitlines() if info.is_file() else []
    return {
        "cpu_mhz": [round(float(line.split(":")[1])) for line in lines if line.startswith("cpu MHz")],
        "governor": governor.read_text().strip() if governor.is_file() else "unknown (not exposed)",
    }


def gpu() -> dict[str, str] | None:
    """Name, driver, clocks, power limit and temperature of the first GPU at this moment, by nvidia-smi; None without
    one."""
    fields = (
        "name",
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.limit",
        "temperature.gpu",
        "memory.total",
    )
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(fields, (value.strip() for value in done.stdout.splitlines()[0].split(","))))


def _commit() -> str | None:
    if not shutil.which("git"):
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return done.stdout.strip() or None


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table, with its columns in line."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Prints it."""
    print(markdown(header, rows), flush=True)


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Writes the numbers and prints where. Without a file, prints how to keep them."""
    if file is None:
        print("every sample, with hardware, versions and commit, goes into a file with --json FILE")
        return
    target = file.resolve()  # a link stays one
    unfinished = target.with_name(f".{target.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, target)
    print(f"wrote {file}")
