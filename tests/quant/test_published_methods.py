"""Published methods against their papers' equations, written here once more in float64 and sharing nothing with csqcli."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant.catalog import CARDS
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import Layer
from csqcli.quant.methods.base import Schedule, WeightMethod, plan_for

SCHEDULE = Schedule(total_steps=100, steps_per_epoch=10)
SHAPE = (6, 5, 3, 3)


def build(name: str, planes: int, *, weight: Tensor | None = None, **settings: Any) -> WeightMethod:
    """The method over one convolution of 6 filters; what searches planes itself starts from 8."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 0.1 if weight is None else weight
    layers = [Layer("conv.weight", nn.Parameter(weight.clone()))]
    given = [planes] if CARDS[name].takes == "planes" else None
    card = CARDS[name]
    return card.load()(layers, plan_for(layers, planes, SCHEDULE, planes=given), card.settings(**settings))


def step_gradient(method: WeightMethod, step: int = 0) -> Tensor:
    """Give the layer a gradient, let the method take it, and return it."""
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    method.layers[0].parameter.grad = gradient
    method.collect(step, lr=0.1, lr_share=1.0)
    return gradient


def latent_of(method: WeightMethod) -> Tensor:
    return method.latents[0].detach().double().requires_grad_()  # type: ignore[attr-defined]


def weight_of(method: WeightMethod) -> Tensor:
    return method.layers[0].parameter.detach().double()


class Round(torch.autograd.Function):
    """Rounding whose gradient is 1."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def check(method: WeightMethod, reference: Tensor, latent: Tensor) -> None:
    """The method's weights and latent gradients are the reference's, up to float32."""
    torch.testing.assert_close(weight_of(method), reference.detach(), rtol=1e-5, atol=1e-7)
    gradient = step_gradient(method)
    (reference * gradient.double()).sum().backward()
    torch.testing.assert_close(method.latents[0].grad.double(), latent.grad, rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]


def delivered(method: WeightMethod) -> HardLayer:
    method.harden(100)
    (layer,) = method.hard_layers()
    assert torch.equal(layer.weight(), method.layers[0].parameter), "hard weights are integers × scale"
    return layer


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_dorefa_is_equation_9_with_the_gradients_of_its_graph(k: int, rescale: bool) -> None:
    method = build("dorefa", k, rescale=rescale)
    latent = latent_of(method)
    x = torch.tanh(latent) / (2 * torch.tanh(latent).abs().max()) + 0.5
    levels = 2 * Round.apply((2**k - 1) * x) / (2**k - 1) - 1
    with torch.no_grad():
        scale = (latent * levels).sum() / (levels * levels).sum() if rescale else 1.0
    check(method, scale * levels, latent)
    layer = delivered(method)
    assert layer.planes == k
    assert set(layer.integers.unique().tolist()) <= set(range(1 - 2**k, 2**k, 2))  # 2^k odd integers


def test_dorefa_at_one_bit_is_equation_8() -> None:
    method = build("dorefa", 1)
    latent = latent_of(method)
    reference = torch.where(latent < 0, -1.0, 1.0).double() * latent.detach().abs().mean() + (latent - latent.detach())
    check(method, reference, latent)
    assert set(delivered(method).integers.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize(
    ("k", "c1", "c2"),
    [(2, 3.12, -2.064), (3, 7.509, -6.892), (4, 12.68, -12.80)],  # the paper's fitted coefficients
)
def test_sawb_clips_where_the_weights_statistics_say(k: int, c1: float, c2: float) -> None:
    method = build("pact", k, quantizer="sawb")
    latent = latent_of(method)
    w = latent.detach()
    alpha = c1 * (w * w).mean().sqrt() + c2 * w.abs().mean()
    assert 0 < alpha < 3 * w.std()
    x = latent.clamp(-alpha, alpha) / (2 * alpha) + 0.5
    check(method, alpha * (2 * Round.apply((2**k - 1) * x) / (2**k - 1) - 1), latent)
    assert len(delivered(method).integers.unique()) <= 2**k


def test_pact_takes_dorefas_weights_unless_told_otherwise_and_sawb_knows_its_planes() -> None:
    assert torch.equal(weight_of(build("pact", 3)), weight_of(build("dorefa", 3)))
    with pytest.raises(UserError, match=r"conv.weight: SAWB has coefficients for 2, 3, 4, 5, 8 planes, not for 1"):
        build("pact", 1, quantizer="sawb")


@pytest.mark.parametrize("threshold", [0.7, 0.4])
def test_twn_is_the_threshold_and_the_mean_beyond_it(threshold: float) -> None:
    method = build("twn", 1, threshold=threshold)
    latent = latent_of(method)
    w = latent.detach().numpy()
    beyond = np.abs(w) > threshold * np.abs(w).mean()
    values = torch.from_numpy(np.sign(w) * beyond * np.abs(w)[beyond].mean())
    check(method, values + (latent - latent.detach()), latent)
    assert set(delivered(method).integers.unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("gradient", ["paper", "straight-through"])
def test_xnor_has_a_scale_per_filter_and_the_papers_gradient(gradient: str) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))  # some beyond ±1
    method = build("xnor", 1, weight=weight, gradient=gradient)
    w = weight.double()
    alpha = torch.stack([w[i].abs().mean() for i in range(6)])
    expected = torch.stack([alpha[i] * torch.where(w[i] < 0, -1.0, 1.0).double() for i in range(6)])
    torch.testing.assert_close(weight_of(method), expected, rtol=1e-5, atol=1e-7)
    upstream = step_gradient(method).double()
    inside = (w.abs() <= 1).double()
    factor = 1 / 45 + alpha.view(6, 1, 1, 1) * inside if gradient == "paper" else inside  # 45 weights per filter
    torch.testing.assert_close(method.latents[0].grad.double(), upstream * factor, rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]
    layer = delivered(method)
    assert layer.scale.shape == (6,)
    assert set(layer.integers.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("bucket", ["layer", "channel"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_scaled_uniform_rounds_each_bucket_between_its_largest_magnitudes(k: int, bucket: str) -> None:
    method = build("scaled-uniform", k, bucket=bucket)
    latent = latent_of(method)
    largest = latent.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
    if bucket == "layer":
        largest = largest.max()
    share = latent / (2 * largest) + 0.5
    check(method, 2 * largest * (Round.apply((2**k - 1) * share) / (2**k - 1) - 0.5), latent)
    assert delivered(method).planes == k


@pytest.mark.parametrize("name", ["twn", "xnor"])
def test_methods_of_one_plane_refuse_more_before_anything_is_trained(name: str) -> None:
    with pytest.raises(UserError, match=rf"conv.weight: {name} is defined for 1 plane, not for 2; --target-bits 1"):
        build(name, 2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_parq_is_the_line_through_the_midpoints_cut_off_at_the_levels(k: int) -> None:
    method = build("parq", k, per_channel=False, anneal_end=0.8, steepness=10.0)
    latent, scale, top = latent_of(method).detach().numpy(), float(method.scales[0]), 2**k - 1  # type: ignore[attr-defined]
    for step in (4, 40, 76):
        share = step / 80
        s = [1 / (1 + np.exp(10 * (x - 0.5))) for x in (share, 0, 1)]
        inverse_slope = (s[0] - s[2]) / (s[1] - s[2])
        knots, values = [], []
        for level in range(-top, top):  # flat at a level, then a line of slope ρ around the midpoint
            for end in (-1, 1):
                knots.append((level + 0.5 + end * inverse_slope / 2) * scale)
                values.append((level + (end + 1) / 2) * scale)
        method.materialise(step)
        expected = torch.from_numpy(np.interp(latent, knots, values))
        torch.testing.assert_close(weight_of(method), expected, rtol=1e-4, atol=1e-5 * scale)
    method.materialise(80)
    nearest = torch.from_numpy(np.clip(np.round(latent / scale), -top, top) * scale)
    torch.testing.assert_close(weight_of(method), nearest, rtol=1e-6, atol=1e-8)
    assert delivered(method).planes == k


def test_parq_hands_the_gradient_at_the_weight_to_the_latent_and_anneals_between_its_shares() -> None:
    method = build("parq", 2, anneal_start=0.1, anneal_end=0.5, steepness=20.0)
    gradient = step_gradient(method)
    assert torch.equal(method.latents[0].grad, gradient)  # type: ignore[attr-defined]
    slopes = [method.inverse_slope(step) for step in (0, 9, 10, 30, 49, 50, 99)]  # type: ignore[attr-defined]
    assert slopes[:3] == [1, 1, 1]
    assert slopes[3] == pytest.approx(0.5)
    assert 0 < slopes[4] < 1e-3
    assert slopes[5:] == [0, 0]


def test_parqs_ternary_scale_is_the_least_squares_one() -> None:
    method = build("parq", 1, per_channel=False, step_factor=1.0)
    w = np.sort(np.abs(latent_of(method).detach().numpy().ravel()))[::-1]
    sums = np.cumsum(w)
    best = max(sums**2 / np.arange(1, len(w) + 1))  # what the best m largest weights at their mean explain
    hard = delivered(method).weight().double()
    explained = float((w**2).sum() - ((hard - latent_of(method).detach()) ** 2).sum())
    assert 0.999 * best <= explained <= best * (1 + 1e-6)


def test_parqs_step_factor_is_the_distance_of_its_levels() -> None:
    near, far = (build("parq", 2, step_factor=factor) for factor in (1.0, 1.25))
    torch.testing.assert_close(far.scales[0], 1.25 * near.scales[0])  # type: ignore[attr-defined]


def planes_of(integers: Tensor) -> Tensor:
    """[8, …] bits of magnitudes, by division."""
    return torch.stack([(integers.abs() // 2**b) % 2 for b in range(8)])


def test_bsq_starts_at_the_8_bit_model_and_its_gradients_are_those_of_rounding_and_the_lasso() -> None:
    method: Any = build("bsq", 3, strength=0.5)
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 0.1
    s = w.double().abs().max()
    torch.testing.assert_close(weight_of(method), torch.round(w.double() / s * 255) * s / 255, rtol=1e-5, atol=1e-7)
    rng = torch.Generator().manual_seed(5)
    for planes in (method.positive[0], method.negative[0]):
        planes.data.copy_(torch.rand(planes.shape, generator=rng) * 1.5)
    pos, neg = (p[0].detach().double().requires_grad_() for p in (method.positive, method.negative))
    powers = 2.0 ** torch.arange(8, dtype=torch.float64).view(8, 1, 1, 1, 1)
    value = s / 255 * Round.apply(((pos - neg) * powers).sum(0)).clamp(-255, 255)  # Eq. 2 and 3
    method.materialise(0)
    torch.testing.assert_close(weight_of(method), value.detach(), rtol=1e-5, atol=1e-6)
    gradient = step_gradient(method).double()
    value = s / 255 * Round.apply(((pos - neg) * powers).sum(0))
    lasso = sum(torch.sqrt((pos[b] ** 2 + neg[b] ** 2).sum()) for b in range(8))
    ((value * gradient).sum() + 0.5 * 1.0 * 8 * lasso).backward()  # one layer has all weights, at 8 bits
    torch.testing.assert_close(method.positive[0].grad.double(), pos.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.negative[0].grad.double(), neg.grad, rtol=1e-4, atol=1e-6)


def test_bsq_requantizes_without_moving_a_weight_and_drops_empty_planes() -> None:
    method: Any = build("bsq", 3, requantize_share=0.1, search_share=1.0)
    integers = torch.randint(-15, 16, SHAPE, generator=torch.Generator().manual_seed(6)) * 4  # planes 2 to 5
    method.positive[0].data.copy_(planes_of(integers) * (integers > 0))
    method.negative[0].data.copy_(planes_of(integers) * (integers < 0))
    method.positive[0].data[1] += 0.1  # too little to reach a further integer
    method.positive[0].data[0] += 0.2
    method.materialise(9)
    before = weight_of(method)
    method.materialise(10)
    assert method.active[0].tolist() == [False, False, True, True, True, True, False, False]
    assert torch.equal(weight_of(method), before)
    torch.testing.assert_close(method.positive[0].detach(), (planes_of(integers) * (integers > 0)).float())
    method.materialise(10)  # a resumed run does it twice
    assert torch.equal(weight_of(method), before)


def test_bsq_keeps_the_planes_that_lose_least_where_the_budget_is_not_met() -> None:
    method: Any = build("bsq", 3, search_share=0.5)
    method.materialise(50)
    assert method.active[0].tolist() == [False] * 5 + [True] * 3
    layer = delivered(method)
    assert (layer.planes, int(layer.integers.abs().max())) == (3, 7)
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 0.1
    truncated = torch.round(w / w.abs().max() * 7) * w.abs().max() / 7
    assert (layer.weight() - w).square().sum() < (truncated - w).square().sum()


@pytest.mark.parametrize("width", [1, 2])
def test_msq_pulls_weights_to_the_nearest_number_without_their_lowest_bits(width: int) -> None:
    method: Any = build("msq", 2, strength=0.3)
    method.widths = [width]
    latent = latent_of(method)
    u = torch.tanh(latent).abs() / torch.tanh(latent).abs().max()

    def round_clamp(u: Tensor, n: int) -> Tensor:
        return Round.apply(2**n * u).clamp(max=2**n - 1)

    levels = latent.detach().sign() * (2**8 * u.detach()).round().clamp(max=255) / 255
    scale = (latent.detach() * levels).sum() / (levels * levels).sum()
    torch.testing.assert_close(weight_of(method), scale * levels, rtol=1e-5, atol=1e-7)
    gradient = step_gradient(method).double()
    passed = scale * latent.detach().sign() * u  # rounding and the factor 256/255 pass gradients unchanged
    lowest = u - (round_clamp(u, 8 - width) / 2 ** (8 - width)).detach()  # B
    ((passed * gradient).sum() + 0.3 * lowest.abs().sum()).backward()
    torch.testing.assert_close(method.latents[0].grad.double(), latent.grad, rtol=1e-4, atol=1e-6)


def test_msq_drops_bits_that_few_weights_use_and_two_at_a_time_where_the_layer_is_insensitive() -> None:
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 0.1
    layers = [Layer(f"{i}.weight", nn.Parameter(weights.clone())) for i in range(2)]
    card = CARDS["msq"]
    method: Any = card.load()(layers, plan_for(layers, 2, SCHEDULE), card.settings(threshold=0.6, prune_share=0.1))
    layers[0].parameter.grad, layers[1].parameter.grad = torch.full(SHAPE, 1e-3), torch.full(SHAPE, 1.0)
    for step in range(9):
        method.collect(step, lr=0.1, lr_share=1.0)
    assert method.planes == [8, 8]
    method.collect(9, lr=0.1, lr_share=1.0)  # about half of the lowest bits are zero, which is below the threshold
    assert (method.planes, method.widths) == ([7, 7], [2, 1])
    for step in range(10, 20):
        method.collect(step, lr=0.1, lr_share=1.0)
    assert method.planes == [7, 6]  # three quarters of the first layer's weights have one of two bits
    method.harden(100)
    hard = method.hard_layers()
    assert sum(layer.planes for layer in hard) <= 4
    assert hard[0].planes <= hard[1].planes
    for layer, of in zip(hard, layers, strict=True):
        assert torch.equal(layer.weight(), of.parameter)
        assert int(layer.integers.abs().max()) == 2**layer.planes - 1


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.trains and name != "float"])
def test_a_card_says_whether_zero_is_a_level(name: str) -> None:
    k = min(2, CARDS[name].max_planes)
    levels = delivered(build(name, k)).integers.unique()
    assert len(levels) == (2 ** (k + 1) - 1 if CARDS[name].has_zero else 2**k)
    assert (0 in levels) == CARDS[name].has_zero


@pytest.mark.parametrize("name", ["parq", "dorefa", "pact", "lq-nets", "bsq", "msq", "twn", "xnor", "scaled-uniform"])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_layer_of_one_value_is_delivered_finite(name: str, value: float) -> None:
    method = build(name, 1, weight=torch.full(SHAPE, value))
    layer = delivered(method)
    assert bool((layer.scale > 0).all())
    assert layer.weight().isfinite().all()
    step_gradient(method)
    assert all(p.grad.isfinite().all() for group in method.parameter_groups() for p in group["params"])


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.trains and name != "float"])
def test_where_a_channel_is_one_weight_all_have_the_same_scale(name: str) -> None:
    lone = build(name, 1, weight=torch.randn((6, 1, 1, 1), generator=torch.Generator().manual_seed(5)))
    assert delivered(lone).scale.unique().numel() == 1
