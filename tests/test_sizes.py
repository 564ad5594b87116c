"""Batches and sizes: every multiple of 8, as in diffusers."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from .test_image_to_image import BACKENDS, PROMPTS, beside_diffusers, with_sampler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(tiny_bundles, tiny_sources):
    yield from beside_diffusers(StableDiffusionPipeline, tiny_bundles["sd1"], tiny_sources["sd1"])


@pytest.mark.parametrize(
    ("prompts", "count", "seed"), [(PROMPTS, 1, 7), (PROMPTS, 1, [7, 8]), (PROMPTS[0], 2, [3, 1234567])]
)
def test_odd_multiples_of_8_and_batches_are_diffusers(both, prompts, count, seed):
    several = isinstance(seed, list)
    generator = [torch.Generator().manual_seed(s) for s in seed] if several else torch.Generator().manual_seed(seed)
    asked = {"height": 72, "width": 104, "num_inference_steps": 3, "num_images_per_prompt": count}
    with torch.no_grad():
        theirs = with_sampler(both, "euler_a")(prompts, generator=generator, output_type="latent", **asked)
    for backend, pipeline in zip(BACKENDS, both[0], strict=True):
        made = pipeline(prompts, seed=seed, scheduler="euler_a", output_type="latent", progress=False, **asked).images
        assert made.shape == theirs.images.shape
        assert np.abs(made - theirs.images.numpy()).max() < 1e-3, backend
