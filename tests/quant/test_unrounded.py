"""What stands behind the delivered weights, for another run to begin with: at their scale, and not on their levels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quant.test_latent import small_model, train
from torch import Tensor, nn

from csqcli.quant.catalog import CARDS
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import find_layers
from csqcli.quant.method_settings import PAPER
from csqcli.quant.methods.base import Schedule, WeightMethod, plan_for
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups

STEPS = 40
TRAINING = [name for name, card in CARDS.items() if card.trains and name != "float"]
WAYS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TRAINING),
    ("dorefa", {"rescale": False}),
    ("pact", {"quantizer": "sawb"}),
    ("csq", {"harden_at": 1.0}),
    ("csq", {"per_channel": False, "rounding": "threshold"}),
    ("csq", {"straight_through_at": 0.6}),
    ("csq-uniform", {"straight_through_at": 0.6}),
]


def build(name: str, settings: dict[str, Any]) -> tuple[nn.Module, QuantizedOptimizer]:
    model, card = small_model(), CARDS[name]
    layers, _ = find_layers(model)
    target = min(4, card.max_planes)
    given = [target] * len(layers) if card.takes == "planes" else None
    plan = plan_for(layers, target, Schedule(STEPS, 10), planes=given)
    method = card.load()(layers, plan, card.settings(**settings))
    base = torch.optim.SGD(base_groups(model, method), lr=0.05, momentum=0.9)
    return model, QuantizedOptimizer(method, base, harden_at_step=method.harden_at_step)


def behind(method: WeightMethod) -> list[Tensor]:
    found = method.unrounded()
    assert found is not None
    return [value.clone() for value in found]


def off_its_levels(value: Tensor, hard: HardLayer) -> float:
    """Share of the weights that lie more than a hundredth of a level from the delivered weight, channel by channel."""
    apart = 0
    pairs = (tensor.movedim(hard.channel_dim, 0).flatten(1) for tensor in (value, hard.weight()))
    for row, rounded in zip(*pairs, strict=True):
        gaps = rounded.unique().diff()
        spacing = gaps[gaps > 1e-6].min() if len(gaps) else torch.tensor(1.0)
        apart += int(((row - rounded).abs() > 0.01 * spacing).sum())
    return apart / value.numel()


@pytest.mark.parametrize(("name", "settings"), WAYS)
def test_what_stands_behind_the_delivered_weights_is_at_their_scale_and_off_their_levels(
    name: str, settings: dict[str, Any]
) -> None:
    model, optimizer = build(name, settings)
    before: list[Tensor] = []
    optimizer.before_harden = lambda: before.extend(behind(optimizer.method))
    train(model, optimizer, range(STEPS))
    optimizer.harden()
    for value, earlier, hard in zip(behind(optimizer.method), before, optimizer.hard_layers(), strict=True):
        assert torch.equal(value, earlier), "hardening moved it"
        delivered = hard.weight()
        assert value.shape == delivered.shape
        fitted = float(
            (value * delivered).sum() / delivered.square().sum()
        )  # of the delivered weight to what is behind it
        assert abs(fitted - 1) < 0.12, hard.name
        assert off_its_levels(value, hard) > 0.05, hard.name  # gates have decided most weights by then


@pytest.mark.parametrize("name", ["csq", "csq-uniform"])
def test_behind_a_hardened_gate_stands_the_soft_weight_that_was_trained(name: str) -> None:
    model, optimizer = build(name, {})
    soft: list[Tensor] = []
    optimizer.before_harden = lambda: soft.extend(layer.parameter.detach().clone() for layer in optimizer.method.layers)
    train(model, optimizer, range(STEPS))
    for value, trained in zip(behind(optimizer.method), soft, strict=True):
        torch.testing.assert_close(value, trained, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in TRAINING), ("csq", {"straight_through_at": 0.6})]
)
@pytest.mark.parametrize("stop", [20, 38])  # csq hardens at 36
def test_a_resumed_method_has_the_same_behind_its_weights(name: str, settings: dict[str, Any], stop: int) -> None:
    model, optimizer = build(name, settings)
    train(model, optimizer, range(stop))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, resumed = build(name, settings)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for network, steps in ((model, optimizer), (again, resumed)):
        train(network, steps, range(stop, STEPS))
        steps.harden()
    assert all(map(torch.equal, behind(optimizer.method), behind(resumed.method)))


def test_a_state_of_an_earlier_version_says_not_when_weights_turned_hard() -> None:
    model, optimizer = build("csq", {})
    train(model, optimizer, range(38))
    state = copy.deepcopy(optimizer.method.state_dict())
    del state["soft_step"]
    _, resumed = build("csq", {})
    resumed.method.load_state_dict(state)
    assert all(map(torch.equal, behind(optimizer.method), behind(resumed.method)))


def test_saturated_gates_of_the_paper_leave_the_scale_as_it_is() -> None:
    model, optimizer = build("csq", PAPER)
    train(model, optimizer, range(STEPS))
    optimizer.harden()
    for value, hard in zip(behind(optimizer.method), optimizer.hard_layers(), strict=True):
        fitted = float((value * hard.weight()).sum() / hard.weight().square().sum())
        assert abs(fitted - 1) < 0.12


def test_post_training_keeps_nothing_behind_its_integers() -> None:
    layers, _ = find_layers(small_model())
    method = CARDS["ptq"].load()(layers, plan_for(layers, 2, Schedule(1, 1), planes=[2] * len(layers)))
    assert method.unrounded() is None
    assert [name for name, card in CARDS.items() if not card.keeps_unrounded] == ["ptq", "float"]
