"""What is wrong with a model is found by `Source.check()` and named, before anything is traced."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from export import build, component
from export import errors as e
from export.sources import checkpoint, diffusers_folder
from export.sources.checkpoint import BUILT_IN, resolve

from ...models import write_tiny_model
from .compvis_names import compvis_modules, compvis_state_dict
from .damage import (
    FAMILIES,
    SCHEDULER,
    TEXT_WEIGHTS,
    UNET_WEIGHTS,
    VAE_WEIGHTS,
    as_bin,
    copy_model,
    edit,
    edit_weights,
    nan,
    without,
)

MODEL_ERRORS = (e.UnreadableModelError, e.UnsupportedModelError, e.UnsafePickleError, e.UsageError)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that is whole."""
    return write_tiny_model(tmp_path_factory.mktemp("whole") / "model", "sd1")


@pytest.fixture
def copied(model, tmp_path):
    return copy_model(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, damages in FAMILIES.items() for name in damages]
)
def test_a_damaged_model_is_named_before_anything_is_traced(copied, tmp_path, monkeypatch, family, name):
    damage, words = FAMILIES[family][name]
    damage(copied)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MODEL_ERRORS, match=words):
        resolve(str(copied)).check()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name", ["VAE without decoder.conv_in.weight", "text encoder without a tensor", "code in the U-Net"]
)
def test_a_build_without_verification_refuses_it_too(copied, tmp_path, monkeypatch, name):
    monkeypatch.setattr(component, "export_onnx", lambda *arguments: pytest.fail("something was traced"))
    FAMILIES["weights"][name][0](copied)
    with pytest.raises(MODEL_ERRORS, match=FAMILIES["weights"][name][1]):
        build.build(resolve(str(copied)), tmp_path / "engines", "fp32", build.default_shapes(64), verify=False)
    assert not (tmp_path / "engines" / "model").exists()


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_attention_names(weights):
    """The VAE's attention as Stable Diffusion 1.5's files call it."""

    def old(name):
        for new, former in OLD_NAMES.items() if "attentions" in name else ():
            name = name.replace(f".{new}.", f".{former}.")
        return name

    return {old(name): value for name, value in weights.items()}


def old_clip_names(weights):
    """The text encoder as Stable Diffusion 1.5's files call it."""
    return {
        **{f"text_model.{name}": value for name, value in weights.items()},
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }


def whole_clip(weights):
    return {
        **weights,
        "text_projection.weight": torch.zeros(32, 32),
        "logit_scale": torch.zeros(()),
        "vision_model.x": torch.zeros(3),
    }


def as_variant(variant, dtype):
    """Weights in half precision with the variant in their names, the U-Net's in several files."""

    def apply(folder):
        for name in (VAE_WEIGHTS, TEXT_WEIGHTS):
            weights = {key: value.to(dtype) for key, value in load_file(folder / name).items()}
            (folder / name).unlink()
            save_file(weights, (folder / name).with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
        (folder / UNET_WEIGHTS).unlink()
        unet.save_pretrained(folder / "unet", variant=variant, max_shard_size="100KB")

    return apply


def dreambooth(folder):
    """What training leaves beside the model."""
    (folder / "checkpoint-400" / "unet").mkdir(parents=True)
    (folder / "checkpoint-400" / "optimizer.bin").write_bytes(b"x")
    (folder / "logs").mkdir()
    edit("model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"], safety_checker=[None, None])(
        folder
    )
    weights = {f"text_model.{key}": value for key, value in load_file(folder / TEXT_WEIGHTS).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (folder / TEXT_WEIGHTS).unlink()
    save_file(weights, folder / TEXT_WEIGHTS, metadata={"format": "pt"})


def as_shards(folder):
    for part, cls in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        whole = cls.from_pretrained(folder / part)
        (folder / (UNET_WEIGHTS if part == "unet" else TEXT_WEIGHTS)).unlink()
        whole.save_pretrained(folder / part, max_shard_size="50KB")
        assert len(list((folder / part).glob("*.safetensors"))) > 1


def as_bins(folder):
    for part in ("unet", "vae", "text_encoder"):
        as_bin(part)(folder)


def added_tokens(folder):
    """tokenizer_config.json as older versions of transformers wrote it."""

    def token(name):
        return {
            "__type": "AddedToken",
            "content": name,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }

    edit("tokenizer/tokenizer_config.json", bos_token=token("<|startoftext|>"), eos_token=token("<|endoftext|>"))(
        folder
    )


HARMLESS = {
    "nothing": lambda folder: None,
    "old names of the VAE's attention": edit_weights(VAE_WEIGHTS, old_attention_names),
    "old names of the text encoder": edit_weights(TEXT_WEIGHTS, old_clip_names),
    "a whole CLIP model": edit_weights(TEXT_WEIGHTS, whole_clip),
    "half precision": edit_weights(
        UNET_WEIGHTS, lambda weights: {name: value.half() for name, value in weights.items()}
    ),
    "fp16 variants": as_variant("fp16", torch.float16),
    "bf16 variants": as_variant("bf16", torch.bfloat16),
    "DreamBooth": dreambooth,
    "several files": as_shards,
    "pickles": as_bins,
    "tokens with their options": added_tokens,
    "a folder that is called like a file": lambda folder: (folder / "unet" / "x.json").mkdir(),
    "an img2img pipeline": edit("model_index.json", _class_name="StableDiffusionImg2ImgPipeline"),
    "no sample_size": edit("unet/config.json", sample_size=None),
    "betas of its own": edit(SCHEDULER, trained_betas=[0.001 + i / 1e5 for i in range(1000)]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_accepted_and_gives_the_same_weights(model, copied, capfd, name):
    HARMLESS[name](copied)
    source, whole = resolve(str(copied)), resolve(str(model))
    source.check()
    for part in ("unet", "vae", "text_encoder"):
        assert source.fingerprint(part)
        given, wanted = getattr(source, part)().state_dict(), getattr(whole, part)().state_dict()
        for key, value in wanted.items():
            assert torch.allclose(given[key], value, rtol=4e-3, atol=1e-3), key
    assert capfd.readouterr().err == ""


def test_a_folder_of_models_says_which_to_pass(model, tmp_path):
    copy_model(model, tmp_path / "trained" / "800")
    (tmp_path / "trained" / "last.ckpt").write_bytes(b"x")
    with pytest.raises(e.UnreadableModelError, match=r"no model_index.* what is in it: .*/800, .*/last\.ckpt"):
        resolve(str(tmp_path / "trained"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.ckpt", b"", r"empty\.ckpt cannot be read: the file is empty"),
        ("empty.safetensors", b"", r"empty\.safetensors cannot be read: the file is empty"),
        ("page.ckpt", b"\n<!DOCTYPE html>", r"page\.ckpt cannot be read: it is a web page \(HTML\)"),
        ("page.safetensors", b"<html>", r"it is a web page \(HTML\)"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        (
            "noise.pt",
            b"\x01\x02\x03",
            r"noise\.pt cannot be read: it begins with b'\\x01\\x02\\x03', so it is neither safetensors nor",
        ),
        ("cut.ckpt", b"PK\x03\x04abc", r"cut\.ckpt cannot be read: RuntimeError: .*archive"),
        ("pickle.ckpt", b"\x80\x02abc", r"pickle\.ckpt"),
    ],
)
def test_a_single_file_that_holds_something_else_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((e.UnreadableModelError, e.UnsafePickleError), match=words):
        resolve(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ([torch.zeros(1)], e.UnreadableModelError, "holds a list, not tensors by name"),
        ({"state_dict": [torch.zeros(1)]}, e.UnreadableModelError, "holds a list, not tensors by name"),
        (torch.zeros(1), e.UnreadableModelError, "holds a Tensor, not tensors by name"),
        ({}, e.UnsupportedModelError, "not a whole Stable Diffusion checkpoint"),
        (
            {"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": 5}},
            e.UnsupportedModelError,
            "not a whole Stable Diffusion checkpoint",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".PTH"])
def test_a_pickle_that_holds_no_checkpoint_is_named(tmp_path, content, error, words, suffix):
    torch.save(content, tmp_path / f"model{suffix}")
    with pytest.raises(error, match=words):
        resolve(str(tmp_path / f"model{suffix}"))


@pytest.fixture(scope="module")
def single():
    """The tensors of a small single file of the SD 1.x kind."""
    return compvis_state_dict(compvis_modules("sd1"))


def write_single(weights, file):
    if file.suffix.lower() == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({"state_dict": weights, "global_step": 5}, file)
    return file


def test_a_single_file_is_read_by_what_it_holds(tmp_path, single):
    """Whatever its suffix says, and whichever version of torch wrote it."""
    safetensors, legacy = tmp_path / "tensors.ckpt", tmp_path / "legacy.ckpt"
    save_file(single, safetensors)
    torch.save({"state_dict": single}, legacy, _use_new_zipfile_serialization=False)
    for file in (
        safetensors,
        legacy,
        write_single(single, tmp_path / "model.SAFETENSORS"),
        write_single(single, tmp_path / "model.pth"),
    ):
        source = resolve(str(file), tokenizer=BUILT_IN / "tokenizer")
        source.check()
        assert source.inputs == (file, BUILT_IN / "tokenizer")


UNET_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            without(f"{UNET_PREFIX}time_embed.0.weight"),
            r"single\.safetensors: .* 1 of the model's tensors are missing \(time_embedding.linear_1.weight\)",
        ),
        (without(f"{UNET_PREFIX}middle_block.1.norm.weight"), r"are missing \(mid_block.attentions.0.norm.weight\)"),
        (without("first_stage_model.decoder.conv_out.bias"), r"are missing \(decoder.conv_out.bias\)"),
        (without(f"{TEXT_PREFIX}final_layer_norm.weight"), r"are missing \(final_layer_norm.weight\)"),
        (lambda w: {**w, f"{TEXT_PREFIX}extra": torch.zeros(2)}, r"are not the model's \(extra\)"),
        (
            lambda w: {**w, f"{UNET_PREFIX}out.2.bias": torch.zeros(9)},
            r"have another shape \(conv_out.bias \[9\] instead of \[4\]\)",
        ),
        (
            lambda w: {**w, f"{UNET_PREFIX}out.2.bias": torch.zeros(4, dtype=torch.int8)},
            r"holds integers: model.diffusion_model.out.2.bias \(torch.int8\)",
        ),
        (lambda w: nan(w, f"{UNET_PREFIX}out.2.bias"), r"not finite \(conv_out.bias\)"),
    ],
)
def test_a_single_file_whose_tensors_do_not_fit_is_named(tmp_path, single, change, words):
    changed = change({name: value.clone() for name, value in single.items()})
    with pytest.raises((e.UnreadableModelError, e.UnsupportedModelError), match=words):
        resolve(str(write_single(changed, tmp_path / "single.safetensors")), tokenizer=BUILT_IN / "tokenizer").check()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "model.gguf",
            r"model\.gguf is a file of a kind that is not supported \(\.gguf\); a single file must be one of "
            r"\.safetensors, \.ckpt, \.pt, \.pth",
        ),
        ("model", r"model is a file of a kind that is not supported \(no suffix\)"),
        ("gone.safetensors", r"there is no file gone\.safetensors"),
        ("gone.SAFETENSORS", "there is no file"),
        ("gone.pt", "there is no file"),
        ("gone.pth", "there is no file"),
        ("models/typo", "there is no file or folder models/typo"),
        ("./typo", r"there is no file or folder \./typo"),
        ("/nowhere/model", "there is no file or folder /nowhere/model"),
        ("a/b/c", "there is no file or folder a/b/c"),
        ("", "'' is neither a folder nor a file"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "no folder or file here"),
        ("pipe", "'pipe' is neither a folder nor a file"),
    ],
)
def test_a_path_is_never_looked_for_on_the_hub(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "download", lambda *arguments: pytest.fail("the hub was asked"))
    (tmp_path / "models").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"x")
    (tmp_path / "model").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(e.UnknownModelError, match=words):
        resolve(name)


def test_a_hub_model_is_its_snapshot(model, monkeypatch):
    monkeypatch.setattr(checkpoint, "download", lambda repository: model)
    source = resolve("owner/name")
    source.check()
    assert (source.name, source.origin, source.inputs) == ("name", {"kind": "hub", "id": "owner/name"}, (model,))


@pytest.mark.parametrize(
    "options", [{"tokenizer": BUILT_IN / "tokenizer"}, {"prediction_type": "epsilon"}, {"prediction_type": "banana"}]
)
@pytest.mark.parametrize("what", ["folder", "built-in", "random"])
def test_options_of_single_files_are_refused_for_other_models(model, what, options):
    name = {"folder": str(model), "built-in": None, "random": "sd15"}[what]
    with pytest.raises(
        e.UsageError, match=r"--(tokenizer|prediction-type) .* is for a single file .* leave the option out"
    ):
        resolve(name, random_weights=what == "random", **options)


def test_a_tokenizer_option_must_be_a_clip_tokenizer(tmp_path, model, single):
    file = write_single(single, tmp_path / "single.safetensors")
    other = copy_model(model, tmp_path / "other")
    edit("tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer")(other)
    bare = copy_model(model, tmp_path / "bare")
    (bare / "tokenizer" / "tokenizer.json").unlink()
    for tokenizer, words in (
        (tmp_path / "gone", r"--tokenizer .*gone is not there; pass the folder"),
        (file, "is not a folder"),
        (tmp_path, r"tokenizer_config\.json is missing"),
        (other / "tokenizer", "tokenizer_class='T5Tokenizer'"),
    ):
        with pytest.raises((e.UsageError, e.UnreadableModelError, e.UnsupportedModelError), match=words):
            resolve(str(file), tokenizer=tokenizer)
    with pytest.raises(e.UnreadableModelError, match="cannot tell 'a cat' and 'a dog' apart"):
        resolve(str(file), tokenizer=bare / "tokenizer").check()


def test_folders_of_one_name_have_different_paths(model, tmp_path):
    first, second = copy_model(model, tmp_path / "a" / "model"), copy_model(model, tmp_path / "b" / "model")
    origins = [resolve(str(folder)).origin for folder in (first, second, second / ".." / "model")]
    assert origins[0] != origins[1]
    assert origins[1] == origins[2]
    assert origins[0] == {"kind": "folder", "id": "model", "path": str(first.resolve())}
    assert resolve(str(first)).inputs == (first,)
    assert resolve(None).origin == {"kind": "built-in", "id": "demo"}
    assert resolve(None).inputs == (BUILT_IN,)
    assert resolve("sd15", random_weights=True).inputs == ()


@pytest.mark.parametrize("name", ["sd15", "sd21", "sd21-base"])
def test_architectures_and_the_built_in_model_pass_the_check(name):
    resolve(name, random_weights=True).check()
    resolve(None).check()


def test_a_file_is_hashed_once(model, monkeypatch):
    source, hashed = resolve(str(model)), []
    monkeypatch.setattr(diffusers_folder, "sha256", lambda file: hashed.append(file.name) or "0")
    assert source.fingerprint("vae") == source.fingerprint("vae")
    assert sorted(hashed) == ["config.json", "diffusion_pytorch_model.safetensors"]


UNREADABLE = [
    UNET_WEIGHTS,
    TEXT_WEIGHTS,
    "unet/config.json",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
    "unet",
    "tokenizer",
    ".",
]


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or (os.geteuid() == 0 and shutil.which("setpriv") is None),
    reason="needs a user for whom files can be unreadable",
)
def test_an_unreadable_file_is_named(model, tmp_path):
    """In a process without the right to read everything, which root has."""
    folders = [shutil.copytree(model, tmp_path / str(i)) for i in range(len(UNREADABLE))]
    for folder, name in zip(folders, UNREADABLE):
        (folder / name).chmod(0)
    code = (
        "import sys; from export.sources.checkpoint import resolve; from export.errors import ExportError\n"
        "for folder in sys.argv[1:]:\n"
        "    for look in ('fingerprint', 'check'):\n"
        "        try:\n            source = resolve(folder)\n"
        "            source.check() if look == 'check' else [source.fingerprint(p) for p in ('unet', 'text_encoder', "
        "'tokenizer', 'scheduler')]\n"
        "        except ExportError as error: print(error)"
    )
    limit = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*limit, sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=True
    )
    for folder, name in zip(folders, UNREADABLE):
        (folder / name).chmod(0o700)
    said = done.stdout.splitlines()
    assert len(said) == 2 * len(UNREADABLE)
    for i, line in enumerate(said):
        assert UNREADABLE[i // 2] in line
        assert "Permission denied" in line
