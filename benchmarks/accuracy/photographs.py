"""csq beside its rivals on a real network: EfficientNet-lite0 on Imagenette at 128 pixels, equal levels, epochs and loop.

    python benchmarks/accuracy/photographs.py --data imagenette --checkpoint tf_efficientnet_lite0.safetensors --work runs/photographs
    python benchmarks/accuracy/photographs.py … --rows "staged 2" "uniform 2" "lsq 2, 0.002"

Every row is a search by the recipe `photographs` (3 epochs near the float network's features, BatchNorm frozen) without
its epoch in float, one thread, from the checkpoint named: the published one, or
better the file of `csq search … --method float`, so that no row has to learn the data first. `staged` and `uniform` (staged
without its search) train latents by their own Adam; `ste`, `lsq` and `parq` train weights by the base optimizer, at the rates
shown, all of them: none is chosen. Hard top-1 of the file as reloaded, over all validation images, and the bytes that ship.
Restartable: finished rows are read from --work. A row takes about a quarter of an hour of one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

RIVALS, RATES = ("ste", "lsq", "parq"), (0.002, 0.0005)


def rows() -> dict[str, dict[str, Any]]:
    """Overrides of every row, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for target in (2, 1, 3, 1.5):
        found[f"staged {target:g}"] = {"quantization.target_bits": target}
        if target != 1.5:
            found[f"uniform {target:g}"] = {"quantization.target_bits": target, "quantization.allocator": "uniform"}
            for method in RIVALS:
                for rate in RATES:
                    chosen = {"quantization.method": method, "quantization.target_bits": target}
                    found[f"{method} {target:g}, {rate:g}"] = chosen | {"optimizer.lr": rate}
    return found


def main() -> None:
    from csqcli import pipeline
    from csqcli.exporting.run import export_file
    from csqcli.recipe.resolve import resolve
    from csqcli.system.progress import Display

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", help="names of rows; all if unset")
    given = parser.parse_args()
    table, quiet = rows(), Display(quiet=True)
    fixed = {
        "model.source": "timm:tf_efficientnet_lite0",
        "model.checkpoint": given.checkpoint,
        "data.source": given.data,
        "data.input_size": 128,
        "data.workers": 1,
        "adaptation.epochs": 0,
        "threads": 1,
        "seed": given.seed,
    }
    for name in given.rows or table:
        folder = given.work / f"{name.replace(', ', '-').replace(' ', '_')}-{given.seed}"
        report = pipeline.search(resolve("photographs", fixed | table[name]), folder, display=quiet, resume=True)
        small = folder / "model-bit-packed-small.safetensors"
        if not small.exists():
            export_file(folder / "model.safetensors", small, form="bit-packed-small", display=quiet)
        accuracy, budget = report["accuracy"], report["budget"]
        print(
            f"{name:<18} float {accuracy['float_top1']:.2f}  hard {accuracy['hard_top1']:.2f}  planes {budget['mean_bits']:.3f}  "
            f"entropy {report['sizes']['entropy_bits_per_weight']:.2f}  small file {small.stat().st_size:,}",
            flush=True,
        )


if __name__ == "__main__":
    main()
