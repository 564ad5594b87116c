"""What every solver guarantees: finite updates at both ends of the noise, named errors where there are none, and a
table in no time."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from engine.errors import SchedulerConfigError, StepsError
from engine.sampling.adams import deis, ipndm, lms
from engine.sampling.consistency import lcm, tcd
from engine.sampling.dpm2 import dpm2, dpm2_ancestral
from engine.sampling.dpm_solver import dpm_multistep, dpmpp_multistep
from engine.sampling.dpmpp_ancestral import dpmpp_2s_ancestral, dpmpp_sde
from engine.sampling.euler import euler, euler_ancestral
from engine.sampling.grids import Grid, StridedGrid
from engine.sampling.heun import heun, restart
from engine.sampling.integrals import adams_weights, exponential_weights, phi
from engine.sampling.plms import plms, pndm
from engine.sampling.sa_solver import MOST_CORRECTOR, MOST_PREDICTOR, sa_solver
from engine.sampling.singlestep import dpm_fast, dpm_singlestep, dpmpp_singlestep
from engine.sampling.unipc import unipc

from .references import LEVELS, Noise, latent, run_table, toy_model

WITHOUT_SIGNAL = {
    "euler": euler,
    "euler a": euler_ancestral,
    "euler a, eta": lambda grid: euler_ancestral(grid, eta=0.5),
    "ipndm": ipndm,
    "dpm++ 2m": dpmpp_multistep,
    "dpm++ 2m heun": lambda grid: dpmpp_multistep(grid, heun=True),
    "dpm++ 3m": lambda grid: dpmpp_multistep(grid, 3),
    "dpm++ 2m sde": lambda grid: dpmpp_multistep(grid, eta=1.0),
    "dpm++ 3m sde": lambda grid: dpmpp_multistep(grid, 3, heun=True, eta=0.7),
    "dpm 2m": dpm_multistep,
    "dpm 3m": lambda grid: dpm_multistep(grid, 3),
    "lcm": lcm,
    "tcd": tcd,
}
"""Solvers that can start at a zero terminal SNR."""

WITH_SIGNAL = {
    "euler with churn": lambda grid: euler(grid, s_churn=10),
    "heun": heun,
    "restart": restart,
    "dpm2": dpm2,
    "dpm2 a": dpm2_ancestral,
    "2s a": dpmpp_2s_ancestral,
    "dpm++ sde": dpmpp_sde,
    "lms": lms,
    "deis": deis,
    "dpm++ singlestep": dpmpp_singlestep,
    "dpm singlestep": dpm_singlestep,
    "dpm fast": lambda grid: dpm_fast(grid, 3 * len(grid) - 2),
    "unipc": unipc,
    "sa": sa_solver,
}
"""Solvers that cannot."""

SDE_OF_NOISE = {
    "sde-dpmsolver": lambda grid: dpm_multistep(grid, sde=True),
    "sa of noise": lambda grid: sa_solver(grid, predict_x0=False, tau=lambda t: 1.0),
}
"""Solvers that cannot end at no noise."""

OTHERS = {
    "plms": plms,
    "pndm": pndm,
    "unipc of noise": lambda grid: unipc(grid, 3, predict_x0=False),
    "unipc bh1": lambda grid: unipc(grid, 3, bh1=True, lower_order_final=False),
    "sa of the highest orders": lambda grid: sa_solver(grid, MOST_PREDICTOR, MOST_CORRECTOR),
    "sa of noise, ode": lambda grid: sa_solver(grid, predict_x0=False, tau=lambda t: 0.0),
}
ALL = {**WITHOUT_SIGNAL, **WITH_SIGNAL, **OTHERS}


def grid_to(first, final, steps, kind, levels=LEVELS):
    """`steps` steps with the first and the last level given, the others those of Stable Diffusion."""
    timesteps = np.linspace(999, 19, steps).round()
    sigmas = LEVELS[timesteps.astype(int)]
    sigmas[0] = first
    targets, above = np.append(sigmas[1:], final), np.append(sigmas[:1], sigmas[:-1])
    return StridedGrid(timesteps, sigmas, targets, kind, 1.0, above, levels=levels)


@pytest.mark.parametrize("name", ALL)
def test_a_step_to_no_noise_is_exact_and_makes_no_warning(name):
    """From diffusers' stand-in for no signal, s = 4096, to none."""
    for steps, kind in itertools.product((4, 5, 20), ("epsilon", "v_prediction")):
        with np.errstate(all="raise"):
            table = ALL[name](grid_to(4096.0, 0.0, steps, kind))
        assert np.isfinite(run_table(table, latent(), Noise())).all()


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("plms", "pndm", "lcm", "tcd")])
def test_a_model_that_sees_the_picture_gets_it(name):
    """PLMS and PNDM mix outputs before they make noise of them, and LCM and TCD end above no noise."""
    for steps in (4, 5, 20):
        table = ALL[name](grid_to(4096.0, 0.0, steps, "sample"))
        x = run_table(table, latent(), Noise(), model=lambda x, t: 0.5 * np.ones_like(x))
        np.testing.assert_allclose(x, 0.5, rtol=1e-7)


@pytest.mark.parametrize("name", [*ALL, *SDE_OF_NOISE])
def test_float32_is_enough_for_a_loop(name):
    """The runtime computes in float32 what the table has in float64."""
    solver = {**ALL, **SDE_OF_NOISE}[name]
    table = solver(grid_to(14.6, 0.02, 50, "v_prediction"))
    single = dataclasses.replace(table, updates=table.updates.astype(np.float32), scales=table.scales.astype("f"))
    expected = run_table(table, latent(), Noise())
    actual = run_table(single, latent().astype(np.float32), Noise(), model=lambda x, t: toy_model(x, np.float32(t)))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", WITHOUT_SIGNAL)
def test_a_start_without_signal_is_the_limit_of_much_noise(name, kind):
    solver = WITHOUT_SIGNAL[name]
    # The weights of values from before this step fall with 1 / log s only.
    for steps in (1,) if name.startswith("dpm") else (1, 2, 5):
        with np.errstate(all="raise"):
            exact = solver(grid_to(np.inf, 0.01, steps, kind))
        close = solver(grid_to(1e9, 0.01, steps, kind))
        assert (exact.alphas[0], exact.sigmas[0]) == (0.0, 1.0)
        x, limit = run_table(exact, latent(), Noise()), run_table(close, latent(), Noise())
        np.testing.assert_allclose(x, limit, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["dpm++ 2m", "dpm++ 2m heun", "dpm++ 2m sde", "dpm++ 3m sde", "dpm 2m"])
def test_dpm_solver_forgets_what_had_no_signal(name, kind):
    """As if the loop had started with the second step: on the axis of lambda the first one is infinitely far away."""
    solver, noise = WITHOUT_SIGNAL[name], Noise()
    with np.errstate(all="raise"):
        whole = solver(grid_to(np.inf, 0.01, 5, kind))
    first = solver(grid_to(np.inf, LEVELS[754], 1, kind))
    x = run_table(first, latent(), noise)
    late = run_table(solver(grid_to(np.inf, 0.01, 5, kind).starting_at(1)), x, noise)
    np.testing.assert_allclose(run_table(whole, latent(), Noise()), late, rtol=1e-9)


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_a_solver_that_cannot_start_without_signal_says_so(name):
    with pytest.raises(SchedulerConfigError, match=r"cannot start at a timestep that has no signal .*for example ddim"):
        WITH_SIGNAL[name](grid_to(np.inf, 0.0, 20, "v_prediction"))


@pytest.mark.parametrize("name", SDE_OF_NOISE)
def test_an_sde_of_predicted_noise_cannot_end_at_none(name):
    solver = SDE_OF_NOISE[name]
    with pytest.raises(SchedulerConfigError, match=r"'sde-dpmsolver'|'noise_prediction'.*sigma_min"):
        solver(grid_to(10.0, 0.0, 5, "epsilon"))
    assert len(solver(grid_to(10.0, 0.01, 5, "epsilon"))) == 5


def test_pndm_needs_a_step_after_its_start():
    with pytest.raises(StepsError, match=r"takes 3 steps to start .* here are 3; take 4 or more .*skip_prk_steps=true"):
        pndm(grid_to(10.0, 0.01, 3, "epsilon"))


@pytest.mark.parametrize("name", [*ALL, *SDE_OF_NOISE])
def test_a_table_of_50_steps_takes_under_20_milliseconds(name):
    solver, grid = {**ALL, **SDE_OF_NOISE}[name], grid_to(14.6, 0.001, 50, "v_prediction")

    def seconds():
        start = time.process_time()
        solver(grid)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.02


@pytest.mark.parametrize("name", ["dpm++ 2m", "deis", "lms"])
def test_a_step_without_length_changes_nothing_of_the_noise(name):
    """As in Karras's grid with final_sigmas_type 'sigma_min', which has the last level twice."""
    solver = ALL[name]
    sigmas = np.array([10.0, 3.0, 1.0])
    grid = Grid(np.array([900.0, 500.0, 200.0]), sigmas, np.array([3.0, 1.0, 1.0]), "epsilon", 1.0, levels=LEVELS)
    with np.errstate(all="raise"):
        table = solver(grid)
    np.testing.assert_allclose(run_table(table, latent(), Noise()), run_table(solver(shorter(grid)), latent(), Noise()))


def shorter(grid):
    return Grid(grid.timesteps[:2], grid.sigmas[:2], grid.targets[:2], "epsilon", 1.0, levels=LEVELS)


@pytest.mark.parametrize("z", [-30.0, -1.5, -0.99, -1e-8, 1e-12, 0.5, 0.999, 1.001, 20.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_its_integral(k, z):
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = (nodes + 1) / 2
    integral = np.sum(weights / 2 * np.exp((1 - u) * z) * u ** (k - 1)) / np.prod(np.arange(1, k))
    assert phi(k, z) == pytest.approx(integral, rel=1e-12)


def test_weights_integrate_polynomials_exactly():
    levels, s_next = [5.0, 7.0, 8.0, 11.0], 2.0
    cubic = np.polynomial.Polynomial([1.0, -2.0, 0.5, 0.1])
    integral = cubic.integ()(s_next) - cubic.integ()(5.0)
    assert adams_weights(levels, s_next) @ cubic(np.array(levels)) == pytest.approx(integral)
    h, z, v = 0.7, -1.3, np.linspace(0, 0.7, 20_001)
    values = np.exp((1 - v / h) * z) * cubic(v)
    weights = exponential_weights([0.0, -0.5, -1.1, -2.0], h, z)
    assert weights @ cubic(np.array([0.0, -0.5, -1.1, -2.0])) == pytest.approx(np.trapezoid(values, v), rel=1e-7)
