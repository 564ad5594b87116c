"""Tokens in chunks of 77, with the built-in model's tokenizer, which is CLIP's."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from engine.manifest import SpecialTokens
from engine.text.chunks import chunked
from engine.text.emphasis import EMPHASES, plain, sections
from engine.text.tokenizer import ClipTokenizer
from export.sources.checkpoint import BUILT_IN

FILE = BUILT_IN / "tokenizer" / "tokenizer.json"


@functools.cache
def tokenizer_with(pad):
    theirs = CLIPTokenizer.from_pretrained(FILE.parent, pad_token=pad)
    return ClipTokenizer(FILE, SpecialTokens(theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id))


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def tokenizer(request):
    return tokenizer_with(request.param)


def chunks(text, tokenizer, inversions=None, emphasis="original"):
    return chunked(sections(text), tokenizer, EMPHASES[emphasis], inversions)


def lengths(found):
    """How many tokens are in each chunk."""
    return [int(end) - 1 for end in found.ends]


@pytest.mark.parametrize("text", ["", "a red circle", "ring " * 75, "naïve, 日本語 🎨"])
def test_a_short_text_has_the_ids_that_the_model_was_trained_with(tokenizer, text):
    found = chunked(plain(text), tokenizer, EMPHASES["original"])
    assert found.ids.tolist() == tokenizer([text]).tolist()
    assert found.weights.tolist() == [[1.0] * 77]
    assert lengths(found) == [len(tokenizer.ids(text))]


def test_a_long_text_goes_on_in_the_next_chunk(tokenizer):
    found = chunks("ring " * 160, tokenizer)
    assert lengths(found) == [75, 75, 10]
    assert {tuple(row[[0, end]]) for row, end in zip(found.ids, found.ends)} == {
        (tokenizer.special.start, tokenizer.special.end)
    }
    assert set(found.ids[2, 12:].tolist()) == {tokenizer.special.pad}


@pytest.mark.parametrize(
    ("before", "expected"),
    [(54, [75, 15]), (55, [56, 34]), (74, [75, 15]), (75, [75, 15])],
)
def test_a_full_chunk_ends_behind_a_comma_among_its_last_twenty_tokens(tokenizer, before, expected):
    assert lengths(chunks("ring " * before + "," + " ring" * (89 - before), tokenizer)) == expected


def test_the_last_comma_counts(tokenizer):
    found = chunks("ring " * 60 + "," + "ring " * 5 + "," + "ring " * 30, tokenizer)
    assert lengths(found) == [67, 30]
    assert found.ids[0, 67] == tokenizer.ids(",")[0]


def test_break_fills_the_chunk_with_padding(tokenizer):
    assert lengths(chunks("a b BREAK c", tokenizer)) == [2, 1]
    assert lengths(chunks("BREAK BREAK c BREAK", tokenizer)) == [0, 0, 1]
    assert lengths(chunks("ring " * 75 + "BREAK ring", tokenizer)) == [75, 1]


def test_each_token_has_the_weight_of_its_piece(tokenizer):
    found = chunks("a (red circle:1.5) star", tokenizer)
    assert found.weights[0, :6].tolist() == [1, 1, 1.5, 1.5, 1, 1]
    assert found.mean_restored
    assert not chunks("(a:2)", tokenizer, emphasis="no norm").mean_restored
    assert set(chunks("(a:2)", tokenizer, emphasis="ignore").weights.ravel()) == {1.0}


def test_weights_stay_with_tokens_that_move_to_the_next_chunk(tokenizer):
    found = chunks("ring " * 70 + ", (ring ring ring ring ring ring:2)", tokenizer)
    assert lengths(found) == [71, 6]
    assert found.weights[1, :8].tolist() == [1, 2, 2, 2, 2, 2, 2, 1]


INVERSIONS = {"<cat-toy>": (60000, 60001), "style": (60010,), "style-2": (60020,), "long": tuple(range(61000, 61070))}


def inserted(found):
    return [token for token in found.ids.ravel().tolist() if token >= 60000]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <cat-toy>, (style:1.5)", [60000, 60001, 60010]),
        ("a <CAT-Toy>style.", [60000, 60001, 60010]),
        ("style-2 styles restyle", [60020]),
        ("[style] (<cat-toy>)", [60010, 60000, 60001]),
    ],
)
def test_the_word_of_an_inversion_becomes_its_vectors(tokenizer, text, expected):
    assert inserted(chunks(text, tokenizer, INVERSIONS)) == expected


def test_the_vectors_of_an_inversion_stay_in_one_chunk_and_have_its_weight(tokenizer):
    found = chunks("ring " * 10 + "(long:1.2)", tokenizer, INVERSIONS)
    assert lengths(found) == [10, 70]
    assert found.weights[1, 1:71] == pytest.approx(1.2)


def test_an_inversion_in_plain_text_is_where_diffusers_puts_it(tokenizer):
    theirs = CLIPTokenizer.from_pretrained(FILE.parent)
    theirs.add_tokens(["<cat-toy>", "<cat-toy>_1"])
    added = theirs.convert_tokens_to_ids(["<cat-toy>", "<cat-toy>_1"])
    text = "a photo of a <cat-toy> on a table, <cat-toy>!"
    expected = theirs(text.replace("<cat-toy>", "<cat-toy> <cat-toy>_1")).input_ids
    found = chunked(plain(text), tokenizer, EMPHASES["original"], {"<cat-toy>": added})
    assert found.ids[0, : len(expected)].tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["ring", ",", "a small star", "BREAK", "(ring:1.5)", "[", ")"]), max_size=200))
def test_no_token_is_lost_and_no_chunk_is_overfull(words):
    text = " ".join(words)
    vocabulary = tokenizer_with("!")
    found = chunks(text, vocabulary)
    expected = [token for section in sections(text) for piece in section for token in vocabulary.ids(piece.text)]
    assert [token for row, end in zip(found.ids, found.ends) for token in row[1:end].tolist()] == expected
    assert max(lengths(found)) <= 75
    assert found.ids.shape == found.weights.shape == (len(found.ends), 77)
