"""Sweeps: what runs share changes no byte of them, what is done is not done again, the front is the front."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

import csqcli
from csqcli import pipeline
from csqcli.errors import UserError
from csqcli.sweeping import folder, launching, page, running, summary
from csqcli.sweeping.launching import environment, run_elsewhere
from csqcli.sweeping.plan import Member, Sweep
from csqcli.sweeping.sweep import _next, least_target
from csqcli.system.progress import Display
from csqcli.training import phase, post_training
from csqcli.training.run import weights_hash
from tests.reporting.test_page import Page

QUICK: dict[str, Any] = {"recipe": "digits", "epochs": 2, "max_steps": 4, "threads": 1}
FLOAT = {"adaptation.epochs": 1, "adaptation.lr": 0.02, "optimizer.distill": 0.5, "model.head": "new"}


class Killed(Exception):
    pass


def sweep(output: Path, **more: Any) -> dict[str, Any]:
    return csqcli.sweep(output=output, **{**QUICK, "targets": [1.5, 3], **more})


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def never(*_: object, **__: object) -> None:
    raise AssertionError("something that is known was done again")


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("cold")
    return output, sweep(output, warm=False, baselines=["ste"], **FLOAT)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("warm")
    return output, sweep(output, warm=True, **FLOAT)


def test_a_run_of_a_sweep_is_byte_for_byte_that_of_csq_search(
    cold: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output, found = cold
    report = csqcli.search(output=tmp_path, target_bits=1.5, **QUICK, **FLOAT)
    assert model(output / "staged-1.5bit") == model(tmp_path)
    own = json.loads((output / "staged-1.5bit" / "report.json").read_text())
    assert own["adaptation"] == report["adaptation"]
    assert [line["phase"] for line in own["history"]] == ["float", "search", "search"]
    (row,) = [row for row in found["runs"] if row["run"] == "staged-1.5bit"]
    assert (row["top1"], row["mean_bits"]) == (report["accuracy"]["hard_top1"], report["budget"]["mean_bits"])
    assert found["float"]["top1"] == report["accuracy"]["float_top1"]


def test_a_network_that_draws_numbers_draws_the_same_after_a_shared_float_phase(tmp_path: Path) -> None:
    drawing = {"model": "plain_models:dropout_cnn", "pretrained": False, "model.checkpoint": None}
    drawing |= {"method": "staged", **FLOAT}
    sweep(tmp_path / "sweep", warm=False, targets=[1.5], **drawing)
    csqcli.search(output=tmp_path / "alone", target_bits=1.5, **QUICK, **drawing)
    assert model(tmp_path / "sweep" / "staged-1.5bit") == model(tmp_path / "alone")


def test_the_float_phase_and_its_accuracy_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, evaluated = [], []
    train, measure = phase.train, csqcli.training.run.Run.measure_float  # type: ignore[attr-defined]
    monkeypatch.setattr(
        phase, "train", lambda run, name, *rest, **more: (trained.append(name), train(run, name, *rest, **more))[1]
    )
    monkeypatch.setattr("csqcli.training.run.Run.measure_float", lambda run: (evaluated.append(1), measure(run))[1])
    sweep(tmp_path, targets=[2, 3], warm=False, **FLOAT)
    assert trained == ["float", "search", "search"]
    assert len(evaluated) == 2  # as the model came, and adapted


def test_importance_is_measured_once_without_training_and_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "epochs": 0, "images": 64}
    csqcli.search(output=tmp_path / "alone", target_bits=1.5, **settings)
    calls = []
    original = post_training.fisher_importance
    monkeypatch.setattr(post_training, "fisher_importance", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    found = sweep(tmp_path / "sweep", epochs=0, images=64)
    assert len(calls) == 1
    assert [row["run"] for row in found["runs"]] == ["ptq-3bit", "ptq-1.5bit"]
    assert model(tmp_path / "sweep" / "ptq-1.5bit") == model(tmp_path / "alone")


def test_an_allocators_importance_is_measured_once_and_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"quantization.method": "lsq", "quantization.allocator": "importance"}
    csqcli.search(output=tmp_path / "alone", target_bits=1.5, **QUICK, **settings)
    from csqcli.quant.allocators import importance

    calls = []
    original = importance.fisher_importance
    monkeypatch.setattr(importance, "fisher_importance", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    sweep(tmp_path / "sweep", **settings)
    assert len(calls) == 1
    assert model(tmp_path / "sweep" / "lsq-1.5bit") == model(tmp_path / "alone")


def test_a_warm_run_is_what_its_recipe_repeats_and_is_compared_with_the_float_model(
    warm: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output, found = warm
    folder = output / "staged-1.5bit-from3"
    assert [(row["run"], row["epochs"], row["begins_with"]) for row in found["runs"]] == [
        ("staged-3bit", 2, None),
        ("staged-1.5bit-from3", 1, "staged-3bit"),
    ]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["model"]["warm_start"] == str(output / "staged-3bit" / "latents.safetensors")
    report = csqcli.search(output=tmp_path / "again", recipe=str(folder / "recipe.yaml"))
    assert model(tmp_path / "again") == model(folder)
    assert report["accuracy"]["float_top1"] == found["float"]["top1"]


def test_latents_round_to_the_model_that_they_stand_behind(warm: tuple[Path, dict[str, Any]]) -> None:
    folder = warm[0] / "staged-3bit"
    latents = load_file(folder / "latents.safetensors")
    hard = csqcli.load(folder / "model.safetensors").state_dict()
    assert latents.keys() == hard.keys()
    report = json.loads((folder / "report.json").read_text())
    for layer in report["layers"]:
        name, most = layer["name"], 2 ** layer["bits"] - 1
        scale = torch.tensor(layer["scale"]).view(-1, *[1] * (hard[name].dim() - 1))
        nearest = (latents[name] / scale).round().clamp(-most, most) * scale
        assert torch.allclose(nearest, hard[name], atol=1e-6), name
    untouched = [name for name in hard if name not in {layer["name"] for layer in report["layers"]}]
    assert all(torch.equal(latents[name], hard[name]) for name in untouched)


def test_a_finished_sweep_trains_nothing_and_says_the_same(
    cold: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, found = cold
    pages = {name: (output / name).read_bytes() for name in ("pareto.json", "pareto.html", "pareto-bytes.svg")}
    monkeypatch.setattr(phase, "train", never)
    monkeypatch.setattr("csqcli.training.evaluate.evaluate", never)
    assert sweep(output, warm=False, baselines=["ste"], **FLOAT) == found
    assert {name: (output / name).read_bytes() for name in pages} == pages
    assert json.loads(pages["pareto.json"]) == found


@pytest.mark.parametrize(("killed_in", "number"), [("float", 1), ("search", 1), ("search", 2)])
def test_a_sweep_killed_anywhere_ends_in_the_same_bytes(
    warm: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str, number: int
) -> None:
    original, seen = phase._Epochs._after_step, []

    def killing(self: Any, epoch: int, batch: int, losses: Any) -> None:
        original(self, epoch, batch, losses)
        if self.phase == killed_in and (epoch, batch) == (0, 3):
            seen.append(1)
            if len(seen) == number:
                self._save(epoch, batch, losses)
                raise Killed

    monkeypatch.setattr(phase._Epochs, "_after_step", killing)
    with pytest.raises(Killed):
        sweep(tmp_path, warm=True, **FLOAT)
    monkeypatch.undo()
    torch.manual_seed(99)  # whatever this process did before
    found = sweep(tmp_path, warm=True, **FLOAT)
    # the recipe inside a file names the latents by their path, so integers and accuracy are what is compared
    for row in found["runs"]:
        ours, theirs = (json.loads((folder / row["run"] / "report.json").read_text()) for folder in (tmp_path, warm[0]))
        assert ours["payload_sha256"] == theirs["payload_sha256"]
        assert ours["accuracy"] == theirs["accuracy"]
    assert model(tmp_path / "staged-3bit") == model(warm[0] / "staged-3bit")


def test_bytes_are_those_on_disk_and_every_baseline_is_beside(cold: tuple[Path, dict[str, Any]]) -> None:
    output, found = cold
    assert [row["run"] for row in found["runs"]] == ["staged-3bit", "staged-1.5bit", "ste-3bit"]
    assert found["left_out"] == ["ste at 1.5: it gives every layer the same planes"]
    for row in found["runs"]:
        packed = output / row["run"] / "model-bit-packed.safetensors"
        assert row["bytes"] == packed.stat().st_size
        assert row["compression"] == found["float"]["bytes"] / row["bytes"]
        assert csqcli.evaluate(packed, "digits")["top1"] == row["top1"]
    compared = csqcli.compare(*(output / row["run"] for row in found["runs"]))
    assert [entry["hard_top1"] for entry in compared["models"]] == [row["top1"] for row in found["runs"]]


rows = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=7)


@given(rows)
def test_the_front_is_what_no_other_run_dominates(drawn: list[tuple[int, int]]) -> None:
    found = [{"bytes": size, "top1": float(top1)} for size, top1 in drawn]
    for row, (size, top1) in zip(found, drawn, strict=True):
        beaten = any(s <= size and t >= top1 and (s, t) != (size, top1) for s, t in drawn)
        assert summary._is_best(row, found, "bytes") is not beaten


@given(st.integers(4, 20), st.booleans())
def test_the_search_for_a_drop_ends_at_the_lowest_target_that_holds_it(lowest: int, ends_low: bool) -> None:
    """Where accuracy falls evenly, on a grid of quarters of planes; ``lowest`` in quarters."""
    tried = {4.0: lowest <= 16, 5.0: True} | ({1.0: lowest <= 4} if ends_low else {})
    asked = []
    while (target := summary.next_target(tried, least=1.0)) is not None:
        assert target not in tried
        asked.append(target)
        tried[target] = 4 * target >= lowest
    assert min(target for target, holds in tried.items() if holds) == lowest / 4
    assert len(asked) <= 4  # log2 of the quarters between 1 and 4


@given(st.integers(1, 8), st.integers(1, 8))
def test_in_whole_planes_every_target_that_is_asked_for_is_whole(lowest: int, begins: int) -> None:
    tried = {float(begins): lowest <= begins}
    while (target := summary.next_target(tried, least=1, resolution=1.0)) is not None:
        assert target not in tried
        assert target in range(1, begins)
        tried[target] = target >= lowest
    if lowest <= begins:
        assert min(target for target, holds in tried.items() if holds) == lowest


def test_max_drop_looks_at_whole_planes_where_every_layer_gets_the_same(tmp_path: Path) -> None:
    found = sweep(tmp_path, targets=None, max_drop=100, method="lsq")
    assert [row["run"] for row in found["runs"]] == ["lsq-4bit", "lsq-2bit", "lsq-1bit"]
    assert found["max_drop"]["run"] == "lsq-1bit"


def test_max_drop_begins_where_a_method_of_one_plane_can() -> None:
    assert planned(targets=None, max_drop=1.0, overrides={"quantization.method": "twn"}).planes == [1.0]
    assert planned(targets=None, max_drop=1.0).planes == [4.0]


def test_what_is_known_is_on_disk_before_the_search_for_a_drop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = running.run_here

    def failing(members: Sequence[Member], *rest: Any, **more: Any) -> Any:
        if members[0].key != "ptq-4bit":
            raise UserError("no luck")
        return original(members, *rest, **more)

    monkeypatch.setattr(running, "run_here", failing)
    with pytest.raises(UserError, match="no luck"):
        sweep(tmp_path, epochs=0, images=64, targets=None, max_drop=100)
    known = json.loads((tmp_path / "pareto.json").read_text())
    assert [row["run"] for row in known["runs"]] == ["ptq-4bit"]
    assert known["max_drop"]["run"] == "ptq-4bit"
    assert (tmp_path / "pareto.html").is_file()


REPORT = {"layers": [{"name": "stem.weight", "weights": 100}, {"name": "fc.weight", "weights": 300}]}


@pytest.mark.parametrize(
    ("method", "rules", "least"),
    [
        ("staged", {}, 1.0),
        ("staged", {"layers.floor": 0}, 0.25),
        ("staged", {"layers.min_bits": {"fc": 3}}, 2.5),  # (1·100 + 3·300) / 400
        ("staged", {"layers.keep": ["stem"]}, 2.75),  # (8·100 + 1·300) / 400
        ("msq", {}, 1.0),
        ("lsq", {}, 1.0),
        ("lsq", {"layers.min_bits": {"stem": 4}}, 4.0),  # at 3 everywhere else the mean would be 3.25
        ("lsq", {"layers.max_bits": {"stem": 2}}, 1.0),
        ("lsq", {"layers.keep": ["stem"]}, 8.0),
    ],
)
def test_the_search_for_a_drop_ends_where_the_rules_leave_no_room(
    method: str, rules: dict[str, Any], least: float
) -> None:
    asked = planned(targets=None, max_drop=1.0, overrides={"epochs": 10, "quantization.method": method, **rules})
    assert least_target(asked, REPORT) == least


def test_a_fraction_under_rules_stands_for_its_whole_part_in_the_search_for_a_drop(tmp_path: Path) -> None:
    rules = {"quantization.method": "lsq", "layers.min_bits": {"fc": 3}}
    asked = planned(targets=None, max_drop=1.0, output=tmp_path, overrides={"epochs": 10, **rules})
    (first,) = asked.members_at(4)
    (tmp_path / first.key).mkdir()
    (tmp_path / first.key / "report.json").write_text(json.dumps(REPORT))

    def after(*top1s: tuple[float, float]) -> float | None:
        groups = [{"method": "lsq", "target_bits": target, "top1": top1} for target, top1 in top1s]
        return _next(asked, first, {"float": {"top1": 90.0}, "groups": groups})

    assert after((5.5, 90.0)) == 4  # least is 3: 100 weights at 2 planes and 300 at 3 are 2.75 in the mean, over 2
    assert after((5.5, 90.0), (4, 80.0)) is None
    assert after((5.5, 90.0), (4, 90.0)) == 3


def test_max_drop_finds_the_smallest_file_that_holds_it(tmp_path: Path) -> None:
    found = sweep(tmp_path, epochs=0, images=64, targets=None, max_drop=2.0)
    holding = [row for row in found["runs"] if row["top1"] >= found["float"]["top1"] - 2.0 - 1e-9]
    assert found["max_drop"]["run"] == min(holding, key=lambda row: row["bytes"])["run"]
    assert 2 < len(found["runs"]) <= 6
    with pytest.raises(UserError, match="no target is within 0 points of float"):
        sweep(tmp_path, epochs=0, images=64, targets=[1], max_drop=0)
    assert (tmp_path / "pareto.html").is_file()


def test_a_target_that_cannot_be_met_is_told_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"target_bits 0.5 cannot be met: the layer rules alone need 1"):
        sweep(tmp_path, targets=[3, 0.5])
    assert not (tmp_path / "staged-3bit").exists()
    assert not (tmp_path / "start" / "start.json").exists()


def test_another_sweeps_folder_and_a_runs_folder_are_refused(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    output, _ = cold
    with pytest.raises(UserError, match=r"a sweep with other settings \(epochs 2 there, 3 here\)"):
        sweep(output, epochs=3, warm=False, **FLOAT)
    with pytest.raises(UserError, match="holds a run, not a sweep"):
        sweep(output / "staged-3bit")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        sweep(tmp_path / "file")


def test_latents_that_are_gone_are_one_line(tmp_path: Path) -> None:
    sweep(tmp_path, targets=[3], warm=True)
    (tmp_path / "staged-3bit" / "latents.safetensors").unlink()
    with pytest.raises(UserError, match="is gone, and others begin with it"):
        sweep(tmp_path, warm=True)


# -- seeds

BRIEF: dict[str, Any] = {"epochs": 1, "max_steps": 1, "targets": [3, 2]}


def test_a_second_seed_runs_only_what_is_new_and_begins_with_the_same_float_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sweep(tmp_path, warm=True, **BRIEF, **FLOAT)
    held = model(tmp_path / "staged-3bit")
    trained, train = [], phase.train
    monkeypatch.setattr(phase, "train", lambda run, name, *a, **k: (trained.append(name), train(run, name, *a, **k))[1])
    found = sweep(tmp_path, warm=True, seeds=2, **BRIEF, **FLOAT)
    assert trained == ["search", "search"]
    assert model(tmp_path / "staged-3bit") == held
    assert [(row["run"], row["seed"], row["begins_with"]) for row in found["runs"]] == [
        ("staged-3bit", 0, None),
        ("staged-2bit-from3", 0, "staged-3bit"),
        ("staged-3bit-seed1", 1, None),
        ("staged-2bit-from3-seed1", 1, "staged-3bit-seed1"),
    ]
    shared = ("top1", "bytes", "mean_bits", "gap")
    assert [[row[key] for key in shared] for row in found["runs"][:2]] == [
        [row[key] for key in shared] for row in before["runs"]
    ]
    reports = [json.loads((tmp_path / row["run"] / "report.json").read_text()) for row in found["runs"]]
    assert len({report["adaptation"]["adapted_top1"] for report in reports}) == 1
    assert len({report["inputs"]["weights_sha256"] for report in reports}) == 1  # the fresh head too
    assert len({report["payload_sha256"] for report in reports}) == 4
    recipe = yaml.safe_load((tmp_path / "staged-2bit-from3-seed1" / "recipe.yaml").read_text())
    assert (recipe["seed"], Path(recipe["model"]["warm_start"]).parent.name) == (1, "staged-3bit-seed1")


def test_without_a_shared_float_phase_a_further_seed_is_what_its_recipe_repeats(tmp_path: Path) -> None:
    sweep(tmp_path / "sweep", seeds=2, **(BRIEF | {"targets": [2]}))
    csqcli.search(output=tmp_path / "alone", recipe=str(tmp_path / "sweep" / "staged-2bit-seed1" / "recipe.yaml"))
    assert model(tmp_path / "sweep" / "staged-2bit-seed1") == model(tmp_path / "alone")


@pytest.mark.parametrize("fresh", [{"pretrained": False, "model.checkpoint": None}, {"model.head": "new"}])
def test_fresh_weights_are_those_of_the_first_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: dict[str, Any]
) -> None:
    opened, open_model = [], pipeline.open_model

    def watched(*given: Any) -> Any:
        fitted = open_model(*given)
        opened.append(weights_hash(fitted.loaded.model))
        return fitted

    monkeypatch.setattr(pipeline, "open_model", watched)
    found = sweep(tmp_path, seeds=2, method="ste", **(BRIEF | {"targets": [3]}), **fresh)
    assert len(opened) == 3  # what is shared, and a run of each seed
    assert len(set(opened)) == 1
    assert (
        found["runs"][0]["top1"] != found["runs"][1]["top1"] or found["runs"][0]["bytes"] != found["runs"][1]["bytes"]
    )


def test_a_further_seed_killed_and_resumed_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": 1, "max_steps": 2, "targets": [2], "seeds": 2, **FLOAT}
    whole = sweep(tmp_path / "whole", **settings)
    original = phase._Epochs._after_step

    def killing(self: Any, epoch: int, batch: int, losses: Any) -> None:
        original(self, epoch, batch, losses)
        if self.phase == "search" and self.run.recipe.seed == 1 and batch == 1:
            self._save(epoch, batch, losses)
            raise Killed

    monkeypatch.setattr(phase._Epochs, "_after_step", killing)
    with pytest.raises(Killed):
        sweep(tmp_path / "killed", **settings)
    monkeypatch.undo()
    torch.manual_seed(99)  # whatever this process did before
    found = sweep(tmp_path / "killed", **settings)
    for name in ("staged-2bit", "staged-2bit-seed1"):
        assert model(tmp_path / "killed" / name) == model(tmp_path / "whole" / name)
    assert [row["top1"] for row in found["runs"]] == [row["top1"] for row in whole["runs"]]


def test_groups_are_means_and_sample_deviations_and_the_front_is_theirs() -> None:
    def run(method: str, seed: int, top1: float, size: int) -> dict[str, Any]:
        return {
            **{"run": f"{method}-{seed}", "method": method, "target_bits": 2.0, "top1": top1, "bytes": size},
            **{"mean_bits": 1.9 + 0.1 * seed, "bops": 100 + seed, "epochs": 1},
        }

    # `even` is better in the mean, though the best single run is of `uneven`
    even = [run("even", seed, top1, 1000 + seed) for seed, top1 in enumerate((95.0, 95.2, 95.7))]
    uneven = [run("uneven", seed, top1, 2000) for seed, top1 in enumerate((99.0, 90.0, 92.0))]
    groups = summary.grouped(even + uneven, float_top1=96.0, float_bytes=10010)
    first, second = groups
    assert (first["group"], first["runs"], first["n"]) == ("even-0", ["even-0", "even-1", "even-2"], 3)
    assert first["top1"] == pytest.approx(95.3)
    assert first["top1_sd"] == statistics.stdev([95.0, 95.2, 95.7])
    # deviations −0.3, −0.1, 0.4 → squares 0.26 over n − 1 = 2
    assert first["top1_sd"] == pytest.approx(0.13**0.5)
    assert (first["bytes"], first["bops"], first["compression"]) == (1001, 101, 10.0)
    assert first["mean_bits"] == pytest.approx(2.0)
    assert first["gap"] == pytest.approx(-0.7)
    assert second["top1"] == pytest.approx(281 / 3)
    assert [row["on_front_bytes"] for row in even + uneven] == [True] * 3 + [False] * 3
    assert (first["on_front_bops"], second["on_front_bops"]) == (True, False)
    # a run within half a point of float does not make its group so
    assert summary._within(groups, 96.0, 0.5)["run"] is None
    assert summary._within(groups, 96.0, 0.8) == {"asked": 0.8, "reached": pytest.approx(0.7), "run": "even-0"}


def test_a_group_of_one_seed_is_its_run() -> None:
    found = hand_made()
    same = ("method", "target_bits", "top1", "gap", "mean_bits", "bytes", "compression", "bops", "epochs")
    for row, group in zip(found["runs"], found["groups"], strict=True):
        assert [row[key] for key in same] == [group[key] for key in same]
        assert (group["group"], group["n"], group["top1_sd"]) == (row["run"], 1, None)
        assert row["on_front_bytes"] is row["on_front_bops"] is (row["target_bits"] != 2.5)


def test_page_figures_and_table_hold_means_and_bars_where_there_are_several_seeds() -> None:
    one, three = hand_made(), hand_made(seeds=3)
    for found, bars in ((one, 0), (three, 4)):
        figures = page.figures(found)
        assert [figure.svg().count('class="line s0"') for figure in figures] == [bars, bars]
        text = page.pareto_page(found, figures, command="csq sweep")
        shown = Page(text)
        assert ('id="group-table"' in text) is (found is three)
        assert ("One run is one draw" in shown.text) is (found is one)
    # top-1 of three seeds: 90, 90.5, 91 → 90.50 ± 0.50
    for words in (
        "90.50 ± 0.50 %",
        "seeds 0 to 2",
        "given one float network",
        "± one standard deviation",
        "net-4bit-seed2",
    ):
        assert words in shown.text, words
    for width in (60, 80, 120):
        console = Console(file=io.StringIO(), width=width)
        page.print_sweep(three, console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        assert [line.split()[0] for line in lines if line.startswith("net-")] == [
            f"net-{target}bit" for target in ("4", "2", "2.5", "1")
        ]
        assert any("90.50 ± 0.50" in line for line in lines)


# -- processes of their own


class Fake:
    """A launcher whose jobs end when they are asked, in the order in which they were started; one may fail."""

    poll_seconds = 0.0

    def __init__(self, fails: Sequence[str] = ()) -> None:
        self.fails, self.running, self.most, self.started = set(fails), list[str](), 0, list[str]()
        self.stopped: list[str] = []
        self.waited: list[str] = []

    def start(self, command: Sequence[str], *, name: str, log: Path, slot: int) -> Any:
        assert list(command[-2:]) == [str(log.parent), name]
        self.started.append(name)
        self.running.append(name)
        self.most = max(self.most, len(self.running))
        outer = self

        class Job:
            def ended(self) -> str | None:
                if name == "interrupt":
                    raise KeyboardInterrupt
                if outer.running[0] != name:
                    return None
                outer.running.pop(0)
                return "csq: error: no luck" if name in outer.fails else ""

            def stop(self) -> None:
                outer.stopped.append(name)

            def wait(self) -> None:
                assert len(outer.stopped) == 2  # all were asked before one is waited for
                outer.waited.append(name)

        return Job()


def members(*keys: str, begin_with: str | None = None) -> list[Member]:
    return [Member(key, "staged", 1.0, None, begin_with if key != begin_with else None) for key in keys]  # type: ignore[arg-type]


def test_runs_wait_for_what_they_begin_with_and_for_a_free_place(tmp_path: Path) -> None:
    fake = Fake()
    run_elsewhere(members("a", "b", "c", "d", begin_with="b"), tmp_path, fake, jobs=2, display=Display(quiet=True))
    assert fake.started[:2] == ["start", "b"]
    assert sorted(fake.started) == ["a", "b", "c", "d", "start"]
    assert fake.most == 2


def test_after_a_failure_what_needs_it_is_not_begun_and_the_rest_is(tmp_path: Path) -> None:
    fake = Fake(fails=["b"])
    runs = members("a", "b", begin_with="b") + members("lone")
    with pytest.raises(UserError, match="1 run failed: no luck"):
        run_elsewhere(runs, tmp_path, fake, jobs=3, display=Display(quiet=True))
    assert fake.started == ["start", "b", "lone"]


def test_an_interruption_asks_every_run_to_save(tmp_path: Path) -> None:
    fake = Fake()
    with pytest.raises(KeyboardInterrupt):
        run_elsewhere(members("a", "interrupt", "b"), tmp_path, fake, jobs=3, display=Display(quiet=True))
    assert fake.stopped == ["interrupt", "b"]  # the first had ended
    assert fake.waited == ["interrupt", "b"]


def test_cores_are_shared_out_and_gpus_go_round() -> None:
    assert environment(0, 2, cores=8, set_already={}, gpus=[]) == {"OMP_NUM_THREADS": "4"}
    assert environment(5, 4, cores=2, set_already={}, gpus=["0"]) == {"OMP_NUM_THREADS": "1"}
    found = [environment(slot, 3, cores=8, set_already={"OMP_NUM_THREADS": "2"}, gpus=["4", "7"]) for slot in range(3)]
    assert found == [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "7", "4")]


def test_processes_of_their_own_give_the_same_bytes(csq: Any, tmp_path: Path) -> None:
    here = sweep(tmp_path / "here", targets=[2], epochs=0, images=64)
    settings = ("--set", "max_steps=4", "--set", "threads=1", "--set", "images=64")
    code, out, err = csq(
        *("sweep", "--recipe", "digits", "--targets", 2, "--epochs", 0, *settings, "--jobs", 2, "--launcher", "local"),
        *("-o", tmp_path / "there", "--json", "-q"),
    )
    assert code == 0, err
    there = json.loads(out)
    assert model(tmp_path / "there" / "ptq-2bit") == model(tmp_path / "here" / "ptq-2bit")
    assert {**there["runs"][0], "bytes": 0, "compression": 0} == {**here["runs"][0], "bytes": 0, "compression": 0}
    assert abs(there["runs"][0]["bytes"] - here["runs"][0]["bytes"]) <= 16  # the certificate says how long loading took
    assert "reading calibration images" not in (tmp_path / "there" / "start.log").read_text()


def test_jobs_of_submitit_run_the_same_commands(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    launcher = launching.Submitit(tmp_path / "jobs", {"timeout_min": 5}, cluster="local")
    launcher.poll_seconds = 0.2
    ok, bad = (
        launcher.start([sys.executable, "-c", code], name="x", log=tmp_path / "x", slot=0) for code in ("", "1/0")
    )
    outcomes: list[str | None] = [None, None]
    for _ in itertools.repeat(None, 300):
        outcomes = [
            before if before is not None else job.ended() for before, job in zip(outcomes, (ok, bad), strict=True)
        ]
        if None not in outcomes:
            break
        time.sleep(0.2)
    assert outcomes[0] == ""
    assert outcomes[1]


# -- the plan


def planned(**more: Any) -> Sweep:
    settings = {"recipe": "digits", "overrides": {"epochs": 10}, "output": None, "targets": [1, 2, 4]}
    return Sweep(**{**settings, **more})


def test_targets_are_numbers_and_those_that_are_none_are_refused() -> None:
    third = 1 / 3
    assert planned(targets=[third, 2], overrides={"epochs": 10, "layers.floor": 0}).planes == [2.0, third]
    for targets, why in (
        ([2, 0], "`0` is no target"),
        ([8.5], "`8.5` is no target"),
        ([math.nan], "`nan` is no target"),
        (["2"], "`2` is no target"),
        ([2, 1, 2.0], "2 is there twice"),
    ):
        with pytest.raises(UserError, match=why):
            planned(targets=targets)


def test_five_warm_targets_cost_at_most_three_runs() -> None:
    for epochs in range(2, 40):
        runs = planned(targets=[1, 1.5, 2, 3, 4], overrides={"epochs": epochs}, warm=True).members()
        assert sum(member.recipe.epochs for member in runs) <= 3 * epochs, epochs


def test_every_target_and_method_has_every_seed_after_the_recipes_own() -> None:
    sweep = planned(overrides={"epochs": 10, "seed": 5}, targets=[2, 4], baselines=["lsq"], seeds=2)
    assert [(run.key, run.recipe.seed) for run in sweep.members()] == [
        *(("staged-4bit", 5), ("staged-2bit", 5), ("lsq-4bit", 5), ("lsq-2bit", 5)),
        *(("staged-4bit-seed6", 6), ("staged-2bit-seed6", 6), ("lsq-4bit-seed6", 6), ("lsq-2bit-seed6", 6)),
    ]
    assert [run.key for run in sweep.members_at(3)] == ["staged-3bit", "staged-3bit-seed6"]


def test_settings_of_the_methods_own_do_not_reach_baselines() -> None:
    runs = planned(overrides={"epochs": 10, "staged.recovery": 0.5, "seed": 3}, baselines=["lsq", "csq"]).members()
    assert {(run.method, run.recipe.seed) for run in runs} == {("staged", 3), ("lsq", 3), ("csq", 3)}
    assert all(run.recipe.method_settings.recovery == 0.5 for run in runs if run.method == "staged")  # type: ignore[attr-defined]


def left_out(baseline: str, **overrides: Any) -> tuple[list[float], list[str]]:
    """The targets that a baseline runs at, and why not at the others."""
    asked = planned(targets=[0.5, 1, 1.5, 2], overrides={"epochs": 10, **overrides}, baselines=[baseline])
    return [run.target for run in asked.members() if run.method == baseline], asked.left_out()


def test_what_a_baseline_cannot_do_is_left_out_and_the_rest_is_run() -> None:
    assert left_out("twn") == (
        [1.0],
        [
            "twn at 2: it has layers of 1 plane at most",
            "twn at 1.5: it has layers of 1 plane at most",
            "twn at 0.5: it has layers of 1 plane at least",
        ],
    )
    assert left_out("csq-uniform")[0] == [2.0, 1.0]  # which has no least
    assert left_out("bsq") == ([2.0, 1.5, 1.0, 0.5], [])
    mixed = {"quantization.allocator": "importance"}
    assert left_out("lsq", **mixed) == ([2.0, 1.5, 1.0], ["lsq at 0.5: it has layers of 1 plane at least"])


def test_a_baseline_that_the_rules_leave_no_layer_is_left_out() -> None:
    why = "it has layers of 1 plane at least"
    assert left_out("lsq", **{"layers.floor": 0}) == (
        [],
        [f"lsq at {bits}: {why}" for bits in ("2", "1.5", "1", "0.5")],
    )
    for rules in ({"layers.keep": ["fc"]}, {"layers.min_bits": {"fc": 2}}):
        assert left_out("xnor", **rules)[0] == []


def test_a_method_that_keeps_no_unrounded_weights_is_not_one_to_begin_with() -> None:
    outside = {"epochs": 10, "quantization.method": "tests.outside:Ternary"}
    assert not planned(overrides=outside).base.card.keeps_unrounded
    with pytest.raises(UserError, match="`ternary` does not keep weights from before they were rounded"):
        planned(overrides=outside, warm=True)
    assert planned(
        overrides={"epochs": 10, "quantization.method": "benchmarks.accuracy.rivals:Brevitas"}
    ).base.card.keeps_unrounded


# -- the page and the table


def hand_made(name: str = "net", *, seeds: int = 1) -> dict[str, Any]:
    """Four targets at round numbers, of which the third is beaten; further seeds are half a point better each."""
    lines = [(4, 90.0, 4000, 400), (2, 89.0, 2000, 200), (2.5, 88.0, 2500, 250), (1, 70.0, 1000, 100)]
    runs: list[dict[str, Any]] = [
        {"run": f"{name}-{target:g}bit{f'-seed{seed}' if seed else ''}", "method": name, "target_bits": target}
        | {"seed": seed, "mean_bits": target, "top1": top1 + 0.5 * seed}
        | {
            "gap": top1 + 0.5 * seed - 91.0,
            "bytes": size,
            "compression": 32000 / size,
            "bops": bops,
            "epochs": 3,
            "begins_with": None,
        }
        for seed in range(seeds)
        for target, top1, size, bops in lines
    ]
    groups = summary.grouped(runs, float_top1=91.0, float_bytes=32000)
    return {
        **{
            "model": name,
            "data": name,
            "samples": 500,
            "epochs": 3,
            "seed": 0,
            "seeds": seeds,
            "groups": groups,
            "warm": False,
            "form": "bit-packed",
        },
        **{"float": {"top1": 91.0, "bytes": 32000, "bops": 10240}, "trained_epochs": 12, "runs": runs, "left_out": []},
        "max_drop": {"asked": 2.0, "reached": 2.0, "run": f"{name}-2bit"},
    }


def test_the_page_is_well_formed_says_the_numbers_and_takes_no_markup_from_names() -> None:
    hostile = "</svg><script>alert(1)</script>\"'&"
    for name in ("net", hostile):
        found = hand_made(name)
        text = page.pareto_page(found, page.figures(found), command=f"csq sweep {name}")
        shown = Page(text)
        assert {attributes["id"] for attributes in shown.all("figure")} == {"pareto-bytes", "pareto-bops"}
        for words in ("91.00 %", "float 91.00 %", "Smallest within 2 points", "2,500", "16.00×", "−21.00"):
            assert words in shown.text, words
        assert text.count("<script>") == 1
        for attributes in (attributes for _, attributes in shown.tags):
            assert (attributes.get("href") or "#").startswith(("#", "data:"))


def test_the_table_marks_the_front_and_fits_the_terminal() -> None:
    for width in (60, 80, 120, 200):
        console = Console(file=io.StringIO(), width=width)
        page.print_sweep(hand_made(), console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        rows = {line.split()[0]: line for line in lines if line.startswith("net-")}
        assert [name for name, line in rows.items() if "bytes" in line] == ["net-4bit", "net-2bit", "net-1bit"]
        assert all(f"{size:,}" in line for size, line in zip((4000, 2000, 2500, 1000), rows.values(), strict=True))
        assert any("smallest" in line and "net-2bit" in line for line in lines)


def test_a_sweep_from_other_weights_is_another_sweep(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "a")):
        asked = planned(output=tmp_path / "sweep", overrides={"epochs": 10, "model.warm_start": f"{name}.safetensors"})
        with contextlib.ExitStack() as stack:
            if name == "b":
                stack.enter_context(
                    pytest.raises(UserError, match=r"other settings \(model.warm_start a.safetensors there")
                )
            with folder.opened(asked):
                folder.write_plan(asked, asked.members() if number == 0 else [])
