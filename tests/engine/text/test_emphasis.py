"""Brackets for emphasis and `BREAK`. The first examples are the language's own."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import PromptError, PromptWeightError
from engine.text.emphasis import EMPHASES, Piece, emphasis, plain, sections
from tests.engine.text.test_prompt import ANYTHING

QUICK = settings(max_examples=100, deadline=None)


def pieces(text):
    """The pieces of a text without `BREAK`, their weights rounded."""
    (section,) = sections(text)
    return [(piece.text, round(piece.weight, 6)) for piece in section]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("a [dull] word", [("a ", 1), ("dull", 0.909091), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a) b]:1.3) c", [("a) b]:1.3) c", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"a\\b\c", [(r"a\bc", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(a:0)[b:1.3]", [("a", 0), ("b:1.3", 0.909091)]),
        ("(a : + .5 )(b:-2)(c:1.2.3)", [("a : + .5 ", 1.1), ("b", -2), ("c:1.2.3", 1.1)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.909091)]),
        ("", []),
        ("([])", []),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_pieces_and_their_weights(text, expected):
    assert pieces(text) == expected


def test_break_begins_a_section_also_within_brackets():
    assert sections("a BREAK b") == ((Piece("a"),), (Piece("b"),))
    assert sections("(a BREAK b:2)BREAK") == ((Piece("a", 2.0),), (Piece("b", 2.0),), ())
    assert sections("BREAKFAST") == ((Piece("BREAKFAST"),),)


def test_plain_text_keeps_its_brackets():
    assert plain("(a:2) BREAK") == ((Piece("(a:2) BREAK", 1.0),),)


@pytest.mark.parametrize(
    "text", ["(a:1001)", "(a:-1001)", "(" * 80 + "a", "(" * 9000 + "(a:0)", "(a:" + "9" * 500 + ")"]
)
def test_a_weight_too_large_is_refused(text):
    with pytest.raises(PromptWeightError, match=r"the weight of 'a' is .*write weights from -1000 to 1000"):
        sections(text)


def test_the_ways_of_emphasis_have_a1111s_names():
    assert list(EMPHASES) == ["original", "no norm", "ignore"]
    assert (emphasis("original").mean_restored, emphasis("no norm").mean_restored) == (True, False)
    assert not emphasis("ignore").weighted
    with pytest.raises(PromptError, match="emphasis is 'loud'; it must be one of 'original', 'no norm', 'ignore'"):
        emphasis("loud")


@QUICK
@given(ANYTHING)
def test_any_text_has_sections(text):
    try:
        found = sections(text)
    except PromptWeightError:
        return
    for section in found:
        assert all(piece.text and abs(piece.weight) <= 1000 for piece in section)
        assert all(one.weight != other.weight for one, other in pairwise(section))


@QUICK
@given(st.text(st.characters(exclude_characters="[]()\\"), min_size=1, max_size=60).filter(lambda t: "BREAK" not in t))
def test_text_without_brackets_is_unchanged(text):
    assert sections(text) == plain(text)


def escaped(text):
    return "".join("\\" + character if character in "()[]\\" else character for character in text)


@QUICK
@given(st.text(min_size=1, max_size=30).filter(lambda t: "BREAK" not in t))
def test_escaped_text_is_the_text(text):
    assert sections(escaped(text)) == plain(text)


WEIGHTS = st.lists(st.floats(0.1, 2).map(lambda weight: round(weight, 3)) | st.sampled_from(["(", "["]), max_size=8)


@QUICK
@given(WEIGHTS)
def test_weights_multiply(weights):
    text, expected = "a", 1.0
    for weight in weights:
        if weight == "(":
            text, expected = f"({text})", expected * 1.1
        elif weight == "[":
            text, expected = f"[{text}]", expected / 1.1
        else:
            text, expected = f"({text}:{weight})", expected * weight
    assert sections(text)[0][0].weight == pytest.approx(expected)
