"""Variations: the noise of one seed turned towards another's, as in A1111."""

import numpy as np
import pytest
import torch

from engine.errors import SeedError, VariationError
from engine.sampling.noise import TorchGenerator
from engine.variation import slerp

PROMPT = "a large red circle on a blue background"
FAST = {"num_inference_steps": 4, "progress": False}


def spherical(share, low, high):
    """The formula in torch, with the norms over the first axis of a channel."""
    unit_low = low / torch.linalg.vector_norm(low, dim=1, keepdim=True)
    unit_high = high / torch.linalg.vector_norm(high, dim=1, keepdim=True)
    angle = torch.acos((unit_low * unit_high).sum(1, keepdim=True))
    return (torch.sin((1 - share) * angle) * low + torch.sin(share * angle) * high) / torch.sin(angle)


def noise(seed):
    return TorchGenerator(seed).randn((4, 8, 12))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_noise_goes_along_the_arc(share):
    low, high = noise(1), noise(2)
    wanted = spherical(share, torch.from_numpy(low), torch.from_numpy(high)).numpy()
    np.testing.assert_allclose(slerp(share, low, high), wanted, atol=1e-5)
    assert 0.9 < slerp(share, low, high).std() < 1.1


def test_equal_and_opposite_noises_have_no_arc():
    low = noise(1)
    np.testing.assert_allclose(slerp(0.3, low, low), low, atol=1e-6)
    assert np.isfinite(slerp(0.3, low, -low)).all()


def made(demo, **options):
    return demo(PROMPT, output_type="latent", **{**FAST, **options}).images


def test_strength_goes_from_one_seeds_picture_to_the_others(demo):
    one, other = made(demo, seed=3), made(demo, seed=4)
    assert np.array_equal(made(demo, seed=3, subseed=4, subseed_strength=0), one)
    np.testing.assert_allclose(made(demo, seed=3, subseed=4, subseed_strength=1), other, atol=1e-4)
    near = made(demo, seed=3, subseed=4, subseed_strength=0.1)
    assert 0 < np.abs(near - one).mean() < np.abs(near - other).mean()


def test_a_picture_of_a_batch_is_that_picture_alone(demo):
    """With a list each picture has a seed, a subseed and a strength of its own."""
    together = made(
        demo, num_images_per_prompt=2, seed=[3, 3], subseed=[8, 9], subseed_strength=[0.2, 0.4], scheduler="euler_a"
    )
    for i, alone in enumerate([(8, 0.2), (9, 0.4)]):
        single = made(demo, seed=3, subseed=alone[0], subseed_strength=alone[1], scheduler="euler_a")
        np.testing.assert_allclose(together[i], single[0], atol=1e-3)


def test_one_subseed_draws_for_all_pictures_as_one_seed_does(demo):
    both = {"num_images_per_prompt": 2}
    np.testing.assert_allclose(
        made(demo, seed=3, subseed=4, subseed_strength=1.0, **both), made(demo, seed=4, **both), atol=1e-4
    )


def test_the_noise_of_image_to_image_varies_too(demo):
    image = np.full((64, 64, 3), 0.5, np.float32)
    plain = made(demo, seed=3, image=image)
    assert np.abs(plain - made(demo, seed=3, image=image, subseed=4, subseed_strength=0.3)).max() > 0.1


def test_a_picture_says_its_variation(demo):
    image = demo(PROMPT, seed=3, subseed_strength=0.25, subseed=4, **FAST).images[0]
    assert "Variation seed: 4, Variation seed strength: 0.25" in image.info["parameters"]
    image = demo(PROMPT, seed=3, subseed_strength=0.25, **FAST).images[0]
    assert "Variation seed: " in image.info["parameters"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"subseed": 3}, VariationError, "subseed is given without subseed_strength; pass one from 0 to 1"),
        (
            {"subseed": 3, "subseed_strength": 1.5},
            VariationError,
            "subseed_strength is 1.5; it must be a number from 0",
        ),
        ({"subseed": 3, "subseed_strength": "0.5"}, VariationError, "subseed_strength is '0.5'"),
        ({"subseed_strength": [0.5, 0.5]}, VariationError, "2 values of subseed_strength for 1 pictures"),
        ({"subseed": -1, "subseed_strength": 0.5}, SeedError, "subseed -1 is not an integer from 0"),
        ({"subseed": [1, 2], "subseed_strength": 0.5}, SeedError, "2 subseeds for 1 pictures; pass one integer"),
    ],
)
def test_what_is_no_variation_is_an_error_by_name(demo, arguments, error, words):
    with pytest.raises(error, match=words):
        demo(PROMPT, **arguments, **FAST)
