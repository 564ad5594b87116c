"""The errors that benchmarks raise on purpose."""

from __future__ import annotations


class BenchmarkError(Exception):
    """Base class. `exit_code` is what the command exits with: 2 where the user's input is at fault, 1 where something
    failed."""

    exit_code = 1


class BenchmarkUsageError(BenchmarkError):
    """An argument of a command is not acceptable."""

    exit_code = 2


class UnknownSideError(BenchmarkUsageError):
    """There is no competitor or backend of that name."""


class NothingOfOursError(BenchmarkUsageError):
    """None of the backends that were asked for is installed."""


class SkippedSide(BenchmarkError):
    """A competitor's packages are not installed. The others are measured without it."""


class SideError(BenchmarkError):
    """The process of a competitor failed."""


class CountError(BenchmarkError):
    """A graph has a matrix operation of unknown cost, or unknown shapes."""


class ResultsError(BenchmarkError):
    """A stored result cannot be read."""
