"""Every solver's error falls at the order that it claims, and no solver adds or loses noise."""

import itertools
import math

import numpy as np
import pytest

from benchmarks import convergence
from benchmarks.__main__ import main
from benchmarks.convergence import DETERMINISTIC, HIGH, LOW, MIXTURE, STOCHASTIC

SOLVERS = {solver.name: solver for solver in itertools.chain(*DETERMINISTIC.values())}
NOISY = {solver.name: solver for solver in STOCHASTIC}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_error_falls_at_the_order_of_the_solver(name):
    solver = SOLVERS[name]
    errors = [convergence.error(solver, steps) for steps in convergence.STEPS]
    assert convergence.slope(errors) == pytest.approx(solver.order, abs=0.3)


@pytest.mark.parametrize("name", NOISY)
def test_the_error_of_the_variance_falls_at_the_order_of_the_solver(name):
    solver = NOISY[name]
    errors = [convergence.variance_error(solver, steps) for steps in convergence.STEPS]
    assert convergence.slope(errors) == pytest.approx(solver.order, abs=0.3)


@pytest.mark.parametrize("steps", [2, 5, 40])
@pytest.mark.parametrize("name", NOISY)
def test_a_solver_with_noise_is_exact_where_there_is_one_picture(name, steps):
    """Then x0 is what every evaluation predicts, and what is left is the noise: the mean and the variance are right
    whatever the number of steps."""
    solver = NOISY[name]
    mean, variance = convergence.moments(solver.table(convergence.grid(steps)), 0.7, 0.0)
    scale = math.hypot(1, LOW) if solver.scaled else 1.0
    assert mean * scale == pytest.approx(0.7, rel=1e-12)
    assert math.sqrt(variance) * scale == pytest.approx(LOW, rel=1e-12)


def test_the_exact_end_is_that_of_the_flow():
    """Runge and Kutta's fourth-order method in log s, which knows nothing of quantiles."""
    levels = np.geomspace(HIGH, LOW, 1001)
    y, end = convergence.ends()

    def slope(y, s):  # dy / d(log s)
        return y - MIXTURE.clean(y, s)

    for s, s_next in itertools.pairwise(levels):
        h, middle = math.log(s_next / s), math.sqrt(s * s_next)
        k1 = slope(y, s)
        k2 = slope(y + h / 2 * k1, middle)
        k3 = slope(y + h / 2 * k2, middle)
        k4 = slope(y + h * k3, s_next)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    np.testing.assert_allclose(y, end, atol=1e-9)


def test_the_third_order_of_diffusers_sde_solver_is_a_first_order():
    """Half of its D2 has the wrong sign."""
    solver = convergence.Solver(
        "diffusers",
        lambda grid: convergence.dpmpp_multistep(grid, order=3, eta=1.0, diffusers_third_order=True),
        1,
        scaled=True,
    )
    errors = [convergence.variance_error(solver, steps) for steps in convergence.STEPS]
    assert convergence.slope(errors) == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_the_command_draws_the_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convergence, "STEPS", (16, 32, 64))  # a fifth of the time
    picture = tmp_path / "convergence.png"
    assert main(["convergence", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000
    assert "  UniPC 3                order" in capsys.readouterr().out


def test_a_picture_of_another_kind_is_refused(tmp_path, capsys):
    assert main(["convergence", "--output", str(tmp_path / "convergence.doc")]) == 2
    assert "its name must end with .png, .svg, .pdf" in capsys.readouterr().err
