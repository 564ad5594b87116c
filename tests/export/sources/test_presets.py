"""The known architectures have the published numbers of parameters."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from engine.sampling.schedule import Schedule
from export.sources.presets import ARCHITECTURES


def parameters(make) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize(
    ("name", "unet", "text"),
    [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840), ("sd21-base", 865_910_724, 340_387_840)],
)
def test_parameter_counts_are_the_published_ones(name, unet, text):
    known = ARCHITECTURES[name]
    assert parameters(lambda: UNet2DConditionModel(**known.unet)) == unet
    assert parameters(lambda: AutoencoderKL(**known.vae)) == 83_653_863
    assert parameters(lambda: CLIPTextModel(CLIPTextConfig(**known.text_encoder))) == text


def test_prediction_types_and_sizes():
    shipped = {
        name: (Schedule.from_config(a.scheduler).prediction_type, 8 * a.unet["sample_size"])
        for name, a in ARCHITECTURES.items()
    }
    assert shipped == {"sd15": ("epsilon", 512), "sd21": ("v_prediction", 768), "sd21-base": ("epsilon", 512)}
