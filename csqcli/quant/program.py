"""Several budgets at once: which planes keep the most importance, by HiGHS through `scipy.optimize.milp`.

    maximise  Σ_l Σ_k v_lk x_lk   with   Σ_k x_lk = 1,   Σ_l Σ_k c_lk x_lk ≤ C for every budget,   x binary,

v_lk the importance that k planes of layer l keep, c_lk what they cost. One budget is a knapsack and needs none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy

from csqcli.errors import UserError

GAP = 1e-6  # of the importance that is kept: the most by which a better allocation could exist
_ROW = 1e3  # at most, a budget's right-hand side as the solver sees it; its tolerance is then some billionths of the budget
_SUM = 1e6  # of all importance, as the solver sees it: its absolute gap of 1e-6 is then nothing
_CUTS, _TRIES = 12, 40  # at an allocation that the solver's tolerance let be a few units over


class Ceiling(Protocol):
    """What all layers may cost together, and what each costs at so many planes."""

    @property
    def table(self) -> Sequence[Sequence[int]]: ...

    @property
    def allowed(self) -> int: ...

    def spent(self, planes: Sequence[int]) -> int: ...


def best_within(
    value: numpy.ndarray, min_planes: Sequence[int], max_planes: Sequence[int], ceilings: Sequence[Ceiling]
) -> list[int]:
    """Planes per layer that keep the most importance within every one of ``ceilings``, proven to within `GAP` of it.

    ``value`` [layers, bits], float64: what the first 1 … bits planes of a layer keep. The fewest planes must fit. The same input gives
    the same planes: the solver runs on one thread and without a time limit. Costs are compared in whole numbers afterwards, never over.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [
        (layer, k)
        for layer, (few, most) in enumerate(zip(min_planes, max_planes, strict=True))
        for k in range(few, most + 1)
    ]
    if len(options) == len(min_planes):
        return list(min_planes)
    kept = numpy.array([value[layer, k - 1] if k else 0.0 for layer, k in options])
    scale = sum(float(value[layer, most - 1]) for layer, most in enumerate(max_planes) if most) or 1.0
    columns, count = numpy.arange(len(options)), len(min_planes)
    rows = numpy.array([layer for layer, _ in options])
    one_each = LinearConstraint(_sparse(numpy.ones(len(options)), rows, columns, (count, len(options))), 1, 1)
    costs = numpy.array([[float(ceiling.table[layer][k]) for layer, k in options] for ceiling in ceilings])
    units = numpy.array([max(ceiling.allowed, 1) / min(max(ceiling.allowed, 1), _ROW) for ceiling in ceilings])
    allowed = numpy.array([float(ceiling.allowed) for ceiling in ceilings])
    cuts: list[LinearConstraint] = []
    for tried in range(_TRIES):
        within = LinearConstraint(costs / units[:, None], -numpy.inf, allowed / units)
        found = milp(
            -kept * (_SUM / scale),
            integrality=numpy.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[one_each, within, *cuts],
            options={"mip_rel_gap": GAP},
        )
        if found.x is None:  # undecided between what fits and what does not; a little less room decides it
            allowed *= 1 - 1e-9 * 2.0**tried
            continue
        planes = list(min_planes)
        for at in columns[found.x > 0.5]:
            planes[options[at][0]] = options[at][1]
        over = numpy.array([ceiling.spent(planes) > ceiling.allowed for ceiling in ceilings])
        if not over.any():
            return planes
        # costs do not fall with further planes, so as many or more in every layer are over as well
        as_many = numpy.array([float(k >= planes[layer]) for layer, k in options])
        cuts.append(LinearConstraint(as_many, -numpy.inf, count - 1))
        if tried >= _CUTS:
            allowed -= over * 2.0 ** (tried - _CUTS)
    raise UserError("no planes were found within all of the targets", hint="raise one of them")


def _sparse(values: numpy.ndarray, rows: numpy.ndarray, columns: numpy.ndarray, shape: tuple[int, int]) -> Any:
    from scipy.sparse import coo_array

    return coo_array((values, (rows, columns)), shape=shape).tocsr()
