"""At which schedule do bits beat latents? Methods at 2 planes over the number of epochs, on the proxy of `quality.py`.

    python benchmarks/accuracy/schedules.py --data cifar10:DIR --work runs/schedules --amp off --svg runs/schedules/from-scratch.svg
    python benchmarks/accuracy/schedules.py … --start checkpoint --methods staged csq ste --epochs 3 6 15 30

From scratch the peak learning rate is 0.1, from the float checkpoint of 15 epochs it is the proxy's 0.05. Hard top-1 of the file as
reloaded. `csq-paper-planes` is `csq` with the paper's choice of planes, both it and `csq-hard-at-the-end` with
weights that turn hard after the last step. Restartable: finished runs are read from --work. An epoch
takes ten to fifteen seconds of one core, so a curve from scratch (150 epochs a method and seed) is half an hour a line.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import quality
from rows import command

STARTS = {
    "scratch": ((10, 20, 40, 80), {"model.checkpoint": None, "model.pretrained": False, "optimizer.lr": 0.1}),
    "checkpoint": ((3, 6, 15, 30), {}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "csq-paper-planes": {  # planes as the paper has them: counted by signs, searched for to the end
        "quantization.method": "csq",
        "csq.precision_count": "sign",
        "csq.fix_masks_at": 1.0,
        "csq.harden_at": 1.0,
    },
    "csq-hard-at-the-end": {"quantization.method": "csq", "csq.harden_at": 1.0},
}


def row_name(method: str, epochs: int, start: str) -> str:
    return f"{method} {epochs} epochs from {start}"


def figure(curves: dict[str, dict[int, list[float]]], start: str) -> str:
    """The curves as an SVG file."""
    from csqcli.reporting.charts import Series, lines

    series = [
        Series(name, [(epochs, statistics.mean(top1)) for epochs, top1 in sorted(curve.items())])
        for name, curve in curves.items()
    ]
    chart = lines(
        f"schedules-from-{start}",
        f"Hard top-1 over the length of training, 2 planes, from {start}",
        series,
        description="Mean over the seeds of each method at each number of epochs.",
        x_label="epochs",
        y_label="top-1, %",
    )
    return chart.svg()


def main() -> None:
    parser = quality.parser(__doc__, "runs/schedules")
    parser.add_argument("--start", choices=list(STARTS), default="scratch")
    parser.add_argument("--methods", nargs="+", default=["csq", "ste", "staged", "float"])
    parser.add_argument("--epochs", type=int, nargs="+", help="lengths of training")
    parser.add_argument("--svg", type=Path, help="draw the curves here")
    arguments = parser.parse_args()
    usual, more = STARTS[arguments.start]
    lengths = arguments.epochs or usual
    rows: dict[str, dict[str, Any]] = {}
    for epochs in lengths:  # short ones first, so that a stopped command has whole columns
        for method in arguments.methods:
            target = None if method == "float" else 2
            row = quality.method(method, target, epochs=epochs) | VARIANTS.get(method, {}) | more
            rows[row_name(method, epochs, arguments.start)] = row
    results = quality.run_all(rows, arguments)
    curves = {
        method: {
            epochs: [
                report["accuracy"]["hard_top1"]
                for report in results[row_name(method, epochs, arguments.start)].values()
            ]
            for epochs in lengths
            if results[row_name(method, epochs, arguments.start)]  # not where every seed diverged
        }
        for method in arguments.methods
    }
    print(f"\n| from {arguments.start} | " + " | ".join(f"{epochs} epochs" for epochs in lengths) + " |")
    print("|---" * (len(lengths) + 1) + "|")
    for method, curve in curves.items():
        cells = (
            f"{statistics.mean(top1):.2f} ({', '.join(f'{value:.2f}' for value in top1)})" if top1 else "diverged"
            for top1 in map(curve.get, lengths)
        )
        print(f"| {method} | " + " | ".join(cells) + " |")
    if arguments.svg:
        arguments.svg.write_text(figure(curves, arguments.start))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(curves, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
