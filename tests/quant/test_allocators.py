"""Each allocator against its paper's quantity, computed again in float64, and all of them within the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from csqcli.errors import UserError
from csqcli.quant.allocators import hessian
from csqcli.quant.allocators.base import allocation_by
from csqcli.quant.allocators.hawq_v1 import eigenvalue_importance
from csqcli.quant.allocators.hawq_v2 import trace_importance
from csqcli.quant.allocators.importance import fisher_importance
from csqcli.quant.allocators.quanos import noise_importance, noise_sensitivity
from csqcli.quant.budget import PlaneLimits, make_budget
from csqcli.quant.catalog import ALLOCATORS
from csqcli.quant.layers import find_layers
from csqcli.quant.measuring import rounded, score, weights_as

BITS = 4
UNIFORM_RULES = PlaneLimits((4, 1, 1), (4, 4, 4))  # the first layer keeps four
EVERY = [name for name in ALLOCATORS if name not in ("uniform", "manual")]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, bias=False),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 5),
    ).double()


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 7, 7, generator=rng).double(), torch.randint(0, 5, (size,), generator=rng))
        for _ in range(count)
    ]


def exact_hessian(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[np.ndarray, list[slice]]:
    """The whole Hessian over all layers' weights, by autograd's own function, and where each layer's block is."""
    layers, _ = find_layers(model)
    model.eval()
    shapes = [layer.parameter.shape for layer in layers]
    ends = list(itertools.accumulate(layer.weights for layer in layers))
    starts = [0, *ends[:-1]]

    def loss(flat: Tensor) -> Tensor:
        parts = {
            layer.name: flat[a:b].view(shape) for layer, a, b, shape in zip(layers, starts, ends, shapes, strict=True)
        }
        return F.cross_entropy(functional_call(model, parts, (images,)), labels)

    flat = torch.cat([layer.parameter.detach().reshape(-1) for layer in layers])
    whole = torch.autograd.functional.hessian(loss, flat).numpy()
    return whole, [slice(a, b) for a, b in zip(starts, ends, strict=True)]


def all_images() -> tuple[Tensor, Tensor]:
    found = batches()
    return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])


def test_products_are_those_of_the_exact_hessian() -> None:
    model, (images, labels) = network(), all_images()
    whole, blocks = exact_hessian(model, images, labels)
    layers, _ = find_layers(model)
    rng = torch.Generator().manual_seed(5)
    vectors = [torch.randn(layer.parameter.shape, generator=rng, dtype=torch.float64) for layer in layers]
    flat = np.concatenate([v.numpy().reshape(-1) for v in vectors])
    found = hessian.hessian_products(model, [layer.parameter for layer in layers], images, labels, vectors)
    for block, product in zip(blocks, found, strict=True):
        np.testing.assert_allclose(product.numpy().reshape(-1), (whole @ flat)[block], rtol=1e-9, atol=1e-12)


def test_traces_are_within_their_standard_error_of_the_exact_ones() -> None:
    model, (images, labels) = network(), all_images()
    whole, blocks = exact_hessian(model, images, labels)
    layers, _ = find_layers(model)
    probes = 600
    found = hessian.hessian_traces(model, layers, [(images, labels)], probes=probes, seed=3)
    for block, trace in zip(blocks, found.tolist(), strict=True):
        rows = whole[block].copy()
        rows[:, block] -= np.diag(np.diag(whole[block, block]))
        # vᵀ_l Σ_m H_lm v_m: a block's own pairs occur twice, those with other layers once
        variance = (rows**2).sum() + (rows[:, block] * rows[:, block].T).sum()
        assert abs(trace - np.trace(whole[block, block])) < 4 * (variance / probes) ** 0.5


def test_parts_of_a_batch_weigh_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = network(), all_images()
    whole, blocks = exact_hessian(model, images, labels)
    layers, _ = find_layers(model)
    monkeypatch.setattr(hessian, "_signs", lambda like, rng: torch.ones_like(like))
    found = hessian.hessian_traces(model, layers, [(images, labels)], probes=1, part=20)  # of 20 and 4 images
    expected = [whole[block].sum() for block in blocks]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_eigenvalues_are_the_largest_of_each_block() -> None:
    model, (images, labels) = network(), all_images()
    whole, blocks = exact_hessian(model, images, labels)
    layers, _ = find_layers(model)
    found = hessian.top_eigenvalues(model, layers, images, labels, rounds=500, tolerance=1e-9)
    for block, value in zip(blocks, found.tolist(), strict=True):
        assert value == pytest.approx(np.linalg.eigvalsh(whole[block, block])[-1], rel=1e-3)


class Saddle(nn.Module):
    """Cross entropy whose Hessian at zero weights is diag(−3, 1): the eigenvalue of largest magnitude is not the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.fc.weight)

    def forward(self, images: Tensor) -> Tensor:
        f = self.fc(torch.tensor([[1.0, 0.0]], dtype=torch.float64)) ** 2 * 3
        g = self.fc(torch.tensor([[0.0, 1.0]], dtype=torch.float64)) ** 2
        score = (f - g).expand(
            len(images), 1
        )  # softplus(−score) has slope −½ there, and each square a second derivative of 2
        return torch.cat([score, torch.zeros_like(score)], dim=1)


def test_a_negative_eigenvalue_of_larger_magnitude_is_not_taken_for_the_top_one() -> None:
    model = Saddle()
    layers, _ = find_layers(model)
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    found = hessian.top_eigenvalues(model, layers, images, labels, rounds=200, tolerance=1e-10)
    assert found.tolist() == [pytest.approx(1.0, abs=1e-4)]


@pytest.mark.parametrize("which", ["hawq-v1", "hawq-v2"])
def test_hawq_is_curvature_times_the_squared_error_that_a_plane_saves(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    layers, _ = find_layers(model)
    images, labels = all_images()
    whole, blocks = exact_hessian(model, images, labels)
    if which == "hawq-v1":
        found = eigenvalue_importance(model, layers, [(images, labels)], BITS)
        curvature = [np.linalg.eigvalsh(whole[block, block])[-1] for block in blocks]
    else:
        monkeypatch.setattr(hessian, "_signs", lambda like, rng: torch.ones_like(like))  # one vector stands for all
        found = trace_importance(model, layers, [(images, labels)], BITS)
        curvature = [max(whole[block].sum(), 0) / (block.stop - block.start) for block in blocks]
        assert sum(value > 0 for value in curvature) >= 2
    for layer, row, value in zip(layers, found.numpy(), curvature, strict=True):
        weight = layer.parameter.detach().numpy()
        errors = [((weight - rounded(layer, k).numpy()) ** 2).sum() for k in range(BITS + 1)]
        expected = value * -np.diff(errors) / 2
        tolerance = 0.05 if which == "hawq-v1" else 1e-4  # 20 rounds of the power iteration
        np.testing.assert_allclose(row, expected, rtol=tolerance, atol=1e-7)


def test_rounded_weights_are_integers_of_k_planes_times_a_step_per_channel() -> None:
    layer = find_layers(network())[0][0]
    weight = layer.parameter.detach().numpy()
    assert not rounded(layer, 0).any()
    for planes in range(1, BITS + 1):
        top, found = 2**planes - 1, rounded(layer, planes).numpy()
        for channel, own in zip(weight, found, strict=True):
            steps = np.linspace(0.05, 1.2, 2000) * np.abs(channel).max() / top
            rows = channel.reshape(1, -1), steps.reshape(-1, 1)
            errors = ((rows[0] - np.clip(np.rint(rows[0] / rows[1]), -top, top) * rows[1]) ** 2).sum(axis=1)
            # a local optimum of few weights: the alternation that finds it starts from a coarse grid
            assert ((channel - own) ** 2).sum() <= 1.5 * errors.min()
            used = np.abs(own).max()
            multiples = [np.abs(own) / used * integer for integer in range(1, top + 1)]
            assert any(np.allclose(m, np.rint(m), atol=1e-5) for m in multiples)


def test_noise_sensitivity_is_the_relative_move_of_a_layers_output() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    rng = torch.Generator().manual_seed(4)
    images, labels = torch.randn(10, 1, 3, 3, generator=rng).double(), torch.randint(0, 4, (10,), generator=rng)
    layers, _ = find_layers(model)
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())

    def outputs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = x @ w1.T + b1
        return first, np.maximum(first, 0) @ w2.T + b2

    x = images.numpy().reshape(10, 9)
    first, scores = outputs(x)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(10), labels.numpy()] -= 1  # dL/d scores, times the batch
    gradient = ((shares @ w2) * (first > 0)) @ w1
    moved = outputs(x + 0.12 * x.std(ddof=1) * np.sign(gradient))
    expected = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip((first, scores), moved, strict=True)]
    found = noise_sensitivity(model, layers, [(images, labels)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    importance = noise_importance(model, layers, [(images, labels)], BITS).numpy()
    for layer, row, sensitivity in zip(layers, importance, expected, strict=True):
        weight = layer.parameter.detach().numpy()
        errors = [((weight - rounded(layer, k).numpy()) ** 2).sum() / (weight**2).sum() for k in range(BITS + 1)]
        np.testing.assert_allclose(row, sensitivity * -np.diff(errors) / 2, rtol=1e-4, atol=1e-7)


def test_haq_finds_the_most_accurate_network_of_all_within_the_budget() -> None:
    pytest.importorskip("cmaes")
    model, data = network(), batches()
    model = model.float()
    data = [(images.float(), labels) for images, labels in data]
    layers, _ = find_layers(model)
    budget = make_budget(layers, 2, bits=3)
    reached = {}
    for planes in itertools.product(range(1, 4), repeat=len(layers)):
        if sum(k * layer.weights for k, layer in zip(planes, layers, strict=True)) <= 2 * sum(
            x.weights for x in layers
        ):
            pairs = [(layer, rounded(layer, k)) for layer, k in zip(layers, planes, strict=True)]
            with weights_as(pairs):
                reached[planes] = score(model, data)
    before = [layer.parameter.detach().clone() for layer in layers]
    found = tuple(allocation_by("haq", model, layers, data, budget, trials=80, seed=1).planes)
    full = {planes for planes in reached if not any(_leaves_room(planes, other) for other in reached)}
    assert found in full  # nothing of the budget is left that a plane would fit into
    best = max((reached[planes].top1, -reached[planes].loss) for planes in full)
    assert (reached[found].top1, -reached[found].loss) == best
    assert all(torch.equal(layer.parameter, old) for layer, old in zip(layers, before, strict=True))


def _leaves_room(planes: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return planes != other and all(a <= b for a, b in zip(planes, other, strict=True))


@pytest.mark.parametrize("target", [1.5, 2.0, 3.1])
@pytest.mark.parametrize("name", EVERY)
def test_every_allocator_spends_the_budget_repeats_and_leaves_the_model_as_it_was(name: str, target: float) -> None:
    if name == "haq":
        pytest.importorskip("cmaes")
    model, data = network().float().train(), [(images.float(), labels) for images, labels in batches()]
    layers, _ = find_layers(model)
    layers[0].parameter.requires_grad_(False)  # frozen in a factory, and quantized all the same
    state = {key: value.clone() for key, value in model.state_dict().items()}
    budget = make_budget(layers, target)
    found = allocation_by(name, model, layers, data, budget, trials=10, seed=7).planes
    assert found == allocation_by(name, model, layers, iter(data), budget, trials=10, seed=7).planes
    total = sum(layer.weights for layer in layers)
    spent = sum(k * layer.weights for k, layer in zip(found, layers, strict=True))
    assert spent <= target * total
    assert all(spent + layer.weights > target * total for k, layer in zip(found, layers, strict=True) if k < 8)
    assert model.training
    assert not layers[0].parameter.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_of_which_no_image_could_be_decoded_counts_for_nothing() -> None:
    model = network()
    layers, _ = find_layers(model)
    images, labels = batches(1)[0]
    empty = (images[:0], labels[:0])
    found = fisher_importance(model, layers, [empty, (images, labels), empty], 4)
    assert torch.equal(found, fisher_importance(model, layers, [(images, labels)], 4))


def test_random_planes_follow_the_seed() -> None:
    model = network()
    layers, _ = find_layers(model)
    drawn = {
        tuple(allocation_by("random", model, layers, [], make_budget(layers, 3), seed=seed).planes)
        for seed in range(20)
    }
    assert len(drawn) > 5


def test_manual_planes_are_taken_as_written_and_later_lines_win() -> None:
    model = network()
    layers, _ = find_layers(model)
    found = allocation_by("manual", model, layers, [], make_budget(layers, 3), planes={"*": 2, "0": 5, "6.weight": 1})
    assert found.planes == [5, 2, 1]


@pytest.mark.parametrize(
    ("planes", "complaint"),
    [
        ({}, "says no planes"),
        ({"0": 2}, "says nothing of `3.weight`"),
        ({"*": 2, "7": 1}, "`7` matches no quantized weight"),
        ({"*": 4}, "4.0000 planes per weight cost 1.333 times what the target of 3 allows"),
        ({"*": 2, "0": 0}, "`0.weight` at 0 planes; its rules and the method allow 1 to 8"),
        ({"*": 2, "6": 6}, "`6.weight` at 6 planes; its rules and the method allow 1 to 4"),
    ],
)
def test_manual_planes_that_do_not_fit_say_why(planes: dict[str, int], complaint: str) -> None:
    model = network()
    layers, _ = find_layers(model)
    budget = make_budget(layers, 3, limits=PlaneLimits((1, 1, 1), (8, 8, 4)))
    with pytest.raises(UserError) as caught:
        allocation_by("manual", model, layers, [], budget, planes=planes)
    assert complaint in caught.value.line()


def test_an_operation_without_a_second_derivative_is_one_line() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context, gradient: Tensor) -> Tensor:
            raise NotImplementedError("the derivative for 'once' is not implemented.")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            return Once.apply(self.fc(images.flatten(1)))

    model = Net()
    layers, _ = find_layers(model)
    data = [(torch.randn(4, 1, 2, 2), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(UserError, match="no second derivative"):
        allocation_by("hawq-v2", model, layers, data, make_budget(layers, 2))


def test_the_same_planes_in_every_layer_are_within_the_target_or_refused() -> None:
    layers, _ = find_layers(network())
    weights = [layer.weights for layer in layers]
    mean = (4 * weights[0] + 2 * (weights[1] + weights[2])) / sum(weights)

    def planes(target: float) -> list[int]:
        return allocation_by(
            "uniform", network(), layers, batches(), make_budget(layers, target, bits=BITS, limits=UNIFORM_RULES)
        ).planes

    assert planes(mean + 1e-3) == [4, 2, 2]
    with pytest.raises(UserError, match=rf"2 planes .* are {mean:.4f} in the mean, over the target of 2") as refused:
        planes(2)
    assert planes(float(str(refused.value).rpartition("--target-bits ")[2])) == [4, 2, 2]
    with pytest.raises(UserError, match="the layer rules alone need"):
        planes(1)
    with pytest.raises(UserError, match=r"2.5 is not possible"):
        allocation_by("uniform", network(), layers, batches(), make_budget(layers, 2.5, bits=BITS))
