"""What the commands that look at a model print: tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from csqcli.errors import printable
from csqcli.reporting import charts
from csqcli.reporting.charts import Series
from csqcli.reporting.figure import Figure
from csqcli.reporting.layout import LEAST_NAME, Column, glyphs, print_columns, print_lines
from csqcli.reporting.words import layer_names, short
from csqcli.system.progress import counted


def names_of(rows: Any) -> list[str]:
    """The layers' names as a table shows them."""
    return layer_names([printable(row["name"]) for row in rows])


def print_allocation(found: Mapping[str, Any], console: Console) -> None:
    """What `csq allocate` prints."""
    marks, rows = glyphs(console), found["layers"]
    most = max((row["planes"] for row in rows), default=0)
    columns = [
        Column("layer", names_of(rows), shrinks=LEAST_NAME),
        Column("shape", ["×".join(map(str, row["shape"])) for row in rows], rank=3),
        Column("weights", [f"{row['weights']:,}" for row in rows], rank=1, right=True),
        Column("MACs", ["–" if row["macs"] is None else short(row["macs"]) for row in rows], rank=2, right=True),
        Column(
            "planes", [marks.full * row["planes"] + marks.empty * (most - row["planes"]) for row in rows], style="cyan"
        ),
        Column("bits", [str(row["planes"]) for row in rows], right=True),
        Column("share", [f"{100 * row['share']:.1f} %" for row in rows], right=True),
    ]
    print_columns(columns, console, marks)
    console.print()
    weights = sum(row["weights"] for row in rows)
    used = 100 * found["spent"] / max(found["allowed"], 1)
    lines = [
        f"mean bits    {found['mean_bits']:.4f} (target {found['target_bits']:g}) over {weights:,} weights, "
        f"by {printable(found['allocator'])}",
        f"budget       {used:.2f} % used, counted in {printable(found['cost'])}",
    ]
    for budget in found["budgets"] if len(found["budgets"]) > 1 else ():
        lines.append(f"{budget['budget']:<13}{budget['reached']:,.6g} of {budget['asked']:,.6g}")
    print_lines(lines, console)


def print_bench(found: Mapping[str, Any], console: Console) -> None:
    """What `csq bench` prints: a row per layer, then the network."""
    marks, rows, forms = glyphs(console), found["layers"], found["forms"]
    if rows:
        slowest = max((row["latency"]["fp32"]["ms"] for row in rows if row["latency"].get("fp32")), default=0.0)
        columns = [
            Column("layer", names_of(rows), shrinks=LEAST_NAME),
            Column(
                "input", ["–" if row["input"] is None else "×".join(map(str, row["input"])) for row in rows], rank=3
            ),
            Column("weight", ["×".join(map(str, row["shape"])) for row in rows], rank=2),
            Column("MACs", ["–" if row["macs"] is None else short(row["macs"]) for row in rows], rank=4, right=True),
            *(
                Column(f"{form} ms", [_milliseconds(row["latency"].get(form)) for row in rows], right=True)
                for form in forms
            ),
            Column("± %", [_spread(row["latency"]) for row in rows], rank=1, right=True),
            Column("", [marks.full * round(8 * _fp32(row) / (slowest or 1.0)) for row in rows], rank=5, style="cyan"),
        ]
        print_columns(columns, console, marks)
        console.print()
    print_lines(_bench_lines(found), console)


def _fp32(row: Mapping[str, Any]) -> float:
    latency = row["latency"].get("fp32")
    return latency["ms"] if latency else 0.0


def _milliseconds(latency: Mapping[str, float] | None) -> str:
    return "–" if latency is None else f"{latency['ms']:.3f}"


def _spread(latency: Mapping[str, Any]) -> str:
    """Half the distance of the quartiles, in percent of the median, of the form where that is most."""
    known = [timing for timing in latency.values() if timing]
    halves = [50 * (timing["high_ms"] - timing["low_ms"]) / timing["ms"] for timing in known if timing["ms"]]
    return f"{max(halves):.0f}" if halves else "–"


def _bench_lines(found: Mapping[str, Any]) -> list[str]:
    network, threads = found["network"], found["threads"]
    size = "×".join(map(str, found["input_size"]))
    lines = []
    for form in ("fp32", "exported"):
        timing = network[form]
        if timing is None:
            continue
        said = f"{timing['ms']:.3f} ms ({timing['low_ms']:.3f} to {timing['high_ms']:.3f})"
        if form == "exported" and network["fp32"] is not None:
            said += f", {network['fp32']['ms'] / timing['ms']:.2f} times as fast as fp32: {network['exported_as']}"
        lines.append(f"{form:<13}{said}")
    if network["why"]:
        lines.append(f"network      not measured: {printable(network['why'])}")
    if found["layers"]:
        sums = ", ".join(f"{form} {ms:.3f} ms" for form, ms in found["sum_ms"].items())
        lines.append(f"sum          of the layers, each alone, in the next wider form where it has none: {sums}")
        left = [row for row in found["layers"] if row["why"]]
        if left:
            lines.append(
                f"left out     {counted(len(left), 'layer')}, {printable(left[0]['name'])} first: {left[0]['why']}"
            )
    lines.append(
        f"measured     {printable(found['engine_version'] or found['engine'])}, {threads} thread{'s' if threads > 1 else ''}, "
        f"batch {found['batch']}, images of {size}, medians of {found['repeats']} turns, quartiles in brackets"
    )
    processor = found["processor"]
    lines.append(f"processor    {printable(processor['name'])}: {', '.join(processor['instructions'])}")
    return lines


def print_sensitivity(found: Mapping[str, Any], console: Console) -> None:
    """What `csq sensitivity` prints: the rise of the loss, a column per width, and top-1 at the narrowest."""
    marks, rows, widths = glyphs(console), found["layers"], found["widths"]
    rises = [[value - found["loss"] for value in row["loss"]] for row in rows]
    last = len(widths) - 1
    columns = [
        Column("layer", names_of(rows), shrinks=LEAST_NAME),
        Column("weights", [f"{row['weights']:,}" for row in rows], rank=2, right=True),
        *(
            Column(
                counted(width, "plane"),
                [f"{rise[at]:+.4f}" for rise in rises],
                rank=0 if at in (0, last) else 1,
                right=True,
            )
            for at, width in enumerate(widths)
        ),
        Column(f"top-1 at {widths[0]}", [f"{row['top1'][0]:.2f}" for row in rows], rank=1, right=True),
    ]
    print_columns(columns, console, marks)
    console.print()
    worst = max(range(len(rows)), key=lambda index: rises[index][0])
    lines = [
        f"float        loss {found['loss']:.4f}, top-1 {found['top1']:.2f} % of {found['images']} images",
        f"columns      rise of the loss with that layer alone at so many planes ({', '.join(map(str, widths))})",
        f"worst        {names_of(rows)[worst]} at {counted(widths[0], 'plane')}: {rises[worst][0]:+.4f}",
    ]
    print_lines(lines, console)


def sensitivity_figure(found: Mapping[str, Any]) -> Figure:
    """The rise of the loss over depth, a line per width."""
    rows, widths = found["layers"], found["widths"]
    series = [
        Series(
            f"{width} plane{'s' if width != 1 else ''}",
            [(number, row["loss"][at] - found["loss"]) for number, row in enumerate(rows, 1)],
        )
        for at, width in enumerate(widths)
    ]
    worst = max(rows, key=lambda row: row["loss"][0])
    return charts.lines(
        "sensitivity",
        "Loss with one layer rounded",
        series,
        description=(
            f"Rise of the loss over the float model's {found['loss']:.4g} on {found['images']} images, one layer at a time; "
            f"most at {counted(widths[0], 'plane')}: {names_of([worst])[0]}, {worst['loss'][0] - found['loss']:+.4g}."
        ),
        x_label="layer, from input to output",
        y_label="rise of the loss",
        from_zero=True,
        whole_x=True,
    )


def print_explanation(found: Mapping[str, Any], console: Console) -> None:
    """What `csq explain` prints: a row per layer, then the swaps."""
    marks, rows = glyphs(console), found["layers"]
    names = names_of(rows)

    def millions(part: str) -> list[str]:
        return ["–" if row[part] is None else f"{1e6 * row[part]['per_bit']:.3g}" for row in rows]

    columns = [
        Column("layer", names, shrinks=LEAST_NAME),
        Column("weights", [f"{row['weights']:,}" for row in rows], rank=4, right=True),
        Column("bits", [str(row["planes"]) for row in rows], right=True),
        Column("share", [f"{100 * row['share']:.1f} %" for row in rows], rank=3, right=True),
        Column("planes save", [_falling(row["importance"]) for row in rows], rank=5),
        Column("one less", ["–" if row["take"] is None else f"{row['take']['rise']:+.4f}" for row in rows], right=True),
        Column("per M bits", millions("take"), rank=2, right=True),
        Column(
            "one more", ["–" if row["give"] is None else f"{-row['give']['gain']:+.4f}" for row in rows], right=True
        ),
        Column("per M bits", millions("give"), rank=2, right=True),
    ]
    print_columns(columns, console, marks)
    console.print()
    target = f" (target {found['target_bits']:g})" if found["target_bits"] is not None else ""
    lines = [
        f"as it is     loss {found['loss']:.4f}, top-1 {found['top1']:.2f} % of {found['images']} images, "
        f"{found['mean_bits']:.4f} mean bits{target}",
        "one less     the loss with the layer's cheapest plane taken away; one more: with a plane given back; and that per "
        "million bits of the budget: a layer keeps a plane while it is worth more there than elsewhere",
    ]
    lines += [
        f"swap         {words}"
        for words in _swap_words(found, dict(zip([row["name"] for row in rows], names, strict=True)))
    ]
    if passed_over := [each["budget"] for each in found["budgets"] if not each["kept"]]:
        units = {"bits": "mean planes", "bops": "bit operations"}
        held = " and ".join(units[each["budget"]] for each in found["budgets"] if each["kept"])
        lines.append(
            f"budgets      swaps are within {held} only: the file does not say what a plane takes of the target of "
            f"{' and '.join(passed_over)}"
        )
    print_lines(lines, console)


def _falling(values: Sequence[float]) -> str:
    """What each plane saves, most significant first: ``2.1 0.3 0.04``."""
    return " ".join(f"{value:.2g}" for value in values)


def _swap_words(found: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    if not found["swaps"]:
        return ["none fits into the budget"]
    words = []
    for swap in found["swaps"]:
        source = f"from {names[swap['take']]}" if swap["take"] is not None else "from what the budget has left"
        verdict = "helps" if swap["measured"] < 0 else "does not help"
        words.append(
            f"a plane to {names[swap['give']]} {source}: loss {swap['measured']:+.4f} (expected {swap['expected']:+.4f}), "
            f"top-1 {swap['top1']:.2f} %; {verdict}"
        )
    return words


def print_diff(found: Mapping[str, Any], console: Console) -> None:
    """What `csq diff` prints: a row per layer, worst first, then the logits."""
    marks, rows = glyphs(console), found["layers"]
    kinds = [
        (kind, heading)
        for kind, heading in (("own", "alone dB"), ("hard", "hard dB"), ("engine", "engine dB"))
        if any(row[kind] is not None for row in rows)
    ]
    columns = [
        Column("layer", names_of(rows), shrinks=LEAST_NAME),
        Column("weights", [f"{row['weights']:,}" for row in rows], rank=2, right=True),
        Column("bits", [str(row["planes"]) for row in rows], rank=1, right=True),
        *(Column(heading, [_decibels(row[kind]) for row in rows], right=True) for kind, heading in kinds),
    ]
    print_columns(columns, console, marks)
    console.print()
    logits = found["logits"]
    lines = [f"images       {found['images']}; outputs of each layer against those of {printable(found['float'])}"]
    for kind, agreement, name in (
        ("hard", "agreement", "hard"),
        ("engine", "engine_agreement", printable(found["engine"] or "")),
    ):
        if logits[agreement] is not None:
            lines.append(
                f"logits       {name}: {_decibels(logits[kind])} dB, the same top-1 for {logits[agreement]:.2f} % of the images"
            )
    if found["unreached"]:
        listed = ", ".join(map(printable, found["unreached"]))
        lines.append(f"not seen     {listed}: no module gives the output")
    print_lines(lines, console)


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """What `csq compare` prints: planes and bytes of every layer, ``*`` where planes differ, then a line per model."""
    marks, models, rows = glyphs(console), found["models"], found["layers"]
    letters = [chr(ord("A") + at) if at < 26 else str(at + 1) for at in range(len(models))]

    def cells(key: str, at: int, form: str) -> list[str]:
        return ["–" if row[key][at] is None else format(row[key][at], form) for row in rows]

    columns = [Column("layer", names_of(rows), shrinks=LEAST_NAME)]
    columns += [Column(f"bits {letter}", cells("planes", at, "d"), right=True) for at, letter in enumerate(letters)]
    columns.append(Column("", ["*" if row["differs"] else "" for row in rows], style="yellow"))
    columns += [
        Column(f"bytes {letter}", cells("bytes", at, ",d"), rank=1, right=True) for at, letter in enumerate(letters)
    ]
    columns += [
        Column(f"entropy {letter}", cells("entropy_bits", at, ".2f"), rank=2, right=True)
        for at, letter in enumerate(letters)
    ]
    if rows:
        print_columns(columns, console, marks)
        console.print()
    first, lines = models[0], []
    for letter, model in zip(letters, models, strict=True):
        lines.append(f"{letter:<13}{printable(model['file'])}: {printable(model['model'])}, {_how(model)}")
        parts = [f"{model['mean_bits']:.4f} mean bits", f"{model['entropy_bits']:.3f} entropy"]
        if model["file_bytes"] is not None:
            parts.append(
                f"{model['file_bytes']:,} bytes{_change(model, first, 'file_bytes', ',d')} ({printable(model['form'])})"
            )
        if model["hard_top1"] is not None:
            parts.append(
                f"top-1 {model['hard_top1']:.2f} %{_change(model, first, 'hard_top1', '.2f')} of {model['samples']} images"
            )
        lines.append(f"{'':<13}{', '.join(parts)}")
    differing = sum(row["differs"] for row in rows)
    lines.append(f"differ       planes of {differing} of {len(rows)} layers")
    for key, values in found["settings"].items():
        shown = ", ".join(f"{letter} {_short(value)}" for letter, value in zip(letters, values, strict=True))
        lines.append(f"             {printable(key)}: {shown}")
    print_lines(lines, console)


def _how(model: Mapping[str, Any]) -> str:
    by = f" with planes by {printable(str(model['allocator']))}" if model["allocator"] else ""
    return f"{printable(str(model['method'] or 'method unknown'))}{by}"


def _change(model: Mapping[str, Any], first: Mapping[str, Any], key: str, form: str) -> str:
    if model is first or first[key] is None:
        return ""
    return f" ({format(model[key] - first[key], '+' + form)})"


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 40 else f"{text[:37]}..."
