"""One way for bundles and plans to come about: the old folder stays until the new one is whole."""

import pytest

from export.building import Replacement, keep
from export.errors import TargetError

OURS = {"a", "b"}.__contains__


@pytest.fixture
def target(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a").write_text("old")
    (tmp_path / "target" / "theirs").write_text("kept")
    return tmp_path / "target"


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_new_folder_takes_the_old_ones_place_and_files_of_others_stay(target):
    replacement = Replacement(target, OURS)
    with replacement.begin() as folder:
        (folder / "b").write_text("new")
        assert (target / "a").read_text() == "old"
        replacement.swap()
    assert names(target) == ["b", "theirs"]
    assert names(target.parent) == ["target"]


def test_a_failure_leaves_the_old_folder_and_nothing_beside_it(target):
    def half_a_build():
        with Replacement(target, OURS).begin() as folder:
            (folder / "b").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_a_build()
    assert names(target) == ["a", "theirs"]
    assert names(target.parent) == ["target"]


def test_what_a_killed_builder_left_is_cleared_up_unless_it_is_not_ours(target):
    left = target.parent / ".target.building"
    left.mkdir()
    (left / "b").write_text("half")
    Replacement(target, OURS).recover()
    assert names(target.parent) == ["target"]
    left.mkdir()
    (left / "strange").write_text("whose?")
    with pytest.raises(TargetError, match="holds strange, which no builder wrote"):
        Replacement(target, OURS).recover()


def test_kept_files_take_the_place_of_others(target, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    (new / "a").write_text("other")
    keep(["a"], target, new)
    assert (new / "a").read_text() == "old"
