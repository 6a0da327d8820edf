"""Rows of the tables on real networks: what a row's name says, and one search per row.

A name is `METHOD PLANES[ A BITS][, RATE …]`, where A is the width of activations and a rate is `sgd X`, `adamw X` (the base optimizer's)
or `latents X` (of `staged`):

    "staged 2"   "lsq 2, adamw 0.0003"   "staged 1.5 A4"   "uniform 2, sgd 0.01, latents 0.001"   "float, adamw 0.001"

`--rows` takes any such name, whether it is in the table or not; one with * stands for those of the table. `uniform` is `staged`
without its search, `staged-importance` has the planes of `--allocator importance` from the first step, `csq` trains bits. `ste`,
`lsq` and `parq` have a scale per channel and the same planes in every layer, and at a target that is not whole those of csq's
`importance`; `parq-importance` and `lsq-importance` have these at any. `bsq` and `msq` search planes of their own. `torchao-parq`
and `brevitas` are the libraries' own code (`rivals.py`).
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from csqcli.errors import UserError, install
from csqcli.system.heap import keep_freed_memory

METHODS: dict[str, dict[str, Any]] = {
    "float": {"quantization.method": "float"},
    "staged": {"quantization.method": "staged"},
    "uniform": {"quantization.method": "staged", "quantization.allocator": "uniform"},
    "staged-importance": {"quantization.method": "staged", "quantization.allocator": "importance"},
    "csq": {"quantization.method": "csq"},
    "ste": {"quantization.method": "ste", "ste.per_channel": True},
    "lsq": {"quantization.method": "lsq", "lsq.per_channel": True},
    "lsq-importance": {
        "quantization.method": "lsq",
        "quantization.allocator": "importance",
        "lsq.per_channel": True,
    },
    "bsq": {"quantization.method": "bsq"},
    "msq": {"quantization.method": "msq"},
    "parq": {"quantization.method": "parq"},
    "parq-importance": {"quantization.method": "parq", "quantization.allocator": "importance"},
    "torchao-parq": {"quantization.method": "rivals:TorchaoPARQ"},
    "brevitas": {"quantization.method": "rivals:Brevitas"},
}
# the rivals of the tables; the others come by name
RIVALS = ("ste", "lsq", "parq", "parq-importance", "torchao-parq", "brevitas")
LIBRARIES = {"torchao-parq": "torchao", "brevitas": "brevitas"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer.name": "momentum", "optimizer.weight_decay": 5e-4},
    "adamw": {"optimizer.name": "adamw", "optimizer.weight_decay": 0.05, "optimizer.warmup_epochs": 0.2},
}
ADAMW_RATES = ("adamw 0.0001", "adamw 0.0003", "adamw 0.001")
_NAME = re.compile(
    r"(?P<method>[a-z-]+)(?: (?P<planes>[\d.]+))?(?: A(?P<act_bits>\d+))?(?P<rates>(?:, [a-z]+ [\d.e-]+)*)"
)


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """The name with its numbers written in one way, and the overrides that it stands for. UserError for what is no row's name."""
    found = _NAME.fullmatch(name)
    if found is None or found["method"] not in METHODS or (found["planes"] is None) != (found["method"] == "float"):
        hint = f"METHOD PLANES[ A BITS][, RATE …], of {', '.join(METHODS)}"
        raise UserError(f"`{name}` names no row", where="--rows", hint=hint)
    method, same = found["method"], found["method"]
    overrides = dict(METHODS[method])
    if found["planes"] is not None:
        planes = _number(found["planes"])
        overrides["quantization.target_bits"] = planes
        if method in RIVALS and planes != int(planes):
            overrides["quantization.allocator"] = "importance"
        same += f" {planes:g}"
    if found["act_bits"] is not None:
        overrides["quantization.act_bits"] = int(found["act_bits"])
        same += f" A{found['act_bits']}"
    for rate in found["rates"].split(", ")[1:]:
        kind, _, text = rate.partition(" ")
        value = _number(text)
        if kind == "latents" and overrides["quantization.method"] == "staged":
            overrides["staged.latent_lr"] = value
        elif kind in OPTIMIZERS:
            overrides |= OPTIMIZERS[kind] | {"optimizer.lr": value}
        else:
            kinds = [*OPTIMIZERS, *(["latents"] if overrides["quantization.method"] == "staged" else [])]
            raise UserError(f"`{name}`: {method} has no rate of `{kind}`", where="--rows", hint=" or ".join(kinds))
        same += f", {kind} {value:g}"
    return same, overrides


def with_rates(names: Sequence[str], rates: Sequence[str]) -> list[str]:
    """Each name at each rate; the names themselves where there are none."""
    return [f"{name}, {rate}" for name in names for rate in rates] if rates else list(names)


def parser(doc: str | None, *, epochs: int, rates: Sequence[str], seed: int = 0) -> argparse.ArgumentParser:
    """Options of the tables on real networks."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True)
    made.add_argument("--work", type=Path, required=True, help="folder of the runs")
    made.add_argument("--seed", type=int, default=seed)
    made.add_argument("--epochs", type=int, default=epochs, help="of every row (default: %(default)s)")
    made.add_argument("--rows", nargs="+", help="rows to run, * among them; all of the table if unset")
    made.add_argument(
        "--rates", nargs="*", default=list(rates), help="of the rivals in the table; none is the recipe's"
    )
    made.add_argument(
        "--own-rates", nargs="*", default=[], help="of csq's rows, e.g. `latents 0.001`; none is the recipe's"
    )
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over every row; repeatable")
    made.add_argument("--list", action="store_true", help="print the names of the rows that would run")
    made.add_argument("--json", type=Path, help="write the table here")
    return made


def at_planes(
    planes: str, rates: Sequence[str], own_rates: Sequence[str], *, width: str = "", rivals: Sequence[str] = RIVALS
) -> list[str]:
    """A table's rows at so many planes, csq's own first; ``width`` is that of activations, as " A4". `uniform` takes whole planes only."""
    own = ("staged", "uniform") if _number(planes).is_integer() else ("staged",)
    names = with_rates([f"{method} {planes}{width}" for method in own], own_rates)
    return names + with_rates([f"{method} {planes}{width}" for method in rivals], rates)


class Rows:
    """The rows that a command line asks for. ``table`` are the names of all; ``fixed`` is what no row changes."""

    def __init__(
        self, given: argparse.Namespace, table: Sequence[str], *, recipe: str, fixed: Mapping[str, Any]
    ) -> None:
        from csqcli.recipe.keys import parse_assignments

        self.given, self.recipe, self.fixed = given, recipe, dict(fixed)
        self.more = parse_assignments(given.set)
        self.rows = dict(parse(name) for name in _asked(given.rows, table))
        self.images: Any = None
        self.lines: list[dict[str, Any]] = []

    def run(self, *, after: Callable[[Path], dict[str, Any]] = lambda folder: {}) -> None:
        """One search per row, printed as they end; ``after`` adds to the line of a finished run's folder."""
        sets = {name: self._set_for(overrides["quantization.method"]) for name, overrides in self.rows.items()}
        unused = set(self.more).difference(*sets.values())
        if unused:
            raise UserError(f"`{min(unused)}` is a setting of none of these rows' methods", where="--set")
        recipes = {
            name: self.recipe_of({"epochs": self.given.epochs} | overrides | sets[name])
            for name, overrides in self.rows.items()
        }
        for name, recipe in recipes.items():
            if self.given.list:
                print(name)
                continue
            self._line(name, self.search(name, recipe), after)
        if self.given.json and not self.given.list:
            self.given.json.write_text(json.dumps(self.lines, indent=2) + "\n")

    def search(self, name: str, recipe: Any) -> tuple[Path, dict[str, Any] | str]:
        """A run's folder and report, or in one line why it diverged. What has ended is read."""
        from csqcli import pipeline
        from csqcli.system.progress import Display
        from csqcli.training.loop import NonFinite
        from csqcli.training.opening import open_images

        folder = self.given.work / f"{name.replace(', ', '-').replace(' ', '_')}-{recipe.seed}"
        diverged = folder.with_name(f"{folder.name}-diverged.json")  # a run that diverged early leaves no folder
        known = json.loads(diverged.read_text()) if diverged.exists() else {}
        if known.get("recipe") == recipe.to_dict():
            return folder, str(known["why"])
        if self.images is None:
            self.images = open_images(recipe)
        try:
            report = pipeline.search(recipe, folder, display=Display(quiet=True), resume=True, images=self.images)
        except NonFinite as error:
            diverged.parent.mkdir(parents=True, exist_ok=True)
            diverged.write_text(json.dumps({"why": error.line(), "recipe": recipe.to_dict()}, indent=2) + "\n")
            return folder, error.line()
        return folder, report

    def recipe_of(self, overrides: Mapping[str, Any]) -> Any:
        """The recipe of a row, without what `--set` lays over every row."""
        from csqcli.recipe.resolve import resolve

        return resolve(self.recipe, self.fixed | {"seed": self.given.seed} | dict(overrides))

    def _set_for(self, method: str) -> dict[str, Any]:
        """What `--set` lays over a row: settings of a method's own only over the rows of that method."""
        from csqcli.quant.catalog import find_card
        from csqcli.recipe.keys import of_every_method

        card, common = find_card(method), of_every_method(self.more)

        def is_own(key: str) -> bool:
            section, _, leaf = key.rpartition(".")
            return section in ("", card.section) and leaf in card.settings.model_fields

        return common | {key: value for key, value in self.more.items() if is_own(key)}

    def _line(
        self, name: str, ended: tuple[Path, dict[str, Any] | str], after: Callable[[Path], dict[str, Any]]
    ) -> None:
        folder, report = ended
        if isinstance(report, str):
            self.lines.append({"row": name, "diverged": report})
            print(f"{name:<32} diverged: {report}", flush=True)
            return
        accuracy, budget, sizes = report["accuracy"], report["budget"], report["sizes"]
        line = {
            "row": name,
            "float_top1": accuracy["float_top1"],
            "hard_top1": accuracy["hard_top1"],
            "mean_bits": budget["mean_bits"],
            "entropy_bits": sizes["entropy_bits_per_weight"],
            "file_bytes": sizes["file_bytes"],
        } | after(folder)
        self.lines.append(line)
        words = " ".join(f"{key} {value:,}" for key, value in line.items() if key.endswith("bytes"))
        planes = "" if budget["mean_bits"] is None else f"planes {budget['mean_bits']:.3f}  "
        entropy = "" if line["entropy_bits"] is None else f"entropy {line['entropy_bits']:.2f}  "
        floats = "" if line["float_top1"] is None else f"float {line['float_top1']:.2f}  "
        print(f"{name:<32} {floats}hard {line['hard_top1']:.2f}  {planes}{entropy}{words}", flush=True)


def command(body: Callable[[], None]) -> None:
    """Run a table with memory kept and bad input in one line with exit code 2, as `csq` does."""
    keep_freed_memory()
    try:
        body()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error.line()}", file=sys.stderr)
        sys.exit(2)


def installed(names: Sequence[str]) -> list[str]:
    """Those rows whose library is installed; what is left out is said."""
    absent = {method for method, library in LIBRARIES.items() if importlib.util.find_spec(library) is None}
    for method in sorted(absent):
        print(f"left out: rows of {method}, which needs {LIBRARIES[method]}: {install('rivals')}", file=sys.stderr)
    return [name for name in names if name.partition(" ")[0].rstrip(",") not in absent]


def _asked(names: Sequence[str] | None, table: Sequence[str]) -> list[str]:
    """What --rows names; without it the table, as far as its libraries are installed."""
    if names is None:
        return installed(table)
    found: list[str] = []
    for name in names:
        matching = fnmatch.filter(table, name) if "*" in name else [name]
        if not matching:
            raise UserError(f"no row of the table is like `{name}`", where="--rows", hint="--list prints them")
        found += matching
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"`{text}` is not a number", where="--rows") from None
