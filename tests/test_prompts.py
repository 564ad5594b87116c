"""What prompts say to the U-Net: the same as diffusers where it has the same, and what the language means."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from engine import Pipeline
from engine.errors import InversionError, InversionWidthError
from engine.text.conditioning import Text
from engine.text.emphasis import EMPHASES
from export.demo.judge import judge

from .test_image_to_image import BACKENDS
from .test_parity import PROMPTS

slow = pytest.mark.slow
FAST = {"num_inference_steps": 4, "seed": 3, "guidance_scale": 7.5, "progress": False, "output_type": "latent"}


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def both(request, tiny_bundles, tiny_sources):
    """Our pipelines, one on each backend of a CPU, and diffusers' of the same model."""
    with ExitStack() as stack:
        ours = [stack.enter_context(Pipeline.load(tiny_bundles[request.param], backend=name)) for name in BACKENDS]
        theirs = tiny_sources[request.param].pipeline()
        theirs.set_progress_bar_config(disable=True)
        yield ours, theirs


@pytest.fixture
def pipeline(tiny_bundles):
    """One whose words a test may change."""
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as opened:
        yield opened


def embedded(pipeline, text, **options):
    """A text's embedding [T, C]."""
    return pipeline._encode([Text(text, **options)])[0]["context"]


def hidden(theirs, ids, skip=0):
    """diffusers' embedding [1, 77, C] of ids, without the last layers."""
    encoder = getattr(theirs.text_encoder, "text_model", theirs.text_encoder)
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
        return encoder.final_layer_norm(states[-(skip + 1)]).numpy()


def encoded(theirs, *texts):
    """diffusers' embeddings of texts."""
    with torch.no_grad():
        return theirs.encode_prompt(list(texts), "cpu", 1, False)[0]


def theirs_made(theirs, **options):
    """The latents that diffusers makes."""
    options = {"num_inference_steps": 4, "guidance_scale": 7.5, **options}
    with torch.no_grad():
        return theirs(generator=torch.Generator().manual_seed(3), output_type="latent", **options).images.numpy()


def check_same(ours, latents, *prompt, **options):
    for pipeline in ours:
        made = pipeline(*prompt, **{**FAST, "height": 64, "width": 64, **options}).images
        assert np.abs(made - latents).max() < 1e-3, pipeline.description


# --- as in diffusers


@slow
def test_embeddings_of_a_call_stand_for_its_texts_as_in_diffusers(both):
    ours, theirs = both
    prompts, negative = encoded(theirs, *PROMPTS), encoded(theirs, "a ring", "")
    latents = theirs_made(theirs, prompt_embeds=prompts, negative_prompt_embeds=negative)
    given = {"prompt_embeds": prompts.numpy(), "negative_prompt_embeds": negative.numpy()}
    check_same(ours, latents, **given)
    check_same(ours, latents, PROMPTS, negative_prompt=["a ring", ""])
    check_same(ours, latents, prompt_embeds=given["prompt_embeds"], negative_prompt=["a ring", ""])


@slow
def test_embeddings_may_have_any_number_of_tokens(both):
    ours, theirs = both
    random = np.random.default_rng(0)
    prompts, negative = (random.standard_normal((2, 100, 32)).astype(np.float32) for _ in range(2))
    latents = theirs_made(theirs, prompt_embeds=torch.tensor(prompts), negative_prompt_embeds=torch.tensor(negative))
    check_same(ours, latents, prompt_embeds=prompts, negative_prompt_embeds=negative)


@slow
def test_clip_skip_leaves_layers_out_as_in_diffusers(both):
    """diffusers does not apply it to the negative prompt, A1111 does."""
    ours, theirs = both
    ids = theirs.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    skipped, negative = torch.tensor(hidden(theirs, ids, skip=1)), encoded(theirs, "", "")
    latents = theirs_made(theirs, prompt_embeds=skipped, negative_prompt_embeds=negative)
    check_same(ours, latents, PROMPTS, clip_skip=1)
    empty = theirs.tokenizer(["", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    latents = theirs_made(
        theirs, prompt_embeds=skipped, negative_prompt_embeds=torch.tensor(hidden(theirs, empty, skip=1))
    )
    check_same(ours, latents, PROMPTS, clip_skip=1, prompt_syntax="a1111")


@slow
@pytest.mark.parametrize("mode", EMPHASES)
def test_a_weight_multiplies_the_vectors_of_its_tokens(both, mode):
    """`original` then brings the mean of the whole embedding back."""
    ours, theirs = both
    ids = theirs.tokenizer("a red circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
    wanted = hidden(theirs, ids)[0]
    mean = wanted.mean()
    if mode != "ignore":
        wanted[2] *= np.float32(1.3)  # start, a, red
    if mode == "original" and abs(wanted.mean()) > 1e-3:
        wanted *= mean / wanted.mean()
    for pipeline in ours:
        made = embedded(pipeline, "a (red:1.3) circle", syntax="a1111", emphasis=EMPHASES[mode])
        np.testing.assert_allclose(made, wanted, atol=2e-5)


@slow
@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        (f"{PROMPTS[0]} BREAK a red ring", [PROMPTS[0], "a red ring"]),
        (", ".join([PROMPTS[1]] * 9), [f"{PROMPTS[1]}," * 6, ", ".join([PROMPTS[1]] * 3)]),
    ],
    ids=["BREAK", "108 tokens"],
)
def test_a_long_prompt_is_read_in_chunks(both, prompt, chunks):
    """Each is encoded by itself; the U-Net sees them one behind the other. The negative prompt is read twice."""
    ours, theirs = both
    wanted, negative = (torch.cat([encoded(theirs, one) for one in texts], dim=1) for texts in (chunks, ["", ""]))
    latents = theirs_made(theirs, prompt_embeds=wanted, negative_prompt_embeds=negative)
    check_same(ours, latents, prompt, prompt_syntax="a1111")


# --- textual inversion


def write_vectors(folder, count, width=32, word="<toy>"):
    """A file as diffusers writes it, with vectors of the size that tokens have."""
    vectors = 0.02 * torch.randn((count, width), generator=torch.Generator().manual_seed(count))
    file = folder / f"{count}.bin"
    torch.save({word: vectors}, file)
    return file


@slow
@pytest.mark.parametrize("count", [1, 3])
def test_a_word_stands_for_its_vectors_as_in_diffusers(tiny_sources, pipeline, tmp_path, count):
    theirs, file = tiny_sources["sd1"].pipeline(), write_vectors(tmp_path, count)
    theirs.load_textual_inversion(str(file))
    assert pipeline.load_textual_inversion(file) == "<toy>"
    for text in ("a <toy> on a blue background", "<toy>", "a red circle"):
        np.testing.assert_allclose(embedded(pipeline, text), encoded(theirs, text)[0], atol=2e-5)


@slow
def test_a_word_works_inside_the_language(pipeline, tmp_path):
    pipeline.load_textual_inversion(write_vectors(tmp_path, 2))
    ignored = {"syntax": "a1111", "emphasis": EMPHASES["ignore"]}
    np.testing.assert_array_equal(
        embedded(pipeline, "a (<toy>:1.3), red", **ignored), embedded(pipeline, "a <toy>, red")
    )
    changing = {**FAST, "prompt_syntax": "a1111"}
    np.testing.assert_array_equal(pipeline("[<toy>:ring:1.0]", **changing).images, pipeline("<toy>", **FAST).images)
    assert np.abs(pipeline("[ring|<toy>]", **changing).images - pipeline("ring", **FAST).images).max() > 1e-4


@slow
def test_unloading_a_word_restores_what_it_was(pipeline, tmp_path):
    before = pipeline("a <toy>", **FAST).images
    for count in (1, 2):
        pipeline.load_textual_inversion(write_vectors(tmp_path, count))
        assert np.abs(pipeline("a <TOY>", **FAST).images - before).max() > 1e-4
        pipeline.unload_textual_inversion("<toy>")
        np.testing.assert_array_equal(pipeline("a <toy>", **FAST).images, before)


def test_words_that_cannot_be_loaded_or_unloaded(pipeline, tmp_path):
    file = write_vectors(tmp_path, 1)
    pipeline.load_textual_inversion(file, token="<a>")
    with pytest.raises(InversionError, match=r"'<A>' has vectors already; unload_textual_inversion\('<A>'\) first"):
        pipeline.load_textual_inversion(file, token="<A>")
    with pytest.raises(InversionError, match="no textual inversion has the word '<b>'; loaded are: '<a>'"):
        pipeline.unload_textual_inversion("<b>")
    with pytest.raises(InversionWidthError, match=r"'<toy>' are for text_encoder of width 768 \(SD 1.x\), and this"):
        pipeline.load_textual_inversion(write_vectors(tmp_path, 1, width=768))


# --- judged


def drawn(demo, prompt, **options):
    made = demo(
        prompt,
        prompt_syntax="a1111",
        **{"num_inference_steps": 12, "guidance_scale": 5.0, "seed": [0, 1], "progress": False, **options},
        num_images_per_prompt=2,
    )
    return [judge(np.asarray(image)) for image in made.images]


@slow
def test_a_text_that_changes_draws_the_colour_that_it_has_for_longer(demo):
    for when, colour in ((0.5, "blue"), (0.9, "red")):
        verdicts = drawn(demo, f"a large [red:blue:{when}] circle on a white background")
        assert {(one.shape, one.colour, one.background) for one in verdicts} == {("circle", colour, "white")}


@slow
def test_texts_in_turn_draw_the_last_one(demo):
    for steps, colour in ((11, "red"), (12, "blue")):
        verdicts = drawn(demo, "a large [red|blue] circle on a white background", num_inference_steps=steps)
        assert {(one.shape, one.colour) for one in verdicts} == {("circle", colour)}


@slow
def test_the_heavier_part_decides_what_is_drawn(demo):
    for circle, star in ((0.8, 0.2), (0.2, 0.8)):
        verdicts = drawn(
            demo, f"a large red circle on a blue background:{circle} AND a large red star on a blue background:{star}"
        )
        wanted = "circle" if circle > star else "star"
        assert {(one.shape, one.colour, one.background) for one in verdicts} == {(wanted, "red", "blue")}


@slow
def test_a_word_of_weight_0_is_not_drawn(demo):
    assert all(
        one.shape == "circle" and one.overlap > 0.8 for one in drawn(demo, "a large circle on a blue background")
    )
    assert all(one.overlap < 0.5 for one in drawn(demo, "a large (circle:0) on a blue background"))


@slow
def test_a_prompt_of_two_chunks_is_drawn(demo):
    verdicts = drawn(demo, " BREAK ".join(["a large purple circle on a white background"] * 2))
    assert {(one.shape, one.colour, one.background) for one in verdicts} == {("circle", "purple", "white")}
