"""Tokens against transformers' CLIPTokenizer, and the warning about text that is cut off against diffusers'."""

import logging

import pytest
import torch

from engine import Pipeline

TEXTS = [
    "",
    " ",
    "a large red circle on a blue background",
    "An IMAGE of a Zebra, small-orange  star 42",
    "it's we'll they've 3.14",
    "naïve café — déjà vu",
    "日本語 テスト",
    "emoji 🎨🖼️ mix",
    "<|endoftext|> inside",
    "tab\tnew\nline",
    "a&amp;b &lt;c&gt;",
    "UPPER lower 123abc a1b2",
    "x" * 300,
    "ring " * 75,
    "ring " * 76,
]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def both(request, tiny_bundles, tiny_sources):
    return Pipeline.load(tiny_bundles[request.param]), tiny_sources[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_transformers(both, text):
    pipeline, source = both
    expected = source.tokenizer()(
        text, padding="max_length", max_length=77, truncation=True, return_tensors="np"
    ).input_ids
    assert pipeline._encode._tokenizer([text]).tolist() == expected.tolist()


def test_cut_off_text_is_named_as_diffusers_names_it(both, caplog):
    pipeline, source = both
    text = "a large red circle " * 18 + "and a green star"
    with caplog.at_level(logging.WARNING, logger="engine"):
        pipeline._encode._tokenizer([text])
    ours = [record.getMessage() for record in caplog.records]
    caplog.clear()
    theirs_logger = logging.getLogger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    theirs_logger.addHandler(handler)
    theirs_logger.setLevel(logging.WARNING)
    with torch.no_grad():
        source.pipeline().encode_prompt(text, "cpu", 1, False)
    theirs_logger.removeHandler(handler)
    assert ours == messages
    assert "truncated because CLIP can only handle sequences up to 77 tokens" in ours[0]


def test_text_that_fits_gives_no_warning(both, caplog):
    with caplog.at_level(logging.WARNING, logger="engine"):
        both[0]._encode._tokenizer(["ring " * 75])
    assert not caplog.records
