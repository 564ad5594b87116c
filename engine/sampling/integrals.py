"""Integrals of exponential integrators and of Adams's methods, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_SERIES = 1.0
"""Below this |z| the recurrence of `phi` loses digits and its series converges in 20 terms."""


def phi(k: int, z: float) -> float:
    """phi_k(z): the integral of exp((1 - u) z) u^(k-1) / (k-1)! over u from 0 to 1, for k >= 1 and finite z.

    phi_1(z) = (exp(z) - 1) / z, and phi_(k+1)(z) = (phi_k(z) - 1/k!) / z.
    """
    if abs(z) < _SERIES:
        term, total = 1 / math.factorial(k), 0.0
        for n in range(1, 21):
            total += term
            term *= z / (k + n)
        return total
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def lagrange(nodes: Sequence[float]) -> np.ndarray:
    """[n, n]: row j has the coefficients, from the constant one up, of the polynomial that is 1 at node j and 0 at the
    others."""
    rows = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        polynomial = np.array([1.0])
        for other in others:
            polynomial = np.convolve(polynomial, [-other, 1.0]) / (node - other)
        rows.append(polynomial)
    return np.array(rows)


def adams_weights(levels: Sequence[float], s_next: float) -> np.ndarray:
    """The weights of the values at these noise levels, newest first, in the integral from the newest to s_next of the
    polynomial in s through them."""
    s = levels[0]
    step = s_next - s
    powers = np.array([step ** (n + 1) / (n + 1) for n in range(len(levels))])
    return lagrange([level - s for level in levels]) @ powers


def exponential_weights(nodes: Sequence[float], h: float, z: float) -> np.ndarray:
    """The weights of the values at these nodes in the integral of exp((1 - v / h) z) p(v) over v from 0 to h, p being
    the polynomial through them."""
    powers = np.array([h ** (n + 1) * math.factorial(n) * phi(n + 1, z) for n in range(len(nodes))])
    return lagrange(nodes) @ powers
