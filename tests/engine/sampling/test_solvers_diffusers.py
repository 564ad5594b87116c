"""Every solver equals diffusers' scheduler: the same latents after every evaluation of a non-linear toy model, in
float64."""

import diffusers
import numpy as np
import pytest
import torch

from engine.sampling.adams import deis, ipndm, lms
from engine.sampling.consistency import lcm, tcd
from engine.sampling.dpm2 import dpm2, dpm2_ancestral
from engine.sampling.dpm_solver import dpm_multistep, dpmpp_multistep
from engine.sampling.dpmpp_ancestral import dpmpp_sde
from engine.sampling.euler import euler, euler_ancestral
from engine.sampling.grids import Grid, StridedGrid
from engine.sampling.heun import heun
from engine.sampling.plms import pndm
from engine.sampling.sa_solver import sa_solver
from engine.sampling.singlestep import dpm_singlestep, dpmpp_singlestep
from engine.sampling.unipc import unipc

from .references import SD1, Brownian, Noise, diffusers_latents, grid_of, latent, set_steps, table_latents

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
STEPS = (1, 2, 5, 10, 20, 50)
ALL, NO_SAMPLE, V = ("epsilon", "v_prediction", "sample"), ("epsilon", "v_prediction"), ("v_prediction",)


def few(steps):
    """Where DPM-Solver and DEIS of diffusers lower the order of the last steps."""
    return {"final_first_order": steps < 15, "final_second_order": steps < 15}


def multistep(order, **more):
    return lambda grid: dpmpp_multistep(grid, order, **few(len(grid)), **more)


def noise_multistep(order, **more):
    return lambda grid: dpm_multistep(grid, order, **few(len(grid)), **more)


DPM, SINGLE, UNIPC, SA = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.SASolverScheduler,
)
TO_MIN = {"final_sigmas_type": "sigma_min"}
NOISE_DPM = {"algorithm_type": "dpmsolver", **TO_MIN}
SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}

CASES = {
    "euler": (diffusers.EulerDiscreteScheduler, {}, euler, ALL),
    "euler to sigma_min": (diffusers.EulerDiscreteScheduler, TO_MIN, euler, V),
    "euler a": (diffusers.EulerAncestralDiscreteScheduler, {}, euler_ancestral, NO_SAMPLE),
    "heun": (diffusers.HeunDiscreteScheduler, {}, heun, ALL),
    "heun karras": (diffusers.HeunDiscreteScheduler, KARRAS, heun, V),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}, dpm2, NO_SAMPLE),
    "dpm2 karras": (diffusers.KDPM2DiscreteScheduler, KARRAS, dpm2, V),
    "dpm2 a": (diffusers.KDPM2AncestralDiscreteScheduler, {}, dpm2_ancestral, NO_SAMPLE),
    "lms": (diffusers.LMSDiscreteScheduler, {}, lms, ALL),
    "dpm++ sde": (diffusers.DPMSolverSDEScheduler, {}, dpmpp_sde, NO_SAMPLE),
    "dpm++ 1": (DPM, {"solver_order": 1}, multistep(1), ALL),
    "dpm++ 2m": (DPM, {}, multistep(2), ALL),
    "dpm++ 2m heun": (DPM, {"solver_type": "heun", **TO_MIN}, multistep(2, heun=True), V),
    "dpm++ 3m": (DPM, {"solver_order": 3}, multistep(3), ALL),
    "dpm++ 1 sde": (DPM, {**SDE, "solver_order": 1}, multistep(1, eta=1), V),
    "dpm++ 2m sde": (DPM, SDE, multistep(2, eta=1), ALL),
    "dpm++ 2m sde heun": (DPM, {**SDE, "solver_type": "heun"}, multistep(2, eta=1, heun=True), V),
    "dpm++ 3m sde": (DPM, {**SDE, "solver_order": 3}, multistep(3, eta=1, diffusers_third_order=True), ALL),
    "dpm 1": (DPM, {**NOISE_DPM, "solver_order": 1}, noise_multistep(1), V),
    "dpm 2m": (DPM, NOISE_DPM, noise_multistep(2), ALL),
    "dpm 2m heun": (DPM, {**NOISE_DPM, "solver_type": "heun"}, noise_multistep(2, heun=True), V),
    "dpm 3m": (DPM, {**NOISE_DPM, "solver_order": 3}, noise_multistep(3), ALL),
    "dpm 2m sde": (DPM, {**NOISE_DPM, "algorithm_type": "sde-dpmsolver"}, noise_multistep(2, sde=True), ALL),
    "dpm 2m sde heun": (
        DPM,
        {**NOISE_DPM, "algorithm_type": "sde-dpmsolver", "solver_type": "heun"},
        noise_multistep(2, sde=True, heun=True),
        V,
    ),
    **{
        f"singlestep dpm++ {order}{' heun' if hn else ''}": (
            SINGLE,
            {"solver_order": order, "solver_type": "heun" if hn else "midpoint", "lower_order_final": True},
            lambda grid, order=order, hn=hn: dpmpp_singlestep(grid, order, heun=hn),
            V if hn else ALL,
        )
        for order, hn in ((1, False), (2, False), (3, False), (2, True), (3, True))
    },
    **{
        f"singlestep dpm {order}{' heun' if hn else ''}": (
            SINGLE,
            {
                "solver_order": order,
                "solver_type": "heun" if hn else "midpoint",
                "lower_order_final": False,
                **NOISE_DPM,
            },
            lambda grid, order=order, hn=hn: dpm_singlestep(grid, order, heun=hn, lower_order_final=False),
            V if hn else NO_SAMPLE,
        )
        for order, hn in ((2, False), (3, False), (3, True))
    },
    **{
        f"singlestep dpm++ {order} sde{' heun' if hn else ''}": (
            SINGLE,
            {"solver_order": order, "solver_type": "heun" if hn else "midpoint", **SDE},
            lambda grid, order=order, hn=hn: dpmpp_singlestep(
                grid, order, heun=hn, eta=1.0, diffusers_third_order=order == 3
            ),
            V,
        )
        for order, hn in ((2, False), (3, False), (2, True), (3, True))
    },
    "deis 1": (diffusers.DEISMultistepScheduler, {"solver_order": 1}, lambda grid: deis(grid, 1), ALL),
    "deis 2": (diffusers.DEISMultistepScheduler, {}, lambda grid: deis(grid, 2, **few(len(grid))), ALL),
    "deis 3": (
        diffusers.DEISMultistepScheduler,
        {"solver_order": 3},
        lambda grid: deis(grid, 3, **few(len(grid))),
        ALL,
    ),
    **{
        f"unipc {order} bh{2 - bh1}": (
            UNIPC,
            {"solver_order": order, "solver_type": f"bh{2 - bh1}", **(TO_MIN if bh1 else {})},
            lambda grid, order=order, bh1=bh1: unipc(grid, order, bh1=bh1),
            V if bh1 else ALL,
        )
        for order in (1, 2, 3)
        for bh1 in (False, True)
    },
    "unipc 3 of noise": (
        UNIPC,
        {"solver_order": 3, "predict_x0": False, **TO_MIN},
        lambda grid: unipc(grid, 3, predict_x0=False),
        ALL,
    ),
    "unipc without some correctors": (
        UNIPC,
        {"disable_corrector": [0, 1, 4]},
        lambda grid: unipc(grid, disable_corrector=(0, 1, 4)),
        V,
    ),
    "unipc 3 to the end": (
        UNIPC,
        {"solver_order": 3, "lower_order_final": False, **TO_MIN},
        lambda grid: unipc(grid, 3, lower_order_final=False),
        V,
    ),
    "unipc karras to sigma_min": (UNIPC, {**KARRAS, **TO_MIN}, unipc, V),
    "sa": (SA, {}, sa_solver, ALL),
    "sa karras": (SA, KARRAS, sa_solver, V),
    **{
        f"sa {p} {c}": (
            SA,
            {"predictor_order": p, "corrector_order": c},
            lambda grid, p=p, c=c: sa_solver(grid, p, c),
            V,
        )
        for p, c in ((1, 1), (3, 4), (3, 1), (1, 3))
    },
    "sa of noise": (
        SA,
        {"algorithm_type": "noise_prediction", "predictor_order": 3, "corrector_order": 3},
        lambda grid: sa_solver(grid, 3, 3, predict_x0=False),
        NO_SAMPLE,
    ),
    "lcm": (diffusers.LCMScheduler, {}, lcm, ALL),
    "tcd": (diffusers.TCDScheduler, {}, tcd, ALL),
}


def check(scheduler, grid, solver, **options):
    ours, theirs = (Brownian(), Brownian()) if hasattr(scheduler, "noise_sampler") else (Noise(), Noise())
    expected = diffusers_latents(scheduler, latent(), theirs, **options)
    actual = table_latents(solver(grid), latent(), ours)
    scale = max(1.0, np.abs(expected[-1]).max())
    np.testing.assert_allclose(actual, expected, atol=1e-5 * scale, rtol=0, err_msg=f"{len(grid)} steps")
    return ours.drawn, theirs.drawn


@pytest.mark.parametrize(
    ("name", "prediction_type"), [(name, kind) for name, case in CASES.items() for kind in case[3]]
)
def test_a_solver_equals_the_scheduler_of_diffusers(name, prediction_type):
    cls, config, solver, _ = CASES[name]
    scheduler = cls.from_config({**SD1, **config, "prediction_type": prediction_type})
    for steps in STEPS if prediction_type != "sample" else (2, 20):
        scheduler.register_to_config(**config)  # DPMSolverSinglestepScheduler changes it where groups would be cut
        set_steps(scheduler, steps)
        grid = grid_of(scheduler, evaluations=getattr(scheduler, "order", 1))
        ours, theirs = check(scheduler, grid, solver)
        assert ours == theirs, f"{steps} steps: random numbers drawn"


PNDM_STEPS = (4, 5, 10, 20, 40, 50)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", NO_SAMPLE)
def test_pndm_starts_with_runge_kutta_steps_as_diffusers_does(prediction_type, spacing):
    """40 steps have an odd stride, of which diffusers takes two halves."""
    options = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    scheduler = diffusers.PNDMScheduler.from_config({**SD1, **options})
    for steps in PNDM_STEPS:
        set_steps(scheduler, steps)
        check(scheduler, strided(scheduler, steps), pndm)


def strided(scheduler, steps):
    levels = np.sqrt(1 / scheduler.alphas_cumprod.numpy() - 1)
    timesteps, stride = np.sort(scheduler._timesteps)[::-1].astype(int), 1000 // steps
    targets = np.where(timesteps >= stride, levels[timesteps - stride], levels[0])
    return StridedGrid(
        timesteps.astype(float),
        levels[timesteps],
        targets,
        scheduler.config.prediction_type,
        1.0,
        levels[np.minimum(timesteps + stride, 999)],
        levels=levels,
    )


@pytest.mark.parametrize("steps", STEPS)
def test_ipndm_equals_diffusers_after_its_first_step(steps):
    """The scheduler's levels are its own, from infinite noise, where it takes x0 = 0."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(steps + 1)
    s = (scheduler.betas.double() / scheduler.alphas.double()).numpy()
    s[0] = 1e9
    scheduler.betas, scheduler.alphas = torch.from_numpy(s / np.hypot(1, s)), torch.from_numpy(1 / np.hypot(1, s))
    timesteps = scheduler.timesteps[1:].double().numpy()
    grid = Grid(timesteps, s[1:-1], s[2:], "v_prediction", 1.0, levels=np.linspace(0.01, 1, 10))
    check(scheduler, grid, ipndm, start=1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ALL)
def test_tcd_equals_diffusers_with_any_gamma(gamma, prediction_type):
    scheduler = diffusers.TCDScheduler.from_config({**SD1, "prediction_type": prediction_type})
    for steps in (1, 4, 20):
        set_steps(scheduler, steps)
        ours, theirs = check(scheduler, grid_of(scheduler), lambda grid: tcd(grid, gamma), eta=gamma)
        assert ours == theirs


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lms_orders_equal_diffusers(order):
    scheduler = diffusers.LMSDiscreteScheduler.from_config(SD1)
    set_steps(scheduler, 10)
    check(scheduler, grid_of(scheduler), lambda grid: lms(grid, order), order=order)


@pytest.mark.parametrize("start", [1, 3, 4, 5])
@pytest.mark.parametrize("order", [2, 3])
def test_singlestep_groups_go_on_where_a_late_start_cuts_them_as_in_diffusers(order, start):
    scheduler = SINGLE.from_config({**SD1, "solver_order": order})
    set_steps(scheduler, 10)
    grid = grid_of(scheduler).starting_at(start)
    check(scheduler, grid, lambda grid: dpmpp_singlestep(grid, order, steps=10), start=start)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("dpm++ 3m", lambda grid: dpmpp_multistep(grid, 3)),
        ("deis 3", lambda grid: deis(grid, 3)),
        ("unipc 3 bh2", lambda grid: unipc(grid, 3)),
        ("sa 3 4", lambda grid: sa_solver(grid, 3, 4)),
        ("heun", heun),
        ("dpm2", dpm2),
    ],
)
def test_a_solver_warms_up_at_a_late_start_as_in_diffusers(name, solver):
    """LMS of diffusers doesn't: it takes the weights of slopes that it doesn't have."""
    cls, config, _, _ = CASES[name]
    scheduler, each = cls.from_config({**SD1, **config}), getattr(cls, "order", 1)
    set_steps(scheduler, 20)
    check(scheduler, grid_of(scheduler, each).starting_at(6), solver, start=6 * each)


@pytest.mark.parametrize(
    ("cls", "config", "solver"),
    [
        (diffusers.EulerDiscreteScheduler, {}, euler),
        (diffusers.EulerAncestralDiscreteScheduler, {}, euler_ancestral),
        (DPM, {}, dpmpp_multistep),
        (DPM, {**SDE, "solver_order": 3}, lambda grid: dpmpp_multistep(grid, 3, eta=1, diffusers_third_order=True)),
        (UNIPC, {"solver_order": 3}, lambda grid: unipc(grid, 3)),
        (diffusers.LCMScheduler, {}, lcm),
        (diffusers.TCDScheduler, {}, tcd),
    ],
)
def test_a_zero_terminal_snr_equals_diffusers(cls, config, solver):
    """Which ab = 2**-24 stands for, or in LCM and TCD no signal at all. DPM-Solver computes in float32."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    known = {name: value for name, value in options.items() if name in cls().config}
    scheduler = cls.from_config({**SD1, **config, **known})
    set_steps(scheduler, 20)
    check(scheduler, grid_of(scheduler), solver)
