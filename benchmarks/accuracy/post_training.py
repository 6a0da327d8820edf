"""Post-training quantization: what each part of it is worth, which rules for single layers pay, and what a short training adds.

    python benchmarks/accuracy/post_training.py resnet20 --data cifar10-jpeg --checkpoint resnet20_float.safetensors --work runs/ptq-r20
    python benchmarks/accuracy/post_training.py lite0 --data imagenette --checkpoint tf_efficientnet_lite0.safetensors --work runs/ptq-lite0
    python benchmarks/accuracy/post_training.py lite0 … --rows "ptq, 2" "first and last float, 2" "ptq and 3 epochs, 2"

One thread, seed 0, float32; all through `csqcli.pipeline.search`. Every row is a run in a folder of --work: finished ones are read
from there, so the command goes on where it was stopped. --rows picks some of them by name; rows of training take minutes
per epoch. Seconds are of processor time (other load on the machine does not count), the float model's evaluation included.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

LAYERS = {  # first, last, depthwise
    "resnet20": ("conv1", "fc", None),
    "lite0": ("conv_stem", "classifier", "*conv_dw"),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet20": {
        "model.source": "cifar_resnet20",
        "data.val_split": "test",
        "data.train_limit": 2000,
        "data.val_limit": 2000,
    },
    "lite0": {
        "model.source": "timm:tf_efficientnet_lite0",
        "data.input_size": 128,
        "data.train_limit": 4000,
        "data.val_limit": 1000,
        "data.workers": 1,
        "adaptation.epochs": 0,
    },
}
OFF: dict[str, dict[str, Any]] = {
    "ptq": {},
    **{f"recovery {value:g}": {"ptq.recovery": value} for value in (0.25, 0.7, 1.0)},
    **{f"passes {value}": {"ptq.passes": value} for value in (4, 64)},
    **{f"damping {value:g}": {"ptq.damping": value} for value in (0.001, 0.1)},
    "zeroq": {"data.calib": "zeroq"},
    "A8": {"quantization.act_bits": 8},
    "A4": {"quantization.act_bits": 4},
    "A4 in the mean": {"quantization.act_bits": "auto", "quantization.target_act_bits": 4},
    "A4 in the mean of operations": {
        "quantization.act_bits": "auto",
        "quantization.target_act_bits": 4,
        "quantization.act_per": "macs",
    },
    "nearest": {"ptq.rounding": "nearest"},
    "inputs not followed": {"ptq.follow_inputs": False},
    "no bias correction": {"ptq.correct_bias": False},
    "no BatchNorm": {"bn_recalibration_batches": 0},
    "nothing but nearest": {
        "ptq.rounding": "nearest",
        "ptq.correct_bias": False,
        "bn_recalibration_batches": 0,
    },
    "uniform planes": {"quantization.allocator": "uniform"},
    "uniform planes, nothing but nearest": {
        "quantization.allocator": "uniform",
        "ptq.rounding": "nearest",
        "ptq.correct_bias": False,
        "bn_recalibration_batches": 0,
    },
}


UNIFORM = {"quantization.allocator": "uniform"}
_ROOM = 0.5  # planes in the mean beyond the whole number that the layers without a rule have


def rules(network: str) -> dict[str, dict[str, Any]]:
    """What people do to first, last and depthwise layers out of habit. The mean over the layers under quantization is the target
    all the same, so what these layers get is taken from the others, but for those with the same planes in all others."""
    first, last, depthwise = LAYERS[network]
    found: dict[str, dict[str, Any]] = {
        "first and last float": {"layers.exclude": [first, last]},
        "first and last 8 planes": {"layers.keep": [first, last]},
        "uniform planes": UNIFORM,
        "uniform planes, first and last 8": UNIFORM | {"layers.keep": [first, last]},
    }
    if depthwise is not None:
        found |= {
            "depthwise float": {"layers.exclude": [depthwise]},
            "depthwise 8 planes": {"layers.keep": [depthwise]},
            "depthwise 4 planes or more": {"layers.min_bits": {depthwise: 4}},
            "uniform planes, first, last and depthwise 8": UNIFORM | {"layers.keep": [first, last, depthwise]},
        }
    return found


def rows(network: str) -> dict[str, dict[str, Any]]:
    """Overrides of every row, by its name."""
    found = {
        f"{name}, {target}": {"epochs": 0, "quantization.target_bits": target, **more}
        for target in (8, 4, 3, 2)
        for name, more in OFF.items()
        if target in (3, 4) or name == "ptq"
    }
    for target in (3, 2):
        for name, more in rules(network).items():
            room = _ROOM if {"layers.keep", *UNIFORM} <= more.keys() else 0
            found[f"{name}, {target}"] = {"epochs": 0, "quantization.target_bits": target + room, **more}
    for epochs in (1, 3):
        for target in (4, 3, 2, 1.5):
            trained = {"epochs": 0, "finetune.epochs": epochs, "batchnorm": "frozen", "data.train_limit": None}
            found[f"ptq and {epochs} epochs, {target}"] = trained | {"quantization.target_bits": target}
            found[f"staged {epochs}, {target}"] = {
                "epochs": epochs,
                "quantization.target_bits": target,
                "data.train_limit": None,
            }
    return found


def main() -> None:
    from csqcli import pipeline
    from csqcli.data.splits import DataSet
    from csqcli.recipe.resolve import resolve
    from csqcli.system.progress import Display
    from csqcli.training.opening import open_images

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", help="names of rows; all if unset")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="laid over every row")
    given = parser.parse_args()
    table = rows(given.network)
    images: DataSet | None = None
    for name in given.rows or table:
        folder = given.work / name.replace(", ", "-").replace(" ", "_")
        more = {key: json.loads(value) for key, _, value in (text.partition("=") for text in given.set)}
        fixed = NETWORKS[given.network] | {
            "data.source": given.data,
            "model.checkpoint": given.checkpoint,
            "threads": 1,
        }
        began = time.process_time()
        recipe = resolve("photographs" if given.network == "lite0" else "short", fixed | table[name] | more)
        if images is None:
            images = open_images(recipe)
        report = pipeline.search(recipe, folder, display=Display(quiet=True), resume=True, images=images)
        seconds, accuracy = time.process_time() - began, report["accuracy"]
        timing = folder / "seconds.json"
        if not timing.exists():
            timing.write_text(json.dumps(seconds))
        print(
            f"{name:<40} float {accuracy['float_top1']:.2f}  hard {accuracy['hard_top1']:.2f}  "
            f"bits {report['budget']['mean_bits']:.3f}  file {report['sizes']['file_bytes']:,}  "
            f"{json.loads(timing.read_text()):.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
