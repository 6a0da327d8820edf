"""A manifest as a table and lines for the terminal. Needs neither model code nor data nor torch.

Names come out of files that anybody may have made: each is printed with escapes for whatever would start a line, move the
cursor or hide text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console

from csqcli.errors import printable
from csqcli.file.manifest import Manifest
from csqcli.quant.catalog import POST_TRAINING
from csqcli.reporting import history as training
from csqcli.reporting.layout import (
    LABEL,
    LEAST_NAME,
    Column,
    Glyphs,
    glyphs,
    print_columns,
    print_lines,
    shortened,
    spark,
)
from csqcli.reporting.sparsity import LayerSparsity, sentence
from csqcli.reporting.words import layer_names, short
from csqcli.system.progress import counted, duration

_LOOSE = 0.3  # of the logits' standard deviation: a tolerance at which comparing them proves little
_LEAST_REASON = 34  # columns, of why a tensor stays float


def print_report(
    manifest: Manifest,
    console: Console,
    *,
    history: Sequence[Any] = (),
    sparsity: Mapping[str, LayerSparsity] | None = None,
    as_stated: bool = False,
) -> None:
    """Per-layer table, totals, accuracy from float to hard, and the course of training; ``as_stated`` as for :func:`totals`.

    ``sparsity`` is of each layer by name, where its integers could be counted.
    """
    marks = glyphs(console)
    console.print(shortened(printable(manifest.model.source), console.width, marks), highlight=False, markup=False)
    if manifest.layers:
        print_columns(_layer_columns(manifest, marks, sparsity or {}), console, marks)
        console.print()
    lines = [*totals(manifest, as_stated=as_stated), *_course(history, marks, console.width)]
    if sparsity:
        lines.append(f"{'sparsity':<{LABEL}}{sentence(sparsity)}")
    print_lines(lines, console)


def _layer_columns(manifest: Manifest, marks: Glyphs, sparsity: Mapping[str, LayerSparsity]) -> list[Column]:
    layers = manifest.layers
    total_packed = sum(layer.packed_bytes for layer in layers) or 1
    macs = ["–" if layer.macs is None else short(layer.macs) for layer in layers]
    bars = [layer.mask.replace("1", marks.full).replace("0", marks.empty) for layer in layers]
    names = layer_names([printable(layer.name) for layer in layers])
    zeros: list[Column] = []
    if found := [sparsity[layer.name] for layer in layers if layer.name in sparsity]:
        shares = [f"{100 * layer.zeros / layer.weights:.1f} %" for layer in found]
        filters = [f"{layer.empty_filters} of {layer.filters}" for layer in found]
        zeros = [Column("zeros", shares, rank=8, right=True), Column("empty filters", filters, rank=9, right=True)]
    return [
        Column("layer", names, shrinks=LEAST_NAME),
        Column("shape", ["×".join(map(str, layer.shape)) for layer in layers], rank=6),
        Column("weights", [f"{layer.weights:,}" for layer in layers], rank=1, right=True),
        Column("MACs", macs, rank=5, right=True),
        Column("planes", bars, style="cyan"),
        Column("bits", [str(layer.bits) for layer in layers], right=True),
        Column("stored", [str(layer.stored_bits) for layer in layers], rank=4, right=True),
        Column("entropy", [f"{layer.entropy_bits:.2f}" for layer in layers], rank=3, right=True),
        Column("share", [f"{100 * layer.packed_bytes / total_packed:.1f} %" for layer in layers], rank=2, right=True),
        Column("mask", [layer.mask for layer in layers], rank=7),
        *zeros,
    ]


def _course(history: Sequence[Any], marks: Glyphs, width: int) -> list[str]:
    """Mean bits and accuracy over training as sparklines, where more than one epoch is known."""
    found: list[str] = []
    for label, key, unit in (("mean bits", "mean_bits", ""), ("top-1", "val_top1", " %")):
        values = training.values(history, key)
        if len(values) > 1:
            # as precise as what is printed: the last digits of a mean that stands still are no course
            line = spark([float(f"{value:.3g}") for value in values], marks, most=max(8, min(60, width - LABEL - 20)))
            found.append(
                f"{'training' if not found else '':<{LABEL}}{line} {label} {values[0]:.3g} → {values[-1]:.4g}{unit}"
            )
    return found


def totals(manifest: Manifest, *, as_stated: bool = False) -> list[str]:
    """The lines under the table: budget, the four ways to count size, accuracy.

    ``as_stated`` marks what only the file says: for files of whose making nothing is known.
    """
    mark = ", as stated in the file" if as_stated else ""
    macs_mark = "; MACs as stated in the file" if as_stated else ""
    budget, sizes, accuracy = manifest.budget, manifest.sizes, manifest.accuracy
    lines = []
    if _is_post_training(manifest):
        lines.append(f"method       post-training quantization: no weight was trained{mark}")
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
                f"activations  {counted(len(manifest.activations), 'layer input')} at {'/'.join(map(str, widths))} bits, static scales"
            )
        if manifest.left_float:
            lines.append(f"left float   {counted(len(manifest.left_float), 'tensor')} of two or more dimensions")
    if compute := manifest.compute:
        size = "×".join(map(str, compute.input_size))
        share = 100 * compute.quantized_macs / max(compute.macs, 1)
        lines.append(
            f"compute      {short(compute.macs)} MACs for {size}, {share:.1f} % of them quantized; "
            f"{short(compute.bops)} bit operations{macs_mark}"
        )
    if sizes.file_bytes:
        ratio = sizes.float_bytes / sizes.file_bytes
        lines.append(
            f"file         {sizes.file_bytes:,} bytes, float {sizes.float_bytes:,}: {_times(ratio)} ({printable(manifest.form)})"
        )
        lines += _parts_line(manifest)
    if parity := manifest.parity:
        lines.append(
            f"verified     {counted(parity.layers_matched, 'layer')} bit-exact, logits within {parity.max_logit_error:.1e} "
            f"(std {parity.logit_std:.2g}) on {printable(parity.inputs)}; {printable(parity.engine)}{mark}"
        )
    if accuracy.hard_top1 is not None:
        soft = f" → soft {accuracy.soft_top1:.2f}" if accuracy.soft_top1 is not None else ""
        if accuracy.unit_steps_top1 is not None:
            soft += f" (unit steps {accuracy.unit_steps_top1:.2f})"
        start = f"float {accuracy.float_top1:.2f}{soft} → " if accuracy.float_top1 is not None else ""
        lines.append(
            f"top-1        {start}hard {accuracy.hard_top1:.2f} % of {counted(accuracy.samples, 'image')}{mark}"
        )
    if accuracy.hard_top1_present is not None:
        before = accuracy.float_top1_present
        start = f"float {before:.2f} → " if before is not None else ""
        lines.append(
            f"             {start}hard {accuracy.hard_top1_present:.2f} % among the data's classes alone{mark}"
        )
    return lines


def _times(ratio: float) -> str:
    """How many times smaller, or larger where it is."""
    return f"{ratio:.2f}× smaller" if ratio >= 1 or not ratio else f"{1 / ratio:.2f}× larger"


def _is_post_training(manifest: Manifest) -> bool:
    """Whether the recipe in the file says that nothing was trained. Anybody may have written it, so nothing is taken for granted."""

    def said(section: str, key: str) -> Any:
        found = manifest.recipe.get(section)
        return found.get(key) if isinstance(found, dict) else None

    return said("quantization", "method") == POST_TRAINING and said("finetune", "epochs") == 0


def export_lines(manifest: Manifest) -> list[str]:
    """What `csq export` prints: where the integers went, and the certificate."""
    parity = manifest.parity
    assert parity is not None  # every export has one
    wide = [printable(record.name) for record in manifest.layers if record.encoding == "int16"]
    absent = [printable(name) for name in parity.layers_absent]
    size = manifest.sizes.file_bytes or 0
    ratio = manifest.sizes.float_bytes / size if size else 0.0
    small = manifest.folded and manifest.form == "bit-packed"
    form = "bit-packed-small" if small else printable(manifest.form)
    lines = [f"{form}: {size:,} bytes, {_times(ratio)} than float", *_parts_line(manifest)]
    lines += [f"note         {printable(note)}" for note in parity.notes]
    if wide:
        lines.append(f"int16        {counted(len(wide), 'layer')} beyond ±127: {', '.join(wide)}")
    if parity.layers_int8:
        lines.append(f"int8         {len(parity.layers_int8)} of {len(manifest.layers)} layers run in int8")
    if parity.calibrated:
        lines.append(
            f"calibrated   outputs of {counted(len(parity.calibrated), 'layer')}, rounded beyond what was trained"
        )
    if absent:
        lines.append(f"left out     {counted(len(absent), 'layer')} unused at inference: {', '.join(absent)}")
    lines.append(
        f"verified     {counted(parity.layers_matched, 'layer')} bit-exact; logits within {parity.max_logit_error:.1e} "
        f"(std {parity.logit_std:.2g}) on {printable(parity.inputs)}; {parity.engine}, loads in {parity.load_seconds:.2f} s"
    )
    if parity.tolerance_in_std >= _LOOSE:
        lines.append(
            f"             {parity.tolerance_in_std:.2g} of their std is what rounding alone may do here: logits say little of this file"
        )
    if parity.top1 is not None:
        before = f", the hard model's {parity.hard_top1:.2f}" if parity.hard_top1 is not None else ""
        lines.append(f"top-1        {parity.top1:.2f} % of {counted(parity.samples, 'image')}{before}")
    if parity.latency_ms is not None:
        lines.append(
            f"latency      {parity.latency_ms:.2f} ms, fp32 / this {parity.latency_ratio:.2f}× (batch 1, one thread)"
        )
    return lines


def _parts_line(manifest: Manifest) -> list[str]:
    parts = ", ".join(f"{printable(name)} {size:,}" for name, size in manifest.sizes.parts.items())
    return [f"of it        {parts}"] if parts else []


def print_coverage(found: Mapping[str, Any], console: Console) -> None:
    """What `csq inspect` prints, from ``models.coverage.coverage``: a row per tensor, then the shares."""
    marks = glyphs(console)
    rows = [*found["layers"], *found["left_float"]]
    macs = ["never called" if row["macs"] is None else f"{row['macs']:,}" for row in found["layers"]]
    weights = [f"{row['weights']:,}" for row in found["layers"]]
    float_ = [""] * len(found["left_float"])
    columns = [
        Column("tensor", [printable(row["name"]) for row in rows], shrinks=LEAST_NAME),
        Column("shape", ["×".join(map(str, row["shape"])) for row in rows], rank=2),
        Column("weights", [*weights, *float_], right=True),
        Column("MACs", [*macs, *float_], rank=1, right=True),
    ]
    if float_:
        whys = [f"float: {row['why']}" for row in found["left_float"]]
        columns.append(Column("", [*("quantized" for _ in weights), *whys], shrinks=_LEAST_REASON))
    print_columns(columns, console, marks)
    console.print()
    line = (
        f"{counted(len(found['layers']), 'weight tensor')}: {100 * found['parameter_share']:.2f} % of {found['parameters']:,} "
        f"parameters, {100 * found['mac_share']:.2f} % of {found['macs']:,} multiply-accumulates "
        f"for {'×'.join(map(str, found['input_size']))}"
    )
    print_lines([line], console, indent=0)


def budget_line(budget: Mapping[str, Any]) -> str:
    """One of a run's budgets: what was asked for and what was reached."""
    kind, asked, reached = budget["budget"], budget["asked"], budget["reached"]
    if kind == "size":
        said = f"{reached:,} of {asked:,} bytes ({100 * reached / asked:.1f} %), {printable(budget['file'])}"
    elif kind == "compression":
        said = f"{reached:.2f} times smaller than float, {asked:g} asked, {printable(budget['file'])}"
    elif kind == "bops":
        said = f"{reached:,} of {asked:,.0f} bit operations ({100 * reached / asked:.1f} %)"
    elif kind == "latency":
        said = f"{reached:.3f} of {asked:g} ms, by latencies of its layers in {printable(budget['engine'])}"
    elif kind == "act_bits":
        said = f"{reached:.4f} of {asked:g} mean bits of layer inputs"
    else:
        said = f"{reached:.4f} of {asked:g} mean bits"
    return f"{'budget':<{LABEL}}{said}"


def print_plan(plan: Mapping[str, Any], console: Console, *, verbose: bool = False) -> None:
    """What `csq plan` prints, from ``pipeline.plan``: a summary; ``verbose`` adds a row per tensor and the recipe as resolved."""
    more = f"{'more':<{LABEL}}every tensor and the whole recipe: `csq plan … --verbose`"
    print_lines([*_plan_lines(plan), *([] if verbose else [more])], console)
    if not verbose:
        return
    marks = glyphs(console)
    console.print()
    layers, left = plan["layers"], plan["left_float"]
    if layers or left:
        rows, float_ = [*layers, *left], [""] * len(left)
        columns = [
            Column("tensor", [printable(row["name"]) for row in rows], shrinks=LEAST_NAME),
            Column("shape", ["×".join(map(str, row["shape"])) for row in rows], rank=2),
            Column("weights", [*(f"{row['weights']:,}" for row in layers), *float_], right=True),
            Column("planes", [*(str(row["planes"]) for row in layers), *float_], right=True),
        ]
        if left:
            columns.append(
                Column("", [*("quantized" for _ in layers), *(f"float: {row['why']}" for row in left)], shrinks=34)
            )
        print_columns(columns, console, marks)
        console.print()
    recipe = yaml.safe_dump(plan["recipe"], sort_keys=False, allow_unicode=True, width=max(console.width, 60))
    for line in recipe.splitlines():
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    recipe, layers, left = plan["recipe"], plan["layers"], plan["left_float"]
    size, memory, time = plan["bytes"], plan["memory"], plan["time"]
    why = f" (chosen by auto: {plan['method_why']})" if plan["method_why"] else ""
    data, phases = recipe["data"], (recipe["adaptation"]["epochs"], recipe["epochs"], recipe["finetune"]["epochs"])
    named = zip(phases, ("in float", "of the search", "with the planes fixed"), strict=True)
    epochs = [f"{counted(number, 'epoch')} {name}" for number, name in named if number]
    rows = [
        ("model", printable(f"{recipe['model']['source']} on {data['source']}")),
        ("method", f"{recipe['quantization']['method']}{why}"),
        ("training", f"{', '.join(epochs)}, batches of {counted(data['batch_size'], 'image')}"),
    ]
    if layers:
        weights = sum(layer["weights"] for layer in layers)
        rows.append(("quantized", f"{counted(len(layers), 'weight tensor')}, {weights:,} weights"))
    whys = Counter(printable(tensor["why"]) for tensor in left)
    rows += [("left float", f"{counted(number, 'tensor')}: {reason}") for reason, number in whys.most_common()]
    if layers:
        asked = f" of {plan['target_mean_bits']:g}" if plan["target_mean_bits"] is not None else ""
        found = sorted(Counter(layer["planes"] for layer in layers).items())
        kinds = ", ".join(f"{counted(number, 'tensor')} at {planes}" for planes, number in found)
        rows.append(("bits", f"{plan['mean_bits']:.2f}{asked}, planes as far as a few steps tell: {kinds}"))
    small = size["bit_packed_small"]
    shipped = f"; {small:,} bytes by `csq export --bit-packed-small`" if small is not None else ""
    free = f", {memory['free_bytes'] / 2**30:.1f} GiB are free" if memory["free_bytes"] is not None else ""
    needed = f"{memory['bytes'] / 2**30:.1f} GiB" if memory["bytes"] >= 2**30 else f"{memory['bytes'] / 2**20:.0f} MiB"
    rows += [
        ("file", f"about {size['model']:,} bytes{shipped}"),
        ("memory", f"about {needed} for steps of {counted(memory['images'], 'image')} at once{free}"),
        (
            "time",
            f"about {duration(time['seconds'])}: {counted(time['steps'], 'step')} of {_seconds(time['step_seconds'])}, "
            f"{counted(time['evaluations'], 'evaluation')} of {_seconds(time['evaluation_seconds'])}",
        ),
    ]
    return [f"{label:<{LABEL}}{text}" for label, text in rows]


def _seconds(value: float) -> str:
    """``0.0012 s``, ``1.2 s``, ``102 s``."""
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
