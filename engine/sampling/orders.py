"""Which order each step of a solver has: low where it has no past yet, and at the end."""

from __future__ import annotations

from .grids import Grid


def multistep_orders(grid: Grid, order: int, final_first: bool, final_second: bool) -> list[int]:
    """The order of each step of a multistep solver: at most one more than the values that it remembers. A step to no
    noise has order 1, as a step without length has and with `final_first` the last one; with `final_second` the one
    before it has 2 at most."""
    orders = [min(order, i + 1) for i in range(len(grid))]
    if final_second:
        orders[-2:-1] = [min(before, 2) for before in orders[-2:-1]]
    if final_first:
        orders[-1] = 1
    return [k if 0 < s_next < s else 1 for k, (_, s, s_next) in zip(orders, grid.steps())]


def singlestep_orders(steps: int, order: int, lower_order_final: bool, to_zero: bool) -> list[int]:
    """The order of each evaluation's step in DPMSolverSinglestepScheduler: groups 1, 2, ..., order, in which each goes
    on from the group's start; at the end orders so low that no group is cut.

    `lower_order_final=False` holds where the steps are whole groups and the last one doesn't go to no noise.
    """
    if order == 1:
        return [1] * steps
    groups, rest = divmod(steps, order)
    group = list(range(1, order + 1))
    if rest == 0 and not lower_order_final and not to_zero:
        return groups * group
    if rest == 0:
        groups, rest = groups - 1, order
    orders = groups * group + list(range(1, rest + 1))
    if rest == order:
        orders[-1] = 1
    if to_zero:
        orders[-1] = 1
    return orders


def fast_orders(evaluations: int) -> list[int]:
    """The order of each step of DPM-Solver-fast (arXiv 2206.00927): as many evaluations as asked for, by
    threes, and what is left at the end."""
    steps = evaluations // 3 + 1
    if evaluations % 3 == 0:
        return [3] * (steps - 2) + [2, 1]
    return [3] * (steps - 1) + [evaluations % 3]
