"""The version of LatentRT, here and in pyproject.toml."""

__version__ = "0.5.0"
