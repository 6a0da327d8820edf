"""The functions of csqcli.api do what the commands do, and say what is wrong in the same words."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import csqcli
from csqcli import UserError, api
from csqcli.file.header import read_manifest
from csqcli.models.networks import digits_cnn

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {"recipe": "digits", "target_bits": 2, "epochs": 2, "threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that csqcli.search wrote, and what it returned."""
    folder = tmp_path_factory.mktemp("api") / "run"
    return folder, csqcli.search(output=folder, **QUICK)


def test_search_returns_the_report_that_it_wrote(run: tuple[Path, dict[str, Any]]) -> None:
    folder, report = run
    written = json.loads((folder / "report.json").read_text())
    assert (written.pop("model_sha256"), written.pop("inputs")["train"]["images"]) == (
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        1297,
    )
    assert json.loads(json.dumps(report)) == written
    assert report["budget"]["mean_bits"] <= 2
    assert len(report["history"]) == 2


def test_search_delivers_what_the_command_delivers(run: tuple[Path, dict[str, Any]], csq, tmp_path: Path) -> None:
    folder, _ = run
    command = ["search", "--recipe", "digits", "--target-bits", 2, "--epochs", 2, "--set", "threads=1", "--quiet"]
    assert csq(*command, "-o", tmp_path / "run")[0] == 0
    ours, theirs = (read_manifest(path / "model.safetensors") for path in (folder, tmp_path / "run"))
    assert ours.payload_sha256 == theirs.payload_sha256
    assert ours.recipe == theirs.recipe


def test_plan_says_what_the_command_says_and_writes_nothing(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = csqcli.plan(**QUICK)
    command = [
        "plan",
        "--recipe",
        "digits",
        "--target-bits",
        2,
        "--epochs",
        2,
        "--set",
        "threads=1",
        "--quiet",
        "--json",
    ]
    theirs = json.loads(csq(*command)[1])
    for measured in ("time", "memory"):  # which no two runs have the same
        assert found.pop(measured).keys() == theirs.pop(measured).keys()
    assert json.loads(json.dumps(found)) == theirs
    assert found["mean_bits"] <= 2
    assert list(tmp_path.iterdir()) == []


def test_settings_may_be_short_dotted_or_left_out(tmp_path: Path) -> None:
    dotted = {"optimizer.momentum": 0.8, "layers.exclude": ["conv1"]}
    report = csqcli.search(
        "digits_cnn", output=tmp_path, data="digits", max_steps=2, pretrained=False, **QUICK, **dotted
    )
    assert report["recipe"]["optimizer"]["momentum"] == 0.8
    assert report["recipe"]["max_steps"] == 2
    assert report["model"]["weights_from"] != "pretrained"
    assert "conv1.weight" not in [layer["name"] for layer in report["layers"]]


def test_progress_goes_to_stderr_and_only_when_it_is_asked_for(
    run: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    csqcli.search(output=tmp_path / "quiet", **QUICK, max_steps=1)
    assert capfd.readouterr() == ("", "")
    csqcli.search(output=tmp_path / "loud", **QUICK, max_steps=1, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "epoch   2" in err


def test_a_finished_run_is_kept_without_force(run: tuple[Path, dict[str, Any]]) -> None:
    folder, report = run
    with pytest.raises(UserError, match="holds a finished run"):
        csqcli.search(output=folder, **QUICK)
    again = csqcli.search(output=folder, **QUICK, resume=True)
    assert again["payload_sha256"] == report["payload_sha256"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "unknown key `epoch`; did you mean `epochs`"),
        ({"recipe": "digit"}, "no such recipe or file; did you mean `digits`"),
        ({"target_bits": 9}, "target_bits 9 is too many; at most 8"),
        ({"model": "resnet81"}, "unknown model"),
        ({"optimizer": {"lr": 1}}, "unknown key `optimizer`"),
        ({"lr": "fast"}, "optimizer.lr"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_no_folder(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        csqcli.search(output=tmp_path / "run", **{**QUICK, **settings})
    assert "\n" not in raised.value.line()
    assert not (tmp_path / "run").exists()


def test_finetune_keeps_the_better_model_and_writes_into_the_current_folder(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = run
    copy = tmp_path / "elsewhere" / "run"
    copy.mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    tuned = csqcli.finetune(copy / "model.safetensors", data="digits", epochs=1, seed=3)
    assert Path("runs/run-finetuned/model.safetensors").is_file()
    assert [path.name for path in copy.parent.iterdir()] == ["run"]
    assert tuned["finetune"]["input_top1"] == report["accuracy"]["hard_top1"]
    assert tuned["accuracy"]["hard_top1"] >= report["accuracy"]["hard_top1"]
    assert tuned["recipe"]["seed"] == 3
    assert [layer["mask"] for layer in tuned["layers"]] == [layer["mask"] for layer in report["layers"]]


def test_evaluate_repeats_the_accuracy_and_says_what_the_command_says(run: tuple[Path, dict[str, Any]], csq) -> None:
    folder, report = run
    result = csqcli.evaluate(folder / "model.safetensors", "digits", batch_size=100)
    assert result["top1"] == report["accuracy"]["hard_top1"]
    assert result["samples"] == report["accuracy"]["samples"]
    assert result["mean_bits"] == report["budget"]["mean_bits"]
    code, out, _ = csq("evaluate", folder / "model.safetensors", "--data", "digits", "--json")
    assert (code, json.loads(out)) == (0, dict(result))


def test_report_says_what_the_command_says(run: tuple[Path, dict[str, Any]], csq, tmp_path: Path) -> None:
    folder, _ = run
    report = csqcli.report(str(folder / "model.safetensors"))
    assert json.loads(csq("report", folder / "model.safetensors", "--json")[1]) == report
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / "model.safetensors").read_bytes())
    assert csqcli.report(alone) == {**report, "history": []}
    assert csqcli.report(alone) == {**report, "history": []}, "a second call finds the function in its place"


@pytest.mark.parametrize("form", ["int8-packed", "bit-packed", "state-dict"])
def test_export_writes_beside_its_input_and_returns_the_certificate(
    form: Any, run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source = tmp_path / "net.v2.safetensors"
    source.write_bytes((run[0] / "model.safetensors").read_bytes())
    report = csqcli.export(source, form=form, data="digits", val_limit=50)
    assert (tmp_path / f"net.v2-{form}.safetensors").is_file()
    assert report["form"] == form
    assert report["parity"]["layers_matched"] == len(report["layers"])
    assert report["parity"]["samples"] == 50
    assert csqcli.report(tmp_path / f"net.v2-{form}.safetensors") == report
    with pytest.raises(UserError, match="exists already"):
        csqcli.export(source, form=form)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "int4"}, "no form `int4`"),
        ({"form": "bit-packed", "activations": "int8"}, "form bit-packed: --activations belongs to --onnx"),
        ({"form": "state-dict", "target": "openvino"}, "form state-dict: --target belongs to --onnx"),
    ],
)
def test_export_refuses_what_does_not_belong_together(
    options: dict[str, Any], message: str, run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        csqcli.export(run[0] / "model.safetensors", tmp_path / "out.safetensors", **options)


def test_inspect_says_what_the_command_says_and_takes_a_module_too(csq) -> None:
    named = csqcli.inspect("digits_cnn", exclude=["fc"])
    assert csqcli.inspect("digits_cnn", exclude="fc") == named  # a text is one glob
    assert json.loads(csq("inspect", "digits_cnn", "--exclude", "fc", "--json")[1]) == named
    assert csqcli.inspect(torch.compile(digits_cnn(), backend="eager"), input_size=(1, 8, 8), exclude=["fc"]) == named
    assert csqcli.inspect("digits_cnn", input_size=(1, 16, 16))["macs"] > 3 * csqcli.inspect("digits_cnn")["macs"]
    with pytest.raises(UserError, match="no input_size given"):
        csqcli.inspect(digits_cnn())


def test_load_gives_the_model_whose_accuracy_was_reported(run: tuple[Path, dict[str, Any]]) -> None:
    model = csqcli.load(run[0] / "model.safetensors")
    assert isinstance(model, nn.Module)
    assert not model.training
    mine = digits_cnn()
    csqcli.load(run[0] / "model.safetensors", into=mine)
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in model.state_dict().items())


# the front door


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_csqcli_loads_neither_torch_nor_pydantic() -> None:
    assert (
        python("import csqcli, csqcli.api, sys; print({'torch', 'pydantic', 'timm'} & set(sys.modules))") == "set()\n"
    )


def test_everything_named_is_there_and_nothing_else_is_promised() -> None:
    code = "import csqcli; print(all(getattr(csqcli, name) is not None for name in csqcli.__all__), dir(csqcli))"
    out = python(code)
    assert out.startswith("True")
    assert all(f"'{name}'" in out for name in csqcli.__all__)
    assert sorted(csqcli.__all__) == sorted(api.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'serach'"):
        _ = csqcli.serach  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in csqcli.__all__ if name != "UserError"])
def test_every_function_states_arguments_results_errors_and_an_example_that_parses(name: str) -> None:
    function = getattr(csqcli, name)
    text = inspect.getdoc(function) or ""
    called = function.__init__ if inspect.isclass(function) else function
    described = text.split("Args:")[1].split("Raises:")[0]
    for argument in inspect.signature(called).parameters:
        assert argument == "self" or f"{argument}:" in described or f"{argument}," in described, argument
    assert "Raises:\n    UserError:" in text
    assert inspect.isclass(function) or "Returns:" in text
    example = inspect.cleandoc(text.split("Example::")[1])
    ast.parse(example)
    assert f"csqcli.{name}(" in example


_WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("evaluate", ("run", "digits"), {"batch_size": 0}, "batch_size: should be greater than or equal to 1"),
    ("evaluate", (None, "digits"), {"model": "digits_cnn", "weights": "foo"}, "weights: should be 'auto', 'ema' or 'raw'"),
    ("evaluate", ("run", "digits"), {"val_split": 3}, "val_split: should be less than or equal to 1 or should be 'test'"),
    ("evaluate", ("run", "digits"), {"val_limit": "many"}, "val_limit: should be a valid integer"),
    ("explain", ("run", "digits"), {"val_limit": 0}, "val_limit: should be greater"),
    ("explain", ("run", "digits"), {"swaps": -3}, "swaps: should be greater than or equal to 0"),
    ("diff", ("float", "run", "digits"), {"batch_size": -1}, "batch_size: should be greater"),
    ("export", ("run",), {"form": "onnx", "target": "foo"}, "target: should be 'ort', 'openvino' or 'tensorrt'"),
    ("export", ("run",), {"form": "litert", "prefer": "foo"}, "prefer: should be 'speed' or 'size'"),
    ("bench", ("digits_cnn",), {"threads": 0}, "threads: should be greater"),
    ("bench", ("digits_cnn",), {"repeats": 0}, "repeats: should be greater"),
    ("sweep", ("digits_cnn",), {"targets": [2], "jobs": 0}, "jobs: should be greater"),
    ("inspect", ("digits_cnn",), {"num_classes": 0}, "num_classes: should be greater"),
    ("inspect", ("digits_cnn",), {"input_size": 0}, "input_size: should be greater"),
    ("finetune", ("run",), {"epochs": 0}, "epochs: should be greater than or equal to 1"),
    ("search", (), {**QUICK, "quantization.target_bits": 3}, "`target_bits=2` and `quantization.target_bits=3` say different"),
    ("plan", (), {**QUICK, "epochs": 0}, "epochs: 0 epochs have no steps to be timed"),
    ("plan", ("digits_cnn",), {"target_bits": 2}, "no data given"),
    ("sensitivity", ("digits_cnn",), {"data": "digits", "val_limit": 0}, "val_limit: should be greater"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "options", "message"), _WRONG)
def test_arguments_out_of_range_are_refused_by_name(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        getattr(csqcli, name)(*arguments, **options)
    assert raised.value.line().startswith(message), raised.value.line()


def test_numbers_may_be_those_of_numpy(run: tuple[Path, dict[str, Any]]) -> None:
    found = csqcli.evaluate(run[0], "digits", batch_size=np.int64(100), val_limit=np.int32(50))  # type: ignore[arg-type]
    assert found["samples"] == 50


def test_a_call_that_does_not_bind_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="form"):
        csqcli.export("run")  # type: ignore[call-arg]
