"""What a sweep came to: a line per run, means over seeds, the front, and the smallest within an allowed drop. No PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csqcli.errors import UserError
from csqcli.sweeping.plan import FORM, PACKED_FILE, Member, Sweep
from csqcli.system.files import read_regular
from csqcli.system.limits import read_json
from csqcli.system.run_files import REPORT_FILE

RESOLUTION = 0.25  # planes, to which the smallest target within an allowed drop is found
WHOLE = 1.0  # the same, of a method that gives every layer as many planes
_BYTES, _VALUES = 2**28, 2**22
Summary = dict[str, Any]


def summary(sweep: Sweep, members: Sequence[Member]) -> Summary:
    """pareto.json (docs/report-json.md), from the reports and bit-packed files in the runs' folders. UserError where one lacks."""
    reports = [read_report(sweep.folder / member.key) for member in members]
    rows = [_row(sweep, member, report) for member, report in zip(members, reports, strict=True)]
    first, base = reports[0], sweep.base
    compute, float_top1 = first["compute"], first["accuracy"]["float_top1"]
    float_bytes = first["sizes"]["float_bytes"]
    groups = grouped(rows, float_top1=float_top1, float_bytes=float_bytes)
    return {
        "model": first["model"]["source"],
        "data": base.data.source,
        "samples": first["accuracy"]["samples"],
        "epochs": base.epochs,
        "seed": base.seed,
        "seeds": sweep.seeds,
        "warm": sweep.warm,
        "form": FORM,
        "float": {
            "top1": float_top1,
            "bytes": float_bytes,
            "bops": None if compute is None else 32 * 32 * compute["macs"],
        },
        "trained_epochs": base.adaptation.epochs + sum(row["epochs"] for row in rows),
        "runs": rows,
        "groups": groups,
        "left_out": sweep.left_out(),
        "max_drop": None if sweep.max_drop is None else _within(groups, float_top1, sweep.max_drop),
    }


def _row(sweep: Sweep, member: Member, report: Mapping[str, Any]) -> dict[str, Any]:
    size = (sweep.folder / member.key / PACKED_FILE).stat().st_size
    accuracy, compute = report["accuracy"], report["compute"]
    return {
        "run": member.key,
        "method": member.method,
        "target_bits": member.target,
        "seed": member.recipe.seed,
        "mean_bits": report["budget"]["mean_bits"],
        "top1": accuracy["hard_top1"],
        "gap": accuracy["hard_top1"] - accuracy["float_top1"],
        "bytes": size,
        "compression": report["sizes"]["float_bytes"] / size,
        "bops": None if compute is None else compute["bops"],
        "epochs": member.recipe.epochs + member.recipe.finetune.epochs,
        "begins_with": member.begins_with,
    }


def grouped(rows: Sequence[dict[str, Any]], *, float_top1: float, float_bytes: int) -> list[dict[str, Any]]:
    """The runs of each method and target, which differ in their seeds: means, and the sample standard deviation of top-1.

    The front is that of the means; a run is on it with its group.
    """
    together: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        together.setdefault((row["method"], row["target_bits"]), []).append(row)
    groups = [_group(runs, float_top1, float_bytes) for runs in together.values()]
    for what in ("bytes", "bops"):
        for group, runs in zip(groups, together.values(), strict=True):
            group[f"on_front_{what}"] = _is_best(group, groups, what)
            for row in runs:
                row[f"on_front_{what}"] = group[f"on_front_{what}"]
    return groups


def _group(runs: Sequence[Mapping[str, Any]], float_top1: float, float_bytes: int) -> dict[str, Any]:
    first, scores = runs[0], [row["top1"] for row in runs]
    mean, size = statistics.fmean(scores), statistics.fmean(row["bytes"] for row in runs)
    return {
        "group": first["run"],
        "method": first["method"],
        "target_bits": first["target_bits"],
        "runs": [row["run"] for row in runs],
        "n": len(runs),
        "top1": mean,
        "top1_sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "gap": mean - float_top1,
        "mean_bits": statistics.fmean(row["mean_bits"] for row in runs),
        "bytes": size,
        "compression": float_bytes / size,
        "bops": None if first["bops"] is None else statistics.fmean(row["bops"] for row in runs),
        "epochs": first["epochs"],
    }


def _is_best(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], what: str) -> bool:
    """Whether no other is at least as good in both and better in one."""
    if row[what] is None:
        return False
    return not any(
        other[what] <= row[what]
        and other["top1"] >= row["top1"]
        and (other[what] < row[what] or other["top1"] > row["top1"])
        for other in rows
    )


def _within(groups: Sequence[Mapping[str, Any]], float_top1: float, max_drop: float) -> Summary:
    fit = [group for group in groups if is_within(group["top1"], float_top1, max_drop)]
    best = min(fit, key=lambda group: (group["bytes"], -group["top1"]), default=None)
    return {"asked": max_drop, "reached": None if best is None else -best["gap"], "run": best and best["group"]}


def is_within(top1: float, float_top1: float, max_drop: float) -> bool:
    """Whether a model is at most so many points below the float one; a rounding error of the difference is none."""
    return top1 >= float_top1 - max_drop - 1e-9


def next_target(tried: Mapping[float, bool], *, least: float, resolution: float = RESOLUTION) -> float | None:
    """The target to try next for the smallest that holds a drop: ``tried`` says of targets whether they do.

    Half-way, in steps of ``resolution``, between the lowest that holds and what lies below it: one that does not, or ``least``.
    None where nothing is left to try. Accuracy may not fall evenly; targets above the lowest that holds are not looked at.
    """
    holding = [target for target, holds in tried.items() if holds]
    if not holding:
        return None
    high = min(holding)
    failing = [target for target in tried if target < high]
    if not failing:
        if high - least < resolution:
            return None
        low = least - resolution  # so that ``least`` itself is tried in the end
    else:
        low = max(failing)
    steps = round((high - low) / resolution)
    if steps < 2:
        return None
    return max(high - (steps // 2) * resolution, least)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a run in a sweep. UserError where it cannot be read."""
    path = folder / REPORT_FILE
    try:
        return read_json(read_regular(path, limit=_BYTES), nodes=_VALUES)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), hint="remove that run's folder") from None
