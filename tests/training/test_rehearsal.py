"""What no file can hold is found before the first step, not after the last."""

from __future__ import annotations

from pathlib import Path

import pytest

from csqcli.training import loop

COMMON = ("--no-pretrained", "--data", "digits", "--target-bits", 2, "--epochs", 1, "--set", "max_steps=1", "--quiet")


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("scale_beside_a_weight", "conv.weight"),
        ("complex_buffer", "phases"),
        ("uint16_buffer", "table"),
        ("long_name", "at most 512 characters"),
        ("extra_state", "_extra_state"),
        ("nine_dimensions", "at most 8 items"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_the_first_step(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, complaint: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(loop.Trainer, "run_epoch", never)
    code, _, err = csq("search", f"tests.rehearsed:{factory}", *COMMON, "-o", tmp_path / "run")
    assert (code, complaint in err, err.count("\n")) == (2, True, 1), err
    assert list(tmp_path.iterdir()) == []


def test_it_is_refused_before_a_float_phase_too(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.Trainer, "run_epoch", lambda *_, **__: pytest.fail("trained"))
    code, _, err = csq("search", "tests.rehearsed:complex_buffer", *COMMON, "--float-epochs", 1, "-o", tmp_path / "run")
    assert (code, "phases" in err) == (2, True), err
