"""A process that answers questions, one JSON object a line. Several can take turns, each with its own libraries and its
own peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.errors import SideError, SkippedSide

ROOT = Path(__file__).parents[1]
PATIENCE = 3.0


class Worker:
    """A process of `module`, which calls `serve`. Its failures are raised here as SkippedSide or SideError."""

    def __init__(self, name: str, module: str, python: str = sys.executable) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the process that waits
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Asks the process and returns its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            raise SideError(
                f"the process of {self.name} ended with status {self._process.returncode}; the reason is printed above"
            )
        answer = json.loads(line)
        for kind in (SkippedSide, SideError):
            if kind.__name__ in answer:
                self.close()
                raise kind(f"{self.name}: {answer[kind.__name__]}")
        return dict(answer)

    def close(self) -> None:
        """Ends the process. One that waits for a question cleans up. One that is busy for PATIENCE seconds is
        killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The process's end: answers until its input ends or something fails."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not get between the answers
    try:
        for line in sys.stdin:
            print(json.dumps(_caught(answer, json.loads(line))), file=answers, flush=True)
    except KeyboardInterrupt:
        pass


def _caught(answer: Callable[[dict[str, Any]], dict[str, Any]], question: dict[str, Any]) -> dict[str, Any]:
    try:
        return answer(question)
    except SkippedSide as error:
        return {"SkippedSide": str(error)}
    except Exception as error:
        return {"SideError": f"{type(error).__name__}: {error}"}


def peak_bytes() -> int:
    """The largest resident set that this process had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
