"""Tables and figures of the paper: the recipes are the paper's, runs are shared and never repeated, the page says both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csqcli.quant.catalog import PAPER
from csqcli.reproducing import runs
from csqcli.reproducing.experiments import EXPERIMENTS

TRIAL = ("--data", "digits", "--model", "digits_cnn", "--scale", "0.002", "--set", "max_steps=2", "--quiet")


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_bit_level_row_is_algorithm_1_with_the_papers_settings(name: str) -> None:
    planned = runs.plan(EXPERIMENTS[name], scale=1.0, seeds=[0], more={"data.source": "digits"})
    assert planned
    for row, _, recipe in planned:
        assert recipe.model.pretrained is False
        assert recipe.quantization.act_bits == row.act_bits
        assert recipe.epochs == {"cifar_resnet20": 600, "cifar_vgg19bn": 300}.get(recipe.model.source or "", 200)
        if row.method not in ("csq", "csq-uniform"):
            continue
        own = recipe.method_settings.model_dump()
        differs = {key for key, value in PAPER.items() if key in own and own[key] != value}
        allowed = {"rounding"} | {key.rpartition(".")[2] for key in row.settings}
        assert (
            differs <= allowed
        )  # levels that keep the trained weight are delivered, the paper's unit steps beside them
        assert own["measure_unit_steps"]


def test_scale_shortens_both_phases_and_a_plan_prints_commands_that_are_the_runs(csq, tmp_path: Path) -> None:
    code, out, _ = csq(
        "reproduce", "table3-resnet18", "--plan", "--scale", "0.1", "--data", "/imagenet", "-o", tmp_path
    )
    assert code == 0
    commands = out.splitlines()
    assert commands[-1] == "# 3 runs, 90 epochs in all"  # 200 and 100, a tenth
    assert all("--recipe imagenet-resnet18" in line and "finetune.epochs=10" in line for line in commands[:-1])
    assert not list(tmp_path.iterdir())


def test_a_table_is_trained_once_and_its_runs_serve_the_figures(csq, tmp_path: Path, monkeypatch) -> None:
    code, out, err = csq("reproduce", "table5", *TRIAL, "--seeds", "2", "-o", tmp_path)
    assert code == 0, err
    assert "| CSQ T3 | 3 |" in out
    assert "| 3.05 | 92.42 | -0.20 |" in out  # the paper's own line
    table = json.loads((tmp_path / "table5.json").read_text())
    rows = {row["label"]: row for row in table["rows"]}
    assert len(rows["CSQ T1"]["ours"]["top1"]) == 2
    assert all(planes <= row["ours"]["target"] for row in table["rows"][1:] for planes in row["ours"]["planes"])
    own = json.loads((tmp_path / "csq-target_bits2-a3-seed1" / "report.json").read_text())
    assert rows["CSQ T2"]["ours"]["top1"][1] == own["accuracy"]["hard_top1"]

    from csqcli.training import phase

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(phase, "train", never)
    for name in ("table5", "fig3", "fig4"):
        code, _, err = csq("reproduce", name, *TRIAL, "--output", tmp_path, "--json")
        assert code == 0, err
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
    assert "Rank correlation of planes with depth" in (tmp_path / "fig4.md").read_text()


def test_the_depth_trend_is_the_rank_correlation() -> None:
    assert runs.depth_trend([1, 2, 3, 5]) == pytest.approx(1)
    assert runs.depth_trend([4, 3, 3, 1]) == pytest.approx(-0.9486833)  # ranks 3, 1.5, 1.5, 0
    assert runs.depth_trend([2, 2, 2]) == 0


def test_a_wrong_name_is_one_line_with_the_right_one(csq) -> None:
    code, _, err = csq("reproduce", "tabel5")
    assert code == 2
    assert "did you mean `table5`" in err
    code, out, _ = csq("reproduce")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(EXPERIMENTS)
