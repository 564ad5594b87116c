"""Nothing of the user's is overwritten or removed by a build, and no other model's bundle."""

import json
import os
import shutil
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import build_engines
from engine import Bundle, BundleError
from engine.contract import Range
from export import folders, targets
from export.build import build, default_shapes
from export.disk import as_output_errors
from export.errors import OutputError
from export.folders import carry_over, exchange, files_of, recover, swap
from export.sources.checkpoint import DiffusersFolder

pytestmark = pytest.mark.slow

SHAPES = default_shapes(64)
OTHER = replace(SHAPES, height=Range(64, 64, 64))


@pytest.fixture
def model(tiny_sources, tmp_path):
    """A copy of a tiny model's folder."""
    return Path(shutil.copytree(tiny_sources["sd1"].folder, tmp_path / "models" / "sd1"))


@pytest.fixture
def source(model):
    return DiffusersFolder(model, "sd1", {"kind": "folder", "id": "sd1", "path": str(model)})


@pytest.fixture
def engines(tiny_bundles, tmp_path, source, edit_manifest):
    """A folder with the model's bundle."""
    bundle = Path(shutil.copytree(tiny_bundles["sd1"], tmp_path / "engines" / "sd1"))
    known = json.loads((bundle / "manifest.json").read_text())["source"]
    edit_manifest(bundle, source={**known, **source.origin})
    return bundle.parent


def everything(folder: Path) -> dict[str, str]:
    """The names and contents of all files in a folder."""
    return {
        name: (folder / name).read_text(errors="replace")
        for name in files_of(folder)
        if not name.endswith("/") and (folder / name).is_file()
    }


def refuse(source, output, words, **options):
    with pytest.raises(OutputError, match=words):
        build(source, output, "fp32", SHAPES, verify=False, **options)


# The target.


@pytest.mark.parametrize("force", [False, True])
def test_the_model_that_is_built_is_never_the_target(model, source, force):
    before = everything(model)
    refuse(source, model.parent, r"which is what the model is read from", force=force)
    refuse(source, model, r"which lies in what the model is read from", force=force)
    source.name = "models"
    refuse(source, model.parents[1], r"which holds what the model is read from", force=force)
    assert everything(model) == before
    assert not (model / "sd1").exists()


def test_a_model_behind_a_link_is_not_the_target_either(model, source, tmp_path):
    (tmp_path / "linked").symlink_to(model.parent)
    refuse(source, tmp_path / "linked", "which is what the model is read from")
    assert (model / "model_index.json").is_file()


@pytest.mark.parametrize("arguments", [[], ["--quiet"], ["--force"], ["--quiet", "--force", "--no-verify"]])
def test_the_command_deletes_no_folder_of_that_name(tmp_path, capsys, arguments):
    (tmp_path / "Documents").mkdir()
    (tmp_path / "Documents" / "thesis.txt").write_text("thesis")
    assert build_engines.main(["--output", str(tmp_path), "--name", "Documents", *arguments]) == 2
    assert "Documents is not empty, and no manifest.json there says that it is a bundle" in capsys.readouterr().err
    assert (tmp_path / "Documents" / "thesis.txt").read_text() == "thesis"


@pytest.mark.parametrize("content", ['{"name": "My web app", "icons": []}', "{", "[]", "5", '{"format": 2}'])
def test_a_folder_with_another_manifest_stays(source, tmp_path, content):
    (tmp_path / "out" / "sd1").mkdir(parents=True)
    (tmp_path / "out" / "sd1" / "manifest.json").write_text(content)
    refuse(source, tmp_path / "out", "is not empty, and no manifest.json there says that it is a bundle")
    assert everything(tmp_path / "out" / "sd1") == {"manifest.json": content}


def put_file(path):
    path.write_text("mine")


def put_fifo(path):
    os.mkfifo(path)


def put_link_to_a_file(path):
    (path.parent / "elsewhere").write_text("mine")
    path.symlink_to("elsewhere")


def put_link_to_nowhere_allowed(path):
    path.symlink_to(path.parent / "no" / "such" / path.name)


def put_link_in_a_circle(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("put", [put_file, put_fifo, put_link_to_a_file, put_link_in_a_circle])
def test_a_target_that_is_no_folder_is_refused_and_stays(source, tmp_path, put):
    target = tmp_path / "out" / "sd1"
    target.parent.mkdir()
    put(target)
    before = target.lstat()
    for _ in range(2):
        refuse(source, tmp_path / "out", r"exists and is not a folder|cannot be made")
    assert (target.lstat().st_ino, stat.S_IFMT(target.lstat().st_mode)) == (before.st_ino, stat.S_IFMT(before.st_mode))
    assert not (tmp_path / "out" / ".sd1.replaced").exists()


def test_a_target_behind_a_link_is_written_where_it_points_to(source, engines, tmp_path):
    disk = tmp_path / "disk" / "bundle"
    disk.parent.mkdir()
    shutil.move(engines / "sd1", disk)
    (engines / "sd1").symlink_to(disk)
    for shapes in (OTHER, SHAPES):
        assert build(source, engines, "fp32", shapes, verify=False).exported == ()
        assert Bundle.open(engines / "sd1").shapes.height == shapes.height
    assert (engines / "sd1").is_symlink()
    assert sorted(os.listdir(disk.parent)) == [".bundle.lock", "bundle"]


@pytest.mark.parametrize("output", ["", ".", "a\0b", "x" * 300])
def test_an_output_that_cannot_be_is_named(source, tmp_path, monkeypatch, output):
    monkeypatch.chdir(source.folder)
    refuse(source, Path(output), "cannot be made|lies in what the model is read from")


# What is not ours in a bundle.


def test_files_of_the_user_in_a_bundle_stay(source, engines):
    bundle = engines / "sd1"
    (bundle / "mine.png").write_bytes(b"mine")
    (bundle / "notes" / "empty").mkdir(parents=True)
    (bundle / "notes" / "a.txt").write_text("a")
    (bundle / "link").symlink_to("mine.png")
    (bundle / "onnx" / "extra.txt").write_text("extra")
    os.mkfifo(bundle / "pipe")
    for shapes in (OTHER, SHAPES):
        build(source, engines, "fp32", shapes, verify=False)
        assert (bundle / "mine.png").read_bytes() == b"mine"
        assert (bundle / "notes" / "a.txt").read_text() == "a"
        assert (bundle / "notes" / "empty").is_dir()
        assert os.readlink(bundle / "link") == "mine.png"
        assert (bundle / "onnx" / "extra.txt").read_text() == "extra"
        assert stat.S_ISFIFO((bundle / "pipe").lstat().st_mode)
        assert Bundle.open(bundle)
    assert sorted(os.listdir(engines)) == [".sd1.lock", "sd1"]


def test_a_file_of_the_user_with_the_name_of_one_of_ours_is_kept_beside_it(source, engines, edit_manifest):
    bundle = engines / "sd1"
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["verification.png"]
    edit_manifest(bundle, files=manifest["files"])
    (bundle / "verification.png").unlink()
    (bundle / "verification.png").write_text("my own")
    build(source, engines, "fp32", OTHER)
    assert (bundle / "verification.png.kept").read_text() == "my own"
    assert (bundle / "verification.png").read_bytes()[:4] == b"\x89PNG"


def test_files_that_come_while_a_folder_is_replaced_stay(tmp_path):
    old, new = tmp_path / "a", tmp_path / ".a.building"
    for folder in (old, new):
        folder.mkdir()
        (folder / "manifest.json").write_text(folder.name)
    original = folders.exchange

    def slow(one, other):
        (one / "late.txt").write_text("late")
        return original(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "exchange", slow)
        swap(old, new, tmp_path / ".a.replaced", {"manifest.json"}.__contains__)
    assert everything(old) == {"manifest.json": ".a.building", "late.txt": "late"}


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_folder_is_replaced_on_file_systems_with_and_without_exchange(tmp_path, monkeypatch, exchanged):
    old, new = tmp_path / "a", tmp_path / ".a.building"
    for folder in (old, new):
        folder.mkdir()
        (folder / "ours").write_text(folder.name)
    (old / "mine").write_text("mine")
    if not exchanged:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    swap(old, new, tmp_path / ".a.replaced", {"ours"}.__contains__)
    assert everything(old) == {"ours": ".a.building", "mine": "mine"}
    assert os.listdir(tmp_path) == ["a"]


def test_two_folders_exchange_their_names_here(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "was").write_text(name)
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "was").read_text() for name in ("a", "b")] == ["b", "a"]
    assert not exchange(tmp_path / "a", tmp_path / "nowhere")


def test_a_leftover_with_files_that_no_builder_wrote_stays(tmp_path):
    target, leftover, replaced = tmp_path / "a", tmp_path / ".a.building", tmp_path / ".a.replaced"
    leftover.mkdir()
    (leftover / "thesis.txt").write_text("thesis")
    with pytest.raises(OutputError, match=r"\.a\.building holds thesis\.txt, which no builder wrote"):
        recover(target, leftover, replaced, {"manifest.json"}.__contains__)
    target.mkdir()
    carry_over(leftover, target, {"manifest.json"}.__contains__)
    recover(target, leftover, replaced, {"manifest.json"}.__contains__)
    assert everything(target) == {"thesis.txt": "thesis"}
    assert not leftover.exists()


def test_a_leftover_that_is_no_folder_stays(tmp_path):
    (tmp_path / ".a.building").write_text("mine")
    with pytest.raises(OutputError, match="is in the way"):
        recover(tmp_path / "a", tmp_path / ".a.building", tmp_path / ".a.replaced")
    assert (tmp_path / ".a.building").read_text() == "mine"


# Broken bundles, and those of other models.


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": 2, "components": {}, "files": 5}', "\x00"],
)
def test_a_bundle_whose_manifest_cannot_be_read_is_known_as_broken(engines, content):
    (engines / "sd1" / "manifest.json").write_text(content)
    there = targets.examine(engines / "sd1")
    assert there.broken
    assert there.named == frozenset()


def test_a_bundle_whose_manifest_cannot_be_read_is_moved_aside_and_built_again(source, engines):
    bundle, said = engines / "sd1", []
    (bundle / "manifest.json").write_text("{")
    (bundle / "mine.png").write_text("mine")
    build(source, engines, "fp32", SHAPES, verify=False, report=said.append)
    assert Bundle.open(bundle)
    assert (engines / "sd1.broken" / "mine.png").read_text() == "mine"
    assert any(f"it was moved to {engines / 'sd1.broken'}" in line for line in said)


def garble_name(files):
    return {**files, "x" * 300: {"sha256": "0" * 64, "bytes": 1}}


def garble_hash(files):
    return {name: {**entry, "sha256": 5} for name, entry in files.items()}


def forget_a_graph(files):
    return {name: entry for name, entry in files.items() if name != "onnx/denoiser.onnx"}


def leave_the_bundle(files):
    return {**files, "../../precious.txt": {"sha256": "0" * 64, "bytes": 1}}


@pytest.mark.parametrize("garble", [garble_name, garble_hash, forget_a_graph, leave_the_bundle])
def test_a_bundle_with_a_garbled_manifest_is_one_of_ours(engines, edit_manifest, garble):
    edit_manifest(engines / "sd1", files=garble(json.loads((engines / "sd1" / "manifest.json").read_text())["files"]))
    with pytest.raises(BundleError):
        Bundle.open(engines / "sd1")
    assert not targets.examine(engines / "sd1").broken
    assert "onnx/text_encoder.onnx" in targets.examine(engines / "sd1").named


def test_a_bundle_with_a_garbled_manifest_is_replaced_and_nothing_outside_is_touched(source, engines, edit_manifest):
    (engines.parent / "precious.txt").write_text("precious")
    edit_manifest(
        engines / "sd1",
        files=leave_the_bundle(forget_a_graph(json.loads((engines / "sd1" / "manifest.json").read_text())["files"])),
    )
    build(source, engines, "fp32", SHAPES, verify=False)
    assert Bundle.open(engines / "sd1")
    assert (engines.parent / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize("force", [False, True])
def test_two_models_of_one_folder_name_do_not_replace_each_other(source, engines, tmp_path, force):
    other = Path(shutil.copytree(source.folder, tmp_path / "others" / "sd1"))
    vae = source.vae()
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.1
    vae.save_pretrained(other / "vae")
    second = DiffusersFolder(other, "sd1", {"kind": "folder", "id": "sd1", "path": str(other)})
    before = (engines / "sd1" / "manifest.json").read_text()
    refuse(
        second,
        engines,
        rf"is the bundle of another model \(folder {source.folder}\); give this one another name",
        force=force,
    )
    assert (engines / "sd1" / "manifest.json").read_text() == before


def test_a_model_that_moved_is_the_same_model(source, engines, tmp_path):
    build(source, engines, "fp32", SHAPES, verify=False)
    moved = Path(shutil.move(source.folder, tmp_path / "elsewhere"))
    again = DiffusersFolder(moved, "sd1", {"kind": "folder", "id": "sd1", "path": str(moved)})
    said = []
    assert build(again, engines, "fp32", SHAPES, verify=False, report=said.append).exported == ()
    assert f"was built from {source.folder}; {moved} has the same weights and takes its place" in said[0]


# Two builders.


def test_a_waiting_builder_says_for_whom_it_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "SECONDS_BETWEEN_NOTES", 0.2)
    target, said = tmp_path / "demo", []

    def second():
        with targets.locked(target, said.append):
            said.append("in")

    with targets.locked(target, lambda message: None):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.6)
    other.join(timeout=10)
    assert said[0].startswith(f"waiting for another builder of {target}: process {os.getpid()} on ")
    assert len(said) >= 3
    assert said[-1] == "in"


def test_a_builder_that_locks_without_saying_who_it_is_is_waited_for_too(tmp_path):
    target, said = tmp_path / "demo", []
    with FileLock(tmp_path / ".demo.lock"):
        other = threading.Thread(target=lambda: targets.locked(target, said.append).__enter__())
        other.start()
        time.sleep(0.2)
        assert said == [f"waiting for another builder of {target}"]
    other.join(timeout=10)
    assert not other.is_alive()


def test_a_file_of_the_user_is_not_taken_for_a_lock(tmp_path):
    (tmp_path / ".demo.lock").write_text("mine")
    with pytest.raises(OutputError, match="is in the way"), targets.locked(tmp_path / "demo", print):
        pass
    assert (tmp_path / ".demo.lock").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            PermissionError(13, "Permission denied", "/elsewhere/model.safetensors"),
            r"/elsewhere/model\.safetensors cannot be read .*let this user read it",
        ),
        (OSError(27, "File too large"), "ulimit -f"),
        (OSError(28, "No space left on device"), "the disk of .* is full; nothing was changed"),
        (OSError(5, "Input/output error"), "cannot be written or read"),
    ],
)
def test_a_file_that_fails_is_named(tmp_path, error, words):
    with pytest.raises(OutputError, match=words), as_output_errors(tmp_path):
        raise error
