"""How far a build in another thread is: a line on a terminal, a message now and then elsewhere. Ctrl-C stops the
build."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

Result = TypeVar("Result")

THREAD = "tensorrt-build"
REDRAW_SECONDS = 0.2
REPORT_SECONDS = 60


class Phases:
    """What TensorRT's progress monitor tells: nested phases of so many steps each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._reached = 0.0
        self.cancelled = False
        self.known = False

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self.known = True
            self._phases[phase] = (parent, max(steps, 1), 0)

    def step(self, phase: str, number: int) -> bool:
        """Whether the build shall go on."""
        with self._lock:
            if phase in self._phases:
                parent, steps, _ = self._phases[phase]
                self._phases[phase] = (parent, steps, number + 1)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        with self._lock:
            parent, _, _ = self._phases.pop(phase, (None, 1, 0))
            if parent is None:
                self._reached = 1.0

    def fraction(self) -> float:
        """0 to 1, never going back."""
        with self._lock:
            roots = [
                self._fraction(name) for name, (parent, _, _) in self._phases.items() if parent not in self._phases
            ]
            self._reached = max([self._reached, *roots])
            return self._reached

    def _fraction(self, phase: str) -> float:
        _, steps, done = self._phases[phase]
        inside = [self._fraction(name) for name, (parent, _, _) in self._phases.items() if parent == phase]
        return min(1.0, (done + max(inside, default=0.0)) / steps)


def monitor(trt: Any, phases: Phases) -> Any:
    """TensorRT's IProgressMonitor, telling `phases`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def watch(
    work: Callable[[], Result], label: str, phases: Phases, cancellable: bool, report: Callable[[str], None]
) -> Result:
    """The result of `work`, done in another thread while this one shows how far it is and takes Ctrl-C.

    A build that can be cancelled is, and KeyboardInterrupt follows when it has ended; one that cannot is left behind at
    once."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    started = reported = perf_counter()
    terminal = sys.stderr.isatty()
    thread.start()
    try:
        while thread.is_alive():
            thread.join(REDRAW_SECONDS)
            now = perf_counter()
            line = f"{label}: {f'{phases.fraction():.0%} of the build, ' if phases.known else ''}{now - started:.0f} s"
            if terminal:
                print(f"\r{line} ", end="", file=sys.stderr, flush=True)
            elif now - reported > REPORT_SECONDS:
                report(line)
                reported = now
    except KeyboardInterrupt:
        phases.cancelled = True
        if cancellable:
            thread.join()
        raise
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def left_behind() -> bool:
    """Whether a build that could not be cancelled is still running."""
    return any(thread.name == THREAD and thread.is_alive() for thread in threading.enumerate())
