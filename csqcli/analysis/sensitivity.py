"""``csq sensitivity``: what rounding one layer at a time does to the loss, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from csqcli.analysis.opening import open_for_looking
from csqcli.quant.measuring import rounded, score, weights_as
from csqcli.recipe.schema import Recipe
from csqcli.system.progress import Display


def sensitivity(recipe: Recipe, *, widths: Sequence[int], images: int, display: Display) -> dict[str, Any]:
    """Loss and top-1 with each layer alone at each of ``widths`` planes, all others float, on so many validation images.

    Rounding is to the nearest at the least-squares step of each output channel; nothing is trained, BatchNorm stays.

    Returns ``model``, ``images``, ``widths``, ``loss`` (nats) and ``top1`` (percent) of the float model, and per layer ``name``,
    ``shape``, ``weights``, ``macs``, ``loss`` and ``top1`` (a list each, by width).
    """
    opened = open_for_looking(recipe, display, images=images)
    macs = opened.operations.macs if opened.operations is not None else {}
    before = score(opened.model, opened.batches)
    rows: list[dict[str, Any]] = []
    with display.step("rounding layer by layer", len(opened.layers) * len(widths)) as tell:
        for layer in opened.layers:
            found = []
            for width in widths:
                with weights_as([(layer, rounded(layer, width))]):
                    found.append(score(opened.model, opened.batches))
                tell(len(rows) * len(widths) + len(found))
            rows.append(
                {
                    "name": layer.name,
                    "shape": list(layer.parameter.shape),
                    "weights": layer.weights,
                    "macs": macs.get(layer.name),
                    "loss": [one.loss for one in found],
                    "top1": [one.top1 for one in found],
                }
            )
    return {
        "model": opened.source,
        "images": before.images,
        "widths": list(widths),
        "loss": before.loss,
        "top1": before.top1,
        "layers": rows,
    }
