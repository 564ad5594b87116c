"""What README shows works. tests/test_docs.py checks that what it names exists."""

import re
from pathlib import Path

import pytest
from PIL import Image

import build_engines

ROOT = Path(__file__).parents[1]
PAGES = {
    page.name: page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]


@pytest.mark.slow
def test_the_python_examples_make_pictures(tiny_bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for page in ("README.md", "python.md", "samplers.md"):
        for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
            exec(code.replace("engines/demo", str(tiny_bundles["sd1"])), {})
    assert "Seed: 0" in Image.open("circle.png").text["parameters"]
    assert "'total'" in capsys.readouterr().out


def test_readme_leads_to_every_page():
    assert set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README)) == set(PAGES) - {"README.md"}


def test_readme_fits_on_130_lines():
    assert README.count("\n") <= 130


def test_no_page_tells_to_install_what_no_index_has():
    for page, text in PAGES.items():
        assert "pip install latentrt" not in text, page


def test_readme_shows_every_option_of_the_command():
    usage = re.search(r"```\npython build_engines.py \[MODEL\](.*?)```", PAGES["building.md"], re.DOTALL)[1]
    options = {
        option
        for action in build_engines.parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    } - {"--help"}
    assert set(re.findall(r"--[\w-]+", usage)) == options
