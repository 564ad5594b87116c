"""What the documents name exists: files, code, links, make targets.

A reference to code is a dotted name in backticks that begins with one of our packages: `engine.job.Job.step`.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.sampling.catalog import SAMPLERS, SCHEDULE_TYPES
from engine.sampling.listing import facts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PACKAGES = "engine|export|benchmarks|tests"
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def test_files_in_backticks_exist(page):
    named = re.findall(rf"`((?:(?:{PACKAGES}|docs)/[\w./-]*)|[\w-]+\.(?:py|toml|md))`", prose(page))
    assert [name for name in named if not (ROOT / name).exists() and not (ROOT / "docs" / name).exists()] == []


def test_code_in_backticks_exists(page):
    named = re.findall(rf"`((?:{PACKAGES})(?:\.\w+)+)(?:\(\))?`", prose(page))
    assert [name for name in named if not exists(name)] == []


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_a_diff_shows_what_the_files_have(page):
    for block in re.findall(r"^```diff\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\+\+\+ ", block, flags=re.MULTILINE)[1:]:
            file, _, lines = part.partition("\n")
            assert re.sub(r"^\+", "", lines, flags=re.MULTILINE) in (ROOT / file).read_text(encoding="utf-8"), file


def test_make_targets_in_backticks_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", prose(page))) <= targets


def test_a_page_begins_with_its_readers(page):
    if page.parent.name == "docs":
        assert page.read_text(encoding="utf-8").split("\n\n")[1].startswith("For ")


def test_samplers_md_lists_the_samplers(page):
    """The table has what `python -m engine samplers` prints."""
    if page.name == "samplers.md":
        for name in SAMPLERS:
            cells = [f"`{name}`", *facts(name)[1:]]
            assert f"| {' | '.join(cells)} |" in page.read_text(encoding="utf-8"), f"| {' | '.join(cells)} |"
        for kind in SCHEDULE_TYPES:
            assert f"`{kind}`" in prose(page)


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or leads from a module through what it defines. Nothing is imported."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        file = module_file(words[:length])
        if file is not None:
            return leads(parsed(file), words[length:])
    return False


def module_file(words: list[str]) -> Path | None:
    place = ROOT.joinpath(*words)
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def leads(node: ast.AST, words: list[str]) -> bool:
    if not words:
        return True
    found = dict(definitions(node))
    return words[0] in found and leads(found[words[0]], words[1:])


def definitions(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a module or class defines: functions, classes, variables, fields, attributes of `self`, imported names."""
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            yield child.name, child
        if isinstance(child, ast.FunctionDef) and isinstance(node, ast.ClassDef):
            attributes = (part for part in ast.walk(child) if isinstance(part, ast.Attribute))
            yield from ((part.attr, part) for part in attributes if isinstance(part.ctx, ast.Store))
        if isinstance(child, (ast.Assign, ast.AnnAssign)):
            names = (part for part in ast.walk(child) if isinstance(part, ast.Name))
            yield from ((part.id, part) for part in names if isinstance(part.ctx, ast.Store))
        if isinstance(child, ast.ImportFrom):
            yield from ((alias.asname or alias.name, alias) for alias in child.names)
        if isinstance(child, ast.If):  # TYPE_CHECKING
            yield from definitions(child)
