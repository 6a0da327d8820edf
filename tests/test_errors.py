"""What is one line, and how to see behind it."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from csqcli.errors import FORWARD_ERRORS, cannot_run, did_you_mean, first_problem, machine_fault


@pytest.mark.parametrize(
    ("text", "died"),
    [
        ("DataLoader worker (pid 123) is killed by signal: Killed. ", True),
        ("DataLoader worker (pid(s) 12, 34) exited unexpectedly", True),
        ("DataLoader worker gone: Connection reset by peer", True),
        ("Pin memory thread exited unexpectedly", True),
        ("Caught KeyError in DataLoader worker process 0.\nTraceback: my own bug", False),
        ("my DataLoader worker pool is odd", False),
    ],
)
def test_only_torchs_own_words_mean_that_a_loader_process_died(text: str, died: bool) -> None:
    fault = machine_fault(RuntimeError(text))
    assert (fault is not None and "a loader process died" in fault.what) == died


def test_debug_shows_the_traceback_before_the_line(csq, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in csq("report", "nothing.safetensors")[2]
    monkeypatch.setenv("CSQ_DEBUG", "1")
    code, _, err = csq("report", "nothing.safetensors")
    assert (code, "Traceback" in err) == (2, True)
    assert err.splitlines()[-1].startswith("csq: error: nothing.safetensors: no such file")


@pytest.mark.parametrize(
    ("typed", "known", "said"),
    [
        ("serch", ["bench", "search"], "did you mean `search`?"),  # half of bench is in it, too
        ("target_bit", ["target_act_bits", "target_bits", "target_size"], "did you mean `target_bits`?"),
        ("hawq", ["haq", "hawq-v1", "hawq-v2", "uniform"], "did you mean `hawq-v1` or `hawq-v2` or `haq`?"),
        ("eval", ["evaluate", "explain", "export"], "did you mean `evaluate`?"),
        ("optimizer", ["optimizer.schedule", "optimizer.lr"], "did you mean `optimizer.lr` or `optimizer.schedule`?"),
        ("LSQ", ["ste", "lsq"], "did you mean `lsq`?"),
        ("resnet20", ["cifar_resnet20", "resnet200", "resnet34"], "did you mean `resnet200` or `cifar_resnet20`?"),
        ("frobnicate", ["bench", "search"], ""),
    ],
)
def test_the_nearest_name_is_suggested_first_and_none_that_is_much_farther(
    typed: str, known: list[str], said: str
) -> None:
    assert did_you_mean(typed, known) == said


class _Rows(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rows: list[int] = []

    @field_validator("rows")
    @classmethod
    def _are_few(cls, value: list[int]) -> list[int]:
        if len(value) > 2:
            raise ValueError("too many rows")
        return value

    @model_validator(mode="after")
    def _are_not_seven(self) -> _Rows:
        if self.rows == [7]:
            raise ValueError("seven is taken")
        return self


@pytest.mark.parametrize(
    ("given", "key", "text"),
    [
        ({"rows": [1, "x"]}, "rows.1", "rows.1: Input should be a valid integer, unable to parse string as an integer"),
        ({"rows": [1, 2, 3]}, "rows", "rows: too many rows"),
        ({"rows": [7]}, "", "seven is taken"),
        ({"row": 1}, "row", "row: Extra inputs are not permitted"),
    ],
)
def test_pydantics_first_problem_is_told_in_the_words_of_who_found_it(given: dict, key: str, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Rows.model_validate(given)
    problem = first_problem(caught.value)
    assert (problem.key, problem.text) == (key, text)
    assert problem.kind == ("extra_forbidden" if "row" in given else problem.kind)


def test_a_network_that_cannot_run_is_told_by_the_size_and_a_full_memory_is_not_blamed_on_it() -> None:
    assert cannot_run(ValueError("no"), (3, 8, 9)) == "cannot run on an image of 3×8×9 (no)"
    full = RuntimeError("CUDA out of memory")
    assert isinstance(full, FORWARD_ERRORS)
    with pytest.raises(RuntimeError) as caught:
        cannot_run(full, (3, 8, 8))
    assert caught.value is full
