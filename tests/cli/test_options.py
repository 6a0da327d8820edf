"""Every option of every command is used at least once, through the real entry point.

``INVOCATIONS`` is the table: a row per run of a command, with what must be seen afterwards. A new option without a row fails
``test_every_option_has_a_row``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from csqcli.cli.app import app
from tests.drawing import needs_png

pytestmark = pytest.mark.usefixtures("remembered_traces")

SEARCH = "search --recipe digits --target-bits 2 -o OUT --quiet --set max_steps=1 --epochs 1"
FINETUNE = "finetune RUN --data digits -o OUT --quiet --set max_steps=1 --epochs 1"


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    out: str
    err: str
    folder: Path

    def recipe(self, key: str) -> Any:
        value: Any = yaml.safe_load((self.folder / "recipe.yaml").read_text())
        for part in key.split("."):
            value = value[part]
        return value

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return found


def holds(key: str, value: Any) -> Callable[[Result], bool]:
    return lambda result: result.recipe(key) == value


TABLE = {  # of latencies of the digits network: 3.6 ms in the narrowest kernels, 6.4 in fp32, and 1 beside
    "schema_version": 1,
    "engine": "litert",
    "engine_version": "by hand 1",
    "threads": 1,
    "batch": 1,
    "input_size": [1, 8, 8],
    "network": {"fp32": {"ms": 7.4}},
    "layers": [
        {"name": "conv1.weight", "latency": {"fp32": {"ms": 1.0}, "int8": {"ms": 0.5}}},
        {"name": "conv2.weight", "latency": {"fp32": {"ms": 2.0}, "int8": {"ms": 1.0}, "int4": None}},
        {"name": "conv3.weight", "latency": {"fp32": {"ms": 3.0}, "int8": {"ms": 2.0}}},
        {
            "name": "fc.weight",
            "latency": {form: {"ms": ms} for form, ms in (("fp32", 0.4), ("int8", 0.3), ("int4", 0.2), ("int2", 0.1))},
        },
    ],
}

INVOCATIONS: dict[str, tuple[str, Callable[[Result], bool]]] = {
    "version": ("--version", lambda r: r.out.startswith("csq 0")),
    "help": ("--help", lambda r: "search" in r.out),
    "help in short": ("-h", lambda r: "search" in r.out),
    # search
    "search": (
        "search digits_cnn --data digits --checkpoint builtin:digits_float --target-bits 3 --output OUT -q "
        "--set max_steps=1 --epochs 1 --seed 5",
        lambda r: (
            r.recipe("seed") == 5
            and r.recipe("model.checkpoint") == "builtin:digits_float"
            and r.report()["budget"]["mean_bits"] <= 3
        ),
    ),
    "no epochs": (
        "search --recipe digits --target-bits 2 -o OUT --quiet --epochs 0 --set images=64",
        holds("quantization.method", "ptq"),
    ),
    "calib": (
        "search --recipe digits --target-bits 2 -o OUT --quiet --epochs 0 --calib IMAGES",
        lambda r: r.report()["inputs"]["train"]["images"] == 12,
    ),
    "lr": (f"{SEARCH} --lr 0.25", holds("optimizer.lr", 0.25)),
    "val split": (f"{SEARCH} --val-split 0.1", holds("data.val_split", 0.1)),
    "log": (f"{SEARCH} --log tensorboard", lambda r: list((r.folder / "tensorboard").glob("events.*")) != []),
    "finetune --log": (
        f"{FINETUNE} --log tensorboard",
        lambda r: list((r.folder / "tensorboard").glob("events.*")) != [],
    ),
    "log every": (f"{SEARCH} --log-every 5", lambda r: r.err == ""),
    "workers": (f"{SEARCH} --workers 0", holds("data.workers", 0)),
    "amp": (f"{SEARCH} --amp bf16", holds("amp", "bf16")),
    "head": (f"{SEARCH} --head new", holds("model.head", "new")),
    "input size": (f"{SEARCH} --input-size 12", holds("data.input_size", 12)),
    "weights": (f"{SEARCH} --weights raw", holds("model.weights", "raw")),
    "recipe": (SEARCH, holds("model.source", "digits_cnn")),
    "method": (f"{SEARCH} --method lsq", holds("quantization.method", "lsq")),
    "allocator": (f"{SEARCH} --method lsq --allocator uniform", holds("quantization.allocator", "uniform")),
    "trials": (f"{SEARCH} --trials 7", holds("quantization.trials", 7)),
    "planes": (
        f"{SEARCH} --method lsq --planes PLANES --target-bits 2.5",
        lambda r: (
            [layer["bits"] for layer in r.report()["layers"]] == [7, 2, 2, 3]
            and r.recipe("quantization.planes") == {"*": 2, "conv1": 7, "fc.weight": 3}
        ),
    ),
    "cost": (f"{SEARCH} --cost bops", holds("quantization.cost", "bops")),
    "act bits": (f"{SEARCH} --act-bits 8", lambda r: len(r.report()["activations"]) == 4),
    "target act bits": (
        f"{SEARCH} --target-act-bits 3",
        lambda r: r.report()["budgets"][-1]["budget"] == "act_bits" and r.report()["budgets"][-1]["reached"] <= 3,
    ),
    "float epochs": (f"{SEARCH} --float-epochs 1", lambda r: "adaptation" in r.report()),
    "finetune epochs": (f"{SEARCH} --finetune-epochs 1", lambda r: "finetune" in r.report()),
    "distill": (f"{SEARCH} --distill 0.5", holds("optimizer.distill", 0.5)),
    "batch size": (f"{SEARCH} --batch-size 20", holds("data.batch_size", 20)),
    "device": (f"{SEARCH} --device cpu", holds("device", "cpu")),
    "no compile": (f"{SEARCH} --no-compile", holds("compile", False)),
    "no pretrained": (
        "search digits_cnn --data digits --no-pretrained --target-bits 3 -o OUT -q --set max_steps=1 --epochs 1",
        lambda r: r.report()["model"]["weights_from"] == "random",
    ),
    "pretrained": (f"{SEARCH} --pretrained", holds("model.pretrained", True)),
    "set": (f"{SEARCH} --set optimizer.lr=0.25", holds("optimizer.lr", 0.25)),
    "force": (f"{SEARCH} --force", lambda r: (r.folder / "model.safetensors").is_file()),
    "search json": (f"{SEARCH} --json", lambda r: json.loads(r.out)["payload_sha256"] == r.report()["payload_sha256"]),
    "resume": (f"{SEARCH} --resume", lambda r: (r.folder / "model.safetensors").is_file()),
    # finetune
    "finetune": (f"{FINETUNE} --seed 3 --batch-size 20 --device cpu", holds("seed", 3)),
    "finetune output": (FINETUNE.replace("-o OUT", "--output OUT"), lambda r: "finetune" in r.report()),
    "finetune flags": (f"{FINETUNE} --force --trust-code -q", lambda r: "finetune" in r.report()),
    "finetune resume": (f"{FINETUNE} --resume", lambda r: "finetune" in r.report()),
    "finetune teacher": (
        f"{FINETUNE} --teacher builtin:digits_float --set distill=0.5",
        holds("finetune.teacher", "builtin:digits_float"),
    ),
    "finetune val split": (f"{FINETUNE} --val-split test --log-every 5", holds("data.val_split", "test")),
    "finetune json": (f"{FINETUNE} --json", lambda r: json.loads(r.out)["finetune"]["kept"] in ("input", "finetuned")),
    # evaluate
    "evaluate": (
        "evaluate RUN --quiet --data digits --device cpu --batch-size 7 --workers 0 --val-limit 20 --trust-code "
        "--classes-by-position --json",
        lambda r: json.loads(r.out)["samples"] == 20,
    ),
    "evaluate a float model": (
        "evaluate CHECKPOINT --model digits_cnn --data digits --weights raw --input-size 8 --val-split test --log-every 9 "
        "--set data.crop_pct=1 -q --json",
        lambda r: json.loads(r.out)["mean_bits"] == 32,
    ),
    # allocate
    "allocate": (
        "allocate digits_cnn --data digits --checkpoint builtin:digits_float --target-bits 2.5 --allocator quanos --quiet "
        "--head auto --weights auto --pretrained --cost weights --device cpu --val-split test --seed 3 -o OUT/planes.yaml "
        "--set batch_size=64",
        lambda r: (
            "target_bits: 2.5" in (r.folder / "planes.yaml").read_text() and "by quanos" in r.out and "fc" in r.out
        ),
    ),
    "allocate written planes": (
        "allocate --recipe digits --planes PLANES --target-bits 3 --output OUT/planes.yaml --force --json -q",
        lambda r: [layer["planes"] for layer in json.loads(r.out)["layers"]] == [7, 2, 2, 3],
    ),
    "allocate a fresh model": (
        "allocate digits_cnn --data digits --no-pretrained --target-bits 2 --allocator random --trials 3 --log-every 5 --json -q",
        lambda r: json.loads(r.out)["mean_bits"] <= 2,
    ),
    "sensitivity": (
        "sensitivity digits_cnn --data digits --checkpoint builtin:digits_float --head keep --weights raw --pretrained "
        "--val-split test --val-limit 40 --widths 4,1 --device cpu --svg OUT/s.svg --quiet --set seed=1",
        lambda r: "<svg" in (r.folder / "s.svg").read_text() and "worst" in r.out,
    ),
    "sensitivity of a recipe": (
        "sensitivity --recipe digits --no-pretrained --log-every 5 -q --widths 2 --json",
        lambda r: [len(layer["loss"]) for layer in json.loads(r.out)["layers"]] == [1, 1, 1, 1],
    ),
    "explain": (
        "explain RUN --data digits --val-limit 60 --swaps 2 --device cpu --batch-size 16 --workers 0 --trust-code --quiet --log-every 5",
        lambda r: "one less" in r.out and "conv3" in r.out,
    ),
    "explain json": (
        "explain RUN --data digits --val-split test --swaps 0 -q --json",
        lambda r: json.loads(r.out)["swaps"] == [] and len(json.loads(r.out)["layers"]) == 4,
    ),
    "diff": (
        "diff CHECKPOINT RUN --data digits --val-split test --val-limit 20 --device cpu --batch-size 8 --workers 0 --trust-code --quiet "
        "--log-every 5",
        lambda r: "hard dB" in r.out and "conv3" in r.out,
    ),
    "diff with the export": (
        "diff builtin:digits_float ONNX_OF --export ONNX_EXPORT --data digits -q --json",
        lambda r: json.loads(r.out)["engine"].startswith("onnxruntime"),
    ),
    "compare": (
        "compare RUN QUANTIZED_INPUTS --json",
        lambda r: len(json.loads(r.out)["models"]) == 2 and len(json.loads(r.out)["layers"]) == 4,
    ),
    # report, inspect, methods, recipes
    "report": ("report RUN --json", lambda r: json.loads(r.out)["form"] == "compact"),
    "report page": (
        "report RUN --html OUT/page.html --svg OUT/figures",
        lambda r: (r.folder / "page.html").is_file() and (r.folder / "figures" / "planes.svg").is_file(),
    ),
    "report figures as pixels": (
        "report RUN --png OUT/figures",
        lambda r: (r.folder / "figures" / "planes.png").read_bytes().startswith(b"\x89PNG"),
    ),
    "inspect": (
        "inspect timm:resnet10t --no-pretrained --exclude fc --num-classes 7 --strict 0.5 --json",
        lambda r: "fc.weight" not in [layer["name"] for layer in json.loads(r.out)["layers"]],
    ),
    "inspect at a size": (
        "inspect csq:digits_cnn --input-size 12 --json",
        lambda r: json.loads(r.out)["input_size"] == [1, 12, 12],
    ),
    "methods": ("methods --json", lambda r: "csq" in [method["name"] for method in json.loads(r.out)["methods"]]),
    "recipes": ("recipes show digits", lambda r: "digits_cnn" in r.out),
    "recipes list json": ("recipes list --json", lambda r: "digits" in [found["name"] for found in json.loads(r.out)]),
    "recipes show json": ("recipes show digits --json", lambda r: json.loads(r.out)["threads"] == 1),
    "reproduce": (
        "reproduce fig2 --data digits --model digits_cnn --scale 0.002 --seeds 1 --plan --quiet -o OUT --set max_steps=1",
        lambda r: "# 6 runs, 6 epochs in all" in r.out,
    ),
    "reproduce --val-split": (
        "reproduce fig2 --data digits --val-split test --model digits_cnn --scale 0.002 --plan -q -o OUT",
        lambda r: all("val_split: test" in file.read_text() for file in (r.folder / "recipes").iterdir()),
    ),
    "reproduce a figure": (
        "reproduce fig2 --data digits --model digits_cnn --scale 0.002 --output OUT --set max_steps=1 --json -q "
        "--log-every 5",
        lambda r: json.loads(r.out)["name"] == "fig2",
    ),
    # export
    "int8-packed": ("export RUN --int8-packed --output OUT/a.safetensors", lambda r: "int8-packed: " in r.out),
    "bit-packed": ("export RUN --bit-packed -o OUT/a.safetensors --trust-code -q", lambda r: "bit-packed: " in r.out),
    "export json": (
        "export RUN --state-dict -o OUT/a.safetensors --json",
        lambda r: json.loads(r.out)["parity"]["layers_matched"] == 4,
    ),
    "bit-packed-small": (
        "export RUN --bit-packed-small -o OUT/a.safetensors --data digits --val-limit 20",
        lambda r: "BatchNorms folded" in r.out and "the hard model's" in r.out,
    ),
    "state-dict": ("export RUN --state-dict -o OUT/a.safetensors --force", lambda r: "state-dict: " in r.out),
    "form": (
        "export RUN --form bit-packed -o OUT/a.safetensors --quiet --log-every 5 --data digits --val-split 0.5 --val-limit 20 --workers 0",
        lambda r: "of 20 images" in r.out,
    ),
    "onnx": (
        "export QUANTIZED_INPUTS --onnx --activations int8 --calib digits --target ort -o OUT/a.onnx",
        lambda r: "calibrated" in r.out,
    ),
    "torchao": ("export RUN --torchao -o OUT/a.safetensors", lambda r: "layers are int8 in torchao" in r.out),
    "tensorrt": (
        "export RUN --onnx --target tensorrt --weights int4 -o OUT/a.onnx",
        lambda r: "for TensorRT" in r.out and "layers have int4 weights" in r.out,
    ),
    "litert": (
        "export QUANTIZED_INPUTS --litert --activations int8 --calib digits --prefer size -o OUT/a.tflite",
        lambda r: "layers run in int8" in r.out,
    ),
}
INVOCATIONS |= {  # how fast it is
    "bench": (
        "bench RUN --engine torch --threads 1 --batch 2 --repeats 2 --trust-code --quiet",
        lambda r: "conv1" in r.out and "fp32 ms" in r.out and "batch 2" in r.out,
    ),
    "bench of a model": (
        "bench csq:digits_cnn --engine torch --repeats 1 --input-size 12 --num-classes 7 --log-every 5 -q --json",
        lambda r: (
            json.loads(r.out)["input_size"] == [1, 12, 12]
            and [row["shape"][0] for row in json.loads(r.out)["layers"]] == [16, 32, 48, 7]
        ),
    ),
}
INVOCATIONS |= {  # what a run would come to
    "dry run": (f"{SEARCH} --dry-run", lambda r: "file " in r.out and "time " in r.out and not r.folder.exists()),
    "plan written planes": (
        "plan --recipe digits --method lsq --planes PLANES --trials 7 --target-bits 3 --set max_steps=1 --json -q",
        lambda r: [layer["planes"] for layer in json.loads(r.out)["layers"]] == [7, 2, 2, 3],
    ),
    "plan": (
        "plan digits_cnn --data digits --val-split 0.5 --checkpoint builtin:digits_float --weights raw --input-size 12 --head keep "
        "--recipe digits --target-bits 3 --method staged --allocator uniform --cost weights --act-bits auto --target-act-bits 4 "
        "--epochs 2 --float-epochs 1 --finetune-epochs 1 --distill 0.5 --lr 0.1 --workers 0 --amp off --seed 1 --batch-size 64 "
        "--device cpu --no-compile --pretrained --set max_steps=2 --log-every 5 --quiet --json",
        lambda r: json.loads(r.out)["mean_bits"] == 3 and json.loads(r.out)["time"]["steps"] == 2 * (1 + 2 + 1),
    ),
    "target size": (
        "search --recipe digits --target-size 12kB -o OUT --quiet --set max_steps=4 --epochs 2",
        lambda r: (r.folder / "model-bit-packed-small.safetensors").stat().st_size <= 12_000,
    ),
    "target compression": (
        "search --recipe digits --target-compression 5 -o OUT --quiet --set max_steps=4 --epochs 2",
        lambda r: r.report()["budgets"][0]["reached"] >= 5,
    ),
    "target bops": (
        "search --recipe digits --target-bops 4e7 -o OUT --quiet --set max_steps=4 --epochs 2",
        lambda r: r.report()["compute"]["bops"] <= 4e7 and "of 40,000,000 bit operations" in r.out,
    ),
    "target latency": (
        "search --recipe digits --target-latency 1e5 --latency-engine torch --target-bits 2 -o OUT --quiet --set max_steps=2 --epochs 1",
        lambda r: (
            r.report()["budgets"][1]["budget"] == "latency"
            and json.loads((r.folder / "latencies.json").read_text())["engine"] == "torch"
            and "of 100000 ms, by latencies of its layers in torch" in r.out
        ),
    ),
    "latency table": (
        "search --recipe digits --target-latency 4.65 --latency-table TABLE --act-bits 8 -o OUT --quiet --set max_steps=2 --epochs 1",
        lambda r: (
            r.report()["budgets"] == [{"budget": "latency", "asked": 4.65, "reached": 4.6, "engine": "by hand 1"}]
        ),
    ),
    "plan of latencies": (
        "plan --recipe digits --target-latency 1e5 --latency-table TABLE --target-bits 2 -q --json",
        lambda r: json.loads(r.out)["mean_bits"] <= 2,
    ),
    "plan of measured latencies": (
        "plan --recipe digits --target-latency 1e5 --latency-engine torch --target-bits 2 -q --json",
        lambda r: json.loads(r.out)["mean_bits"] <= 2,
    ),
    "allocate within several": (
        "allocate --recipe digits --target-bits 2.2 --target-bops 1e7 --target-latency 7.4 --latency-table TABLE -q --json",
        lambda r: (
            [one["budget"] for one in json.loads(r.out)["budgets"] if one["reached"] <= one["asked"]]
            == ["bits", "bops", "latency"]
        ),
    ),
    "allocate within measured latencies": (
        "allocate --recipe digits --target-bits 2.2 --target-latency 1e5 --latency-engine torch -q",
        lambda r: "latency " in r.out,
    ),
    "plan of a size": (
        "plan --recipe digits --target-size 12kB -q --json",
        lambda r: json.loads(r.out)["bytes"]["bit_packed_small"] == pytest.approx(12_000, rel=0.15),
    ),
    "plan of a compression": ("plan --recipe digits --target-compression 5 -q", lambda r: "bits " in r.out),
    "plan of bops": ("plan --recipe digits --target-bops 4e7 -q", lambda r: "bits " in r.out),
    "plan in short": (
        "plan --recipe digits --target-bits 2 -q",
        lambda r: "by `csq export --bit-packed-small`" in r.out and "search_share" not in r.out,
    ),
    "plan in full": (
        "plan --recipe digits --target-bits 2 -q --verbose",
        lambda r: "conv3.weight" in r.out and "  search_share: 0.1" in r.out.splitlines(),
    ),
}
INVOCATIONS |= {  # many targets
    "sweep": (
        "sweep digits_cnn --data digits --val-split 0.5 --checkpoint builtin:digits_float --weights raw --input-size 12 --head keep "
        "--recipe digits --targets 1,3 --method staged --allocator importance --trials 3 --cost weights --act-bits auto "
        "--target-act-bits 4 --epochs 2 --float-epochs 1 --finetune-epochs 1 --distill 0.5 --lr 0.1 --workers 0 --amp off --seed 1 "
        "--batch-size 64 --device cpu --no-compile --pretrained --set max_steps=2 --log-every 5 --quiet --json --with lsq "
        "--warm --warm-epochs 1 --output OUT --log tensorboard",
        lambda r: (
            [run["run"] for run in json.loads(r.out)["runs"]]
            == ["staged-3bit", "staged-1bit-from3", "lsq-3bit", "lsq-1bit"]
            and "<svg" in (r.folder / "pareto.html").read_text()
        ),
    ),
    "sweep for a drop": (
        "sweep --recipe digits --targets 3 --max-drop 50 --seeds 2 --epochs 0 --set images=64 --calib IMAGES -o OUT -q",
        lambda r: (
            "smallest     within 50 points of float: ptq-1bit" in r.out
            and " ± " in r.out
            and (r.folder / "ptq-1bit-seed1" / "model.safetensors").exists()
        ),
    ),
    "sweep of a fresh model": (
        "sweep digits_cnn --data digits --no-pretrained --targets 3 --cold --epochs 1 --set max_steps=1 -o OUT -q",
        lambda r: "csq-3bit" in r.out,
    ),
}
INVOCATIONS |= {  # around the runs: a recipe to edit, the machine, the shell
    "init": (
        "init resnet18 --recipe photographs --target-bits 3 --method csq --data /images --set optimizer.lr=0.5 -o OUT/mine.yaml",
        lambda r: (
            yaml.safe_load((r.folder / "mine.yaml").read_text())["quantization"]
            == {"method": "csq", "target_bits": 3.0}
        ),
    ),
    "init over nothing": ("init --output OUT/mine.yaml --force", lambda r: r.out.startswith("wrote ")),
    "doctor": ("doctor", lambda r: "passed on cpu" in r.out),
    "doctor --json": ("doctor --json", lambda r: json.loads(r.out)["self_test"][0]["passed"]),
    "completion": ("--show-completion bash", lambda r: "_CSQ_COMPLETE" in r.out),
}
BY_ITSELF = {  # exercised in a test of their own, below or elsewhere
    ("", "--install-completion"): "typer's own; it would write into the home folder",
    ("search", "--compile"): "test_compile_trains",
    ("plan", "--compile"): "the search's own",
    ("sweep", "--compile"): "the search's own",
    ("sweep", "--jobs"): "tests/sweeping/test_sweep.py: it starts processes",
    ("sweep", "-j"): "--jobs in short",
    ("sweep", "--launcher"): "tests/sweeping/test_sweep.py, with --jobs",
    ("sweep", "--launcher-set"): "tests/sweeping/test_sweep.py; a cluster is needed",
    ("plan", "--no-pretrained"): "tests/training/test_planning.py",
    ("inspect", "--pretrained"): "test_pretrained_weights_that_cannot_be_had_are_one_line",
}


def options_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(command, option) for each spelling of every option, as click sees them."""
    for parameter in command.params:
        if parameter.param_type_name == "option":
            for option in (*parameter.opts, *parameter.secondary_opts):
                yield " ".join(path), option
    for name, inner in getattr(command, "commands", {}).items():
        yield from options_of(inner, (*path, name))


def used(line: str) -> Iterator[tuple[str, str]]:
    words = line.split()
    commands = [word for word in words[: 2 if words[0] == "recipes" else 1] if not word.startswith("-")]
    for word in words:
        if word.startswith("-"):
            yield " ".join(commands), word


def test_every_option_has_a_row() -> None:
    known = set(options_of(typer.main.get_command(app)))
    rows = {pair for line, _ in INVOCATIONS.values() for pair in used(line)} | set(BY_ITSELF)
    assert known - rows == set(), "options without a row in INVOCATIONS"
    assert rows - known - {("", "--help"), ("", "-h")} == set(), "rows whose option is gone"


@pytest.mark.parametrize("name", INVOCATIONS)
def test_option_works(name: str, csq, digits_run: Path, image_folder: Path, tmp_path: Path) -> None:
    line, expected = INVOCATIONS[name]
    if "--onnx" in line or "ONNX_EXPORT" in line:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    if "--png" in line:
        needs_png()
    if "--litert" in line:
        pytest.importorskip("ai_edge_litert")
        pytest.importorskip("onnxscript")
    if "--torchao" in line:
        pytest.importorskip("torchao")
    if "tensorboard" in line:
        pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    if "OUT/" in line:
        out.mkdir()
    if "PLANES" in line:
        (tmp_path / "written.yaml").write_text('planes: {"*": 2, conv1: 7, fc.weight: 3}\n')
    if "TABLE" in line:
        (tmp_path / "table.json").write_text(json.dumps(TABLE))
    places = {
        "TABLE": str(tmp_path / "table.json"),
        "PLANES": str(tmp_path / "written.yaml"),
        "RUN": str(digits_run / "model.safetensors"),
        "OUT": str(out),
        "IMAGES": str(image_folder / "train"),
        "CHECKPOINT": str(resources.files("csqcli") / "assets" / "digits_float.safetensors"),
        "QUANTIZED_INPUTS": str(Path(__file__).parents[1] / "file" / "fixtures" / "digits_schema1.safetensors"),
    }
    if "ONNX_EXPORT" in line:
        places |= {"ONNX_OF": places["RUN"], "ONNX_EXPORT": str(tmp_path / "run.onnx")}
        assert csq("export", places["RUN"], "--onnx", "-o", places["ONNX_EXPORT"], "-q")[0] == 0
    words = [places.get(word) or word.replace("OUT/", f"{out}/") for word in line.split()]
    code, stdout, stderr = csq(*words)
    assert code == 0, stderr
    assert expected(Result(stdout, stderr, out))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, of its inner workings
def test_compile_trains(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and no machine code made of it: tests/training/test_loop.py trains with that."""
    compiled, honest = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: (compiled.append(model), honest(model, backend="eager"))[1])
    code, _, err = csq(*SEARCH.replace("OUT", str(tmp_path / "run")).split(), "--compile")
    torch._dynamo.reset()
    assert code == 0, err
    assert len(compiled) == 1
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["compile"] is True


def test_pretrained_weights_that_cannot_be_had_are_one_line(csq, monkeypatch: pytest.MonkeyPatch) -> None:
    from csqcli.models import libraries

    monkeypatch.setattr(libraries, "_reachable", lambda url: False)
    code, _, err = csq("inspect", "torchvision:squeezenet1_1", "--pretrained")
    assert (code, err.count("\n")) == (2, 1)
    assert "pretrained weights" in err


def test_init_replaces_nothing_by_itself(csq, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    code, _, err = csq("init", "-o", str(tmp_path / "mine.yaml"))
    assert (code, err.strip()) == (
        2,
        f"csq: error: {tmp_path / 'mine.yaml'}: exists already; pass --force to replace it, or -o another",
    )
    assert (tmp_path / "mine.yaml").read_text() == "epochs: 3\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            (),
            "wrote FILE without model and data and target; csq search MODEL --data FOLDER --target-bits 3 --recipe FILE",
        ),
        (("resnet18", "--target-bits", 2), "wrote FILE without data; csq search --data FOLDER --recipe FILE"),
        (("resnet18", "--target-bits", 2, "--data", "/images"), "wrote FILE; csq search --recipe FILE"),
        (("--recipe", "digits", "--set", "target_size=2kB"), "wrote FILE; csq search --recipe FILE"),
    ],
)
def test_init_says_what_a_search_by_its_recipe_lacks(csq, tmp_path: Path, typed: tuple, said: str) -> None:
    code, out, err = csq("init", *typed, "-o", tmp_path / "mine.yaml")
    assert (code, out.strip()) == (0, said.replace("FILE", str(tmp_path / "mine.yaml"))), err


def test_init_writes_no_name_that_no_library_has(csq, tmp_path: Path) -> None:
    code, _, err = csq("init", "resnetxx", "-o", tmp_path / "mine.yaml")
    assert (code, not list(tmp_path.iterdir())) == (2, True)
    assert err.startswith("csq: error: resnetxx: unknown model")


@pytest.mark.parametrize("group", [(), ("recipes",)])
def test_no_summary_of_a_command_is_cut_at_80_columns(csq, monkeypatch: pytest.MonkeyPatch, group) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    root: Any = typer.main.get_command(app)
    commands = (root.commands[group[0]] if group else root).commands
    lines = csq(*group, "--help")[1].partition("Commands:\n")[2].splitlines()
    summaries = dict(line.split(None, 1) for line in lines)
    for name, command in commands.items():
        if not command.hidden:
            said = " ".join(command.help.split())
            assert said.startswith(summaries[name]), name
            assert not summaries[name].endswith("..."), name


def test_every_command_shows_an_example_of_itself() -> None:
    commands = getattr(typer.main.get_command(app), "commands", {})
    missing = [
        name for name, command in commands.items() if name != "recipes" and f"Example: csq {name}" not in command.help
    ]
    assert missing == []
