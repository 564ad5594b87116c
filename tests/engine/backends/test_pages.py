"""Mapped files stay readable when their pages are given back, and weigh less."""

import mmap
import sys
import tempfile

import numpy as np
import psutil
import pytest

from engine.backends.openvino.pages import Scratch, drop_pages, pages_given_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")
SIZE = 64 * 2**20


@pytest.fixture
def mapped(tmp_path):
    """A file and its read-only mapping, every page of which has been read."""
    file = tmp_path / "weights with a space.data"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert sum(mapping[::4096]) == 0
        yield file, mapping


def resident():
    return psutil.Process().memory_info().rss


def test_pages_that_are_dropped_come_back_when_they_are_read(mapped):
    file, mapping = mapped
    before = resident()
    assert drop_pages(file) == SIZE
    assert resident() < before - SIZE // 2
    assert mapping[:256] == bytes(range(256))
    assert mapping[-1] == 255


def test_pages_are_dropped_at_the_end_of_the_block_whatever_happens_in_it(mapped):
    file, mapping = mapped
    before = resident()
    with pytest.raises(KeyError), pages_given_back(file):
        raise KeyError
    assert resident() < before - SIZE // 2
    assert mapping[255] == 255


def test_other_files_and_writable_mappings_are_left_alone(mapped, tmp_path):
    other = tmp_path / "other.data"
    other.write_bytes(b"x" * 4096)
    with open(other, "r+b") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as copy:
        copy[0:1] = b"y"
        assert drop_pages(other) == 0
        assert copy[0:1] == b"y"
    assert drop_pages(tmp_path / "absent") == 0


def test_a_scratch_copy_weighs_nothing_when_it_is_given_back_and_stays_readable():
    array, scratch = np.arange(SIZE // 4, dtype=np.float32).reshape(2, -1), Scratch()
    copied = scratch.copy(array[:, ::-1])
    assert copied.flags["C_CONTIGUOUS"]
    before = resident()
    scratch.give_back()
    assert resident() < before - SIZE // 2
    np.testing.assert_array_equal(copied, array[:, ::-1])


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.ones(Scratch.least)])
def test_small_arrays_and_those_without_room_are_copied_in_memory(array, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    copied = Scratch().copy(array)
    assert copied.flags["C_CONTIGUOUS"]
    assert not np.shares_memory(copied, array)
    np.testing.assert_array_equal(copied, array)
