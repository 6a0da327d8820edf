"""Networks of LayerNorm, a small ViT and a small ConvNeXt: which base optimizer harms nothing, and csq beside its rivals there.

Each network is trained in float on CIFAR-10 first (AdamW 1e-3, cosine, 15 epochs), then 3 epochs per row at equal mean planes; same loop,
same data order for a seed, float32, one thread, hard top-1 of the file as reloaded. The base optimizer trains what is
not under quantization, and in `ste`, `lsq` and `parq` the quantized weights too; `staged` has its own Adam for those.

    python benchmarks/accuracy/layer_norm.py vit --data cifar10-jpeg --work runs/layer-norm
    python benchmarks/accuracy/layer_norm.py convnext --data cifar10-jpeg --work runs/layer-norm --rows "staged 2, sgd" "staged 2, adamw"

Restartable: finished runs are read from --work. A row of the ViT takes about two minutes of one core, of the ConvNeXt three.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NETWORKS = {"vit": (16, "box"), "convnext": (32, "bilinear")}
FLOAT_EPOCHS, EPOCHS = 15, 3
SGD = {"optimizer.name": "momentum", "optimizer.weight_decay": 5e-4}
ADAMW = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.05, "optimizer.warmup_epochs": 0.2}


def rows() -> dict[str, dict[str, Any]]:
    """{row: overrides}; the learning rates of each method are all shown, none is chosen."""
    bases = {
        "sgd 0.05": SGD | {"optimizer.lr": 0.05},
        "sgd 0.01": SGD | {"optimizer.lr": 0.01},
        "adamw 1e-3": ADAMW | {"optimizer.lr": 1e-3},
        "adamw 3e-4": ADAMW | {"optimizer.lr": 3e-4},
    }
    found: dict[str, dict[str, Any]] = {}
    for base, more in bases.items():
        found[f"float, {base}"] = {"quantization.method": "float"} | more
        for planes in (2, 1, 3):
            for method in ("staged", "ste", "lsq", "parq"):
                chosen = {"quantization.method": method, "quantization.target_bits": planes}
                found[f"{method} {planes}, {base}"] = chosen | more
            uniform = {"quantization.method": "staged", "quantization.allocator": "uniform"}
            found[f"staged uniform {planes}, {base}"] = uniform | {"quantization.target_bits": planes} | more
    return found


def main() -> None:
    from csqcli import pipeline
    from csqcli.data.loaders import hold
    from csqcli.data.specs import open_data
    from csqcli.models.networks import CIFAR_CONFIG
    from csqcli.recipe.resolve import resolve
    from csqcli.system.progress import Display

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/layer-norm"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", nargs="*", help="names of rows; all if unset")
    given = parser.parse_args()
    size, interpolation = NETWORKS[given.network]
    config = CIFAR_CONFIG | {"input_size": (3, size, size), "interpolation": interpolation}
    images = open_data(given.data, val_split="test")
    images.train, images.val = hold(images.train, config, training=True), hold(images.val, config, training=False)
    fixed = {
        "model.source": f"small_networks:{given.network}",
        "data.source": given.data,
        "data.val_split": "test",
        "data.input_size": size,
        "data.interpolation": interpolation,
        "data.augment": "crop-flip",
        "threads": 1,
    }

    def run(name: str, seed: int, overrides: dict[str, Any]) -> dict[str, Any]:
        folder = given.work / given.network / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
        recipe = resolve("short", fixed | {"seed": seed} | overrides)
        report = pipeline.search(recipe, folder, display=Display(quiet=True), resume=True, images=images)
        hard, budget = report["accuracy"]["hard_top1"], report["budget"]
        entropy = report["sizes"]["entropy_bits_per_weight"]
        print(f"{name:<32} {hard:.2f}  bits {budget['mean_bits']:.3f}  entropy {entropy:.2f}", flush=True)
        return report

    start = ADAMW | {"quantization.method": "float", "optimizer.lr": 1e-3, "optimizer.warmup_epochs": 1}
    run("start", 0, start | {"model.pretrained": False, "epochs": FLOAT_EPOCHS})
    checkpoint = given.work / given.network / "start-0" / "model.safetensors"
    table = rows()
    results = {}
    for name in given.rows or table:
        more = {"model.checkpoint": str(checkpoint), "epochs": EPOCHS}
        results[name] = run(name, given.seed, more | table[name])["accuracy"]
    (given.work / f"{given.network}-{given.seed}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
