"""What is made of measurements, on stored samples: ratios, and what is refused."""

import copy

import pytest

from benchmarks.errors import BenchmarkUsageError
from benchmarks.latency import evaluate, names, parse_size, prompt, pythons, show

LOADED = {
    "openvino": {"description": "ours", "precision": "bf16", "start": 1.0, "load": 0.5},
    "diffusers": {"description": "theirs", "precision": "fp32", "start": 6.0, "load": 5.0},
}


def sample(total, **changes):
    return {
        "total": total,
        "text_encoder": 0.05 * total,
        "denoise": 0.8 * total,
        "vae_decoder": 0.1 * total,
        "steps": [0.4 * total] * 2,
        "evaluations": 2,
        "synchronised": True,
        **changes,
    }


def turns(ours, theirs, decibels=45.0):
    return [
        {"times": {"openvino": sample(a), "diffusers": sample(b)}, "psnr_db": {"openvino / diffusers": decibels}}
        for a, b in zip(ours, theirs)
    ]


def judged(stored, ends=None):
    first = {name: sample(3.0) for name in LOADED}
    return evaluate(
        LOADED,
        first,
        stored,
        {name: {"peak_bytes": 2**30, "device_bytes": None} for name in LOADED} if ends is None else ends,
        2,
    )


def test_a_side_is_summarized_and_its_first_picture_kept_apart():
    side = judged(turns([1.0, 1.1, 0.9], [2.0, 2.2, 1.8]))["sides"]["openvino"]
    assert (side["first_picture_s"], side["load_s"], side["peak_bytes"], side["evaluations"], side["refused"]) == (
        3.0,
        0.5,
        2**30,
        2,
        [],
    )
    assert side["seconds"]["total"].n == 3
    assert side["seconds"]["step"].n == 6
    assert side["seconds"]["step"].p50 == pytest.approx(0.4)
    assert side["pictures_per_second"] == 2.0


def test_a_ratio_survives_a_drift_that_the_sides_do_not():
    found = judged(turns([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]))
    assert found["ratios"][0]["ratio"].p50 == 2.0
    assert all("spread of" in side["refused"][0] for side in found["sides"].values())


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (turns([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), "the ratio of diffusers to openvino has a spread of 80%"),
        (
            turns([1.0, 1.0], [2.0, 2.0], decibels=12.0),
            "the pictures of openvino and diffusers differ: PSNR 12.0 dB, at least 20 dB",
        ),
        (
            [
                {**turn, "times": {**turn["times"], "diffusers": sample(2.0, synchronised=False)}}
                for turn in turns([1.0, 1.0], [2.0, 2.0])
            ],
            "diffusers was timed without waiting for the device",
        ),
    ],
)
def test_a_ratio_that_cannot_be_believed_is_refused_with_the_reason(stored, words, capsys):
    found = judged(copy.deepcopy(stored))
    (ratio,) = found["ratios"]
    assert ratio["ratio"] is None
    assert words in ratio["refused"][0]
    show(found)
    printed = capsys.readouterr().out
    assert f"refused: {ratio['refused'][0]}" in printed
    assert "times as long" not in printed


def test_an_interruption_before_the_first_turn_leaves_no_numbers():
    found = judged([], ends={})
    assert found["ratios"] == []
    assert found["sides"]["openvino"]["refused"] == ["openvino made no picture after its warm-up"]
    show(found)


def test_no_two_prompts_of_a_run_are_equal():
    assert len({prompt(index) for index in range(40)}) == 40


def test_options_are_read():
    assert names(" a, b,,c ") == ["a", "b", "c"]
    assert names(None) == []
    assert parse_size("768x512") == (768, 512)
    assert pythons(["optimum=/x/python"]) == {"optimum": "/x/python"}
    with pytest.raises(BenchmarkUsageError, match="WIDTHxHEIGHT"):
        parse_size("512")
    with pytest.raises(BenchmarkUsageError, match="SIDE=PATH"):
        pythons(["optimum"])
