"""Rounding by second moments, against float64 and brute force in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli.quant import second_order
from csqcli.quant.layer_inputs import ExecutionOrder, LayerInputs, allow_early_stop
from csqcli.quant.layers import find_layers
from csqcli.quant.passes.rounding import mse_step, quantize


def problem(groups: int, rows: int, columns: int, planes: int, seed: int) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Weights, damped moments, the scales that fit the weights, and the float64 inputs that the moments are those of."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(groups, columns, columns)) / columns**0.5
    inputs = mix @ rng.normal(size=(groups, columns, 4 * columns)) + rng.normal(size=(groups, columns, 1))
    weight = torch.tensor(rng.normal(size=(groups, rows, columns)), dtype=torch.float32)
    damping = 0.01 * np.einsum("gcn,gcn->g", inputs, inputs) / columns
    root = np.sqrt(damping)[:, None, None] * np.eye(columns)  # damping is further inputs
    inputs = np.concatenate([inputs, root], axis=2)
    moment = torch.tensor(inputs @ inputs.transpose(0, 2, 1), dtype=torch.float32)
    scale = mse_step(weight.flatten(0, 1), planes, channel_dim=0).view(groups, rows, 1)
    return weight, moment, scale, inputs


def errors(weight: Tensor, integers: Tensor, scale: Tensor, inputs: np.ndarray) -> np.ndarray:
    """‖(w − sq) X‖² in float64, [groups, rows]."""
    off = weight.double().numpy() - scale.double().numpy() * integers.double().numpy()
    return np.square(off @ inputs).sum(axis=2)


@pytest.mark.parametrize(
    ("groups", "rows", "columns", "planes"),
    [(1, 24, 90, 2), (1, 8, 130, 1), (7, 1, 9, 2), (5, 1, 25, 3), (3, 4, 12, 4)],
)
def test_no_row_is_worse_than_its_nearest_rounding_and_all_are_much_better(
    groups: int, rows: int, columns: int, planes: int
) -> None:
    for seed in range(3):
        weight, moment, scale, inputs = problem(groups, rows, columns, planes, seed)
        integers, fitted = second_order.fit(weight, moment, scale, planes=planes)
        nearest = errors(weight, quantize(weight, scale, planes), scale, inputs)
        found = errors(weight, integers, fitted, inputs)
        assert (found <= nearest * (1 + 1e-4)).all()
        assert found.sum() < 0.7 * nearest.sum()
        assert integers.abs().max() <= 2**planes - 1
        assert torch.equal(integers, integers.round())
        assert (fitted > 0).all()


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_small_filters_reach_what_brute_force_over_both_neighbours_finds(planes: int) -> None:
    weight, moment, scale, inputs = problem(4, 2, 6, planes, seed=planes)
    integers, fitted = second_order.fit(weight, moment, scale, planes=planes)
    found, top = errors(weight, integers, fitted, inputs), 2**planes - 1
    at_scale = errors(weight, second_order.neighbours(weight, moment, scale, top), scale, inputs)
    for group, row in itertools.product(range(4), range(2)):
        w, s = weight[group, row].double().numpy(), float(scale[group, row])
        below = np.floor(w / s)
        tries = [np.clip(below + up, -top, top) for up in itertools.product((0, 1), repeat=6)]  # 2^6
        least = min(np.square((w - s * q) @ inputs[group]).sum() for q in tries)
        assert at_scale[group, row] == pytest.approx(least, rel=1e-4)
        assert found[group, row] <= least * (1 + 1e-4)


def test_with_uncorrelated_inputs_of_one_size_rounding_is_to_the_nearest() -> None:
    weight = torch.tensor([[[0.26, -0.74, 1.1, -3.4]]])
    moment, scale = torch.eye(4).unsqueeze(0), torch.full((1, 1, 1), 0.5)
    expected = [[[1.0, -1.0, 2.0, -3.0]]]  # 0.52, −1.48, 2.2 and −6.8, which is beyond 3 at two planes
    assert second_order.spread_errors(weight, moment, scale, 3).tolist() == expected
    assert second_order.descend(weight, moment, scale, torch.zeros(1, 1, 4), top=3, sweeps=3).tolist() == expected


@pytest.mark.parametrize("columns", [5, 140])  # within one block, and over two
def test_errors_go_to_the_columns_still_free_from_the_largest_moment_to_the_smallest(columns: int) -> None:
    """Against the definition: after each column the ones still free are solved for anew, by least squares."""
    rng = np.random.default_rng(columns)
    inputs = rng.normal(size=(columns, 4 * columns)) * rng.uniform(0.5, 2.0, size=(columns, 1))
    inputs += 0.5 * rng.normal(size=(1, 4 * columns))
    moment, scale, top = inputs @ inputs.T / inputs.shape[1], 0.4, 3
    weight = rng.normal(size=(3, columns))
    wanted = np.zeros_like(weight)
    for row, integers in zip(weight, wanted, strict=True):
        current, free = row.copy(), list(np.argsort(-np.diag(moment)))
        while free:
            column = free.pop(0)
            integers[column] = np.clip(np.round(current[column] / scale), -top, top)
            error = current[column] - integers[column] * scale
            if free:
                current[free] += (
                    error * np.linalg.solve(moment[np.ix_(free, free)], moment[np.ix_(free, [column])])[:, 0]
                )
    found = second_order.spread_errors(
        torch.tensor(weight)[None], torch.tensor(moment)[None], torch.full((1, 3, 1), scale).double(), top
    )
    assert np.mean(found[0].numpy() == wanted) > 0.99  # a value on the edge between two may fall to either side


def test_a_moved_input_is_followed_as_least_squares_do() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(1, 8, 200))
    after = before + 0.3 * rng.normal(size=before.shape)
    weight = rng.normal(size=(1, 3, 8))
    wanted = np.linalg.lstsq(after[0].T, (weight[0] @ before[0]).T, rcond=None)[0].T
    moment = torch.tensor(after @ after.transpose(0, 2, 1)).float()
    cross = torch.tensor((before - after) @ after.transpose(0, 2, 1)).float()
    found = second_order.for_moved_inputs(torch.tensor(weight).float(), moment, cross)
    np.testing.assert_allclose(found[0].numpy(), wanted, atol=1e-4)


def moved(samples: int, columns: int, mix: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [columns, samples] as a float network's last layers give them, and moved: in part by a rule, in part by chance."""
    rng = np.random.default_rng(seed)
    before = np.maximum(mix @ rng.normal(size=(columns, samples)) + 0.3, 0)
    return before, 0.8 * before + 0.3 * before.std() * rng.normal(size=before.shape)


def mixed(columns: int, rng: np.random.Generator) -> np.ndarray:
    """How features come from as many independent causes, some of which matter more than others."""
    return 10 * rng.normal(size=(columns, columns)) / columns**0.5 * np.arange(1, columns + 1) ** -0.7


@pytest.mark.parametrize(("samples", "columns", "few"), [(128, 320, True), (4000, 40, False)])
def test_moved_inputs_are_followed_as_far_as_it_holds_on_inputs_not_seen(samples: int, columns: int, few: bool) -> None:
    rng = np.random.default_rng(1)
    mix, weight = mixed(columns, rng), rng.normal(size=(10, columns))
    before, after = moved(samples, columns, mix, seed=2)
    fresh, fresh_after = moved(20_000, columns, mix, seed=3)

    def fresh_error(found: Tensor) -> float:
        return float(np.square(weight @ fresh - found[0].double().numpy() @ fresh_after).mean())

    halves, w = [], torch.tensor(weight).float().unsqueeze(0)
    for part in (slice(None, samples // 2), slice(samples // 2, None)):
        x, xh = before[:, part], after[:, part]
        sums = (xh @ xh.T / x.shape[1], (x - xh) @ xh.T / x.shape[1])
        halves.append(tuple(torch.tensor(value).float().unsqueeze(0) for value in sums))
    second, cross = ((one + other) / 2 for one, other in zip(*halves, strict=True))

    def followed(share: float) -> Tensor:
        return second_order.for_moved_inputs(w, second_order.damped(second, share), cross)

    share = second_order.held_out_damping(w, halves, 0.01)
    assert share is not None
    assert fresh_error(followed(share)) < 0.9 * fresh_error(w)
    if few:
        assert share > 0.01
        assert fresh_error(followed(0.01)) > fresh_error(w)  # what was done before
    else:
        assert share == 0.01


def test_roundings_of_few_inputs_are_damped_so_that_they_hold_on_inputs_not_seen() -> None:
    """Fewer inputs (100) than weights in a filter (240); 20,000 others, NumPy in float64."""
    rng = np.random.default_rng(7)
    mix, weight = mixed(240, rng), torch.tensor(rng.normal(size=(1, 10, 240))).float()
    inputs, fresh = (np.maximum(mix @ rng.normal(size=(240, count)) + 0.3, 0) for count in (100, 20_000))
    halves = [torch.tensor(part @ part.T / 50).float().unsqueeze(0) for part in (inputs[:, :50], inputs[:, 50:])]
    scale = mse_step(weight[0], 2, channel_dim=0).view(1, 10, 1)
    share = second_order.held_out_rounding(weight, halves, scale, planes=2, share=0.01)
    found = {}
    for damping in (0.01, share):
        moment = second_order.damped((halves[0] + halves[1]) / 2, damping)
        integers, fitted = second_order.fit(weight, moment, scale, planes=2)
        found[damping] = errors(weight, integers, fitted, fresh[None]).sum()
    nearest = errors(weight, quantize(weight, scale, 2), scale, fresh[None]).sum()
    assert share > 0.01
    assert found[share] < found[0.01]
    assert found[share] < nearest


def test_inputs_that_moved_by_chance_alone_are_not_followed() -> None:
    rng = np.random.default_rng(4)
    inputs = rng.normal(size=(60, 90))
    moves = rng.normal(size=(60, 90))  # x − x̂ that has nothing to do with x̂
    halves = []
    for part in (slice(None, 45), slice(45, None)):
        xh, d = inputs[:, part], moves[:, part]
        halves.append(tuple(torch.tensor(value / 45).float().unsqueeze(0) for value in (xh @ xh.T, d @ xh.T)))
    assert second_order.held_out_damping(torch.ones(1, 4, 60), halves, 0.01) is None


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 5)),
        (nn.Conv2d(4, 8, (3, 1), stride=(2, 1), dilation=(2, 1), groups=2, bias=False), (3, 4, 9, 5)),
        (nn.Conv2d(6, 6, 5, padding="same", groups=6), (2, 6, 8, 8)),
        (nn.Conv2d(5, 3, 1, stride=2), (2, 5, 6, 6)),
        (nn.Conv1d(4, 6, 3, padding=2, stride=2), (3, 4, 11)),
        (nn.Linear(7, 3), (4, 7)),
        (nn.Linear(7, 3), (2, 5, 7)),
    ],
)
def test_the_weight_times_its_recorded_columns_is_the_layer_s_output(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layers, _ = find_layers(layer)
    recorder = LayerInputs(layers, positions=10**6)
    with torch.no_grad(), recorder, allow_early_stop():
        output = layer(x)
    columns = recorder.columns[0]
    groups, size, samples = columns.shape
    made = layer.weight.detach().reshape(groups, -1, size) @ columns
    made = made.flatten(0, 1)
    if layer.bias is not None:
        assert recorder.biases[0] is layer.bias
        made = made + layer.bias.detach().unsqueeze(1)
    output = output.movedim(1, 0) if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else output.flatten(0, -2).t()
    torch.testing.assert_close(made, output.flatten(1), atol=1e-5, rtol=1e-4)
    alone = ExecutionOrder(layers)
    with torch.no_grad(), alone:
        layer(x)
    assert (alone.order, alone.biases) == (recorder.order, recorder.biases)
    few = LayerInputs(layers, positions=4, offset=1)
    with torch.no_grad(), few:
        layer(x)
    every = {tuple(column) for column in columns.flatten(0, 1).t().tolist()}
    assert 0 < few.columns[0].shape[-1] <= samples
    assert all(tuple(column) in every for column in few.columns[0].flatten(0, 1).t().tolist())


@pytest.mark.parametrize("positions", [4, 9, 16, 64])
def test_over_the_batches_every_position_of_a_feature_map_is_looked_at(positions: int) -> None:
    layer = nn.Conv2d(1, 1, 1, bias=False)
    layers, _ = find_layers(layer)
    image, seen = torch.arange(16 * 16.0).reshape(1, 1, 16, 16), set()
    for offset in range(256 // positions):
        recorder = LayerInputs(layers, positions=positions, offset=offset)
        with torch.no_grad(), recorder, allow_early_stop():
            layer(image)
        seen.update(recorder.columns[0].flatten().tolist())
    assert seen == set(range(256))


def test_a_weight_computed_from_a_parameter_is_not_taken_for_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 2 * self.weight, self.bias)

    layer = Doubled(4, 2)
    recorder = LayerInputs(find_layers(layer)[0], positions=10)
    with recorder, allow_early_stop():
        layer(torch.randn(3, 4))
    assert recorder.order == []


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_packed_projection_of_self_attention_is_seen_image_by_image(batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=batch_first).eval()
    nn.init.normal_(attention.in_proj_bias)
    images = torch.randn(3, 5, 6)  # images, tokens, columns
    given = images if batch_first else images.transpose(0, 1)
    wanted = attention(given, given, given)[0].detach()
    layers, _ = find_layers(attention)
    names = [layer.name for layer in layers]
    recorder = LayerInputs(layers, positions=10**6)
    with recorder, torch.no_grad():
        found = attention(given, given, given)[0]
    assert torch.equal(found, wanted)
    assert [names[index] for index in recorder.order] == ["in_proj_weight", "out_proj.weight"]
    projected, attended = (recorder.columns[index] for index in recorder.order)
    assert torch.equal(projected, images.reshape(15, 6).t()[None])
    outputs = attended[0].t() @ attention.out_proj.weight.t() + attention.out_proj.bias
    by_image = wanted if batch_first else wanted.transpose(0, 1)
    torch.testing.assert_close(outputs.detach().view(3, 5, 6), by_image)


def test_of_cross_attention_only_what_leaves_it_is_seen() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    query, other = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    layers, _ = find_layers(attention)
    recorder = LayerInputs(layers, positions=10**6)
    with recorder, torch.no_grad():
        found = attention(query, other, other)[0]
    torch.testing.assert_close(found, attention(query, other, other)[0])
    assert [layers[index].name for index in recorder.order] == ["out_proj.weight"]
