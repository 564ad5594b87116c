"""Guidance by evaluation, from arguments to scales."""

import numpy as np
import pytest

from engine.arguments import parse
from engine.guidance import check_guidance, inside_interval
from engine.job import Row, guided
from tests.engine.backends.made_up import request_of

TIMESTEPS = np.array([900.0, 700.0, 500.0, 300.0, 100.0])


def scales(scale, interval=None, steps=5, timesteps=TIMESTEPS):
    return check_guidance(scale, 0.0, interval, steps, timesteps).scales.tolist()


def test_a_number_is_the_scale_of_every_evaluation_and_up_to_1_it_is_no_guidance():
    assert scales(7.5) == [7.5] * 5
    assert scales(1) == scales(0.3) == scales(-4) == [1.0] * 5


def test_an_interval_holds_the_evaluations_whose_part_of_the_loop_is_in_it():
    """Both ends belong to it."""
    assert scales(3.0, (0.2, 0.6)) == [1.0, 3.0, 3.0, 3.0, 1.0]
    assert scales(3.0, (0.0, 0.0)) == [3.0, 1.0, 1.0, 1.0, 1.0]
    assert scales(3.0, (0.0, 1.0)) == scales(3.0, np.array([0, 1])) == [3.0] * 5
    for evaluations in (10, 20, 30, 50, 999):
        wanted = [0.2 <= i / evaluations <= 0.8 for i in range(evaluations)]
        assert inside_interval((0.2, 0.8), evaluations).tolist() == wanted


def test_a_list_has_a_number_for_each_step_or_for_each_evaluation():
    assert scales([5, 4, 3, 2, 1]) == [5, 4, 3, 2, 1]
    assert scales((5, 4, 3, 2), steps=4) == [5, 5, 4, 3, 2]  # as PLMS: its first step has two evaluations
    assert scales(np.array([5.0, 4.0, 3.0, 2.0, 1.5]), steps=4) == [5, 4, 3, 2, 1.5]
    assert scales([9.0, 5.0, 0.5], steps=3) == [9, 9, 5, 5, 1]
    assert scales(range(6, 1, -1)) == [6, 5, 4, 3, 2]


def test_a_function_is_called_once_for_each_evaluation():
    called = []

    def scale(evaluation, timestep):
        called.append((evaluation, timestep))
        return timestep / 100

    assert scales(scale, (0.0, 0.5)) == [9, 7, 5, 1, 1]
    assert called == list(enumerate(TIMESTEPS.tolist()))


def test_guidance_is_used_if_any_evaluation_is_guided(demo):
    options = {"prompt": "a ring", "num_inference_steps": 4, "scheduler": "ddim"}
    for scale, used in ((7.0, True), (1.0, False), ([1, 1, 2, 1], True), ([1, 0, 1, -3], False)):
        request = request_of(demo, {**options, "guidance_scale": scale})
        assert request.guided is used
        assert all(len(job.rows) == 1 + used for job in demo.jobs(request))


def test_rows_without_guidance_weigh_1_and_nothing():
    negative, prompt = guided([({}, 1.0)], {}, np.array([3.0, 1.0]), 0.7)
    assert (negative.weight.tolist(), prompt.weight.tolist()) == ([-2.0, 0.0], [3.0, 1.0])
    assert (negative.rescale, prompt.rescale) == (0.0, 0.7)
    assert [row.weight for row in guided([({}, 1.0)], None, np.ones(2))] == [1.0]
    assert isinstance(negative, Row)


def test_a_picture_tells_its_guidance(demo):
    options = {"num_inference_steps": 2, "seed": 0, "progress": False, "scheduler": "ddim"}
    plain = demo("a ring", **options, guidance_scale=5.0).images[0].info["parameters"]
    assert "CFG scale: 5, Seed" in plain
    full = demo("a ring", **options, guidance_scale=[5, 2.5], guidance_rescale=0.7, guidance_interval=(0, 0.5))
    told = full.images[0].info["parameters"]
    assert "CFG scale: 5, Seed" in told
    assert "CFG schedule: 5 2.5, CFG rescale: 0.7, CFG interval: 0 to 0.5" in told


def test_the_command_line_takes_lists_and_intervals():
    options = parse(["picture", "a ring", "--guidance-scale", "9,5,1", "--guidance-interval", "0.2:0.8"])
    assert (options.guidance_scale, options.guidance_interval, options.guidance_rescale) == ([9, 5, 1], (0.2, 0.8), 0.0)
    assert parse(["picture", "a ring"]).guidance_scale == 7.5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--guidance-scale", "9,,1"], "'' is not a finite number"),
        (["--guidance-interval", "0.5"], "'0.5' is not START:END, such as 0.2:0.8"),
        (["--guidance-interval", "0.2:x"], "'x' is not a finite number"),
        (["--guidance-rescale", "-1"], "'-1' is not a finite number from 0 up"),
    ],
)
def test_mistakes_on_the_command_line_are_named(given, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["picture", "a ring", *given])
    assert words in capsys.readouterr().err
