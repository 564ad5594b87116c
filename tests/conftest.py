"""Bundles that the tests share: built once, and kept in build/ until something that they are made of changes."""

import gc
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from export.libraries import quiet_libraries

quiet_libraries()

import pytest

from engine.libraries import import_library

with suppress(ImportError):
    import_library("openvino")  # before a test imports it by itself: its telemetry is off then

from engine import Pipeline
from engine.contract import Range, Shapes
from export import component as exported
from export import verify
from export.build import build, default_shapes, shapes_of
from export.sources.checkpoint import DiffusersFolder, resolve
from export.sources.textless_folder import TextlessFolder
from export.tensorrt import build as to_tensorrt
from export.tensorrt import check as to_check
from export.tensorrt import profiles as to_profiles

from . import fakes
from .models import JOINED, write_joined_model, write_textless_model, write_tiny_model
from .traces import shared_export

ROOT = Path(__file__).parent.parent
ENGINES = ROOT / "build" / "test-engines"
ONE, TWO, FIXED = (Range(n, n, n) for n in (1, 2, 64))


@pytest.fixture(scope="session", autouse=True)
def _equal_modules_are_traced_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "export_onnx", shared_export)
        yield


@pytest.fixture(scope="session", autouse=True)
def _bundles_are_compared_over_two_steps():
    """As those of large models; tests/export/test_verify.py shows the twenty of small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "SMALL", 0)
        yield


@pytest.fixture(autouse=True)
def _plans_are_timed_once(monkeypatch):
    """A plan is timed over 20 runs; here one shows that it is timed."""
    monkeypatch.setattr(to_check, "TIMED_RUNS", 1)


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    """The built-in model in fp32."""
    source = resolve(None)
    return build(source, ENGINES, "fp32", default_shapes(source.sample_size())).folder


@pytest.fixture(scope="session")
def demo_fp16() -> Path:
    """The built-in model in fp16."""
    source = resolve(None)
    return build(
        source,
        ENGINES / "fp16",
        "fp16",
        default_shapes(source.sample_size()),
        verify=False,
        report=lambda message: None,
    ).folder


PROFILES = [
    Shapes(FIXED, FIXED, ONE, TWO),
    Shapes(Range(32, 64, 96), Range(32, 64, 96), Range(1, 2, 4), Range(1, 4, 8), Range(1, 1, 2)),
]
"""What the plans of the tests are for: 64 x 64 with guidance, and a range, also of prompts up to two chunks."""


def copy_bundle(bundle: Path, folder: Path) -> Path:
    """A copy without plans."""
    return Path(shutil.copytree(bundle, folder / bundle.name, ignore=shutil.ignore_patterns("plans")))


@pytest.fixture(scope="session")
def planned(demo_fp16, tmp_path_factory):
    """planned(version): a bundle of the built-in model with plans of the fake TensorRT of that version, built once. The
    VAE takes two pictures at a time, so that four are decoded in slices."""
    made: dict[str, Path] = {}

    def plan(version: str) -> Path:
        if version not in made:
            bundle = copy_bundle(demo_fp16, tmp_path_factory.mktemp(f"trt{version}"))
            with fakes.install(version), pytest.MonkeyPatch.context() as patch:
                patch.setattr(to_profiles, "PIXELS_PER_DECODE", 2 * 64 * 64)
                to_tensorrt.build_plans(bundle, PROFILES, compare=False, report=lambda message: None)
            made[version] = bundle
        return made[version]

    return plan


def begun_bundle(bundle: Path, target: Path) -> None:
    """A copy in which all but the text encoder is as the builder wants it: it is traced in 3 seconds, and the rest
    would take half a minute."""
    manifest = json.loads((shutil.copytree(bundle, target) / "manifest.json").read_text())
    manifest["components"]["text_encoder"]["fingerprint"] = "another"
    (target / "manifest.json").write_text(json.dumps(manifest))


def tiny_source(folder: Path, kind: str) -> DiffusersFolder:
    return DiffusersFolder(write_tiny_model(folder / kind, kind), kind, {"kind": "folder", "id": kind})


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory) -> dict[str, DiffusersFolder]:
    """Random models of the SD 1.x and the SD 2.x kind."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_source(folder, kind) for kind in ("sd1", "sd2")}


@pytest.fixture(scope="session")
def wide_source(tmp_path_factory) -> DiffusersFolder:
    """One with the heads that fused attention wants; what is traced of it at opset 23 is shared."""
    return tiny_source(tmp_path_factory.mktemp("wide"), "wide")


@pytest.fixture(scope="session")
def tiny_bundles(tiny_sources) -> dict[str, Path]:
    """Their bundles in fp32."""
    return {kind: build(source, ENGINES, "fp32", default_shapes(64)).folder for kind, source in tiny_sources.items()}


@pytest.fixture(scope="session")
def textless_sources(tmp_path_factory) -> dict[str, TextlessFolder]:
    """Random models without texts, of each kind."""
    folder = tmp_path_factory.mktemp("textless")
    kinds = ("ddpm", "iddpm", "ldm")
    return {
        kind: TextlessFolder(write_textless_model(folder / kind, kind), kind, {"kind": "folder", "id": kind})
        for kind in kinds
    }


@pytest.fixture(scope="session")
def textless_bundles(textless_sources) -> dict[str, Path]:
    """Their bundles in fp32."""
    quiet = {"report": lambda message: None}
    return {
        kind: build(source, ENGINES / "textless", "fp32", shapes_of(source), **quiet).folder
        for kind, source in textless_sources.items()
    }


@pytest.fixture(scope="session")
def joined_sources(tmp_path_factory) -> dict[str, DiffusersFolder]:
    """Random models whose U-Net sees more than latents, of each kind."""
    folder = tmp_path_factory.mktemp("joined")
    return {
        kind: DiffusersFolder(write_joined_model(folder / kind, kind), kind, {"kind": "folder", "id": kind})
        for kind in JOINED
    }


@pytest.fixture(scope="session")
def joined_bundles(joined_sources) -> dict[str, Path]:
    """Their bundles in fp32."""
    quiet = {"report": lambda message: None}
    return {
        kind: build(source, ENGINES / "joined", "fp32", default_shapes(64), **quiet).folder
        for kind, source in joined_sources.items()
    }


@pytest.fixture(scope="session")
def tiny_fp16(tiny_sources) -> Path:
    """That of the SD 1.x kind in fp16."""
    return build(tiny_sources["sd1"], ENGINES / "fp16", "fp16", default_shapes(64)).folder


@pytest.fixture(scope="session")
def demo(demo_bundle) -> Pipeline:
    """A pipeline of the built-in model."""
    return Pipeline.load(demo_bundle, backend="onnxruntime")


@pytest.fixture
def edit_manifest():
    """Changes a bundle's manifest in place: edit_manifest(folder, key=value, ...)."""

    def edit(folder: Path, **changes) -> None:
        file = folder / "manifest.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


LONGEST = (
    "export/test_build.py",
    "export/sources/test_joined_folders.py",
    "engine/backends/test_lanes.py",
    "benchmarks/test_commands.py",
    "test_offline.py",
    "test_textless.py",
    "benchmarks/test_gpu.py",
    "engine/test_torch_free.py",
    "engine/backends/test_openvino.py",
    "export/tensorrt/test_build.py",
    "engine/backends/test_tensorrt.py",
    "test_parity.py",
    "test_inpainting.py",
    "test_demo_model.py",
    "test_remedies.py",
)
"""The files that take the most processor time, the longest first."""


def turn(item: pytest.Item) -> int:
    """When a test's file is given out: LONGEST in its order, then the others that hold slow tests, then the rest."""
    name = item.path.relative_to(ROOT / "tests").as_posix()
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n`, which gives files to its workers in this order: the longest first, so that no worker is left
    with one at the end. The tests of a file stay together: they share fixtures, and some read others' results."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: (turn(item), item.path not in slow))


def pytest_collection_finish() -> None:
    """What is imported by now stays: a build collects garbage four times, and each time would look at all of torch."""
    gc.collect()
    gc.freeze()
