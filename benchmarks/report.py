"""What every benchmark prints and stores: a table, and a JSON file with the conditions of the run."""
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

PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "numpy", "pillow", "tokenizers")


def conditions() -> dict[str, Any]:
    """Hardware, versions, command line, commit and time of this run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(), "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
        "versions": versions, "command": " ".join(sys.argv), "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() or None


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """A Markdown table."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    print("\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]))


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Prints where the numbers went, or the numbers themselves where no file is given."""
    if file is None:
        print(json.dumps(content))
        return
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, file)
    print(f"wrote {file}")
