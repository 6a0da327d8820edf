"""Accuracy of every method at equal mean planes, on a small proxy: is the search worth it, at schedules people run?

Proxy: CIFAR-10 pooled to 16×16, cifar_resnet8 (78k weights), a float checkpoint of 15 epochs, then 6 epochs per method;
SGD 0.05 with momentum 0.9, cosine, batch 128, weight decay 5e-4, shifted and mirrored images. Same loop, same data order
for a seed, hard top-1 of the file as reloaded. All through `csqcli.pipeline.search`, nothing is special here.

    python benchmarks/accuracy/quality.py --data cifar10:DIR --work runs/quality --jobs 2 --json runs/quality/table.json

Restartable: finished runs are read from --work, and stopped ones go on. About an hour on two cores
with bfloat16 units, two to three without.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rows import command

PROXY: dict[str, Any] = {
    "model.source": "cifar_resnet8",
    "data.val_split": "test",
    "data.input_size": 16,
    "data.interpolation": "box",  # exactly the average of 2×2 pixels
    "data.augment": "crop-flip",
    "data.batch_size": 128,
    "optimizer.lr": 0.05,
    "optimizer.weight_decay": 5e-4,
}
LARGEST, SECOND, SMALL = "layer3.0.conv2", "layer3.0.conv1", ["layer1.0.conv1", "layer1.0.conv2"]
HAND_A = {LARGEST: 1, **dict.fromkeys(SMALL, 2)}  # the rest at 3: 1.99 mean
HAND_B = {LARGEST: 1, SECOND: 1}  # the rest at 3: 1.57 mean


def hand_made(planes: dict[str, int], method: str, target: float) -> dict[str, Any]:
    """Fixed allocation: 3 planes everywhere but where ``planes`` says otherwise."""
    ceilings = {"layers.max_bits": {"*": 3, **planes}}
    if method == "staged":  # nothing left to search when floor meets ceiling
        return {
            "quantization.method": "staged",
            "quantization.target_bits": target,
            "layers.min_bits": ceilings["layers.max_bits"],
            **ceilings,
        }
    return {"quantization.method": method, "quantization.target_bits": 3.0, **ceilings}


def method(name: str, target: float | None = None, epochs: int = 6, **more: Any) -> dict[str, Any]:
    """Overrides of one row."""
    return {"quantization.method": name, "quantization.target_bits": target, "epochs": epochs, **more}


BFLOAT16 = {"quantization.state_dtype": "bfloat16"}
ROWS: dict[str, dict[str, Any]] = {
    "float": method("float"),
    **{f"ste {k}": method("ste", k) for k in (1, 2, 3)},
    **{f"lsq {k}": method("lsq", k) for k in (1, 2, 3)},
    **{f"staged {k:g}": method("staged", k) for k in (1, 1.5, 1.57, 2, 3)},
    "hand-made A, ste": hand_made(HAND_A, "ste", 1.99),
    "hand-made B, ste": hand_made(HAND_B, "ste", 1.58),
    "hand-made A, staged's training": hand_made(HAND_A, "staged", 1.99),
    "hand-made B, staged's training": hand_made(HAND_B, "staged", 1.58),
    "staged 1, 1 epoch": method("staged", 1, epochs=1),
    "staged 2, 1 epoch": method("staged", 2, epochs=1),
    "staged 1, 3 epochs + 3 finetune": method("staged", 1, epochs=3, **{"finetune.epochs": 3}),
    "staged 2, 3 epochs + 3 finetune": method("staged", 2, epochs=3, **{"finetune.epochs": 3}),
    **{f"ptq {k}": method("ptq", k, epochs=0) for k in (1, 2, 3)},
    **{f"ptq {k} + 6 finetune": method("ptq", k, epochs=0, **{"finetune.epochs": 6}) for k in (1, 2, 3)},
    "csq-uniform 2": method("csq-uniform", 2),
    **{f"csq {k:g}": method("csq", k) for k in (1, 2, 3)},
    "csq 2, the paper's settings": method("csq-paper", 2, bn_recalibration_batches=0),
    **{f"staged {k}, bfloat16 state": method("staged", k, **BFLOAT16) for k in (1, 2)},
    "csq-uniform 2, bfloat16 state": method("csq-uniform", 2, **BFLOAT16),
    "csq 2, bfloat16 state": method("csq", 2, **BFLOAT16),
}


@functools.cache
def cifar_images(source: str, size: int = PROXY["data.input_size"], interpolation: str = "box") -> Any:
    """CIFAR-10 at ``size`` pixels, decoded once per process."""
    from csqcli.data.loaders import hold
    from csqcli.data.specs import open_data
    from csqcli.models.networks import CIFAR_CONFIG

    config = CIFAR_CONFIG | {"input_size": (3, size, size), "interpolation": interpolation}
    images = open_data(source, val_split="test")  # where the data have no validation split of their own
    images.train, images.val = (
        hold(images.train, config, training=True),
        hold(images.val, config, training=False),
    )
    return images


def run(name: str, seed: int, overrides: dict[str, Any], data_source: str, work: str, amp: str) -> dict[str, Any]:
    """The report of one run in --work: read where it is finished, gone on with where it was stopped. UserError where the folder holds a
    run of other settings."""
    import torch

    from csqcli import pipeline
    from csqcli.recipe.resolve import resolve
    from csqcli.system.heap import keep_freed_memory
    from csqcli.system.progress import Display

    keep_freed_memory()
    torch.set_num_threads(1)
    folder = Path(work) / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    settings = PROXY | {"data.source": data_source, "seed": seed, "amp": amp} | overrides
    recipe = resolve("short", {key: value for key, value in settings.items() if value is not None})
    images = cifar_images(data_source)
    return pipeline.search(recipe, folder, display=Display(quiet=True), resume=True, images=images)


def parser(doc: str | None, work: str) -> argparse.ArgumentParser:
    """Options of the tables of accuracy."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="image folder or cifar10:DIR")
    parser.add_argument("--work", default=work, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--amp", default="bf16", choices=["off", "bf16"], help="training precision")
    parser.add_argument("--only", nargs="*", help="rows to run (default: all)")
    parser.add_argument("--json", help="write the table here")
    return parser


def run_all(rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """{row: {seed: report}} of every row and seed asked for, from one float checkpoint; finished runs are read. Seeds that diverged
    are left out, and said."""
    from csqcli.training.loop import NonFinite

    os.environ["OMP_NUM_THREADS"] = "1"
    checkpoint = Path(arguments.work) / "float15-0" / "model.safetensors"
    start = {"quantization.method": "float", "model.pretrained": False, "epochs": 15, "optimizer.lr": 0.1}
    run("float15", 0, start, arguments.data, arguments.work, arguments.amp)
    names = arguments.only or list(rows)
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        pending = {}
        for seed in range(1, arguments.seeds + 1):
            for name in names:
                overrides = {"model.checkpoint": str(checkpoint), "epochs": 6} | rows[name]
                future = pool.submit(run, name, seed, overrides, arguments.data, arguments.work, arguments.amp)
                pending[future] = (name, seed)
        for future in concurrent.futures.as_completed(pending):
            name, seed = pending[future]
            try:
                results[name][seed] = report = future.result()
            except NonFinite as error:  # which is a result, too
                print(f"{name} seed {seed}: {error.line()}", flush=True)
                continue
            print(
                f"{name} seed {seed}: {report['budget']['mean_bits']:.3f} bits, {report['accuracy']['hard_top1']:.2f} %",
                flush=True,
            )
    return results


def main() -> None:
    arguments = parser(__doc__, "runs/quality").parse_args()
    results = run_all(ROWS, arguments)
    print_table(results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table(results), indent=2) + "\n")


def table(results: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean, spread (sample standard deviation) and worst budget of every row."""
    rows = []
    for name, by_seed in _with_searches(results).items():
        if not by_seed:  # every seed diverged
            continue
        top1 = [by_seed[seed]["accuracy"]["hard_top1"] for seed in sorted(by_seed)]
        bits = [by_seed[seed]["budget"]["mean_bits"] for seed in sorted(by_seed)]
        rows.append(
            {
                "row": name,
                "mean_bits": statistics.mean(bits),
                "most_bits": max(bits),
                "top1": statistics.mean(top1),
                "spread": statistics.stdev(top1) if len(top1) > 1 else 0.0,
                "seeds": top1,
                "soft_minus_hard_logit": max(by_seed[seed]["parity"]["max_logit_gap"] for seed in by_seed),
            }
        )
    return rows


def _with_searches(results: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[int, dict[str, Any]]]:
    """A row of its own for the search inside every search + finetune run."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for name, by_seed in results.items():
        if "finetune" in name:
            search = {}
            for seed, report in by_seed.items():
                top1 = report["finetune"]["input_top1"]
                search[seed] = report | {"accuracy": report["accuracy"] | {"hard_top1": top1}}
            rows[name.partition(" + ")[0]] = search
        rows[name] = by_seed
    return rows


def print_table(results: dict[str, dict[int, dict[str, Any]]]) -> None:
    import torch

    seeds = max(map(len, results.values()))
    print(
        f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, {seeds} seeds, hard top-1 of the file"
    )
    print("| method | mean planes | top-1, mean ± spread | seeds |\n|---|---|---|---|")
    for row in table(results):
        runs = " ".join(f"{value:.2f}" for value in row["seeds"])
        print(f"| {row['row']} | {row['mean_bits']:.3f} | {row['top1']:.2f} ± {row['spread']:.2f} | {runs} |")


if __name__ == "__main__":
    command(main)
