"""Every weight method at 1, 2 and 3 planes and equal epochs, on the proxy of `quality.py`: published ones beside csq's own.

The rivals' own code (`rivals.py`: torchao's PARQ, Brevitas' learned steps) is among them, at several rates. Same float checkpoint, loop,
data order for a seed, and hard top-1 of the file as reloaded. Planes are counted alike, levels are not: k planes are 2^(k+1) − 1 levels
of some methods and 2^k of others (docs/methods.md), so the table has them, and the entropy of the integers beside them. Every method has
its defaults; where a paper's setting is for another optimizer than the proxy's SGD, both are rows.

    python benchmarks/accuracy/methods.py --data cifar10:DIR --work runs/methods --jobs 2 --act-bits 32 3 --json runs/methods/table.json

Restartable: finished runs are read from --work. A run takes one to three minutes of one core; 76 rows, three seeds and both
widths of activations are eight to twenty hours of it. `--only "parq 2" "bsq 2"` runs some rows, `--seeds 1` one seed.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import quality
import rows as names_of_rows

PLANES = (1, 2, 3)
RATES = (("sgd", 0.05), ("sgd", 0.01), ("adamw", 0.001))  # of the rivals' own code
ALLOCATORS = ("importance", "hawq-v2", "hawq-v1", "haq", "quanos", "random")  # by all of which `lsq` trains
TERNARY, BINARY = "twn", ("xnor", "xnor, straight-through")


def methods() -> dict[str, dict[str, Any]]:
    """{row: overrides} without planes, epochs and activations."""
    from csqcli.quant.catalog import CARDS

    rows: dict[str, dict[str, Any]] = {name: {} for name in CARDS if name != "float"}
    rows["pact, SAWB"] = {"quantization.method": "pact", "pact.quantizer": "sawb"}
    rows["xnor, straight-through"] = {"quantization.method": "xnor", "xnor.gradient": "straight-through"}
    rows["ste, importance"] = {"quantization.method": "ste", "quantization.allocator": "importance"}
    for allocator in ALLOCATORS:
        rows[f"lsq, {allocator}"] = {"quantization.method": "lsq", "quantization.allocator": allocator}
    for name in names_of_rows.LIBRARIES:
        for kind, rate in RATES:
            base = names_of_rows.OPTIMIZERS[kind] | {"optimizer.lr": rate}
            rows[f"{name}, {kind} {rate:g}"] = names_of_rows.METHODS[name] | base
    return rows


def planes_of(name: str) -> tuple[int, ...]:
    """The planes that a method is defined for."""
    if name == TERNARY or name in BINARY:
        return (1,)
    return (2, 3) if name == "pact, SAWB" or name.partition(", ")[2] in ALLOCATORS else PLANES


def levels(name: str, planes: int) -> int:
    """Levels of a layer at so many planes, by the card of the row's method; the rivals' own code has a zero."""
    from csqcli.quant.catalog import CARDS

    card = CARDS.get(name.partition(", ")[0])
    return 2 ** (planes + 1) - 1 if card is None or card.has_zero else 2**planes


def rows_of(epochs: int, act_bits: list[int]) -> dict[str, dict[str, Any]]:
    """{row: overrides} of the whole table."""
    rows: dict[str, dict[str, Any]] = {}
    for bits in act_bits:
        for name, more in methods().items():
            for planes in planes_of(name):
                row = quality.method(more.get("quantization.method", name), planes, epochs=epochs)
                label = row_name(name, planes, bits)
                rows[label] = row | more | {"quantization.act_bits": bits}
    return rows


def row_name(name: str, planes: int, act_bits: int) -> str:
    return f"{name} {planes}" + (f" A{act_bits}" if act_bits != 32 else "")


def main() -> None:
    parser = quality.parser(__doc__, "runs/methods")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--act-bits", type=int, nargs="+", default=[32], choices=[1, 2, 3, 4, 8, 32])
    arguments = parser.parse_args()
    rows = rows_of(arguments.epochs, arguments.act_bits)
    arguments.only = arguments.only or names_of_rows.installed(list(rows))
    results = quality.run_all(rows, arguments)
    table = []
    for bits in arguments.act_bits:
        for name in methods():
            for planes in planes_of(name):
                reports = list(results.get(row_name(name, planes, bits), {}).values())
                if reports:
                    table.append(summary(name, planes, bits, reports))
    print_table(table, arguments.epochs)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=2) + "\n")


def summary(name: str, planes: int, act_bits: int, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: means over the seeds, and the spread of top-1."""
    top1 = [report["accuracy"]["hard_top1"] for report in reports]
    return {
        "method": name,
        "planes": planes,
        "levels": levels(name, planes),
        "act_bits": act_bits,
        "mean_bits": statistics.mean(report["budget"]["mean_bits"] for report in reports),
        "entropy_bits": statistics.mean(report["sizes"]["entropy_bits_per_weight"] for report in reports),
        "file_bytes": statistics.mean(report["sizes"]["file_bytes"] for report in reports),
        "top1": statistics.mean(top1),
        "spread": statistics.stdev(top1) if len(top1) > 1 else 0.0,
        "seeds": top1,
    }


def print_table(table: list[dict[str, Any]], epochs: int) -> None:
    """The table as Markdown."""
    import torch

    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, {epochs} epochs, hard top-1")
    print("| method | planes | levels | act bits | mean planes | entropy | file bytes | top-1, mean ± spread | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in table:
        seeds = " ".join(f"{value:.2f}" for value in row["seeds"])
        print(
            f"| {row['method']} | {row['planes']} | {row['levels']} | {row['act_bits']} | {row['mean_bits']:.3f} | "
            f"{row['entropy_bits']:.2f} | {row['file_bytes']:,.0f} | {row['top1']:.2f} ± {row['spread']:.2f} | {seeds} |"
        )


if __name__ == "__main__":
    names_of_rows.command(main)
