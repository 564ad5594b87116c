"""Strided respacing against Improved DDPM's rule, written out, and against diffusers' DDPM on the same timesteps."""

import diffusers
import numpy as np
import pytest

from engine.errors import TimestepsError
from engine.sampling.catalog import step_table
from engine.sampling.respacing import respaced_betas, space_timesteps
from engine.sampling.schedule import Schedule

from .test_class_grids import SD1

SCHEDULE = Schedule.from_config(SD1)


def reference(total, counts):
    """The rule of arXiv 2102.09672's code: each part takes its first timestep, its last, and rounds those between."""
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (1 if i < total % len(counts) else 0)
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += 1 if count <= 1 else (size - 1) / (count - 1)
        start += size
    return kept[::-1]


@pytest.mark.parametrize("total", [1000, 4000, 37])
@pytest.mark.parametrize("counts", [[1], [2], [10], [37], [10, 12, 7], [1, 1, 1], [3, 9]])
def test_sections_are_spaced_as_in_improved_ddpm(total, counts):
    assert list(space_timesteps(",".join(map(str, counts)), total)) == reference(total, counts)


def test_known_examples():
    assert space_timesteps("50", 1000)[::-1][:5] == (0, 20, 41, 61, 82)
    assert space_timesteps("50", 1000)[0] == 999
    assert space_timesteps("ddim50", 1000)[::-1] == tuple(range(0, 1000, 20))
    assert space_timesteps("ddim25", 1000)[::-1] == tuple(range(0, 1000, 40))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ddim300", r"'ddim300': no whole stride leaves so many of 1000 timesteps; take a divisor"),
        ("ddim10,20", "no whole stride"),
        ("1001", "part 1 of 1000 timesteps has 1000, so it cannot give 1001; take from 1 to 1000"),
        ("10,400,10", "part 2 of 1000 timesteps has 333, so it cannot give 400"),
        ("0", "cannot give 0"),
        ("", "is not like '50', '10,15,25' or 'ddim50'"),
        ("fast", "is not like"),
        ("-3", "is not like"),
        (50, "timestep_respacing is 50; pass a string such as '50'"),
    ],
)
def test_a_respacing_that_does_not_work_is_refused(text, words):
    with pytest.raises(TimestepsError, match=words):
        space_timesteps(text, 1000)


@pytest.mark.parametrize("text", ["50", "ddim50", "10,15,25"])
def test_respaced_betas_keep_the_marginals(text):
    """A chain of these betas alone has the noise that the whole chain has at these timesteps."""
    timesteps = space_timesteps(text, 1000)
    alphas_cumprod = np.cumprod(1 - respaced_betas(SCHEDULE, timesteps)[::-1])[::-1]
    np.testing.assert_allclose(alphas_cumprod, SCHEDULE.alphas_cumprod[list(timesteps)], rtol=1e-12)


@pytest.mark.parametrize("text", ["50", "ddim25", "4,3,2"])
def test_ddpm_on_a_respaced_schedule_is_ddpm_with_its_betas(text):
    """arXiv 2006.11239, equation 7, with the betas of the respaced schedule; also diffusers' on these timesteps."""
    timesteps = space_timesteps(text, 1000)
    table = step_table("ddpm", SCHEDULE, 1, timesteps=tuple(map(float, timesteps)))
    betas = respaced_betas(SCHEDULE, timesteps)
    kept = SCHEDULE.alphas_cumprod[list(timesteps)]
    variance = betas * (1 - np.append(kept[1:], 1.0)) / (1 - kept)
    noise, output, x = table.updates[:, 0, -1], table.updates[:, 0, -2], table.updates[:, 0, 0]
    assert table.timesteps.tolist() == list(timesteps)
    np.testing.assert_allclose(noise[:-1] ** 2, variance[:-1], rtol=1e-9)
    np.testing.assert_allclose(x, 1 / np.sqrt(1 - betas), rtol=1e-9)
    np.testing.assert_allclose(output, -betas / np.sqrt((1 - kept) * (1 - betas)), rtol=1e-9)
    theirs = diffusers.DDPMScheduler.from_config({**SD1, "clip_sample": False})
    theirs.set_timesteps(timesteps=list(timesteps))
    for t, expected in zip(timesteps[:-1], variance):
        assert float(theirs._get_variance(t)) == pytest.approx(expected, rel=1e-3)
