"""LQ-Nets against its paper's equations, written here in NumPy float64: every code tried, `lstsq` for the basis."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import csqcli
from csqcli.errors import UserError
from csqcli.models.networks import digits_cnn
from csqcli.quant.basis import level_values, nearest, values_of
from csqcli.quant.catalog import CARDS
from csqcli.quant.hard_layer import HardLayer, top_planes
from csqcli.quant.layers import Layer
from csqcli.quant.methods.base import Schedule, plan_for

SCHEDULE = Schedule(total_steps=100, steps_per_epoch=10)


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1


def build(
    weight: Tensor, planes: int, *, channel_dim: int = 0, plan: dict[str, Any] | None = None, **settings: Any
) -> Any:
    layers = [Layer("conv.weight", nn.Parameter(weight.clone()), channel_dim)]
    card = CARDS["lq-nets"]
    return card.load()(
        layers, plan_for(layers, planes, SCHEDULE, **(plan or {"planes": [planes]})), card.settings(**settings)
    )


def qem(w: np.ndarray, v: np.ndarray, iterations: int) -> np.ndarray:
    """Algorithm 1 on one filter: of all 2^k codes the nearest level's, then the least-squares basis."""
    codes = np.array(list(itertools.product([-1.0, 1.0], repeat=len(v))))
    for _ in range(iterations):
        chosen = codes[np.abs(w[:, None] - codes @ v).argmin(axis=1)]
        v = np.linalg.lstsq(chosen, w, rcond=None)[0]
    return v


def nearest_values(w: np.ndarray, v: np.ndarray) -> np.ndarray:
    levels = np.array([np.dot(code, v) for code in itertools.product([-1.0, 1.0], repeat=len(v))])
    return levels[np.abs(w[:, None] - levels).argmin(axis=1)]


def start(w: np.ndarray, k: int) -> np.ndarray:
    return 2.0 ** np.arange(1 - k, 1) * 0.6745 * np.sqrt((w * w).mean())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_weights_lie_on_the_levels_that_qem_finds_for_each_filter(k: int) -> None:
    weight = weights(6, 5, 3, 3)
    method = build(weight, k)
    for filter_, own in zip(weight.double().numpy(), method.layers[0].parameter.detach().double().numpy(), strict=True):
        v = qem(filter_.ravel(), start(filter_.ravel(), k), 20)
        np.testing.assert_allclose(own.ravel(), nearest_values(filter_.ravel(), v), rtol=1e-4, atol=1e-6)


def test_one_plane_is_the_mean_magnitude_with_its_sign() -> None:
    weight = weights(4, 30)
    method = build(weight, 1)
    torch.testing.assert_close(method.bases[0][0], weight.abs().mean(dim=1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("per_channel", "iterations"), [(True, 1), (False, 3)])
def test_a_step_moves_the_basis_by_a_tenth_of_the_way_to_the_fitted_one_and_passes_gradients_unchanged(
    per_channel: bool, iterations: int
) -> None:
    method = build(weights(6, 5, 3, 3), 2, per_channel=per_channel, iterations=iterations, decay=0.9)
    moved = method.latents[0].data.mul_(1.3).add_(0.01)
    before = method.bases[0].double().numpy()
    gradient = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(4))
    method.layers[0].parameter.grad = gradient
    method.collect(0, lr=0.1, lr_share=1.0)
    assert torch.equal(method.latents[0].grad, gradient)
    rows = moved.double().numpy().reshape(6 if per_channel else 1, -1)
    for index, row in enumerate(rows):
        expected = 0.9 * before[:, index] + 0.1 * qem(row, before[:, index], iterations)
        np.testing.assert_allclose(method.bases[0][:, index].double().numpy(), expected, rtol=1e-4)


def test_the_fitted_levels_are_nearer_than_even_ones_at_their_best_scale() -> None:
    weight = weights(1, 4000) ** 3  # heavy tails
    method = build(weight, 3)
    own = float((method.layers[0].parameter.detach() - weight).square().sum())
    even = np.arange(-7, 8, 2)
    w = weight.double().numpy().ravel()
    best = min(
        ((nearest_values_of(w, even * s) - w) ** 2).sum() for s in np.linspace(0.001, 0.2, 400) * np.abs(w).max()
    )
    assert own < 0.8 * best


def nearest_values_of(w: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.abs(w[:, None] - levels).argmin(axis=1)]


@pytest.mark.parametrize("channel_dim", [0, 1])
def test_what_is_delivered_is_odd_integers_and_the_basis_that_give_the_weights_bit_for_bit(channel_dim: int) -> None:
    method = build(weights(3, 4, 5), 3, channel_dim=channel_dim)
    method.harden(100)
    (layer,) = method.hard_layers()
    assert (layer.planes, layer.stored_bits, layer.scale.tolist()) == (3, 3, [1.0])
    assert torch.equal(layer.weight(), method.layers[0].parameter)
    assert layer.basis.shape == (3, (3, 4)[channel_dim])
    basis = layer.basis.numpy()
    for place in np.ndindex(3, 4, 5):
        q, v = int(layer.integers[place]), basis[:, place[channel_dim]]
        assert q in range(-7, 8, 2)
        code = [1 if (q + 7) // 2 >> j & 1 else -1 for j in range(3)]
        assert sum(b * 2**j for j, b in enumerate(code)) == q
        value = np.float32(code[0]) * v[0]
        for b, x in zip(code[1:], v[1:], strict=True):
            value = np.float32(value + np.float32(b) * x)  # rounded at each term
        assert value == layer.weight()[place].item()


def test_weights_on_levels_that_coincide_have_one_integer() -> None:
    basis = torch.tensor([[0.5], [0.5], [0.0]])  # 8 integers, 3 levels
    values = level_values(basis).flatten()
    assert values.tolist() == [-1, 0, 0, 1, -1, 0, 0, 1]
    integers = nearest(values.reshape(2, 4), basis, 0)
    assert integers.tolist() == [[-7, -5, -5, -1], [-7, -5, -5, -1]]
    assert torch.equal(values_of(integers, basis, 0), values.reshape(2, 4))


def test_a_finetune_starts_on_the_delivered_levels_and_refuses_integers_times_scale() -> None:
    method = build(weights(6, 5, 3, 3), 2)
    method.harden(100)
    (hard,) = method.hard_layers()
    again = build(hard.weight(), 2, plan={"start": [hard]})
    assert torch.equal(again.layers[0].parameter, hard.weight())
    assert again.planes == [2]
    plain = HardLayer("conv.weight", hard.integers, torch.ones(1), top_planes(2, 8))
    with pytest.raises(
        UserError, match=r"conv.weight: holds integers × scale, and lq-nets trains a basis; finetune it"
    ):
        build(hard.weight(), 2, plan={"start": [plain]})


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_finetune_keeps_the_files_kind_of_basis_whatever_its_settings_say(per_channel: bool) -> None:
    method = build(weights(6, 5, 3, 3), 2, per_channel=per_channel)
    method.harden(100)
    (hard,) = method.hard_layers()
    again = build(hard.weight(), 2, plan={"start": [hard]}, per_channel=not per_channel)
    again.layers[0].parameter.grad = torch.ones(6, 5, 3, 3)
    again.collect(1, lr=0.01, lr_share=1.0)
    assert again.bases[0].shape == hard.basis.shape == (2, 6 if per_channel else 1)


def test_in_somebodys_own_loop_an_average_is_saved_at_the_nearest_levels_of_the_basis(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = digits_cnn()
    optimizer = csqcli.CSQ(model, target_bits=2, total_steps=6, method="lq-nets")
    average = AveragedModel(model)
    for _ in range(6):
        nn.functional.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.randint(0, 10, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    saved = {"source": "csq:digits_cnn", "num_classes": 10}
    csqcli.save(average, optimizer, tmp_path / "average.safetensors", **saved)
    loaded = csqcli.load(tmp_path / "average.safetensors").state_dict()
    averaged = average.module.state_dict()
    for layer in optimizer.hard_layers():
        assert torch.equal(layer.weight(), model.state_dict()[layer.name])
        assert layer.basis is not None
        for channel, (own, wanted) in enumerate(zip(loaded[layer.name], averaged[layer.name], strict=True)):
            levels = np.array(
                [np.dot(code, layer.basis[:, channel].numpy()) for code in itertools.product([-1, 1], repeat=2)]
            )
            expected = nearest_values_of(wanted.numpy().ravel(), levels)
            np.testing.assert_allclose(own.numpy().ravel(), expected, rtol=1e-4, atol=1e-6)
