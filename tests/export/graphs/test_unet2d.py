"""The denoiser of models without texts: the U-Net is diffusers', and clipping and learned variance are the papers'."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch import nn

from engine.contract import SLOTS
from engine.sampling.catalog import step_table
from engine.sampling.schedule import Schedule
from engine.sampling.table import CLIPPED, NOISE, single
from export.graphs.unet2d import TextlessDenoiser, clipped, deviation
from export.graphs.vae import KlDecoder, PixelDecoder, VqDecoder, nearest

from ...models import TEXTLESS_UNET

IDDPM = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}


def log_variance(v, t, t_next, alphas_cumprod):
    """arXiv 2102.09672, equation 15, as it stands there: exp(v log beta_t + (1 - v) log beta~_t)."""
    ab, ab_next = alphas_cumprod[t], alphas_cumprod[t_next]
    beta = 1 - ab / ab_next
    beta_tilde = (1 - ab_next) / (1 - ab) * beta
    return v * np.log(beta) + (1 - v) * np.log(beta_tilde)


def test_learned_variance_is_equation_15(textless_sources):
    """Equation 15 in NumPy for every step of a loop of 50, beside the table's numbers and the graph's formula."""
    schedule = Schedule.from_config(IDDPM, textless_sources["iddpm"].family)
    table = step_table("ddpm", schedule, 50)
    output = np.random.default_rng(0).uniform(-1, 1, (1, 64)).astype(np.float32)
    steps = [int(t) for t in table.timesteps]
    for index, (t, t_next) in enumerate(pairwise(steps)):
        logarithms = torch.tensor(table.variances[index : index + 1], dtype=torch.float32)
        found = deviation(torch.from_numpy(output), logarithms).numpy()
        expected = np.exp(0.5 * log_variance((output + 1) / 2, t, t_next, schedule.alphas_cumprod))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_array_equal(table.updates[index, 0, SLOTS + 1], 1.0)
    np.testing.assert_array_equal(table.updates[-1, 0, SLOTS + 1], 0.0)


def test_a_learned_variance_may_be_the_logarithm_itself(textless_sources):
    schedule = Schedule.from_config({**IDDPM, "variance_type": "learned"}, textless_sources["iddpm"].family)
    logarithms = torch.tensor(step_table("ddpm", schedule, 10).variances[:1], dtype=torch.float32)
    output = torch.linspace(-9, 1, 11).reshape(1, -1)
    torch.testing.assert_close(deviation(output, logarithms), torch.exp(output / 2))


def test_clipping_keeps_a_combination_within_its_range():
    x, output = torch.tensor([[4.0, 0.5, -4.0]]), torch.tensor([[1.0, 0.25, -1.0]])
    clip = torch.tensor([[1.0, -2.0, 1.5]])
    torch.testing.assert_close(clipped(x, output, clip), torch.tensor([[1.5, 0.0, -1.5]]))


def test_a_table_says_what_is_clipped(textless_sources):
    family = textless_sources["ddpm"].family
    clips = step_table("ddim", Schedule.from_config({"clip_sample_range": 2.0}, family), 10)
    plain = step_table("ddim", Schedule.from_config({"clip_sample": False}, family), 10)
    assert (clips.clips[:, 2] == 2.0).all()
    assert (clips.clipped[:, 0] > 0).all()
    assert not plain.clipped.any()
    assert not plain.clips.any()
    # What is clipped is x0: with the factors of the clip in place of CLIPPED the tables are the same.
    unclipped = clips.updates[:, 0] + 0
    unclipped[:, 0] += clips.clipped[:, 0] * clips.clips[:, 0]
    unclipped[:, SLOTS] += clips.clipped[:, 0] * clips.clips[:, 1]
    np.testing.assert_allclose(unclipped, plain.updates[:, 0], atol=1e-12)


@torch.no_grad()
def test_a_step_is_the_papers_on_every_sample():
    """Of two samples one takes the clipped prediction, and the other noise with a learned variance."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TEXTLESS_UNET, out_channels=6)
    state, noise = torch.randn(2, SLOTS, 3, 16, 16), torch.randn(2, 3, 16, 16)
    timestep = torch.tensor([10.0, 700.0])
    output, chosen = unet(state[:, 0], timestep).sample.chunk(2, dim=1)
    clip, variance = torch.tensor([[2.0, -1.0, 0.5]] * 2), torch.tensor([[-1.0, -4.0]] * 2)
    updates = torch.tensor(np.stack([single(CLIPPED), single(NOISE)]), dtype=torch.float32)
    identity = torch.eye(2)
    made = TextlessDenoiser(unet, torch.float32)(
        state, torch.arange(2), timestep, identity, torch.zeros(2, 2), updates, noise, clip, variance=variance
    )
    torch.testing.assert_close(made[0, 0], (2 * state[0, 0] - output[0]).clamp(-0.5, 0.5))
    fraction = (chosen[1] + 1) / 2
    torch.testing.assert_close(made[1, 0], noise[1] * torch.exp(0.5 * (-fraction - 4 * (1 - fraction))))


@pytest.mark.parametrize("kind", ["conv", "resnet"])
@pytest.mark.parametrize("padding", [0, 1])
@torch.no_grad()
def test_the_unet_is_that_of_diffusers_and_takes_sizes_that_halving_rounds(kind, padding):
    torch.manual_seed(0)
    unet = UNet2DModel(
        **TEXTLESS_UNET, downsample_padding=padding, downsample_type=kind, upsample_type=kind, center_input_sample=True
    ).eval()
    sample, timestep = torch.randn(2, 3, 16, 24), torch.tensor([3.0, 900.0])
    expected = unet(sample, timestep).sample
    denoiser = TextlessDenoiser(unet, torch.float32)
    found = denoiser.predict(sample, torch.arange(2), timestep, None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    odd = denoiser.predict(sample[:, :, :15, :17], torch.arange(2), timestep, None)
    assert odd.shape == (2, 3, 15, 17)


def test_the_nearest_entry_of_a_codebook_takes_a_latents_place():
    generator = torch.Generator().manual_seed(0)
    values, codebook = torch.randn(2, 5, 4, 3, generator=generator), torch.randn(32, 3, generator=generator)
    distances = (values.unsqueeze(-2) - codebook).square().sum(-1)
    torch.testing.assert_close(nearest(values, codebook), codebook[distances.argmin(-1)])


def pixels_of(image):
    return torch.round((image / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()
def test_grey_samples_become_three_equal_channels():
    sample = torch.linspace(-1.2, 1.2, 64).reshape(1, 1, 8, 8)
    image, magnitude = PixelDecoder(nn.Identity(), torch.float32)(sample)
    torch.testing.assert_close(image, pixels_of(sample.expand(1, 3, 8, 8)))
    assert torch.isfinite(magnitude).all()


@pytest.mark.parametrize("kind", ["VQModel", "AutoencoderKL"])
@torch.no_grad()
def test_decoders_of_any_factor_are_diffusers(kind):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 3}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    model = (VQModel if kind == "VQModel" else AutoencoderKL)(**sizes, **blocks).eval()
    latents = torch.randn(2, 3, 4, 6)
    expected = pixels_of(model.decode(latents / model.config.scaling_factor).sample)
    graph = (VqDecoder if kind == "VQModel" else KlDecoder)(model, torch.float32)
    image, _ = graph(latents)
    assert image.shape == (2, 16, 24, 3)
    assert (image.int() - expected.int()).abs().max() <= 1
