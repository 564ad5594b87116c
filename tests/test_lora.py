"""Adapters in a pipeline: the pictures are diffusers', and switching leaves nothing behind."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import Pipeline
from engine.errors import (
    AdapterBusyError,
    AdapterError,
    AdapterFamilyError,
    AdapterNameError,
    AdapterWeightError,
    ManifestError,
    TensorFileError,
)
from engine.hires import Hires
from engine.text.conditioning import Text
from export.demo.judge import judge
from export.demo.pictures import Scene, caption

from . import fakes, lora_files
from .conftest import copy_bundle
from .engine.backends.made_up import request_of
from .engine.backends.test_tensorrt import VERSION

pytestmark = pytest.mark.slow
BACKENDS = ["onnxruntime", "openvino"]
PROMPT = "a large red circle on a blue background"
CALL = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 64, "width": 64}


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(kind, tiny_sources):
    return tiny_sources[kind].pipeline()


@pytest.fixture(scope="module")
def ours(kind, tiny_bundles):
    pipelines = [Pipeline.load(tiny_bundles[kind], backend=backend) for backend in BACKENDS]
    yield pipelines
    for pipeline in pipelines:
        pipeline.close()


@pytest.fixture(autouse=True)
def _without_adapters(request):
    yield
    if "ours" in request.fixturenames:
        for pipeline in request.getfixturevalue("ours"):
            pipeline.unload_lora()


def latents(pipeline, seed=3):
    return pipeline(PROMPT, seed=seed, output_type="latent", progress=False, **CALL).images


def latents_of_diffusers(pipeline, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return pipeline(PROMPT, generator=generator, output_type="latent", **CALL).images.numpy()


def check(ours, theirs, file, weight=1.0, changes=0.05):
    """diffusers loads the file too, and makes the same latents, which are not those without it."""
    plain = latents(ours[0])
    theirs.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="it")
    theirs.set_adapters(["it"], [weight])
    try:
        wanted = latents_of_diffusers(theirs)
    finally:
        theirs.unload_lora_weights()
    assert np.abs(wanted - plain).max() > changes
    for pipeline in ours:
        pipeline.load_lora(file, weight=weight)
        assert np.abs(latents(pipeline) - wanted).max() < 1e-3 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("weight", [1.0, -0.6])
def test_a_lora_of_kohya(ours, theirs, tmp_path, weight):
    check(ours, theirs, lora_files.kohya(tmp_path / "a.safetensors", lora_files.random_lora(theirs)), weight)


def test_a_locon_of_kohya(ours, theirs, tmp_path):
    lora = lora_files.random_lora(theirs, convolutions=True)
    check(ours, theirs, lora_files.kohya(tmp_path / "a.safetensors", lora))


def test_the_layers_may_have_compviss_names(ours, theirs, tmp_path):
    lora = lora_files.random_lora(theirs, convolutions=True)
    modules = [name for name, _ in theirs.unet.named_modules()]
    plain = lora_files.kohya(tmp_path / "plain.safetensors", lora)
    named = lora_files.kohya(tmp_path / "named.safetensors", lora, compvis=modules)
    assert any(
        "output_blocks_2_1_transformer" in key or "output_blocks_1_1_transformer" in key for key in load_file(named)
    )
    made = []
    for file in (plain, named):
        ours[0].load_lora(file)
        made.append(latents(ours[0]))
        ours[0].unload_lora()
    assert np.array_equal(*made)


def test_a_lora_of_diffusers_today(ours, theirs, tmp_path):
    check(ours, theirs, lora_files.peft_keys(tmp_path / "a.safetensors", lora_files.random_lora(theirs)))


def test_a_lora_that_diffusers_saved_has_alphas_in_its_metadata(ours, theirs, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "to_v", "proj_in"], rank_pattern={"attn2.to_q": 2},
        alpha_pattern={"attn1.to_v": 3}, use_rslora=True,
    )  # fmt: skip
    theirs.unet.add_adapter(config, "made")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.unet.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    layers = get_peft_model_state_dict(theirs.unet, adapter_name="made")
    theirs.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata={**config.to_dict(), "target_modules": ["to_q"]}
    )
    theirs.unet.delete_adapters("made")
    check(ours, theirs, tmp_path / "pytorch_lora_weights.safetensors")


def test_an_old_lora_of_attention_processors(ours, theirs, tmp_path):
    file = lora_files.processors(tmp_path / "a.safetensors", lora_files.random_lora(theirs))
    today = {
        re.sub(
            r"\.processor\.to_(out|q|k|v)_lora\.", lambda m: f".to_{m[1]}{'.0' if m[1] == 'out' else ''}.lora.", key
        ): value
        for key, value in load_file(file).items()
    }
    today = {key.replace("lora.down", "lora_A").replace("lora.up", "lora_B"): value for key, value in today.items()}
    save_file(today, tmp_path / "today.safetensors")
    check(ours[:1], theirs, tmp_path / "today.safetensors")
    wanted = latents(ours[0])
    ours[0].unload_lora()
    ours[0].load_lora(file)
    assert np.array_equal(latents(ours[0]), wanted)


@pytest.mark.parametrize("old", [True, False])
def test_a_numbered_lora_of_cloneofsimo(ours, theirs, tmp_path, old):
    from engine.adapters.fitting import sorted_as_of_old

    ends = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")
    lora = lora_files.random_lora(theirs)
    names = [name for name in lora["unet"] if name.endswith(ends)]
    order = sorted_as_of_old(names) if old else names
    file = lora_files.cloneofsimo(tmp_path / "a.safetensors", lora, order)
    same = {"unet": {name: lora["unet"][name] for name in names}}
    ours[0].load_lora(lora_files.peft_keys(tmp_path / "same.safetensors", same))
    wanted = latents(ours[0])
    ours[0].unload_lora()
    ours[0].load_lora(file)
    assert np.array_equal(latents(ours[0]), wanted)


def test_several_at_once(ours, theirs, tmp_path):
    files = [
        lora_files.kohya(tmp_path / f"{i}.safetensors", lora_files.random_lora(theirs, seed=10 * i)) for i in (1, 2)
    ]
    for number, file in enumerate(files):
        theirs.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name=f"n{number}")
    theirs.set_adapters(["n0", "n1"], [0.7, 0.4])
    try:
        wanted = latents_of_diffusers(theirs)
    finally:
        theirs.unload_lora_weights()
    for pipeline in ours:
        names = [pipeline.load_lora(file) for file in files]
        pipeline.set_lora_weights(dict(zip(names, (0.7, 0.4))))
        assert np.abs(latents(pipeline) - wanted).max() < 1e-3 * max(1, np.abs(wanted).max())


def test_back_to_none_is_bit_exact(ours, theirs, tmp_path):
    files = [
        lora_files.kohya(tmp_path / f"{i}.safetensors", lora_files.random_lora(theirs, seed=10 * i)) for i in (1, 2)
    ]
    for pipeline in ours:
        plain = latents(pipeline)
        a, b = (pipeline.load_lora(file, weight=0.0) for file in files)
        assert np.array_equal(latents(pipeline), plain)
        assert pipeline.lora_weights == {}
        pipeline.set_lora_weights({a: 1.0})
        first = latents(pipeline)
        pipeline.set_lora_weights({b: 1.0})
        second = latents(pipeline)
        pipeline.set_lora_weights({})
        assert np.array_equal(latents(pipeline), plain)
        pipeline.set_lora_weights({a: 1.0})
        assert np.array_equal(latents(pipeline), first)
        assert not np.array_equal(first, second)
        pipeline.unload_lora()
        assert np.array_equal(latents(pipeline), plain)


def test_full_differences_of_weights_biases_and_norms(ours, theirs, tmp_path):
    """They are added to diffusers' parameters by hand."""
    generator = torch.Generator().manual_seed(1)
    layers = {
        "down_blocks.0.resnets.0.conv1": ("diff", "diff_b"),
        "down_blocks.0.attentions.0.proj_in": ("diff", "diff_b"),
        "mid_block.attentions.0.norm": ("w_norm", "b_norm"),
        "up_blocks.1.attentions.0.transformer_blocks.0.norm2": ("w_norm", "b_norm"),
    }
    tensors, changes = {}, []
    for module, endings in layers.items():
        for ending, name in zip(endings, ("weight", "bias")):
            parameter = theirs.unet.get_parameter(f"{module}.{name}")
            change = torch.randn(parameter.shape, generator=generator) * 0.2
            tensors[f"lora_unet_{module.replace('.', '_')}.{ending}"] = change
            changes.append((parameter, parameter.detach().clone(), change))
    save_file(tensors, tmp_path / "full.safetensors")
    try:
        for parameter, before, change in changes:
            parameter.data = before + 0.5 * change
        wanted = latents_of_diffusers(theirs)
    finally:
        for parameter, before, _ in changes:
            parameter.data = before
    for pipeline in ours:
        assert np.abs(latents(pipeline) - wanted).max() > 0.05
        pipeline.load_lora(tmp_path / "full.safetensors", weight=0.5)
        assert np.abs(latents(pipeline) - wanted).max() < 1e-3 * max(1, np.abs(wanted).max())


def test_a_bundle_in_half_precision_is_as_close_to_diffusers_as_without(tiny_sources, tiny_fp16, tmp_path):
    theirs = tiny_sources["sd1"].pipeline()
    file = lora_files.kohya(tmp_path / "a.safetensors", lora_files.random_lora(theirs, convolutions=True))
    with Pipeline.load(tiny_fp16, backend="onnxruntime") as pipeline:
        plain = np.abs(latents(pipeline) - latents_of_diffusers(theirs)).max()
        theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
        pipeline.load_lora(file)
        assert np.abs(latents(pipeline) - latents_of_diffusers(theirs)).max() < max(2 * plain, 0.02)


def test_the_parts_may_have_weights_of_their_own(ours, theirs, tmp_path):
    file = lora_files.kohya(tmp_path / "a.safetensors", lora_files.random_lora(theirs))
    check(ours[:1], theirs, file)
    pipeline = ours[0]
    both = latents(pipeline)
    pipeline.set_lora_weights({"a": {"unet": 1.0, "text_encoder": 1.0}})
    assert np.array_equal(latents(pipeline), both)
    pipeline.set_lora_weights({"a": {"unet": 1.0}})
    assert not np.array_equal(latents(pipeline), both)


# ------------------------------------------------------------------------------------------- the built-in model


def contexts(pipeline, texts):
    return [next(iter(one.values())) for one in pipeline._encode([Text(text) for text in texts])]


def recolouring(pipeline, unet, file, before, after):
    """A LoRA of the second attentions' keys and values that makes one colour's text mean another colour's: the least
    squares solution, of rank 16."""
    scenes = [
        Scene(shape, before, "white", size)
        for shape in ("circle", "square", "star", "ring")
        for size in ("small", "large")
    ]
    texts = [caption(scene) for scene in scenes]
    found = np.concatenate(contexts(pipeline, [*texts, ""]))
    wanted = np.concatenate(contexts(pipeline, [text.replace(before, after) for text in texts] + [""]))
    moved = np.linalg.lstsq(found.astype(np.float64), (wanted - found).astype(np.float64), rcond=1e-3)[0].T
    lora = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            lora[name] = lora_files.low_rank(module.weight.detach().double().numpy() @ moved, 32)
    return lora_files.kohya(file, {"unet": lora}, alpha=0.0)


def test_a_lora_that_makes_red_blue(demo_bundle, tmp_path):
    from export.sources.checkpoint import resolve

    with Pipeline.load(demo_bundle, backend="onnxruntime") as pipeline:
        file = recolouring(pipeline, resolve(None).load("unet"), tmp_path / "blue.safetensors", "red", "blue")
        scenes = [Scene(shape, "red", "white", "large") for shape in ("triangle", "cross", "circle")]

        def colours():
            made = [
                pipeline(caption(scene), seed=1, num_inference_steps=20, guidance_scale=5, progress=False)
                for scene in scenes
            ]
            return [(verdict.shape, verdict.colour) for verdict in (judge(np.asarray(one.images[0])) for one in made)]

        assert colours() == [(scene.shape, "red") for scene in scenes]
        pipeline.load_lora(file)
        assert colours() == [(scene.shape, "blue") for scene in scenes]
        pipeline.unload_lora("blue")
        assert colours() == [(scene.shape, "red") for scene in scenes]


@pytest.fixture(scope="module")
def demo_pipeline(demo_bundle):
    with Pipeline.load(demo_bundle, backend="onnxruntime") as pipeline:
        yield pipeline


def demo_layers(seed):
    from export.sources.checkpoint import resolve

    source = resolve(None)
    text = lora_files.layers(source.load("text_encoder"), ("q_proj",), seed + 1)
    return {
        "unet": lora_files.layers(source.load("unet"), ("to_q", "to_v"), seed),
        "text_encoder": {name.removeprefix("text_model."): value for name, value in text.items()},
    }


@pytest.fixture(scope="module")
def demo_lora(tmp_path_factory):
    return lora_files.kohya(tmp_path_factory.mktemp("lora") / "right.safetensors", demo_layers(0))


# -------------------------------------------------------------------------------------------------- tags in prompts


@pytest.fixture
def inks(demo_pipeline, demo_lora, tmp_path):
    """A pipeline with the adapters "a" and "b", which are off."""
    demo_pipeline.load_lora(demo_lora, name="a", weight=0)
    demo_pipeline.load_lora(lora_files.kohya(tmp_path / "b.safetensors", demo_layers(5)), weight=0)
    yield demo_pipeline
    demo_pipeline.unload_lora()


def written(pipeline, text, weights=None, **options):
    """The latents of a text in A1111's language, with these adapters on in every call."""
    if weights is not None:
        pipeline.set_lora_weights(weights)
    call = {"num_inference_steps": 2, "seed": 3, "progress": False, "output_type": "latent", **options}
    return pipeline(text, prompt_syntax="a1111", **call).images


def test_a_tag_gives_its_adapter_that_weight_bit_for_bit(inks):
    plain = written(inks, "a ring")
    tagged = written(inks, "a ring <lora:a:0.8>")
    assert np.array_equal(written(inks, "a ring"), plain)
    assert inks.lora_weights == {}
    assert np.array_equal(written(inks, "a ring", {"a": 0.8}), tagged)
    assert not np.array_equal(tagged, plain)
    parts = {"a": {"unet": 0.8, "text_encoder": 0.3}}
    wanted = written(inks, "a ring", parts)
    assert np.array_equal(written(inks, "a ring<lora:a:te=0.3:unet=0.8>", {}), wanted)
    assert np.array_equal(written(inks, "a ring<lora:a:0.3:0.8>"), wanted)


def test_tags_come_on_top_of_what_is_on_in_every_call(inks):
    both = written(inks, "a ring", {"a": 0.8, "b": 0.5})
    assert np.array_equal(written(inks, "<lora:a:0.8> a ring", {"b": 0.5}), both)
    assert set(inks.lora_weights) == {"b"}
    assert np.array_equal(written(inks, "a ring <lora:b:1>"), written(inks, "a ring", {"b": 1}))
    assert np.array_equal(written(inks, "a ring <lora:b:0>"), written(inks, "a ring", {}))


def test_a_calls_adapters_stay_on_for_the_next_call_with_the_same_tags(inks):
    written(inks, "a ring <lora:a:1><lora:b:0.5>")
    weights = inks._backend._changed
    written(inks, ["a star <lora:b:0.5> <lora:a>", "a heart <lora:a:1><lora:b:.5>"])
    assert inks._backend._changed is weights
    written(inks, "a star")
    assert inks._backend._changed == {}


def test_a_tag_may_cut_the_rank(inks, tmp_path):
    lora = demo_layers(0)
    for layers in lora.values():
        for name, (down, up) in layers.items():
            layers[name] = down[:2], up[:, :2]
    inks.load_lora(lora_files.kohya(tmp_path / "cut.safetensors", lora, alpha=1.0), weight=0)
    cut = written(inks, "a ring <lora:cut>")
    np.testing.assert_allclose(written(inks, "a ring <lora:a:1:1:2>"), cut, atol=1e-5)
    assert np.abs(written(inks, "a ring <lora:a>") - cut).max() > 1e-2


def test_a_second_pass_has_the_adapters_of_its_own_prompt(inks):
    small = {"height": 32, "width": 32}
    both = written(inks, "a ring <lora:a>", hires=Hires(prompt="a star <lora:a>"), **small)
    other = written(inks, "a ring <lora:a>", hires=Hires(prompt="a star"), **small)
    assert inks._backend._changed == {}
    assert not np.array_equal(both, other)
    assert np.array_equal(written(inks, "a ring", {"a": 1.0}, hires=Hires(prompt="a star"), **small), both)


def test_a_tag_for_an_adapter_that_is_not_loaded_is_named_before_any_work(inks):
    words = (
        r"no adapter is named 'ink'; loaded are 'a', 'b'. Load it: pipeline.load_lora\(FILE, name='ink'\), or on the"
    )
    for options in ({}, {"hires": Hires(prompt="a ring <lora:ink>")}):
        with pytest.raises(AdapterNameError, match=words):
            written(inks, "a ring" if options else "a ring <lora:ink:0.5>", **options)
    with pytest.raises(AdapterWeightError, match="'a' is 1000; pass a number from -100 to 100"):
        written(inks, "a ring <lora:a:1000>")


def test_loops_of_ones_own_switch_before_they_make_jobs(inks):
    asked = request_of(inks, {"prompt": "a ring <lora:a>", "prompt_syntax": "a1111", "num_inference_steps": 2})
    with pytest.raises(AdapterError, match=r"other adapters than those that are on; call pipeline\.switch_loras\(req"):
        inks.jobs(asked)
    inks.switch_loras(asked)
    assert len(inks.jobs(asked)) == 1


# ------------------------------------------------------------------------------------------------------- errors


def test_a_lora_of_another_family_says_which(demo_pipeline, tmp_path):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{layer}.lora_down.weight": torch.ones(2, 1024), f"{layer}.lora_up.weight": torch.ones(64, 2)}
    save_file(factors, tmp_path / "other.safetensors")
    with pytest.raises(
        AdapterFamilyError, match=r"for Stable Diffusion 2\.x \(.* 1024 .* this model is a model \(.* 128 "
    ):
        demo_pipeline.load_lora(tmp_path / "other.safetensors")
    assert demo_pipeline.lora_weights == {}


def test_an_sdxl_lora_says_so(demo_pipeline, tmp_path):
    layer = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    factors = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    save_file(factors, tmp_path / "xl.safetensors")
    with pytest.raises(AdapterFamilyError, match="trained for Stable Diffusion XL"):
        demo_pipeline.load_lora(tmp_path / "xl.safetensors")


def test_a_key_that_nothing_uses_is_a_warning_with_its_name(demo_pipeline, demo_lora, tmp_path):
    extra = {
        "lora_unet_no_such_layer.lora_down.weight": torch.ones(1, 2),
        "lora_unet_no_such_layer.lora_up.weight": torch.ones(2, 1),
    }
    save_file({**load_file(demo_lora), **extra, "surprise": torch.ones(1)}, tmp_path / "extra.safetensors")
    with pytest.warns(RuntimeWarning, match="these change nothing in this model: surprise, lora_unet_no_such_layer"):
        demo_pipeline.load_lora(tmp_path / "extra.safetensors")
    demo_pipeline.unload_lora()


def test_a_layer_of_another_shape_is_named(demo_pipeline, demo_lora, tmp_path):
    tensors = load_file(demo_lora)
    name = next(key for key in tensors if key.endswith("lora_down.weight"))
    tensors[name] = torch.ones(4, 7)
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(
        AdapterError, match=rf"{name.split('.')[0]} changes a weight of the shape \(\d+, 7\), and the model's"
    ):
        demo_pipeline.load_lora(tmp_path / "wrong.safetensors")
    assert demo_pipeline.lora_weights == {}
    demo_pipeline.load_lora(demo_lora, name="wrong")
    demo_pipeline.unload_lora("wrong")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p, f: p.load_lora("no.safetensors"), AdapterError, r"no\.safetensors is no file"),
        (lambda p, f: p.load_lora(3), AdapterError, "is 3; pass a path"),
        (lambda p, f: p.load_lora(f, name=""), AdapterNameError, "is ''; pass a text"),
        (
            lambda p, f: (p.load_lora(f), p.load_lora(f)),
            AdapterNameError,
            "'right' is loaded already; pass another name=",
        ),
        (
            lambda p, f: p.load_lora(f, weight=float("nan")),
            AdapterWeightError,
            "'right' is nan; pass a number from -100",
        ),
        (lambda p, f: p.load_lora(f, weight=1000), AdapterWeightError, "is 1000; pass a number"),
        (lambda p, f: p.load_lora(f, weight="1"), AdapterWeightError, "is '1'; pass a number"),
        (lambda p, f: p.load_lora(f, weight={"vae": 1}), AdapterWeightError, "is for 'vae'; parts are 'unet' and"),
        (
            lambda p, f: p.set_lora_weights({"what": 1}),
            AdapterNameError,
            "no adapter is named 'what'; none is loaded. Load it",
        ),
        (lambda p, f: p.set_lora_weights(1), AdapterWeightError, "pass a dictionary"),
        (lambda p, f: p.unload_lora("what"), AdapterNameError, "no adapter is named 'what'"),
    ],
)
def test_mistakes_are_named(demo_pipeline, demo_lora, call, error, words):
    try:
        with pytest.raises(error, match=words):
            call(demo_pipeline, demo_lora)
    finally:
        demo_pipeline.unload_lora()
    assert demo_pipeline.lora_weights == {}


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"what is this", TensorFileError, "no safetensors file"),
        ({"weight": torch.ones(2)}, AdapterError, "it is no adapter; for a whole model run"),
        ({"conv_in.weight": torch.ones(2), "conv_in.bias": torch.ones(2)}, AdapterError, "it is no adapter"),
        (
            {"lora_unet_x.lora_down.weight": torch.ones(2, 2)},
            AdapterError,
            r"lora_unet_x has only \['down'\]: the file",
        ),
    ],
)
def test_a_file_that_is_no_adapter_is_named(demo_pipeline, tmp_path, content, error, words):
    file = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    with pytest.raises(error, match=words) as caught:
        demo_pipeline.load_lora(file)
    assert str(file) in str(caught.value)


def test_a_folder_without_an_adapter_is_named(demo_pipeline, tmp_path):
    with pytest.raises(AdapterError, match="is a folder without adapter_model"):
        demo_pipeline.load_lora(tmp_path)


def test_a_switch_while_lanes_hold_jobs_is_refused(demo_pipeline, demo_lora):
    lanes = demo_pipeline.lanes(2, 64, 64)
    (job,) = demo_pipeline.jobs(request_of(demo_pipeline, {"prompt": PROMPT, "num_inference_steps": 2}))
    lanes.admit(0, job)
    lanes.step([0, None])
    with pytest.raises(AdapterBusyError, match="release the lanes first"):
        demo_pipeline.load_lora(demo_lora)
    lanes.release(0)
    demo_pipeline.load_lora(demo_lora)
    demo_pipeline.unload_lora()


def test_a_switch_in_a_callback_is_refused(demo_pipeline, demo_lora):
    from engine.errors import BusyPipelineError

    def switch(pipeline, *_):
        pipeline.load_lora(demo_lora)

    with pytest.raises(BusyPipelineError):
        demo_pipeline(PROMPT, callback_on_step_end=switch, num_inference_steps=2, progress=False)


def test_a_bundle_without_a_table_of_weights_says_how_it_is_built_again(
    demo_bundle, demo_lora, tmp_path, edit_manifest
):
    """As one that was built before there were adapters."""
    bundle = copy_bundle(demo_bundle, tmp_path)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files={name: file for name, file in files.items() if not name.endswith(".weights.json")})
    for table in (bundle / "onnx").glob("*.weights.json"):
        table.unlink()
    with (
        Pipeline.load(bundle, backend="onnxruntime") as pipeline,
        pytest.raises(
            ManifestError, match=r"weights\.json can't be read .*\. Build the bundle again: python build_engi"
        ),
    ):
        pipeline.load_lora(demo_lora)


def test_a_model_without_texts_has_no_adapters(textless_bundles, demo_lora):
    with (
        Pipeline.load(textless_bundles["ddpm"], backend="onnxruntime") as pipeline,
        pytest.raises(AdapterError, match=r"adapters don't change \(textless\); use a"),
    ):
        pipeline.load_lora(demo_lora)


def test_plans_say_that_they_take_an_adapter_when_they_are_built(planned, demo_lora):
    with fakes.install(VERSION), Pipeline.load(planned(VERSION)) as pipeline:
        before = pipeline(PROMPT, seed=0, num_inference_steps=2, progress=False).images[0]
        with pytest.raises(
            AdapterError,
            match=r"adapter in it: python build_engines\.py .* --lora FILE:WEIGHT && python build_engines\.py ",
        ):
            pipeline.load_lora(demo_lora)
        again = pipeline(PROMPT, seed=0, num_inference_steps=2, progress=False).images[0]
    assert np.array_equal(np.asarray(before), np.asarray(again))
