"""The objective of Improved DDPM (arXiv 2102.09672): noise by mean squared error, variance by the variational bound."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

VLB_WEIGHT = 1e-3
"""lambda of equation 16."""


class HybridLoss:
    """L_hybrid = L_simple + lambda L_vlb (equation 16) of a model that predicts noise and, in as many channels again,
    where its log variance lies between the posterior's and beta's (equation 15).

    `betas` [T]. The bound never moves the noise: its gradient stops there.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        kept = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        posterior = betas * (1 - before) / (1 - kept)
        posterior[0] = posterior[1]  # it is 0 at the first step, whose logarithm nobody wants
        self._signal, self._sigma = _columns(kept.sqrt()), _columns((1 - kept).sqrt())
        self._least, self._most = _columns(posterior.log()), _columns(betas.log())
        # How far the predicted mean is off for a predicted noise that is off by one: equation 11 of arXiv 2006.11239.
        self._error = _columns(betas / ((1 - kept) * (1 - betas)).sqrt())

    def __call__(self, output: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """L_simple and L_vlb, the latter in bits per dimension of a whole chain. output [B, 2C, H, W]; noise
        [B, C, H, W]; timesteps [B]."""
        predicted, between = output.chunk(2, dim=1)
        fraction = (between + 1) / 2
        log_variance = fraction * self._most[timesteps] + (1 - fraction) * self._least[timesteps]
        difference = self._error[timesteps] * (predicted.detach() - noise)
        bound = torch.where(
            timesteps.reshape(-1, 1, 1, 1) == 0,
            _surprise(difference, log_variance),
            _divergence(difference, self._least[timesteps], log_variance),
        )
        return F.mse_loss(predicted, noise), len(self._error) * bound.mean() / math.log(2)

    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the forward process makes of clean pictures."""
        return self._signal[timesteps] * clean + self._sigma[timesteps] * noise


def _columns(values: Tensor) -> Tensor:
    return values.float().reshape(-1, 1, 1, 1)


def _divergence(difference: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
    """KL divergence in nats of two normal distributions, from the difference of their means and their log variances."""
    return 0.5 * (predicted - true - 1 + (true - predicted).exp() + difference.square() * (-predicted).exp())


def _surprise(difference: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the probability that a normal distribution gives to the pixel's bin of width 2 / 255. No pixel of ours is
    0 or 255, whose bins have no end."""
    scale = (-0.5 * log_variance).exp()
    upper, lower = (difference + 1 / 255) * scale, (difference - 1 / 255) * scale
    return -(torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
