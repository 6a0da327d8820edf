"""Budgets in bytes: the file that ships is never over what was asked for, and uses it where there are layers enough."""

from __future__ import annotations

import functools
import itertools
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training.test_planning import TWENTY_LAYERS

from csqcli import pipeline, shipping
from csqcli.errors import UserError
from csqcli.file import codes, io
from csqcli.quant.budget import Budget, PlaneLimits, allocate, make_budget, uniform_target
from csqcli.quant.layers import find_layers
from csqcli.quant.layerwise import LayerwiseRounding
from csqcli.quant.methods.base import Plan, Schedule
from csqcli.quant.methods.staged import Staged
from csqcli.recipe.resolve import resolve
from csqcli.system.progress import Display
from csqcli.training import sizing

QUIET = Display(quiet=True)


def test_a_network_of_many_layers_uses_its_bytes_and_no_more(tmp_path: Path) -> None:
    recipe, settings = TWENTY_LAYERS
    asked = 250_000
    sized = {key: value for key, value in settings.items() if key != "quantization.target_bits"}
    resolved = resolve(recipe, sized | {"quantization.target_size": "250kB", "epochs": 2})
    report = pipeline.search(resolved, tmp_path / "run", display=QUIET)
    shipped = tmp_path / "run" / "model-bit-packed-small.safetensors"
    assert 0.98 * asked <= shipped.stat().st_size <= asked
    wanted = {"budget": "size", "asked": asked, "reached": shipped.stat().st_size, "file": shipped.name}
    assert report["budgets"] == [wanted]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["budgets"] == [wanted]
    model, small = io.read(tmp_path / "run" / "model.safetensors"), io.read(shipped)
    assert all(torch.equal(a.integers, b.integers) for a, b in zip(model.layers, small.layers, strict=True))
    assert not list((tmp_path / "run").glob(".*.safetensors*"))  # nothing of the measuring stays


@pytest.mark.parametrize("asked", [9_000, 15_000])
def test_the_same_seed_gives_the_same_file_within_the_size(asked: int, tmp_path: Path) -> None:
    settings = {"quantization.target_size": asked, "epochs": 4}
    for name in ("a", "b"):
        pipeline.search(resolve("digits", settings), tmp_path / name, display=QUIET)
        assert (tmp_path / name / "model-bit-packed-small.safetensors").stat().st_size <= asked
    first, second = (io.read(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert first.manifest.payload_sha256 == second.manifest.payload_sha256


def test_a_stopped_run_goes_on_to_the_same_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"quantization.target_size": 10_000, "epochs": 4}
    pipeline.search(resolve("digits", settings), tmp_path / "whole", display=QUIET)
    refit = sizing.refit

    def stops(run, trainer):  # in the fourth epoch, after the planes were fitted anew
        refit(run, trainer)
        if trainer.optimizer.step_count == 65:
            raise KeyboardInterrupt

    monkeypatch.setattr(sizing, "refit", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.search(resolve("digits", settings), tmp_path / "stopped", display=QUIET)
    monkeypatch.setattr(sizing, "refit", refit)
    pipeline.search(resolve("digits", settings), tmp_path / "stopped", display=QUIET, resume=True)
    whole, stopped = (io.read(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.manifest.payload_sha256 == stopped.manifest.payload_sha256


def test_what_cannot_be_reached_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="6,000 bytes cannot be met: at the fewest planes it takes about"):
        pipeline.search(resolve("digits", {"quantization.target_size": 6_000}), tmp_path / "run", display=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("times", [7, 20])  # more than the fewest planes allow, and than all that is beside them
def test_a_compression_that_cannot_be_reached_is_to_be_lowered(times: float, tmp_path: Path) -> None:
    asked = resolve("digits", {"quantization.target_compression": times, "layers.min_bits": {"*": 4}})
    with pytest.raises(UserError, match="bytes cannot be met") as raised:
        pipeline.search(asked, tmp_path / "run", display=QUIET)
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("ask for less compression")


def test_a_plan_does_not_say_to_raise_a_compression_that_cannot_be_reached() -> None:
    asked = resolve("digits", {"quantization.target_compression": 7, "layers.min_bits": {"*": 4}})
    with pytest.raises(UserError, match="bytes cannot be met") as raised:
        pipeline.plan(asked, display=QUIET)
    assert raised.value.hint == "allow more bytes or relax layers.keep / layers.min_bits / layers.floor"


def test_an_allowance_is_what_the_knapsack_may_spend() -> None:
    # two layers; the second's planes save more per byte: 0 and 3 planes cost 0 + 60 of 65
    table = ((0, 10, 20, 30), (0, 20, 40, 60))
    budget = Budget(0.0, (10, 20), PlaneLimits((0, 0), (3, 3)), table, allowance=65)
    importance = torch.tensor([[1.0, 0.5, 0.1], [9.0, 8.0, 7.0]])
    assert allocate(importance, budget) == [0, 3]
    # 90 bytes are all three planes; 45 are half of that; 75 lie half way between two (60) and three (90)
    assert [uniform_target(table, allowance) for allowance in (90, 45, 75, 500)] == [3.0, 1.5, 2.5, 3.0]


def test_the_size_that_is_fitted_to_does_not_depend_on_how_long_loading_took(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = set()
    for seconds in (1.0, 0.5, 0.007, 0.0071884420030983165):
        clock = itertools.cycle([0.0, seconds])
        monkeypatch.setattr("csqcli.exporting.run.time", SimpleNamespace(perf_counter=lambda clock=clock: next(clock)))
        small = tmp_path / "small.safetensors"
        sizes.add(shipping.ship(digits_run / "model.safetensors", small, "bit-packed-small", display=QUIET))
        assert small.stat().st_size <= max(sizes)
    assert len(sizes) == 1


# --- the end: weights that fall below an edge, and planes that go


def trained(target: float = 1.5, *, min_planes: int = 1) -> Staged:
    """Three linear layers of different spread after a few steps, their planes fixed."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    for spread, layer in zip((0.1, 1.0, 3.0), model, strict=True):
        nn.init.normal_(layer.weight, std=spread / 8)
    layers, _ = find_layers(model)
    limits = PlaneLimits((min_planes,) * 3, (8,) * 3)
    method = Staged(layers, Plan(Schedule(8, 4), make_budget(layers, target, limits=limits)))
    for step in range(8):
        model.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        method.collect(step, lr=0.01, lr_share=0.5)
        method.materialise(step + 1)
    method.harden(8)
    return method


def trim(method: Staged, goal: int) -> int:
    run = SimpleNamespace(
        ships=SimpleNamespace(asked=goal),
        shard=SimpleNamespace(is_main=True),
        display=Display(quiet=True),
        recipe=SimpleNamespace(quantization=SimpleNamespace(target_size=goal)),
    )
    trainer = SimpleNamespace(optimizer=SimpleNamespace(method=method, step_count=8))
    return sizing.trim(run, trainer, goal)  # type: ignore[arg-type]


def coded(method: Staged) -> int:
    """Bytes of the codes of what the method delivers, the lowest plane in use as 1; a layer without planes has none."""
    return sum(len(codes.encode(part.numpy()).data) for part, k in numbers(method) if k)


def numbers(method: Staged) -> list[tuple[Tensor, int]]:
    """Of every layer the integers in units of its lowest plane, and how many planes it has."""
    return [(hard.integers, hard.planes) for hard in method.hard_layers()]


def test_codes_within_the_goal_are_left_as_they_are() -> None:
    method = trained()
    before = numbers(method)
    size = coded(method)
    assert trim(method, size) == size
    assert all(torch.equal(a, b) and j == k for (a, j), (b, k) in zip(before, numbers(method), strict=True))


@pytest.mark.parametrize("share", [0.99, 0.97])
def test_weights_just_above_an_edge_fall_below_it_and_no_others_move(share: float) -> None:
    method = trained()
    before, goal = numbers(method), int(share * coded(method))
    scaled = [
        value.abs() / hard.scale.view(-1, 1)
        for value, hard in zip(method.unrounded(), method.hard_layers(), strict=True)
    ]
    assert trim(method, goal) == coded(method) <= goal
    assert coded(method) > 0.995 * goal  # as few as that takes
    fallen, kept = [], []
    for (old, k), (new, planes), value in zip(before, numbers(method), scaled, strict=True):
        assert planes == k
        lost = old.abs() - new.abs()
        assert set(lost.unique().tolist()) <= {0, 1}
        assert (old * new >= 0).all()  # no sign turns
        above = value - (old.abs() - 0.5)  # the edge below its level, in levels
        fallen.append(above[lost == 1])
        kept.append(above[(lost == 0) & (old != 0)])
    assert 0 < len(torch.cat(fallen))
    assert torch.cat(fallen).max() <= torch.cat(kept).min() + 1e-5


def test_a_smaller_goal_moves_further_weights_and_those_of_the_larger_one_too() -> None:
    size = coded(trained())
    moved = []
    for share in (0.995, 0.98):
        method = trained()
        before = numbers(method)
        trim(method, int(share * size))
        moved.append(torch.cat([(a != b).flatten() for (a, _), (b, _) in zip(before, numbers(method), strict=True)]))
    few, many = moved
    assert 0 < few.sum() < many.sum()
    assert not (few & ~many).any()


def test_trimming_twice_changes_nothing_more() -> None:
    method = trained()
    goal = int(0.98 * coded(method))
    size, once = trim(method, goal), numbers(method)
    assert trim(method, goal) == size
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(once, numbers(method), strict=True))


def test_where_shrinking_is_not_enough_layers_lose_planes_down_to_their_fewest() -> None:
    method = trained(3.0, min_planes=2)
    before, goal = numbers(method), int(0.85 * coded(method))
    assert trim(method, goal) == coded(method) <= goal
    pairs = list(zip(before, numbers(method), strict=True))
    assert all(2 <= new <= old for (_, old), (_, new) in pairs)
    assert any(new < old for (_, old), (_, new) in pairs)
    kept = [torch.equal(a, b) for (a, old), (b, new) in pairs if old == new]
    assert kept == [True] * len(kept) != []  # and nothing has been shrunk besides


def test_a_goal_below_what_the_fewest_planes_take_is_refused_with_the_size_that_was_asked_for() -> None:
    method = trained(3.0, min_planes=2)
    goal = int(0.7 * coded(method))
    with pytest.raises(UserError, match=f"a target of {goal:,} bytes cannot be met with the planes that were trained"):
        trim(method, goal)


BYTES = ("search", "--recipe", "digits", "--epochs", 0, "--set", "images=128", "--set", "threads=1", "--target-size")


def test_a_file_rounded_without_training_is_within_its_size_and_uses_it(csq, tmp_path: Path) -> None:
    for asked in (10_000, 13_000):
        assert csq(*BYTES, asked, "-o", tmp_path / str(asked))[0] == 0
        size = (tmp_path / str(asked) / "model-bit-packed-small.safetensors").stat().st_size
        assert 0.97 * asked <= size <= asked
    report = json.loads((tmp_path / "13000" / "report.json").read_text())
    assert report["budgets"] == [
        {"budget": "size", "asked": 13000, "reached": size, "file": "model-bit-packed-small.safetensors"}
    ]
    assert report["accuracy"]["hard_top1"] >= 95  # 98.2 in float


def test_a_file_that_comes_out_too_large_is_rounded_again_and_a_resumed_run_ends_in_the_same_bytes(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, round_group = iter([700, 0, 700, 0]), LayerwiseRounding.round_group

    def heavier(*given: Any, **options: Any) -> int:
        return ship(*given, **options) + next(first)

    ship = shipping.ship
    monkeypatch.setattr(shipping, "ship", heavier)
    for module in (shipping, pipeline):  # what is only measured is not heavier
        monkeypatch.setattr(module, "shipped_bytes", functools.partial(_plainly_shipped, ship))
    code, _, err = csq(*BYTES, 13_000, "-o", tmp_path / "whole")
    assert code == 0, err
    assert "bytes over 13,000: rounding again" in err
    calls = iter(range(99))

    def stopped(self: LayerwiseRounding, group: list[int]) -> None:
        round_group(self, group)
        if next(calls) == len(self.groups) + 1:  # the second group of the second round
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LayerwiseRounding, "round_group", stopped)
    assert csq(*BYTES, 13_000, "-o", tmp_path / "broken")[0] == 130
    monkeypatch.setattr(LayerwiseRounding, "round_group", round_group)
    code, _, err = csq(*BYTES, 13_000, "-o", tmp_path / "broken", "--resume")
    assert code == 0, err
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")}) == 1
    assert (tmp_path / "whole" / "model-bit-packed-small.safetensors").stat().st_size <= 12_300


def _plainly_shipped(ship: Any, file: Path, form: str) -> int:
    output = file.with_name(f".{file.stem}-shipped.safetensors")
    try:
        return int(ship(file, output, form, display=Display(quiet=True)))
    finally:
        output.unlink(missing_ok=True)


def test_a_size_below_what_the_fewest_planes_take_is_refused_before_anything_is_rounded(csq, tmp_path: Path) -> None:
    code, _, err = csq(*BYTES, 3_000, "-o", tmp_path / "run")
    assert code == 2
    assert "a target of 3,000 bytes cannot be met" in err


def test_a_file_that_stays_over_its_size_is_not_left_behind(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship = shipping.ship
    monkeypatch.setattr(shipping, "ship", lambda *given, **options: ship(*given, **options) + 10_000)
    for module in (shipping, pipeline):
        monkeypatch.setattr(module, "shipped_bytes", functools.partial(_plainly_shipped, ship))
    code, _, err = csq(*BYTES, 19_000, "-o", tmp_path / "run")
    assert code == 2
    assert "cannot be met" in err or "bytes over the 19,000" in err
    assert not list((tmp_path / "run").glob("*.safetensors"))
