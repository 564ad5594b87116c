"""A1111's prompt language, from a text to texts with weights: brackets for emphasis, and `BREAK`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import PromptError, PromptWeightError, shown
from .prompt import MAX_WEIGHT, NUMBER

ROUND, SQUARE = 1.1, 1 / 1.1
"""What `(` and `[` multiply a weight with."""

MARKS = re.compile(rf"(\\[][()\\]?|[][()]|:\s*{NUMBER}\s*\))")
BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class Emphasis:
    """How weights act on a text's embedding.

    weighted: each token's vector is multiplied with its weight. mean_restored: the whole embedding is then multiplied
    so that its mean is what it was.
    """

    weighted: bool
    mean_restored: bool


EMPHASES = {
    "original": Emphasis(weighted=True, mean_restored=True),
    "no norm": Emphasis(weighted=True, mean_restored=False),
    "ignore": Emphasis(weighted=False, mean_restored=False),
}
"""A1111's ways, by name."""


class Piece(NamedTuple):
    """Text without brackets, and the product of the weights around it."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]
"""What stands between two `BREAK`s."""

_Run = tuple[float, list[str]]
"""A weight, and the texts that have it."""


def plain(text: str) -> tuple[Section, ...]:
    """The text itself, with weight 1."""
    return ((Piece(text),),)


def sections(text: str) -> tuple[Section, ...]:
    """The sections of a text, each in pieces of different weights. PromptWeightError for a weight above 1000.

    `(a)` multiplies by 1.1, `[a]` divides by it, `(a:1.3)` multiplies by 1.3; `\\(`, `\\)`, `\\[`, `\\]` and `\\\\` are
    characters. A bracket that is not closed reaches to the end. One that is not opened is a character, and so is a
    number that is none, as in `(a:1.2.3)`.
    """
    pieces = MARKS.split(text)  # marks at the odd places, text at the even ones
    factors = _factors(pieces)
    around = {"(": [1.0], "[": [1.0]}  # the products of the factors of the open brackets
    weight = 1.0
    found: list[list[_Run]] = [[]]
    for place, piece in enumerate(pieces):
        factor = factors.get(place)
        if factor is None:
            _add(found, piece.removeprefix("\\") if place % 2 else piece, weight)
            continue
        if piece in around:
            around[piece].append(around[piece][-1] * factor)
        else:
            around["[" if piece == "]" else "("].pop()
        weight = around["("][-1] * around["["][-1]
    return tuple(tuple(_piece(weight, texts) for weight, texts in section) for section in found)


def emphasis(name: str) -> Emphasis:
    """A1111's way of that name, "original", "no norm" or "ignore". PromptError if there is none."""
    if name not in EMPHASES:
        raise PromptError(f"emphasis is {shown(name)}; it must be one of {', '.join(map(repr, EMPHASES))}")
    return EMPHASES[name]


def _factors(pieces: list[str]) -> dict[int, float]:
    """The factor of every bracket that has a partner or reaches to the end, by its place; that of a partner is 1."""
    factors: dict[int, float] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for place in range(1, len(pieces), 2):
        mark = pieces[place]
        if mark in opened:
            opened[mark].append(place)
            factors[place] = ROUND if mark == "(" else SQUARE
        elif mark == "]" and opened["["]:
            opened["["].pop()
            factors[place] = 1.0
        elif mark[-1] == ")" and mark[0] != "\\" and opened["("]:
            start = opened["("].pop()
            factors[place] = 1.0
            if mark != ")":
                factors[start] = float(mark[1:-1])
    return factors


def _add(found: list[list[_Run]], text: str, weight: float) -> None:
    """Adds text to the last section. Every `BREAK` in it begins a section."""
    if "BREAK" not in text:
        _append(found[-1], text, weight)
        return
    first, *others = BREAK.split(text)
    _append(found[-1], first.rstrip() if others else first, weight)
    for number, part in enumerate(others, 1):
        found.append([])
        _append(found[-1], part.strip() if number < len(others) else part.lstrip(), weight)


def _append(section: list[_Run], text: str, weight: float) -> None:
    """Text of the same weight as the text before it joins that: they are tokenized together."""
    if not text:
        return
    if section and section[-1][0] == weight:
        section[-1][1].append(text)
    else:
        section.append((weight, [text]))


def _piece(weight: float, texts: list[str]) -> Piece:
    text = "".join(texts)
    if not abs(weight) <= MAX_WEIGHT:
        raise PromptWeightError(
            f"the weight of {shown(text)} is {weight:g}, the product of the brackets around it; write weights from "
            f"-{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, and brackets that are text as \\( and \\)"
        )
    return Piece(text, weight)
