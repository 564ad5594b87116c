"""Bundles that the tests share: built once, and kept in build/ until something that they are made of changes."""
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from export.libraries import quiet_libraries

quiet_libraries()

import pytest

from engine import Pipeline
from export.build import build, default_shapes
from export.checkpoint import DiffusersFolder, resolve

from .models import write_tiny_model

ROOT = Path(__file__).parent.parent
ENGINES = ROOT / "build" / "test-engines"


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    """The built-in model in fp32."""
    source = resolve(None)
    return build(source, ENGINES, "fp32", default_shapes(source.sample_size())).folder


def tiny_source(folder: Path, kind: str) -> DiffusersFolder:
    return DiffusersFolder(write_tiny_model(folder / kind, kind), kind, {"kind": "folder", "id": kind})


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory) -> dict[str, DiffusersFolder]:
    """Random models of the SD 1.x and the SD 2.x kind."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_source(folder, kind) for kind in ("sd1", "sd2")}


@pytest.fixture(scope="session")
def tiny_bundles(tiny_sources) -> dict[str, Path]:
    """Their bundles in fp32."""
    return {kind: build(source, ENGINES, "fp32", default_shapes(64)).folder for kind, source in tiny_sources.items()}


@pytest.fixture(scope="session")
def demo(demo_bundle) -> Pipeline:
    """A pipeline of the built-in model."""
    return Pipeline.load(demo_bundle)


@pytest.fixture
def edit_manifest():
    """Changes a bundle's manifest in place: edit_manifest(folder, key=value, ...)."""
    def edit(folder: Path, **changes) -> None:
        file = folder / "manifest.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return edit
