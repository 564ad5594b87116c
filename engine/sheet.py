"""Several pictures on one: contact sheets, and grids with labels."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from .errors import CompareError

GAP = 4
MAX_SIDE = 8192
"""Pixels of a sheet. The pictures on a larger one are made smaller."""

BACKGROUND, INK = "white", "black"
MARGIN = 6
"""Pixels around a label."""

LARGEST_TEXT, SMALLEST_TEXT = 24, 12
"""The size of labels in pixels; pictures of 512 pixels have the largest."""

WIDEST_LABEL = 24
"""A label that is wider than the pictures may take so many times its size."""

LONGEST_LABEL = 500
"""Characters of a label that are looked at."""

MOST_IN_LINE = 100
"""Columns or rows of a contact sheet of which a picture is still something: 78 pixels of the largest sheet."""

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Labels:
    """What the columns or the rows of a grid are: a name, and a value for each."""

    name: str
    values: Sequence[str]


@dataclass(frozen=True)
class Layout:
    """Where things are on a sheet, in pixels: the margins left of and above the cells, and the size of a cell."""

    left: int
    top: int
    width: int
    height: int

    def place(self, row: int, column: int) -> tuple[int, int]:
        """The corner of a cell."""
        return self.left + column * (self.width + GAP), self.top + row * (self.height + GAP)


def contact_sheet(files: Sequence[Path], columns: int | None = None) -> Image.Image:
    """The pictures of all files in rows of `columns`, in order. Without a number of columns, and where there would be
    more than 100 columns or rows, there are about as many columns as rows. One file is open at a time."""
    square = math.ceil(math.sqrt(len(files)))
    columns = columns or square
    if max(columns, math.ceil(len(files) / columns)) > MOST_IN_LINE:
        columns = square
    rows = [files[start : start + columns] for start in range(0, len(files), columns)]
    layout = _layout([[_size(file) for file in row] for row in rows], 0, 0, 1)
    return _paste(((_opened(file) for file in row) for row in rows), len(rows), columns, layout)


def _size(file: Path) -> Size:
    with Image.open(file) as image:
        return image.size


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image


def labelled_grid(rows: Sequence[Sequence[Image.Image]], across: Labels, down: Labels | None = None) -> Image.Image:
    """Rows of pictures, with the value of each column above it and of each row before it. A value that has no room is
    cut. CompareError if Pillow has no FreeType."""
    font = _font(max(picture.width for row in rows for picture in row))
    widest = WIDEST_LABEL * int(font.size)
    line = sum(font.getmetrics())
    left = 0 if down is None else min(widest, _width(font, [down.name, *down.values])) + 2 * MARGIN
    sizes = [[picture.size for picture in row] for row in rows]
    layout = _layout(sizes, left, 2 * line + 3 * MARGIN, min(widest, _width(font, across.values)))
    sheet = _paste(rows, len(rows), len(rows[0]), layout)
    drawing = ImageDraw.Draw(sheet)

    def write(text: str, x: float, y: float, anchor: str, room: int) -> None:
        drawing.text((x, y), _cut(text, font, room), INK, font, anchor=anchor)

    write(across.name, (layout.left + sheet.width) / 2, MARGIN, "ma", sheet.width - layout.left)
    for column, value in enumerate(across.values):
        write(value, layout.place(0, column)[0] + layout.width / 2, line + 2 * MARGIN, "ma", layout.width)
    if down is not None:
        write(down.name, left - MARGIN, line + 2 * MARGIN, "ra", left - 2 * MARGIN)
        for row, value in enumerate(down.values):
            y = layout.place(row, 0)[1] + (layout.height - line) / 2
            write(value, left - MARGIN, y, "ra", left - 2 * MARGIN)
    return sheet


def _layout(rows: Sequence[Sequence[Size]], left: int, top: int, least: int) -> Layout:
    """Cells for the largest picture of rows of these sizes, or for what fits the largest sheet, at least `least` pixels
    wide."""
    columns = max(map(len, rows))
    width = max(size[0] for row in rows for size in row)
    height = max(size[1] for row in rows for size in row)
    room = ((MAX_SIDE - left) // columns - GAP, (MAX_SIDE - top) // len(rows) - GAP)
    scale = min(1.0, room[0] / width, room[1] / height)
    return Layout(left, top, min(room[0], max(1, least, int(width * scale))), max(1, int(height * scale)))


def _paste(rows: Iterable[Iterable[Image.Image]], height: int, width: int, layout: Layout) -> Image.Image:
    """A sheet of so many rows and columns with its pictures, each in the middle of its cell."""
    right, bottom = layout.place(height, width)
    sheet = Image.new("RGB", (right - GAP, bottom - GAP), BACKGROUND)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            fitted = _fitted(picture, layout.width, layout.height)
            x, y = layout.place(row, column)
            sheet.paste(fitted, (x + (layout.width - fitted.width) // 2, y + (layout.height - fitted.height) // 2))
    return sheet


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(1.0, width / picture.width, height / picture.height)
    if scale == 1.0:
        return picture
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _font(width: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, for pictures of that width."""
    if not features.check("freetype2"):
        raise CompareError("Pillow was installed without FreeType here, so it cannot write labels; install its wheel")
    font = ImageFont.load_default(max(SMALLEST_TEXT, min(LARGEST_TEXT, width // 21)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _width(font: ImageFont.FreeTypeFont, texts: Sequence[str]) -> int:
    return math.ceil(max(font.getlength(_line(text)) for text in texts))


def _line(text: str) -> str:
    """A text as one line, of which no more is kept than could be shown."""
    return " ".join(text.split())[:LONGEST_LABEL]


def _cut(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """A text as one line that is no wider, with "..." for what is cut off."""
    line = _line(text)
    if font.getlength(line) <= room:
        return line
    fitting = bisect(range(len(line)), room, key=lambda length: math.ceil(font.getlength(f"{line[:length]}...")))
    return f"{line[: max(0, fitting - 1)]}..."
