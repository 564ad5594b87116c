"""A1111's text of a picture's settings, written and read."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import MetadataError
from engine.infotext import DEFAULTS, Ignored, Settings, parameters_text, parse_parameters

HONOURED = frozenset({"Steps", "Sampler", "CFG scale", "Seed", "Size", "RNG"})
QUICK = settings(max_examples=80, deadline=None)

OF_A1111 = """a cat, (blue:1.2)
second line
Negative prompt: bad, "worse"
and more
Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 965400086, Size: 512x768, \
Model hash: 45dee52b, Model: v1-5, Denoising strength: 0.7, Clip skip: 2, Tiling, Hires upscale: 2, \
Hires prompt: "a, b: \\"c\\"\\nd", Lora hashes: "x: 0123456789ab, y: ba9876543210", Version: v1.10.0"""

VALUES = {
    "Steps": 20,
    "Sampler": "Euler a",
    "Schedule type": "Automatic",
    "CFG scale": 7.0,
    "Seed": 965400086,
    "Size": (512, 768),
    "Model hash": "45dee52b",
    "Model": "v1-5",
    "Denoising strength": 0.7,
    "Clip skip": 2,
    "Hires upscale": 2.0,
    "Hires prompt": 'a, b: "c"\nd',
    "Lora hashes": {"x": "0123456789ab", "y": "ba9876543210"},
    "Tiling": "Tiling",
    "Version": "v1.10.0",
}


def test_a1111s_text_is_read_and_what_is_not_honoured_is_named():
    found, ignored = parse_parameters(OF_A1111, HONOURED)
    assert found == Settings("a cat, (blue:1.2)\nsecond line", 'bad, "worse"\nand more', {**DEFAULTS, **VALUES})
    assert [one.key for one in ignored] == [
        "Schedule type",
        "Denoising strength",
        "Clip skip",
        "Tiling",
        "Hires upscale",
        "Hires prompt",
        "Lora hashes",
        "RNG",
    ]
    assert ignored[-1] == Ignored("RNG", "GPU", "noise is drawn as on the CPU, so the picture is another")
    assert ignored[5] == Ignored("Hires prompt", 'a, b: "c"\nd', "there is no such setting here")


def test_the_text_has_a1111s_order_and_quotes():
    own = ("Hires upscale", "Hires prompt", "Lora hashes")
    values = {key: VALUES[key] for key in (*own, *sorted(VALUES.keys() - set(own)))}
    text = parameters_text(Settings("a cat, (blue:1.2)\nsecond line", 'bad, "worse"\nand more', values))
    assert text == OF_A1111


def test_what_a1111_leaves_out_is_left_out():
    values = {"Steps": 20, "Clip skip": 1, "RNG": "GPU", "Emphasis": "Original", "CFG scale": 7.5}
    assert parameters_text(Settings("a", "", values)) == "a\nSteps: 20, CFG scale: 7.5"
    assert "RNG: CPU" in parameters_text(Settings("a", "", {"RNG": "CPU"}))
    assert parameters_text(Settings("", "", {})) == ""
    assert parameters_text(Settings("", "b", {})) == "Negative prompt: b"


def test_noise_of_the_cpu_is_honoured():
    _, ignored = parse_parameters("a\nSteps: 20, Sampler: Euler, RNG: CPU, Model: x, Version: LatentRT 0.3.0", HONOURED)
    assert ignored == ()


def test_fewer_than_three_pairs_are_of_the_prompt():
    assert parse_parameters("a cat\nSteps: 20, Seed: 1", HONOURED) == (Settings("a cat\nSteps: 20, Seed: 1"), ())
    assert parse_parameters("", HONOURED) == (Settings(""), ())
    assert parse_parameters("a\nNegative prompt: b\nc", HONOURED)[0] == Settings("a", "b\nc")


@pytest.mark.parametrize(
    ("key", "text"),
    [("Steps", "many"), ("Steps", "9" * 5000), ("CFG scale", "nan"), ("Size", "512"), ("Lora hashes", "x")],
)
def test_what_is_no_value_of_its_key_is_named(key, text):
    values = {"Sampler": "Euler", "Model": "x", "Version": "y", "RNG": "CPU"}
    found, ignored = parse_parameters(
        "a\n" + ", ".join(f"{k}: {v}" for k, v in {**values, key: text}.items()), HONOURED
    )
    assert ignored == (Ignored(key, text, "this is no value of it"),)
    assert found.values == {**DEFAULTS, **values}


LINE = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=30)
PROMPT = st.lists(LINE, max_size=3).map("\n".join).map(str.strip).filter(lambda text: "Negative prompt:" not in text)
FREE = st.text(max_size=20)
NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@QUICK
@given(
    PROMPT,
    PROMPT,
    st.fixed_dictionaries(
        {
            "Steps": st.integers(1, 1000),
            "Seed": st.integers(0, 2**64 - 1),
            "CFG scale": st.floats(-1000, 1000),
            "Size": st.tuples(st.integers(8, 4096), st.integers(8, 4096)),
        },
        optional={
            "Model": FREE,
            "Sampler": FREE,
            "Hires prompt": FREE,
            "Clip skip": st.integers(1, 12),
            "RNG": st.sampled_from(["CPU", "GPU", "NV"]),
            "TI hashes": st.dictionaries(NAME, NAME, min_size=1, max_size=3),
            "User": FREE,
        },
    ),
)
def test_writing_and_reading_again_is_the_identity(prompt, negative, values):
    found, _ = parse_parameters(parameters_text(Settings(prompt, negative, values)), HONOURED)
    assert found == Settings(prompt, negative, {**DEFAULTS, **values})


PARTS = ["Steps: 2", ", ", ":", '"', "\\", "Seed", ": 1", "\n", " ", "Negative prompt:", "a-b/c", "0", "é", "Size: 1x"]


@QUICK
@given(st.text(max_size=60) | st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
def test_any_text_is_read(text):
    found, ignored = parse_parameters(text, HONOURED)
    assert isinstance(found, Settings)
    assert all(isinstance(one.text, str) for one in ignored)


@pytest.mark.parametrize("unit", ["a", "a ", "a:", 'a: "', 'ab: "\\', "ab: 1, ", ",", "\n", '"', "\\"])
def test_long_texts_take_no_longer_than_their_length(unit):
    start = time.thread_time()
    parse_parameters(unit * 50_000, HONOURED)
    assert time.thread_time() - start < 2
    with pytest.raises(MetadataError, match="the picture's text has 2000000 characters; at most 1048576 are read"):
        parse_parameters("a" * 2_000_000, HONOURED)
