"""What metrics.jsonl says reaches the trackers, once a line, before and after a stop; a package that is missing is one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

RUN = ("search", "--recipe", "digits", "--target-bits", 2, "--set", "max_steps=2", "--quiet")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = loading.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_the_lines_of_metrics_jsonl(csq, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert csq(*RUN, "--epochs", 2, "--finetune-epochs", 1, "--log", "tensorboard", "-o", tmp_path / "run")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = scalars(tmp_path / "run")
    for key in ("train_loss", "val_top1", "mean_bits"):
        wanted = [(line["step"], line[key]) for line in lines if line["phase"] == "search"]
        assert seen[f"search/{key}"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    assert len(seen["finetune/val_top1"]) == 1


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line_before_training(
    name: str, csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    code, _, err = csq(*RUN, "--epochs", 1, "--log", name, "-o", tmp_path / "run")
    assert (code, err.strip()) == (
        2,
        f"csq: error: --log {name}: needs the package {name}; pip install 'csq[{name}]'",
    )
    assert not (tmp_path / "run").exists()


def test_mlflow_keeps_the_lines(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
        mlflow.search_runs(search_all_experiments=True)
    except Exception:
        pytest.skip("this mlflow has no store of its own")
    assert csq(*RUN, "--epochs", 2, "--log", "mlflow", "-o", tmp_path / "run")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (run,) = mlflow.search_runs(experiment_names=["csq"], output_format="list")
    assert run.data.metrics["search/val_top1"] == pytest.approx(lines[-1]["val_top1"])


def test_an_unknown_tracker_is_refused(csq, tmp_path: Path) -> None:
    code, _, err = csq(*RUN, "--log", "wandb", "-o", tmp_path / "run")
    assert code == 2
    assert "tensorboard" in err
