"""Random numbers against torch's CPU generator."""

import numpy as np
import pytest
import torch

from engine.sampling.noise import Draws, TorchGenerator


@pytest.mark.parametrize("seed", [0, 42, 1234, 2**32 - 1, 2**32 + 5, 2**63])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 64, 64), (1, 4, 3, 5), (16,), (17,), (1, 4, 9, 13)])
def test_same_seed_gives_torch_random_numbers(seed, shape):
    ours, torchs = TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for _ in range(3):
        np.testing.assert_allclose(ours.randn(shape), torch.randn(shape, generator=torchs).numpy(), atol=1e-6)


def test_pictures_of_one_seed_share_draws_that_come_in_torchs_order():
    """Pictures may ask at different times, and an evaluation without noise draws nothing."""
    shape, random = (2, 4, 5, 7), torch.Generator().manual_seed(3)
    expected = {index: torch.randn(shape, generator=random).numpy() for index in (0, 2, 3)}
    draws = Draws(TorchGenerator(3), shape, np.array([True, False, True, True]))
    for index, picture in ((0, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1)):
        np.testing.assert_allclose(draws.take(index, picture), expected[index][picture], atol=1e-6)


def test_noise_may_be_drawn_ahead_and_is_taken_once():
    draws, at_once = (Draws(TorchGenerator(3), (1, 4, 5, 7), np.ones(3, bool)) for _ in range(2))
    draws.prepare(2)
    for index in range(3):
        np.testing.assert_array_equal(draws.take(index, 0), at_once.take(index, 0))
    with pytest.raises(KeyError):
        draws.take(1, 0)


def test_fewer_values_than_a_block_are_refused():
    with pytest.raises(ValueError, match="fewer than 16"):
        TorchGenerator(0).randn((1, 4, 1, 1))
