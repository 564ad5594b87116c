"""Several pictures on one: contact sheets, and grids with labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, features

from .errors import CompareError

GAP = 4
MAX_SIDE = 8192
"""Pixels of a sheet. The pictures on a larger one are made smaller."""

BACKGROUND, INK = "white", "black"
MARGIN = 6
"""Pixels around a label."""

LARGEST_TEXT, SMALLEST_TEXT = 24, 11
"""Pixels of a label's height; a cell of 512 pixels has the largest."""

Cell = Image.Image


def contact_sheet(pictures: Sequence[Cell]) -> Image.Image:
    """All pictures in rows, about as many as there are in each, in order."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return _sheet(rows, columns, (0, 0))


def labelled_grid(rows: Sequence[Sequence[Cell]], across: Sequence[str], down: Sequence[str]) -> Image.Image:
    """Rows of pictures, with a label above each column and before each row, where there are labels. Labels wider than a
    picture are cut. CompareError if Pillow has no FreeType."""
    width = max(picture.width for row in rows for picture in row)
    font = _font(width)
    before = max((font.getlength(label) for label in down), default=0.0)
    margins = (
        math.ceil(min(before, width)) + 2 * MARGIN if down else 0,
        _line(font) + 2 * MARGIN if across else 0,
    )
    sheet = _sheet(rows, len(rows[0]), margins)
    drawing = ImageDraw.Draw(sheet)
    cell, line = _cell(rows, len(rows[0]), margins), _line(font)
    for i, label in enumerate(across):
        x = margins[0] + i * (cell[0] + GAP) + cell[0] / 2
        drawing.text((x, MARGIN), _cut(label, font, cell[0]), INK, font, anchor="ma")
    for i, label in enumerate(down):
        y = margins[1] + i * (cell[1] + GAP) + (cell[1] - line) / 2
        drawing.text((margins[0] - MARGIN, y), _cut(label, font, margins[0] - 2 * MARGIN), INK, font, anchor="ra")
    return sheet


def _sheet(rows: Sequence[Sequence[Cell]], columns: int, margins: tuple[int, int]) -> Image.Image:
    """The pictures on a background, below and right of the margins."""
    width, height = _cell(rows, columns, margins)
    size = (margins[0] + columns * (width + GAP) - GAP, margins[1] + len(rows) * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            fitted = _fitted(picture, width, height)
            x = margins[0] + column * (width + GAP) + (width - fitted.width) // 2
            y = margins[1] + row * (height + GAP) + (height - fitted.height) // 2
            sheet.paste(fitted, (x, y))
    return sheet


def _cell(rows: Sequence[Sequence[Cell]], columns: int, margins: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a cell: those of the largest picture, or what fits the largest sheet."""
    width = max(picture.width for row in rows for picture in row)
    height = max(picture.height for row in rows for picture in row)
    room = ((MAX_SIDE - margins[0]) // columns - GAP, (MAX_SIDE - margins[1]) // len(rows) - GAP)
    scale = min(1.0, room[0] / width, room[1] / height)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _fitted(picture: Cell, width: int, height: int) -> Image.Image:
    scale = min(1.0, width / picture.width, height / picture.height)
    if scale == 1.0:
        return picture
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _font(width: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font for cells of that width."""
    if not features.check("freetype2"):
        raise CompareError("Pillow was installed without FreeType here, so it cannot write labels; install its wheel")
    font = ImageFont.load_default(max(SMALLEST_TEXT, min(LARGEST_TEXT, width // 21)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _line(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def _cut(label: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """A label of one line that is no wider, with "..." for what is cut off."""
    text = " ".join(label.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
