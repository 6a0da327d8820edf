"""The budget is never exceeded, whatever the search ended with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from csqcli.errors import UserError
from csqcli.quant.budget import Budget, make_budget, mean_planes, plane_limits, project
from csqcli.quant.costs import LayerFacts, bit_operations
from csqcli.quant.layers import Layer
from tests.quant.making import layers_of


@st.composite
def searches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, Budget]:
    layers, bits = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    masks = torch.rand(layers, bits, generator=rng) < draw(st.floats(0, 1))
    importance = torch.rand(layers, bits, generator=rng)
    weights = draw(st.lists(st.integers(1, 10_000), min_size=layers, max_size=layers))
    target = draw(st.floats(1, bits))
    return masks, importance, make_budget(layers_of(weights), target, bits=bits)


@given(searches())
def test_projection_never_exceeds_the_target_and_never_takes_a_last_plane(search) -> None:
    masks, importance, budget = search
    weights, target = budget.weights, budget.target
    chosen = project(masks, importance, budget, spendable=torch.ones_like(masks))
    planes = chosen.sum(dim=1).tolist()
    assert sum(p * w for p, w in zip(planes, weights, strict=True)) <= target * sum(weights) + 1e-6
    assert min(planes) >= 1


@given(searches())
def test_projection_leaves_no_budget_that_another_plane_could_use(search) -> None:
    masks, importance, budget = search
    weights, target = budget.weights, budget.target
    chosen = project(masks, importance, budget, spendable=torch.ones_like(masks))
    spare = target * sum(weights) - mean_planes(chosen.sum(dim=1).tolist(), weights) * sum(weights)
    growable = [w for w, planes in zip(weights, chosen.sum(dim=1).tolist(), strict=True) if planes < masks.shape[1]]
    assert all(w > spare - 1e-3 for w in growable)


def test_projection_drops_the_cheapest_plane_per_element() -> None:
    masks = torch.ones(2, 2, dtype=torch.bool)
    importance = torch.tensor([[1.0, 4.0], [3.0, 9.0]])  # per element: .1 .4 of 10 weights, .03 .09 of 100
    chosen = project(masks, importance, make_budget(layers_of([10, 100]), 1.2, bits=2), spendable=~masks)
    # plane 0 of the large layer goes first: (20 + 100)/110 = 1.09 ≤ 1.2; what is left may not bring back what went too early
    assert chosen.tolist() == [[True, True], [False, True]]


def test_what_projection_has_left_goes_to_spendable_planes_alone() -> None:
    masks = torch.tensor([[True, False, False]])
    importance, within = torch.tensor([[1.0, 2.0, 3.0]]), make_budget(layers_of([10]), 2, bits=3)
    assert project(masks, importance, within, spendable=masks).tolist() == [[True, False, False]]
    spendable = torch.tensor([[True, True, False]])
    assert project(masks, importance, within, spendable=spendable).tolist() == [[True, True, False]]
    assert project(masks, importance, within, spendable=~masks).tolist() == [[True, False, True]]  # the better one


def test_a_target_of_bit_operations_allows_what_so_many_planes_everywhere_take_and_not_one_more() -> None:
    macs, input_bits = {"0.weight": 7, "1.weight": 3, "2.weight": 1}, {"0.weight": 8, "1.weight": 4, "2.weight": 1}
    options = {"cost": bit_operations, "macs": macs, "input_bits": input_bits}
    budget = make_budget(layers_of([10, 20, 5]), 1.25, **options)
    assert budget.allowed == 86  # a plane takes 56, 12 and 1: 0.75·69 + 0.25·138 = 86.25
    assert budget.fits([1, 2, 6])  # 56 + 24 + 6 = 86
    assert not budget.fits([1, 2, 7])
    assert make_budget(layers_of([10, 20, 5]), 2, **options).allowed == 138


def test_between_two_planes_a_target_allows_its_share_of_the_way_whatever_the_planes_cost() -> None:
    def squares(layer: LayerFacts, planes: int) -> int:
        return layer.weights * planes**2

    allowed = [make_budget(layers_of([10, 25]), target, bits=3, cost=squares).allowed for target in (2, 2.3, 2.9, 3)]
    assert allowed == [140, 192, 297, 315]  # 35·(4, 0.7·4 + 0.3·9 = 5.5, 0.1·4 + 0.9·9 = 8.5, 9), rounded down


def _layers() -> list[Layer]:
    return [Layer(name, nn.Parameter(torch.zeros(4))) for name in ("stem.weight", "body.0.weight", "fc.weight")]


def test_rules_by_glob_bound_single_layers() -> None:
    limits = plane_limits(_layers(), bits=8, keep=["fc"], min_bits={"stem.*": 3}, max_bits={"body.*": 2})
    assert limits.min_planes == (3, 1, 8)
    assert limits.max_planes == (8, 2, 8)


def test_a_glob_that_matches_nothing_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        UserError, match=r"layers.keep: `stam.weight` matches no quantized weight; did you mean `stem.weight`"
    ):
        plane_limits(_layers(), bits=8, keep=["stam.weight"])


def test_an_infeasible_target_is_refused_with_the_least_that_is_possible() -> None:
    limits, masks = plane_limits(_layers(), bits=8, keep=["fc"]), torch.ones(3, 8, dtype=torch.bool)
    with pytest.raises(UserError, match=r"target_bits 2 cannot be met: the layer rules alone need 3.333"):
        project(masks, torch.ones(3, 8), make_budget(_layers(), 2, limits=limits), spendable=masks)
