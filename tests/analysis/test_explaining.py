"""What sensitivity and explain say agrees with measuring it by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import csqcli
from csqcli.analysis import explaining, moves
from csqcli.data.specs import open_data
from csqcli.file import io
from csqcli.quant.equations import mask_from_string
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import find_layers
from csqcli.quant.measuring import rounded


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Validation images as the model takes them, prepared here."""
    val = open_data("digits", train=False, val_limit=count).val
    assert val.pixels is not None
    mean, std = 0.30531, 0.37579
    return (val.pixels.float() / 255 - mean) / std, val.labels


@torch.no_grad()
def loss_of(model: nn.Module, images: Tensor, labels: Tensor, weights: dict[str, Tensor]) -> float:
    own = {name: model.get_parameter(name).detach().clone() for name in weights}
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    scores = model.eval()(images).double()
    loss = (scores.logsumexp(dim=1) - scores[torch.arange(len(labels)), labels]).mean()
    for name, weight in own.items():
        model.get_parameter(name).copy_(weight)
    return float(loss)


def prepared(file: Path, count: int) -> tuple[Tensor, Tensor]:
    config = io.read(file).manifest.data_config
    images, labels = digits(count)
    pixels = (images * 0.37579 + 0.30531 - config["mean"][0]) / config["std"][0]
    return pixels, labels


def test_sensitivity_is_the_loss_with_one_layer_rounded(digits_run: Path) -> None:
    found = csqcli.sensitivity(recipe="digits", widths=(1, 3), val_limit=50)
    from csqcli.file.checkpoint import open_checkpoint
    from csqcli.models.fitting import load_for

    model = load_for("digits_cnn", [str(d) for d in range(10)], checkpoint=open_checkpoint("builtin:digits_float"))
    images, labels = prepared(digits_run / "model.safetensors", 50)
    network = model.loaded.model
    assert found["images"] == 50
    assert found["loss"] == pytest.approx(loss_of(network, images, labels, {}), abs=1e-5)
    layers, _ = find_layers(network)
    assert [row["name"] for row in found["layers"]] == [layer.name for layer in layers]
    for layer, row in zip(layers, found["layers"], strict=True):
        for width, loss in zip((1, 3), row["loss"], strict=True):
            assert loss == pytest.approx(
                loss_of(network, images, labels, {layer.name: rounded(layer, width)}), abs=1e-4
            ), (layer.name, width)


def test_slopes_are_the_gradient_and_the_mean_square_of_each_images_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    images, labels = torch.randn(7, 1, 2, 3).double(), torch.randint(0, 3, (7,))
    layers, _ = find_layers(model)
    found = moves.slopes(model, layers, [(images[:4], labels[:4]), (images[4:], labels[4:])], part=1)
    for layer, one in zip(layers, found, strict=True):
        own = []
        for image, label in zip(images, labels, strict=True):
            loss = F.cross_entropy(model(image.unsqueeze(0)), label.unsqueeze(0))
            own.append(torch.autograd.grad(loss, layer.parameter)[0].numpy())
        np.testing.assert_allclose(one.gradient.numpy(), np.mean(own, axis=0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one.curvature.numpy(), np.mean(np.square(own), axis=0), rtol=1e-9, atol=1e-12)


def levels_by_hand(mask: str) -> np.ndarray:
    planes = [len(mask) - 1 - at for at, bit in enumerate(mask) if bit == "1"]
    sums = {
        sum(d * 2**p for d, p in zip(digits_, planes, strict=True))
        for digits_ in itertools.product((-1, 0, 1), repeat=len(planes))
    }
    return np.array(sorted(sums), dtype=np.float64)


@pytest.mark.parametrize("mask", ["11000000", "11110000", "10010000", "00000001", "01011000"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_plane_that_is_taken_costs_least_of_all_planes_and_steps(mask: str, per_channel: bool) -> None:
    rng = np.random.default_rng(3)
    on = mask_from_string(mask)
    lowest = int(torch.nonzero(on)[0])
    own = levels_by_hand(mask) / 2**lowest
    integers = rng.choice(own, size=(4, 30), p=_peaked(own))
    scale = np.array([0.3, 0.5, 0.2, 0.7]) if per_channel else np.array([0.4])
    hard = HardLayer("w", torch.tensor(integers).int(), torch.tensor(scale).float(), on)
    curvature = torch.ones(4, 30)
    taken = moves.take_plane(hard, curvature)
    assert taken is not None
    weight = integers * scale.reshape(-1, 1)
    best = np.inf
    for at in [at for at, bit in enumerate(mask) if bit == "1"]:
        left = levels_by_hand(mask[:at] + "0" + mask[at + 1 :]) / 2**lowest
        rows = weight if per_channel else weight.reshape(1, -1)
        total = 0.0
        for row, unit in zip(rows, np.broadcast_to(scale, len(rows)), strict=True):
            steps = np.linspace(0.2, 4, 1500) * unit
            distances = np.abs(row[None, :, None] - steps[:, None, None] * left[None, None, :]).min(axis=2)
            total += (distances**2).sum(axis=1).min()
        best = min(best, total / 2)
    assert best * 0.999 - 1e-9 <= taken.cost <= 1.12 * best + 1e-9
    found = taken.weight.numpy()
    assert 0.5 * ((weight - found) ** 2).sum() == pytest.approx(taken.cost, rel=1e-4, abs=1e-9)


def _peaked(levels: np.ndarray) -> np.ndarray:
    density = np.exp(-np.abs(levels) / max(levels.max(), 1) * 2)
    return density / density.sum()


def test_a_given_plane_moves_the_most_promising_weights_by_half_a_step() -> None:
    rng = torch.Generator().manual_seed(0)
    integers = torch.randint(-3, 4, (5, 8), generator=rng, dtype=torch.int32)
    hard = HardLayer("w", integers, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), mask_from_string("11"))
    slope = moves.Slopes(torch.randn(5, 8, generator=rng), torch.rand(5, 8, generator=rng))
    moved = moves.give_plane(hard, slope, 0.25) - hard.weight()
    half = np.array([0.1, 0.2, 0.3, 0.4, 0.5]).reshape(-1, 1) / 2
    g, f = slope.gradient.numpy(), slope.curvature.numpy()
    promise = np.abs(g) * half - f * half**2 / 2
    chosen = np.zeros(40, dtype=bool)
    chosen[np.argsort(-promise.reshape(-1))[:10]] = True
    expected = np.where(chosen.reshape(5, 8), -np.sign(g) * half, 0)
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-6)
    twice = (hard.weight() + moved) / hard.scale.reshape(-1, 1) * 2
    assert torch.allclose(twice, twice.round(), atol=1e-4)  # the levels of three planes
    assert int(twice.abs().max().round()) <= 7


def test_explain_agrees_with_brute_force_over_all_swaps(digits_run: Path) -> None:
    file = digits_run / "model.safetensors"
    found = csqcli.explain(file, "digits", val_limit=120, swaps=10_000)
    model, hard = csqcli.load(file), {layer.name: layer for layer in io.read(file).layers}
    images, labels = prepared(file, 120)
    fit, measure = (images[0::2], labels[0::2]), (images[1::2], labels[1::2])
    layers, _ = find_layers(model)
    slopes = dict(zip(hard, moves.slopes(model, layers, [fit]), strict=True))
    before = loss_of(model, *measure, {})
    assert found["loss"] == pytest.approx(before, abs=1e-5)
    assert found["images"] == 60
    less, more = {}, {}
    for row in found["layers"]:
        name = row["name"]
        assert row["planes"] == hard[name].planes
        assert len(row["importance"]) == row["planes"]
        taken = moves.take_plane(hard[name], slopes[name].curvature)
        if row["planes"] > 1:
            assert taken is not None
            less[name] = taken.weight
            change = loss_of(model, *measure, {name: taken.weight}) - before
            assert row["take"]["rise"] == pytest.approx(change, abs=1e-5)
        else:
            assert row["take"] is None  # the recipe's floor
        candidates = [hard[name].weight()] + [
            moves.give_plane(hard[name], slopes[name], 4.0**-p) for p in range(6, -1, -1)
        ]
        losses = [loss_of(model, *fit, {name: weight}) for weight in candidates]
        stop = next((at for at in range(1, len(losses)) if losses[at] >= losses[at - 1]), len(losses))
        more[name] = candidates[stop - 1]
        change = before - loss_of(model, *measure, {name: more[name]})
        assert row["give"]["gain"] == pytest.approx(change, abs=1e-5)
    weights = {name: layer.integers.numel() for name, layer in hard.items()}
    spent = sum(weights[name] * layer.planes for name, layer in hard.items())
    allowed = 2 * sum(weights.values())
    swaps = {}
    for give in more:
        if spent + weights[give] <= allowed:
            swaps[give, None] = loss_of(model, *measure, {give: more[give]}) - before
            continue
        for take in less:
            if take != give and spent + weights[give] - weights[take] <= allowed:
                swaps[give, take] = loss_of(model, *measure, {give: more[give], take: less[take]}) - before
    best = sorted(swaps.items(), key=lambda item: item[1])[:3]
    assert len(best) == len(found["swaps"]) > 0
    for ((give, take), change), swap in zip(best, found["swaps"], strict=True):
        assert swap["measured"] == pytest.approx(change, abs=1e-5)
        assert (swap["give"], swap["take"]) == (give, take)
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1)


def test_swaps_keep_the_bit_operations_that_were_asked_for(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All swaps that fit into both budgets, by the report's counts; of those within mean bits alone some are left out."""
    monkeypatch.setattr(explaining, "SWAPS", 10_000)
    report = csqcli.report(digits_run)
    asked = report["compute"]["bops"]  # what it takes as it is
    file = with_recipe(digits_run, tmp_path, target_bops=float(asked))
    found = csqcli.explain(file, "digits", val_limit=16, swaps=10_000)
    planes, weights, macs = ({row["name"]: row[key] for row in report["layers"]} for key in ("bits", "weights", "macs"))
    others = report["compute"]["macs"] - sum(macs.values())

    def is_within(*, bits: bool, bops: bool, give: str, take: str | None) -> bool:
        now = {name: k + (name == give) - (name == take) for name, k in planes.items()}
        operations = sum(32 * macs[name] * k for name, k in now.items()) + others * 32 * 32
        mean = sum(weights[name] * k for name, k in now.items()) / sum(weights.values())
        return (not bits or mean <= 2) and (not bops or operations <= asked)

    def pairs(**kept: bool) -> set[tuple[str, str | None]]:
        alone = {(give, None) for give in planes if is_within(**kept, give=give, take=None)}
        for give, take in itertools.permutations(planes, 2):
            if (give, None) not in alone and planes[take] > 1 and is_within(**kept, give=give, take=take):
                alone.add((give, take))
        return alone

    swaps = {(swap["give"], swap["take"]) for swap in found["swaps"]}
    assert swaps == pairs(bits=True, bops=True) != set()
    assert not pairs(bits=True, bops=False) <= swaps
    assert found["budgets"] == [
        {"budget": "bits", "asked": 2, "kept": True},
        {"budget": "bops", "asked": asked, "kept": True},
    ]


def with_recipe(run: Path, folder: Path, *, target_bits: float | None = 2, **quantization: object) -> Path:
    """A file of ``run`` that says to be from a search with other settings."""
    file = io.read(run / "model.safetensors")
    file.manifest.budget.target_mean_bits = target_bits
    file.manifest.recipe["quantization"] |= {"target_bits": target_bits, **quantization}
    io.write(folder / "model.safetensors", file)
    return folder / "model.safetensors"


def test_what_the_file_cannot_count_is_said(digits_run: Path, tmp_path: Path, csq) -> None:
    file = with_recipe(digits_run, tmp_path, target_bits=None, target_size=30_000, target_latency=0.5)
    look = ("explain", file, "--data", "digits", "--val-limit", 16, "--swaps", 0, "--quiet")
    code, out, _ = csq(*look)
    words = " ".join(out.split())
    assert code == 0
    assert "swaps are within mean planes only: the file does not say what a plane takes of" in words
    assert "the target of size and latency" in words
    assert csqcli.explain(file, "digits", val_limit=16, swaps=0)["budgets"] == [
        {"budget": "bits", "asked": None, "kept": True},
        {"budget": "size", "asked": 30_000, "kept": False},
        {"budget": "latency", "asked": 0.5, "kept": False},
    ]


def test_of_bit_operations_alone_shares_are_those_of_operations(digits_run: Path, tmp_path: Path) -> None:
    file = with_recipe(digits_run, tmp_path, target_bits=None, target_bops=1.0)  # less than the file takes
    found = csqcli.explain(file, "digits", val_limit=16, swaps=5)
    manifest = io.read(file).manifest
    operations = [layer.bits * (layer.macs or 0) for layer in manifest.layers]
    shares = [one / sum(operations) for one in operations]
    assert [row["share"] for row in found["layers"]] == pytest.approx(shares)
    assert found["cost"] == "bops"
    assert all(swap["take"] is not None for swap in found["swaps"])  # the file is held to what it takes


@pytest.mark.parametrize(
    ("settings", "rules", "most"),
    [({"method": "twn"}, {}, 1), ({}, {"max_bits": {"*": 2}}, 2), ({"max_bits": 3}, {}, 3)],
)
def test_no_layer_is_given_more_planes_than_its_method_and_its_rules_take(
    digits_run: Path, tmp_path: Path, settings: dict[str, object], rules: dict[str, object], most: int
) -> None:
    file = io.read(digits_run / "model.safetensors")
    file.manifest.recipe["quantization"] |= settings
    file.manifest.recipe["layers"] = rules
    io.write(tmp_path / "model.safetensors", file)
    found = csqcli.explain(tmp_path / "model.safetensors", "digits", val_limit=16, swaps=0)
    assert [row["give"] is None for row in found["layers"]] == [row["planes"] >= most for row in found["layers"]]


def test_levels_of_a_learned_basis_are_refused(csq, tmp_path: Path) -> None:
    run = (
        "search",
        "--recipe",
        "digits",
        "--method",
        "lq-nets",
        "--target-bits",
        2,
        "--set",
        "max_steps=1",
        "--epochs",
        1,
    )
    assert csq(*run, "--quiet", "-o", tmp_path / "run")[0] == 0
    code, _, err = csq("explain", tmp_path / "run", "--data", "digits", "--quiet")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "sums of a learned basis" in err
