"""Hardening loses nothing that was decided, keeps the budget, and survives every corner; signed digits and their start."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from csqcli.quant import equations, hardening
from csqcli.quant.budget import Budget, Ceiling, PlaneLimits, make_budget
from csqcli.quant.hardening import UNSEEN, choose_planes, fit_levels, known_curvature, plane_order, reduce_to_budget
from csqcli.quant.layers import Layer, find_layers
from csqcli.quant.method_settings import PAPER, CSQSettings, MSQSettings, UniformGateSettings
from csqcli.quant.methods.base import Plan, Schedule, plan_for
from csqcli.quant.methods.csq import BitLevelCSQ, UniformCSQ
from csqcli.quant.methods.msq import MSQ
from csqcli.quant.passes.bitplanes import BitPlanes
from csqcli.quant.passes.rounding import mse_step
from csqcli.quant.passes.sampling import sample_indices

CPU = torch.device("cpu")


def formed_by(mask: list[bool]) -> list[int]:
    """Every integer that digits in {−1, 0, 1} on a mask's planes form, by enumeration."""
    on = [2**b for b, used in enumerate(mask) if used]
    return sorted(
        {
            sum(d * p for d, p in zip(digits, on, strict=True))
            for digits in itertools.product((-1, 0, 1), repeat=len(on))
        }
    )


# --- digits


@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_signed_digits_sum_to_the_integer_and_every_prefix_rounds_it(bits: int, seed: int) -> None:
    top = 2**bits - 1
    integers = torch.randint(-top, top + 1, (64,), generator=torch.Generator().manual_seed(seed))
    digits = equations.signed_digits_of(integers, bits)
    assert set(digits.unique().tolist()) <= {-1.0, 0.0, 1.0}
    for lowest in range(bits):
        kept = sum(digits[b] * 2**b for b in range(lowest, bits))
        off = (integers - kept).abs()
        # rounding to multiples of 2^lowest is off by half of one; beyond the largest that the planes form, by the rest
        assert (off <= torch.clamp(integers.abs() - (2**bits - 2**lowest), min=2**lowest / 2)).all()
    assert torch.equal(sum(digits[b] * 2**b for b in range(bits)), integers.float())


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_signed_digits_of_a_mask_form_every_integer_that_it_can(mask: list[bool]) -> None:
    integers = torch.tensor(formed_by(mask))
    digits = equations.signed_digits_of(integers, len(mask), torch.tensor(mask))
    assert digits[~torch.tensor(mask)].abs().sum() == 0
    assert torch.equal(sum(digits[b] * 2**b for b in range(len(mask))), integers.float())


@pytest.mark.parametrize("digits", ["signed", "sign-magnitude"])
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("logit", [1.0, 0.05])
def test_step_0_is_the_8_bit_model_in_both_codes(digits: str, share: float, logit: float) -> None:
    torch.manual_seed(0)
    layers, _ = find_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(20, 30)))
    before = [layer.parameter.detach().double().clone() for layer in layers]
    chosen = CSQSettings(**PAPER | {"digits": digits, "init_scale": share, "logit": logit, "mask_logit": logit})
    BitLevelCSQ(layers, plan_for(layers, 2.0, Schedule(40, 10)), chosen)
    for layer, weight in zip(layers, before, strict=True):
        scale = share * weight.abs().max()
        ratio = (weight / scale * 255).clamp(-255, 255)
        clear = (ratio.frac().abs() - 0.5).abs() > 1e-3  # not next to a tie
        expected = ratio.round() * scale / 255
        torch.testing.assert_close(layer.parameter.double()[clear], expected[clear], atol=1e-6, rtol=1e-4)


def test_the_logit_rule_ends_at_four_over_beta_under_the_optimizer_that_decays_it() -> None:
    lr, decay, momentum, steps, beta = 0.1, 5e-4, 0.9, 4000, 200.0
    logit = equations.plastic_logit(lr=lr, weight_decay=decay, momentum=momentum, steps=steps, beta_final=beta)
    velocity = 0.0
    for step in range(steps):  # SGD as PyTorch's: v ← μv + wd·m, m ← m − lr·v, without a gradient
        velocity = momentum * velocity + decay * logit
        logit -= lr * (1 + math.cos(math.pi * step / steps)) / 2 * velocity
    assert logit * beta == pytest.approx(4, rel=0.02)
    assert equations.plastic_logit(lr=lr, weight_decay=decay, momentum=momentum, steps=10**9, beta_final=beta) == 1


@given(st.lists(st.booleans(), min_size=1, max_size=6).filter(any), st.floats(0.5, 20.0), st.integers(0, 2**32 - 1))
def test_numbers_between_levels_are_met_by_the_lowest_digit_and_in_holes_by_the_nearest_level(
    mask: list[bool], beta: float, seed: int
) -> None:
    top = float(max(formed_by(mask)))
    levels = torch.tensor(formed_by(mask), dtype=torch.float64)
    values = (torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1) * top
    digits = equations.signed_digits_of(values, len(mask), torch.tensor(mask))
    pos, neg = equations.logits_from_digits(digits, logit=1.0, beta=beta)
    soft = torch.sigmoid(beta * pos.double()) - torch.sigmoid(beta * neg.double())  # each digit times tanh(β/2)
    formed = sum(soft[b] * 2**b for b in range(len(mask))) / math.tanh(beta / 2)
    nearest = (values[:, None] - levels).abs().min(dim=1).values
    assert ((formed - values).abs() <= nearest + 1e-4 * top).all()
    if all(mask[mask.index(True) :]):  # without holes
        torch.testing.assert_close(formed, values, atol=1e-4 * top, rtol=1e-3)


# --- the nearest integers and step


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6).filter(any),
    st.floats(0.01, 10.0),
    st.sampled_from([1.0, -1.0]),
    st.sampled_from([1.0, 0.7, 0.4]),
    st.integers(0, 2**32 - 1),
)
def test_a_weight_that_lies_on_levels_is_kept_exactly(
    mask: list[bool], step: float, sign: float, share: float, seed: int
) -> None:
    """Also where no weight is on the highest levels: only a known step finds the others then."""
    levels = torch.tensor(formed_by(mask))
    used = levels[levels.abs() <= share * levels.max()]
    chosen = used[torch.randint(len(used), (200,), generator=torch.Generator().manual_seed(seed))]
    weight = (chosen * step * sign).float()
    fit = fit_levels(weight, torch.tensor(mask), starts=[step])
    assert fit.step > 0
    assert set(fit.integers.int().tolist()) <= set(levels.tolist())
    torch.testing.assert_close(fit.integers * fit.step, weight, atol=1e-5 * step, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([[True], [True, True], [True, False, True], [True] * 4]))
def test_the_fit_is_as_near_as_a_fine_search_in_float64(seed: int, mask: list[bool]) -> None:
    weight = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    fit = fit_levels(weight, torch.tensor(mask))
    levels = torch.tensor(formed_by(mask), dtype=torch.float64)
    exact = weight.double()
    steps = torch.linspace(0.05, 1, 100, dtype=torch.float64) * exact.abs().max() / levels.max()
    errors = [float((exact[:, None] - step * levels[None]).square().min(dim=1).values.sum()) for step in steps]
    own = (exact - fit.step.double() * fit.integers.double()).square().sum()
    torch.testing.assert_close(fit.error, own, atol=1e-6, rtol=1e-4)
    assert float(own) <= min(errors) * 1.02


@pytest.mark.parametrize("largest", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("mask", [[False, False], [False, True], [True, True]])
def test_all_zero_tiny_and_huge_weights_and_empty_masks_are_finite(largest: float, mask: list[bool]) -> None:
    weight = torch.linspace(-1, 1, 11) * largest
    fit = fit_levels(weight, torch.tensor(mask), starts=[0.0, float("inf"), float("nan")])
    assert torch.isfinite(fit.step)
    assert fit.step > 0
    hard = fit.integers * fit.step
    assert torch.isfinite(hard).all()
    if any(mask) and largest:
        assert (hard - weight).abs().max() <= 0.51 * largest


# --- which planes


@st.composite
def trained(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Budget]:
    layers, bits = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weights = [
        torch.randn(draw(st.integers(1, 60)), generator=rng) * draw(st.sampled_from([0, 1e-3, 1]))
        for _ in range(layers)
    ]
    masks = torch.rand(layers, bits, generator=rng) * (torch.rand(layers, bits, generator=rng) < 0.7)
    energy, curvature = torch.rand(layers, bits, generator=rng) * masks.square(), torch.rand(layers, generator=rng)
    fewest = tuple(draw(st.integers(0, 1)) for _ in range(layers))
    target = draw(st.floats(1, bits))
    limits = PlaneLimits(fewest, (bits,) * layers)
    owners = [Layer(f"{index}.weight", nn.Parameter(weight)) for index, weight in enumerate(weights)]
    return weights, masks, energy, curvature, make_budget(owners, target, bits=bits, limits=limits)


@settings(deadline=None, max_examples=50)
@given(trained())
def test_chosen_planes_never_exceed_the_target_and_never_wake_a_plane_that_sleeps(state) -> None:
    weights, masks, energy, curvature, budget = state
    chosen = choose_planes(weights, masks, energy, curvature, budget)
    counts, sizes = chosen.sum(dim=1).tolist(), [len(weight) for weight in weights]
    assert sum(c * w for c, w in zip(counts, sizes, strict=True)) <= budget.target * sum(sizes) + 1e-6
    for count, few, soft in zip(counts, budget.limits.min_planes, masks, strict=True):
        assert few <= count <= max(few, int((soft >= UNSEEN).sum()))


def least_error(weight: np.ndarray, planes: int) -> float:
    """min over steps t of Σ_i (W_i − t·q_i)² with q_i the nearest of 0 … ±(2^k − 1), by trying 4,000 steps."""
    top = 2**planes - 1
    steps = np.linspace(0.05, 1.0, 4000)[:, None] * np.abs(weight).max() / top
    return float(np.square(weight - steps * np.clip(np.rint(weight / steps), -top, top)).sum(axis=1).min())


def test_planes_are_chosen_by_what_whole_layers_lose_where_samples_of_one_size_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300 and 100 weights, 16 of each looked at: every choice within the budget is tried, in NumPy."""
    monkeypatch.setattr(hardening, "_LARGE_SAMPLE", 16)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(count, generator=generator) * 2 - 1 for count in (300, 100)]
    samples = [weight[sample_indices(len(weight), 16)].double().numpy() for weight in weights]
    lost = [[float(np.square(part).sum()), *(least_error(part, k) for k in (1, 2, 3, 4))] for part in samples]
    within = [planes for planes in itertools.product(range(1, 5), repeat=2) if planes @ np.array([300, 100]) <= 700]

    def best(sizes: tuple[float, float]) -> tuple[int, ...]:
        return min(
            within, key=lambda planes: sum(row[k] * size for row, k, size in zip(lost, planes, sizes, strict=True))
        )

    assert best((300 / 16, 100 / 16)) == (2, 1)
    assert best((1, 1)) == (1, 4)  # as if both layers were their samples
    owners = [Layer(f"{index}.weight", nn.Parameter(weight)) for index, weight in enumerate(weights)]
    energy = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
    chosen = choose_planes(weights, torch.ones(2, 4), energy, torch.ones(2), make_budget(owners, 1.75, bits=4))
    assert chosen.tolist() == [[False, False, True, True], [False, False, False, True]]


def test_layers_count_alike_until_any_has_had_a_gradient() -> None:
    assert known_curvature(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert known_curvature(torch.tensor([0.0, 4.0, 0.5])).tolist() == [
        0.0,
        4.0,
        0.5,
    ]  # without a gradient beside others: no cost


@pytest.mark.parametrize(
    ("fisher", "kept"),
    [
        ([0.0, 0.0], {0: 1}),  # before any gradient: the first layer's second plane loses 1, the second's 4
        ([1.0, 1.0], {0: 1}),
        ([9.0, 1.0], {1: 1}),  # 9 against 4
    ],
)
def test_planes_too_many_are_given_up_where_they_lose_least(fisher: list[float], kept: dict[int, int]) -> None:
    errors = [torch.tensor(row, dtype=torch.float64) for row in ([50.0, 1.0, 0.0], [50.0, 4.0, 0.0])]
    alike = Budget(1.5, (10, 10), PlaneLimits((1, 1), (2, 2)), ((0, 10, 20), (0, 10, 20)))
    assert reduce_to_budget([2, 2], torch.tensor(fisher), alike, errors=errors.__getitem__) == kept


def test_planes_within_the_budget_and_the_limits_stay_and_nothing_is_measured() -> None:
    def errors(index: int) -> Tensor:
        raise AssertionError("nothing to choose")

    within = Budget(1.5, (10, 10), PlaneLimits((0, 0), (2, 2)), ((0, 10, 20), (0, 10, 20)))
    assert reduce_to_budget([2, 1], torch.zeros(2), within, errors=errors) == {}


def test_a_layer_beyond_its_own_limit_gives_up_what_is_beyond_it_where_the_budget_is_met() -> None:
    ruled = Budget(2.0, (10, 10), PlaneLimits((0, 0), (1, 2)), ((0, 10, 20), (0, 10, 20)))
    errors = torch.tensor([[50.0, 1.0, 0.0], [50.0, 4.0, 0.0]], dtype=torch.float64)
    assert reduce_to_budget([2, 2], torch.ones(2), ruled, errors=errors.__getitem__) == {0: 1}


def test_planes_within_the_first_of_two_budgets_are_given_up_for_the_second() -> None:
    second = Ceiling(((0, 1, 2), (0, 10, 20)), 12)  # [2, 1] or [1, 1], where the first one allows [2, 2]
    both = Budget(2.0, (10, 10), PlaneLimits((1, 1), (2, 2)), ((0, 10, 20), (0, 10, 20)), also=(second,))
    errors = torch.tensor([[50.0, 1.0, 0.0], [50.0, 4.0, 0.0]], dtype=torch.float64)
    assert reduce_to_budget([2, 2], torch.ones(2), both, errors=errors.__getitem__) == {1: 1}


def test_msq_drops_planes_until_every_budget_is_kept() -> None:
    """Three planes in both layers are within the mean planes, and over the ceiling beside it by one plane of the first."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers, _ = find_layers(model)
    plan = plan_for(layers, 3, Schedule(4, 4), bits=3)
    ceiling = Ceiling(((0, 1, 2, 3), (0, 0, 0, 0)), 2)
    method = MSQ(layers, replace(plan, budget=replace(plan.budget, also=(ceiling,))), MSQSettings())
    assert method.searching
    method.harden(3)
    assert method.budget.fits(method.planes)
    assert method.planes == [2, 3]


def test_planes_are_given_up_by_energy_and_ties_keep_the_higher() -> None:
    assert plane_order(torch.tensor([1.0, 5.0, 0.0, 5.0, 0.0])).tolist() == [3, 1, 0, 4, 2]


# --- the method


def decided(layers: list[Layer], *, scale_sign: float = 1.0, rounding: str = "nearest") -> BitLevelCSQ:
    """A method at the end of training with every bit decided, two of three masks too, and the last one half open."""
    chosen = CSQSettings(**PAPER | {"rounding": rounding, "beta_schedule": "step", "logit": 1.0, "mask_logit": 1.0})
    method = BitLevelCSQ(layers, plan_for(layers, 1.9, Schedule(10, 10), bits=3), chosen)
    rng = torch.Generator().manual_seed(1)
    for gates in (method.bit_planes.pos, method.bit_planes.neg):
        gates.copy_(torch.where(torch.rand(gates.shape, generator=rng) < 0.4, 1.0, -1.0))
    method.bit_planes.mask_logits.copy_(
        torch.tensor([[-1.0, 1.0, 1.0], [-1.0, -1.0, -0.0004]])
    )  # σ(200·−0.0004) = 0.48
    method.bit_planes.scale.copy_(torch.tensor([0.5, 2.0]) * scale_sign)
    method.materialise(9)
    return method


@pytest.mark.parametrize("scale_sign", [1.0, -1.0])
def test_hard_equals_soft_where_bits_are_decided_and_a_last_plane_is_half_open(scale_sign: float) -> None:
    layers = [
        Layer("small.weight", nn.Parameter(torch.randn(4, 5))),
        Layer("large.weight", nn.Parameter(torch.randn(40, 5))),
    ]
    method = decided(layers, scale_sign=scale_sign)
    soft = [layer.parameter.detach().clone() for layer in layers]
    # Eq. 5 in float64, so that the claim does not rest on the pass under test
    where = method.bit_planes.slices[1]
    pos, neg = (
        gates[:, where].T.reshape(40, 5, 3).double() for gates in (method.bit_planes.pos, method.bit_planes.neg)
    )
    q = torch.sigmoid(200.0 * method.bit_planes.mask_logits[1].double())
    torch.testing.assert_close(
        soft[1].double(),
        reference.weight(pos, neg, q, method.bit_planes.scale[1:].double(), 200.0),
        atol=1e-6,
        rtol=1e-5,
    )
    method.harden(9)
    for layer, before, hard in zip(layers, soft, method.hard_layers(), strict=True):
        torch.testing.assert_close(layer.parameter.detach(), before, atol=1e-5, rtol=1e-4)
        assert (hard.scale > 0).all()
    assert method.mean_bits() == pytest.approx((2 * 20 + 1 * 200) / 220)  # the sleeping planes stay off


@pytest.mark.parametrize("mask_logit", [1.0, -0.0004])  # σ(200·m): 1 and 0.48
def test_decided_bits_that_form_low_integers_alone_are_kept_whether_masks_are_open_or_half_open(
    mask_logit: float,
) -> None:
    """Of 6 planes the two highest digits are zero throughout: the largest weight is far from the largest level."""
    layer = Layer("w", nn.Parameter(torch.randn(40, 5)))
    usual = PAPER | {"rounding": "nearest", "beta_schedule": "step", "logit": 1.0, "mask_logit": 1.0}
    method = BitLevelCSQ([layer], plan_for([layer], 6, Schedule(10, 10), bits=6), CSQSettings(**usual))
    rng = torch.Generator().manual_seed(1)
    for gates in (method.bit_planes.pos, method.bit_planes.neg):
        gates.copy_(torch.where(torch.rand(gates.shape, generator=rng) < 0.4, 1.0, -1.0))
        gates[4:] = -1.0
    method.bit_planes.mask_logits.fill_(mask_logit)
    method.materialise(9)
    soft = layer.parameter.detach().clone()
    method.harden(9)
    (hard,) = method.hard_layers()
    digits = (method.bit_planes.pos >= 0).int() - (method.bit_planes.neg >= 0).int()
    integers = sum(2**b * digits[b] for b in range(4)).view(40, 5)
    assert torch.equal(hard.integers, integers)
    torch.testing.assert_close(hard.weight(), soft, atol=1e-5, rtol=1e-4)


def test_unit_steps_are_the_papers_and_take_a_negative_scale_into_the_integers() -> None:
    layers = [
        Layer("small.weight", nn.Parameter(torch.randn(4, 5))),
        Layer("large.weight", nn.Parameter(torch.randn(40, 5))),
    ]
    method = decided(layers, scale_sign=-1.0, rounding="threshold")
    method.harden(9)
    hard = method.hard_layers()
    assert all((layer.scale > 0).all() for layer in hard)
    where = method.bit_planes.slices[0]
    digits = (method.bit_planes.pos[:, where] >= 0).double() - (method.bit_planes.neg[:, where] >= 0).double()
    expected = -0.5 / 7 * (2 * digits[1] + 4 * digits[2])
    torch.testing.assert_close(hard[0].weight().flatten().double(), expected, atol=1e-6, rtol=1e-5)


def train(method: BitLevelCSQ, model: nn.Module, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        method.collect(step, lr=0.05, lr_share=1.0)
        method.materialise(step + 1)
        model.zero_grad()


def made(seed: int = 0, *, target_bits: float = 2.0, **more: object) -> tuple[nn.Module, BitLevelCSQ]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4, bias=False))
    layers, _ = find_layers(model)
    usual = PAPER | {
        "logit": 1.0,
        "mask_logit": 1.0,
        "digits": "signed",
        "rounding": "nearest",
        "refit_scale": True,
        "beta_schedule": "step",
    }
    return model, BitLevelCSQ(layers, plan_for(layers, target_bits, Schedule(20, 10)), CSQSettings(**usual | more))


@pytest.mark.parametrize("digits", ["signed", "sign-magnitude"])
@pytest.mark.parametrize("target", [1.0, 1.7, 3.0])
def test_masks_fixed_early_stay_and_are_what_is_delivered(digits: str, target: float) -> None:
    model, method = made(digits=digits, target_bits=target, fix_masks_at=0.4)
    train(method, model, range(8))
    assert method.bit_planes.fixed_mask is not None
    fixed = method.bit_planes.fixed_mask.clone()
    assert target - 1 <= method.mean_bits() <= target + 1e-9
    train(method, model, range(8, 20))
    method.harden(20)
    assert method.hardened is not None
    assert torch.equal(method.hardened.mask, fixed)


def fixed_at_step_8(**more: object) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer: the soft weight just before its planes are fixed, the weight after, and its mask."""
    model, method = made(fix_masks_at=0.4, **more)
    train(method, model, range(7))
    before: list[Tensor] = []
    fix = method._fix_masks

    def watched(beta: float, new_beta: float) -> None:
        before.extend(method.bit_planes.soft_weight(index, beta) for index in range(2))
        fix(beta, new_beta)

    method._fix_masks = watched  # type: ignore[method-assign]
    train(method, model, range(7, 8))
    assert method.bit_planes.fixed_mask is not None
    after = [layer.parameter.detach().flatten() for layer in method.layers]
    return list(zip(before, after, method.bit_planes.fixed_mask, strict=True))


def test_fixing_planes_refits_each_scale_by_least_squares() -> None:
    for before, after, _ in fixed_at_step_8():
        # the residual of a least-squares scale is orthogonal to what was scaled
        assert abs(float((before - after) @ after)) <= 1e-4 * float(after @ after)


def test_bits_that_restart_keep_the_soft_weight_within_the_reach_of_their_planes() -> None:
    for before, after, mask in fixed_at_step_8(restart_beta=2.0, gate_steps="preconditioned", beta_final=20.0):
        assert mask[mask.int().argmax() :].all()  # no holes here
        reach = after.abs().max()
        torch.testing.assert_close(after, before.clamp(-reach, reach), atol=1e-5, rtol=1e-3)


def test_beta_starts_again_when_bits_do_and_ends_when_they_harden() -> None:
    _, method = made(fix_masks_at=0.4, restart_beta=2.0, beta_final=20.0, harden_at=0.9)
    # 20 steps: planes fixed from step 8, hard from step 18
    expected = [20 ** (step / 19) for step in range(8)] + [2 * 10 ** ((step - 8) / 10) for step in range(8, 19)] + [20]
    assert [method.beta(step) for step in range(20)] == pytest.approx(expected)


@pytest.mark.parametrize("stop", [5, 8, 13])
def test_a_state_saved_before_at_or_after_the_fixing_step_goes_on_alike(stop: int) -> None:
    model, method = made(fix_masks_at=0.4)
    train(method, model, range(stop))
    state = method.state_dict()
    state = {
        "planes": {k: v.clone() if isinstance(v, Tensor) else v for k, v in state["planes"].items()},
        "fisher": state["fisher"].clone(),
    }
    train(method, model, range(stop, 20))
    again, resumed = made(fix_masks_at=0.4)
    resumed.load_state_dict(state)
    resumed.materialise(stop)
    train(resumed, again, range(stop, 20))
    for ours, theirs in zip(method.layers, resumed.layers, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("digits", ["signed", "sign-magnitude"])
def test_fixed_planes_that_restart_lose_nothing_between_their_levels(digits: str, per_channel: bool) -> None:
    torch.manual_seed(0)
    layers, _ = find_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(20, 30)))
    before = [layer.parameter.detach().clone() for layer in layers]
    plan = plan_for(layers, 2, Schedule(40, 10), planes=[2, 2])
    UniformCSQ(layers, plan, UniformGateSettings(digits=digits, restart_beta=2.0, per_channel=per_channel))
    for layer, weight in zip(layers, before, strict=True):
        after, rows = layer.parameter.detach().flatten(1), weight.flatten(1)
        reach = after.abs().amax(dim=1, keepdim=True) if per_channel else after.abs().max()  # 3 steps of the two planes
        torch.testing.assert_close(after, rows.clamp(-reach, reach), atol=1e-5, rtol=1e-4)
        assert (reach > 0.5 * rows.abs().amax(dim=1, keepdim=True)).all() or not per_channel


def test_a_preconditioned_step_moves_the_weights_as_sgd_on_them_does_at_any_scale() -> None:
    """At undecided gates of one plane: two gates, each moves the weight by lr·g, whatever s and β are."""
    layer = Layer("w", nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)).view(5, 10)))
    for scale, beta in ((0.3, 1.0), (3.0, 2.0)):
        plan = plan_for([layer], 1, Schedule(10, 10), planes=[1], momentum=0.0, weight_decay=0.0)
        settings = UniformGateSettings(gate_steps="preconditioned", beta_initial=beta, per_channel=False)
        method = UniformCSQ([layer], plan, settings)
        method.bit_planes.pos.zero_()
        method.bit_planes.neg.zero_()
        method.bit_planes.scale.fill_(scale)
        method.materialise(0)
        layer.parameter.grad = torch.linspace(-1e-3, 1e-3, 50).view(5, 10)
        before = layer.parameter.detach().clone()
        method.bit_planes.update_gates(beta, lr=0.1, momentum=0.0, weight_decay=0.0, gain=method._gain(beta))
        method.bit_planes.materialise(beta)
        moved = layer.parameter.detach() - before
        torch.testing.assert_close(moved, -2 * 0.1 * layer.parameter.grad, atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize(("from_scratch", "expected"), [(False, 1.0), (True, 4 / 20)])
def test_auto_logits_are_1_from_a_checkpoint_and_follow_the_schedule_from_scratch(
    from_scratch: bool, expected: float
) -> None:
    layers, _ = find_layers(nn.Linear(6, 5))
    plan = plan_for(layers, 2, Schedule(40, 10), weight_decay=0.0, from_scratch=from_scratch)
    method = BitLevelCSQ(layers, plan, CSQSettings(beta_final=20.0))
    assert method.logit == method.mask_logit == pytest.approx(expected)


def test_what_an_error_costs_is_the_mean_squared_gradient_of_a_weight_whatever_the_layer_s_size() -> None:
    _, method = made()
    for layer, root in zip(method.layers, (2.0, 0.5), strict=True):  # 108 and 96 weights
        layer.parameter.grad = torch.full_like(layer.parameter, root)
    method.collect(0, lr=0.0, lr_share=1.0)
    # the running mean takes a hundredth of 2² and of 0.5²
    torch.testing.assert_close(method._curvature(), torch.tensor([0.04, 0.0025]))


def test_a_soft_count_steers_by_the_planes_that_are_in_the_weights() -> None:
    _, method = made(precision_count="soft")
    logits = torch.linspace(-1, 1, 16).view(2, 8)
    method.bit_planes.mask_logits.copy_(logits)
    sizes = torch.tensor([108.0, 96.0], dtype=torch.float64)
    expected = (torch.sigmoid(3.0 * logits.double()).sum(dim=1) @ sizes) / sizes.sum() - 2
    assert float(method._gap(3.0)) == pytest.approx(float(expected), abs=1e-5)


def test_channels_have_scales_of_their_own_in_the_ratios_of_their_one_plane_steps() -> None:
    """W_c = s·r_c·q: the delivered scale of every channel over the layer's is that of the float weights' MSE steps."""
    torch.manual_seed(0)
    layer = Layer("w", nn.Parameter(torch.randn(6, 40) * torch.logspace(-2, 1, 6).view(6, 1)))
    steps = torch.cat([mse_step(row, 1, channel_dim=None) for row in layer.parameter.detach()]).double()
    plan = plan_for([layer], 2, Schedule(10, 10), planes=[2])
    method = UniformCSQ([layer], plan, UniformGateSettings())
    method.harden(9)
    (hard,) = method.hard_layers()
    assert hard.scale.shape == (6,)
    torch.testing.assert_close(hard.scale.double() / hard.scale[0], steps / steps[0], atol=0, rtol=1e-5)
    torch.testing.assert_close(hard.weight(), layer.parameter.detach(), atol=0, rtol=1e-6)


def test_gradients_reach_gates_of_channels_with_ratios_as_autograd_says() -> None:
    """Eq. 4 with W_c = s·r_c·Σ_b …, in float64, against one plain SGD step of the flat passes."""
    torch.manual_seed(1)
    layer, beta, lr = Layer("w", nn.Parameter(torch.randn(3, 4))), 2.0, 0.1
    ratios = torch.tensor([0.5, 1.0, 3.0])
    planes = BitPlanes([layer], bits=2, device=CPU, ratios=[ratios])
    planes.pos.normal_()
    planes.neg.normal_()
    planes.scale.fill_(0.7)
    planes.fix_mask(torch.tensor([[True, True]]))
    pos, neg = (logits.double().clone().requires_grad_() for logits in (planes.pos, planes.neg))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    digits = torch.sigmoid(beta * pos) - torch.sigmoid(beta * neg)
    weight = (scale / 3 * (digits[0] + 2 * digits[1])).view(3, 4) * ratios.double().view(3, 1)
    planes.materialise(beta)
    torch.testing.assert_close(layer.parameter.detach().double(), weight.detach(), atol=1e-6, rtol=1e-5)
    slope = torch.randn(3, 4, dtype=torch.float64)
    (weight * slope).sum().backward()
    layer.parameter.grad = slope.float()
    found = planes.update_gates(beta, lr=lr, momentum=0.0, weight_decay=0.0)
    assert pos.grad is not None
    assert neg.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(planes.pos.double(), pos.detach() - lr * pos.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(planes.neg.double(), neg.detach() - lr * neg.grad, atol=1e-6, rtol=1e-5)
    assert float(found.scale[0]) == pytest.approx(float(scale.grad), rel=1e-5)


def test_limited_gates_stay_within_reach_of_gradients_and_the_weights_where_they_are() -> None:
    """|βm| never exceeds the limit once planes are fixed, and with gradients of zero no weight drifts while β grows."""
    layer = Layer("w", nn.Parameter(torch.randn(5, 30, generator=torch.Generator().manual_seed(2))))
    plan = plan_for([layer], 2, Schedule(400, 100), planes=[2], weight_decay=0.0)
    method = UniformCSQ([layer], plan, UniformGateSettings(beta_final=200.0, gate_limit=4.0, harden_at=1.0))
    method.harden(0)  # decided integers to begin with: what is between levels would harden on the way
    start = method.hard_layers()
    on = UniformCSQ([layer], Plan(Schedule(400, 100), plan.budget, start=start, weight_decay=0.0), method.settings)
    before = layer.parameter.detach().clone()
    for step in range(399):
        layer.parameter.grad = torch.zeros_like(layer.parameter)
        on.collect(step, lr=0.1, lr_share=1.0)
        assert float(on.bit_planes.pos.abs().max()) * on.beta(step + 1) <= 4.0 + 1e-4
    on.materialise(399)
    torch.testing.assert_close(layer.parameter.detach(), before, atol=1e-4, rtol=1e-3)


def test_behind_unit_steps_the_trained_weights_are_those_delivered_and_gradients_pass_through_slopes() -> None:
    """The first step with unit steps has the scale of least squares; each later one moves logits by −3·lr·share·∂L/∂W·c·βσ′(βm)."""
    generator = torch.Generator().manual_seed(3)
    layer = Layer("w", nn.Parameter(torch.randn(5, 30, generator=generator)))
    plan = plan_for([layer], 2, Schedule(40, 10), planes=[2], weight_decay=0.0, momentum=0.0)
    finish = {"straight_through_at": 0.5, "straight_through_rate": 3.0, "harden_at": 1.0}
    settings = UniformGateSettings.model_validate({"gate_steps": "sgd", "per_channel": False} | finish)
    method = UniformCSQ([layer], plan, settings)
    planes, lr, share = method.bit_planes, 0.1, 0.5
    for step in range(30):
        layer.parameter.grad = torch.randn(5, 30, generator=generator) * (step != 19)
        soft, scale = layer.parameter.detach().clone(), float(planes.scale[0])
        before, beta = {"pos": planes.pos.double(), "neg": planes.neg.double()}, method.beta(step)
        method.collect(step, lr=lr, lr_share=share)
        method.materialise(step + 1)
        if step + 1 < 20:
            continue
        weight = layer.parameter.detach().double().flatten()
        integers = (weight / float(planes.scale[0]) * 3).round()
        torch.testing.assert_close(weight, integers * float(planes.scale[0]) / 3, atol=1e-6, rtol=1e-6)
        if step + 1 == 20:
            best = (soft.double().flatten() @ integers) / (integers @ integers)
            assert float(planes.scale[0]) / 3 == pytest.approx(float(best), rel=1e-5)
            continue
        assert method.beta(step + 1) == method.beta(20)
        assert float(planes.scale[0]) == scale
        for sign, name in ((1, "pos"), (-1, "neg")):
            gates = torch.sigmoid(beta * before[name])
            value = torch.tensor([[1.0], [2.0]]) * scale / 3
            gradient = sign * layer.parameter.grad.double().flatten() * value * beta * gates * (1 - gates)
            expected = (before[name] - 3 * lr * share * gradient).clamp(-2 / beta, 2 / beta)
            torch.testing.assert_close(getattr(planes, name).double(), expected, atol=1e-6, rtol=1e-5)
    trained = layer.parameter.detach().clone()
    method.harden(30)
    torch.testing.assert_close(method.hard_layers()[0].weight(), trained, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer.parameter.detach(), trained, atol=1e-6, rtol=1e-6)


def test_gates_begin_at_rest_behind_unit_steps() -> None:
    """What they were on the way to before has nothing to do with the slopes there: without a gradient nothing moves."""
    layer = Layer("w", nn.Parameter(torch.randn(5, 30, generator=torch.Generator().manual_seed(3))))
    plan = plan_for([layer], 2, Schedule(40, 10), planes=[2], weight_decay=0.0, momentum=0.9)
    method = UniformCSQ([layer], plan, UniformGateSettings(straight_through_at=0.5, harden_at=1.0))
    planes = method.bit_planes
    for step in range(20):
        layer.parameter.grad = torch.randn(5, 30, generator=torch.Generator().manual_seed(step))
        moved = planes.pos_momentum.count_nonzero() + planes.neg_momentum.count_nonzero()
        assert bool(moved) == (step > 0)
        method.collect(step, lr=1e-3, lr_share=1.0)
        method.materialise(step + 1)
    method.bit_planes.limit_logits(1 / method.beta(20))  # nothing that the limit behind unit steps would move
    before = planes.pos.clone(), planes.neg.clone()
    layer.parameter.grad = torch.zeros(5, 30)
    method.collect(20, lr=1e-3, lr_share=1.0)
    assert torch.equal(planes.pos, before[0])
    assert torch.equal(planes.neg, before[1])


def test_a_state_saved_behind_unit_steps_goes_on_the_same() -> None:
    def fresh() -> UniformCSQ:
        layer = Layer("w", nn.Parameter(torch.randn(5, 30, generator=torch.Generator().manual_seed(3))))
        plan = plan_for([layer], 2, Schedule(40, 10), planes=[2])
        return UniformCSQ([layer], plan, UniformGateSettings(straight_through_at=0.25))

    def go_on(method: UniformCSQ, first: int, end: int) -> Tensor:
        parameter = method.layers[0].parameter
        for step in range(first, end):
            parameter.grad = torch.randn(5, 30, generator=torch.Generator().manual_seed(step))
            method.collect(step, lr=0.1, lr_share=0.7)
            method.materialise(step + 1)
        return parameter.detach().clone()

    whole, again = fresh(), fresh()
    at_15 = go_on(whole, 0, 15)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    again.materialise(15)
    assert torch.equal(again.layers[0].parameter, at_15)
    end = go_on(whole, 15, 30)
    assert torch.equal(go_on(again, 15, 30), end)
    assert not torch.equal(end, at_15)


def test_delivered_layers_with_holes_in_their_masks_are_recreated_exactly() -> None:
    mask = torch.tensor([True, False, True])
    layer = Layer("w", nn.Parameter(torch.zeros(3, 3)))
    planes = BitPlanes([layer], bits=3, device=CPU, signed=False)
    planes.fix_mask(mask.view(1, 3))
    integers = torch.tensor([[-5, -4, -3], [-1, 0, 1], [3, 4, 5]])  # all that ±1 and ±4 form
    planes.set_integers(0, integers, torch.tensor(7.0), logit=1.0, beta=2.0)
    planes.materialise(2.0)
    torch.testing.assert_close(layer.parameter.detach(), integers.float(), atol=1e-5, rtol=1e-5)


def test_the_finetune_of_a_search_keeps_its_bit_logits_at_the_weights_that_were_delivered() -> None:
    model, search = made()
    train(search, model, range(20))
    search.harden(20)
    delivered = search.hard_layers()
    budget = search.plan.budget
    plan = Plan(Schedule(20, 10), budget, start=delivered, searched=search)
    on = BitLevelCSQ(search.layers, plan, search.settings)
    assert torch.equal(on.bit_planes.pos, search.bit_planes.pos)  # Algorithm 1; integers alone give ±logit
    assert torch.equal(on.bit_planes.neg, search.bit_planes.neg)
    assert on.bit_planes.pos_momentum.count_nonzero() == 0
    for layer, hard in zip(search.layers, delivered, strict=True):
        soft, wanted = layer.parameter.detach().double(), hard.weight().double()
        # the scale is the least-squares one at the temperature that starts again
        assert float((soft * (wanted - soft)).sum() / (soft * soft).sum()) == pytest.approx(0, abs=1e-5)
    train(on, model, range(20))
    on.harden(20)
    assert [layer.mask.tolist() for layer in on.hard_layers()] == [layer.mask.tolist() for layer in delivered]
