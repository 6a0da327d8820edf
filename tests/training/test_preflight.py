"""What cannot be met or is not there is found before anything is evaluated or trained, and mostly before images are opened."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from csqcli import finetuning, pipeline
from csqcli.analysis import allocating, opening
from csqcli.errors import UserError
from csqcli.recipe.resolve import resolve
from csqcli.system.progress import Display
from csqcli.training.run import Run

QUIET = Display(quiet=True)
NAMED: list[tuple[dict[str, Any], str]] = [
    ({"quantization.target_latency": 5, "quantization.latency_table": "nope.json"}, "nope.json: cannot be read"),
    ({"quantization.target_latency": 5, "quantization.latency_engine": "openvino"}, "OpenVINO needs the package"),
    ({"quantization.target_bits": 2, "quantization.allocator": "nope:fn"}, "cannot import `nope`"),
    ({"quantization.target_bits": 2, "quantization.cost": "nope:fn"}, "cannot import `nope`"),
    ({"quantization.target_bits": 2, "optimizer.name": "fooopt"}, "fooopt"),
    ({"quantization.target_bits": 2, "optimizer.name": "lbfgs"}, "lbfgs"),
]


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else real(name))


def never(*_: object, **__: object) -> None:
    raise AssertionError("too late")


@pytest.mark.usefixtures("no_openvino")
@pytest.mark.parametrize(("settings", "message"), NAMED)
def test_what_is_not_there_is_missed_before_images_are_opened(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "open_images", never)
    recipe = resolve("digits", settings | {"adaptation.epochs": 1})
    with pytest.raises(UserError, match=message):
        pipeline.search(recipe, tmp_path / "run", display=QUIET)
    with pytest.raises(UserError, match=message):
        pipeline.plan(recipe, display=QUIET)
    assert not (tmp_path / "run").exists()


def test_an_allocation_and_a_finetune_look_first_too(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (opening, finetuning):
        monkeypatch.setattr(module, "open_images", never)
    settings = {"quantization.target_bits": 2, "quantization.allocator": "nope:fn"}
    with pytest.raises(UserError, match="cannot import `nope`"):
        allocating.allocate(resolve("digits", settings), display=QUIET)
    tuned = resolve("digits", {"finetune.epochs": 1, "optimizer.name": "fooopt"})
    with pytest.raises(UserError, match="fooopt"):
        finetuning.finetune(digits_run / "model.safetensors", tuned, digits_run / "tuned", display=QUIET)


@pytest.mark.parametrize("adaptation", [0, 1])
@pytest.mark.parametrize(("asked", "message"), [("100B", "all but the integers"), ("5kB", "at the fewest planes")])
def test_bytes_that_no_training_can_reach_are_refused_before_the_float_model_is_evaluated(
    asked: str, message: str, adaptation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "measure_float", never)
    recipe = resolve("digits", {"quantization.target_size": asked, "adaptation.epochs": adaptation})
    with pytest.raises(UserError, match=message):
        pipeline.search(recipe, tmp_path / "run", display=QUIET)


def test_a_table_of_another_network_is_refused_before_the_float_model_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.json"
    table.write_text(
        '{"schema_version": 1, "engine": "torch", "engine_version": "1", "threads": 1, "batch": 1, "input_size": [1, 8, 8],'
        ' "network": {}, "layers": [{"name": "other.weight", "latency": {"fp32": {"ms": 1.0}}}]}'
    )
    monkeypatch.setattr(Run, "measure_float", never)
    settings = {"quantization.target_latency": 5, "quantization.latency_table": str(table)}
    with pytest.raises(UserError, match=r"says nothing of `conv1"):
        pipeline.search(resolve("digits", settings), tmp_path / "run", display=QUIET)
