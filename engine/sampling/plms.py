"""PLMS: the pseudo linear multistep method."""

from __future__ import annotations

from .grids import StridedGrid
from .table import OUTPUT, PAST, Linear, StepTable, TableBuilder, X, as_epsilon, multistep, single, vp

_M1, _M2, _M3, _ = PAST
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
    """PLMS, arXiv 2202.09778, with one evaluation more than steps. Equals PNDMScheduler with skip_prk_steps; its
    Runge-Kutta warm-up would need a fifth slot.

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


def _transfer(prediction_type: str, s: float, s_next: float, x: Linear, output: Linear) -> Linear:
    """Equation 9 of arXiv 2202.09778, which is DDIM's step, from a latent and a mix of outputs. Where the model
    predicts v, the mix is one of v and becomes noise with this latent, as in diffusers."""
    (alpha, sigma), (alpha_next, sigma_next) = vp(s), vp(s_next)
    native = as_epsilon(prediction_type, s)
    p, q = native @ X, native @ OUTPUT
    return alpha_next / alpha * x + (sigma_next - alpha_next * sigma / alpha) * (p * x + q * output)
