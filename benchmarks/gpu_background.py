"""Runs benchmarks.gpu in the background: it outlives the shell that started it, and reports its progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOG, STATUS = "gpu.log", "gpu-status.json"
LOG_LINES = 12


def detach(folder: Path, arguments: Sequence[str]) -> str:
    """Starts the run in a session of its own, so closing the terminal does not end it. Returns a line that says what to
    do next."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATUS).unlink(missing_ok=True)
    with open(folder / LOG, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.gpu", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    if not (folder / STATUS).exists():  # it tells of itself once it has imported everything
        _write(folder, {"pid": process.pid, "running": "starting", "since": time.time(), "ended": []})
    return f"process {process.pid} runs in the background; ask: python -m benchmarks.gpu --status --output {folder}"


@contextmanager
def told(folder: Path) -> Iterator[Callable[[str], None]]:
    """Keeps the status of this run. The block gets a function that records what begins now."""
    state: dict[str, Any] = {"pid": os.getpid(), "running": None, "since": time.time(), "ended": []}

    def close() -> None:
        if state["running"]:
            state["ended"].append(f"{state['running']}, {time.time() - state['since']:.0f} s")

    def tell(part: str) -> None:
        close()
        state.update(running=part, since=time.time())
        _write(folder, state)

    try:
        yield tell
    finally:
        close()
        state["running"] = None
        _write(folder, state)


def status(folder: Path) -> str:
    """Text about what runs, what has ended, and the end of the log."""
    try:
        state = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return f"no run has left a status in {folder}"
    if state["running"] is None:
        lines = ["the run has ended"]
    elif alive(state["pid"]):
        lines = [f"running: {state['running']}, for {time.time() - state['since']:.0f} s (process {state['pid']})"]
    else:
        lines = [
            f"process {state['pid']} is gone; it was at {state['running']}. Start it again: finished plans are not "
            "built again"
        ]
    lines += [f"ended: {part}" for part in state["ended"]]
    if (folder / LOG).is_file():
        lines += ["", *(folder / LOG).read_text(errors="replace").splitlines()[-LOG_LINES:]]
    return "\n".join(lines)


def alive(pid: int) -> bool:
    """Whether there is a process of that number, and it is not a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except (FileNotFoundError, IndexError):
        return not Path("/proc").is_dir()


def _write(folder: Path, state: dict[str, Any]) -> None:
    unfinished = folder / f".{STATUS}.tmp"
    unfinished.write_text(json.dumps(state))
    os.replace(unfinished, folder / STATUS)
