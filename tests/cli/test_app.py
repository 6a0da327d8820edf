"""The commands through their real entry point."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from quantized_models import make_file
from safetensors.torch import load_file, save_file

import csqcli
from csqcli.file import io
from csqcli.system import memory

pytestmark = pytest.mark.usefixtures("remembered_traces")

FAST = ("--set", "optimizer.lr=0.02", "--epochs", "1", "--quiet")
CONTRACT = {
    "schema_version": None,
    "model": ["source", "name", "checkpoint_sha256"],
    "budget": ["target_mean_bits", "mean_bits", "total_weights"],
    "sizes": [
        "float_bytes",
        "paper_compression",
        "stored_bits_per_weight",
        "entropy_bits_per_weight",
        "file_bytes",
    ],
    "accuracy": ["float_top1", "soft_top1", "hard_top1", "samples"],
    "compute": ["input_size", "macs", "quantized_macs", "bops"],
    "layers": ["name", "shape", "weights", "mask", "bits", "stored_bits", "scale", "macs"],
    "history": None,
    "environment": None,
    "recipe": None,
}


def test_report_json_keeps_its_contract(digits_run: Path) -> None:
    report = json.loads((digits_run / "report.json").read_text())
    for key, fields in CONTRACT.items():
        assert key in report
        entry = report[key][0] if key == "layers" else report[key]
        assert set(fields or ()) <= set(entry if isinstance(entry, dict) else ())
    assert report["sizes"]["file_bytes"] == (digits_run / "model.safetensors").stat().st_size
    assert report["budget"]["mean_bits"] <= 2
    total = sum(layer["weights"] for layer in report["layers"])
    assert report["budget"]["mean_bits"] == sum(x["weights"] * x["bits"] for x in report["layers"]) / total
    assert all(layer["bits"] == layer["mask"].count("1") for layer in report["layers"])


def test_operations_of_the_digits_network_are_those_counted_by_hand(digits_run: Path) -> None:
    report = json.loads((digits_run / "report.json").read_text())
    macs = [64 * 16 * 9, 16 * 32 * 16 * 9, 4 * 48 * 32 * 9, 48 * 10]  # outputs × inputs of one output
    assert [layer["macs"] for layer in report["layers"]] == macs
    bops = sum(count * layer["bits"] * 32 for count, layer in zip(macs, report["layers"], strict=True))
    assert report["compute"] == {
        "input_size": [1, 8, 8],
        "macs": sum(macs),
        "quantized_macs": sum(macs),
        "bops": bops,
    }


def test_models_that_are_no_classifiers_are_refused_in_one_line(csq, tmp_path: Path) -> None:
    for model, complaint in (
        ("torchvision:fcn_resnet50", "is made for segmentation"),
        ("plain_models:features", "gives outputs of shape [1, 4, 8, 8] for one image, not 10 scores"),
    ):
        output = tmp_path / "run"
        code, _, err = csq(
            *("search", model, "--no-pretrained", "--data", "digits", "--target-bits", 3, "--output", output)
        )
        assert code == 2
        assert err.splitlines()[-1] == (
            f"csq: error: {model}: {complaint}; csq trains image classifiers; others with csqcli.CSQ in your own loop"
        )
    file = tmp_path / "segmentation.safetensors"
    io.write(file, make_file("torchvision:lraspp_mobilenet_v3_large"))
    for command in ("evaluate", "finetune"):
        code, _, err = csq(command, file, "--data", "digits")
        assert code == 2
        assert "torchvision:lraspp_mobilenet_v3_large: is made for segmentation" in err


def test_search_writes_what_it_promises(digits_run: Path) -> None:
    names = {path.name for path in digits_run.iterdir()}
    assert names == {"model.safetensors", "report.json", "metrics.jsonl", "recipe.yaml"}
    lines = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    keys = {"step", "beta", "mean_bits", "budget_gap", "train_loss", "reg_loss", "val_top1", "images_per_second", "lr"}
    assert keys <= set(lines[0])
    assert yaml.safe_load((digits_run / "recipe.yaml").read_text())["quantization"]["target_bits"] == 2


@pytest.mark.parametrize(
    ("options", "commands"),
    [
        (("--target-bits", 2), ["csq evaluate RUN --data digits", "csq export RUN --bit-packed"]),
        (("--target-size", "12kB"), ["csq evaluate RUN/model-bit-packed-small.safetensors --data digits"]),
        (
            ("--target-bits", 2, "--act-bits", 8),
            ["csq evaluate RUN --data digits", "csq export RUN --onnx --activations int8 --calib digits"],
        ),
        (("--method", "float"), ["csq evaluate RUN --data digits"]),
    ],
)
def test_a_search_ends_with_commands_that_go_on_with_its_model(
    csq, tmp_path: Path, options: tuple[str, ...], commands: list[str]
) -> None:
    search = ("search", "--recipe", "digits", *options, "--epochs", 1, "--set", "max_steps=4", "--output", tmp_path)
    code, out, err = csq(*search)
    said = [line.removeprefix("next: ") for line in err.splitlines() if line.startswith("next: ")]
    assert (code, said) == (0, [command.replace("RUN", str(tmp_path)) for command in commands])
    assert "next:" not in out
    for command in said:
        if "--onnx" in command:
            pytest.importorskip("onnxscript")
            pytest.importorskip("onnxruntime")
        assert csq(*shlex.split(command)[1:])[0] == 0
    for silent in ("--quiet", "--json"):
        assert "next:" not in "".join(csq(*search, "--resume", silent)[1:])


def test_evaluate_equals_what_search_reported(csq, digits_run: Path) -> None:
    code, out, _ = csq("evaluate", digits_run / "model.safetensors", "--data", "digits", "--json", "--batch-size", 77)
    assert code == 0
    result, report = json.loads(out), json.loads((digits_run / "report.json").read_text())
    assert result["top1"] == report["accuracy"]["hard_top1"]
    assert result["top5"] == report["accuracy"]["hard_top5"]
    assert result["samples"] == 500


def test_evaluate_says_what_it_took_of_a_float_checkpoint(csq, tmp_path: Path) -> None:
    state = load_file(str(resources.files("csqcli") / "assets" / "digits_float.safetensors"))
    save_file({f"model.{name}": value for name, value in state.items()}, tmp_path / "lightning.safetensors")
    given = (
        "evaluate",
        tmp_path / "lightning.safetensors",
        "--model",
        "digits_cnn",
        "--data",
        "digits",
        "--val-limit",
        20,
    )
    code, out, err = csq(*given, "--json")
    assert (code, json.loads(out)["samples"]) == (0, 20)
    assert f"lightning.safetensors: took the prefix `model.` off {len(state)} names" in err
    assert "prefix" not in csq(*given, "--quiet")[2]


def test_a_float_model_is_measured_under_any_preprocessing(csq) -> None:
    checkpoint = resources.files("csqcli") / "assets" / "digits_float.safetensors"
    given = ("evaluate", checkpoint, "--model", "digits_cnn", "--data", "digits", "--json", "-q")
    plain, dark = (json.loads(csq(*given, *more)[1])["top1"] for more in ((), ("--set", "data.mean=[0.9]")))
    assert plain == 98.2 > dark
    assert dark == csqcli.evaluate(checkpoint, "digits", model="digits_cnn", mean=[0.9])["top1"]
    code, _, err = csq(*given, "--set", "epochs=3")
    assert (
        code,
        "`epochs` does not say how a float model's images are prepared; one of data.input_size, data.mean" in err,
    ) == (2, True)
    code, _, err = csq("evaluate", "runs/x", "--data", "digits", "--set", "data.mean=[0.9]")
    assert code == 2


def test_weights_of_other_classes_are_asked_about(csq, tmp_path: Path) -> None:
    state = load_file(str(resources.files("csqcli") / "assets" / "digits_float.safetensors"))
    turned = {name: value.roll(1, 0) if name.startswith("fc.") else value for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in turned.items()}, tmp_path / "turned.safetensors")
    search = ("search", "digits_cnn", "--data", "digits", "--target-bits", 2, "--epochs", 1, "--set", "max_steps=1")
    for checkpoint, asked in ((tmp_path / "turned.safetensors", True), ("builtin:digits_float", False)):
        code, _, err = csq(*search, "--checkpoint", checkpoint, "-o", tmp_path / f"run-{asked}")
        assert (code, "which is about chance (10 %): are the data's classes those" in err) == (0, asked)


def test_a_runs_folder_stands_for_its_model(csq, digits_run: Path, tmp_path: Path) -> None:
    file, out = digits_run / "model.safetensors", tmp_path / "out.safetensors"
    for command, options in (
        ("evaluate", ("--data", "digits", "--val-limit", 20, "--json")),
        ("report", ("--json",)),
        ("finetune", ("--data", "digits", "--quiet", "--set", "max_steps=1", "--epochs", 1, "--force", "-o", tmp_path)),
        ("explain", ("--data", "digits", "--val-limit", 20, "--swaps", 0, "--quiet", "--json")),
    ):
        of_folder, of_file = csq(command, digits_run, *options), csq(command, file, *options)
        assert (of_folder[0], of_folder) == (0, of_file), command
    code, said, _ = csq("export", digits_run, "--bit-packed", "-o", out)
    assert (code, said.splitlines()[-1]) == (0, f"wrote {out}")
    assert csqcli.report(digits_run)["payload_sha256"] == csqcli.report(out)["payload_sha256"]
    assert csqcli.evaluate(digits_run, "digits")["top1"] == csqcli.report(file)["accuracy"]["hard_top1"]
    weights = csqcli.load(digits_run).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in csqcli.load(out).state_dict().items())


def test_the_model_in_memory_and_the_reloaded_one_agree_on_every_logit(digits_run: Path) -> None:
    assert json.loads((digits_run / "report.json").read_text())["parity"]["max_logit_gap"] == 0


def test_report_needs_neither_model_code_nor_data(digits_run: Path) -> None:
    script = (
        "import sys, csqcli.cli.app as c; sys.argv = ['csq', 'report', sys.argv[1]]\n"
        "try: c.main()\nexcept SystemExit: pass\n"
        "assert not {'timm', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(digits_run / "model.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "conv3" in done.stdout
    assert "mean bits" in done.stdout
    assert "hard" in done.stdout


def test_the_resolved_recipe_reruns_the_job_to_the_same_bytes(csq, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert csq("search", "--recipe", "digits", "--target-bits", "1.5", "-o", first, *FAST)[0] == 0
    assert csq("search", "--recipe", first / "recipe.yaml", "-o", second, "--quiet")[0] == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("target", ["1", "1.3", "2.75", "7.5"])
def test_the_number_typed_is_true_on_disk_even_after_one_epoch(csq, tmp_path: Path, target: str) -> None:
    assert csq("search", "--recipe", "digits", "--target-bits", target, "-o", tmp_path, *FAST)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    mean = report["budget"]["mean_bits"]
    spare = (float(target) - mean) * report["budget"]["total_weights"]
    assert spare >= 0
    assert spare < 0.1 or all(layer["weights"] > spare for layer in report["layers"] if layer["bits"] < 8)


@pytest.mark.parametrize("method", ["staged", "csq"])
def test_bfloat16_state_trains_and_the_number_typed_stays_true(csq, tmp_path: Path, method: str) -> None:
    files = {}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        options = ["--method", method, "--target-bits", "2", "--epochs", "3", "-o", str(output), "--quiet"]
        assert csq("search", "--recipe", "digits", *options, "--set", f"state_dtype={dtype}")[0] == 0
        files[dtype] = io.read(output / "model.safetensors")
        assert files[dtype].manifest.budget.mean_bits <= 2
    exact, rounded = (files[dtype].state_dict() for dtype in ("float32", "bfloat16"))
    assert any(not torch.equal(exact[name], rounded[name]) for name in exact)  # the setting reaches training


def test_a_finished_run_is_not_overwritten_without_force(csq, digits_run: Path, tmp_path: Path) -> None:
    before = (digits_run / "model.safetensors").read_bytes()
    code, _, err = csq("search", "--recipe", "digits", "-o", digits_run, *FAST)
    assert code == 2
    assert err == f"csq: error: {digits_run}: holds a finished run; choose another --output or pass --force\n"
    assert (digits_run / "model.safetensors").read_bytes() == before


def test_layer_rules_reach_the_file(csq, tmp_path: Path) -> None:
    rules = [
        *("--set", "layers.keep=[fc]"),
        *("--set", "layers.exclude=[conv1]"),
        *("--set", "layers.max_bits={conv2: 2}"),
    ]
    assert csq("search", "--recipe", "digits", "--target-bits", "3", "-o", tmp_path, *rules, *FAST)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    bits = {layer["name"]: layer["bits"] for layer in report["layers"]}
    assert "conv1.weight" not in bits
    assert bits["fc.weight"] == 8
    assert bits["conv2.weight"] <= 2
    assert report["left_float"] == [{"name": "conv1.weight", "shape": [16, 1, 3, 3], "why": "excluded by the recipe"}]


@pytest.mark.parametrize("source", ["timm:test_resnet", "torchvision:squeezenet1_1"])
def test_an_image_folder_and_a_library_model_work_together(
    csq, tmp_path: Path, image_folder: Path, source: str
) -> None:
    model = (source, "--no-pretrained", "--data", image_folder, "--target-bits", "3", "-o", tmp_path / "run")
    sizes = ("--set", "input_size=72", "--set", "batch_size=4", "--set", "workers=0", "--epochs", "1", "--quiet")
    code, _, err = csq("search", *model, *sizes)
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["model"]["source"] == source
    assert report["data_config"]["input_size"] == [3, 72, 72]
    code, out, _ = csq("evaluate", tmp_path / "run" / "model.safetensors", "--data", image_folder, "--json")
    assert json.loads(out)["top1"] == report["accuracy"]["hard_top1"]

    import timm
    import torchvision

    library, name = source.split(":")
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    plain = build(name, num_classes=2)
    plain.load_state_dict(csqcli.load(tmp_path / "run" / "model.safetensors").state_dict(), strict=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("search",), "no model given; name one, e.g. resnet18, or use a recipe that does"),
        (("search", "resnet18", "--target-bits", "3"), "no data given; pass --data FOLDER, or another kind of data that `csq search --"),
        (("search", "--recipe", "digits", "--target-bits", "99"), "recipe digits: target_bits 99 is too many; at most 8"),
        (("search", "--recipe", "digits", "--target-bits", "0"), "recipe digits: quantization.target_bits: Input should be greater than 0"),
        (("search", "--recipe", "digits", "--method", "ste", "--target-bits", "1.5"), "ste gives every layer the same planes; 1.5"),
        (("search", "--recipe", "digit"), "digit: no such recipe or file; did you mean `digits`?"),
        (("search", "--recipe", "digits", "--set", "epoch=3"), "--set: unknown key `epoch`; did you mean `epochs`?"),
        (("search", "--recipe", "digits", "--set", "epochs"), "--set: `epochs` is not key=value; e.g. --set optimizer.lr=0.05"),
        (("search", "--recipe", "digits", "--target-bits", "three"), "Invalid value for '--target-bits':"),
        (("evaluate", "nothing.safetensors", "--data", "digits"), "nothing.safetensors: no such file"),
        (("report", "pyproject.toml"), "pyproject.toml: not a safetensors file"),
        (("serach",), "no command `serach`; did you mean `search`?"),
        (("search", "--taget-bits", "3"), "csq search: no option `--taget-bits`; did you mean `--target-bits`?"),
    ],
)  # fmt: skip
def test_wrong_invocations_are_one_line_and_exit_code_2(csq, tmp_path: Path, arguments, complaint: str) -> None:
    extra = ("-o", tmp_path) if arguments[0] == "search" else ()
    code, out, err = csq(*arguments, *extra)
    assert code == 2
    assert err.startswith(f"csq: error: {complaint}")
    assert err.count("\n") == 1
    assert out == ""


def test_no_gpu_for_device_cuda_is_said(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = csq("search", "--recipe", "digits", "-o", tmp_path, "--device", "cuda", "--quiet")
    assert (code, err) == (2, "csq: error: --device cuda: no CUDA device is available; use --device cpu or auto\n")


def test_resume_after_an_interruption_writes_the_same_bytes(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csqcli.training.loop import Trainer

    arguments = ("search", "--recipe", "digits", "--target-bits", "2", "--epochs", "4", "--quiet")
    assert csq(*arguments, "-o", tmp_path / "whole")[0] == 0

    original = Trainer.run_epoch

    def interrupted(self, epoch, **more):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(self, epoch, **more)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    code, _, err = csq(*arguments, "-o", tmp_path / "broken")
    assert code == 130
    assert err.endswith("csq: interrupted; the same command with --resume goes on from the last saved state\n")
    monkeypatch.setattr(Trainer, "run_epoch", original)
    code, _, err = csq("evaluate", tmp_path / "broken", "--data", "digits")
    assert "holds an unfinished run" in err
    literal = shlex.split(err.split("`")[1])[1:]
    shutil.copytree(tmp_path / "broken", tmp_path / "copy")
    literal = [word.replace("broken", "copy") for word in literal]
    code, _, err = csq(*arguments, "-o", tmp_path / "broken")
    assert code == 2
    assert (
        "holds an unfinished run; pass --resume to go on, or --force to give its saved state up and start over" in err
    )
    code, _, err = csq(*arguments, "--seed", 5, "-o", tmp_path / "broken", "--resume")
    assert code == 2
    assert "was started with other settings" in err
    assert csq(*literal, "--quiet")[0] == 0
    assert csq(*arguments, "-o", tmp_path / "broken", "--resume")[0] == 0
    before = (tmp_path / "broken" / "report.json").stat().st_mtime_ns
    assert (
        csq(*arguments, "-o", tmp_path / "broken", "--resume")[0] == 0
    )  # finished: a job that is queued again succeeds
    assert (tmp_path / "broken" / "report.json").stat().st_mtime_ns == before
    assert csq(*arguments, "--seed", 5, "-o", tmp_path / "broken", "--resume")[0] == 2
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == whole
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == whole


def test_batch_size_takes_a_number_or_auto(
    csq, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(folder: Path) -> tuple[int, object]:
        settings = yaml.safe_load((folder / "recipe.yaml").read_text())["data"]
        return settings["batch_size"], settings["micro_batch"]

    search = ("search", "--recipe", "digits", "--target-bits", 2, "--set", "max_steps=1", *FAST)
    finetune = ("finetune", digits_run / "model.safetensors", "--data", "digits", "--set", "max_steps=1")
    monkeypatch.setattr(memory, "estimate", lambda *_, **__: memory.StepMemory(1000, 10))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000 + 10 * 25)
    for number, command in enumerate((search, finetune)):
        code, _, err = csq(*command, "--batch-size", 20, "-o", tmp_path / f"{number}")
        assert (code, batches(tmp_path / f"{number}")) == (0, (20, None)), err
        code, _, err = csq(*command, "-o", tmp_path / f"{number} whole")
        assert code == 2
        assert "--batch-size auto" in err
        code, _, err = csq(*command, "--batch-size", "auto", "-o", tmp_path / f"{number} parts")
        assert (code, batches(tmp_path / f"{number} parts")) == (0, (64, "auto")), err
    assert "a step on 64 images needs 0.0 GiB, 0.0 GiB are free: in parts of 22" in err  # 3 parts of at most 25


def test_finetune_starts_from_the_file_alone_and_never_delivers_a_worse_model(
    csq, digits_run: Path, tmp_path: Path
) -> None:
    report_before = json.loads((digits_run / "report.json").read_text())
    code, _, err = csq(
        *("finetune", digits_run / "model.safetensors", "--data", "digits", "--epochs", 2, "-o", tmp_path, "--quiet")
    )
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["mask"] for layer in report["layers"]] == [layer["mask"] for layer in report_before["layers"]]
    assert report["finetune"]["input_top1"] == report_before["accuracy"]["hard_top1"]
    assert report["accuracy"]["hard_top1"] >= report_before["accuracy"]["hard_top1"]
    result = json.loads(csq("evaluate", tmp_path / "model.safetensors", "--data", "digits", "--json")[1])
    assert result["top1"] == report["accuracy"]["hard_top1"]


@pytest.mark.parametrize("method", ["csq", "csq-uniform", "ste", "lsq"])
def test_every_method_s_file_is_finetuned_from_exactly_where_it_stands(csq, tmp_path: Path, method: str) -> None:
    run = ("search", "--recipe", "digits", "--method", method, "--target-bits", "2", "-o", tmp_path / "a", *FAST)
    assert csq(*run)[0] == 0
    still = ("--epochs", 1, "--set", "finetune.lr=1e-9", "--set", "max_steps=3")
    model = tmp_path / "a" / "model.safetensors"
    code, _, err = csq("finetune", model, "--data", "digits", "-o", tmp_path / "b", "--quiet", *still)
    assert code == 0, err
    before, after = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    outcome = after["finetune"]
    assert outcome["input_top1"] == before["accuracy"]["hard_top1"]
    assert abs(outcome["finetuned_top1"] - outcome["input_top1"]) <= 3  # BatchNorm is re-estimated, nothing else moves
    assert [layer["bits"] for layer in after["layers"]] == [layer["bits"] for layer in before["layers"]]


def test_a_file_whose_target_is_more_than_its_planes_is_finetuned(csq, tmp_path: Path) -> None:
    file, out = tmp_path / "run", tmp_path / "finetuned"
    short = ("--epochs", 1, "--set", "max_steps=1", "--quiet")
    few = ("--allocator", "importance", "--target-bits", 4, "--set", "quantization.max_bits=3")
    code, _, err = csq("search", "--recipe", "digits", "--method", "lsq", *few, *short, "--output", file)
    assert code == 0, err
    code, _, err = csq("finetune", file, "--data", "digits", *short, "--output", out)
    assert code == 0, err
    assert json.loads((out / "report.json").read_text())["budget"]["mean_bits"] == 3


def test_a_finetune_that_hurts_keeps_its_input(csq, digits_run: Path, tmp_path: Path) -> None:
    ruin = ("--epochs", 1, "--set", "finetune.lr=30", "--set", "latent_lr=3", "--set", "max_steps=3", "--quiet")
    assert csq("finetune", digits_run / "model.safetensors", "--data", "digits", "-o", tmp_path, *ruin)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["finetune"]["kept"] == "input"
    before = json.loads((digits_run / "report.json").read_text())
    assert report["accuracy"]["hard_top1"] == before["accuracy"]["hard_top1"]
    assert report["layers"] == before["layers"]


def test_search_and_finetune_chain_in_one_command_and_resume_in_either_phase(csq, tmp_path: Path, monkeypatch) -> None:
    from csqcli.training.loop import Trainer

    arguments = (
        "search",
        "--recipe",
        "digits",
        "--target-bits",
        "1.5",
        "--epochs",
        "2",
        "--finetune-epochs",
        "2",
        "--quiet",
    )
    assert csq(*arguments, "-o", tmp_path / "whole")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        ("search", 1), ("search", 2), ("finetune", 1), ("finetune", 2)
    ]  # fmt: skip
    original = Trainer.run_epoch
    for stop in (1, 3):
        calls = iter(range(10))

        def interrupted(self, epoch, stop=stop, calls=calls, **more):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return original(self, epoch, **more)

        output = tmp_path / f"stopped{stop}"
        monkeypatch.setattr(Trainer, "run_epoch", interrupted)
        assert csq(*arguments, "-o", output)[0] == 130
        monkeypatch.setattr(Trainer, "run_epoch", original)
        code, _, err = csq(*arguments, "-o", output, "--resume")
        assert code == 0, err
        assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["csq", "csq-uniform", "ste", "lsq", "float"])
def test_every_method_runs_through_the_same_command(csq, tmp_path: Path, method: str) -> None:
    code, _, err = csq("search", "--recipe", "digits", "--method", method, "--target-bits", "2", "-o", tmp_path, *FAST)
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parity"]["max_logit_gap"] == 0
    assert report["budget"]["mean_bits"] <= (32 if method == "float" else 2)
    assert len(report["layers"]) == (0 if method == "float" else 4)


_MIXED = ("--set", "mixup=0.2", "--set", "cutmix=1.0", "--set", "label_smoothing=0.1")


@pytest.mark.parametrize("extra", [("--distill", "0.5"), _MIXED], ids=["distill", "mixup"])
def test_distillation_and_mixup_train_and_repeat(csq, tmp_path: Path, extra: tuple[str, ...]) -> None:
    plain = ("search", "--recipe", "digits", "--target-bits", "2", *FAST)
    for name, more in (("plain", ()), ("once", extra), ("twice", extra)):
        code, _, err = csq(*plain, "-o", tmp_path / name, *more)
        assert code == 0, err
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "once", "twice")}
    assert weights["once"] == weights["twice"] != weights["plain"]


def test_resume_before_anything_was_saved_starts_from_the_beginning(csq, tmp_path: Path) -> None:
    arguments = ("search", "--recipe", "digits", "--target-bits", "2", *FAST)
    assert csq(*arguments, "-o", tmp_path / "plain")[0] == 0
    assert csq(*arguments, "-o", tmp_path / "resumed", "--resume")[0] == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "resumed")]
    assert files[0] == files[1]


def test_recipes_are_listed_shown_and_described(csq) -> None:
    code, out, _ = csq("recipes")
    assert code == 0
    assert "digits" in out
    assert yaml.safe_load(csq("recipes", "show", "digits")[1])["model"]["source"] == "digits_cnn"
    assert "target_bits" in json.dumps(json.loads(csq("recipes", "schema")[1]))


def test_help_loads_no_torch() -> None:
    script = (
        "import sys, csqcli.cli.app as c\nsys.argv = ['csq', '--help']\n"
        "try: c.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "search" in done.stdout
    assert time.perf_counter() - started < 30  # a hang, not a speed claim


def test_the_module_entry_point_answers() -> None:
    done = subprocess.run([sys.executable, "-m", "csqcli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("csq 0.")


@pytest.mark.parametrize("command", ["search", "plan"])
def test_what_is_typed_and_does_nothing_is_said_by_the_command(csq, tmp_path: Path, command: str) -> None:
    output = ("--output", tmp_path / "run") if command == "search" else ()
    quick = ("--method", "lsq", "--epochs", 1, "--set", "max_steps=1")
    code, _, err = csq(
        command, "--recipe", "digits", "--target-bits", 3, "--set", "state_dtype=bfloat16", *quick, *output
    )
    assert code == 0, err
    assert "without effect: quantization.state_dtype: the state of lsq is float32" in err


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_an_interruption_before_anything_is_saved_promises_nothing(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    from csqcli.training.run import Run

    def interrupted(self, layers):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "count_operations", interrupted)
    output = tmp_path / "run"
    code, _, err = csq("search", "--recipe", "digits", "--target-bits", "2", "--quiet", "-o", output, *more)
    assert (code, err) == (130, "csq: interrupted; nothing was saved yet, and the same command starts over\n")
    assert not output.exists()
