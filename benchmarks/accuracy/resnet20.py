"""csq beside its rivals on the whole of CIFAR-10: ResNet-20 from a float checkpoint, at equal planes, epochs and loop.

    csq search cifar_resnet20 --method float --checkpoint resnet20_float.safetensors --data cifar10-jpeg --epochs 4 --output runs/r20-float
    python benchmarks/accuracy/resnet20.py --data cifar10-jpeg --checkpoint runs/r20-float/model.safetensors --work runs/resnet20
    python benchmarks/accuracy/resnet20.py … --rows "staged 2" "lsq 2, *" --epochs 4 --set amp=bf16 --seed 1

Every row is a search by the recipe `short` for --epochs epochs, padded crops and flips, batch 128, one thread, from the checkpoint
named. `staged` and `uniform` (staged without its search) train latents by their own Adam; the rivals train weights by the base
optimizer, at the rates shown, all of them. Rows of csq come with activations of 8, 4 and 3 bits too (`staged 2 A4`); `rows.py` has
the grammar of names. Hard top-1 of the file as reloaded, over the 10,000 test images. Restartable: finished rows are read from --work.
An epoch takes one to three minutes of one core; the table has 88 rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import rows

RATES = ("sgd 0.05", "sgd 0.01", "adamw 0.001")


def table(rates: list[str], own_rates: list[str]) -> list[str]:
    """Names of all rows, those that matter most first: float activations at every target, then rounded ones."""
    names: list[str] = []
    for width in ("", " A8", " A4", " A3"):
        for planes in ("2", "1", "3", "1.5"):
            names += rows.at_planes(planes, rates, own_rates, width=width, rivals=() if width else rows.RIVALS)
    return names


def main() -> None:
    parser = rows.parser(__doc__, epochs=6, rates=RATES)
    parser.add_argument("--checkpoint", required=True)
    given = parser.parse_args()
    fixed = {
        "model.source": "cifar_resnet20",
        "model.checkpoint": given.checkpoint,
        "data.source": given.data,
        "data.val_split": "test",
        "data.augment": "crop-flip",
        "data.batch_size": 128,
        "threads": 1,
    }
    rows.Rows(given, table(given.rates, given.own_rates), recipe="short", fixed=fixed).run()


if __name__ == "__main__":
    rows.command(main)
