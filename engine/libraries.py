"""Which libraries are here, without importing them."""
from __future__ import annotations

from importlib.util import find_spec


def installed(module: str) -> bool:
    """Whether `import module` would find something."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
