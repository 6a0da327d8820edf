"""Budgets in bytes: the file that ships is never over what was asked for, and uses it where there are layers enough."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training.test_planning import TWENTY_LAYERS

from csqcli import pipeline
from csqcli.errors import UserError
from csqcli.file import io
from csqcli.quant.budget import Budget, PlaneLimits, allocate, uniform_target
from csqcli.recipe.resolve import resolve
from csqcli.system.progress import Display

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
    from csqcli.training import sizing

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
        sizes.add(pipeline._ship(digits_run / "model.safetensors", small, "bit-packed-small", display=QUIET))
        assert small.stat().st_size <= max(sizes)
    assert len(sizes) == 1
