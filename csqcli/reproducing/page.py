"""A reproduced table as Markdown, and a figure as SVG."""

from __future__ import annotations

from typing import Any

from csqcli.errors import printable
from csqcli.quant.catalog import CARDS
from csqcli.reporting.charts import Figure, Point, Series, lines, scatter
from csqcli.reproducing.experiments import Experiment
from csqcli.reproducing.runs import depth_trend

_HEAD = (
    "| Method | A-bits | planes | top-1, hard | gap to float | unit steps | paper: W-bits | paper: top-1 | paper: gap |"
)


def markdown(experiment: Experiment, summary: dict[str, Any]) -> str:
    """The table with the paper's figures beside ours; data and schedule in the caption."""
    seeds = summary["seeds"]
    lines = [
        f"# {experiment.title}",
        "",
        f"Ours: {printable(str(summary['model']))} on {printable(str(summary['data']))}, {_count(summary['epochs'], 'epoch')} "
        f"(scale {summary['scale']:g} of the paper's), {_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}); "
        "top-1 in % of the hard model as reloaded from disk, mean ± standard deviation. Compare gaps, not accuracies, where data "
        f"or schedule differ from the paper's. {_levels(summary)}",
        "",
        _HEAD,
        "|" + " --- |" * 9,
    ]
    lines += [_line(row) for row in summary["rows"]]
    if experiment.plot == "layers":
        lines += [
            "",
            "Rank correlation of planes with depth (Spearman; the paper sees a rise from input to output):",
            "",
        ]
        for row in _trained(summary):
            trends = ", ".join(f"{depth_trend(layers):+.2f}" for layers in row["ours"]["layers"])
            lines.append(f"- {row['label']}: {trends}")
    return "\n".join(lines) + "\n"


def figure(experiment: Experiment, summary: dict[str, Any]) -> Figure | None:
    """The experiment's plot of its first seed, or None where it is a table only."""
    rows, name, title = list(_trained(summary)), experiment.name, experiment.title
    about = f"{summary['model']} on {summary['data']}, {_count(summary['epochs'], 'epoch')}"
    if experiment.plot == "precision":
        curves = [Series(row["label"], list(enumerate(row["ours"]["history"][0], 1))) for row in rows]
        targets = {row["ours"]["target"] for row in rows}
        target = targets.pop() if len(targets) == 1 else None
        return lines(
            name, title, curves, description=about, x_label="epoch", y_label="mean planes per weight", target=target
        )
    if experiment.plot == "layers":
        curves = [Series(row["label"], list(enumerate(row["ours"]["layers"][0], 1))) for row in rows]
        return lines(
            name, title, curves, description=about, x_label="layer, input to output", y_label="planes", whole_x=True
        )
    if experiment.plot == "tradeoff":
        points = [
            Point(_mean(row["ours"]["planes"]), row["ours"]["mean"], "CSQ", row["label"], row["ours"]["sd"])
            for row in rows
            if row["ours"]["planes"] is not None
        ]
        return scatter(name, title, points, description=about, x_label="mean planes per weight", y_label="top-1, %")
    return None


def _levels(summary: dict[str, Any]) -> str:
    without_zero = dict.fromkeys(row["label"] for row in _trained(summary) if not CARDS[row["method"]].has_zero)
    others = f"; {', '.join(without_zero)}: 2^k" if without_zero else ""
    return f"Levels of a method at k planes: 2^(k+1) − 1{others}."


def _trained(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in summary["rows"] if row["ours"] is not None]


def _line(row: dict[str, Any]) -> str:
    ours, paper = row["ours"], row["paper"]
    cells = [row["label"], str(row["act_bits"])]
    if ours is None:
        cells += ["–", "not in csq" if row["method"] is None else "–", "–", "–"]
    else:
        spread = "" if ours["sd"] is None else f" ± {ours['sd']:.2f}"
        cells += [
            "float" if ours["planes"] is None else f"{_mean(ours['planes']):.3f}",
            f"{ours['mean']:.2f}{spread}",
            _signed(ours["gap"]),
            "–" if ours["unit_steps_mean"] is None else f"{ours['unit_steps_mean']:.2f}",
        ]
    cells += [paper["bits"] or "–", "–" if paper["top1"] is None else f"{paper['top1']:.2f}", _signed(paper["gap"])]
    return "| " + " | ".join(cells) + " |"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
