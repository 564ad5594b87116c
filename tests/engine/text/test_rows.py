"""The rows of a picture: how many there are, and what each says when."""

import numpy as np
import pytest

from engine.job import conditioning_at
from engine.text.request import Reads, Texts, counted_steps
from engine.text.rows import picture_rows

READS = Reads(width=4, layers=2)


class Spoken:
    """In place of embeddings, the texts that were to be encoded."""

    def __call__(self, texts, tokenized):
        tokenized()
        return [{"context": text} for text in texts]

    def given(self, embedding):
        return {"context": embedding}


def texts(prompt, negative="", **options):
    return Texts.check(READS, prompt, negative, "a1111", **options)


def spoken(prompt, scales, steps=4, negative="", **options):
    """For each row of a picture what it says at every evaluation, and its weights."""
    (rows,) = picture_rows(texts(prompt, negative, **options), Spoken(), np.array(scales), 0.0, steps)
    said = [[conditioning_at(row.conditioning, i)["context"].text for i in range(len(scales))] for row in rows]
    return said, [np.broadcast_to(row.weight, len(scales)).tolist() for row in rows]


def test_parts_are_rows_whose_weights_are_1_together():
    said, weights = spoken("a AND b:0.5", [2.0, 1.0], negative="c")
    assert said == [["c", "c"], ["a ", "a "], [" b", " b"]]
    assert weights == [[-2.0, -0.5], [2.0, 1.0], [1.0, 0.5]]


def test_without_guidance_the_negative_prompt_is_left_out_where_it_has_no_weight():
    assert spoken("a:0.5 AND b:0.5", [1.0]) == ([["a"], [" b"]], [[0.5], [0.5]])
    assert spoken("a", [1.0]) == ([["a"]], [[1.0]])
    assert [len(spoken(prompt, [1.0])[0]) for prompt in ("a AND b", "a:0.5")] == [3, 2]


def test_texts_change_in_every_part_and_in_the_negative_prompt():
    said, _ = spoken("[a:b:2] AND [c|d]", [2.0] * 4, negative="[e:1]")
    assert said == [["", "", "e", "e"], ["a ", "a ", "a ", "b "], [" c", " c", " d", " c"]]


@pytest.mark.parametrize(
    ("steps", "evaluations", "counted"),
    [(20, 20, 20), (20, 19, 19), (20, 39, 40), (20, 40, 40), (2, 3, 2), (1, 1, 1), (10, 21, 20)],
)
def test_samplers_that_evaluate_twice_count_twice_as_many_steps(steps, evaluations, counted):
    assert counted_steps(steps, evaluations) == counted


def test_clip_skip_is_for_the_negative_prompt_too_in_a1111s_language_alone():
    assert (texts("a", clip_skip=1).skip, texts("a", clip_skip=1).negative_skip) == (1, 1)
    plain = Texts.check(READS, "a", "", "plain", 1)
    assert (plain.skip, plain.negative_skip) == (1, 0)


def test_embeddings_take_the_place_of_texts():
    ones = np.ones((2, 77, 4), np.float32)
    given = Texts.check(READS, None, "b", prompt_embeds=ones)
    rows = picture_rows(given, Spoken(), np.array([2.0]), 0.0, 1)
    assert [[row.conditioning["context"] is not None for row in picture] for picture in rows] == [[True, True]] * 2
    np.testing.assert_array_equal(rows[1][1].conditioning["context"], ones[1])
