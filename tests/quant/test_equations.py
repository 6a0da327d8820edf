"""Every equation, and every closed-form gradient, against the float64 autograd reference."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from csqcli.quant import equations
from csqcli.quant.layers import Layer, find_layers
from csqcli.quant.method_settings import PAPER, CSQSettings
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.csq import BitLevelCSQ, max_abs_scale
from csqcli.quant.passes.bitplanes import BitPlanes
from csqcli.quant.passes.rounding import levels_of, nearest_level

SHAPES = ((3, 2, 3, 3), (5, 4))


def random_planes(bits: int, seed: int) -> tuple[BitPlanes, list[Layer]]:
    """Two layers with random logits; the second exercises a slice that does not start at 0."""
    rng = torch.Generator().manual_seed(seed)
    layers = [Layer(f"w{i}", nn.Parameter(torch.randn(*shape, generator=rng))) for i, shape in enumerate(SHAPES)]
    planes = BitPlanes(layers, bits=bits, device=torch.device("cpu"))
    for tensor in (planes.pos, planes.neg, planes.mask_logits):
        tensor.copy_(torch.randn(tensor.shape, generator=rng) / 2)
    planes.scale.copy_(torch.rand(2, generator=rng) + 0.5)
    return planes, layers


def reference_leaves(planes: BitPlanes, layers: list[Layer]) -> list[dict[str, torch.Tensor]]:
    leaves = []
    for index, layer in enumerate(layers):
        where = planes.slices[index]
        shape = (*layer.parameter.shape, planes.bits)
        leaves.append(
            {
                "m_p": planes.pos[:, where].T.reshape(shape).double().requires_grad_(),
                "m_n": planes.neg[:, where].T.reshape(shape).double().requires_grad_(),
                "m_b": planes.mask_logits[index].double().requires_grad_(),
                "s": planes.scale[index : index + 1].double().requires_grad_(),
            }
        )
    return leaves


@pytest.mark.parametrize("beta", [1.0, 7.5, 60.0])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_materialised_weight_is_eq_5(beta: float, bits: int) -> None:
    planes, layers = random_planes(bits, seed=bits)
    planes.materialise(beta)
    for layer, leaf in zip(layers, reference_leaves(planes, layers), strict=True):
        expected = reference.weight(leaf["m_p"], leaf["m_n"], torch.sigmoid(beta * leaf["m_b"]), leaf["s"], beta)
        torch.testing.assert_close(layer.parameter.double(), expected, atol=1e-6, rtol=1e-5)
        pos, neg = (leaf[name].detach().movedim(-1, 0) for name in ("m_p", "m_n"))
        plain = equations.soft_weight(
            pos, neg, equations.gate(leaf["m_b"].detach(), beta), leaf["s"].detach(), beta=beta
        )
        torch.testing.assert_close(plain, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("beta", [1.0, 5.0, 40.0])
@pytest.mark.parametrize("fixed_mask", [False, True], ids=["eq5", "eq4"])
def test_gate_gradients_are_those_of_autograd(beta: float, fixed_mask: bool) -> None:
    planes, layers = random_planes(6, seed=3)
    if fixed_mask:
        planes.fix_mask(planes.mask_logits >= 0)
    leaves = reference_leaves(planes, layers)
    loss = torch.zeros((), dtype=torch.float64)
    rng = torch.Generator().manual_seed(9)
    for index, (layer, leaf) in enumerate(zip(layers, leaves, strict=True)):
        mask = planes.fixed_mask[index].double() if fixed_mask else torch.sigmoid(beta * leaf["m_b"])
        upstream = torch.randn(layer.parameter.shape, generator=rng)
        layer.parameter.grad = upstream
        loss = loss + (upstream * reference.weight(leaf["m_p"], leaf["m_n"], mask, leaf["s"], beta)).sum()
    loss.backward()
    gradients = planes.update_gates(beta, lr=1.0, momentum=0.0, weight_decay=0.0)
    for index, leaf in enumerate(leaves):
        where = planes.slices[index]
        for velocity, name in ((planes.pos_momentum, "m_p"), (planes.neg_momentum, "m_n")):  # momentum 0: the gradient
            expected = leaf[name].grad.reshape(-1, planes.bits).T
            torch.testing.assert_close(velocity[:, where].double(), expected, atol=5e-6, rtol=1e-4)
        torch.testing.assert_close(gradients.scale[index].double(), leaf["s"].grad[0], atol=1e-5, rtol=1e-4)
        if not fixed_mask:
            slope = equations.gate_slope(equations.gate(planes.mask_logits[index].double(), beta), beta)
            torch.testing.assert_close(gradients.mask[index].double() * slope, leaf["m_b"].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("step", [0, 5, 9])
def test_one_method_step_is_sgd_on_eq_7(step: int) -> None:
    """A whole update (gates, masks, scales, regulariser, momentum, weight decay) equals torch.optim.SGD on autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(12, 4, bias=False))
    layers, _ = find_layers(model)
    settings = CSQSettings(
        **PAPER | {"reg_strength": 0.3, "beta_schedule": "step", "beta_final": 50.0, "logit": 1.0, "mask_logit": 1.0}
    )
    method = BitLevelCSQ(layers, plan_for(layers, 2.0, Schedule(10, 10), bits=5), settings)
    planes = method.bit_planes
    planes.mask_logits.copy_(torch.randn(planes.mask_logits.shape))
    beta = equations.temperature(step / 9, final=50.0)
    leaves = reference_leaves(planes, layers)
    method.materialise(step)
    x = torch.randn(6, 2, 4, 4)
    (model(x) ** 2).mean().backward()
    method.collect(step, lr=0.2, lr_share=1.0)

    conv, linear = (
        reference.weight(leaf["m_p"], leaf["m_n"], torch.sigmoid(beta * leaf["m_b"]), leaf["s"], beta)
        for leaf in leaves
    )
    out = nn.functional.conv2d(x.double(), conv).flatten(1) @ linear.T
    masks = [leaf["m_b"] for leaf in leaves]
    gap = reference.mean_precision(masks, [layer.weights for layer in layers]) - 2.0
    ((out**2).mean() + 0.3 * gap * reference.regulariser(masks, beta)).backward()
    torch.optim.SGD([t for leaf in leaves for t in leaf.values()], lr=0.2, momentum=0.9, weight_decay=5e-4).step()
    for index, leaf in enumerate(leaves):
        where = planes.slices[index]
        expected = leaf["m_p"].detach().reshape(-1, 5).T
        torch.testing.assert_close(planes.pos[:, where].double(), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(planes.mask_logits[index].double(), leaf["m_b"].detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(planes.scale[index : index + 1].double(), leaf["s"].detach(), atol=1e-6, rtol=1e-5)


def test_temperature_starts_at_beta_0_and_reaches_beta_max_in_the_last_epoch() -> None:
    schedule = Schedule(total_steps=40, steps_per_epoch=4)
    betas = [equations.temperature(schedule.progress(step, per_epoch=True)) for step in range(40)]
    assert betas[:4] == [1.0] * 4
    assert betas[-4:] == [200.0] * 4
    assert betas[20] == pytest.approx(200 ** (5 / 9))  # the sixth of ten epochs


@given(st.integers(1, 8), st.floats(0.05, 2.0), st.floats(0.5, 50.0), st.integers(0, 2**32 - 1))
def test_initial_soft_weight_is_the_quantized_weight(bits: int, logit: float, beta: float, seed: int) -> None:
    """Golden rule of the initialisation: step 0 equals the n-bit quantized model."""
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    layer = Layer("w", nn.Parameter(weight.clone()))
    scale = max_abs_scale(weight)
    planes = BitPlanes([layer], bits=bits, device=torch.device("cpu"))
    planes.initialise(logit=logit, mask_logit=1.0, beta=beta, scales=[scale])
    planes.materialise(beta)
    top = 2**bits - 1
    quantized = (weight.double() / scale.double() * top).round() * scale.double() / top
    near_tie = ((weight.double() / scale.double() * top).frac().abs() - 0.5).abs() < 1e-4
    torch.testing.assert_close(layer.parameter.double()[~near_tie], quantized[~near_tie], atol=1e-5, rtol=1e-4)


def test_refitting_the_scale_keeps_the_weights_while_beta_moves() -> None:
    weight = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    layer = Layer("w", nn.Parameter(weight))
    planes = BitPlanes([layer], bits=8, device=torch.device("cpu"))
    planes.initialise(logit=0.3, mask_logit=1.0, beta=1.0, scales=[max_abs_scale(weight)])
    planes.materialise(1.0)
    before = layer.parameter.detach().clone()
    planes.refit_scale(1.0, 40.0)
    planes.materialise(40.0)
    torch.testing.assert_close(layer.parameter.detach(), before, atol=1e-5, rtol=1e-4)


def test_levels_of_a_mask_with_holes() -> None:
    # planes 0 and 2: digits in {−1, 0, 1} give ±1, ±4 and their sums
    assert levels_of(torch.tensor([True, False, True])).tolist() == [-5, -4, -3, -1, 0, 1, 3, 4, 5]


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_nearest_level_is_no_farther_than_any_other(mask: list[bool], seed: int) -> None:
    levels = levels_of(torch.tensor(mask))
    values = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 200
    chosen = nearest_level(values, levels)
    distance = (values[:, None] - levels[None]).abs().min(dim=1).values
    torch.testing.assert_close((values - chosen).abs(), distance)


def test_mask_strings_print_the_most_significant_plane_first() -> None:
    mask = torch.tensor([False, False, True, True, False, True])
    assert equations.mask_string(mask) == "101100"
    assert equations.mask_from_string("101100").tolist() == mask.tolist()


def test_threshold_hardening_is_the_unit_step_of_every_gate() -> None:
    planes, layers = random_planes(4, seed=1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    hard = planes.threshold_integers(mask)
    expected = sum(
        ((planes.pos[b, planes.slices[0]] >= 0).int() - (planes.neg[b, planes.slices[0]] >= 0).int()) * 2**b
        for b in range(4)
    )
    assert torch.equal(hard[0].flatten(), expected)
    assert math.prod(hard[0].shape) == layers[0].weights
