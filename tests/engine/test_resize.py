"""Latents are resampled as torch does it."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from engine.resize import MODES, resize

SIZES = [(8, 8, 16, 16), (8, 12, 13, 27), (9, 13, 9, 13), (5, 7, 8, 64), (32, 24, 11, 5), (1, 1, 3, 4)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width", "to_height", "to_width"), SIZES)
def test_resampling_is_torchs(mode, height, width, to_height, to_width):
    latents = np.random.default_rng(0).standard_normal((2, 4, height, width), np.float32)
    name = mode.removesuffix("-antialiased")
    wanted = interpolate(
        torch.from_numpy(latents),
        size=(to_height, to_width),
        mode=name,
        antialias=mode.endswith("antialiased"),
    )
    made = resize(latents, to_height, to_width, mode)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, wanted.numpy(), atol=1e-5)
