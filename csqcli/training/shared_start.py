"""What the runs of a sweep have in common, found once: the float model's accuracy, its adaptation, the importance of planes.

A run of the same seed that is handed a shared start is, byte for byte, the run without one; what others found already is only not
done again. A run of another seed begins with the same float network, so that seeds differ in their searches alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from csqcli.errors import UserError
from csqcli.system import distributed, files
from csqcli.system.limits import read_json
from csqcli.system.run_files import FLOAT_FILE
from csqcli.training.inputs import Inputs, difference
from csqcli.training.run import Run
from csqcli.training.run_state import HISTORY_VALUES, RunRecord

START_FILE = "start.json"
_BYTES = 2**28
_OF_THE_TARGET = ("quantization.", "epochs", "finetune.")  # settings that come after what is shared


class _Content(BaseModel):
    """start.json."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    inputs: Inputs
    record: RunRecord  # after the float phase
    importance: list[list[float]] | None = None  # [layers][planes], where planes are decided before training
    importance_by: str | None = None  # the allocator; None for what `ptq` measures by itself


@dataclass(frozen=True)
class SharedStart:
    """A shared start in its folder."""

    folder: Path
    content: _Content

    @classmethod
    def read(cls, folder: Path) -> SharedStart | None:
        """The start in a folder, on every process; None where there is none yet. UserError for one that cannot be read."""
        path = folder / START_FILE
        if not path.exists():
            return None
        try:
            raw = read_json(files.read_regular(path, limit=_BYTES), nodes=HISTORY_VALUES)
            return cls(folder, _Content.model_validate(raw))
        except (OSError, ValueError, ValidationError) as error:
            what = f"cannot be read ({str(error).splitlines()[0]})"
            raise UserError(what, where=str(path), hint="remove it, and the sweep makes it anew") from None

    @property
    def seed(self) -> int:
        """The seed that it was found by."""
        return int(self.content.inputs.settings["seed"])

    def check_same(self, now: Inputs, *, where: str) -> None:
        """UserError where ``now`` are not the inputs that it was made from, targets and methods aside."""
        what = difference(_without_target(self.content.inputs), _without_target(now))
        if what:
            raise UserError(what, where=where, hint="choose another --output")

    def hand_over(self, run: Run) -> None:
        """Let a run that has not begun know all this, whatever its seed. UserError where it is of another model or other images."""
        now = run.folder.inputs
        now = now.model_copy(update={"settings": {**now.settings, "seed": self.seed}})
        self.check_same(now, where=str(self.folder / START_FILE))
        run.record = self.content.record.model_copy(deep=True)
        if run.record.adaptation is not None and run.shard.is_main:
            with files.replacing(run.folder.float_file) as temporary:
                try:
                    shutil.copyfile(self.folder / FLOAT_FILE, temporary)
                except FileNotFoundError:
                    hint = f"remove {START_FILE} beside it, and the sweep makes both anew"
                    raise UserError("is not there", where=str(self.folder / FLOAT_FILE), hint=hint) from None
        if self.content.importance is not None:
            run.importance = (self.content.importance_by, torch.tensor(self.content.importance, dtype=torch.float64))


def write(run: Run, importance: Tensor | None, *, by: str | None) -> None:
    """Keep what ``run`` knows, after its float phase, as the shared start in its folder."""
    if run.shard.is_main:
        _write(run, importance, by)
    distributed.wait_for_all(run.device)  # before anybody reads it


def _write(run: Run, importance: Tensor | None, by: str | None) -> None:
    content: dict[str, Any] = {
        "inputs": run.folder.inputs.model_dump(mode="json"),
        "record": run.record.model_dump(mode="json"),
        "importance": None if importance is None else importance.double().cpu().tolist(),
        "importance_by": by,
    }
    files.write_text(run.folder.path / START_FILE, json.dumps(content, indent=1) + "\n")


def known_importance(run: Run, *, by: str | None, layers: int, bits: int) -> Tensor | None:
    """Importance [layers, bits] that a shared start holds, where it is what this run would measure; the same on all processes."""
    found = run.importance
    fits = found is not None and found[0] == by and tuple(found[1].shape) == (layers, bits)
    return distributed.from_main(found[1] if fits and found is not None else None)  # type: ignore[no-any-return]


def _without_target(inputs: Inputs) -> Inputs:
    methods = _method_sections()
    kept = {
        key: value
        for key, value in inputs.settings.items()
        if not key.startswith(_OF_THE_TARGET) and key.partition(".")[0] not in methods
    }
    return inputs.model_copy(update={"settings": kept, "source_sha256": ""})


def _method_sections() -> set[str]:
    from csqcli.quant.catalog import CARDS

    return {card.section for card in CARDS.values()}
