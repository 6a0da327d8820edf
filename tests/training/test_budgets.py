"""Budgets in milliseconds, and several at once: each is kept, counted here by hand, and the report says what was reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.test_options import TABLE

from csqcli import finetuning, pipeline
from csqcli.errors import UserError
from csqcli.exporting import latency_table
from csqcli.file import io
from csqcli.quant.costs import LayerFacts, latency_cost
from csqcli.recipe.resolve import resolve
from csqcli.system.progress import Display
from csqcli.training.latencies import Latencies, read_table

QUIET = Display(quiet=True)
SHORT = {"epochs": 2, "max_steps": 4}


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    return str(path)


def milliseconds(report: dict[str, Any]) -> float:
    """What TABLE says of a report's planes where inputs have 8 bits: written out for that table."""
    times = {"conv1.weight": (0.5,) * 7, "conv2.weight": (1.0,) * 7, "conv3.weight": (2.0,) * 7}
    times["fc.weight"] = (0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3)
    return 1.0 + sum(times[layer["name"]][layer["bits"] - 1] for layer in report["layers"])


def reached(report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {one["budget"]: (one["asked"], one["reached"]) for one in report["budgets"]}


def test_the_narrowest_kernel_that_holds_the_planes_is_counted() -> None:
    cost = latency_cost(
        {"a": {"fp32": 90, "int8": 50, "int4": 30}, "odd": {"fp32": 10, "int8": 40, "int2": 60}, "none": {}}
    )

    def row(name: str, input_bits: int) -> list[int]:
        return [cost(LayerFacts(name, (4,), 4, input_bits=input_bits), planes) for planes in range(9)]

    assert row("a", 8) == [30, 30, 30, 30, 50, 50, 50, 50, 90]  # ±1 and ±7 in int4, ±15 to ±127 in int8, ±255 in float
    assert row("a", 32) == [90] * 9
    assert row("odd", 8) == [60] * 9  # a narrower kernel that is slower: no fewer nanoseconds for more planes
    assert row("none", 8) == [0] * 9


@pytest.mark.parametrize("asked", [4.6, 4.7, 4.85, 9.0])
def test_milliseconds_are_kept_and_said(asked: float, table: str, tmp_path: Path) -> None:
    settings = {"quantization.target_latency": asked, "quantization.latency_table": table, "quantization.act_bits": 8}
    report = pipeline.search(resolve("digits", SHORT | settings), tmp_path / "run", display=QUIET)
    assert reached(report)["latency"] == (asked, pytest.approx(milliseconds(report)))
    assert milliseconds(report) <= asked + 1e-9
    fc = report["layers"][-1]["bits"]  # what the engine does not tell apart is free
    assert fc == (1 if asked < 4.7 else 3 if asked < 4.8 else 7)
    assert all(layer["bits"] == 7 for layer in report["layers"][:-1])


def test_without_rounded_inputs_the_planes_make_no_difference(table: str, tmp_path: Path) -> None:
    settings = {"quantization.target_latency": 7.4, "quantization.latency_table": table}
    report = pipeline.search(resolve("digits", SHORT | settings), tmp_path / "run", display=QUIET)
    assert reached(report)["latency"] == (7.4, pytest.approx(7.4))  # in fp32
    settings["quantization.target_latency"] = 7.39
    less = resolve("digits", SHORT | settings)
    with pytest.raises(UserError, match=r"7\.39 ms cannot be met: at the fewest planes it takes about 7\.4 ms"):
        pipeline.search(less, tmp_path / "less", display=QUIET)
    assert not (tmp_path / "less").exists()


def test_a_finetune_after_the_search_leaves_what_was_asked_and_reached_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"quantization.target_bits": 3, "quantization.act_bits": "auto", "quantization.target_act_bits": 5}
    settings = SHORT | asked | {"finetune.epochs": 1, "max_steps": 2}
    whole = pipeline.search(resolve("digits", settings), tmp_path / "whole", display=QUIET)
    assert reached(whole)["bits"] == (3, whole["budget"]["mean_bits"])
    assert 2 <= reached(whole)["act_bits"][1] <= reached(whole)["act_bits"][0] == 5

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "deliver", stops)
        with pytest.raises(KeyboardInterrupt):
            pipeline.search(resolve("digits", settings), tmp_path / "stopped", display=QUIET)
    stopped = pipeline.search(resolve("digits", settings), tmp_path / "stopped", display=QUIET, resume=True)
    assert stopped["budgets"] == whole["budgets"]


def test_a_run_measures_once_and_a_resumed_one_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = 0

    def measure(*_: object, **__: object) -> Latencies:
        nonlocal measured
        measured += 1
        return Latencies.model_validate(TABLE)

    monkeypatch.setattr(latency_table, "latencies_of", measure)
    settings = SHORT | {"quantization.target_latency": 4.7, "quantization.act_bits": 8, "quantization.target_bits": 3}
    whole = pipeline.search(resolve("digits", settings), tmp_path / "whole", display=QUIET)
    assert measured == 1
    deliver = pipeline.deliver

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "deliver", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.search(resolve("digits", settings), tmp_path / "stopped", display=QUIET)
    monkeypatch.setattr(pipeline, "deliver", deliver)
    assert measured == 2
    stopped = pipeline.search(resolve("digits", settings), tmp_path / "stopped", display=QUIET, resume=True)
    assert measured == 2
    assert stopped["budgets"] == whole["budgets"]
    assert stopped["payload_sha256"] == whole["payload_sha256"]
    # what it left is a table for another run
    again = read_table(tmp_path / "stopped" / "latencies.json")
    assert again.by_layer["fc.weight"] == {"fp32": 400_000, "int8": 300_000, "int4": 200_000, "int2": 100_000}
    assert again.beside == 1_000_000


def test_all_targets_at_once_are_kept(table: str, tmp_path: Path) -> None:
    settings = {
        "quantization.target_bits": 2.5,
        "quantization.target_size": 11_000,
        "quantization.target_bops": 3e6,
        "quantization.target_latency": 4.75,
        "quantization.latency_table": table,
        "quantization.act_bits": 8,
    }
    report = pipeline.search(resolve("digits", SHORT | settings), tmp_path / "run", display=QUIET)
    found = reached(report)
    assert list(found) == ["bits", "size", "bops", "latency"]
    assert all(got <= asked for asked, got in found.values())
    weights = sum(layer["weights"] for layer in report["layers"])
    assert found["bits"][1] == pytest.approx(sum(one["bits"] * one["weights"] for one in report["layers"]) / weights)
    assert found["size"][1] == (tmp_path / "run" / "model-bit-packed-small.safetensors").stat().st_size
    assert found["bops"][1] == sum(layer["macs"] * layer["bits"] * 8 for layer in report["layers"])
    assert found["latency"][1] == pytest.approx(milliseconds(report))


def test_two_targets_without_training_are_kept(tmp_path: Path) -> None:
    settings = {"epochs": 0, "images": 64, "quantization.target_bits": 2.5, "quantization.target_bops": 1e7}
    report = pipeline.search(resolve("digits", settings), tmp_path / "run", display=QUIET)
    found = reached(report)
    assert found["bits"][1] <= 2.5
    assert found["bops"][1] <= 1e7
    assert found["bops"][1] == sum(layer["macs"] * layer["bits"] * 32 for layer in report["layers"])


def test_a_target_that_leaves_room_changes_nothing(tmp_path: Path) -> None:
    settings = SHORT | {"quantization.target_bits": 2.5}
    alone = pipeline.search(resolve("digits", settings | {"method": "staged"}), tmp_path / "a", display=QUIET)
    wide = pipeline.search(
        resolve("digits", settings | {"quantization.target_bops": 1e12}), tmp_path / "b", display=QUIET
    )
    assert [layer["bits"] for layer in alone["layers"]] == [layer["bits"] for layer in wide["layers"]]


@pytest.mark.parametrize("epochs", [0, 2])
def test_too_few_operations_are_refused_before_the_float_model_is_evaluated(
    epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csqcli.training.run.Run.measure_float", lambda run: pytest.fail("evaluated"))
    recipe = resolve("digits", {"epochs": epochs, "quantization.target_bops": 1000})
    with pytest.raises(
        UserError, match=r"1,000 bit operations cannot be met: at the fewest planes it takes about 4,439,040"
    ):
        pipeline.search(recipe, tmp_path / "run", display=QUIET)


@pytest.mark.parametrize(
    ("planes", "said"),
    [({"fc": 3}, "says nothing of `conv1.weight`"), ({"*": 3}, "cost 1.5 times what the target of 2 allows")],
)
def test_wrong_planes_are_refused_before_the_float_model_is_evaluated(
    planes: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csqcli.training.run.Run.measure_float", lambda run: pytest.fail("evaluated"))
    recipe = resolve("digits", {"quantization.target_bits": 2, "quantization.planes": planes, "allocator": "manual"})
    with pytest.raises(UserError, match=said):
        pipeline.search(recipe, tmp_path / "run", display=QUIET)


def test_a_finetune_of_the_file_knows_no_table(table: str, tmp_path: Path) -> None:
    settings = {"quantization.target_latency": 9, "quantization.latency_table": table, "quantization.act_bits": 8}
    pipeline.search(resolve("digits", SHORT | settings), tmp_path / "run", display=QUIET)
    Path(table).unlink()
    import csqcli

    file = tmp_path / "run" / "model.safetensors"
    report = csqcli.finetune(file, data="digits", epochs=1, max_steps=2, output=tmp_path / "tuned")
    assert [layer["bits"] for layer in report["layers"]] == [layer.planes for layer in io.read(file).layers]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": []}, "is no table of latencies (layers: "),
        ({"input_size": [1, 9, 9]}, "is for images of 1×9×9, and these are 1×8×8"),
        ({"layers": TABLE["layers"][:3]}, "says nothing of `fc.weight`"),
        (
            {"layers": [{"name": "conv1.weight", "latency": {"int8": {"ms": 1.0}}}]},
            "says nothing of `conv1.weight` in fp32",
        ),
        ({"network": {"fp32": {"ms": "fast"}}}, "is no table of latencies (network.fp32.ms: "),
        ({"schema_version": 2}, "is no table of latencies (schema_version: "),
    ],
)
def test_a_table_of_something_else_is_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE | change))
    settings = SHORT | {"quantization.target_latency": 9, "quantization.latency_table": str(path)}
    with pytest.raises(UserError) as raised:
        pipeline.search(resolve("digits", settings), tmp_path / "run", display=QUIET)
    assert raised.value.line().startswith(f"{path}: {said}")
    assert not (tmp_path / "run").exists()


def test_a_floor_of_zero_is_refused_before_training_where_the_network_would_end(tmp_path: Path) -> None:
    settings = SHORT | {"layers.floor": 0, "quantization.target_bits": 0.75}  # three convolutions in a row, and a head
    with pytest.raises(UserError, match=r"target_bits 0.75 cannot be met.* need 1") as raised:
        pipeline.search(resolve("digits", settings), tmp_path / "run", display=QUIET)
    assert "4 of 4 layers keep a plane" in (raised.value.hint or "")


def test_with_a_floor_of_zero_the_report_names_the_layers_that_must_stay(tmp_path: Path) -> None:
    found = pipeline.search(resolve("digits", SHORT | {"layers.floor": 0}), tmp_path / "run", display=QUIET)
    names = ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]
    assert found["needed"] == names == json.loads((tmp_path / "run" / "report.json").read_text())["needed"]
    assert found["together"] == []
    assert all(layer["bits"] >= 1 for layer in found["layers"])


def test_with_a_floor_of_zero_a_residual_branch_goes_whole(tmp_path: Path) -> None:
    model = {"model.source": "cifar_resnet8", "model.checkpoint": None, "model.pretrained": False, "data.input_size": 8}
    settings = model | {"layers.floor": 0, "quantization.target_bits": 0.2, "max_steps": 4, "epochs": 1}
    found = pipeline.search(resolve("digits", settings), tmp_path / "run", display=QUIET)
    bits = {layer["name"].removesuffix(".weight"): layer["bits"] for layer in found["layers"]}
    assert len(found["together"]) == 3
    for group in found["together"]:
        assert len({bits[name.removesuffix(".weight")] > 0 for name in group}) == 1
    assert min(bits[name.removesuffix(".weight")] for name in found["needed"]) >= 1
    assert found["budget"]["mean_bits"] <= 0.2
    assert found["sparsity"]["empty_layers"] == sum(count == 0 for count in bits.values()) > 0
