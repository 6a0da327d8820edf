"""The float phase before a search: what it reports, what it keeps, and that an interruption changes no byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import csqcli
from csqcli.errors import UserError
from csqcli.models import networks
from csqcli.training import phase

SETTINGS: dict[str, Any] = {
    "recipe": "digits",
    "target_bits": 2,
    "epochs": 2,
    "max_steps": 4,
    "threads": 1,
    "adaptation.epochs": 2,
    "adaptation.lr": 0.02,
    "optimizer.distill": 0.5,
    "model.head": "new",
}


class Killed(Exception):
    pass


def run(output: Path, **more: Any) -> dict[str, Any]:
    return csqcli.search(output=output, **(SETTINGS | more))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    output = tmp_path_factory.mktemp("unbroken")
    report = run(output)
    return (output / "model.safetensors").read_bytes(), report


def test_the_float_accuracy_is_that_of_the_adapted_model(unbroken: tuple[bytes, dict[str, Any]]) -> None:
    _, report = unbroken
    adaptation = report["adaptation"]
    assert adaptation["kept"] == "adapted"
    assert adaptation["input_top1"] < 40 < adaptation["adapted_top1"]  # the head was a fresh one
    assert report["accuracy"]["float_top1"] == adaptation["adapted_top1"]
    assert [line["phase"] for line in report["history"]] == ["float", "float", "search", "search"]


@pytest.mark.parametrize(("killed_in", "epoch", "batch"), [("float", 0, 2), ("float", 1, 4), ("search", 0, 3)])
def test_a_run_killed_in_either_phase_ends_in_the_same_bytes(
    unbroken: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_in: str,
    epoch: int,
    batch: int,
) -> None:
    original = phase._Epochs._after_step

    def killing(self: Any, at_epoch: int, at_batch: int, losses: Any) -> None:
        original(self, at_epoch, at_batch, losses)
        if (self.phase, at_epoch, at_batch) == (killed_in, epoch, batch):
            self._save(at_epoch, at_batch, losses)
            raise Killed

    monkeypatch.setattr(phase._Epochs, "_after_step", killing)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    torch.manual_seed(99)  # whatever this process did before
    assert run(tmp_path, resume=True)["history"][0]["phase"] == "float"
    assert (tmp_path / "model.safetensors").read_bytes() == unbroken[0]


def test_the_teacher_is_the_adapted_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = []
    original = phase.train

    def watching(run: Any, name: str, *rest: Any, **more: Any) -> Any:
        teachers.append((name, run.teacher and {k: v.clone() for k, v in run.teacher.model.state_dict().items()}))
        return original(run, name, *rest, **more)

    monkeypatch.setattr(phase, "train", watching)
    run(tmp_path)
    (first, none), (second, taught) = teachers
    assert (first, none, second) == ("float", None, "search")
    adapted = load_file(tmp_path / "float.safetensors")
    assert adapted.keys() == taught.keys()
    assert all(torch.equal(adapted[name], taught[name]) for name in adapted)


def test_a_model_that_training_makes_worse_is_kept_as_it_came(tmp_path: Path) -> None:
    report = run(tmp_path, **{"adaptation.lr": 5.0, "model.head": "auto", "adaptation.epochs": 1})
    adaptation = report["adaptation"]
    assert adaptation["adapted_top1"] < adaptation["input_top1"] == report["accuracy"]["float_top1"]
    assert adaptation["kept"] == "input"
    as_it_came = networks.digits_cnn()
    as_it_came.load_state_dict(load_file(tmp_path / "float.safetensors"))
    builtin = load_file(Path(csqcli.__file__).parent / "assets" / "digits_float.safetensors")
    assert torch.equal(as_it_came.conv2.weight, builtin["conv2.weight"])


def test_a_float_file_that_was_changed_stops_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase._Epochs, "_after_step", _kill_in_search)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    state = load_file(tmp_path / "float.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "float.safetensors")
    with pytest.raises(UserError, match="the float model of this run cannot be read"):
        run(tmp_path, resume=True)


def _kill_in_search(self: Any, epoch: int, batch: int, losses: Any) -> None:
    if self.phase == "search":
        self._save(epoch, batch, losses)
        raise Killed
