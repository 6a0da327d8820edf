"""Every wrong invocation is one line on stderr and exit code 2, and the line is in tests/cli/wrong_invocations.txt.

``CSQ_SNAPSHOT=write python -m pytest tests/cli/test_wrong_invocations.py`` writes that file anew; read its diff.
Options' own texts are typer's, of its newest release.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from cli.test_options import TABLE
from PIL import Image
from safetensors.torch import save_file

from csqcli import api
from csqcli.cli.app import app
from csqcli.models.networks import digits_cnn

pytestmark = pytest.mark.usefixtures("remembered_traces")

WRITE = os.environ.get("CSQ_SNAPSHOT") == "write"
SNAPSHOT = Path(__file__).with_name("wrong_invocations.txt")
DIGITS = "search --recipe digits -o new --quiet"
FOLDER = "search timm:resnet10t --no-pretrained --target-bits 3 -o new --quiet --epochs 1 --set workers=0"
CLASSES = "search digits_cnn --target-bits 3 -o new --quiet --no-pretrained"
ROWS = [
    # commands and options
    "serach resnet18",
    "search resnet18 --target-bit 3",
    "search resnet18 extra --data digits",
    "search resnet18 --data digits --target-bits 3 --set model.arguments={in_chans:1}",
    "search --recipe digits --target-bits",
    "search --recipe digits --epochs three",
    "search --recipe digits -o new --quiet --target-size 2XB",
    "search --recipe digits -o new --quiet --target-size 20kB --method float",
    "search --recipe digits -o new --quiet --target-size 1kB",
    "search --recipe digits -o new --quiet --target-size 1KB",
    "search --recipe digits -o new --quiet --target-size 6kB",
    "search --recipe digits -o new --quiet --target-compression 0.5",
    "search --recipe digits -o new --quiet --target-bops 1000",
    "search --recipe digits -o new --quiet --target-bops 5X",
    "search --recipe digits -o new --quiet --target-size 2MB --method lsq",
    "search --recipe digits -o new --quiet --target-size 2MB --finetune-epochs 1",
    "search --recipe digits -o new --quiet --target-bops 5G --finetune-epochs 1",
    "search --recipe digits -o new --quiet --target-bits 3 --epochs 0 --set zeroq_steps=9",
    "plan resnet18 --target-bits 3",
    f"{DIGITS} --batch-size many",
    f"{DIGITS} --batch-size 0",
    f"{DIGITS} --batch-size 33 --set mixup=0.2",
    "search --recipe digits -o new -q --method ste --target-bits 2 --set layers.keep=[fc]",
    "search --recipe digits -o new -q --method lsq --target-bits 2 --set 'layers.max_bits={conv2: 0}'",
    "search --recipe digits -o new -q --target-bits 2 --set ship_as=bit-packed",
    f"{DIGITS} --set micro_batch=0",
    f"{DIGITS} --set micro_batch=some",
    "search --recipe digits --device gpu",
    # several targets, and milliseconds
    "search --recipe digits -o new --quiet --target-size 2MB --target-compression 5",
    "search --recipe digits -o new --quiet --target-bits 2 --target-bops 1e7 --method csq",
    "search --recipe digits -o new --quiet --target-bits 2 --target-bops 1000",
    "search --recipe digits -o new --quiet --target-latency -1",
    "search --recipe digits -o new --quiet --target-bits 2 --latency-table table.json",
    "search --recipe digits -o new --quiet --target-latency 5 --latency-table missing.json",
    "search --recipe digits -o new --quiet --target-latency 5 --latency-table classes.json",
    "search --recipe digits -o new --quiet --target-latency 5 --latency-table table.json --latency-engine torch",
    "search --recipe digits -o new --quiet --target-latency 4.5 --latency-table latencies.json --act-bits 8",
    "search --recipe digits -o new --quiet --target-latency 5 --latency-table latencies.json --input-size 12",
    "allocate digits_cnn --data digits --no-pretrained -q",
    "allocate --recipe digits -q --set target_size=1MB",
    # latencies
    "bench",
    "bench resnet99 --engine torch",
    "bench nothing.onnx",
    "bench digits_cnn --engine tflite",
    "bench digits_cnn --engine torch --threads 0",
    "bench missing.safetensors --engine torch --input-size 12",
    # sweeps
    "sweep --recipe digits -o new -q",
    "sweep --recipe digits -o new -q --targets 1,two",
    "sweep --recipe digits -o new -q --targets 0,2",
    "sweep --recipe digits -o new -q --targets 2,9",
    "sweep --recipe digits -o new -q --targets 2,1,2.0",
    "sweep --recipe digits -o new -q --targets 1,2 --max-drop -1",
    "sweep --recipe digits -o new -q --targets 1,2 --with lsk",
    "sweep --recipe digits -o new -q --targets 1,2 --with lsq,lsq",
    "sweep --recipe digits -o new -q --targets 1,2 --with float",
    "sweep --recipe digits -o new -q --targets 1,2 --with staged",
    "sweep --recipe digits -o new -q --targets 1,2 --epochs 0 --with ste",
    "sweep --recipe digits -o new -q --targets 1,2 --with ptq",
    "sweep --recipe digits -o new -q --targets 1,1.5 --method lsq",
    "sweep --recipe digits -o new -q --targets 1,2 --method float",
    "sweep --recipe digits -o new -q --targets 1,2 --epochs 0 --warm",
    "sweep --recipe digits -o new -q --targets 1,2 --cold --warm-epochs 3",
    "sweep --recipe digits -o new -q --targets 1,2 --seeds 0",
    "sweep --recipe digits -o new -q --targets 1,2 --seeds three",
    "sweep --recipe digits -o new -q --targets 1,2 --seeds 2 --seed 9223372036854775807",
    "sweep --recipe digits -o new -q --targets 1,2 --launcher-set slurm_partition=gpu",
    "sweep --recipe digits -o new -q --targets 1,2 --target-bits 3",
    "sweep --recipe digits -o run -q --targets 1,2",
    "sweep --recipe digits -o text.txt -q --targets 1,2",
    "sweep --recipe digits -o new -q --targets 1,2 --data nowhere",
    "sweep --recipe digits -o new -q --targets 1,2 --set model.warm_start=nowhere.safetensors",
    "sweep-run empty staged-2bit",
    f"{DIGITS} --set model.warm_start=nowhere.safetensors",
    f"{DIGITS} --set model.warm_start=run/model.safetensors --epochs 0",
    "evaluate run/model.safetensors",
    "evaluate",
    "evaluate run/model.safetensors --data digits --batch-size 0",
    "evaluate run/model.safetensors --data digits --val-limit 0",
    "recipes shwo digits",
    "recipes show digit",
    # models
    "search",
    f"{DIGITS} resnet19",
    f"{DIGITS} resnet20",
    f"{DIGITS} timm:resnet19",
    f"{DIGITS} torchvision:resnet19",
    f"{DIGITS} csq:digits",
    f"{DIGITS} zzzzzz",
    f"{DIGITS} :build",
    f"{DIGITS} no_such_package:build",
    f"{DIGITS} json:build",
    f"{DIGITS} json:dumps --set model.arguments.obj=1",
    f"{DIGITS} --set 'model.arguments={{width: many}}'",
    "inspect resnet19",
    "inspect timm:resnet10t --strict 2",
    "inspect timm:resnet10t --exclude 'nothing.*'",
    "inspect timm:resnet10t --num-classes 0",
    "search resnet18 --target-bits 3 --data digits -o new --quiet",
    "search cifar_resnet20 --target-bits 3 --data digits -o new --quiet",
    # targets
    f"{DIGITS} --target-bits 0",
    f"{DIGITS} --target-bits -1",
    f"{DIGITS} --target-bits 99",
    f"{DIGITS} --target-bits three",
    f"{DIGITS} --target-bits nan",
    f"{DIGITS} --target-bits inf",
    f"{DIGITS} --set target_bits=1e400",
    f"{DIGITS} --method ste --target-bits 1.5",
    f"{DIGITS} --target-bits 0.5",
    f"{DIGITS} --target-bits 1.5 --set layers.keep=[fc,conv3]",
    f"{DIGITS} --target-bits 3 --set 'layers.min_bits={{conv3: 6}}'",
    f"{DIGITS} --set 'layers.min_bits={{fc: 6}}' --set 'layers.max_bits={{fc: 2}}'",
    # recipes and settings
    f"{DIGITS} --set epoch=3",
    f"{DIGITS} --epochs 1 --set epochs=2",
    f"{DIGITS} --batch-size 32 --set batch_size=64",
    f"{DIGITS} resnet18 --set model.source=resnet50",
    f"{DIGITS} --no-pretrained --set model.pretrained=true",
    f"{DIGITS} --set batch_size=32 --set data.batch_size=64",
    "finetune run/model.safetensors --data digits --quiet -o new --epochs 1 --set finetune.epochs=2",
    "evaluate --model digits_cnn --data digits --input-size 8 --set data.input_size=12",
    "sensitivity --recipe digits --data digits --set data.source=cifar10:images",
    "allocate --recipe digits --target-bits 2 --set target_bits=3",
    "plan --recipe digits --seed 1 --set seed=2",
    "sweep --recipe digits --targets 2 --lr 0.1 --set optimizer.lr=0.2",
    "init digits_cnn --target-bits 2 --set target_bits=3 -o new.yaml",
    "reproduce table4 --data digits --set data.source=cifar10:images",
    f"{DIGITS} --set epochs",
    f"{DIGITS} --set epochs=[1",
    f"{DIGITS} --set epochs=-1",
    f"{DIGITS} --set epochs=many",
    f"{DIGITS} --set optimizer.lr=0",
    f"{DIGITS} --set optimizer.lr=nan",
    f"{DIGITS} --set optimizer.lr=inf",
    f"{DIGITS} --set lr=0.1",
    f"{DIGITS} --set lr=high",
    f"{DIGITS} --set batch_size=0",
    f"{DIGITS} --set workers=-1",
    f"{DIGITS} --set max_bits=3",
    f"{DIGITS} --set augment=flip",
    f"{DIGITS} --set optimizer.name=adamm",
    f"{DIGITS} --set schedule=cosin",
    f"{DIGITS} --set on_nonfinite=ignore",
    f"{DIGITS} --set amp=fp16",
    f"{DIGITS} --set save_every_minutes=0",
    f"{DIGITS} --set 'mean=[0.5, 0.5]'",
    f"{DIGITS} --set std=[0]",
    f"{DIGITS} --set layers.exclude=fcc",
    f"{DIGITS} --set 'layers.exclude=[fcc]'",
    f"{DIGITS} --set 'layers.keep=[nothing.*]'",
    f"{DIGITS} --set 'layers.max_bits={{fcc: 2}}'",
    f"{DIGITS} --set 'layers.exclude=[\"*\"]'",
    f"{DIGITS} --set 'layers.max_bits={{fc: 9}}'",
    f"{DIGITS} --act-bits 4 --set 'layers.min_bits={{conv1: 8, fc: 8}}'",
    f"{DIGITS} --set quantization.max_bits=4 --set 'layers.max_bits={{fc: 5}}'",
    f"{DIGITS} --set optimizer=adam",
    f"{DIGITS} --method cqs",
    f"{DIGITS} --method LSQ",
    f"{DIGITS} --act-bits 9",
    f"{DIGITS} --epochs 0 --method staged",
    f"{DIGITS} --epochs 3 --method ptq",
    f"{DIGITS} --calib images",
    f"{DIGITS} --epochs 0 --calib nowhere",
    f"{DIGITS} --epochs -1",
    f"{DIGITS} --seed -1",
    f"{DIGITS} --distill 2",
    f"{DIGITS} --finetune-epochs -1",
    f"{DIGITS} --set mixup=0.2 --set batch_size=33",
    f"{DIGITS} --allocator manual",
    f"{DIGITS} --set 'planes={{fc: 2}}'",
    f"{DIGITS} --trials 0",
    f"{DIGITS} --method bsq --planes planes/some.yaml",
    f"{DIGITS} --method msq --allocator hawq-v2",
    f"{DIGITS} --method float --planes planes/some.yaml",
    f"{DIGITS} --planes nowhere.yaml",
    f"{DIGITS} --planes recipes",
    f"{DIGITS} --planes recipes/list.yaml",
    f"{DIGITS} --planes recipes/broken.yaml",
    f"{DIGITS} --planes planes/misspelt.yaml",
    f"{DIGITS} --planes planes/nine.yaml",
    f"{DIGITS} --planes planes/some.yaml",
    f"{DIGITS} --planes planes/dear.yaml --target-bits 2",
    f"{DIGITS} --planes planes/stranger.yaml",
    f"{DIGITS} --method twn --planes planes/dear.yaml --target-bits 3",
    "search digits_cnn --data digits -o new --quiet --planes planes/dear.yaml",
    "allocate",
    "allocate digits_cnn --data digits",
    "allocate digits_cnn --target-bits 2",
    "allocate --recipe digits --target-bits 2.5 --allocator uniform -q",
    "allocate --recipe digits --allocator hawq",
    "allocate --recipe digits --allocator haq",
    "allocate --recipe digits -o text.txt",
    "allocate --recipe digits -o nowhere/planes.yaml -q",
    "sensitivity",
    "sensitivity digits_cnn",
    "sensitivity --recipe digits --widths 0",
    "sensitivity --recipe digits --widths 1,,2",
    "sensitivity --recipe digits --widths nine",
    "sensitivity --recipe digits --svg out.png",
    "sensitivity --recipe digits --svg nowhere/out.svg",
    "explain run",
    "explain nowhere --data digits",
    "explain float.safetensors --data digits",
    "explain text.onnx --data digits",
    "explain factory.safetensors --data digits -q",
    "explain run --data digits --val-limit 1 -q",
    "explain run --data images -q",
    "diff",
    "diff float.safetensors",
    "diff float.safetensors run",
    "diff float.safetensors nowhere --data digits",
    "diff nowhere.pth run --data digits -q",
    "diff resnet18 run --data digits -q",
    "diff pickled.pth run --data digits -q",
    "diff wide.safetensors run --data digits -q",
    "diff run float.safetensors --data digits -q",
    "diff run factory.safetensors --data digits -q",
    "diff run text.onnx --data digits -q",
    "diff run run --export text.txt --data digits -q",
    "diff run run --data images -q",
    "compare",
    "compare run",
    "compare run nowhere",
    "compare run float.safetensors",
    "compare run run/metrics.jsonl",
    "compare run recipes/list.json",
    "compare run recipes/other.json",
    "compare run nowhere.json",
    "search --recipe digit",
    "search --recipe recipes/unknown_key.yaml",
    "search --recipe recipes/unknown_section.yaml",
    "search --recipe recipes/british.yaml",
    "search --recipe recipes/neighbour.yaml",
    "search --recipe recipes/flat.yaml",
    "search --recipe recipes/elsewhere.yaml",
    "search --recipe recipes/broken.yaml",
    "search --recipe recipes/list.yaml",
    "search --recipe recipes",
    "search --recipe noise.safetensors",
    # data
    f"{FOLDER}",
    f"{FOLDER} --data nowhere",
    f"{FOLDER} --data empty",
    f"{FOLDER} --data cifar10:empty",
    f"{FOLDER} --data cifar10:",
    f"{FOLDER} --data noise.safetensors",
    f"{FOLDER} --data digit",
    f"{FOLDER} --data no_images",
    f"{FOLDER} --data no_train",
    f"{FOLDER} --data one_class",
    f"{FOLDER} --data flat",
    f"{FOLDER} --data flat/labels.csv",
    f"{FOLDER} --data flat/kinds.csv",
    f"{FOLDER} --data turned",
    f"{FOLDER} --data .",
    f"{FOLDER} --data cifar10:images",
    f"{FOLDER} --data mismatch",
    f"{FOLDER} --data truncated_val",
    f"{FOLDER} --data truncated_train --set input_size=32",
    f"{FOLDER} --data truncated_val --set input_size=72",
    f"{DIGITS} --data images",
    f"{DIGITS} --set train_limit=0",
    # checkpoints
    f"{CLASSES} --data digits --checkpoint nowhere.pth",
    f"{CLASSES} --data digits --checkpoint empty",
    f"{CLASSES} --data digits --checkpoint noise.pth",
    f"{CLASSES} --data digits --checkpoint noise.safetensors",
    f"{CLASSES} --data digits --checkpoint truncated_checkpoint.pth",
    f"{CLASSES} --data digits --checkpoint pickled.pth",
    f"{CLASSES} --data digits --checkpoint nothing.pth",
    f"{CLASSES} --data digits --checkpoint nan.safetensors",
    f"{CLASSES} --data digits --checkpoint wide.safetensors",
    f"{CLASSES} --data digits --checkpoint builtin:nothing",
    "search cifar_resnet20 --data digits --target-bits 3 -o new --quiet --checkpoint builtin:digits_float",
    f"{CLASSES} --data images --checkpoint builtin:digits_float",
    # output folders
    "search --recipe digits --quiet -o run",
    "search --recipe digits --quiet -o noise.safetensors",
    "search --recipe digits --quiet -o noise.safetensors/inside",
    "search --recipe digits --quiet -o stranger",
    "search --recipe digits --quiet -o unfinished",
    "search --recipe digits --quiet -o unfinished --resume",
    "search --recipe digits --quiet -o unfinished --resume --force",
    "search --recipe digits --quiet --device cuda -o new",
    # finetune, evaluate, report, inspect and export of what they cannot read
    *(
        f"{command} {file}{options}"
        for command, options in (("report", ""), ("evaluate", " --data digits"), ("finetune", " --data digits -o new"))
        for file in ("nowhere.safetensors", "text.txt", "float.safetensors", "noise.safetensors", "cut.safetensors")
    ),
    *(
        f"{command} {folder}{options}"
        for command, options in (
            *(("report", ""), ("bench", ""), ("export", " --bit-packed"), ("evaluate", " --data digits")),
            *(("explain", " --data digits"), ("diff float.safetensors", " --data digits"), ("compare run", "")),
            ("finetune", " --data digits -o new"),
        )
        for folder in ("empty", "unfinished", "several")
    ),
    "report run --html run/model.safetensors",
    "report run --html nowhere/page.html",
    "report run --svg text.txt",
    "report run --png without_resvg",
    "finetune run/model.safetensors --data nowhere --quiet -o new",
    "finetune run/model.safetensors --data images --quiet -o new",
    "finetune run/model.safetensors --data digits --quiet -o run",
    "finetune run/model.safetensors --data digits --quiet -o new --epochs 0",
    "finetune run/model.safetensors --data digits --quiet -o new --set finetune.epochs=0",
    "finetune run/model.safetensors --data digits --quiet -o new --set target_bits=1",
    "finetune run/model.safetensors --data digits --quiet -o new --set act_bits=8",
    "finetune run/model.safetensors --data digits --quiet -o new --set layers.exclude=[fc]",
    "finetune run/model.safetensors --data digits --quiet -o new --set adaptation.epochs=2",
    "finetune run/model.safetensors --data digits --quiet -o new --set epochs=2",
    "finetune run/model.safetensors --data digits --quiet -o new --distill 0.5",
    "finetune run/model.safetensors --data digits --quiet -o new --set optimizer.distill=0.5",
    "finetune factory.safetensors --data digits -o new --quiet",
    "evaluate run/model.safetensors --data images",
    "evaluate run/model.safetensors --data digits --device cuda",
    "evaluate text.onnx --data digits",
    "evaluate --model digits_cnn --data digits",
    "evaluate run --data digits --weights raw",
    "diff digits_cnn run --data digits -q",
    "inspect digits_cnn --pretrained",
    "report run/report.json",
    f"{DIGITS} --act-bits 4 --target-act-bits 4",
    f"{DIGITS} --act-bits auto",
    f"{DIGITS} --set target_act_bits=4",
    "evaluate --model digits_cnn --data digits --set val_limit=500",
    "evaluate --model digits_cnn --data digits --set trust_code=true",
    "evaluate --model digits_cnn --data digits --set data.val_limit=500",
    "sensitivity --recipe digits --set widths=1,2",
    "allocate --recipe digits --set 'output=my planes.yaml'",
    "allocate --recipe digits --set progress=true",
    "inspect run",
    "inspect run/model.safetensors",
    "export nowhere.safetensors --bit-packed",
    "export text.txt --bit-packed -o new.safetensors",
    "export float.safetensors --bit-packed",
    "export run/model.safetensors",
    "export run/model.safetensors --onnx --bit-packed",
    "export run/model.safetensors --bit-packed --activations int8",
    "export run/model.safetensors --onnx --activations int8",
    "export run/model.safetensors --onnx --calib digits",
    "export run/model.safetensors --onnx --target tensorflow",
    "export run/model.safetensors --onnx --weights int4",
    "export run/model.safetensors --onnx --target tensorrt --weights int4 --activations int8",
    "export run/model.safetensors --onnx --target tensorrt --activations int8 --calib digits",
    "export run/model.safetensors --bit-packed -o exists.safetensors",
    "export run/model.safetensors --bit-packed -o empty --force",
    "export run/model.safetensors --bit-packed -o nowhere/x.safetensors",
    "export run/model.safetensors --bit-packed -o run/model.safetensors --force",
    "export run/model.safetensors --bit-packed -o x.onnx",
    "export run/model.safetensors --bit-packed --data images -o x.safetensors",
    "export run/model.safetensors --onnx -o without.onnx",
]  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, digits_run: Path) -> Path:
    """A folder with everything that the rows name."""
    root = tmp_path_factory.mktemp("bench")
    shutil.copytree(digits_run, root / "run")
    quantized = (root / "run" / "model.safetensors").read_bytes()
    (root / "empty").mkdir()
    (root / "stranger").mkdir()
    save_file(digits_cnn().state_dict(), root / "stranger" / "model.safetensors")
    (root / "truncated_checkpoint.pth").write_bytes(b"PK\x03\x04 and no more")
    (root / "unfinished").mkdir()
    (root / "unfinished" / "resume.pt").write_bytes(b"half a state")
    (root / "unfinished" / "recipe.yaml").write_text("epochs: 3\n")
    for name in ("staged-2bit", "staged-3bit"):
        (root / "several" / name).mkdir(parents=True)
        (root / "several" / name / "model.safetensors").write_bytes(quantized)
    (root / "several" / "pareto.html").write_text("all of them")
    (root / "text.txt").write_text("nothing to see\n")
    (root / "text.onnx").write_text("nothing to see\n")
    (root / "exists.safetensors").write_bytes(quantized)
    (root / "cut.safetensors").write_bytes(quantized[: len(quantized) // 2])
    for name in ("noise.safetensors", "noise.pth"):
        (root / name).write_bytes(np.random.default_rng(0).bytes(1000))
    state = digits_cnn().state_dict()
    save_file(state, root / "float.safetensors")
    save_file(state | {"fc.bias": torch.full((10,), torch.nan)}, root / "nan.safetensors")
    save_file(digits_cnn(num_classes=12).state_dict(), root / "wide.safetensors")
    torch.save({"state_dict": digits_cnn().state_dict(), "loss": print}, root / "pickled.pth")
    torch.save({"epoch": 3}, root / "nothing.pth")
    recipes = root / "recipes"
    recipes.mkdir()
    (recipes / "unknown_key.yaml").write_text("quantization: {target_bit: 3}\n")
    (recipes / "unknown_section.yaml").write_text("optimiser: {lr: 3}\n")
    (recipes / "british.yaml").write_text("quantisation: {target_bits: 3}\n")
    (recipes / "neighbour.yaml").write_text("data: {batchsize: 3}\n")
    (recipes / "broken.yaml").write_text("epochs: [1\nmodel: {\n")
    (root / "latencies.json").write_text(json.dumps(TABLE))
    (root / "classes.json").write_text('{"schema_version": 1}')
    (recipes / "flat.yaml").write_text("target_bits: 2\n")
    (recipes / "elsewhere.yaml").write_text("quantization: {lr: 0.1}\n")
    (recipes / "list.yaml").write_text("- epochs\n")
    (recipes / "list.json").write_text("[1]")
    (recipes / "other.json").write_text('{"name": "fig2"}')
    planes = root / "planes"
    planes.mkdir()
    (planes / "misspelt.yaml").write_text("target: 3\nplanes: {'*': 2}\n")
    (planes / "nine.yaml").write_text("planes: {conv1: 9}\n")
    (planes / "some.yaml").write_text("planes: {conv1: 2, conv2: 2}\n")
    (planes / "dear.yaml").write_text("planes: {'*': 3}\n")
    (planes / "stranger.yaml").write_text("planes: {'*': 3, layer4: 2}\n")
    _images(root / "images", train=("a", "b"), val=("a", "b"))
    _images(root / "no_images", train=(), val=("a", "b"))
    (root / "no_images" / "train" / "a").mkdir(parents=True)
    (root / "no_images" / "train" / "b").mkdir()
    _images(root / "no_train", train=(), val=("a", "b"))
    _images(root / "one_class", train=("a",), val=("a",))
    _images(root / "flat", train=("a",), val=())
    (root / "flat" / "labels.csv").write_text("image_path,label_name,split\ntrain/a/0.png,a,train\n")
    (root / "flat" / "kinds.csv").write_text("picture,kind,split\ntrain/a/0.png,a,train\n")
    for label in ("a", "b"):
        for split in ("train", "test"):
            shutil.copytree(root / "images" / "val" / label, root / "turned" / label / split)
    _images(root / "mismatch", train=("a", "b"), val=("a", "c"))
    for name, splits in (("truncated_val", ["val"]), ("truncated_train", ["train"])):
        _images(root / name, train=("a", "b"), val=("a", "b"))
        for split in splits:
            for path in (root / name / split).rglob("*.png"):
                path.write_bytes(path.read_bytes()[:60])
    _factory_file(root / "factory.safetensors")
    return root


def _images(root: Path, *, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    for split, classes in (("train", train), ("val", val)):
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")


def _factory_file(path: Path) -> None:
    import csqcli
    from csqcli.models.networks import digits_cnn

    model = digits_cnn()
    optimizer = csqcli.CSQ(model, target_bits=3, total_steps=1)
    csqcli.save(model, optimizer, path, source="csqcli.models.networks:digits_cnn", num_classes=10)


@pytest.fixture
def elsewhere(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the bench folder, on a machine without GPU and network."""
    from csqcli.models import libraries as sources

    monkeypatch.chdir(bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sources, "_reachable", lambda url: False)
    monkeypatch.setenv("HF_HUB_CACHE", "no-cache")


def snapshot() -> dict[str, str]:
    """{command line: what it said}."""
    text = SNAPSHOT.read_text(encoding="utf-8") if SNAPSHOT.exists() else ""
    return dict(block.split("\n", 1) for block in text.removeprefix("$ csq ").rstrip("\n").split("\n\n$ csq ") if block)


KNOWN, SAID = snapshot(), {}


@pytest.mark.parametrize("row", ROWS)
def test_one_line_that_says_what_where_and_what_to_do(
    csq, bench: Path, elsewhere, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    if row.endswith("without.onnx"):
        monkeypatch.setitem(sys.modules, "onnx", None)
    if row.endswith("without_resvg"):
        monkeypatch.setitem(sys.modules, "resvg_py", None)
    if row.endswith("haq"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before = {path: path.stat().st_mtime_ns for path in bench.rglob("*") if path.is_file()}
    code, out, err = csq(*shlex.split(row))
    shutil.rmtree("new", ignore_errors=True)
    # bytes beside the integers move with every key that a recipe gets
    SAID[row] = re.sub(r"takes (about )?[\d,]+", r"takes \1N", err.replace(str(bench), "BENCH").rstrip("\n"))
    assert (code, out) == (2, "")
    assert err.startswith("csq: error: ")
    assert err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in bench.rglob("*") if path.is_file()} == before
    if not WRITE:
        assert SAID[row] == KNOWN.get(row)


_WITH_SET = {  # a command line of each command that has --set, which --set KEY=x spoils
    "search": "--recipe digits -q",
    "plan": "--recipe digits -q",
    "sweep": "--recipe digits -q --targets 2",
    "finetune": "run --data digits -q",
    "allocate": "--recipe digits -q",
    "sensitivity": "--recipe digits -q",
    "evaluate": "--model digits_cnn --data digits -q",
    "reproduce": "table4 --data digits --plan",
    "init": "-o new.yaml",
}


def test_every_command_that_has_set_is_below() -> None:
    commands = typer.main.get_command(app).commands
    assert {name for name, command in commands.items() if "--set" in _options(command)} == set(_WITH_SET)


@pytest.mark.parametrize("command", _WITH_SET)
def test_a_key_of_set_called_like_an_argument_or_option_is_one_line(csq, elsewhere, command: str) -> None:
    function = getattr(api, command, None)
    keys = {
        option.removeprefix("--").replace("-", "_")
        for option in _options(typer.main.get_command(app).commands[command])
    }
    keys |= set(inspect.signature(function).parameters) if function is not None else set()
    for key in sorted(keys - {"name"}):  # optimizer.name, which is timm's to know
        code, out, err = csq(command, *_WITH_SET[command].split(), "--set", f"{key}=x")
        assert (code, out, err.count("\n"), err[:11]) == (2, "", 1, "csq: error:"), (key, err)


def _options(command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def test_the_snapshot_holds_these_rows_and_no_others() -> None:
    if WRITE:
        SNAPSHOT.write_text("\n".join(f"$ csq {row}\n{SAID[row]}\n" for row in ROWS), encoding="utf-8")
    assert list(snapshot()) == ROWS
    assert len(ROWS) >= 60
