"""Measures the share of the processors that other programs, and other guests of the host, use."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

DISTURBED = 0.05
"""The largest share of our processors that others may use."""


@dataclass(frozen=True)
class Load:
    """Seconds of processor time since the machine started: of everybody, and of some processes."""

    at: float
    everybody: float
    ours: float


def load(pids: Sequence[int]) -> Load | None:
    """The load now. None without /proc."""
    if sys.platform != "linux":
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    ours = sum(_ticks(pid) for pid in pids)
    return Load(perf_counter(), (user + nice + system + irq + softirq + steal) / tick, ours / tick)


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def others_share(before: Load | None, after: Load | None) -> float:
    """The share of all processors' time between two moments that others used. 0 if it is unknown."""
    if before is None or after is None:
        return 0.0
    others = (after.everybody - before.everybody) - (after.ours - before.ours)
    return max(0.0, others / ((os.cpu_count() or 1) * (after.at - before.at)))


def allowed_share(threads: int) -> float:
    """The share that others may use while we use so many threads (0: all processors): the processors that are left
    over, and a little."""
    return DISTURBED + (max(0.0, 1 - threads / (os.cpu_count() or 1)) if threads else 0.0)


def wait_until_quiet(pids: Sequence[int], seconds: float, allowed: float = DISTURBED) -> bool:
    """True as soon as others have been quiet for a second, False after so many seconds."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        before = load(pids)
        sleep(1.0)
        if others_share(before, load(pids)) < allowed:
            return True
    return False
