"""`csq allocate` says what a search would fix, and a search trains what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml


@pytest.mark.parametrize("cost", ["weights", "bops"])
def test_a_search_with_the_same_allocator_fixes_the_planes_that_allocate_printed(
    csq, tmp_path: Path, cost: str
) -> None:
    shared = ("--recipe", "digits", "--allocator", "hawq-v2", "--target-bits", 2.5, "--quiet", "--cost", cost)
    code, out, err = csq("allocate", *shared, "--json")
    assert code == 0, err
    found = json.loads(out)
    run = tmp_path / "run"
    code, _, err = csq("search", *shared, "--method", "ste", "--epochs", 1, "--set", "max_steps=1", "--output", run)
    assert code == 0, err
    report = json.loads((run / "report.json").read_text())
    assert [layer["planes"] for layer in found["layers"]] == [layer["bits"] for layer in report["layers"]]
    assert found["mean_bits"] == pytest.approx(report["budget"]["mean_bits"])
    assert 0.9 * found["allowed"] < found["spent"] <= found["allowed"]
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    assert all(len(layer["importance"]) == 8 for layer in found["layers"])


@pytest.mark.parametrize(
    "network",
    [
        (),
        ("csq:cifar_resnet8", "--no-pretrained", "--set", "model.checkpoint=null"),
    ],  # whose norms have no statistics yet
    ids=["trained", "fresh"],
)
def test_planes_are_those_of_a_search_that_gives_each_layers_input_a_width_of_its_own(
    network: tuple[str, ...], csq, tmp_path: Path
) -> None:
    shared = (*network, "--recipe", "digits", "--target-bits", 2.5, "--cost", "bops", "--quiet")
    shared += ("--set", "target_act_bits=4", "--set", "act_bits=auto")
    code, out, err = csq("allocate", *shared, "--allocator", "importance", "--json")
    assert code == 0, err
    run = tmp_path / "run"
    short = ("--method", "ste", "--allocator", "importance", "--epochs", 1, "--set", "max_steps=1", "--output", run)
    code, _, err = csq("search", *shared, *short)
    assert code == 0, err
    report = json.loads((run / "report.json").read_text())
    assert [layer["planes"] for layer in json.loads(out)["layers"]] == [layer["bits"] for layer in report["layers"]]
    # nothing is rounded but one layer's weights here, whatever the run's recipe has
    code, _, err = csq("sensitivity", "--recipe", run / "recipe.yaml", "--widths", 1, "--val-limit", 8, "--quiet")
    assert code == 0, err


def test_an_allocator_gives_no_layer_more_planes_than_the_method_takes(csq, tmp_path: Path) -> None:
    shared = ("--recipe", "digits", "--allocator", "importance", "--target-bits", 2.5, "--quiet")

    def allocated(method: str) -> list[int]:
        code, out, err = csq("allocate", *shared, "--set", f"quantization.method={method}", "--json")
        assert code == 0, err
        return [layer["planes"] for layer in json.loads(out)["layers"]]

    assert max(allocated("ste")) > 3
    planes = allocated("outside:ThreePlanes")
    assert max(planes) == 3
    run = tmp_path / "run"
    short = ("--epochs", 1, "--set", "max_steps=1", "--output", run)
    code, _, err = csq("search", *shared, "--method", "outside:ThreePlanes", *short)
    assert code == 0, err
    assert [layer["bits"] for layer in json.loads((run / "report.json").read_text())["layers"]] == planes


def test_what_allocate_writes_a_search_trains_and_its_recipe_repeats(csq, tmp_path: Path) -> None:
    planes = tmp_path / "planes.yaml"
    code, out, err = csq(
        *(
            "allocate",
            "--recipe",
            "digits",
            "--target-bits",
            2.5,
            "--allocator",
            "random",
            "--output",
            planes,
            "--quiet",
        )
    )
    assert code == 0, err
    assert f"wrote {planes}" in out
    written = yaml.safe_load(planes.read_text())
    assert written["target_bits"] == 2.5
    code, _, err = csq("allocate", "--recipe", "digits", "--target-bits", 2.5, "--output", planes, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err
    run = tmp_path / "run"
    short = ("--epochs", 1, "--set", "max_steps=1", "--quiet")
    code, _, err = csq("search", "--recipe", "digits", "--method", "lsq", "--planes", planes, *short, "--output", run)
    assert code == 0, err
    report = json.loads((run / "report.json").read_text())
    assert {layer["name"]: layer["bits"] for layer in report["layers"]} == written["planes"]
    assert report["budget"]["target_mean_bits"] == 2.5
    code, _, err = csq("search", "--recipe", run / "recipe.yaml", "--output", tmp_path / "again", "--quiet")
    assert code == 0, err
    assert json.loads((tmp_path / "again" / "report.json").read_text())["payload_sha256"] == report["payload_sha256"]
    code, _, err = csq(
        *("finetune", run / "model.safetensors", "--data", "digits", "--epochs", 1, "--quiet", "--set", "max_steps=1"),
        *("--output", tmp_path / "tuned"),
    )
    assert code == 0, err


def test_a_resumed_run_does_not_measure_again(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csqcli.training import setup
    from csqcli.training.phase import _Epochs

    measured = []
    allocation = setup.allocation
    monkeypatch.setattr(setup, "allocation", lambda *a, **k: measured.append(1) or allocation(*a, **k))
    run_all = _Epochs.run_all

    def stopped(self) -> None:
        if len(measured) == 1 and self.run.saved is None:
            self._save(0)
            raise KeyboardInterrupt
        run_all(self)

    monkeypatch.setattr(_Epochs, "run_all", stopped)
    command = (
        *(
            "search",
            "--recipe",
            "digits",
            "--method",
            "ste",
            "--allocator",
            "quanos",
            "--target-bits",
            2.5,
            "--epochs",
            1,
        ),
        *("--set", "max_steps=2", "--quiet", "--output", tmp_path / "run"),
    )
    assert csq(*command)[0] == 130
    code, _, err = csq(*command, "--resume")
    assert code == 0, err
    assert measured == [1]
