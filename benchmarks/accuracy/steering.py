"""Does mean precision come to the target and stay there? Ways to count planes in Δ_S (Eq. 7), from scratch, over training.

    python benchmarks/accuracy/steering.py --work runs/steering --svg runs/steering/precision.svg
    python benchmarks/accuracy/steering.py --data cifar10-jpeg --epochs 20 --work runs/steering-cifar

Digits, or CIFAR-10 pooled to 8×8 pixels on `cifar_resnet8`; the paper's settings at a learning rate of 0.1. The paper counts
signs of mask logits; `soft` counts Σ f(m_B); the others fix planes at a share of training and train bits on (Eq. 4). For each:
the largest distance of the mean precision from the target after the epochs of the last fifth, the planes delivered, and the
accuracy of the soft model and of the file as reloaded. Restartable: finished runs are read from --work, and stopped ones go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import quality
from rows import command

COUNTS: dict[str, dict[str, Any]] = {
    "signs (the paper)": {"csq.precision_count": "sign", "csq.fix_masks_at": 1.0},
    "soft": {"csq.precision_count": "soft", "csq.fix_masks_at": 1.0},
    "signs, fixed at 60 %": {"csq.precision_count": "sign", "csq.fix_masks_at": 0.6},
    "signs, fixed at 80 %": {"csq.precision_count": "sign", "csq.fix_masks_at": 0.8},
    "soft, fixed at 60 %": {"csq.precision_count": "soft", "csq.fix_masks_at": 0.6},
}


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What all rows share."""
    shared = {
        "model.pretrained": False,
        "model.checkpoint": None,
        "data.source": given.data,
        "quantization.method": "csq",
        "quantization.target_bits": given.target,
        "optimizer.lr": 0.1,
        "optimizer.weight_decay": 5e-4,
        "epochs": given.epochs,
        "seed": given.seed,
    }
    if given.data == "digits":
        return shared
    return quality.PROXY | shared | {"data.input_size": given.size, "channels_last": "on"}


def main() -> None:
    import torch

    from csqcli import pipeline
    from csqcli.recipe.resolve import resolve
    from csqcli.reporting.charts import Series, lines
    from csqcli.system.progress import Display

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or CIFAR-10 in any of csq's forms")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--target", type=float, default=2.0)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--size", type=int, default=8, help="pixels of CIFAR-10's images, 32 or a divisor")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(COUNTS), help="rows; all if unset")
    parser.add_argument("--svg", type=Path, help="draw the mean precision here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shared = settings(given)
    images = None if given.data == "digits" else quality.cifar_images(given.data, given.size)
    curves = []
    print(
        "| Δ_S counts | furthest from the target in the last fifth | delivered planes | soft | hard |\n|---|---|---|---|---|"
    )
    for name in given.only or COUNTS:
        folder = given.work / f"{name.replace(' ', '_').replace('%', '')}-{given.epochs}-{given.target:g}-{given.seed}"
        recipe = resolve("digits" if given.data == "digits" else "short", shared | COUNTS[name])
        report = pipeline.search(recipe, folder, display=Display(quiet=True), resume=True, images=images)
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        planes = [(line["epoch"], line["mean_bits"]) for line in history if "mean_bits" in line]
        furthest = max(abs(mean - given.target) for epoch, mean in planes if epoch > 0.8 * given.epochs)
        accuracy = report["accuracy"]
        print(
            f"| {name} | {furthest:.3f} | {report['budget']['mean_bits']:.3f} | {accuracy['soft_top1']:.2f} | "
            f"{accuracy['hard_top1']:.2f} |",
            flush=True,
        )
        curves.append(Series(name, planes))
    if given.svg:
        chart = lines(
            "mean-precision",
            f"Mean precision over training, target {given.target:g}, from scratch",
            curves,
            description="Planes per weight whose mask logit is at least 0, after each epoch.",
            x_label="epoch",
            y_label="planes per weight",
            target=given.target,
        )
        given.svg.write_text(chart.svg())


if __name__ == "__main__":
    command(main)
