"""A run's folder is its own: nothing that csq did not write is replaced, and a start that fails leaves nothing behind."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path

import pytest
import torch

import csqcli
from csqcli.errors import UserError
from csqcli.models.pickles import check_state
from csqcli.system import files
from csqcli.training import loop
from csqcli.training.inputs import Inputs
from csqcli.training.run_state import RunRecord, RunState, read_state

SEARCH = ("search", "--recipe", "digits", "--target-bits", 2, "--epochs", 1, "--set", "max_steps=1", "--quiet")


def test_a_search_without_output_gets_a_folder_of_its_own(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("mine: true")
    code, _, err = csq(*SEARCH)
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "runs"]
    assert Path("recipe.yaml").read_text() == "mine: true"
    assert Path("runs/digits_cnn-2bit/model.safetensors").is_file()
    assert "holds a finished run" in csq(*SEARCH)[2]


@pytest.mark.parametrize("name", ["recipe.yaml", "report.json", "metrics.jsonl", "model.safetensors"])
@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["start", "resume"])
def test_a_file_that_no_run_wrote_is_replaced_by_force_only(
    csq, tmp_path: Path, name: str, resume: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text("mine")
    code, _, err = csq(*SEARCH, "-o", tmp_path, *resume)
    assert (code, f"holds a {name} of no known run" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    assert csq(*SEARCH, "-o", tmp_path, "--force")[0] == 0
    assert (tmp_path / name).read_bytes() != b"mine"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_rerun_with_force_leaves_no_file_of_the_run_before(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interrupted: bool
) -> None:
    digits = ("search", "--recipe", "digits", "--quiet", "--output", tmp_path)
    assert csq(*digits, "--target-size", "12kB", "--epochs", 1, "--set", "max_steps=2")[0] == 0
    assert csq("export", tmp_path, "--int8-packed", "--quiet")[0] == 0
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"model-bit-packed-small.safetensors", "metrics.jsonl", "model-int8-packed.safetensors"} <= kept
    again = (*digits, "--force", "--target-bits", 2, "--epochs", 0, "--set", "images=64")
    if interrupted:  # what was complete stays until there is something to take its place
        with monkeypatch.context() as patched:
            patched.setattr("csqcli.shipping.publish", _interrupt)
            assert csq(*again)[0] == 130
        assert kept <= {path.name for path in tmp_path.iterdir()}
    assert csq(*again)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model.safetensors", "report.json", "recipe.yaml"),
        "model-int8-packed.safetensors",  # somebody's own
    }
    assert "model-int8-packed.safetensors: was exported from the model that this run replaced" in caplog.text


@pytest.mark.parametrize("report", ["[]", "3", '{"budgets": 3}', '{"budgets": [3, {"file": ["model.safetensors"]}]}'])
def test_force_removes_nothing_by_the_word_of_a_report_that_no_run_wrote(csq, tmp_path: Path, report: str) -> None:
    (tmp_path / "report.json").write_text(report)
    (tmp_path / "model-bit-packed-small.safetensors").write_text("mine")
    code, _, err = csq(*SEARCH, "-o", tmp_path, "--force")
    assert (code, err) == (0, "")
    assert (tmp_path / "model-bit-packed-small.safetensors").read_text() == "mine"


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("wrong", [("--checkpoint", "nothing.pth"), ("--set", "layers.exclude=[nothing]")])
def test_a_start_that_fails_leaves_nothing_behind(csq, tmp_path: Path, wrong: tuple[str, str]) -> None:
    (tmp_path / "there").mkdir()
    assert csq(*SEARCH, "-o", tmp_path / "there", *wrong)[0] == 2
    assert csq(*SEARCH, "-o", tmp_path / "runs" / "new", *wrong)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []


def killed_twice_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An unfinished run's two states, newest first."""
    done = iter(range(9))
    original = loop.Trainer.run_epoch

    def interrupted(self, *arguments, **more):
        if next(done) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "run_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            csqcli.search(recipe="digits", target_bits=2, output=folder, epochs=3, max_steps=1)
    return [folder / name for name in ("resume.pt", "resume.previous.pt")]


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."), "out of memory"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_a_machine_that_cannot_read_a_state_is_not_taken_for_a_damaged_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, what: str
) -> None:
    states = killed_twice_saved(tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", fail)
        with pytest.raises(UserError, match=rf"resume\.pt: cannot be read \({what}"):
            csqcli.search(recipe="digits", target_bits=2, output=tmp_path, epochs=3, max_steps=1, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    states[0].write_bytes(states[0].read_bytes()[:-1])  # and what is damaged is kept under another name
    damaged = states[0].read_bytes()
    csqcli.search(recipe="digits", target_bits=2, output=tmp_path, epochs=3, max_steps=1, resume=True)
    assert (tmp_path / "resume.pt.damaged").read_bytes() == damaged


@pytest.mark.parametrize(
    "error", [AttributeError("'tuple' object has no attribute 'dtype'"), TypeError("x"), AssertionError(), KeyError(3)]
)
def test_a_state_that_torch_stumbles_over_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Sealed by somebody who may write the folder, with tuples in the place of storages."""
    torch.save({}, tmp_path / "resume.pt")
    files.seal(tmp_path / "resume.pt")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    assert read_state(tmp_path / "resume.pt") is None


def test_an_interrupt_inside_torchs_writer_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # what closing the half-written archive says

    monkeypatch.setattr(torch, "save", save)
    empty = dict.fromkeys(RunState.model_fields.keys() - {"record", "inputs"})
    state = RunState.model_construct(record=RunRecord(), inputs=Inputs.model_construct(), **empty)
    with pytest.raises(KeyboardInterrupt):
        state.write(tmp_path / "resume.pt", tmp_path / "resume.previous.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [{"x": argparse.Namespace(a=1)}, {"x": torch.zeros(3).to_sparse()}])
def test_a_state_holds_tensors_and_plain_values_only(tmp_path: Path, content: dict[str, object]) -> None:
    torch.save(content, tmp_path / "resume.pt")
    files.seal(tmp_path / "resume.pt")
    assert read_state(tmp_path / "resume.pt") is None
    with pytest.raises(ValueError, match=r"names (argparse\.Namespace|torch\._utils\._rebuild_sparse_tensor)"):
        check_state(tmp_path / "resume.pt")


def test_a_finished_run_s_report_is_read_through_no_link(csq, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere.json"
    assert csq(*SEARCH, "-o", run)[0] == 0
    assert csq(*SEARCH, "-o", run, "--resume")[0] == 0
    (run / "report.json").rename(elsewhere)
    (run / "report.json").symlink_to(elsewhere)
    code, _, err = csq(*SEARCH, "-o", run, "--resume")
    assert (code, "holds a finished run" in err) == (2, True)
