"""OpenAI's checkpoints make the same predictions as the network that wrote them."""

import json
import re

import pytest
import torch

from export.errors import UnreadableModelError, UnsupportedModelError, UsageError
from export.sources import openai, openai_flags
from export.sources.openai_flags import Flags

from .guided_diffusion import UNet

HALF = Flags(image_size=16, num_head_channels=32, noise_schedule="cosine")


def written(**options) -> UNet:
    """A network with random weights, none of them zero."""
    torch.manual_seed(0)
    return UNet(**options).eval()


def read(network: UNet, flags: Flags, tmp_path):
    return openai.read_unet(network.state_dict(), tmp_path / "model.pt", flags)


LAYOUTS = {
    "improved-diffusion": ({"num_heads": 4, "num_classes": 5}, {"num_heads": 4}),
    "heads of one size": ({"num_head_channels": 32}, {"num_head_channels": 32}),
    "new attention order": (
        {"num_head_channels": 16, "use_new_attention_order": True},
        {"num_head_channels": 16, "use_new_attention_order": True},
    ),
    "as many heads at two widths": (
        {"num_heads": 2, "attention": (True, True), "num_res_blocks": 2},
        {"num_heads": 2},
    ),
    "resampled by residual blocks": (
        {"num_head_channels": 32, "resblock_updown": True, "channel_mult": (1, 1, 2), "attention": (False, True, True)},
        {"num_head_channels": 32},
    ),
    "without attention at the lowest level": (
        {"num_head_channels": 32, "resblock_updown": True, "attention": (True, False)},
        {"num_head_channels": 32},
    ),
    "added shift, fixed variance": (
        {"num_heads": 1, "use_scale_shift_norm": False, "learn_sigma": False},
        {"num_heads": 1},
    ),
    "narrower than its timestep": (
        {"num_head_channels": 32, "num_channels": 64, "channel_mult": (0.5, 1)},
        {"num_head_channels": 32},
    ),
    "on one level": ({"num_heads": 2, "channel_mult": (1,), "attention": (False,)}, {"num_heads": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_layout_predicts_what_the_original_predicts(layout, tmp_path):
    options, flags = LAYOUTS[layout]
    original = written(**options)
    found = read(original, Flags(image_size=16, **flags), tmp_path)
    converted = found.model(tmp_path / "model.pt")
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([7, 981])
    labels = torch.tensor([4, 1]) if options.get("num_classes") else None
    wanted = original(x, timesteps, labels)
    assert (converted(x, timesteps, class_labels=labels).sample - wanted).abs().max() <= 1e-5
    assert found.learned == options.get("learn_sigma", True)
    assert wanted.std() > 1e-2


@torch.no_grad()
def test_timesteps_are_rescaled_to_a_thousand(tmp_path):
    original = written(num_heads=2)
    flags = Flags(image_size=16, num_heads=2, diffusion_steps=4000, rescale_timesteps=True)
    converted = read(original, flags, tmp_path).model(tmp_path / "model.pt")
    x = torch.randn(1, 3, 16, 16)
    wanted = original(x, torch.tensor([3001 / 4]))
    assert (converted(x, torch.tensor([3001])).sample - wanted).abs().max() <= 1e-5


def test_the_order_of_the_attention_matters(tmp_path):
    """The test above would not see the two orders mixed up if they gave the same."""
    weights = written(num_head_channels=16).state_dict()
    old, new = (
        openai.read_unet(weights, tmp_path / "x.pt", Flags(16, num_head_channels=16, use_new_attention_order=order))
        for order in (False, True)
    )
    name = "mid_block.attentions.0.to_q.weight"
    assert not torch.equal(old.weights[name], new.weights[name])


# ---------------------------------------------------------------------------------------------------- errors


def test_a_classifier_is_refused(tmp_path):
    weights = {name: value for name, value in written(num_heads=1).state_dict().items() if "output_blocks" not in name}
    with pytest.raises(UnsupportedModelError, match="it is a classifier"):
        openai.read_unet(weights, tmp_path / "model.pt", HALF)


def test_an_upsampler_is_refused(tmp_path):
    weights = written(num_heads=1).state_dict()
    weights["input_blocks.0.0.weight"] = torch.zeros(32, 6, 3, 3)
    weights["out.2.weight"] = torch.zeros(3, 32, 3, 3)
    with pytest.raises(UnsupportedModelError, match="takes 6 channels and gives 3"):
        openai.read_unet(weights, tmp_path / "model.pt", HALF)


def test_cross_attention_is_refused(tmp_path):
    weights = written(num_heads=1).state_dict()
    weights["middle_block.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(32, 8)
    with pytest.raises(UnsupportedModelError, match="has cross-attention"):
        openai.read_unet(weights, tmp_path / "model.pt", HALF)


def test_levels_of_different_depth_are_refused(tmp_path):
    weights = written(num_heads=1, num_res_blocks=2).state_dict()
    short = {name: value for name, value in weights.items() if not name.startswith("output_blocks.5.")}
    with pytest.raises(UnsupportedModelError, match="different numbers of residual blocks"):
        openai.read_unet(short, tmp_path / "model.pt", HALF)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (Flags(image_size=16), "into how many heads"),
        (Flags(num_heads=2), "the size of its pictures"),
    ],
)
def test_what_no_shape_tells_is_asked_for_by_name(flags, words, tmp_path):
    with pytest.raises(UsageError, match=f"{words}.*Write {re.escape(str(tmp_path / 'model.json'))} with"):
        read(written(num_heads=2), flags, tmp_path)


def test_heads_that_do_not_divide_the_channels_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"attention over 64 channels .* \(num_heads 5"):
        read(written(num_heads=2), Flags(image_size=16, num_heads=5), tmp_path)


def test_a_tensor_too_many_or_too_few_is_named(tmp_path):
    weights = written(num_heads=2).state_dict()
    weights["encoder.strange"] = weights.pop("middle_block.0.in_layers.2.weight")
    found = openai.read_unet(weights, tmp_path / "model.pt", Flags(image_size=16, num_heads=2))
    with pytest.raises(UnreadableModelError, match=r"mid_block\.resnets\.0\.conv1\.weight.*encoder\.strange"):
        found.model(tmp_path / "model.pt")


# ---------------------------------------------------------------------------------------------------- flags


def flags_of(tmp_path, given: object) -> Flags:
    (tmp_path / "model.json").write_text(json.dumps(given))
    return openai_flags.read_flags(tmp_path / "model.pt")


def test_flags_are_read_from_the_file_beside_the_checkpoint(tmp_path):
    given = {"num_head_channels": 64, "image_size": 64, "noise_schedule": "cosine", "num_channels": 192, "dropout": 0.1}
    assert flags_of(tmp_path, given) == Flags(image_size=64, num_head_channels=64, noise_schedule="cosine")


def test_released_checkpoints_are_known_by_their_names(tmp_path):
    flags = openai_flags.read_flags(tmp_path / "64x64_diffusion.pt")
    assert (flags.image_size, flags.noise_schedule, flags.use_new_attention_order) == (64, "cosine", True)
    assert openai_flags.read_flags(tmp_path / "mine.pt") == Flags()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_haeds": 4}, "did you mean 'num_heads'"),
        ({"num_heads": "4"}, "must be a whole number"),
        ({"image_size": 0}, "must be a whole number from 1 on"),
        ({"rescale_timesteps": 1}, "must be true or false"),
        ({"noise_schedule": "sqrt"}, "must be one of linear, cosine"),
        ({"num_heads": 4, "num_head_channels": 64}, "both num_heads and num_head_channels"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(given, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        flags_of(tmp_path, given)


def test_the_schedule_is_openais(tmp_path):
    from diffusers import DDPMScheduler

    flags = Flags(noise_schedule="linear", diffusion_steps=4000)
    betas = DDPMScheduler.from_config(openai_flags.scheduler(tmp_path / "x.pt", flags, learned=True)).betas
    assert torch.allclose(betas[[0, -1]], torch.tensor([0.25e-4, 0.005]))
    config = openai_flags.scheduler(tmp_path / "x.pt", Flags(noise_schedule="cosine"), learned=False)
    assert (config["beta_schedule"], config["variance_type"]) == ("squaredcos_cap_v2", "fixed_large")
    with pytest.raises(UsageError, match="which noise schedule"):
        openai_flags.scheduler(tmp_path / "x.pt", Flags(), learned=True)
