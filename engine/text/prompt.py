"""A1111's prompt language, up to the texts: what the prompt says at each evaluation.

`parse` gives a `Prompt`: parts that `AND` joins, each a flat sequence of tokens, and the tags `<lora:name:0.8>`.
`schedule` gives the texts of a part, and `by_evaluation` repeats them. Brackets for emphasis and `BREAK` stay in
the texts; `engine/text/emphasis.py` reads them. Nothing here recurses, and all of it takes time in proportion to the
prompt's length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AdapterTagError, PromptError, PromptWeightError, shown

SYNTAXES = ("plain", "a1111")

MAX_WEIGHT = 1000.0
"""The largest weight of a text: an embedding's values are below 40, and float16 ends at 65504."""

NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
WHEN = re.compile(rf"\s*({NUMBER}(?:[eE][+-]?[0-9]+)?)\s*")
PART_WEIGHT = re.compile(rf"\s*({NUMBER})")
AND = re.compile(r"\bAND\b")
TAG = re.compile(r"(\w+):(.+)", re.DOTALL)
MARKS = re.compile(r"(\\.|[][()|:])", re.DOTALL)


@dataclass(frozen=True)
class Text:
    """Text as it was written, with its brackets for emphasis and its escapes."""

    text: str


@dataclass(frozen=True)
class Open:
    """The beginning of a group of `options` texts.

    when: None for an alternation, which takes the next option at every step. Otherwise the group is a switch: up to
    `when` it is its first option, or nothing if there is only one; then it is its last option. when is a part of all
    steps if `fraction`, and else a number of steps.
    """

    options: int
    when: float | None = None
    fraction: bool = False
    text: str = "["


@dataclass(frozen=True)
class Next:
    """Between two options of a group."""

    text: str


@dataclass(frozen=True)
class Close:
    """The end of a group, with the number of a switch as it was written."""

    text: str


Token = Text | Open | Next | Close
Schedule = tuple[tuple[int, str], ...]
"""Texts, each with the last step that it is for. The steps ascend, and begin at 1."""


@dataclass(frozen=True)
class Part:
    """One of the texts that `AND` joins.

    tokens: its text and its groups, properly nested, in the order in which they were written. weight: that of its part
    of the guidance. ending: how the weight was written.
    """

    tokens: tuple[Token, ...]
    weight: float = 1.0
    ending: str = ""

    def __str__(self) -> str:
        return "".join(token.text for token in self.tokens) + self.ending


@dataclass(frozen=True)
class Adapter:
    """A tag, `<kind:arguments>`, such as `<lora:name:0.8>`."""

    kind: str
    arguments: str

    def __str__(self) -> str:
        return f"<{self.kind}:{self.arguments}>"


@dataclass(frozen=True)
class Lora:
    """What a tag `<lora:...>` asks for: the weights for the text encoder and for the U-Net, and the rank that the file
    is cut to, if any."""

    name: str
    text_encoder: float
    unet: float
    rank: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt in parts, and its tags. `parse(str(prompt), prompt.syntax)` equals `prompt`; without tags, `str(prompt)`
    is the text that was parsed."""

    parts: tuple[Part, ...]
    adapters: tuple[Adapter, ...] = ()
    syntax: str = "a1111"

    def __str__(self) -> str:
        return "AND".join(map(str, self.parts)) + "".join(map(str, self.adapters))


def parse(text: str, syntax: str = "a1111", negative: bool = False) -> Prompt:
    """Every text is a prompt. What is not written as the language asks is text: a bracket without a partner, a `[a:b]`
    without a number.

    "plain" takes the text as it is. A negative prompt has one part: `AND` and a weight at its end are text.
    PromptWeightError for a part with a weight above 1000, PromptError for an unknown syntax.
    """
    if syntax not in SYNTAXES:
        raise PromptError(f"prompt_syntax is {shown(syntax)}; it must be 'plain' or 'a1111'")
    if syntax == "plain":
        return Prompt((Part((Text(text),)),), syntax=syntax)
    text, adapters = _without_tags(text)
    if negative:
        return Prompt((Part(_tokens(text)),), adapters)
    written = AND.split(text) if "AND" in text else [text]  # the search alone takes a fifth of a parse
    return Prompt(tuple(map(_part, written)), adapters)


def schedule(part: Part, steps: int, base_steps: int = 0) -> Schedule:
    """The texts of a part for a loop of `steps` steps.

    For the second pass of the hires fix, `base_steps` is the number of steps of the first: fractions from 1 to 2 and
    steps after the first pass's are then the second's. Where a sampler evaluates the U-Net twice a step, A1111 counts
    the evaluations: pass their number as `steps`.
    """
    choosing = [token for token in part.tokens if isinstance(token, Open)]
    ends = {steps, *(_end(token, steps, base_steps) for token in choosing if token.when is not None)}
    if any(token.when is None for token in choosing):
        ends.update(range(1, steps))
    return tuple((end, _text_at(part.tokens, end, steps, base_steps)) for end in sorted(ends) if end >= 1)


def by_evaluation(schedule: Schedule, evaluations: int) -> tuple[str, ...]:
    """The text of each evaluation. As in A1111, evaluation i, from 0, takes the first text whose last step is at least
    i, so that the first text of all has one evaluation more than it has steps."""
    texts, place = [], 0
    for evaluation in range(evaluations):
        while schedule[place][0] < evaluation and place + 1 < len(schedule):
            place += 1
        texts.append(schedule[place][1])
    return tuple(texts)


def lora(adapter: Adapter) -> Lora:
    """`<lora:name:text encoder:unet:rank>`, or by name, `<lora:name:te=0.5:unet=1:dyn=8>`. The weight for the text
    encoder is 1 if missing, that for the U-Net the text encoder's. AdapterTagError if it can't be read so."""
    named, placed = {}, []
    for argument in adapter.arguments.split(":"):
        key, equals, value = argument.partition("=")
        if equals:
            named[key.strip()] = value
        else:
            placed.append(argument)
    values = {**dict(zip(("name", "te", "unet", "dyn"), placed)), **named}
    if adapter.kind != "lora" or not placed or len(placed) > 4 or not named.keys() <= {"te", "unet", "dyn"}:
        raise _tag_error(adapter)
    text_encoder = values.get("te", "1")
    try:
        rank = _rank(values["dyn"]) if "dyn" in values else None
        return Lora(values["name"], _weight(text_encoder), _weight(values.get("unet", text_encoder)), rank)
    except ValueError as error:
        raise _tag_error(adapter) from error


def _tag_error(adapter: Adapter) -> AdapterTagError:
    return AdapterTagError(
        f"the tag {shown(str(adapter))} can't be read; write <lora:name>, <lora:name:0.8>, "
        f"<lora:name:0.5:0.8> or <lora:name:te=0.5:unet=0.8:dyn=8> with weights from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
    )


def _rank(text: str) -> int:
    rank = int(text)
    if rank < 1:
        raise ValueError(text)
    return rank


def _weight(text: str) -> float:
    weight = float(text)
    if not abs(weight) <= MAX_WEIGHT:
        raise ValueError(text)
    return weight


def _without_tags(text: str) -> tuple[str, tuple[Adapter, ...]]:
    """The text and the tags taken out of it, so that no tag is left or comes to be."""
    kept: list[str] = []
    opened: list[int] = []
    adapters = []
    for piece in re.split("([<>])", text):
        if piece == ">":
            tag = TAG.fullmatch("".join(kept[opened[-1] + 1 :])) if opened else None
            if tag is not None:
                del kept[opened.pop() :]
                adapters.append(Adapter(tag[1], tag[2]))
                continue
            opened.clear()  # a tag holds no ">"
        elif piece == "<":
            opened.append(len(kept))
        kept.append(piece)
    return "".join(kept), tuple(adapters)


def _part(written: str) -> Part:
    head, colon, number = written.rstrip().rpartition(":")
    weight = PART_WEIGHT.fullmatch(number) if colon else None
    if weight is None:
        return Part(_tokens(written))
    if not abs(float(weight[1])) <= MAX_WEIGHT:
        raise PromptWeightError(
            f"the prompt's part {shown(head)} has the weight {shown(weight[1])}; write one from -{MAX_WEIGHT:g} to "
            f"{MAX_WEIGHT:g}"
        )
    return Part(_tokens(head), float(weight[1]), written[len(head) :])


@dataclass
class _Bracket:
    """A bracket whose partner has not come yet: its place, and the places of : and | directly in it."""

    place: int
    square: bool
    colons: list[int]
    bars: list[int]


def _tokens(text: str) -> tuple[Token, ...]:
    pieces = MARKS.split(text)  # marks at the odd places, what is between them at the even ones
    groups: dict[int, Token] = {}
    if "[" in text:
        _find_groups(pieces, groups)
    tokens: list[Token] = []
    start = 0
    for place in sorted(groups):
        between = "".join(pieces[start:place])
        if between:
            tokens.append(Text(between))
        tokens.append(groups[place])
        start = place + 1
    rest = "".join(pieces[start:])
    return (*tokens, Text(rest)) if rest else tuple(tokens)


def _find_groups(pieces: list[str], groups: dict[int, Token]) -> None:
    """Puts the tokens of all groups into `groups`, by their places. A bracket closed by one of the other kind leaves
    every open one without a partner."""
    opened: list[_Bracket] = []
    for place in range(1, len(pieces), 2):
        mark = pieces[place]
        if mark == "[" or mark == "(":
            opened.append(_Bracket(place, mark == "[", [], []))
        elif not opened:
            continue
        elif mark == ":":
            opened[-1].colons.append(place)
        elif mark == "|":
            opened[-1].bars.append(place)
        elif mark == "]" and opened[-1].square:
            _close_group(pieces, groups, opened.pop(), place)
        elif mark == ")" and not opened[-1].square:
            opened.pop()
        elif mark == "]" or mark == ")":
            opened.clear()


def _close_group(pieces: list[str], groups: dict[int, Token], bracket: _Bracket, end: int) -> None:
    """A switch, an alternation, or neither: text."""
    colons = bracket.colons
    number = WHEN.fullmatch(pieces[end - 1]) if colons and colons[-1] == end - 2 else None
    if number is not None and len(colons) <= 2:
        groups[bracket.place] = Open(len(colons), float(number[1]), "." in number[1])
        groups.update({place: Next(":") for place in colons[:-1]})
        groups[end] = Close(f":{pieces[end - 1]}]")
        pieces[end - 2 : end] = "", ""
    elif bracket.bars:
        groups[bracket.place] = Open(len(bracket.bars) + 1)
        groups.update({place: Next("|") for place in bracket.bars})
        groups[end] = Close("]")


def _end(switch: Open, steps: int, base_steps: int) -> int:
    """The last step before a switch, below 1 if there is none."""
    assert switch.when is not None
    start, length = (1 if base_steps else 0, steps) if switch.fraction else (base_steps, 1)
    when = (switch.when - start) * length
    return int(max(-1, min(steps, when)))


def _text_at(tokens: Sequence[Token], step: int, steps: int, base_steps: int) -> str:
    """The text of a step, from 1."""
    texts: list[str] = []
    around: list[tuple[int, int, bool]] = []  # of each group: the chosen option, the current one, is the group shown
    shown_now = True
    for token in tokens:
        if isinstance(token, Text):
            if shown_now:
                texts.append(token.text)
        elif isinstance(token, Open):
            choice = _choice(token, step, steps, base_steps)
            around.append((choice, 0, shown_now))
            shown_now = shown_now and choice == 0
        elif isinstance(token, Next):
            choice, current, outside = around.pop()
            around.append((choice, current + 1, outside))
            shown_now = outside and choice == current + 1
        else:
            shown_now = around.pop()[2]
    return "".join(texts)


def _choice(group: Open, step: int, steps: int, base_steps: int) -> int:
    """The option of a group at a step; -1 for nothing."""
    if group.when is None:
        return (step - 1) % group.options
    before = step <= _end(group, steps, base_steps)
    return group.options - 2 if before else group.options - 1
