"""A module imports from its own floor and those below it: docs/design.md has the floors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("engine.contract", "engine.errors", "engine.family", "engine.fields", "engine.libraries", "engine.version"),
    (
        "engine.bundle",
        "engine.checks",
        "engine.commands",
        "engine.guidance",
        "engine.hires",
        "engine.beginnings",
        "engine.init_image",
        "engine.inpainting",
        "engine.masks",
        "engine.manifest",
        "engine.pixels",
        "engine.plans",
        "engine.resize",
        "engine.sampling",
        "engine.text.emphasis",
        "engine.text.prompt",
        "engine.text.request",
        "engine.tiling",
        "engine.variation",
    ),
    ("engine.depth", "engine.edit", "engine.job", "engine.request", "engine.seen", "engine.upscale"),
    ("engine.adapters", "engine.backends", "engine.text", "engine.weights"),
    ("engine",),
    ("export",),
    ("build_engines",),
    ("benchmarks",),
)
"""From the lowest up. A name stands for all modules in it that no other name stands for."""

MODULES = [
    file
    for package in ("engine", "export", "benchmarks", "build_engines.py")
    for file in sorted([*(ROOT / package).rglob("*.py")] or [ROOT / package])
]


def floor_of(module: str) -> int:
    """The number of a module's floor, by the longest name that it begins with; -1 for modules of others."""
    found = {name: number for number, names in enumerate(FLOORS) for name in names}
    words = module.split(".")
    known = [".".join(words[:length]) for length in range(len(words), 0, -1)]
    return next((found[name] for name in known if name in found), -1)


def imported(node: ast.AST, package: list[str]) -> Iterator[str]:
    """The modules that are imported anywhere in a node, but for those that only type checkers import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            start = package[: len(package) + 1 - child.level] if child.level else []
            module = ".".join([*start, *([child.module] if child.module else [])])
            yield from (f"{module}.{alias.name}" for alias in child.names)
        else:
            yield from imported(child, package)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_module_imports_from_no_floor_above_its_own(file):
    words = list(file.relative_to(ROOT).with_suffix("").parts)
    if words[-1] == "__init__":
        words.pop()
        package = words
    else:
        package = words[:-1]
    own = floor_of(".".join(words))
    above = [name for name in imported(ast.parse(file.read_text("utf-8")), package) if floor_of(name) > own]
    assert above == []
