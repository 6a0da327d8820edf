"""Tables of accuracy: what a row's name says, what the command line lays over rows, and that a table ends whatever a row does."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import layer_norm, photographs, resnet20, rows
from csqcli.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = {
    "data.source": "digits",
    "data.train_limit": 128,
    "data.batch_size": 16,
    "data.val_limit": 64,
    "max_steps": 8,
}


def given(work: Path, *words: str) -> argparse.Namespace:
    return rows.parser("", epochs=1, rates=()).parse_args(["--data", "digits", "--work", str(work), *words])


def tiny(work: Path, *words: str, table: tuple[str, ...] = ("staged 2", "ste 2, sgd 0.05")) -> rows.Rows:
    return rows.Rows(given(work, *words), table, recipe="digits", fixed=TINY)


def test_a_name_stands_for_method_planes_activations_and_rates() -> None:
    assert rows.parse("staged 1.5 A4, latents 1e-3, sgd 0.01") == (
        "staged 1.5 A4, latents 0.001, sgd 0.01",
        {
            "quantization.method": "staged",
            "quantization.target_bits": 1.5,
            "quantization.act_bits": 4,
            "staged.latent_lr": 0.001,
            "optimizer.name": "momentum",
            "optimizer.weight_decay": 5e-4,
            "optimizer.lr": 0.01,
        },
    )
    _, mixed = rows.parse("lsq 1.5, adamw 3e-4")
    assert (mixed["quantization.allocator"], mixed["optimizer.name"], mixed["optimizer.lr"]) == (
        "importance",
        "adamw",
        3e-4,
    )


@pytest.mark.parametrize(
    "name", ["lsq", "lsk 2", "float 2", "lsq 2 0.002", "lsq 2, latents 0.1", "lsq 2, lion 0.1", "lsq 2..1", "lsq 2, "]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--rows: "):
        rows.parse(name)


@pytest.mark.parametrize("table", [photographs, resnet20, layer_norm])
def test_every_row_of_a_table_has_one_name_and_csq_and_rivals_at_the_same_planes(table: Any) -> None:
    names = table.table(list(table.RATES), [])
    assert len(set(names)) == len(names)
    assert [rows.parse(name)[0] for name in names] == names
    for planes in ("1", "2", "3"):
        own = {name for name in names if re.fullmatch(rf"(staged|uniform) {planes}", name)}
        rivals = {name.partition(",")[0] for name in names if "," in name and f" {planes}," in name}
        assert len(own) == 2
        assert rivals == {f"{method} {planes}" for method in rows.RIVALS}


def test_rows_run_once_and_a_diverged_one_does_not_end_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--rows", "staged 2", "lsq 1, sgd 1e6", "lsq 2, adamw 0.001", "--json", str(tmp_path / "table.json"))
    tiny(tmp_path, *words).run(after=lambda folder: {"folder_is": folder.name})
    first = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())
    assert [line["row"] for line in table] == ["staged 2", "lsq 1, sgd 1e+06", "lsq 2, adamw 0.001"]
    assert table[0]["folder_is"] == "staged_2-0"
    assert "the loss became" in table[1]["diverged"]
    report = json.loads((tmp_path / "lsq_2-adamw_0.001-0" / "report.json").read_text())
    assert table[2]["hard_top1"] == report["accuracy"]["hard_top1"]
    recipe = report["recipe"]["optimizer"]
    assert (recipe["name"], recipe["lr"], recipe["weight_decay"]) == ("adamw", 0.001, 0.05)

    before = (tmp_path / "staged_2-0" / "model.safetensors").stat().st_mtime_ns
    tiny(tmp_path, *words).run(after=lambda folder: {"folder_is": folder.name})
    assert capsys.readouterr().out == first
    assert (tmp_path / "staged_2-0" / "model.safetensors").stat().st_mtime_ns == before


def test_set_lays_a_value_over_every_row_and_a_method_s_own_over_its_rows(tmp_path: Path) -> None:
    asked = tiny(tmp_path, "--set", "data.batch_size=32", "--set", "latent_lr=0.02", "--set", "lsq.nothing=1")
    assert asked._set_for("ste") == {"data.batch_size": 32}
    assert asked._set_for("staged") == {"data.batch_size": 32, "latent_lr": 0.02}
    with pytest.raises(UserError, match=r"`lsq\.nothing` is a setting of none of these rows"):
        asked.run()


def test_rows_with_a_star_are_those_of_the_table(tmp_path: Path) -> None:
    assert list(tiny(tmp_path, "--rows", "ste*", "lsq 3").rows) == ["ste 2, sgd 0.05", "lsq 3"]
    with pytest.raises(UserError, match="no row of the table is like `bsq"):
        tiny(tmp_path, "--rows", "bsq*")


def test_rows_of_a_missing_library_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None if name == "brevitas" else object())
    asked = tiny(tmp_path, table=("staged 2", "brevitas 2, sgd 0.05", "torchao-parq 2, sgd 0.05"))
    assert list(asked.rows) == ["staged 2", "torchao-parq 2, sgd 0.05"]
    assert "which needs brevitas: pip install 'csq[rivals]'" in capsys.readouterr().err


def test_a_command_lists_its_rows_and_refuses_a_wrong_one_in_a_line(tmp_path: Path) -> None:
    words = ["resnet20.py", "--data", "digits", "--checkpoint", "none", "--work", str(tmp_path)]
    command = [sys.executable, ROOT / "benchmarks" / "accuracy" / words[0], *words[1:]]
    done = subprocess.run([*command, "--list", "--rows", "staged *"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[:4] == ["staged 2", "staged 1", "staged 3", "staged 1.5"]
    done = subprocess.run([*command, "--rows", "lsk 2"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "resnet20.py: error: --rows: `lsk 2` names no row" in done.stderr


def test_ways_to_count_planes_are_trained_and_drawn(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "accuracy" / "steering.py", "--work", tmp_path, "--epochs", "3"]
    command += ["--only", "signs, fixed at 60 %", "--svg", tmp_path / "planes.svg"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    row = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("| ").split("|")]
    assert row[0] == "signs, fixed at 60 %"
    assert (
        0 <= 2 - float(row[2]) == pytest.approx(float(row[1]), abs=2e-3)
    )  # fixed: what is delivered is where it stood
    assert "signs, fixed at 60 %" in (tmp_path / "planes.svg").read_text(encoding="utf-8")


def test_the_benchmarks_readme_has_a_line_for_every_command() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for file in (ROOT / "benchmarks").rglob("*.py"):
        assert f"`{file.name}`" in page, file
    for name in re.findall(r"`(\w+\.py)`", page):
        assert list((ROOT / "benchmarks").rglob(name)), name
