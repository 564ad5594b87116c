"""Sheets of several pictures."""

import os
import resource

import numpy as np
import pytest
from PIL import Image

from engine.errors import CompareError
from engine.sheet import GAP, Labels, contact_sheet, labelled_grid


def picture(colour, width=64, height=64):
    return Image.new("RGB", (width, height), colour)


@pytest.fixture
def files(tmp_path):
    """The files of pictures."""

    def write(*pictures):
        names = [tmp_path / f"{number}.png" for number in range(len(pictures))]
        for name, one in zip(names, pictures):
            one.save(name)
        return names

    return write


def test_a_contact_sheet_has_the_pictures_in_order_and_whole(files):
    sheet = contact_sheet(files(*(picture(colour) for colour in ("red", "green", "blue"))))
    assert sheet.size == (2 * 64 + GAP, 2 * 64 + GAP)
    corners = [sheet.getpixel(place) for place in ((0, 0), (64 + GAP, 0), (0, 64 + GAP), (64 + GAP, 64 + GAP))]
    assert corners == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]
    assert sheet.getpixel((64, 0)) == (255, 255, 255)
    assert contact_sheet(files(picture("red")) * 6, columns=2).size == (2 * 64 + GAP, 3 * 64 + 2 * GAP)


def test_a_sheet_of_very_many_pictures_opens_one_at_a_time_and_is_no_strip(files):
    many = files(picture("red", 4, 4)) * 2000
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        sheets = [contact_sheet(many, columns) for columns in (None, 2, 1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [sheet.size for sheet in sheets] == [(45 * 8 - GAP, 45 * 8 - GAP)] * 3


def test_pictures_of_several_sizes_are_in_the_middle_of_their_cells(files):
    sheet = contact_sheet(files(picture("red", 64, 32), picture("blue", 32, 64)))
    assert sheet.size == (2 * 64 + GAP, 64)
    assert [sheet.getpixel((32, y)) for y in (15, 16, 47, 48)] == [(255,) * 3, (255, 0, 0), (255, 0, 0), (255,) * 3]


def test_a_sheet_that_would_be_too_large_has_smaller_pictures(files, monkeypatch):
    monkeypatch.setattr("engine.sheet.MAX_SIDE", 400)
    sheet = contact_sheet(files(picture("red", 128, 64)) * 9, columns=9)
    assert sheet.width <= 400
    assert sheet.getpixel((0, sheet.height // 2)) == (255, 0, 0)
    grid = labelled_grid([[picture("red", 256, 256)] * 3] * 3, Labels("a", "123"), Labels("b", "456"))
    assert max(grid.size) <= 400
    assert grid.getpixel((grid.width - 20, grid.height - 20)) == (255, 0, 0)


def ink(sheet, left, top, right, bottom):
    """Whether something is written there."""
    return bool((np.asarray(sheet.crop((left, top, right, bottom)).convert("L")) < 128).any())


def test_a_grid_names_its_columns_and_rows():
    rows = [[picture("red")] * 3, [picture("lime")] * 3]
    plain = labelled_grid(rows, Labels("", ("", "", "")))
    top = plain.height - (2 * 64 + GAP)
    assert plain.width == 3 * 64 + 2 * GAP
    assert not ink(plain, 0, 0, plain.width, top)
    grid = labelled_grid(rows, Labels("sampler", ("ddim", "euler", "lms")), Labels("steps", ("5", "10")))
    left = grid.width - plain.width
    assert grid.getpixel((left, top)) == (255, 0, 0)
    assert grid.getpixel((left, top + 64 + GAP)) == (0, 255, 0)
    for i in range(3):
        assert ink(grid, left + i * (64 + GAP), top // 2, left + i * (64 + GAP) + 64, top)
    for i in range(2):
        assert ink(grid, 0, top + i * (64 + GAP), left, top + i * (64 + GAP) + 64)
    assert ink(grid, 0, top // 2, left, top)


def test_a_long_label_widens_small_pictures_and_is_then_cut():
    one = labelled_grid([[picture("red")] * 2], Labels("sampler", ("DPM++ 2M SDE Karras", "x")))
    assert one.width > 2 * 64 + GAP
    assert labelled_grid([[picture("red")]], Labels("prompt", ("word " * 1000,))).width < 400
    assert labelled_grid([[picture("red")]], Labels("prompt", ("two\nlines",))).height < 64 + 60
    assert labelled_grid([[picture("red")]], Labels("prompt", ("\u65e5\u672c \U0001f3a8",))).width > 0


def test_without_freetype_there_are_no_labels(monkeypatch):
    monkeypatch.setattr("engine.sheet.features.check", lambda feature: False)
    with pytest.raises(CompareError, match="without FreeType here"):
        labelled_grid([[picture("red")]], Labels("a", ("b",)))
