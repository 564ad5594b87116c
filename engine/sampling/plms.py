"""PLMS, the pseudo linear multistep method, and PNDM, which starts it with pseudo Runge-Kutta steps."""

from __future__ import annotations

from ..errors import StepsError
from .grids import StridedGrid
from .table import OUTPUT, PAST, Linear, StepTable, TableBuilder, X, as_epsilon, keep, multistep, single, vp

_M1, _M2, _M3 = PAST[:3]
ADAMS_BASHFORTH = (
    OUTPUT,
    (3 * OUTPUT - _M1) / 2,
    (23 * OUTPUT - 16 * _M1 + 5 * _M2) / 12,
    (55 * OUTPUT - 59 * _M1 + 37 * _M2 - 9 * _M3) / 24,
)
"""The mixes of the output and the last ones, by how many of these there are."""

_SAVED = _M3
"""The first latent, until the first step was taken again."""


def plms(grid: StridedGrid) -> StepTable:
    """PLMS, arXiv 2202.09778, with one evaluation more than steps. Equals PNDMScheduler with skip_prk_steps.

    The first step is taken twice: with the output at its start, and from the saved latent with the average of that and
    the output at its end. A table that starts late does so at its own first step. Image to image of diffusers 0.42 does
    not: it counts evaluations instead of steps, so that it starts one step earlier, leaves out the second evaluation at
    the end of the first step, and from then on takes the latents for one step further than they are.
    """
    builder, sources = TableBuilder(), grid.sources.tolist()
    for i, (t, s, s_next) in enumerate(grid.steps()):
        if i == 1:
            average = (OUTPUT + _M1) / 2
            again = single(_transfer(grid.prediction_type, sources[1], s, _SAVED, average))
            again[1] = _M1
            builder.add(t, s, again)
        update = multistep(_transfer(grid.prediction_type, s, s_next, X, ADAMS_BASHFORTH[min(i, 3)]), OUTPUT)
        if i == 0:
            update[3] = X  # saved
        builder.add(t, s, update)
    return builder.table(grid.initial_scale)


def pndm(grid: StridedGrid) -> StepTable:
    """PNDM, arXiv 2202.09778: three steps of the pseudo Runge-Kutta method, of four evaluations each, then
    the multistep method. Equals PNDMScheduler without skip_prk_steps. StepsError for fewer than 4 steps."""
    if len(grid) < 4:
        raise StepsError(
            f"PNDM takes 3 steps to start (skip_prk_steps=false) and at least one more, and here are {len(grid)}; take "
            f"4 or more steps, or skip_prk_steps=true in scheduler_config.json"
        )
    builder = TableBuilder()
    for i in range(3):
        _runge_kutta(builder, grid, i)
    for t, s, s_next in list(grid.steps())[3:]:
        x_next = _transfer(grid.prediction_type, s, s_next, X, ADAMS_BASHFORTH[3])
        builder.add(t, s, multistep(x_next, OUTPUT))
    return builder.table(grid.initial_scale)


def _runge_kutta(builder: TableBuilder, grid: StridedGrid, i: int) -> None:
    """Step i from one timestep of the grid to the next, of whose four outputs the weights are 1, 2, 2 and 1 of 6. While
    it is taken, slot 1 has the latent at its start, then what is known of the one at its end, and after it come the
    outputs at the starts of the steps.

    diffusers puts the point between half a stride above the end, and calls the first latent there half a stride below
    the start, which is another timestep if the stride is odd.
    """
    half = round(grid.timesteps[0] - grid.timestep(grid.targets[0])) // 2
    (t, t_next), (s, s_next) = grid.timesteps[i : i + 2].tolist(), grid.sigmas[i : i + 2].tolist()
    t_mid = t_next + half
    s_mid, s_below = grid.levels[[int(t_mid), int(t) - half]].tolist()
    saved, newest, *older = PAST

    def step(to: float, output: Linear, start: Linear = saved) -> Linear:
        return _transfer(grid.prediction_type, s, to, start, output)

    builder.add(t, s, keep(step(s_below, OUTPUT, X), X, OUTPUT, *PAST[:2]))
    builder.add(t_mid, s_below, keep(step(s_mid, OUTPUT), saved, newest, *older))
    # The second output is what brought the saved latent to this one.
    gain = step(s_mid, OUTPUT) @ OUTPUT
    second = (X - step(s_mid, 0 * OUTPUT)) / gain
    known = step(s_next, newest / 6 + second / 3 + OUTPUT / 3)
    builder.add(t_mid, s_mid, keep(step(s_next, OUTPUT), known, newest, *older))
    last = step(s_next, OUTPUT / 6) @ OUTPUT * OUTPUT
    builder.add(t_next, s_next, keep(saved + last, newest, *older))


def _transfer(prediction_type: str, s: float, s_next: float, x: Linear, output: Linear) -> Linear:
    """Equation 9 of arXiv 2202.09778, which is DDIM's step, from a latent and a mix of outputs. Where the model
    predicts v, the mix is one of v and becomes noise with this latent, as in diffusers."""
    (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
    native = as_epsilon(prediction_type, s)
    p, q = native @ X, native @ OUTPUT
    return alpha_next / alpha * x + (sigma_next - alpha_next * sigma / alpha) * (p * x + q * output)
