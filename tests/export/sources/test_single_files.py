"""The layouts of single files: whichever it is, the tensors are those that were written, bit for bit."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from engine.fields import Field
from engine.manifest import SOURCE_OPTIONS, Origin
from export import errors as e
from export import oracles
from export.sources import averages, compvis
from export.sources.checkpoint import BUILT_IN, resolve
from export.sources.presets import ARCHITECTURES

from .compvis_names import compvis_modules, compvis_state_dict, vae_names

UNET, CLIP, OPEN_CLIP = "model.diffusion_model.", "cond_stage_model.transformer.", "cond_stage_model.model."
TOKENIZER = BUILT_IN / "tokenizer"


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def made(request):
    """The parts of a small model and its single file's tensors."""
    modules = compvis_modules(request.param)
    return modules, compvis_state_dict(modules)


@pytest.fixture(scope="module")
def first():
    modules = compvis_modules("sd1")
    return modules, compvis_state_dict(modules)


@pytest.fixture(scope="module")
def second():
    modules = compvis_modules("sd2")
    return modules, compvis_state_dict(modules)


def same(given, wanted):
    given, wanted = given.state_dict(), wanted.state_dict()
    return given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)


def opened(file, **options):
    return resolve(str(file), tokenizer=TOKENIZER, **options)


def saved(tensors, file, **extra):
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors, **extra}, file)
    return file


def check_same(source, modules):
    for part in ("unet", "vae", "text_encoder"):
        assert same(source.load(part), modules[part]), part


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_every_tensor_is_read_bit_for_bit(made, tmp_path, suffix):
    modules, tensors = made
    check_same(opened(saved(tensors, tmp_path / f"model{suffix}", global_step=1)), modules)


def with_channels(unet, channels):
    """A random U-Net of the same kind with so many channels."""
    known = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return UNet2DConditionModel(**{**known, "in_channels": channels}).eval()


@pytest.mark.parametrize(
    ("kind", "channels", "joins"), [("sd1", 9, "mask"), ("sd1", 8, "image"), ("sd2", 9, "mask"), ("sd2", 5, "depth")]
)
def test_models_that_see_more_than_latents_are_read_bit_for_bit(first, second, tmp_path, kind, channels, joins):
    modules, _ = first if kind == "sd1" else second
    modules = {**modules, "unet": with_channels(modules["unet"], channels)}
    extra = {"depth_model.model.scratch.layer1_rn.weight": torch.zeros(1)} if joins == "depth" else {}
    source = opened(saved({**compvis_state_dict(modules), **extra}, tmp_path / "model.ckpt"))
    check_same(source, modules)
    source.check_configs()
    assert (source.family.joins, source.family.concat) == (joins, channels - 4)
    assert oracles.joins_of(source.pipeline()) == joins


def test_other_channels_are_refused_by_name(first, tmp_path):
    unet = with_channels(first[0]["unet"], 6)
    source = opened(saved(compvis_state_dict({**first[0], "unet": unet}), tmp_path / "model.safetensors"))
    with pytest.raises(e.UnsupportedModelError, match=r"in_channels=6; .* have 4 or 9 or 8 or 5 \(9 is inpainting"):
        source.check_configs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly(first, tmp_path, dtype):
    modules, tensors = first
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    unet = opened(saved(half, tmp_path / "model.safetensors")).unet().state_dict()
    wanted = modules["unet"].state_dict()
    assert all(torch.equal(value, wanted[name].to(dtype).float()) for name, value in unet.items())


def test_an_early_text_encoder_without_text_model_and_position_ids(first, tmp_path):
    modules, tensors = first
    early = {
        name.replace(f"{CLIP}text_model.", CLIP): value
        for name, value in tensors.items()
        if not name.endswith("position_ids")
    }
    check_same(opened(saved(early, tmp_path / "early.ckpt")), modules)


def test_a_file_that_was_written_from_diffusers_has_no_block_to_skip(second, tmp_path):
    """diffusers' script writes the blocks that diffusers' text encoder has, and no projection."""
    modules, tensors = second
    written = {
        name: value
        for name, value in tensors.items()
        if ".resblocks.3." not in name and not name.endswith(("text_projection", "logit_scale"))
    }
    check_same(opened(saved(written, tmp_path / "written.safetensors")), modules)


def in_shards(tensors, folder):
    """The checkpoint in two files and their index."""
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_checkpoint_in_several_files_is_read_by_its_index(first, tmp_path):
    modules, tensors = first
    index = in_shards(tensors, tmp_path)
    source = opened(index)
    check_same(source, modules)
    assert source.name == "model"
    before = source.fingerprint("unet")
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    assert opened(index).fingerprint("unet") != before
    shard.unlink()
    with pytest.raises(e.UnreadableModelError, match=r"model-00002-of-00002\.safetensors is not beside it"):
        opened(index)


# ------------------------------------------------------------------------------------------------------------ pickles


def test_what_lightning_leaves_in_a_checkpoint_is_not_read(first, tmp_path, monkeypatch):
    """As SD 1.4's file has it: a class that need not be installed, and NumPy's numbers."""
    modules, tensors = first
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        callbacks = {module.ModelCheckpoint: {"best_model_score": np.float64(0.5)}}
        file = saved(tensors, tmp_path / "model.ckpt", callbacks=callbacks, optimizer_states=[{}], epoch=3)
    check_same(opened(file), modules)
    assert "pytorch_lightning" not in sys.modules


def test_a_file_that_was_cut_off_is_named(first, tmp_path):
    for suffix in (".ckpt", ".safetensors"):
        file = saved(first[1], tmp_path / f"cut{suffix}")
        file.write_bytes(file.read_bytes()[:-5000])
        with pytest.raises(e.UnreadableModelError, match=rf"cut\{suffix} cannot be read"):
            opened(file)


# --------------------------------------------------------------------------------------------------- running averages


def averaged(tensors, change):
    """LitEma's names and values of the U-Net's weights."""
    made = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): change(value)
        for name, value in tensors.items()
        if name.startswith(UNET)
    }
    return made | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def test_averages_are_used_when_asked_for(made, tmp_path):
    modules, tensors = made
    file = saved({**tensors, **averaged(tensors, lambda value: value + 1)}, tmp_path / "full.ckpt")
    plain, ema = opened(file), opened(file, ema=True)
    check_same(plain, modules)
    wanted = modules["unet"].state_dict()
    assert all(torch.equal(value, wanted[name] + 1) for name, value in ema.unet().state_dict().items())
    assert same(ema.vae(), modules["vae"])
    assert plain.fingerprint("unet") != ema.fingerprint("unet")
    assert ema.options["ema"] == "yes"
    everything = {**tensors, **averaged(tensors, lambda value: value + 1)}
    theirs = convert_ldm_unet_checkpoint(everything, dict(modules["unet"].config), extract_ema=True)
    assert all(torch.equal(value, theirs[name]) for name, value in ema.unet().state_dict().items())


def test_averages_alone_are_the_model(made, tmp_path):
    modules, tensors = made
    rest = {name: value for name, value in tensors.items() if not name.startswith(UNET)}
    check_same(opened(saved({**rest, **averaged(tensors, torch.clone)}, tmp_path / "only.safetensors")), modules)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_every_averages_name_of_the_real_model_is_spelled_with_its_dots(name, tmp_path):
    names = [one for one in whole(name) if one.startswith(UNET)]
    assert [averages.spelled(averages.average_of(one), tmp_path) for one in names] == names


def test_averages_that_are_not_there_are_not_promised(first, tmp_path):
    tensors = first[1]
    with pytest.raises(e.UsageError, match=r"--ema: .*plain\.ckpt has no running averages .*leave --ema out"):
        opened(saved(tensors, tmp_path / "plain.ckpt"), ema=True)
    some = averaged(tensors, torch.clone)
    del some["model_ema.diffusion_modelout2weight"]
    with pytest.raises(e.UnreadableModelError, match="lacks 1 of the U-Net's running averages, for example model_ema"):
        opened(saved({**tensors, **some}, tmp_path / "some.ckpt"), ema=True)
    odd = {"model_ema.diffusion_modelspline0weight": torch.zeros(1)}
    with pytest.raises(e.UnreadableModelError, match=r"has an average model_ema\.diffusion_modelspline0weight"):
        opened(saved(odd, tmp_path / "odd.ckpt"))
    with pytest.raises(e.UsageError, match="--ema is for a single file"):
        resolve(None, ema=True)


# ---------------------------------------------------------------------------------------------------- separate VAEs


@pytest.fixture(scope="module")
def other():
    """Another VAE of the small model's architecture, its CompVis names without a prefix."""
    config = compvis_modules("sd1")["vae"].config
    torch.manual_seed(5)
    vae = AutoencoderKL(**{name: value for name, value in config.items() if not name.startswith("_")}).eval()
    names = vae_names(vae.state_dict(), 4).items()
    return vae, {name.removeprefix("first_stage_model."): value.contiguous() for name, value in names}


def old_names(state):
    """diffusers' names of the attention before 0.12, as convolutions."""
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    made = {}
    for name, value in state.items():
        for new, old in former.items() if ".attentions." in name else ():
            name = name.replace(f".{new}.", f".{old}.")
        made[name] = value
    return made


LAYOUTS = {
    "CompVis": lambda vae, names: names,
    "CompVis with its prefix": lambda vae, names: {f"first_stage_model.{name}": value for name, value in names.items()},
    "vae.": lambda vae, names: {f"vae.{name}": value for name, value in names.items()},
    "with its loss": lambda vae, names: {**names, "loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())},
    "diffusers": lambda vae, names: vae.state_dict(),
    "early diffusers": lambda vae, names: old_names(vae.state_dict()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_vae_of_its_own_stands_in_for_the_files(first, other, tmp_path, layout):
    (modules, tensors), (vae, names) = first, other
    given = saved(LAYOUTS[layout](vae, names), tmp_path / "vae.ckpt")
    file = saved(tensors, tmp_path / "model.ckpt")
    source = opened(file, vae=given)
    source.check_configs()
    assert same(source.vae(), vae)
    assert same(source.unet(), modules["unet"])
    assert source.options["vae"] == str(given)
    assert given in source.inputs
    assert source.config("vae")["scaling_factor"] == 0.18215
    plain = opened(file)
    assert source.fingerprint("vae") != plain.fingerprint("vae")
    assert source.fingerprint("unet") == plain.fingerprint("unet")


def test_a_manifest_may_name_every_option_of_a_model(first, other, tmp_path):
    (_, tensors), (_, names) = first, other
    given = saved(names, tmp_path / "vae.ckpt")
    file = saved({**tensors, **averaged(tensors, lambda value: value + 1)}, tmp_path / "full.ckpt")
    lora = tmp_path / "norm.safetensors"
    save_file({"lora_unet_conv_norm_out.b_norm": torch.zeros(64)}, lora)
    source = opened(file, ema=True, vae=given, prediction_type="epsilon", scheduler="euler_a", loras=[(lora, 0.5)])
    assert set(source.options) == set(SOURCE_OPTIONS)
    assert Origin.of(Field({**source.origin, "options": source.options})).options == source.options


def test_a_vae_may_be_a_folder_and_the_file_may_lack_its_own(first, other, tmp_path):
    (modules, tensors), (vae, _) = first, other
    vae.save_pretrained(tmp_path / "model" / "vae")
    (tmp_path / "model" / "model_index.json").write_text("{}")
    pruned = {name: value for name, value in tensors.items() if not name.startswith("first_stage_model.")}
    file = saved(pruned, tmp_path / "pruned.safetensors")
    for folder in (tmp_path / "model", tmp_path / "model" / "vae"):
        source = opened(file, vae=folder)
        assert same(source.vae(), vae)
        assert same(source.unet(), modules["unet"])
        assert source.fingerprint("vae")
    with pytest.raises(e.UnsupportedModelError, match=r"no first_stage_model\..* with --vae FILE_OR_FOLDER"):
        opened(file)


def test_what_is_no_vae_is_named(first, tmp_path):
    file = saved(first[1], tmp_path / "model.ckpt")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "VQModel"}')
    lora = saved({"lora_unet_down": torch.zeros(2)}, tmp_path / "lora.safetensors")
    for given, words in (
        (tmp_path / "gone.ckpt", r"--vae .*gone\.ckpt is not there; pass a VAE's file"),
        (tmp_path / "text.txt", r"--vae .*text\.txt is not a file of weights; it must be one of \.safetensors"),
        (tmp_path / "other", "holds a VQModel; a Stable Diffusion model needs an AutoencoderKL"),
        (lora, "holds no VAE: it has no decoder.conv_in.weight"),
    ):
        with pytest.raises(e.UsageError, match=words):
            opened(file, vae=given)
    with pytest.raises(e.UsageError, match=r"--vae .* is for a single file"):
        resolve("sd15", random_weights=True, vae=file)


def test_a_vae_alone_is_no_model(other, tmp_path):
    with pytest.raises(e.UnsupportedModelError, match="it holds a VAE: pass the model, and this file with --vae"):
        opened(saved(other[1], tmp_path / "vae.safetensors"))


# ------------------------------------------------------------------------------------ what the real files are like


def whole(name, channels=4):
    """The tensors of a real model's file, of real sizes and without values."""
    known = ARCHITECTURES[name]
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(**{**known.unet, "in_channels": channels}),
            "vae": AutoencoderKL(**known.vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**known.text_encoder)),
        }
        return compvis_state_dict(modules)


def as_lists(config):
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


@pytest.mark.parametrize(
    ("name", "channels", "predicts", "size"),
    [
        ("sd15", 4, "epsilon", 64),
        ("sd15", 9, "epsilon", 64),
        ("sd15", 8, "epsilon", 64),
        ("sd21", 4, "v_prediction", 96),
        ("sd21", 9, "epsilon", 64),
        ("sd21", 5, "epsilon", 64),
    ],
)
def test_real_sizes_give_the_published_configuration(tmp_path, name, channels, predicts, size):
    found = compvis.architecture(whole(name, channels), tmp_path / "model.ckpt", None)
    known = ARCHITECTURES[name]
    wanted = {**as_lists(known.unet), "in_channels": channels, "sample_size": size, "norm_num_groups": 32}
    wanted |= {"upcast_attention": predicts == "v_prediction", "use_linear_projection": name == "sd21"}
    assert as_lists(found.unet) == wanted
    assert as_lists(found.vae) == {**as_lists(known.vae), "sample_size": 8 * size}
    assert {**known.text_encoder, "bos_token_id": 49406, "eos_token_id": 49407} == found.text_encoder
    assert found.scheduler == {**known.scheduler, "prediction_type": predicts}


def test_the_tutorials_file_is_sd_15s(tmp_path):
    """hkproj/pytorch-stable-diffusion converts v1-5-pruned-emaonly.ckpt: 686 tensors of the U-Net, 248 of the VAE and
    197 of the text encoder."""
    names = whole("sd15")
    counts = [sum(name.startswith(prefix) for name in names) for prefix in (UNET, "first_stage_model.", CLIP)]
    assert counts == [686, 248, 197]
    read = (
        f"{UNET}output_blocks.8.2.conv.weight",
        f"{UNET}middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "first_stage_model.decoder.up.3.upsample.conv.bias",
        f"{CLIP}text_model.encoder.layers.11.self_attn.k_proj.weight",
    )
    assert set(read) <= names.keys()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("conditioner.embedders.1.model.ln_final.weight", "is an SDXL checkpoint, which is not supported yet"),
        ("control_model.input_hint_block.0.weight", "is a ControlNet, not a model"),
        (f"{UNET}label_emb.0.0.weight", r"U-Net takes classes or pictures' embeddings .*unCLIP"),
    ],
)
def test_files_of_other_models_are_refused_by_name(first, tmp_path, extra, words):
    with pytest.raises(e.UnsupportedModelError, match=words):
        opened(saved({**first[1], extra: torch.zeros(4, 4)}, tmp_path / "model.ckpt"))


def test_the_buffer_of_betas_is_the_schedule(first, tmp_path):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    half = opened(saved({**first[1], "betas": betas.half()}, tmp_path / "half.safetensors")).scheduler_config()
    assert half.get("trained_betas") is None
    own = betas.flip(0).float().contiguous()
    config = opened(saved({**first[1], "betas": own}, tmp_path / "own.safetensors")).scheduler_config()
    assert config["trained_betas"] == own.double().tolist()
