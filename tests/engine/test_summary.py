"""What is said of a finished picture is true of this run, whatever the manifest holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pipeline import Result
from engine.summary import times, verification

ORT = "ONNX Runtime 1.32.0 on the CPU"
PICTURE = {
    "steps": 20,
    "scheduler": "ddim",
    "seed": 0,
    "pixels_within_1": 1.0,
    "psnr_db": 99.0,
    "latents_max_abs": 2.742e-06,
}
DONE = {"done": True, "backend": ORT, "precision": "fp32", "picture": PICTURE}
NUMBERS = "100.00% of the values within 1 of 255, PSNR 99.0 dB, latents within 2.7e-06 (20 steps, ddim, seed 0)"
MIXED = "OpenVINO 2026.4.1 on the CPU (text_encoder fp32, denoiser bf16)"


def test_the_number_stands_for_the_backend_that_it_was_measured_with():
    assert verification({"verification": DONE}, ORT) == [
        f"when built, {ORT} in fp32 made diffusers' picture: {NUMBERS}"
    ]


@pytest.mark.parametrize(
    "description",
    ["OpenVINO 2026.4.1 on the CPU (denoiser fp32)", "ONNX Runtime 1.32.0 on GPU 0", "ONNX Runtime 1.20.0 on the CPU"],
)
def test_another_backend_is_told(description):
    first, second = verification({"verification": DONE}, description)
    assert NUMBERS in first
    assert second == f"this run used {description}, which was not compared"


def test_bf16_parts_have_their_own_number():
    manifest = {"verification": DONE, "openvino": {"picture": {"psnr_db": 47.2}}}
    assert (
        verification(manifest, MIXED)[1]
        == "this run was partly in bf16; against fp32, pictures had 47.2 dB PSNR that way when these parts were chosen"
    )
    assert verification({"verification": DONE}, MIXED)[1] == f"this run used {MIXED}, which was not compared"


def test_bundles_of_older_versions_name_no_backend():
    manifest = {"precision": "fp16", "verification": {"done": True, "picture": PICTURE}}
    assert verification(manifest, ORT) == [
        f"when built, ONNX Runtime on the CPU in fp16 made diffusers' picture: {NUMBERS}"
    ]
    assert len(verification(manifest, MIXED)) == 2


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"done": False}, "it was built with --no-verify"),
        ({"done": False, "reason": "no torch"}, "no torch"),
        (None, "--no-verify"),
        (5, "--no-verify"),
    ],
)
def test_a_bundle_that_was_never_compared(entry, words):
    (line,) = verification({"verification": entry}, ORT)
    assert line.startswith("this bundle was not compared with diffusers (")
    assert words in line
    assert verification({}, ORT) == verification({"verification": {}}, ORT)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from([*PICTURE, *DONE, "verification", "openvino", "precision"]), inner, max_size=4
        )
    ),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(entry=JSON, picture=JSON, openvino=JSON)
def test_no_manifest_makes_the_summary_fail(entry, picture, openvino):
    done = {**(entry if isinstance(entry, dict) else {}), "done": True}
    for manifest in (
        {"verification": entry, "openvino": openvino},
        {"verification": {**done, "picture": picture}, "openvino": {"picture": openvino}},
    ):
        for description in (ORT, MIXED):
            assert all(isinstance(line, str) for line in verification(manifest, description))


def test_preparing_is_told_apart_from_the_steps():
    timings = {
        "tokenize": 0.001,
        "text_encoder": 0.002,
        "prepare": 0.9,
        "denoise": 0.2,
        "steps": [0.1, 0.1],
        "vae_decoder": 0.05,
        "total": 1.2,
    }
    results = [Result(None, timings, [0], 2, False)] * 2
    assert times(results) == (
        "tokenize 2.0 ms, text encoder 4.0 ms, preparing the loop 1800.0 ms, 4 steps of 100.0 ms, VAE decoder 100.0 "
        "ms, "
        "total 2400.0 ms"
    )
