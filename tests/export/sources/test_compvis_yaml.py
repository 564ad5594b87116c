"""The .yaml beside a checkpoint says what no tensor does, and wins."""

import copy

import pytest
import torch
import yaml
from diffusers.pipelines.stable_diffusion.convert_from_ckpt import download_from_original_stable_diffusion_ckpt

from engine.sampling.schedule import Schedule
from export import errors as e
from export.sources import compvis_yaml
from export.sources.checkpoint import BUILT_IN, resolve

from .compvis_names import compvis_modules, compvis_state_dict

LDM = "ldm.modules.encoders.modules."
SD1 = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.0120,
            "timesteps": 1000,
            "image_size": 64,
            "channels": 4,
            "scale_factor": 0.18215,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": 64,
                    "attention_resolutions": [1, 2],
                    "num_res_blocks": 2,
                    "channel_mult": [1, 2, 2],
                    "num_heads": 8,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": 64,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": 4,
                        "resolution": 256,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 32,
                        "ch_mult": [1, 1, 2, 2],
                        "num_res_blocks": 2,
                        "attn_resolutions": [],
                    },
                },
            },
            "cond_stage_config": {"target": f"{LDM}FrozenCLIPEmbedder"},
        },
    }
}
"""v1-inference.yaml, with the sizes of the small model."""


def edited(changes, base=SD1):
    """The configuration with other values at dotted paths under model.params; None takes one out."""
    config = copy.deepcopy(base)
    for path, value in changes.items():
        *way, last = path.split(".")
        section = config["model"]["params"]
        for name in way:
            section = section[name]
        if value is None:
            del section[last]
        else:
            section[last] = value
    return config


SECOND = {
    "parameterization": "v",
    "cond_stage_config.target": f"{LDM}FrozenOpenCLIPEmbedder",
    "cond_stage_config.params": {"freeze": True, "layer": "penultimate"},
    "unet_config.params.num_heads": None,
    "unet_config.params.num_head_channels": 64,
    "unet_config.params.use_linear_in_transformer": True,
}
"""What v2-inference-v.yaml has otherwise; it says image_size 64 too."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders with a small model's single file, by its kind."""
    made = {}
    for kind in ("sd1", "sd2"):
        made[kind] = tmp_path_factory.mktemp(kind) / "model.ckpt"
        torch.save({"state_dict": compvis_state_dict(compvis_modules(kind))}, made[kind])
    return made


def opened(file, changes, **options):
    config = file.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(edited(changes)))
    try:
        return resolve(str(file), tokenizer=BUILT_IN / "tokenizer", **options)
    finally:
        config.unlink()


@pytest.mark.parametrize(("kind", "changes"), [("sd1", {}), ("sd2", SECOND), ("sd2", {**SECOND, "timesteps": 500})])
def test_configuration_and_tensors_are_those_of_diffusers_own_converter(files, tmp_path, kind, changes):
    source, modules = opened(files[kind], changes), compvis_modules(kind)
    config = tmp_path / "model.yaml"
    config.write_text(yaml.safe_dump(edited(changes)))
    tensors = torch.load(files[kind], weights_only=True)["state_dict"]
    state = {name: value for name, value in tensors.items() if not name.startswith("cond_stage_model.")}
    theirs = download_from_original_stable_diffusion_ckpt(
        state,
        original_config_file=str(config),
        model_type="FrozenCLIPEmbedder",
        text_encoder=modules["text_encoder"],
        tokenizer=modules["tokenizer"],
        load_safety_checker=False,
        scheduler_type="ddim",
        device="cpu",
    )
    for part in ("unet", "vae"):
        given, wanted = source.load(part).state_dict(), getattr(theirs, part).state_dict()
        assert all(torch.equal(given[name], value) for name, value in wanted.items()), part
    ours = source.scheduler_config()
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset"):
        assert ours[name] == theirs.scheduler.config[name], name
    assert source.config("unet")["sample_size"] == theirs.unet.config.sample_size
    assert source.config("vae")["scaling_factor"] == theirs.vae.config.scaling_factor
    heads = source.config("unet")["attention_head_dim"]
    assert list(heads) == theirs.unet.config.attention_head_dim if kind == "sd2" else heads == 8


def test_it_wins_over_what_is_guessed_and_an_option_wins_over_it(files):
    changes = {**SECOND, "parameterization": "eps"}
    assert opened(files["sd2"], changes).scheduler_config()["prediction_type"] == "epsilon"
    assert opened(files["sd2"], changes).sample_size() == 512
    given = opened(files["sd2"], changes, prediction_type="v_prediction")
    assert given.scheduler_config()["prediction_type"] == "v_prediction"
    assert opened(files["sd1"], {"image_size": 32}).sample_size() == 256
    assert opened(files["sd1"], {"scale_factor": 0.5}).config("vae")["scaling_factor"] == 0.5
    assert opened(files["sd1"], {"unet_config.params.num_heads": 4}).config("unet")["attention_head_dim"] == 4
    wide = {"unet_config.params.num_heads": -1, "unet_config.params.num_head_channels": 32}
    assert opened(files["sd1"], wide).config("unet")["attention_head_dim"] == [2, 4, 4]
    last = {**SECOND, "cond_stage_config.params": {"layer": "last"}}
    assert opened(files["sd2"], last).config("text_encoder")["num_hidden_layers"] == 4


def test_it_is_one_of_the_inputs_and_changes_what_it_describes(files):
    source = opened(files["sd1"], {})
    assert files["sd1"].with_suffix(".yaml") in source.inputs
    other = opened(files["sd1"], {"unet_config.params.num_heads": 4})
    assert source.fingerprint("unet") != other.fingerprint("unet")
    assert source.fingerprint("text_encoder") == other.fingerprint("text_encoder")


def compvis_betas(name, start, end):
    """make_beta_schedule of CompVis' diffusionmodules/util.py, for 1000 timesteps."""
    if name == "linear":
        return torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    if name == "cosine":
        times = (torch.arange(1001, dtype=torch.float64) / 1000 + 8e-3) / 1.008
        alphas = torch.cos(times * torch.pi / 2) ** 2
        return (1 - alphas[1:] / alphas[:-1]).clamp(0, 0.999)
    line = torch.linspace(start, end, 1000, dtype=torch.float64)
    return line.sqrt() if name == "sqrt" else line


@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt_linear", "sqrt"])
def test_every_schedule_of_compvis_is_read(tmp_path, name):
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(edited({"beta_schedule": name, "linear_start": "1e-4", "linear_end": 1.2e-2})))
    found = compvis_yaml.read(file).schedule
    schedule = Schedule.from_config({"_class_name": "DDIMScheduler", **found})
    wanted = torch.cumprod(1 - compvis_betas(name, 1e-4, 1.2e-2), 0)
    torch.testing.assert_close(torch.as_tensor(schedule.alphas_cumprod), wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("model: [", e.UnreadableModelError, "is not plain YAML"),
        ("model: !!python/object/apply:os.system [touch pwned]", e.UnreadableModelError, "is not plain YAML"),
        ("just text", e.UnreadableModelError, "holds no `model:`"),
        ({"unet_config": 5}, e.UnreadableModelError, "has unet_config=5; it must be a mapping"),
        ({"parameterization": "x0"}, e.UnsupportedModelError, "has parameterization='x0'; supported are eps, v"),
        ({"beta_schedule": "own"}, e.UnsupportedModelError, "has beta_schedule='own'; supported are linear, cosine"),
        ({"linear_start": "small"}, e.UnreadableModelError, "has linear_start='small'; it must be a number above 0"),
        ({"timesteps": 2.5}, e.UnreadableModelError, "has timesteps=2.5; it must be an integer"),
        ({"image_size": True}, e.UnreadableModelError, "has image_size=True; it must be a number above 0"),
        (
            {"unet_config.params.in_channels": 9},
            e.UnreadableModelError,
            "in_channels=9 and the tensors .* 4; get",
        ),
        ({"unet_config.params.context_dim": 768}, e.UnreadableModelError, "context_dim=768 and the tensors .* 64"),
        (
            {"cond_stage_config.target": f"{LDM}FrozenT5Embedder"},
            e.UnsupportedModelError,
            "conditioning stage '.*FrozenT5Embedder'; supported are FrozenCLIPEmbedder and FrozenOpenCLIPEmbedder",
        ),
        (
            {"cond_stage_config.target": f"{LDM}FrozenOpenCLIPEmbedder"},
            e.UnreadableModelError,
            "names the conditioning stage FrozenOpenCLIPEmbedder, whose tensors model.ckpt does not have",
        ),
        (
            {"cond_stage_config.params": {"layer": "pooled"}},
            e.UnsupportedModelError,
            "has layer='pooled' of FrozenCLIPEmbedder; supported is last",
        ),
    ],
)
def test_a_wrong_configuration_is_named(files, tmp_path, monkeypatch, content, error, words):
    monkeypatch.chdir(tmp_path)
    text = content if isinstance(content, str) else yaml.safe_dump(edited(content))
    config = files["sd1"].with_suffix(".yaml")
    config.write_text(text)
    try:
        with pytest.raises(error, match=words):
            resolve(str(files["sd1"]), tokenizer=BUILT_IN / "tokenizer")
    finally:
        config.unlink()
    assert not (tmp_path / "pwned").exists()
