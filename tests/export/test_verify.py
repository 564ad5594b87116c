"""The verification compares the pictures of two prompts with diffusers', whatever the bundle takes in one call."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from engine import Pipeline
from engine.contract import Range
from engine.family import STABLE_DIFFUSION
from engine.sampling.catalog import SAMPLERS
from export import build, compare, verify
from export import errors as e
from export.sources.checkpoint import resolve
from export.sources.schedulers import SHIPPED

from ..conftest import copy_bundle
from .sources.damage import SCHEDULER, TEXT_WEIGHTS, copy_model, edit, edit_weights

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(tiny_bundles, tmp_path):
    """A copy of a tiny bundle."""
    return copy_bundle(tiny_bundles["sd1"], tmp_path)


def check_picture(source, folder, precision):
    """The bundle in `folder` beside diffusers, 64 x 64 pixels."""
    return verify.check_picture(verify.with_diffusers(source.pipeline(), 64, 64), folder, precision)


def replace_file(bundle, name, content):
    """Another content of a bundle's file, with its size in the manifest."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name]["bytes"] = len(content)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ((1, 1, 1), [1, 1]),
        ((1, 1, 8), [2]),
        ((1, 4, 8), [2]),
        ((2, 2, 2), [2]),
        ((2, 2, 4), [2]),
        ((3, 3, 3), [3]),
        ((5, 6, 8), [5]),
    ],
)
def test_the_prompts_go_into_calls_that_the_bundle_takes(batch, sizes):
    calls = verify.calls(Range(*batch))
    assert [len(prompts) for prompts in calls] == sizes
    together = [prompt for prompts in calls for prompt in prompts]
    assert tuple(together[:2]) == verify.PROMPTS
    assert set(together) == set(verify.PROMPTS)


@pytest.mark.parametrize("batch", [(1, 1, 1), (1, 1, 8), (2, 2, 2), (2, 2, 4), (3, 3, 3)])
def test_two_prompts_are_compared_for_every_range_of_batches(tiny_sources, copied, edit_manifest, batch):
    shapes = json.loads((copied / "manifest.json").read_text())["shapes"]
    edit_manifest(copied, shapes={**shapes, "batch": list(batch)})
    found, picture = check_picture(tiny_sources["sd1"], copied, "fp32")
    assert found.prompts == [verify.PROMPT, "a small green star on a white background"]
    assert (found.scheduler, found.seed, found.steps) == ("pndm", 0, 2)
    assert (found.latents_max_abs < 1e-3, found.pixels_within_1 >= 0.999, found.psnr_db > 50) == (True, True, True)
    assert picture.info["parameters"].startswith(verify.PROMPT)


def test_openvino_measures_bundles_that_take_no_single_picture(copied, edit_manifest):
    pytest.importorskip("openvino")
    from export import openvino as to_openvino

    shapes = json.loads((copied / "manifest.json").read_text())["shapes"]
    edit_manifest(copied, shapes={**shapes, "batch": [2, 2, 4]})
    assert len(to_openvino._pictures(to_openvino.Bundle.open(copied, verify=False), {}, 1, [0, 1])) == 4


def test_a_model_that_does_not_react_to_the_text_is_found(tiny_sources, tiny_bundles, tmp_path):
    model = copy_model(tiny_sources["sd1"].folder, tmp_path / "model")
    edit_weights(TEXT_WEIGHTS, lambda weights: {**weights, "final_layer_norm.weight": torch.zeros(32)})(model)
    source = resolve(str(model))
    source.check()
    with pytest.raises(
        e.VerificationError, match=r"the model does not react to the text: .* give the same picture, with diffusers too"
    ):
        check_picture(source, tiny_bundles["sd1"], "fp32")


def test_a_bundle_that_does_not_react_to_the_text_is_found(tiny_sources, copied):
    """Its tokenizer knows no word; that of the model does."""
    empty = Tokenizer(BPE(vocab={"~": 0, "<|startoftext|>": 622, "<|endoftext|>": 623}, merges=[]))
    replace_file(copied, "tokenizer/tokenizer.json", empty.to_str().encode())
    with pytest.raises(e.VerificationError, match=r"the bundle does not react to the text: .* but not with diffusers"):
        check_picture(tiny_sources["sd1"], copied, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_picture_that_differs_has_a_remedy_for_its_precision(tiny_sources, tiny_bundles, monkeypatch, precision):
    monkeypatch.setitem(compare.PICTURE_TOLERANCE, precision, 100.0)
    with pytest.raises(
        e.VerificationError, match=r"the picture differs from diffusers': PSNR .* --no-verify to keep it anyway"
    ) as caught:
        check_picture(tiny_sources["sd1"], tiny_bundles["sd1"], precision)
    assert ("--precision fp32" in str(caught.value)) == (precision == "fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_overflow_has_a_remedy_for_its_precision(tiny_sources, copied, precision):
    name = "onnx/vae_decoder.onnx.data"
    size = (copied / name).stat().st_size // 4
    replace_file(copied, name, np.full(size, 3e38, np.float32).tobytes())
    with pytest.raises(e.VerificationError, match=f"not finite.* the model overflows in {precision}") as caught:
        check_picture(tiny_sources["sd1"], copied, precision)
    assert ("--precision fp32" in str(caught.value)) == (precision == "fp16")


def test_small_models_are_compared_over_twenty_steps(tiny_sources, monkeypatch):
    monkeypatch.setattr(verify, "SMALL", 50_000_000)
    assert verify.with_diffusers(tiny_sources["sd1"].pipeline(), 64, 64).steps == 20


def test_the_manifest_says_what_was_verified(tiny_sources, copied):
    entry = build.verify_picture(
        copied,
        "fp32",
        {"denoiser": {}},
        verify.with_diffusers(tiny_sources["sd1"].pipeline(), 64, 64),
        lambda message: None,
    )
    assert entry.done
    assert re.fullmatch(r"ONNX Runtime 1\.\d+\.\d+ on the CPU", entry.backend)
    assert (entry.precision, entry.components) == ("fp32", {"denoiser": {}})
    assert list(entry.picture) == [
        "prompts",
        "seed",
        "scheduler",
        "steps",
        "guidance_scale",
        "height",
        "width",
        "latents_max_abs",
        "pixels_within_1",
        "psnr_db",
    ]
    assert json.dumps(entry.picture)


class Fixed:
    """A backend whose outputs are given."""

    def __init__(self, *outputs):
        self.outputs = outputs

    def run(self, component, inputs):
        return self.outputs


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("value", "words"),
    [(2.0, "text_encoder differs from torch by 1.00e"), (np.inf, "text_encoder gives values in its output context")],
)
def test_a_component_that_differs_has_a_remedy_for_its_precision(precision, value, words):
    expected = verify.Reference([{}], [[np.ones((1, 77, 4), np.float32)]])
    with pytest.raises(e.VerificationError, match=words) as caught:
        verify.check_component(
            STABLE_DIFFUSION["text_encoder"], Fixed(np.full((1, 77, 4), value, np.float32)), expected, precision
        )
    assert ("--precision fp32" in str(caught.value)) == (precision != "fp32")


CHOSEN = ("ddim", "euler", "dpmpp_2m_karras", "pndm", "dpmpp_3m_sde", "dpmpp_2s", "unipc", "lcm")
"""One of each kind. tests/engine/sampling compares all."""


@pytest.mark.parametrize("sampler", CHOSEN)
def test_a_scheduler_of_choice_is_shipped_verified_and_runs(tiny_sources, copied, edit_manifest, sampler):
    source = resolve(str(tiny_sources["sd1"].folder), scheduler=sampler)
    config = source.scheduler_config()
    edit_manifest(copied, scheduler=config)
    found, _ = check_picture(source, copied, "fp32")
    assert found.scheduler == sampler.removesuffix("_karras")
    assert bool(config.get("use_karras_sigmas")) == sampler.endswith("_karras")
    assert (config["beta_start"], config["beta_schedule"], config["steps_offset"], config["clip_sample"]) == (
        0.00085,
        "scaled_linear",
        1,
        False,
    )
    with Pipeline.load(copied, backend="onnxruntime", verify=False) as pipeline:
        assert len(pipeline("a ring").images) == 1


def scheduler_classes():
    """Every scheduler of diffusers for torch, with its own defaults."""
    import diffusers

    names = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    assert len(names) > 40
    return names


@pytest.fixture(scope="module")
def renamed(tiny_sources, tmp_path_factory):
    """renamed(config, class): a model with this scheduler."""
    number = iter(range(1000))

    def rename(name, config):
        folder = copy_model(tiny_sources["sd1"].folder, tmp_path_factory.mktemp("renamed") / str(next(number)))
        edit("model_index.json", scheduler=["diffusers", name])(folder)
        (folder / SCHEDULER).unlink()
        (folder / SCHEDULER).write_text(json.dumps({**config, "_class_name": name}, default=str))
        return resolve(str(folder))

    return rename


def with_defaults(name):
    """What diffusers writes for a scheduler that was made without arguments; nothing where it needs a library that is
    not here."""
    import diffusers

    try:
        return dict(getattr(diffusers, name)().config)
    except (ImportError, TypeError, ValueError):
        return {}


RUNNING = {SAMPLERS[name].scheduler_class for name in SHIPPED if name != "pndm"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy")
@pytest.mark.parametrize("name", sorted(scheduler_classes() - RUNNING))
def test_a_scheduler_of_diffusers_that_the_runtime_lacks_is_refused(renamed, name):
    with pytest.raises(
        e.UnsupportedModelError,
        match=f"{name}.*--scheduler NAME: {', '.join(SHIPPED)}",
    ):
        renamed(name, with_defaults(name)).check()


@pytest.mark.parametrize("name", sorted({SAMPLERS[name].scheduler_class for name in CHOSEN if name != "pndm"}))
def test_a_scheduler_with_diffusers_defaults_runs(renamed, copied, edit_manifest, name):
    source = renamed(name, with_defaults(name))
    source.check()
    edit_manifest(copied, scheduler=source.scheduler_config())
    with Pipeline.load(copied, backend="onnxruntime", verify=False) as pipeline:
        assert len(pipeline("a ring").images) == 1


@pytest.mark.parametrize("name", ["pndm_prk", "DPM++ 2M Karras", "restart", "IPNDMScheduler"])
def test_a_sampler_that_bundles_cannot_ship_is_refused(name):
    with pytest.raises(e.UsageError, match=r"which a bundle cannot ship \(calls can take it\); known: ddim, ddpm"):
        resolve(None, scheduler=name)


def test_an_unknown_scheduler_is_refused():
    with pytest.raises(
        e.UsageError,
        match=f"--scheduler 'nope' is not known; known: {', '.join(SHIPPED)}",
    ):
        resolve(None, scheduler="nope")


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "LMSDiscreteScheduler"])
def test_another_scheduler_takes_the_place_of_one_that_the_runtime_lacks(renamed, name):
    source = renamed(
        name,
        {"beta_start": 0.001, "timestep_spacing": "trailing", "solver_order": 3, "prediction_type": "v_prediction"},
    )
    replaced = resolve(str(source.folder), scheduler="EulerDiscreteScheduler")
    replaced.check()
    assert replaced.scheduler_config() == {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.001,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "steps_offset": 1,
        "clip_sample": False,
    }


def test_a_scheduler_is_shipped_as_diffusers_pipeline_uses_it(renamed):
    """StableDiffusionPipeline sets steps_offset to 1 and clip_sample to false, whatever the file says."""
    source = renamed("DDIMScheduler", {"steps_offset": 0, "clip_sample": True})
    assert {key: source.pipeline().scheduler.config[key] for key in ("steps_offset", "clip_sample")} == {
        "steps_offset": 1,
        "clip_sample": False,
    }
    assert {key: source.scheduler_config()[key] for key in ("steps_offset", "clip_sample")} == {
        "steps_offset": 1,
        "clip_sample": False,
    }
