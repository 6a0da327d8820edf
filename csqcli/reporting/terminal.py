"""Manifest → report.json and the terminal table. Needs neither model code nor data."""

from __future__ import annotations

from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from csqcli.file.manifest import Manifest


def build(manifest: Manifest, history: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The JSON report: the manifest, the file's measured size and the training history."""
    return manifest.model_dump(mode="json") | {"history": history or []}


def print_table(manifest: Manifest, console: Console) -> None:
    """Per-layer table, totals, and accuracy from float to hard."""
    total_packed = sum(layer.packed_bytes for layer in manifest.layers) or 1
    table = Table(
        title=Text(manifest.model.source),
        title_justify="left",
        box=rich.box.SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading, justify in (
        ("layer", "left"),
        ("shape", "left"),
        ("weights", "right"),
        ("MACs", "right"),
        ("mask", "left"),
        ("bits", "right"),
        ("stored", "right"),
        ("entropy", "right"),
        ("share", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=heading != "layer", overflow="fold")  # type: ignore[arg-type]
    for layer in manifest.layers:
        table.add_row(
            Text(layer.name),
            "×".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            "–" if layer.macs is None else _short(layer.macs),
            layer.mask,
            str(layer.bits),
            str(layer.stored_bits),
            f"{layer.entropy_bits:.2f}",
            f"{100 * layer.packed_bytes / total_packed:.1f} %",
        )
    if manifest.layers:
        console.print(table)
    for line in totals(manifest):
        console.print(line, highlight=False, markup=False)


def totals(manifest: Manifest) -> list[str]:
    """The lines under the table: budget, the four ways to count size, accuracy."""
    budget, sizes, accuracy = manifest.budget, manifest.sizes, manifest.accuracy
    lines = []
    if manifest.layers:
        asked = f" (target {budget.target_mean_bits:g})" if budget.target_mean_bits is not None else ""
        lines += [
            f"mean bits    {budget.mean_bits:.4f}{asked} over {budget.total_weights:,} weights; "
            f"paper's compression {f'{sizes.paper_compression:.2f}×' if sizes.paper_compression else 'without bound'}",
            f"stored       {sizes.stored_bits_per_weight:.3f} bits per weight dense, "
            f"{sizes.entropy_bits_per_weight:.3f} entropy",
        ]
        if manifest.activations:
            widths = sorted({entry.bits for entry in manifest.activations})
            lines.append(
                f"activations  {len(manifest.activations)} layer inputs at {'/'.join(map(str, widths))} bits, static scales"
            )
        if manifest.left_float:
            lines.append(f"left float   {len(manifest.left_float)} tensors of two or more dimensions")
    if compute := manifest.compute:
        size = "×".join(map(str, compute.input_size))
        share = 100 * compute.quantized_macs / max(compute.macs, 1)
        lines.append(
            f"compute      {_short(compute.macs)} MACs for {size}, {share:.1f} % of them quantized; "
            f"{_short(compute.bops)} bit operations"
        )
    if sizes.file_bytes:
        ratio = sizes.float_bytes / sizes.file_bytes
        lines.append(
            f"file         {sizes.file_bytes:,} bytes, float {sizes.float_bytes:,}: {ratio:.2f}× smaller ({manifest.form})"
        )
    if parity := manifest.parity:
        lines.append(
            f"verified     {parity.layers_matched} layers bit-exact, logits within {parity.max_logit_error:.1e} "
            f"(std {parity.logit_std:.2g}) on {parity.inputs}; {parity.engine}"
        )
    if accuracy.hard_top1 is not None:
        soft = f" → soft {accuracy.soft_top1:.2f}" if accuracy.soft_top1 is not None else ""
        start = f"float {accuracy.float_top1:.2f}{soft} → " if accuracy.float_top1 is not None else ""
        lines.append(f"top-1        {start}hard {accuracy.hard_top1:.2f} % of {accuracy.samples} images")
    return lines


def _short(count: int) -> str:
    """Three digits and a power of thousand: ``1.81 G``."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return str(count)
