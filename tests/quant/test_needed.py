"""Which layers keep a plane because the network would end without them: by hand for small networks of known ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant.budget import Budget, PlaneLimits, allocate, make_budget, plane_limits, project, shared_within
from csqcli.quant.layers import find_layers
from csqcli.quant.needed import layers_together, needed_layers

IMAGES = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Ways(nn.Module):
    """A stem; a branch of two layers around which an identity leads; two layers side by side, the first the larger; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.unused = nn.Linear(4, 6), nn.Linear(8, 3), nn.Linear(9, 9)
        self.inner, self.outer = nn.Linear(6, 20), nn.Linear(20, 6)
        self.wide, self.back, self.narrow = nn.Linear(6, 30), nn.Linear(30, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(self.back(torch.relu(self.wide(x))) + self.narrow(x))


def limits(fewest: dict[str, int], layers: list, most: dict[str, int] | None = None) -> PlaneLimits:
    names = [layer.name.removesuffix(".weight") for layer in layers]
    return PlaneLimits(tuple(fewest.get(name, 0) for name in names), tuple((most or {}).get(name, 8) for name in names))


def found(model: nn.Module, fewest: dict[str, int] | None = None, most: dict[str, int] | None = None) -> set[str]:
    layers, _ = find_layers(model)
    names = needed_layers(model, layers, limits(fewest or {}, layers, most), IMAGES)
    return {name.removesuffix(".weight") for name in names}


def test_of_a_chain_every_layer_is_needed() -> None:
    assert found(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))) == {"0", "3"}


def test_a_branch_may_go_and_of_two_ways_the_smaller_one_stays() -> None:
    torch.manual_seed(0)
    assert found(Ways()) == {"stem", "narrow", "head"}


def test_all_that_may_go_may_go_together() -> None:
    torch.manual_seed(0)
    model = Ways()
    for name in ("inner", "outer", "wide", "back", "unused"):
        model.get_submodule(name).weight.data.zero_()
    scores = model(IMAGES)
    assert (scores - scores[0]).abs().max() > 0.01


def test_rules_of_single_layers_are_respected() -> None:
    torch.manual_seed(0)
    assert found(Ways(), {"wide": 1, "back": 1}) == {"stem", "head"}  # these two stay, and lead around the narrow one
    assert found(Ways(), most={"narrow": 0}) == {
        "stem",
        "wide",
        "back",
        "head",
    }  # gone for good, so the others are needed
    assert found(Ways(), {"stem": 2, "head": 1, "narrow": 1}) == set()


def test_the_model_is_put_back_as_it_was() -> None:
    torch.manual_seed(0)
    model = Ways().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found(model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_whose_scores_say_nothing_yet_keeps_every_layer() -> None:
    torch.manual_seed(0)
    model = Ways()
    nn.init.zeros_(model.head.weight)
    assert found(model) == {"stem", "inner", "outer", "wide", "back", "narrow", "head", "unused"}


def test_a_layer_whose_absence_gives_nan_is_needed() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.main = nn.Linear(4, 5, bias=False), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            side = self.side(x)
            return self.main(x) + side / side.norm(dim=1, keepdim=True)

    assert "side" in found(Normed())


def test_a_target_that_needed_layers_do_not_leave_is_refused_and_says_why() -> None:
    layers, _ = find_layers(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)))
    kept = plane_limits(layers, bits=8, floor=0, max_bits={"1": 0}, needed=["0.weight", "1.weight"])
    assert kept.min_planes == (1, 0)  # a ceiling of 0 is the user's word
    kept = plane_limits(layers, bits=8, floor=0, needed=["0.weight", "1.weight"])
    assert kept.min_planes == (1, 1)
    with pytest.raises(UserError, match=r"target_bits 0.75 cannot be met.* need 1") as raised:
        make_budget(layers, 0.75, limits=kept).check_feasible()
    assert "2 of 2 layers keep a plane" in (raised.value.hint or "")


def together(model: nn.Module, names: set[str]) -> list[list[str]]:
    layers, _ = find_layers(model)
    groups = layers_together(model, layers, [f"{name}.weight" for name in names], IMAGES)
    return [[name.removesuffix(".weight") for name in group] for group in groups]


def test_layers_of_one_branch_go_together_and_others_alone() -> None:
    torch.manual_seed(0)
    model = Ways().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert together(model, {"inner", "outer", "wide", "back"}) == [["inner", "outer"], ["wide", "back"]]
    assert together(model, {"inner", "outer", "wide", "narrow", "unused"}) == [["inner", "outer"]]
    assert together(model, set()) == []
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_chain_of_three_on_a_branch_is_one_group_and_a_gate_on_it_is_its_own() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.reduce, self.expand, self.head = nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            branch = torch.relu(self.b(torch.relu(self.a(x))))
            branch = branch * torch.sigmoid(self.expand(torch.tanh(self.reduce(branch))))
            return self.head(x + self.c(branch))

    torch.manual_seed(0)
    groups = together(Gated(), {"a", "b", "c", "reduce", "expand"})
    assert groups == [
        ["a", "b", "c"],
        ["reduce", "expand"],
    ]  # without the gate's layers the branch goes on at a fixed gate


def test_a_group_gets_planes_for_all_its_layers_or_for_none() -> None:
    layers, _ = find_layers(nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(5))))
    kept = plane_limits(layers, bits=2, floor=0, together=[["0.weight", "1.weight"], ["2.weight", "3.weight"]])
    importance = torch.tensor([[9.0, 1.0], [1.0, 0.5], [4.0, 3.0], [5.0, 0.1], [2.0, 1.9]], dtype=torch.float64)
    # 10 for the first two, 9 for the next two; without groups 0 and 3 would be bought first
    shared = shared_within(importance, make_budget(layers, 1, bits=2, limits=kept))
    assert shared[:, 0].tolist() == [5.0, 5.0, 4.5, 4.5, 2.0]
    assert shared[:, 1].tolist() == importance[:, 1].tolist()
    by_target = {t: allocate(importance, make_budget(layers, t, bits=2, limits=kept)) for t in (0.4, 0.6, 0.8, 1.0)}
    assert by_target[0.4] == [1, 1, 0, 0, 0]
    assert by_target[0.6] == [1, 1, 0, 0, 1]  # no half of the second group for what is left
    assert by_target[0.8] == [1, 1, 1, 1, 0]
    assert by_target[1.0] == [1, 1, 2, 1, 0]


def test_a_group_that_fits_whole_does_not_go_for_the_sake_of_a_part() -> None:
    limits = PlaneLimits((0, 0, 1), (4, 4, 4), together=((0, 1),))
    weights = (100, 300, 50)
    budget = Budget(1.65, weights, limits, tuple(tuple(k * count for k in range(5)) for count in weights))
    importance = torch.tensor([[27.6, 16.6, 4.2, 2.1], [271.6, 265.1, 184.2, 17.3], [40.8, 17.8, 13.0, 3.7]])
    planes = allocate(importance.double(), budget)  # a first try has two planes in the second layer, none in the first
    assert planes == [2, 1, 4]
    assert budget.fits(planes)


def test_projection_leaves_no_part_of_a_group() -> None:
    layers, _ = find_layers(nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(3))))
    limits = plane_limits(layers, bits=2, floor=0, together=[["0.weight", "1.weight"]])
    masks = torch.tensor([[True, False]] * 3)
    importance = torch.tensor([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1]])
    every = torch.ones_like(masks)
    found = project(masks, importance, make_budget(layers, 2 / 3, bits=2, limits=limits), spendable=every)
    assert found.sum(dim=1).tolist() == [0, 0, 2]
    whole = make_budget(layers, 1, bits=2, limits=limits)
    assert project(masks, importance, whole, spendable=every).tolist() == masks.tolist()


def test_a_group_of_which_a_rule_keeps_a_layer_is_none() -> None:
    layers, _ = find_layers(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 4)))
    groups = [["0.weight", "1.weight"]]
    assert plane_limits(layers, bits=8, floor=0, together=groups).together == ((0, 1),)
    assert plane_limits(layers, bits=8, floor=0, together=groups, min_bits={"1": 2}).together == ()
    assert plane_limits(layers, bits=8, floor=0, together=groups, max_bits={"0": 0}).together == ()
