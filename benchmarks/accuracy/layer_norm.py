"""Networks of LayerNorm, a small ViT and a small ConvNeXt: which base optimizer harms nothing, and csq beside its rivals there.

Each network is trained in float on CIFAR-10 first (AdamW 1e-3, cosine, 15 epochs), then 3 epochs per row at equal mean planes; same loop,
same data order for a seed, float32, one thread, hard top-1 of the file as reloaded. The base optimizer trains what is
not under quantization, and the rivals' quantized weights too; `staged` has its own Adam for those. Rates are all shown, none is
chosen; `rows.py` has the grammar of names.

    python benchmarks/accuracy/layer_norm.py vit --data cifar10-jpeg --work runs/layer-norm
    python benchmarks/accuracy/layer_norm.py convnext --data cifar10-jpeg --work runs/layer-norm --rows "staged 2, sgd 0.05" "lsq 2, *"

Restartable: finished runs are read from --work. A row of the ViT takes about two minutes of one core, of the ConvNeXt three.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import quality
import rows

NETWORKS = {"vit": (16, "box"), "convnext": (32, "bilinear")}
FLOAT_EPOCHS = 15
RATES = ("sgd 0.05", "sgd 0.01", "adamw 0.001", "adamw 0.0003")


def table(rates: list[str], own_rates: list[str]) -> list[str]:
    """Names of all rows, those that matter most first."""
    names = rows.with_rates(["float"], own_rates)
    for planes in ("2", "1", "3"):
        names += rows.at_planes(planes, rates, own_rates)
    return names


def main() -> None:
    parser = rows.parser(__doc__, epochs=3, rates=RATES, seed=1)
    parser.set_defaults(own_rates=list(RATES))
    parser.add_argument("network", choices=list(NETWORKS))
    given = parser.parse_args()
    given.work = given.work / given.network
    size, interpolation = NETWORKS[given.network]
    fixed = {
        "model.source": f"small_networks:{given.network}",
        "data.source": given.data,
        "data.val_split": "test",
        "data.input_size": size,
        "data.interpolation": interpolation,
        "data.augment": "crop-flip",
        "threads": 1,
    }
    asked = rows.Rows(given, table(given.rates, given.own_rates), recipe="short", fixed=fixed)
    if not given.list:
        asked.images = quality.cifar_images(given.data, size, interpolation)
        _, overrides = rows.parse("float, adamw 0.001")
        start = {"model.pretrained": False, "epochs": FLOAT_EPOCHS, "optimizer.warmup_epochs": 1, "seed": 0}
        asked.search("start", asked.recipe_of(overrides | start))
    asked.fixed["model.checkpoint"] = str(given.work / "start-0" / "model.safetensors")
    asked.run()


if __name__ == "__main__":
    rows.command(main)
