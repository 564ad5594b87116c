"""Random numbers against torch's CPU generator."""

import numpy as np
import pytest
import torch

from engine.sampling.noise import TorchGenerator, draw


@pytest.mark.parametrize("seed", [0, 42, 1234, 2**32 - 1, 2**32 + 5, 2**63])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 64, 64), (1, 4, 3, 5), (16,), (17,), (1, 4, 9, 13)])
def test_same_seed_gives_torch_random_numbers(seed, shape):
    ours, torchs = TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for _ in range(3):
        np.testing.assert_allclose(ours.randn(shape), torch.randn(shape, generator=torchs).numpy(), atol=1e-6)


def test_one_seed_per_picture_equals_a_list_of_generators():
    expected = torch.cat([torch.randn((1, 4, 5, 7), generator=torch.Generator().manual_seed(s)) for s in (3, 5)])
    actual = draw([TorchGenerator(3), TorchGenerator(5)], (2, 4, 5, 7))
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-6)


def test_fewer_values_than_a_block_are_refused():
    with pytest.raises(ValueError, match="fewer than 16"):
        TorchGenerator(0).randn((1, 4, 1, 1))
