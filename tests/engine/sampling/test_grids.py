"""Grids: what they guarantee to a solver, and what they refuse."""

import numpy as np
import pytest

from engine.errors import SchedulerConfigError, StepsError
from engine.sampling.catalog import SAMPLERS, step_table
from engine.sampling.schedule import Schedule

from .test_samplers import SD1

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


ROWS = [name for name, row in SAMPLERS.items() if row.grid is not None]


def grid_of(name, steps=10, **options):
    row = SAMPLERS[name]
    model = {"prediction_type": "v_prediction"} if name == "ipndm_sine" else {}
    return row.grid(row.configured(Schedule.from_config({**SD1, **model, **options})), steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ROWS)
def test_noise_falls_with_every_step(name, spacing, steps):
    grid = grid_of(name, steps, timestep_spacing=spacing)
    assert len(grid) == len(grid.sigmas) == len(grid.targets) == steps
    assert (np.diff(grid.sigmas) < 0).all()
    assert (grid.targets <= grid.sigmas).all()


@pytest.mark.parametrize("name", ["ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras"])
def test_a_step_goes_to_the_next_evaluation(name):
    grid = grid_of(name)
    np.testing.assert_array_equal(grid.targets[:-1], grid.sigmas[1:])


def test_a_step_of_ddim_goes_a_stride_down_whatever_comes_next():
    grid = grid_of("ddim", 7, timestep_spacing="trailing")
    levels = Schedule.from_config(SD1).sigmas()
    assert grid.timesteps.tolist() == [999, 856, 713, 570, 428, 285, 142]
    np.testing.assert_allclose(grid.targets, levels[[857, 714, 571, 428, 286, 143, 0]], rtol=1e-14)


@pytest.mark.parametrize("name", ROWS)
def test_a_grid_that_starts_late_is_the_rest_of_the_grid(name):
    whole, late = grid_of(name), grid_of(name).starting_at(4)
    for part in ("timesteps", "sigmas", "targets"):
        np.testing.assert_array_equal(getattr(late, part), getattr(whole, part)[4:])
    assert late.initial_scale == pytest.approx(whole.sigmas[4] / np.hypot(1, whole.sigmas[4]))


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_zero_terminal_snr_starts_from_noise_alone_without_warnings(name):
    schedule = Schedule.from_config({**SD1, **ZERO_SNR, "prediction_type": "v_prediction"})
    with np.errstate(all="raise"):
        table = step_table(name, schedule, 10)
    assert (table.alphas[0], table.sigmas[0]) == (0.0, 1.0)
    assert np.isfinite(table.updates).all()


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_noise_alone_needs_a_model_that_predicts_more_than_noise(name):
    with pytest.raises(
        SchedulerConfigError, match=r"'epsilon' predicts nothing at timestep 999.*correct prediction_type"
    ):
        grid_of(name, **ZERO_SNR)


NO_ZERO_SNR = [name for name in ROWS if "rescale_betas_zero_snr" not in SAMPLERS[name].class_options]


@pytest.mark.parametrize("name", NO_ZERO_SNR)
def test_a_sampler_that_divides_by_the_signal_refuses_a_zero_terminal_snr(name):
    """diffusers ignores the option there, and then takes another forward process than the model's."""
    with pytest.raises(SchedulerConfigError, match=rf"{name} .*cannot do a zero terminal SNR .*for example ddim"):
        grid_of(name, **ZERO_SNR, prediction_type="v_prediction")


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "pndm"])
def test_timesteps_that_the_model_does_not_have_are_refused(name):
    with pytest.raises(StepsError, match=r"no 10 steps .* steps_offset=500 \(timestep 1\d* would be .*; take fewer"):
        grid_of(name, timestep_spacing="leading", steps_offset=500)


def test_timesteps_that_would_be_there_twice_are_refused():
    with pytest.raises(StepsError, match=r"no 1000 steps .*some timesteps would be there twice\); take fewer"):
        grid_of("dpmpp_2m", 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_min": 5.0, "sigma_max": 1.0}, "sigma_min is above sigma_max .*from 1 to 5"),
        ({"sigma_min": 1e-20}, "noise levels from 14.6146 to 1e-20 are not all between"),
        ({"sigma_max": 1e300}, r"noise levels from 1e\+300 to .* are not all between"),
        ({"sigma_min": 1e-3, "final_sigmas_type": "sigma_min"}, "would end at the noise level .*above its start"),
    ],
)
def test_noise_levels_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(SchedulerConfigError, match=message):
        grid_of("euler", use_karras_sigmas=True, **options)


def test_noise_levels_that_coincide_are_refused():
    with pytest.raises(StepsError, match="some noise levels of 10 steps would coincide; take fewer"):
        grid_of("euler", use_karras_sigmas=True, sigma_min=1.0, sigma_max=1.0)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_trailing_timesteps_are_as_many_as_steps(name):
    """diffusers has 62 for 61 steps, and the last is -1."""
    for steps in (*range(55, 105), 999, 1000):
        grid = grid_of(name, steps, timestep_spacing="trailing")
        assert len(grid) == steps
        assert grid.timesteps[-1] >= 0


def test_a_lambda_that_clips_every_timestep_is_refused():
    with pytest.raises(SchedulerConfigError, match=r"lambda_min_clipped=10 leaves no timestep: .* is 3\.5"):
        grid_of("dpmpp_2m", lambda_min_clipped=10.0)


def test_a_grid_knows_the_timestep_of_any_noise_level():
    grid = grid_of("euler").starting_at(3)
    levels = Schedule.from_config(SD1).sigmas()
    assert grid.timestep(levels[400]) == pytest.approx(400)
    assert grid.timestep(np.sqrt(levels[400] * levels[401])) == pytest.approx(400.5)
    assert (grid.timestep(1e-9), grid.timestep(1e9)) == (0, 999)


def test_only_infinite_noise_is_at_the_timestep_without_signal():
    grid = grid_of("ddim", **ZERO_SNR, prediction_type="v_prediction")
    assert (grid.timestep(np.inf), grid.timestep(1e9), grid.timestep(grid.levels[998])) == (999, 998, 998)
