"""What stands in a run's folder: names, and the model of one, for those who look into it without PyTorch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from csqcli.errors import UserError
from csqcli.system.lock import LOCK_FILE

MODEL_FILE = "model.safetensors"
FLOAT_FILE = "float.safetensors"
LATENT_FILE = "latents.safetensors"
REPORT_FILE = "report.json"
LATENCY_FILE = "latencies.json"
METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
RESUME_FILE = "resume.pt"
PREVIOUS_FILE = "resume.previous.pt"

_RUNS = Path("runs")
_OF_A_RUN = (METRICS_FILE, RESUME_FILE, PREVIOUS_FILE, LOCK_FILE)  # what there is of a run before it has a model


def as_file_name(text: str) -> str:
    """Text as the name of a file or folder, which begins with no dot or dash."""
    return re.sub(r"[^\w.+-]", "-", text).lstrip(".-") or "model"


def default_folder(name: str, what: str) -> Path:
    """Where a run goes that is told no output: ``runs/NAME-WHAT`` in the current folder."""
    return _RUNS / f"{as_file_name(name)}-{what}"


def finetune_folder(file: Path) -> Path:
    """Where ``finetune`` writes when it is told nothing: ``runs/NAME-finetuned``, NAME that of the file's folder."""
    folder = file.absolute().parent
    return default_folder(file.stem if folder == Path.cwd() else folder.name, "finetuned")


def model_of(run: str | Path) -> Path:
    """The model's file where a run's folder is named, and ``run`` itself where a file is. UserError for a folder without one, and
    for another file of a run."""
    folder = Path(run)
    if folder.name in (REPORT_FILE, METRICS_FILE, RECIPE_FILE) and folder.is_file():
        raise UserError("is not the model", where=str(folder), hint=f"give the run's folder, {folder.parent}")
    if not folder.is_dir() or (folder / MODEL_FILE).is_file():
        return folder / MODEL_FILE if folder.is_dir() else folder
    if any((folder / name).is_file() for name in _OF_A_RUN):
        hint = "to go on, repeat the command that began it with --resume"
        if (folder / RECIPE_FILE).is_file():
            recipe, output = (shlex.quote(str(path)) for path in (folder / RECIPE_FILE, folder))
            hint += f"; of a search that is `csq search --recipe {recipe} --output {output} --resume`"
        raise UserError("holds an unfinished run", where=str(folder), hint=hint)
    inside = sorted(file.parent for file in folder.glob(f"*/{MODEL_FILE}"))  # a sweep's, or what several runs went into
    hint = f"name a run in it, as {inside[0]}" if inside else "give a run's folder, or a file"
    pages = [str(page) for suffix in ("html", "md") for page in sorted(folder.glob(f"*.{suffix}"))] if inside else []
    hint += f"; about all of them see {' and '.join(pages)}" if pages else ""
    raise UserError(f"holds no {MODEL_FILE}", where=str(folder), hint=hint)
