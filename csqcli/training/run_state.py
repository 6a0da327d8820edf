"""What a killed run goes on from: one model, checked field by field where it is read."""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from csqcli.errors import UserError, machine_fault
from csqcli.file.manifest import AccuracyRecord
from csqcli.models.pickles import check_state
from csqcli.system import files
from csqcli.system.limits import check_tree
from csqcli.training.inputs import Inputs
from csqcli.training.latencies import Latencies
from csqcli.training.limits import Ways

MAX_ROLLBACKS = 3
HISTORY_VALUES = 2**22
_DAMAGE = (  # what torch's reader, and the checks after it, raise for bytes that are no state
    *(ValidationError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError),
    *(LookupError, AttributeError, TypeError, AssertionError, ArithmeticError),
)
log = logging.getLogger(__name__)


class AdaptationRecord(BaseModel):
    """What the float phase before a search came to."""

    model_config = ConfigDict(allow_inf_nan=False, strict=True)

    input_top1: float  # percent, of the model as it came
    adapted_top1: float  # percent, after the phase
    kept: Literal["adapted", "input"]  # the better one
    sha256: str  # of the file that holds its weights


class RunRecord(BaseModel):
    """What a run has found out so far. A line here is saved, checked and restored with every state."""

    model_config = ConfigDict(allow_inf_nan=False, strict=True)

    history: list[dict[str, Any]] = Field(default_factory=list)  # the lines of metrics.jsonl
    accuracy: AccuracyRecord = Field(default_factory=AccuracyRecord)
    adaptation: AdaptationRecord | None = None  # once the float phase is over
    rollbacks: int = Field(0, ge=0, le=MAX_ROLLBACKS)  # each halves the learning rates
    input_top1: float | None = None  # percent, of the file that a finetune started from
    input_top1_present: float | None = None  # percent, among the data's classes, where the file's model has more
    latencies: Latencies | None = None  # of a budget in milliseconds, once they are known
    ways: Ways | None = None  # through the network, where layers may lose their last plane
    planes: list[int] | None = None  # of every layer, once an allocator decided them
    mean_act_bits: float | None = None  # of searched widths, over what their budget counts
    bytes_over: int = Field(0, ge=0)  # by which rounding without training came out too large so far
    step_images: int | None = Field(None, ge=1)  # per forward pass; None until it is known that they fit


class RunState(BaseModel):
    """A moment of a run: which phase and batch, everything that trains, and the record."""

    model_config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, strict=True)

    inputs: Inputs
    phase: Literal["float", "search", "finetune"]
    epoch: int = Field(ge=0)
    batch: int = Field(ge=0)
    losses: list[float]  # of the epoch that has begun
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    activations: dict[str, torch.Tensor]
    rng: torch.Tensor
    device_rng: torch.Tensor | None
    record: RunRecord

    @model_validator(mode="after")
    def _measured(self) -> RunState:
        if self.phase != "finetune" and self.record.accuracy.float_top1 is None:
            raise ValueError(f"a {self.phase} phase without the float model's accuracy")
        return self

    def write(self, newest: Path, previous: Path) -> None:
        """Replace ``newest``, sealed with its SHA-256; what it was goes on as ``previous``. UserError where that fails."""
        content = {name: getattr(self, name) for name in type(self).model_fields}
        with files.replacing(newest, previous=previous) as temporary:
            with open(temporary, "wb") as file:
                try:
                    torch.save(
                        content | {name: content[name].model_dump(mode="json") for name in ("inputs", "record")}, file
                    )
                except RuntimeError as error:  # torch's writer hides what the operating system, or Ctrl-C, said
                    hidden = error.__context__
                    raise hidden if isinstance(hidden, (OSError, KeyboardInterrupt)) else error from None
            files.seal(temporary)


def read_state(path: Path) -> RunState | None:
    """A resume state, or None when its bytes are not those that were saved. Never unpickled freely.

    What the machine refuses (memory, the disk) says nothing about the state, and is raised.
    """
    try:
        if not files.is_intact(path):
            return None
        check_state(path)
        state = RunState.model_validate(torch.load(path, map_location="cpu", weights_only=True))
        for found in (state.record.history, state.inputs.model_dump()):
            check_tree(found, nodes=HISTORY_VALUES)
        return state
    except _DAMAGE as error:
        log.debug("%s: %r", path, error)
        return None
    except (OSError, MemoryError, RuntimeError) as error:
        fault = machine_fault(error)
        if fault is not None:
            raise UserError(f"cannot be read ({fault.what})", where=str(path), hint=fault.hint) from error
        log.debug("%s: %r", path, error)  # torch's reader for an archive that is none
        return None
