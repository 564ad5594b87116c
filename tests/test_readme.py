"""What README shows works, and what it names exists."""
import re
from pathlib import Path

from PIL import Image

import build_engines

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_makes_a_picture(demo_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(code.replace("engines/demo", str(demo_bundle)), {})
    assert "Seed: 0" in Image.open("circle.png").text["parameters"]
    assert "'total'" in capsys.readouterr().out


def test_every_file_that_readme_names_exists():
    named = re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"`((?:engine|export|benchmarks)/[\w./-]*)`", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_shows_every_option_of_the_command():
    usage = re.search(r"```\npython build_engines.py \[MODEL\](.*?)```", README, re.DOTALL)[1]
    options = {option for action in build_engines.parser()._actions for option in action.option_strings if option.startswith("--")} - {"--help"}
    assert set(re.findall(r"--[\w-]+", usage)) == options
