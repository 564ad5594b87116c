"""The errors that building raises on purpose."""

from __future__ import annotations


class ExportError(Exception):
    """Base class of the errors of building. `exit_code` is what the command exits with: 2 where the user's input is at
    fault, 1 where something failed."""

    exit_code = 1


class UsageError(ExportError):
    """An argument of the command is not acceptable."""

    exit_code = 2


class UnknownModelError(ExportError):
    """The model is neither a file, a folder, a hub id nor a known architecture."""

    exit_code = 2


class UnreadableModelError(ExportError):
    """The model's files are damaged, incomplete, or in an unknown layout."""

    exit_code = 2


class UnsupportedModelError(ExportError):
    """The model is of a kind that the graphs do not support."""

    exit_code = 2


class UnsafePickleError(ExportError):
    """A checkpoint is a pickle that holds more than tensors."""

    exit_code = 2


class NoNetworkError(ExportError):
    """The hub could not be reached."""


class OutputError(ExportError):
    """The bundle could not be written: disk full, folder not writable."""


class TargetError(OutputError):
    """The bundle's place holds something that the builder must not replace."""

    exit_code = 2


class ToOnnxError(ExportError):
    """A component could not be traced, or its graph is not valid."""


class VerificationError(ExportError):
    """The graphs differ from torch, or the picture from diffusers, by more than the tolerance."""


class PlanBuildError(ExportError):
    """TensorRT did not make a plan; the message ends with its log."""


class RoomError(ExportError):
    """The GPU has too little free memory for a build."""
