"""A1111's prompt language: `AND`, switches, alternations, tags. The first examples are the language's own."""

import re
import sys
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import AdapterTagError, PromptError, PromptWeightError
from engine.text.emphasis import sections
from engine.text.prompt import Adapter, Lora, Part, Prompt, Text, by_evaluation, lora, parse, schedule

QUICK = settings(max_examples=100, deadline=None)
PIECES = [*"()[]|:<>\\. ,\na1", "AND", "BREAK", "<lora:a:0.5>", ":1.5", "[a:b:.5]", "[a|b|]", "[a:3]", "(a:1.3)", "<a:"]
ANYTHING = st.text(max_size=25) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def texts(prompt, steps=10, base_steps=0):
    (part,) = parse(prompt).parts
    return [[end, text] for end, text in schedule(part, steps, base_steps)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("test", [[10, "test"]]),
        ("a [b:3]", [[3, "a "], [10, "a b"]]),
        ("a [b: 3]", [[3, "a "], [10, "a b"]]),
        ("a [b::3]", [[3, "a b"], [10, "a "]]),
        ("a [[[b]]:2]", [[2, "a "], [10, "a [[b]]"]]),
        ("[(a:2):3]", [[3, ""], [10, "(a:2)"]]),
        ("a [b : c : 1] d", [[1, "a b  d"], [10, "a  c  d"]]),
        ("a[b:[c:d:2]:1]e", [[1, "abe"], [2, "ace"], [10, "ade"]]),
        ("a [unbalanced", [[10, "a [unbalanced"]]),
        ("a [b:.5] c", [[5, "a  c"], [10, "a b c"]]),
        ("a [b:1.0] c", [[10, "a  c"]]),
        ("a [b:99] c", [[10, "a  c"]]),
        ("a [b:0] c", [[10, "a b c"]]),
        ("a [b:-1] c", [[10, "a b c"]]),
        ("a [b:1e400] c", [[10, "a  c"]]),
        ("((a][:b:c [d:3]", [[3, "((a][:b:c "], [10, "((a][:b:c d"]]),
        ("[fe|]male", [[i, "male" if i % 2 == 0 else "female"] for i in range(1, 11)]),
        ("[fe|||]male", [[i, "female" if i % 4 == 1 else "male"] for i in range(1, 11)]),
        ("[a|(b:1.1)]", [[i, "a" if i % 2 else "(b:1.1)"] for i in range(1, 11)]),
        ("[[a|b]:c:2]", [[1, "a"], [2, "b"], *([i, "c"] for i in range(3, 11))]),
    ],
)
def test_the_texts_of_ten_steps(prompt, expected):
    assert texts(prompt) == expected


@pytest.mark.parametrize(
    "text", ["[a]", "[a:b]", "[a:b:c:3]", r"\[a:3]", r"[a:3\]", r"[a\:3]", "[a (b:c:3]", "[a) b:3]", "a | b", "(a:b:3)"]
)
def test_what_is_not_written_as_a_group_is_text(text):
    assert texts(text) == [[10, text]]


def test_escaped_bars_and_colons_belong_to_the_text():
    assert texts(r"[a\|b|c]")[:2] == [[1, r"a\|b"], [2, "c"]]
    assert texts(r"[a\:b:c:3]") == [[3, r"a\:b"], [10, "c"]]


def test_the_second_pass_of_the_hires_fix_has_the_steps_after_the_first_pass():
    assert texts("a [b:.5] c", 10, base_steps=10) == [[10, "a b c"]]
    assert texts("a [b:1.5] c", 10, base_steps=10) == [[5, "a  c"], [10, "a b c"]]
    assert texts("a [b:13] c", 10, base_steps=10) == [[3, "a  c"], [10, "a b c"]]


def test_the_first_text_has_an_evaluation_more_than_steps_as_in_a1111():
    assert by_evaluation(((3, "a"), (5, "b")), 5) == ("a", "a", "a", "a", "b")
    assert by_evaluation(((1, "a"), (2, "b"), (3, "a"), (4, "b")), 4) == ("a", "a", "b", "a")
    assert by_evaluation(((3, "a"), (5, "b")), 7)[-2:] == ("b", "b")  # a sampler with evaluations to spare


def test_and_joins_parts_with_weights():
    parts = parse("a cat AND a dog :1.2 AND (a:3) bird:-.5\nAND SANDY").parts
    assert [str(part)[: len(str(part)) - len(part.ending)] for part in parts] == [
        "a cat ",
        " a dog ",
        " (a:3) bird",
        " SANDY",
    ]
    assert [part.weight for part in parts] == [1, 1.2, -0.5, 1]
    assert parse("a cat:1.2").parts == (Part((Text("a cat"),), 1.2, ":1.2"),)


def test_a_negative_prompt_has_one_part():
    assert parse("a AND b:1.5", negative=True).parts == (Part((Text("a AND b:1.5"),)),)


def test_tags_are_taken_out():
    prompt = parse("a <lora:x:0.8> cat:1.2 <lora:y><3")
    assert prompt.adapters == (Adapter("lora", "x:0.8"), Adapter("lora", "y"))
    assert prompt.parts == (Part((Text("a  cat:1.2 <3"),)),)
    assert parse("[a:<lora:[b:c>:3]").parts[0].tokens == parse("[a::3]").parts[0].tokens
    assert parse("a cat:1.2 <lora:y:1>").parts[0].weight == 1.2
    assert str(parse("<lo<lora:x:1>ra:y:1>")) == "<lora:x:1><lora:y:1>"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("x", Lora("x", 1, 1)),
        ("x:0.8", Lora("x", 0.8, 0.8)),
        ("x:0.5:-1", Lora("x", 0.5, -1)),
        ("x:0.5:1:8", Lora("x", 0.5, 1, 8)),
        ("x:te=0.5", Lora("x", 0.5, 0.5)),
        ("x:1:unet=0:dyn=4", Lora("x", 1, 0, 4)),
    ],
)
def test_the_tag_of_a_lora(arguments, expected):
    assert lora(Adapter("lora", arguments)) == expected


@pytest.mark.parametrize("tag", ["lora:x:y", "lora:x:nan", "lora:x:2000", "lora:x:1:1:z", "lora:te=1", "lora:x:a=1"])
def test_a_tag_that_cannot_be_read_is_named(tag):
    with pytest.raises(AdapterTagError, match=rf"the tag '<{tag}>' can't be read; write <lora:name>"):
        lora(Adapter(*tag.split(":", 1)))
    with pytest.raises(AdapterTagError, match="'<hypernet:x:1>'"):
        lora(Adapter("hypernet", "x:1"))


def test_plain_syntax_takes_the_text_as_it_is():
    text = "a [b:3] AND (c:2) <lora:x:1> "
    assert parse(text, "plain") == Prompt((Part((Text(text),)),), syntax="plain")
    assert str(parse(text, "plain")) == text
    with pytest.raises(PromptError, match="prompt_syntax is 'compel'; it must be 'plain' or 'a1111'"):
        parse(text, "compel")


def test_a_part_of_infinite_weight_is_refused():
    with pytest.raises(PromptWeightError, match=r"the prompt's part 'a' has the weight '9999.*from -1000 to 1000"):
        parse("a:" + "9" * 500)


@QUICK
@given(ANYTHING)
def test_any_text_parses_and_printing_gives_it_back(text):
    try:
        prompt = parse(text)
    except PromptWeightError:
        return
    assert parse(str(prompt)) == prompt
    if not prompt.adapters:
        assert str(prompt) == text
    for part in prompt.parts:
        made = schedule(part, 5)
        assert [end for end, _ in made] == sorted({end for end, _ in made})
        assert made[-1][0] == 5
        assert len(by_evaluation(made, 6)) == 6


@QUICK
@given(st.text(st.characters(exclude_characters="[]()|:<>\\"), max_size=60).filter(lambda t: not re.search("AND", t)))
def test_text_without_marks_is_unchanged(text):
    assert [text for _, text in schedule(parse(text).parts[0], 5)] == [text]


def work(function):
    """The number of calls, of Python and of C, that a function makes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


TYPICAL = "masterpiece, a [red:blue:0.4] circle on a (green:1.2) field, soft light, 8k, "
UNITS = [TYPICAL, "[", "(", "[a|", "[a:", ")", "<a:", "<a:b", ": ", " ", "a:1", "AND ", "[a:1]", "()", "\\"]


@pytest.mark.parametrize("unit", UNITS)
def test_work_grows_with_the_length_and_not_faster(unit):
    def read(length):
        text = (unit * length)[:length]
        parse(text)
        with suppress(PromptWeightError):
            sections(text)

    assert work(lambda: read(16_000)) < 2.5 * work(lambda: read(8_000)) + 100


def test_groups_nest_without_limit():
    (part,) = parse("[" * 2500 + "a" + ":2]" * 2500).parts
    assert schedule(part, 5) == ((2, ""), (5, "a"))
