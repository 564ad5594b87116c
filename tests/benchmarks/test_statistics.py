"""Percentiles, pairs, exponents and the rules of refusal, on numbers whose answers are known."""

import numpy as np
import pytest

from benchmarks.statistics import (
    NOISE,
    as_json,
    fitted_exponent,
    pair_ratios,
    refuse_noise,
    refuse_pictures,
    refuse_timing,
    summarize,
)

GOOD = {"total": 1.0, "text_encoder": 0.1, "denoise": 0.7, "vae_decoder": 0.19, "synchronised": True}


def test_a_summary_has_percentiles_and_their_spread():
    found = summarize([float(value) for value in range(101)])
    assert (found.n, found.min, found.p50, found.p90, found.p99) == (101, 0.0, 50.0, 90.0, 99.0)
    assert found.spread == pytest.approx((90 - 10) / 50)


def test_one_measurement_has_no_spread():
    assert summarize([2.0]) == summarize([2.0, 2.0, 2.0]).__class__(1, 2.0, 2.0, 2.0, 2.0, 0.0)


def test_nothing_cannot_be_summarized():
    with pytest.raises(ValueError, match="nothing to summarize"):
        summarize([])


def test_ratios_are_taken_pair_by_pair_so_a_drift_cancels():
    drift = np.linspace(1, 10, 20)
    found = pair_ratios(list(0.5 * drift), list(2.0 * drift))
    assert found.p50 == pytest.approx(4.0)
    assert found.spread == pytest.approx(0.0)
    assert summarize(list(drift)).spread > NOISE


def test_unequal_numbers_of_pairs_are_an_error():
    with pytest.raises(ValueError):
        pair_ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(exponent):
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert fitted_exponent(sizes, [3 * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-9)
    with pytest.raises(ValueError, match="two different sizes"):
        fitted_exponent([2.0, 2.0], [1.0, 1.0])


def test_a_quiet_machine_is_believed_and_a_noisy_one_is_not():
    assert refuse_noise("x", 0.20) == []
    assert refuse_noise("x", 0.21) == [
        "x has a spread of 21%, over 20%: the machine was doing something else. Stop that, and measure again"
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"synchronised": False}, "without waiting for the device"),
        ({"synchronised": None}, "without waiting for the device"),
        ({"denoise": 0.01}, "its stages add up to 0.3 s"),
        ({"denoise": 1.7}, "its stages add up to 1.99 s"),
    ],
)
def test_a_timing_that_lacks_its_synchronisation_is_refused(change, words):
    assert refuse_timing("a picture", GOOD) == []
    (reason,) = refuse_timing("a picture", {**GOOD, **change})
    assert words in reason


def test_pictures_that_differ_are_refused_by_the_lower_precision():
    assert refuse_pictures("a", "b", [60.0, 55.0], ("fp32", "fp32")) == []
    assert refuse_pictures("a", "b", [60.0, 25.0], ("fp32", "bf16")) == []
    (reason,) = refuse_pictures("a", "b", [60.0, 25.0], ("fp32", "fp32"))
    assert reason == "the pictures of a and b differ: PSNR 25.0 dB, at least 50 dB makes them the same in fp32 and fp32"


def test_numbers_are_stored_short():
    assert as_json({"a": summarize([1 / 3]), "b": [np.pi, 7, "x", None]}) == {
        "a": {"n": 1, "min": 0.33333, "p50": 0.33333, "p90": 0.33333, "p99": 0.33333, "spread": 0.0},
        "b": [3.1416, 7, "x", None],
    }
