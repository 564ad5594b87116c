"""The version of LatentRT, here and in pyproject.toml."""

__version__ = "0.4.0"
