"""What messages tell people to install is what pyproject.toml asks for."""

from pathlib import Path

import pytest
import tomllib

from engine.libraries import REQUIREMENTS, install_command

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("extra", REQUIREMENTS)
def test_a_message_names_the_requirements_of_pyproject(extra):
    wanted = PROJECT["dependencies"] if extra == "runtime" else PROJECT["optional-dependencies"][extra]
    assert list(REQUIREMENTS[extra]) == wanted


def test_no_message_tells_to_install_what_no_index_has():
    root = Path(__file__).parents[2]
    sources = [
        root / "build_engines.py",
        *(file for folder in ("engine", "export", "benchmarks") for file in (root / folder).rglob("*.py")),
    ]
    assert [file.name for file in sources if "pip install latentrt" in file.read_text(encoding="utf-8")] == []


def test_the_command_can_be_pasted_into_a_shell():
    assert install_command("cpu") == "python -m pip install 'onnxruntime>=1.20'"
