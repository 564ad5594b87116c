"""Whole runs of a tiny random U-Net, in float32 and with a seed's random numbers: a table's latents are those of
diffusers' loop."""

import inspect

import diffusers
import numpy as np
import pytest
import torch

from engine.contract import SLOTS
from engine.sampling.catalog import SAMPLERS, step_table
from engine.sampling.noise import TorchGenerator
from engine.sampling.schedule import Schedule
from tests.models import SCHEDULER, UNET

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy")
SHAPE, STEPS, SEED = (1, 4, 8, 8), 5, 3
ROWS = (
    *("ddim", "ddpm", "euler", "euler_a", "pndm", "lms", "heun", "dpm2_a", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_2s"),
    *("deis", "unipc", "lcm", "tcd", "sa_solver"),
)
"""One or two of each kind; test_grids_diffusers.py has all, with both predictions."""


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**UNET, attention_head_dim=8).eval()
    context = torch.randn(1, 5, 32)

    @torch.no_grad()
    def predict(x, t):
        return model(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(float(t)), context).sample

    return predict


def with_diffusers(row, config, unet):
    scheduler = getattr(diffusers, row.scheduler_class).from_config({**config, **row.preset})
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    parameters = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in parameters else {}
    if row.eta is not None:
        options["eta"] = 0.5
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, **options).prev_sample
    return latents.numpy()


def with_table(table, unet):
    generator = TorchGenerator(SEED)
    state = np.zeros((SHAPE[0], SLOTS, *SHAPE[1:]), np.float32)
    state[:, 0] = np.float32(table.initial_scale) * generator.randn(SHAPE)
    for t, update, draw in zip(table.timesteps, table.updates.astype(np.float32), table.draws):
        noise = generator.randn(SHAPE) if draw else np.zeros(SHAPE, np.float32)
        columns = np.concatenate([state, unet(state[:, 0], t).numpy()[:, None], noise[:, None]], axis=1)
        state = np.einsum("ij,bj...->bi...", update, columns)
    return state[:, 0] * np.float32(table.scales[-1])


KINDS = ("epsilon", "v_prediction")
CASES = [(name, KINDS[i % 2]) for i, name in enumerate(ROWS)]


@pytest.mark.parametrize(("name", "prediction_type"), CASES)
def test_the_latents_of_a_whole_run_are_those_of_diffusers(name, prediction_type, unet):
    config = {**SCHEDULER, "prediction_type": prediction_type}
    table = step_table(name, Schedule.from_config(config), STEPS, eta=0.5)
    expected, actual = with_diffusers(SAMPLERS[name], config, unet), with_table(table, unet)
    assert np.abs(actual - expected).max() < 1e-3 * np.abs(expected).max()
