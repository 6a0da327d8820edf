"""csq beside its rivals on a real network: EfficientNet-lite0 on Imagenette at 128 pixels, equal levels, epochs and loop.

    python benchmarks/accuracy/photographs.py --data imagenette --checkpoint tf_efficientnet_lite0.safetensors --work runs/photographs
    python benchmarks/accuracy/photographs.py … --rows "staged 2" "uniform 2" "lsq 2, adamw 0.0003" "brevitas 2, *"
    python benchmarks/accuracy/photographs.py … --epochs 1 --rates "adamw 0.0003" --own-rates "latents 0.001" --set distill_features=4

Every row is a search by the recipe `photographs` (3 epochs near the float network's features, BatchNorm frozen) without
its epoch in float, one thread, from the checkpoint named: the published one, or
better the file of `csq search … --method float`, so that no row has to learn the data first. `staged` and `uniform` (staged
without its search) train latents by their own Adam; the rivals train weights by the base optimizer, at the rates
shown, all of them: none is chosen, and a row that diverges says so. `rows.py` has the grammar of names. Hard top-1 of the file as
reloaded, over all validation images, and the bytes that ship. Restartable: finished rows are read from --work. A row takes about a
quarter of an hour of one core; the table has 82.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import rows

RATES = ("sgd 0.002", "sgd 0.0005", *rows.ADAMW_RATES)


def table(rates: list[str], own_rates: list[str]) -> list[str]:
    """Names of all rows, those that matter most first."""
    names: list[str] = []
    for planes in ("2", "1", "3", "1.5"):
        names += rows.at_planes(planes, rates, own_rates, rivals=() if planes == "1.5" else rows.RIVALS)
    return names


def small_file(folder: Path) -> dict[str, Any]:
    """Bytes of what ships."""
    from csqcli.exporting.run import export_file
    from csqcli.system.progress import Display

    small = folder / "model-bit-packed-small.safetensors"
    if not small.exists():
        export_file(folder / "model.safetensors", small, form="bit-packed-small", display=Display(quiet=True))
    return {"small_file_bytes": small.stat().st_size}


def main() -> None:
    parser = rows.parser(__doc__, epochs=3, rates=RATES)
    parser.add_argument("--checkpoint", required=True)
    given = parser.parse_args()
    fixed = {
        "model.source": "timm:tf_efficientnet_lite0",
        "model.checkpoint": given.checkpoint,
        "data.source": given.data,
        "data.input_size": 128,
        "data.workers": 1,
        "adaptation.epochs": 0,
        "threads": 1,
    }
    names = table(given.rates, given.own_rates)
    rows.Rows(given, names, recipe="photographs", fixed=fixed).run(after=small_file)


if __name__ == "__main__":
    rows.command(main)
