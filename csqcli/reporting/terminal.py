"""A manifest as a table and lines for the terminal. Needs neither model code nor data nor torch.

Names come out of files that anybody may have made: each is printed with escapes for whatever would start a line, move the
cursor or hide text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from csqcli.errors import printable
from csqcli.file.manifest import Manifest


def print_table(manifest: Manifest, console: Console, *, as_stated: bool = False) -> None:
    """Per-layer table, totals, and accuracy from float to hard; ``as_stated`` as for :func:`totals`."""
    total_packed = sum(layer.packed_bytes for layer in manifest.layers) or 1
    table = Table(
        title=Text(printable(manifest.model.source)),
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
            Text(printable(layer.name)),
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
    for line in totals(manifest, as_stated=as_stated):
        console.print(line, highlight=False, markup=False)


def totals(manifest: Manifest, *, as_stated: bool = False) -> list[str]:
    """The lines under the table: budget, the four ways to count size, accuracy.

    ``as_stated`` marks what only the file says: for files of whose making nothing is known.
    """
    mark = ", as stated in the file" if as_stated else ""
    macs_mark = "; MACs as stated in the file" if as_stated else ""
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
            f"{_short(compute.bops)} bit operations{macs_mark}"
        )
    if sizes.file_bytes:
        ratio = sizes.float_bytes / sizes.file_bytes
        lines.append(
            f"file         {sizes.file_bytes:,} bytes, float {sizes.float_bytes:,}: {ratio:.2f}× smaller ({printable(manifest.form)})"
        )
        lines += _parts_line(manifest)
    if parity := manifest.parity:
        lines.append(
            f"verified     {parity.layers_matched} layers bit-exact, logits within {parity.max_logit_error:.1e} "
            f"(std {parity.logit_std:.2g}) on {printable(parity.inputs)}; {printable(parity.engine)}{mark}"
        )
    if accuracy.hard_top1 is not None:
        soft = f" → soft {accuracy.soft_top1:.2f}" if accuracy.soft_top1 is not None else ""
        if accuracy.unit_steps_top1 is not None:
            soft += f" (unit steps {accuracy.unit_steps_top1:.2f})"
        start = f"float {accuracy.float_top1:.2f}{soft} → " if accuracy.float_top1 is not None else ""
        lines.append(f"top-1        {start}hard {accuracy.hard_top1:.2f} % of {accuracy.samples} images{mark}")
    if accuracy.hard_top1_present is not None:
        before = accuracy.float_top1_present
        start = f"float {before:.2f} → " if before is not None else ""
        lines.append(
            f"             {start}hard {accuracy.hard_top1_present:.2f} % among the data's classes alone{mark}"
        )
    return lines


def export_lines(manifest: Manifest) -> list[str]:
    """What `csq export` prints: where the integers went, and the certificate."""
    parity = manifest.parity
    assert parity is not None  # every export has one
    wide = [printable(record.name) for record in manifest.layers if record.encoding == "int16"]
    absent = [printable(name) for name in parity.layers_absent]
    size = manifest.sizes.file_bytes or 0
    ratio = manifest.sizes.float_bytes / size if size else 0.0
    lines = [f"{printable(manifest.form)}: {size:,} bytes, {ratio:.2f}× smaller than float", *_parts_line(manifest)]
    lines += [f"note         {printable(note)}" for note in parity.notes]
    if wide:
        lines.append(f"int16        {len(wide)} layers reach beyond ±127: {', '.join(wide)}")
    if parity.layers_int8:
        lines.append(f"int8         {len(parity.layers_int8)} of {len(manifest.layers)} layers run in int8")
    if parity.calibrated:
        lines.append(f"calibrated   {len(parity.calibrated)} convolution outputs, rounded beyond what was trained")
    if absent:
        lines.append(f"left out     {len(absent)} layers unused at inference: {', '.join(absent)}")
    lines.append(
        f"verified     {parity.layers_matched} layers bit-exact; logits within {parity.max_logit_error:.1e} "
        f"(std {parity.logit_std:.2g}) on {printable(parity.inputs)}; {parity.engine}, loads in {parity.load_seconds:.2f} s"
    )
    if parity.top1 is not None:
        before = f", the hard model's {parity.hard_top1:.2f}" if parity.hard_top1 is not None else ""
        lines.append(f"top-1        {parity.top1:.2f} % of {parity.samples} images{before}")
    if parity.latency_ms is not None:
        lines.append(
            f"latency      {parity.latency_ms:.2f} ms, fp32 / this {parity.latency_ratio:.2f}× (batch 1, one thread)"
        )
    return lines


def _parts_line(manifest: Manifest) -> list[str]:
    parts = ", ".join(f"{printable(name)} {size:,}" for name, size in manifest.sizes.parts.items())
    return [f"of it        {parts}"] if parts else []


def coverage_lines(found: Mapping[str, Any]) -> list[str]:
    """What `csq inspect` prints, from ``models.coverage.coverage``: a line per tensor, then the shares."""
    lines = []
    for layer in found["layers"]:
        macs = "never called" if layer["macs"] is None else f"{layer['macs']:>15,} MACs"
        shape = "×".join(map(str, layer["shape"]))
        lines.append(f"{printable(layer['name']):<48} {shape:<18} {layer['weights']:>12,} weights {macs}")
    for tensor in found["left_float"]:
        shape = "×".join(map(str, tensor["shape"]))
        lines.append(f"{printable(tensor['name']):<48} {shape:<18} float: {tensor['why']}")
    lines.append(
        f"{len(found['layers'])} weight tensors: {100 * found['parameter_share']:.2f} % of {found['parameters']:,} "
        f"parameters, {100 * found['mac_share']:.2f} % of {found['macs']:,} multiply-accumulates "
        f"for {'×'.join(map(str, found['input_size']))}"
    )
    return lines


def _short(count: int) -> str:
    """Three digits and a power of thousand: ``1.81 G``."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return str(count)
