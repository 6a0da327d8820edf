"""A sweep's folder: whose it is, and what its runs are, so that other processes and machines can run them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from csqcli.errors import UserError
from csqcli.recipe.resolve import validate
from csqcli.recipe.schema import Recipe
from csqcli.sweeping.plan import Member, Sweep
from csqcli.system import files
from csqcli.system.limits import read_json
from csqcli.system.lock import locked
from csqcli.system.run_files import MODEL_FILE, RECIPE_FILE, REPORT_FILE, RESUME_FILE
from csqcli.system.settings import RESULT_NEUTRAL, flat, without

SWEEP_FILE = "sweep.json"
_FILES_OF_A_RUN = (MODEL_FILE, REPORT_FILE, RECIPE_FILE, RESUME_FILE)
_BYTES, _VALUES = 2**26, 2**20
_SHOWN = 3  # settings that a message names


@contextlib.contextmanager
def opened(sweep: Sweep) -> Iterator[None]:
    """Hold the sweep's folder, made if it is not there. UserError where it is another sweep's, or a run's."""
    path = sweep.folder
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "is a file" if path.is_file() else f"cannot be created ({error.strerror})"
        raise UserError(what, where=str(path), hint="choose another --output") from None
    try:
        with locked(path):
            _check_own(sweep)
            yield
    except BaseException:
        if path in made and {file.name for file in path.iterdir()} <= {SWEEP_FILE}:  # nothing was run
            (path / SWEEP_FILE).unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        raise


def _check_own(sweep: Sweep) -> None:
    path = sweep.folder
    for name in _FILES_OF_A_RUN:
        if (path / name).exists():
            raise UserError("holds a run, not a sweep", where=str(path), hint="choose another --output")
    if not (path / SWEEP_FILE).exists():
        return
    then, now = _read(path).get("settings"), _settings(sweep.base)
    if not isinstance(then, dict):
        raise _unreadable(path, "no settings in it")
    keys = [key for key in dict.fromkeys((*then, *now)) if then.get(key) != now.get(key)]
    if keys:
        shown = [f"{key} {then.get(key)} there, {now.get(key)} here" for key in keys[:_SHOWN]]
        more = [f"{len(keys) - _SHOWN} more"] if keys[_SHOWN:] else []
        what = f"holds a sweep with other settings ({'; '.join(shown + more)})"
        raise UserError(what, where=str(path), hint="choose another --output")


def write_plan(sweep: Sweep, members: Sequence[Member]) -> None:
    """Add runs to sweep.json."""
    path = sweep.folder / SWEEP_FILE
    known = _read(sweep.folder).get("runs", {}) if path.exists() else {}
    runs = known | {member.key: _described(member) for member in members}
    content = {"settings": _settings(sweep.base), "base": sweep.base.to_dict(), "runs": runs}
    files.write_text(path, json.dumps(content, indent=2) + "\n")


def read_base(folder: Path) -> Recipe:
    """The sweep's recipe, without a target. UserError where there is none."""
    return validate(_read(folder).get("base", {}), where=str(folder / SWEEP_FILE))


def read_member(folder: Path, key: str) -> Member:
    """A run of sweep.json. UserError where there is none of that name."""
    content = _read(folder)
    try:
        run = content["runs"][key]
        recipe = validate(run["recipe"], where=f"{SWEEP_FILE}: {key}")
        method, target = str(run["method"]), float(run["target_bits"])
        return Member(key, method, target, recipe, run["begins_with"], is_first=bool(run["is_first"]))
    except (LookupError, TypeError, ValueError):
        raise UserError(f"has no run `{key}`", where=str(folder / SWEEP_FILE)) from None


def _described(member: Member) -> dict[str, Any]:
    return {
        "method": member.method,
        "target_bits": member.target,
        "begins_with": member.begins_with,
        "is_first": member.is_first,
        "recipe": member.recipe.to_dict(),
    }


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read_json(files.read_regular(folder / SWEEP_FILE, limit=_BYTES), nodes=_VALUES)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, str(error)) from None


def _unreadable(folder: Path, why: str) -> UserError:
    return UserError(f"cannot be read ({why})", where=str(folder / SWEEP_FILE), hint="choose another --output")


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted keys of what changes a result, as JSON has them."""
    return flat(without(recipe.to_dict(), Recipe.keys_marked(RESULT_NEUTRAL)))
