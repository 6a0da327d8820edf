"""The figures of a run, from its manifest, its history and its integers. Each says in words what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from csqcli.file.manifest import Manifest
from csqcli.file.sizes import bit_operations
from csqcli.reporting import charts, history
from csqcli.reporting.charts import Series
from csqcli.reporting.figure import Figure
from csqcli.reporting.histogram import Histogram, magnitude_name
from csqcli.reporting.words import layer_names, short

_DEPTH = "layer, from input to output"


@dataclass(frozen=True)
class Figures:
    """The figures of a report, by what they are about; a list is empty where the file or its folder knows nothing of it."""

    planes: list[Figure] = field(default_factory=list)
    training: list[Figure] = field(default_factory=list)
    integers: list[Figure] = field(default_factory=list)
    cost: list[Figure] = field(default_factory=list)

    def all(self) -> list[Figure]:
        return [*self.planes, *self.training, *self.integers, *self.cost]


def figures(manifest: Manifest, lines: Sequence[Any], histograms: Mapping[str, Histogram]) -> Figures:
    """All that can be drawn of a file and the history beside it."""
    if not manifest.layers:
        return Figures(training=_training(manifest, lines))
    return Figures(
        planes=[planes(manifest)],
        training=[*_training(manifest, lines), *_planes_over_training(manifest, lines)],
        integers=[_integers(manifest, histograms)] if histograms else [],
        cost=_cost(manifest),
    )


def planes(manifest: Manifest) -> Figure:
    """Planes per layer over depth: the paper's Fig. 4."""
    bits = [layer.bits for layer in manifest.layers]
    reached, target = manifest.budget.mean_bits, manifest.budget.target_mean_bits
    asked = f", {target:g} asked for" if target is not None else ""
    return charts.bars(
        "planes",
        "Planes per layer",
        _names(manifest),
        {"": bits},
        description=(
            f"{len(bits)} layers have {min(bits)} to {max(bits)} planes; the mean over weights is {reached:.4f}{asked}."
        ),
        x_label=_DEPTH,
        y_label="planes",
        y_high=max(max(bits), target or 0) + 0.5,
        target=target,
    )


def _training(manifest: Manifest, lines: Sequence[Any]) -> list[Figure]:
    """Mean bits with the target (the paper's Fig. 2 and 3), accuracy and temperature over epochs."""
    marks = history.phase_starts(lines)
    target, start = manifest.budget.target_mean_bits, manifest.accuracy.float_top1
    found = []
    for key, name, title, y_label, goal, words in (
        ("mean_bits", "mean-bits", "Mean bits over training", "planes per weight", target, "target"),
        ("val_top1", "accuracy", "Accuracy over training", "top-1 on the validation images, %", start, "float"),
        ("beta", "temperature", "Temperature over training", "β", None, ""),
        ("train_loss", "loss", "Loss over training", "mean training loss", None, ""),
    ):
        points = history.series(lines, key)
        known = [(epoch, value) for epoch, value in points if value is not None]
        if len(known) < 2:
            continue
        (first, begun), (last, ended) = known[0], known[-1]  # float epochs have no planes and no temperature
        aim = f" {words.capitalize()}: {goal:g}." if goal is not None else ""
        found.append(
            charts.lines(
                name,
                title,
                [Series(y_label, points)],
                description=f"{begun:.4g} after epoch {first:g}, {ended:.4g} after epoch {last:g}.{aim}",
                x_label="epoch",
                y_label=y_label,
                from_zero=key in ("mean_bits", "beta"),
                whole_x=True,
                target=goal,
                target_label=f"{words} {goal:g}" if goal is not None else "",
                marks=marks,
                small=True,
            )
        )
    return found


def _planes_over_training(manifest: Manifest, lines: Sequence[Any]) -> list[Figure]:
    """Planes of every layer after every epoch, where the run recorded masks and more than one epoch had them."""
    names = _names(manifest)
    by_epoch = history.masks(lines, len(names))
    if len(by_epoch) < 2:
        return []
    counts = [[by_epoch[epoch][index].count("1") for epoch in by_epoch] for index in range(len(names))]
    changed = sum(len(set(row)) > 1 for row in counts)
    last = [masks for masks in by_epoch.values()]
    settled = next(
        (epoch for epoch, masks in by_epoch.items() if masks == last[-1] and _same_after(by_epoch, epoch)), 0
    )
    return [
        charts.cells(
            "planes-over-training",
            "Planes over training",
            names,
            list(by_epoch),
            counts,
            description=(
                f"Planes in use after each epoch, a row per layer; {changed} of {len(names)} layers changed between epochs. "
                f"As delivered from epoch {settled} on."
                if last[-1] == [layer.mask for layer in manifest.layers]
                else f"Planes in use after each epoch, a row per layer; {changed} of {len(names)} layers changed between epochs."
            ),
            x_label="epoch",
            y_label="layer",
            high=max(max(row) for row in counts),
            unit="planes",
        )
    ]


def _same_after(by_epoch: Mapping[int, Sequence[str]], epoch: int) -> bool:
    return all(masks == by_epoch[epoch] for later, masks in by_epoch.items() if later > epoch)


def _integers(manifest: Manifest, histograms: Mapping[str, Histogram]) -> Figure:
    """The shares of small and large integers in every layer."""
    most = max(len(found.magnitudes) for found in histograms.values())
    shares: dict[str, list[float]] = {magnitude_name(bits): [] for bits in range(most)}
    for layer in manifest.layers:
        counts = histograms[layer.name].magnitudes
        for bits, row in enumerate(shares.values()):
            row.append(100 * counts[bits] / layer.weights if bits < len(counts) else 0.0)
    zeros = sum(histograms[layer.name].magnitudes[0] for layer in manifest.layers)
    return charts.bars(
        "integers",
        "Integers per layer",
        _names(manifest),
        shares,
        description=(
            f"Share of each layer's weights by the size of their integer; "
            f"{100 * zeros / max(manifest.budget.total_weights, 1):.1f} % of all weights are zero."
        ),
        x_label=_DEPTH,
        y_label="share of the layer's weights, %",
        ordered=True,
        y_high=100.0,
    )


def _cost(manifest: Manifest) -> list[Figure]:
    """Where parameters, multiply-accumulates, bit operations and bytes are."""
    names, layers = _names(manifest), manifest.layers
    widths = {entry.module: entry.bits for entry in manifest.activations}
    counted: list[tuple[str, str, str, list[float]]] = [
        ("weights", "Weights per layer", "weights", [layer.weights for layer in layers]),
        ("bytes", "Bytes per layer", "bytes in the file", [layer.packed_bytes for layer in layers]),
    ]
    if manifest.compute is not None:
        bops = [bit_operations(layer, widths) for layer in layers]
        counted.insert(
            1, ("macs", "Multiply-accumulates per layer", "MACs of one image", [x.macs or 0 for x in layers])
        )
        counted.insert(2, ("bops", "Bit operations per layer", "bit operations of one image", [float(x) for x in bops]))
    found = []
    for name, title, y_label, values in counted:
        total = sum(values)
        if not total:
            continue
        top = max(range(len(values)), key=lambda index: values[index])
        words = f"{short(total)} in all; most in {names[top]}, {100 * values[top] / total:.1f} %."
        found.append(
            charts.bars(
                name, title, names, {"": values}, description=words, x_label=_DEPTH, y_label=y_label, small=True
            )
        )
    return found


def _names(manifest: Manifest) -> list[str]:
    return layer_names([layer.name for layer in manifest.layers])
