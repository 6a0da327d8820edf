"""Several budgets at once: none is ever exceeded, and no allocation within all of them keeps more."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csqcli.errors import UserError
from csqcli.quant.budget import BIT_OPERATIONS, NANOSECONDS, Budget, PlaneLimits, all_of, allocate

Table = tuple[tuple[int, ...], ...]


@st.composite
def tables(draw: st.DrawFn, layers: int, bits: int, largest: int) -> Table:
    """Costs that start anywhere and never fall."""
    steps = st.lists(st.integers(0, largest), min_size=bits + 1, max_size=bits + 1)
    return tuple(tuple(itertools.accumulate(draw(steps))) for _ in range(layers))


@st.composite
def cases(draw: st.DrawFn, budgets: int | None = None) -> tuple[torch.Tensor, list[Budget]]:
    layers, bits = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    few = [draw(st.integers(0, bits)) for _ in range(layers)]
    limits = PlaneLimits(tuple(few), tuple(draw(st.integers(low, bits)) for low in few))
    savings = st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=bits, max_size=bits)
    importance = torch.tensor([draw(savings) for _ in range(layers)], dtype=torch.float64)
    found = []
    for number in range(budgets or draw(st.integers(2, 4))):
        table = draw(tables(layers, bits, draw(st.sampled_from([3, 1_000, 10**7]))))
        least = sum(row[k] for row, k in zip(table, limits.min_planes, strict=True))
        most = sum(row[k] for row, k in zip(table, limits.max_planes, strict=True))
        found.append(Budget(1.0 + number, (1,) * layers, limits, table, draw(st.integers(least, most)), BIT_OPERATIONS))
    return importance, found


def spent(table: Table, planes: tuple[int, ...] | list[int]) -> int:
    return sum(row[k] for row, k in zip(table, planes, strict=True))


def kept(importance: torch.Tensor, planes: tuple[int, ...] | list[int]) -> float:
    return sum(float(row[:k].sum()) for row, k in zip(importance, planes, strict=True))


def best_by_trying_all(importance: torch.Tensor, budgets: list[Budget]) -> float:
    limits = budgets[0].limits
    ranges = [range(few, most + 1) for few, most in zip(limits.min_planes, limits.max_planes, strict=True)]
    within = (
        planes
        for planes in itertools.product(*ranges)
        if all(spent(budget.table, planes) <= (budget.allowance or 0) for budget in budgets)
    )
    return max(kept(importance, planes) for planes in within)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_several_budgets_are_kept_and_none_better_exists(case: tuple[torch.Tensor, list[Budget]]) -> None:
    importance, budgets = case
    planes = allocate(importance, all_of(budgets))
    limits = budgets[0].limits
    assert all(few <= k <= most for few, k, most in zip(limits.min_planes, planes, limits.max_planes, strict=True))
    for budget in budgets:
        assert spent(budget.table, planes) <= budget.allowance
    best = best_by_trying_all(importance, budgets)
    assert kept(importance, planes) >= best * (1 - 1e-6) - 1e-9


@settings(max_examples=100, deadline=None)
@given(cases(budgets=1))
def test_the_same_budget_twice_is_the_knapsack_of_one(case: tuple[torch.Tensor, list[Budget]]) -> None:
    importance, [budget] = case
    alone, twice = allocate(importance, budget), allocate(importance, all_of([budget, replace(budget)]))
    one, other = kept(importance, alone), kept(importance, twice)
    if budget.allowed <= 50_000:  # where the knapsack rounds no cost up, both are exact
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    assert other >= one * (1 - 1e-6) - 1e-9


@given(cases(budgets=1))
def test_one_budget_stays_as_it_was(case: tuple[torch.Tensor, list[Budget]]) -> None:
    _, [budget] = case
    assert all_of([budget]) is budget


def test_large_counts_are_compared_exactly() -> None:
    # both second planes take 10^12, far more digits than the solver's tolerance of a millionth sees
    table = ((0, 10**11, 10**12 // 2), (0, 10**11, 10**12 // 2))
    limits = PlaneLimits((1, 1), (2, 2))
    importance = torch.tensor([[1.0, 2.0], [1.0, 2.1]], dtype=torch.float64)
    loose = Budget(2.0, (1, 1), limits, ((0, 1, 2), (0, 1, 2)), 100, "bytes")
    for allowed, wanted in ((10**12, [2, 2]), (10**12 - 1, [1, 2])):
        tight = Budget(1.0, (1, 1), limits, table, allowed, BIT_OPERATIONS)
        assert allocate(importance, all_of([tight, loose])) == wanted


def test_a_large_network_takes_seconds_and_the_same_planes_every_time() -> None:
    rng = torch.Generator().manual_seed(0)
    layers, bits = 120, 8
    weights = torch.randint(100, 10**6, (layers,), generator=rng).tolist()
    macs = torch.randint(10**5, 10**8, (layers,), generator=rng).tolist()
    importance = torch.rand(layers, 1, generator=rng, dtype=torch.float64) ** 4 * 0.25 ** torch.arange(bits)
    limits = PlaneLimits((1,) * layers, (bits,) * layers)

    def budget(costs: list[int], planes: float, unit: str) -> Budget:
        table = tuple(tuple(k * cost for k in range(bits + 1)) for cost in costs)
        return Budget(planes, tuple(weights), limits, table, int(planes * sum(costs)), unit)

    both = [budget(weights, 2.5, "bytes"), budget(macs, 2.2, BIT_OPERATIONS)]
    first = allocate(importance, all_of(both))
    assert first == allocate(importance, all_of(both))
    for one in both:
        assert one.spent(first) <= one.allowed
    for one in both:  # each alone allows more, but for what the knapsack's 50,000 cells round away
        assert kept(importance, allocate(importance, one)) >= kept(importance, first) * (1 - 1e-4)


def test_the_tightest_budget_comes_first_and_all_are_checked() -> None:
    limits, table = PlaneLimits((1, 1), (3, 3)), ((0, 10, 20, 30), (0, 20, 40, 60))
    wide = Budget(3.0, (10, 20), limits, table)
    narrow = Budget(1.5, (10, 20), limits, table, 45, "bytes", beside=5)
    both = all_of([wide, narrow])
    assert (both.ceilings[0].allowed, both.target) == (45, 3.0)  # the mean planes that were asked for are what is said
    assert [ceiling.allowed for ceiling in both.also] == [90]
    assert both.fits([1, 1])
    assert not both.fits([3, 1])
    milliseconds = Budget(0.5, (10, 20), limits, ((0, 9, 9, 9), (0, 9, 9, 9)), 17, NANOSECONDS, beside=3 * 10**6)
    with pytest.raises(UserError, match=r"a target of 3 ms cannot be met: at the fewest planes it takes about 3 ms"):
        all_of([wide, milliseconds]).check_feasible()


def test_the_same_planes_everywhere_are_refused_where_a_budget_does_not_allow_them() -> None:
    from csqcli.quant.allocators.base import uniform

    limits, table = PlaneLimits((1, 1), (3, 3)), ((0, 10, 20, 30), (0, 20, 40, 60))
    two = Budget(2.0, (10, 20), limits, table)
    assert uniform(all_of([two, Budget(2.5, (10, 20), limits, table, 75, "bytes")])) == [2, 2]
    with pytest.raises(UserError, match="2 planes in every layer are not within all of the targets"):
        uniform(all_of([two, Budget(1.5, (10, 20), limits, table, 45, "bytes")]))
