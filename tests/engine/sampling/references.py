"""Reference samplers in float64, driving the same non-linear toy model as a table: diffusers' schedulers and
k-diffusion's functions."""

import sys

import diffusers
import numpy as np
import pytest
import torch

from engine.contract import SLOTS
from engine.sampling.grids import Grid
from tests.k_diffusion import sampling

SHAPE = (1, 2, 2, 3)
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = np.sqrt(1 / np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) - 1)
"""The noise levels of Stable Diffusion."""


def toy_model(x, t):
    """Any smooth non-linear function of a latent and a timestep, which keeps whatever it predicts at a scale of 1."""
    return np.tanh(1.3 * x + 0.3 * np.sin(t / 170)) * (0.7 + 0.3 * t / 1000) + 0.1


def latent(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE)


class Noise:
    """The same random numbers for a reference and a table, in the order in which they ask. Counts what was drawn."""

    def __init__(self, seed=1):
        self._random = np.random.default_rng(seed)
        self.drawn = 0

    def draw(self):
        self.drawn += 1
        return self._random.standard_normal(SHAPE)

    def torch(self, *args, **kwargs):
        return torch.from_numpy(self.draw())


class Brownian(Noise):
    """Increments of a Brownian motion over s, each divided by its deviation, of which a second one from the same start
    contains the first one."""

    def __init__(self, seed=1):
        super().__init__(seed)
        self._last = (None, None, None)

    def __call__(self, start, end):
        start, end = float(start), float(end)
        value = self.draw()
        before, middle, first = self._last
        if before == start:
            share = (start - middle) / (start - end)
            value = np.sqrt(share) * first + np.sqrt(1 - share) * value
        self._last = (start, end, value)
        return torch.from_numpy(value)


def run_table(table, x, noise=None, model=toy_model):
    """The latents that a table ends with."""
    return table_latents(table, x, noise, model)[-1]


def table_latents(table, x, noise=None, model=toy_model):
    """The latents in diffusers' scale after every evaluation of a table."""
    latents = []
    state = np.zeros((SLOTS, *x.shape), x.dtype)
    state[0] = x
    for t, update, draw, scale in zip(table.timesteps, table.updates, table.draws, table.scales):
        drawn = noise.draw().astype(x.dtype) if draw else np.zeros_like(x)
        columns = np.concatenate([state, model(state[0], t)[None], drawn[None]])
        state = np.einsum("ij,j...->i...", update, columns)
        latents.append(state[0] * scale)
    return np.stack(latents)


def set_steps(scheduler, steps, timesteps=None):
    """Sets a scheduler to that many steps, or to these timesteps, in float64."""
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=list(map(int, timesteps)))
    for name in ("sigmas", "sigmas_interpol", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    if isinstance(scheduler, diffusers.KDPM2AncestralDiscreteScheduler):  # float32 loses half the digits of these
        sigmas, last = scheduler.sigmas, len(scheduler.sigmas) - 1
        following = torch.stack([sigmas[min(i + 2 - i % 2, last)] for i in range(last + 1)])
        scheduler.sigmas_up = (following**2 * (sigmas**2 - following**2) / sigmas**2).sqrt()
        scheduler.sigmas_down = following**2 / sigmas
        scheduler.sigmas_interpol = torch.where(following > 0, (sigmas * scheduler.sigmas_down).sqrt(), 0.0)
        scheduler.timesteps[1::2] = torch.from_numpy(sigma_to_t(scheduler.sigmas_interpol[: 2 * steps - 2 : 2].numpy()))


def run_diffusers(scheduler, x, noise=None, start=0, **options):
    """The latents that a scheduler ends with, from a VP-scaled latent at evaluation `start`."""
    return diffusers_latents(scheduler, x, noise, start, **options)[-1]


def diffusers_latents(scheduler, x, noise=None, start=0, **options):
    """The latents after every evaluation of a scheduler, from a VP-scaled latent at evaluation `start`."""
    if noise is None:
        return _run_diffusers(scheduler, x, start, **options)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", noise.torch, raising=False)
        return _run_diffusers(scheduler, x, start, **options)


def _run_diffusers(scheduler, x, start, **options):
    latents = []
    sample = torch.from_numpy(x)
    if getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
        sample = sample * (1 + scheduler.sigmas[start] ** 2) ** 0.5
    if start > 0:
        scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        seen = scheduler.scale_model_input(sample, t).double().numpy()
        output = torch.from_numpy(toy_model(seen, float(t)))
        sample = scheduler.step(output, t, sample, **options).prev_sample.double()
        latents.append(sample.numpy())
    return np.stack(latents)


def grid_of(scheduler, evaluations=1):
    """The grid of a scheduler's own timesteps and noise levels, of which a step of `evaluations` has that many."""
    with np.errstate(divide="ignore"):  # no signal at all
        levels = np.sqrt(1 / scheduler.alphas_cumprod.double().numpy() - 1)
    timesteps = scheduler.timesteps.double().numpy()[::evaluations]
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas.double().numpy()
        final = sigmas[-1]
        sigmas = sigmas[::evaluations][: len(timesteps)]
    else:
        sigmas, final = levels[timesteps.astype(int)], 0.0
    return Grid(timesteps, sigmas, np.append(sigmas[1:], final), scheduler.config.prediction_type, 1.0, levels=levels)


def sigma_to_t(sigma):
    return np.interp(np.log(sigma), np.log(LEVELS), np.arange(len(LEVELS)))


def grid_of_sigmas(sigmas, prediction_type="epsilon"):
    """The grid of noise levels of Stable Diffusion, the last one being where the last step goes."""
    sigmas = np.asarray(sigmas, np.float64)
    return Grid(sigma_to_t(sigmas[:-1]), sigmas[:-1], sigmas[1:], prediction_type, 1.0, levels=LEVELS)


def denoiser(prediction_type):
    """The toy model as a denoiser of k-diffusion."""

    def denoise(y, sigma):
        s = float(sigma[0])
        alpha = 1 / np.sqrt(1 + s * s)
        x = alpha * y.numpy()
        output = toy_model(x, sigma_to_t(s))
        if prediction_type == "epsilon":
            return torch.from_numpy((x - s * alpha * output) / alpha)
        return torch.from_numpy(alpha * x - s * alpha * output if prediction_type == "v_prediction" else output)

    return denoise


def run_k_diffusion(function, sigmas, x, prediction_type="epsilon", **options):
    """The latents that a sampler of k-diffusion ends with, from a VP-scaled latent at the first noise level."""
    y = torch.from_numpy(x) * np.sqrt(1 + float(sigmas[0]) ** 2)
    sample = getattr(sampling, f"sample_{function}")
    return sample(denoiser(prediction_type), y, torch.as_tensor(sigmas), disable=True, **options).numpy()


def karras(steps, final=0.0):
    ramp = np.linspace(0, 1, steps)
    low, high = LEVELS[0] ** (1 / 7), LEVELS[-1] ** (1 / 7)
    return np.append((high + ramp * (low - high)) ** 7, final)
