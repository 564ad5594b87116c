"""The pictures of models without texts, made with diffusers' own parts: what bundles are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel, VQModel
from torch import Tensor

from engine.contract import Family
from engine.sampling.sampler import LEARNED_VARIANCES


class LearnedVariance(DDPMScheduler):
    """DDPMScheduler with variance_type "learned" as Improved DDPM means it: the U-Net gives the logarithm of the
    variance. diffusers takes the square root of it, which is NaN below 0."""

    def _get_variance(self, t: int, predicted_variance: Tensor | None = None, variance_type: Any = None) -> Tensor:
        assert predicted_variance is not None
        return torch.exp(predicted_variance)


class TextlessPipeline:
    """The loop of diffusers' DDPMPipeline, DDIMPipeline and LDMPipeline, which are the same but for the arguments of
    the scheduler; here with classes, and with every scheduler."""

    def __init__(
        self, unet: UNet2DModel, decoder: VQModel | AutoencoderKL | None, scheduler: Mapping[str, Any], family: Family
    ) -> None:
        self.unet, self._decoder, self.family = unet.eval(), decoder, family
        learned = scheduler["_class_name"] == "DDPMScheduler" and scheduler.get("variance_type") == "learned"
        kind: Any = LearnedVariance if learned else getattr(diffusers, scheduler["_class_name"])
        self.scheduler = kind.from_config(scheduler)

    @torch.no_grad()
    def __call__(
        self, class_label: int, generator: torch.Generator, size: tuple[int, int], steps: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One picture of `size` (height, width) in pixels: its sample [C, h, w], and pixels [H, W, 3] uint8. `options`
        are further arguments of the scheduler's step, such as eta."""
        scheduler, plane = self.scheduler, self.family.plane(*size)
        scheduler.set_timesteps(steps)
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = generator
        labels = {} if self.family.classes is None else {"class_labels": torch.tensor([class_label])}
        sample = torch.randn((1, *plane), generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = self.unet(scheduler.scale_model_input(sample, t), t, **labels).sample
            if not self._scheduler_splits():
                output = output[:, : self.family.channels]
            sample = scheduler.step(output, t, sample, **options).prev_sample
        return sample[0], self._pixels(sample)

    def _scheduler_splits(self) -> bool:
        """Whether the scheduler takes the predicted variance off the output."""
        config = self.scheduler.config
        return isinstance(self.scheduler, DDPMScheduler) and config["variance_type"] in LEARNED_VARIANCES

    def _pixels(self, sample: Tensor) -> Tensor:
        image = sample
        if self._decoder is not None:
            image = self._decoder.decode(sample / self._decoder.config["scaling_factor"]).sample
        image = (image / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        return torch.round(image * 255).to(torch.uint8)[0].permute(1, 2, 0)
