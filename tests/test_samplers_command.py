"""`python -m engine samplers`, and the options of `picture` that choose a sampler and its grid."""

import pytest
from PIL import Image

import engine.__main__ as command
from engine.sampling.catalog import SAMPLERS


def run(*arguments):
    return command.main(list(arguments))


def test_it_lists_every_sampler(capsys):
    assert run("samplers") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1 : len(SAMPLERS) + 1]] == list(SAMPLERS)
    assert all(len(line) <= 160 for line in printed)


def test_it_says_what_the_named_ones_take(capsys):
    assert run("samplers", "dpmpp_2m", "dpm++ 2m karras", "TCDScheduler") == 0
    printed = capsys.readouterr().out
    assert "dpmpp_2m: diffusers' DPMSolverMultistepScheduler\n" in printed
    assert "  solver_order: one of 1, 2, 3\n" in printed
    assert "DPM++ 2M Karras: A1111's DPM++ 2M Karras\n" in printed
    assert "  gamma: a number from 0 to 1\n" in printed


def test_an_unknown_name_gets_the_nearest(capsys):
    assert run("samplers", "dpmpp2m") == 2
    assert "scheduler 'dpmpp2m' is not known; the nearest: dpmpp_2m, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sampler-option", "s_churn"], "'s_churn' is not like NAME=VALUE"),
        (["--sampler-option", "=3"], "'=3' is not like NAME=VALUE"),
        (["--timesteps", "900,x"], "'x' is not a finite number"),
        (["--sigmas", "1,,0"], "'' is not a finite number"),
    ],
)
def test_options_that_cannot_be_read_are_refused_in_one_line(options, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("picture", "a ring", *options)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sampler-option", "churn=3"], "euler has no option 'churn'; it has: s_churn, "),
        (["--sampler-option", "s_churn=many"], "option s_churn of euler is 'many'; it must be a number from 0 up"),
        (["--sampler-option", "s_churn=true"], "option s_churn of euler is True"),
        (["--timesteps", "100,900"], "timesteps must fall"),
        (["--sigmas", "1,2"], "sigmas must fall"),
        (["--schedule-type", "caras"], "schedule_type 'caras' is not known; the nearest: karras"),
        (["--timestep-respacing", "ddim7,3"], "no whole stride"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_before_a_graph_is_loaded(options, words, demo_bundle, capsys, monkeypatch):
    monkeypatch.setattr("engine.pipeline.Pipeline.load", None)
    assert run("picture", "a ring", "--bundle", str(demo_bundle), "--scheduler", "euler", *options) == 2
    assert words in capsys.readouterr().err


def test_a_picture_takes_all_of_them(demo_bundle, tmp_path):
    file = tmp_path / "ring.png"
    options = ["--scheduler", "euler", "--schedule-type", "SGM Uniform", "--sampler-option", "s_churn=2"]
    options += ["--steps", "2", "--seed", "0", "--quiet", "--output", str(file)]
    assert run("picture", "a ring", "--bundle", str(demo_bundle), *options) == 0
    assert "Schedule type: SGM Uniform" in Image.open(file).text["parameters"]
