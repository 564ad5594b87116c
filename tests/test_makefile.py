"""`make demo PROMPT='...'` hands any text over as it was typed, and runs none of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = """#!{python} -IS
import json, sys
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
"""
DEFAULT = "a large red circle on a blue background"

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed here")


@pytest.fixture
def make(tmp_path):
    """make(*arguments): runs the Makefile in a folder of its own with a python that writes down its arguments; returns
    them and what was printed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "tests/without_dependencies.txt"):
        (tmp_path / name).touch()
    log, binaries = tmp_path / "log", tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / ".venv" / ".installed").touch()
    for name in ("python", "ruff", "mypy"):
        (binaries / name).write_text(RECORD.format(python=sys.executable, log=str(log)))
        (binaries / name).chmod(0o755)

    def run(*arguments, **environment):
        log.unlink(missing_ok=True)
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PROMPT", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        }
        done = subprocess.run(
            ["make", *arguments], cwd=tmp_path, env={**kept, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return [json.loads(line) for line in log.read_text().splitlines()], done.stdout

    return run


TEXTS = [
    'a "red" circle',
    "it's a ring",
    "a $(shell touch pwned) ring",
    "a $(touch pwned)",
    "`touch pwned`",
    "$HOME and ${HOME} and $$ and $",
    "a \\ b \\\\",
    "ends in \\",
    "# a hash # more",
    "two\nlines",
    "-",
    "--steps 3",
    "-text",
    "; touch pwned;",
    "a | touch pwned & > pwned",
    "$(error no)",
    "$(MAKEFLAGS)",
    "%s %",
    "a  b ",
    "",
    "größer, 青い星 ★",
    "\udcff",
    "*",
    "~",
    "!!",
    "a=b",
    "PROMPT:=b",
    "endif",
    "tab\there",
    "$(eval X:=$(shell touch pwned))",
    "$(PROMPT)",
    "${value PROMPT}",
    "@echo",
    "line\n",
    "a\rb",
    "$(shell touch pwned)\n$(shell touch pwned)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_make_demo_passes_any_text(make, tmp_path, text):
    for arguments, environment in (([f"PROMPT={text}"], {}), ([], {"PROMPT": text}), (["-e"], {"PROMPT": text}))[
        : 3 if "$" in text else 2
    ]:
        calls, _ = make("demo", *arguments, **environment)
        assert calls == [
            ["build_engines.py"],
            [
                "-m",
                "engine",
                "picture",
                "--bundle",
                "engines/demo",
                "--guidance-scale",
                "5",
                "--seed",
                "0",
                "--output",
                "engines/demo.png",
                "--",
                text,
            ],
        ]
    assert sorted(os.listdir(tmp_path)) == [".venv", "Makefile", "constraints.txt", "log", "pyproject.toml", "tests"]


def test_make_demo_alone_has_a_text_and_says_what_to_type_next(make):
    calls, printed = make("demo")
    assert calls[1][-1] == DEFAULT
    assert (
        printed.splitlines()[-1]
        == 'The next one:  .venv/bin/python -m engine picture "a small green star on a white background"'
    )


def test_make_test_runs_the_checks_and_the_tests_and_nothing_else(make):
    checks = [["check", "."], ["format", "--check", "--quiet", "."], []]
    tests = ["-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert make("test", "PROMPT=$(shell touch pwned)")[0] == [*checks, tests]
    assert make("test-fast")[0] == [*checks, [*tests, "-m", "not slow"]]
