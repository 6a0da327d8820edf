"""The two-stage method and the yardsticks: budgets, gradients, soft becoming hard, state that survives a restart."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from csqcli.quant import budget
from csqcli.quant.catalog import CARDS
from csqcli.quant.layers import find_layers
from csqcli.quant.method_settings import PAPER, CSQSettings, StagedSettings, StepSettings
from csqcli.quant.methods.base import Plan, Schedule, WeightMethod, plan_for
from csqcli.quant.methods.csq import BitLevelCSQ
from csqcli.quant.methods.staged import Staged
from csqcli.quant.methods.uniform import LearnedStep, StraightThrough
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups
from csqcli.quant.passes import rounding
from csqcli.quant.passes.adam import LatentAdam
from csqcli.quant.passes.rounding import mse_step, plane_shares, quantize, soft_planes
from csqcli.recipe.schema import Recipe
from csqcli.training.setup import moment_bytes
from tests.quant.making import held_bytes, layers_of

SCHEDULE = Schedule(total_steps=40, steps_per_epoch=10)
PUBLISHED = ("parq", "dorefa", "pact", "lq-nets", "bsq", "msq", "scaled-uniform")
METHODS = {
    "ste": StraightThrough,
    "lsq": LearnedStep,
    "staged": Staged,
    "csq": BitLevelCSQ,
    **{name: CARDS[name].load() for name in PUBLISHED},
}
BY_STEP = CSQSettings(**PAPER | {"beta_schedule": "step", "logit": 1.0, "mask_logit": 1.0})


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 16, 3),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def make(kind: str, model: nn.Module, target: float = 2.0, state_dtype: torch.dtype = torch.float32) -> WeightMethod:
    layers, _ = find_layers(model)
    planes = [int(target)] * len(layers) if METHODS[kind].takes == "planes" else None
    plan = plan_for(layers, target, SCHEDULE, planes=planes, state_dtype=state_dtype)
    return METHODS[kind](layers, plan, BY_STEP if kind == "csq" else None)


def train(model: nn.Module, optimizer: QuantizedOptimizer, steps: range) -> None:
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 1, 6, 6, generator=rng), torch.randint(0, 5, (16,), generator=rng)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def start(
    kind: str, target: float = 2.0, seed: int = 0, state_dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, QuantizedOptimizer]:
    model = small_model(seed)
    method = make(kind, model, target, state_dtype)
    return model, QuantizedOptimizer(method, torch.optim.SGD(base_groups(model, method), lr=0.05, momentum=0.9))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("planes", [1, 2, 4, 8])
def test_mse_step_beats_the_largest_magnitude_and_its_own_neighbours(planes: int, per_channel: bool) -> None:
    weight = torch.randn(4, 200, generator=torch.Generator().manual_seed(planes))
    step = mse_step(weight, planes, channel_dim=0 if per_channel else None).view(-1, 1)

    def error(candidate: Tensor) -> float:
        return float((weight - quantize(weight, candidate, planes) * candidate).square().sum())

    largest = weight.abs().amax(dim=1, keepdim=True) if per_channel else weight.abs().max()
    assert error(step) <= error(largest / (2**planes - 1)) * 1.0001
    assert error(step) <= min(error(step * 0.93), error(step * 1.07)) * 1.01


@pytest.mark.parametrize("planes", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize(("length", "tails"), [(2000, 0), (2000, 30), (4608, 0), (4608, 5), (4608, 60), (25_088, 3)])
def test_mse_step_finds_the_best_step_of_long_rows_and_of_rows_with_outliers(
    length: int, tails: int, planes: int
) -> None:
    rng = np.random.default_rng(planes)
    rows = rng.standard_t(tails, size=(4, length)) if 0 < tails < 30 else rng.normal(size=(4, length))
    if tails >= 30:  # one outlier a row
        rows[:, 0] = tails
    top, found = 2**planes - 1, mse_step(torch.tensor(rows).float(), planes, channel_dim=0).double().numpy()

    def error(row: np.ndarray, step: float) -> float:
        return float(np.square(np.clip(np.round(row / step), -top, top) * step - row).sum())

    for row, step in zip(rows, found, strict=True):
        best = min(error(row, np.abs(row).max() * share / top) for share in np.geomspace(0.005, 1.05, 300))
        assert error(row, step) <= 1.15 * best


def test_mse_step_of_long_rows_of_few_values_and_of_zeros() -> None:
    rows = (
        torch.randn(4, 4608, generator=torch.Generator().manual_seed(0)).mul(2).round().clamp(-3, 3)
    )  # ties at the top
    found = mse_step(rows, 1, channel_dim=0).view(-1, 1)

    def error(step: Tensor) -> Tensor:
        return (quantize(rows, step, 1) * step - rows).square().sum(dim=1)

    best = torch.stack([error(torch.full((4, 1), step)) for step in np.linspace(0.1, 3, 300)]).amin(dim=0)
    assert (error(found) <= 1.02 * best).all()
    assert mse_step(torch.zeros(3, 5000), 4, channel_dim=0).tolist() == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("channel_dim", [0, 1, None])
def test_mse_step_is_the_same_in_one_piece_and_in_many(
    monkeypatch: pytest.MonkeyPatch, channel_dim: int | None
) -> None:
    weight = torch.randn(24, 20, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = mse_step(weight, 3, channel_dim=channel_dim)
    monkeypatch.setattr(rounding, "_CHUNK", 400)
    assert torch.equal(mse_step(weight, 3, channel_dim=channel_dim), whole)


def test_a_layer_with_one_weight_per_channel_has_one_step() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1, groups=6, bias=False), nn.Flatten(), nn.Linear(6, 2))
    method = Staged(find_layers(model)[0], plan_for(find_layers(model)[0], 4, Schedule(10, 10)))
    method.harden(0)
    assert [len(layer.scale) for layer in method.hard_layers()] == [1, 2]


def test_channels_of_zeros_and_of_one_value_survive() -> None:
    weight = torch.zeros(3, 7)
    weight[1] = -0.25
    step = mse_step(weight, 3, channel_dim=0)
    assert torch.isfinite(step).all()
    torch.testing.assert_close(step[[0, 2]], torch.full((2,), 0.1))
    assert torch.equal(quantize(weight, step.view(-1, 1), 3)[[0, 2]], torch.zeros(2, 7))
    torch.testing.assert_close(quantize(weight, step.view(-1, 1), 3) * step.view(-1, 1), weight)


def test_step_0_of_the_search_is_the_8_bit_rounded_model() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    make("staged", model)
    for name in ("0.weight", "3.weight", "5.weight"):
        rows = before[name].flatten(1)
        level = rows.abs().amax(dim=1, keepdim=True) / 255
        assert ((model.state_dict()[name].flatten(1) - rows).abs() <= level / 2 * 1.05 + 1e-7).all()


def test_soft_masks_average_to_the_target_while_they_are_soft() -> None:
    layers, _ = find_layers(small_model())
    model = small_model()
    layers, _ = find_layers(model)
    method = Staged(layers, plan_for(layers, 2.5, SCHEDULE), StagedSettings(search_share=0.5, refresh_every=1))
    optimizer = QuantizedOptimizer(method, torch.optim.SGD(base_groups(model, method), lr=0.05))
    train(model, optimizer, range(10))
    assert method.search is not None
    assert method.mean_bits() == pytest.approx(2.5, abs=1e-4)
    assert float(method.search.soft_mask.max()) <= 1
    assert 0 < float((method.search.soft_mask > 0.02).float().mean()) < 1


def test_importance_is_the_fisher_weighted_error_that_each_plane_removes() -> None:
    model, optimizer = start("staged")
    method = optimizer.method
    method.search_steps = 1000  # stay in the first stage
    train(model, optimizer, range(3))
    importance = method.search.importance(method.latents, method.adam)
    expected = torch.zeros_like(importance)
    for index, layer in enumerate(method.layers):
        latent, wide = method.latents[index], method.units[index]  # [1, channels, inner], [channels, 1]
        fisher = method.adam.exp_avg_sq[index] / (1 - 0.99**3) / wide**2  # per weight, not per unit
        value = latent * wide
        errors = [(fisher * value**2).sum()]
        for k, step in enumerate(method.search.scales[index], 1):
            errors.append((fisher * (value - (value / step).round().clamp(1 - 2**k, 2**k - 1) * step) ** 2).sum())
        drops = torch.stack(errors[:-1]) - torch.stack(errors[1:])
        expected[index] = torch.cummin(drops / 2, dim=0).values.clamp_min(0) * 0.25 ** torch.arange(8)
        assert layer.weights == latent.numel()
    torch.testing.assert_close(importance, expected, rtol=1e-3, atol=1e-9)


def test_soft_planes_are_the_sum_of_refinements_under_their_masks() -> None:
    """W = Σ_b f_b (Q_{b+1} − Q_b), Q_0 = 0, in float64."""
    rng = torch.Generator().manual_seed(0)
    latent, unit = torch.randn(1, 3, 500, generator=rng), torch.rand(3, 1, generator=rng) + 0.1
    steps = torch.stack([(torch.rand(3, 1, generator=rng) + 0.5) * 0.6**k for k in range(4)])
    masks = torch.tensor([[1.0, 0.7, 0.7, 0.2]])
    out = torch.empty_like(latent)
    soft_planes(latent, out, unit=unit, steps=steps, shares=plane_shares(masks)[0])
    expected, before = torch.zeros_like(latent, dtype=torch.float64), torch.zeros_like(latent, dtype=torch.float64)
    for k, (step, mask) in enumerate(zip(steps.double(), masks[0].double(), strict=True), 1):
        value = (latent * unit).double()
        refined = (value / step).round().clamp(1 - 2**k, 2**k - 1) * step
        expected += mask * (refined - before)
        before = refined
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.floats(1.0, 4.0))
def test_allocation_is_the_best_of_all_within_the_budget(seed: int, count: int, bits: int, target: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    importance = torch.rand(count, bits, generator=rng, dtype=torch.float64).sort(dim=1, descending=True).values
    weights = torch.randint(1, 60, (count,), generator=rng).tolist()
    target = min(target, float(bits))
    chosen = budget.allocate(importance, budget.make_budget(layers_of(weights), target, bits=bits))

    def value(planes: tuple[int, ...]) -> float:
        return sum(float(importance[i, :k].sum()) for i, k in enumerate(planes))

    def fits(planes: tuple[int, ...]) -> bool:
        return sum(k * w for k, w in zip(planes, weights, strict=True)) <= target * sum(weights) + 1e-6

    assert fits(tuple(chosen))
    best = max(value(p) for p in itertools.product(range(1, bits + 1), repeat=count) if fits(p))
    assert value(tuple(chosen)) == pytest.approx(best)


def test_allocation_of_many_layers_stays_within_the_budget_and_close_to_it() -> None:
    rng = torch.Generator().manual_seed(0)
    weights = (torch.rand(150, generator=rng) * 2_000_000).int().add(500).tolist()
    importance = torch.rand(150, 8, generator=rng).sort(dim=1, descending=True).values
    mean = budget.mean_planes(budget.allocate(importance, budget.make_budget(layers_of(weights), 3.21)), weights)
    assert 3.20 <= mean <= 3.21


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["ste", "lsq"])
def test_uniform_gradients_are_those_of_a_straight_through_graph(kind: str, per_channel: bool) -> None:
    model = small_model()
    layers, _ = find_layers(model)
    plan = plan_for(layers, 2, SCHEDULE, planes=[2] * len(layers))
    method = METHODS[kind](layers, plan, StepSettings(per_channel=per_channel))
    assert [len(scale) for scale in method.scales] == ([6, 16, 5] if per_channel else [1, 1, 1])
    x = torch.randn(8, 1, 6, 6)
    model(x).square().mean().backward()
    method.collect(0, lr=0.1, lr_share=1.0)

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, grad):
            return grad

    twin = copy.deepcopy(model)
    latents = {
        f"{name}": v.detach().clone().requires_grad_() for name, v in zip(_names(model), method.latents, strict=True)
    }
    sizes = {name: s.detach().clone().requires_grad_() for name, s in zip(_names(model), method.scales, strict=True)}
    wide = {name: size.view(-1, *[1] * (latents[name].dim() - 1)) for name, size in sizes.items()}
    weights = {name: Round.apply((v / wide[name]).clamp(-3, 3)) * wide[name] for name, v in latents.items()}
    torch.func.functional_call(twin, weights, (x,)).square().mean().backward()
    for index, name in enumerate(_names(model)):
        torch.testing.assert_close(method.latents[index].grad, latents[name].grad, atol=1e-6, rtol=1e-4)
        if kind == "lsq":
            scaled = sizes[name].grad / (latents[name].numel() / sizes[name].numel() * 3) ** 0.5
            torch.testing.assert_close(method.scales[index].grad, scaled, atol=1e-6, rtol=1e-3)


def _names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model)[0]]


def test_the_staircase_goes_from_the_identity_to_rounding() -> None:
    _, optimizer = start("staged")
    method = optimizer.method
    method.harden(0)
    latent, stairs = method.latents[1], method.stairs[1]
    ratio, hard = latent / stairs.width, stairs.integers(latent)

    def soft(sharpness: float) -> Tensor:
        out = torch.empty_like(latent)
        stairs.write(latent, out, sharpness=sharpness)
        return out / stairs.scale

    torch.testing.assert_close(soft(0.0), ratio, atol=1e-5, rtol=1e-5)
    away_from_ties = (ratio - hard).abs() < 0.49
    torch.testing.assert_close(soft(1.0)[away_from_ties], hard[away_from_ties])
    assert ((soft(0.6) - ratio).abs() <= (hard - ratio).abs() + 1e-5).all()


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("target", [1.0, 3.0])
def test_after_training_soft_weights_are_hard_weights_within_the_budget(kind: str, target: float) -> None:
    model, optimizer = start(kind, target)
    train(model, optimizer, range(40))
    if kind == "csq":
        optimizer.harden()
    else:
        before = [layer.parameter.clone() for layer in optimizer.method.layers]
        optimizer.harden()
        assert all(torch.equal(a, layer.parameter) for a, layer in zip(before, optimizer.method.layers, strict=True))
    weights = dict(model.named_parameters())
    hard = optimizer.hard_layers()
    for layer in hard:
        assert torch.equal(weights[layer.name], layer.weight())
    total = sum(layer.integers.numel() for layer in hard)
    assert sum(layer.planes * layer.integers.numel() for layer in hard) <= target * total
    assert min(layer.planes for layer in hard) >= 1


@pytest.mark.parametrize(
    ("kind", "state_dtype"),
    [
        *((kind, torch.float32) for kind in METHODS),
        *((kind, torch.bfloat16) for kind in ("staged", "csq")),
    ],
)
@pytest.mark.parametrize("stop", [1, 3, 17, 39])
def test_a_restored_run_continues_bit_for_bit(kind: str, state_dtype: torch.dtype, stop: int, tmp_path) -> None:
    whole, optimizer = start(kind, state_dtype=state_dtype)
    train(whole, optimizer, range(stop))
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(whole, optimizer, range(stop, 40))

    again, resumed = start(kind, seed=1, state_dtype=state_dtype)  # other weights: everything must come from the state
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(again, resumed, range(stop, 40))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["staged", "csq"])
def test_training_on_from_a_delivered_model_starts_exactly_there(kind: str) -> None:
    """Algorithm 1's second half: masks fixed, softness rewound, and the searched model is not lost at step 0."""
    model, optimizer = start(kind, 2.0)
    train(model, optimizer, range(40))
    optimizer.harden()
    delivered = optimizer.hard_layers()
    weights = [layer.parameter.detach().clone() for layer in optimizer.method.layers]
    layers, _ = find_layers(model)
    again: WeightMethod
    if kind == "staged":
        again = Staged(layers, plan_for(layers, 2.0, SCHEDULE, start=delivered))
    else:
        again = BitLevelCSQ(layers, plan_for(layers, 2.0, SCHEDULE, start=delivered), BY_STEP)
    for layer, weight in zip(again.layers, weights, strict=True):
        torch.testing.assert_close(layer.parameter.detach(), weight, atol=1e-6, rtol=1e-4)
    again.harden(0)
    for before, after in zip(delivered, again.hard_layers(), strict=True):
        assert torch.equal(before.integers, after.integers)
        assert torch.equal(before.mask, after.mask)
        if kind == "staged":  # a gate's scale still carries the softness that β has yet to take away
            torch.testing.assert_close(before.weight(), after.weight())


@pytest.mark.parametrize(
    ("kind", "state_dtype", "bytes_per_weight"),
    [
        ("staged", torch.float32, 12),
        ("staged", torch.bfloat16, 8),
        ("csq", torch.float32, 128),
        ("csq", torch.bfloat16, 64),
    ],
)
def test_a_method_holds_the_bytes_per_weight_that_the_docs_state(
    kind: str, state_dtype: torch.dtype, bytes_per_weight: int
) -> None:
    """staged: a latent and Adam's two moments. csq: 2·8 logits and their momenta (docs/performance.md)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    method = make(kind, model, state_dtype=state_dtype)
    optimizer = QuantizedOptimizer(method, torch.optim.SGD(base_groups(model, method) or model.parameters(), lr=0.01))
    for _ in range(6):  # staged: past the soft masks
        model(torch.randn(2, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    held = held_bytes(method.state_dict()) / (2 * 256 * 256)
    assert bytes_per_weight <= held < bytes_per_weight * 1.01
    counted = METHODS[kind].state_bytes(None, max_bits=8, state_dtype=state_dtype)  # by the estimate before training
    assert counted == bytes_per_weight


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("kind", [name for name, card in CARDS.items() if card.trains])
def test_no_method_and_its_base_optimizer_keep_more_than_the_estimate_counts(kind: str, optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 192, bias=False), nn.Linear(192, 192, bias=False))
    layers, _ = find_layers(model)
    card, method = CARDS[kind], CARDS[kind].load()
    planes = [1, card.max_planes] if card.takes == "planes" else None
    trained = method(layers, plan_for(layers, 1.0, SCHEDULE, planes=planes), card.settings())
    settings = Recipe(optimizer={"name": optimizer, "lr": 0.01, "weight_decay": 0.0}).optimizer
    base = create_optimizer_v2(base_groups(model, trained), opt=optimizer, lr=0.01, weight_decay=0.0, momentum=0.9)
    steps = QuantizedOptimizer(trained, base)
    model(torch.randn(2, 192)).square().mean().backward()
    steps.step()
    held = (held_bytes(trained.state_dict()) + held_bytes(list(base.state.values()))) / sum(
        layer.weights for layer in layers
    )
    most = max(planes) if planes else 8
    counted = method.state_bytes(card.settings(), max_bits=most, state_dtype=torch.float32)
    counted += method.trained_values(max_bits=most) * moment_bytes(settings, torch.device("cpu"))
    assert 0.98 * counted < held < 1.02 * counted or kind == "lq-nets"  # a basis per filter, 8 numbers of 192 weights
    assert held < 1.05 * counted


def test_adam_on_latents_is_torch_s_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(1, 5, 70_000), torch.randn(4, 3, 9)]  # more than one part, and channels in the middle
    theirs = [nn.Parameter(latent.clone()) for latent in ours]
    units = [torch.rand(5, 1) + 0.1, torch.rand(1, 1) + 0.1]
    adam = LatentAdam(ours, beta1=0.9, beta2=0.99, state_dtype=torch.float32)
    reference = torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.99), eps=1e-12, foreach=False)
    for step in range(4):
        gradients: list[Tensor | None] = [torch.randn_like(latent) for latent in ours]
        if step == 1:
            gradients[0] = None  # a layer that took no part
        for parameter, gradient, unit in zip(theirs, gradients, units, strict=True):
            parameter.grad = None if gradient is None else gradient * unit
        reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        adam.step(ours, gradients, units=units, edges=None, lr=0.1 / (step + 1), seed=step)
        reference.step()
        for latent, parameter in zip(ours, theirs, strict=True):
            assert torch.equal(latent, parameter)


def test_latents_are_clipped_to_their_channel_s_range() -> None:
    latent, edge = torch.zeros(2, 3, 4), torch.tensor([[0.1], [0.2], [10.0]])
    adam = LatentAdam([latent], beta1=0.9, beta2=0.99, state_dtype=torch.float32)
    gradient = torch.tensor([1.0, -1.0]).view(2, 1, 1).expand(2, 3, 4)
    adam.step([latent], [gradient], units=[torch.ones(1, 1)], edges=[edge], lr=0.5, seed=0)
    expected = torch.tensor([0.1, 0.2, 0.5]).view(1, 3, 1).expand(1, 3, 4)  # Adam's first step is its rate
    torch.testing.assert_close(latent, torch.cat([-expected, expected]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_precision_trains_and_ends_at_its_delivered_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).to(dtype)
    method = make("staged", model)
    optimizer = QuantizedOptimizer(method, torch.optim.SGD(base_groups(model, method), lr=0.05))
    start = [layer.parameter.detach().clone() for layer in method.layers]
    for _ in range(40):
        model(torch.randn(8, 1, 6, 6, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, hard, before in zip(method.layers, optimizer.hard_layers(), start, strict=True):
        assert layer.parameter.dtype == dtype
        assert torch.equal(layer.parameter.detach(), hard.weight().to(dtype))
        assert not torch.equal(layer.parameter.detach(), before)


@pytest.mark.parametrize("kind", ["staged", "csq"])
@pytest.mark.parametrize("stop", [2, 25])
def test_a_state_saved_in_one_memory_format_goes_on_in_another(kind: str, stop: int) -> None:
    """`channels_last: auto` differs between a GPU and a CPU, and a run may be resumed on either."""
    model, optimizer = start(kind)
    model.to(memory_format=torch.channels_last)
    method = make(kind, model)
    optimizer = QuantizedOptimizer(method, torch.optim.SGD(base_groups(model, method), lr=0.05, momentum=0.9))
    train(model, optimizer, range(stop))
    saved = copy.deepcopy(optimizer.state_dict())

    other, resumed = start(kind, seed=1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    train(model, optimizer, range(stop, stop + 2))
    train(other, resumed, range(stop, stop + 2))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_the_finetune_of_a_search_keeps_where_latents_stand_between_levels() -> None:
    model, optimizer = start("staged")
    train(model, optimizer, range(SCHEDULE.total_steps))
    optimizer.harden()
    search = optimizer.method
    assert isinstance(search, Staged)
    delivered = search.hard_layers()
    on = Staged(search.layers, Plan(SCHEDULE, search.plan.budget, start=delivered, searched=search))
    anew = Staged(search.layers, Plan(SCHEDULE, search.plan.budget, start=delivered))
    for index, latent in enumerate(search.latents):
        assert torch.equal(on.latents[index], latent)
        assert not torch.equal(anew.latents[index], latent)  # from integers alone
    on.harden(0)
    for before, after in zip(delivered, on.hard_layers(), strict=True):
        assert torch.equal(before.integers, after.integers)


def test_the_step_factor_is_the_distance_of_the_levels_that_are_trained() -> None:
    methods = []
    for factor in (1.0, 1.5):
        layers, _ = find_layers(small_model())
        plan = plan_for(layers, 2.0, SCHEDULE, planes=[2] * len(layers))
        methods.append(Staged(layers, plan, StagedSettings(step_factor=factor)))
    near, far = methods
    for close, wide in zip(near.stairs, far.stairs, strict=True):
        torch.testing.assert_close(wide.scale, 1.5 * close.scale)
    planes = [3] + [2] * (len(layers) - 1)
    counts = far.integers_at(0, 3)
    far.change_planes(planes, 0)
    assert torch.equal(far.integers_at(0, 3), counts)
    zeros = [sum(int((method.integers_at(at, 2) == 0).sum()) for at in range(1, len(layers))) for method in (near, far)]
    assert zeros[1] > zeros[0]


@pytest.mark.parametrize(("power", "share"), [(0.0, 1.0), (2.0, 0.25), (3.0, 0.125)])
def test_a_latent_s_first_step_is_its_rate_at_half_the_peak_in_units_of_the_one_plane_scale(
    power: float, share: float
) -> None:
    """Adam's first step is its rate whatever the gradient: 0.01 · 0.3 (after a rollback) · 0.5^power one-plane steps."""
    layers, _ = find_layers(small_model())
    plan = plan_for(layers, 2.0, SCHEDULE, planes=[2] * len(layers), rate_share=0.3)
    units = [mse_step(layer.parameter.detach(), 1, channel_dim=None).view(()) for layer in layers]
    method = Staged(layers, plan, StagedSettings(latent_lr=0.01, latent_lr_power=power, per_channel=False))
    before = [weight.clone() for weight in method.unrounded()]
    inside = [latent.abs() < stairs.edge - 0.01 for latent, stairs in zip(method.latents, method.stairs, strict=True)]
    signs = []
    for layer in layers:
        layer.parameter.grad = torch.randn(layer.parameter.shape, generator=torch.Generator().manual_seed(0))
        signs.append(layer.parameter.grad.sign())
    method.collect(0, lr=0.05, lr_share=0.5)
    rate = 0.01 * 0.3 * share
    for latent, unit, start, sign, free in zip(method.latents, units, before, signs, inside, strict=True):
        free = free.view_as(start)
        expected = start - rate * unit * sign
        moved = latent.view_as(start) * unit
        torch.testing.assert_close(moved[free], expected[free], atol=1e-6 * float(unit), rtol=1e-5)
        assert free.float().mean() > 0.5


@pytest.mark.parametrize("per_channel", [True, False])
def test_scales_learn_by_adam_on_their_logarithms_and_move_no_weight_to_another_level(per_channel: bool) -> None:
    layers, _ = find_layers(small_model())
    plan = plan_for(layers, 2.0, SCHEDULE, planes=[2] * len(layers))
    settings = StagedSettings(scale_lr=0.01, soft_share=0, latent_lr=1e-9, per_channel=per_channel)
    method = Staged(layers, plan, settings)
    before = method.hard_layers()
    logs = [hard.scale.double().log().requires_grad_() for hard in before]
    reference = torch.optim.Adam(logs, lr=0.01, betas=(0.9, 0.99), eps=1e-12)
    for step in range(3):
        reference.zero_grad()
        for layer, hard, log in zip(layers, before, logs, strict=True):
            gradient = torch.randn(layer.parameter.shape, generator=torch.Generator().manual_seed(step))
            layer.parameter.grad = gradient
            weight = log.exp().view(-1, *[1] * (gradient.dim() - 1)) * hard.integers  # every layer has channels first
            (weight * gradient.double()).sum().backward()
        reference.step()
        method.collect(step, lr=0.05, lr_share=1.0)
        method.materialise(step + 1)
    for hard, then, log, unrounded in zip(method.hard_layers(), before, logs, method.unrounded(), strict=True):
        assert torch.equal(hard.integers, then.integers)
        assert not torch.equal(hard.scale, then.scale)
        torch.testing.assert_close(hard.scale.double(), log.detach().exp(), rtol=1e-5, atol=0)
        # what stands behind the weights has grown with their scale: nothing is nearer to another level than it was
        step_size = hard.scale.view(-1, *[1] * (unrounded.dim() - 1))
        assert torch.equal(quantize(unrounded, step_size, 2).to(torch.int32), hard.integers)


def test_a_delivered_layer_of_one_scale_keeps_one_while_it_learns() -> None:
    model, optimizer = start("lsq")
    train(model, optimizer, range(3))
    delivered = optimizer.hard_layers()
    assert {hard.scale.numel() for hard in delivered} == {1}
    layers, _ = find_layers(model)
    on = Staged(layers, plan_for(layers, 2.0, SCHEDULE, start=delivered))
    trained = QuantizedOptimizer(on, torch.optim.SGD(base_groups(model, on), lr=0.05))
    train(model, trained, range(3))
    trained.harden()
    for before, after in zip(delivered, trained.hard_layers(), strict=True):
        assert after.scale.numel() == 1
        assert not torch.equal(before.scale, after.scale)


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.trains])
def test_cards_say_whose_state_has_the_type_of_state_dtype(name: str) -> None:
    card = CARDS[name]
    kept = [
        card.load().state_bytes(card.settings(), max_bits=8, state_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert (kept[0] != kept[1]) == card.takes_state_dtype
