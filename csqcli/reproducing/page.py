"""A reproduced table as Markdown, and a figure as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from csqcli.errors import printable
from csqcli.quant.catalog import CARDS
from csqcli.recipe.yaml_files import builtin_names
from csqcli.reporting.charts import Point, Series, lines, scatter
from csqcli.reporting.figure import Figure
from csqcli.reporting.words import layer_names, near_chance
from csqcli.reproducing.experiments import PAPERS_OWN, Experiment
from csqcli.reproducing.runs import SHORT_OF_TARGET, depth_trend
from csqcli.system.progress import counted

_NONE = "–"
_COLUMNS = (
    *("Method", "A-bits", "target", "planes", "bytes", "compression", "32 / planes", "top-1, hard", "gap to float"),
    *("unit steps", "paper: W-bits", "paper: compression", "paper: top-1", "paper: gap"),
)
_AT_CHANCE, _SHORT = "†", "‡"


def markdown(experiment: Experiment, summary: dict[str, Any]) -> str:
    """The table with the paper's figures beside ours; what is counted, data and schedule in the caption."""
    rows = [_cells(row) for row in summary["rows"]]
    columns = [name for name in _COLUMNS if any(row.get(name, _NONE) != _NONE for row in rows)]
    parts = [f"# {experiment.title}", " ".join(_caption(experiment, summary, columns))]
    parts.append(_table(columns, [[row.get(name, _NONE) for name in columns] for row in rows]))
    parts += _footnotes(summary)
    if experiment.plot == "layers":
        parts += _per_layer(summary)
    return "\n\n".join(parts) + "\n"


def figure(experiment: Experiment, summary: dict[str, Any]) -> Figure:
    """The experiment's plot: means over seeds, but for curves over training, which are those of the first."""
    rows, name, title = _trained(summary), experiment.name, experiment.title
    about = f"{summary['model']} on {summary['data']}, {counted(summary['epochs'], 'epoch')}"
    if experiment.plot == "precision":
        curves = [Series(row["label"], list(enumerate(row["ours"]["history"][0], 1))) for row in rows]
        targets = {row["ours"]["target"] for row in rows}
        target = targets.pop() if len(targets) == 1 else None
        about += f", seed {summary['seeds'][0]}"
        return lines(
            name, title, curves, description=about, x_label="epoch", y_label="mean planes per weight", target=target
        )
    if experiment.plot == "layers":
        curves = [Series(row["label"], list(enumerate(_mean_layers(row), 1))) for row in rows]
        return lines(
            name, title, curves, description=about, x_label="layer, input to output", y_label="planes", whole_x=True
        )
    papers = _papers_points(summary)
    papers_count = "; the paper's: 32 / mean planes" if papers else ""
    floats = [row["ours"]["mean"] for row in rows if row["method"] == "float"]
    return scatter(
        name,
        title,
        [*_our_points(summary), *papers],
        description=about,
        x_label=f"compression, × (ours: the file on disk{papers_count})",
        y_label="top-1, %",
        front=False,
        target=floats[0] if floats else None,
        target_label=f"float {floats[0]:.2f} %" if floats else "",
    )


def _our_points(summary: dict[str, Any]) -> list[Point]:
    rows = [row for row in _trained(summary) if row["method"] != "float"]
    return [
        Point(
            statistics.mean(row["ours"]["compression"]),
            row["ours"]["mean"],
            row["method"],
            _label(row, summary),
            row["ours"]["sd"],
        )
        for row in rows
    ]


def _papers_points(summary: dict[str, Any]) -> list[Point]:
    rows = [row for row in summary["rows"] if row["method"] != "float"]
    return [
        Point(row["paper"]["compression"], row["paper"]["top1"], "the paper", _label(row, summary))
        for row in rows
        if None not in (row["paper"]["compression"], row["paper"]["top1"])
    ]


def _label(row: dict[str, Any], summary: dict[str, Any]) -> str:
    """A row's name, with the bits of its activations where those of the rows differ."""
    several = len({other["act_bits"] for other in summary["rows"] if other["method"] != "float"}) > 1
    return f"{row['label']} A{row['act_bits']}" if several else row["label"]


def _caption(experiment: Experiment, summary: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Sentences: only those about what is in the table."""
    seeds = summary["seeds"]
    sentences = [
        f"Ours: {printable(str(summary['model']))} on {printable(str(summary['data']))}, {counted(summary['epochs'], 'epoch')} "
        f"(scale {summary['scale']:g} of the paper's), {counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))}).",
        f"Top-1 is in % of the hard model as reloaded from disk{', mean ± standard deviation' if len(seeds) > 1 else ''}.",
    ]
    if {"gap to float", "paper: gap"} <= set(columns):
        sentences.append("Compare gaps, not accuracies, where data or schedule differ from the paper's.")
    sentences.append(
        "Bytes are those of the compact file that a run leaves (model.safetensors), with signs, scales, BatchNorm and "
        "description (`csq sweep` counts bit-packed files: the same model in fewer bytes); compression is the float model, 4 bytes a "
        "value, over them."
    )
    if "paper: compression" in columns:
        sentences.append("The paper's compression counts weights alone, as 32 / planes does.")
    return sentences + _levels(summary) + _rivals(summary) + _not_in_text(experiment, columns)


def _levels(summary: dict[str, Any]) -> list[str]:
    quantized = [row for row in _trained(summary) if row["method"] != "float"]
    without_zero = _labels(row for row in quantized if not CARDS[row["method"]].has_zero)
    others = f"; {', '.join(without_zero)}: 2^k" if without_zero else ""
    return [f"Levels of a method at k planes: 2^(k+1) − 1{others}."] if quantized else []


def _rivals(summary: dict[str, Any]) -> list[str]:
    rivals = [row for row in _trained(summary) if row["method"] not in PAPERS_OWN]
    if not rivals:
        return []
    methods = {row["method"] for row in rivals}
    theirs = [name for name in builtin_names() if any(name.endswith(f"-{method}") for method in methods)]
    recipes = f"; `csq search --recipe` has theirs in {', '.join(theirs)}" if theirs else ""
    scratch = ", from scratch" if summary["weights_from"] == "random" else ""
    pretrained = ", ".join(_labels([row for row in rivals if row["pretrained"]]))
    begins = f" {pretrained} begins with a network trained in float, here for as many epochs." if pretrained else ""
    return [
        f"{', '.join(_labels(rivals))}: trained by this table's recipe and schedule, which are CSQ's "
        f"({summary['recipe']}{scratch}), not by their authors'{recipes}.{begins}"
    ]


def _not_in_text(experiment: Experiment, columns: Sequence[str]) -> list[str]:
    if experiment.in_text:
        return []
    name = experiment.title.partition(":")[0]
    other = "; what stands in its columns is from its other tables" if "paper: top-1" in columns else ""
    return [
        f"The paper has {name} as an image, without values in text that could be copied, so none stand beside ours{other}."
    ]


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row's cells by the name of their column; none of what is not known."""
    ours, paper = row["ours"], row["paper"]
    cells = {"Method": row["label"], "A-bits": str(row["act_bits"])}
    if ours is None:
        cells["planes"] = "not in csq"
    else:
        mean = None if ours["planes"] is None else statistics.mean(ours["planes"])
        planes = "float" if mean is None else f"{mean:.3f}"
        spread = "" if ours["sd"] is None else f" ± {ours['sd']:.2f}"
        cells |= {
            "target": _number(ours["target"], "g"),
            "planes": planes + (f" {_SHORT}" if ours["short_of_target"] else ""),
            "bytes": f"{statistics.mean(ours['bytes']):,.0f}",
            "compression": f"{statistics.mean(ours['compression']):.2f}",
            "32 / planes": _number(32 / mean if mean else None, ".2f"),
            "top-1, hard": f"{ours['mean']:.2f}{spread}" + (f" {_AT_CHANCE}" if ours["at_chance"] else ""),
            "gap to float": _number(ours["gap"], "+.2f"),
            "unit steps": _number(ours["unit_steps_mean"], ".2f"),
        }
    return cells | {
        "paper: W-bits": paper["bits"] or _NONE,
        "paper: compression": _number(paper["compression"], ".2f"),
        "paper: top-1": _number(paper["top1"], ".2f"),
        "paper: gap": _number(paper["gap"], "+.2f"),
    }


def _footnotes(summary: dict[str, Any]) -> list[str]:
    rows, notes = _trained(summary), []
    run = "a run" if len(summary["seeds"]) > 1 else "the run"
    if any(row["ours"]["at_chance"] for row in rows):
        chance = summary["chance"]
        notes.append(
            f"{_AT_CHANCE} {run} ended at chance: {near_chance(chance):.4g} % or less, where guessing has {chance:.4g} %. It learned "
            "nothing, so its accuracy says nothing of the method; a longer schedule (`--scale`) may."
        )
    if any(row["ours"]["short_of_target"] for row in rows):
        notes.append(
            f"{_SHORT} {run} ended more than {SHORT_OF_TARGET} planes below its target: the search gave away planes that it was allowed, "
            "so the row is a smaller model than its target names."
        )
    return notes


def _per_layer(summary: dict[str, Any]) -> list[str]:
    rows = _trained(summary)
    means = [_mean_layers(row) for row in rows]
    lines_ = [
        [name, *(f"{planes:g}" if planes == int(planes) else f"{planes:.2f}" for planes in layer)]
        for name, *layer in zip(layer_names(rows[0]["ours"]["layer_names"]), *means, strict=True)
    ]
    trends = [
        f"- {row['label']}: {', '.join(f'{depth_trend(layers):+.2f}' for layers in row['ours']['layers'])}"
        for row in rows
    ]
    return [
        f"Planes per layer, from input to output{', means over the seeds' if len(summary['seeds']) > 1 else ''}:",
        _table(["layer", *(row["label"] for row in rows)], lines_),
        "Rank correlation of planes with depth (Spearman; the paper sees a rise from input to output):",
        "\n".join(trends),
    ]


def _mean_layers(row: dict[str, Any]) -> list[float]:
    return [statistics.mean(planes) for planes in zip(*row["ours"]["layers"], strict=True)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def _trained(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in summary["rows"] if row["ours"] is not None]


def _labels(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in rows))


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else f"{value:{form}}"
