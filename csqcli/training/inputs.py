"""What a run was started from, so that one that is resumed goes on with the same, and says by name what is not."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from csqcli.data.specs import same_place
from csqcli.data.splits import DataSet, Images
from csqcli.errors import UserError
from csqcli.recipe.schema import Recipe
from csqcli.system import distributed
from csqcli.system.distributed import Shard
from csqcli.system.settings import HASHED_ELSEWHERE, RESULT_NEUTRAL, flat, without

log = logging.getLogger(__name__)

_SHOWN = 3  # settings that a message names


class Split(BaseModel):
    """The images of a split: how many, and the hash of their names, sizes, labels and order."""

    model_config = ConfigDict(strict=True, frozen=True)

    images: int
    sha256: str


class Inputs(BaseModel):
    """Everything that a run's result is a function of, and three things on which its last bits depend."""

    model_config = ConfigDict(strict=True)

    settings: dict[str, Any]  # by dotted key; those that change the result
    source_sha256: str = ""  # of the integers of the file that a finetune starts from
    train: Split
    val: Split
    classes: list[str]
    processes: int
    checkpoint_sha256: str | None = None
    weights_sha256: str = ""  # of the model before its first step, which a teacher is a copy of; "" of fresh ones
    # of the float model that a finetune of a file follows; "" of a teacher that a search has at hand
    teacher_sha256: str = ""
    threads: int = 0
    torch: str = torch.__version__
    device: str = ""


def inputs_of(
    recipe: Recipe, images: DataSet, shard: Shard, *, source_sha256: str = "", teacher_sha256: str = ""
) -> Inputs:
    """All that is known before the model is built."""
    assert images.train is not None
    return Inputs(
        settings=_settings(recipe),
        source_sha256=source_sha256,
        teacher_sha256=teacher_sha256,
        train=_split(images.train),
        val=_split(images.val),
        classes=images.classes,
        processes=shard.world,
    )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the tensors of a model."""
    return distributed.fingerprint(model.state_dict())


def difference(then: Inputs, now: Inputs) -> str:
    """What is not the same, in words; empty where the run may go on. What is not known yet is passed over."""
    settings = dict.fromkeys((*then.settings, *now.settings))
    keys = [
        key for key in settings if then.settings.get(key) != now.settings.get(key)
    ]  # one unset may be of a later csq
    if keys:
        shown = [f"{key} {_show(then, key)} then, {_show(now, key)} now" for key in keys[:_SHOWN]]
        more = [f"{len(keys) - _SHOWN} more"] if keys[_SHOWN:] else []
        return f"was started with other settings ({'; '.join(shown + more)})"
    if then.source_sha256 != now.source_sha256:
        return "was started from another file"
    if then.classes != now.classes:
        return f"was started on other classes ({len(then.classes)} then, {len(now.classes)} now)"
    for kind, before, after in (("training", then.train, now.train), ("validation", then.val, now.val)):
        if before.images != after.images:
            return f"was started on {before.images} {kind} images, now there are {after.images}"
        if before != after:
            return f"was started on other {kind} images (their names, sizes or order differ)"
    if then.processes != now.processes:
        return f"was started with {then.processes} processes, now there are {now.processes}"
    if then.teacher_sha256 != now.teacher_sha256:
        return "was started with another teacher"
    if now.weights_sha256 and then.weights_sha256 != now.weights_sha256:
        checkpoint = then.checkpoint_sha256 != now.checkpoint_sha256
        return f"was started from {'another checkpoint' if checkpoint else 'other weights'}"
    return ""


def warn_of_last_bits(then: Inputs, now: Inputs) -> None:
    """One line for what may change the last bits of the result and nothing else."""
    pairs = {name: (getattr(then, name), getattr(now, name)) for name in ("threads", "torch", "device")}
    changed = [f"{name} {before} then, {after} now" for name, (before, after) in pairs.items() if before != after]
    if changed:
        log.warning("%s: the result may differ in its last bits from that of an unbroken run", "; ".join(changed))


def check_same(then: Inputs, now: Inputs, *, where: str) -> None:
    """UserError, naming it, where the run was started from something else."""
    what = difference(then, now)
    if what:
        hint = "resume with what it was started with, or pass --force to start over"
        raise UserError(what, where=where, hint=hint)


def _settings(recipe: Recipe) -> dict[str, Any]:
    left = without(recipe.to_dict(), Recipe.keys_marked(RESULT_NEUTRAL))
    settings = flat(without(left, Recipe.keys_marked(HASHED_ELSEWHERE)))  # their hashes are fields of Inputs
    if recipe.data.source is not None:
        settings["data.source"] = same_place(recipe.data.source)
    if recipe.data.calib is not None:
        settings["data.calib"] = same_place(recipe.data.calib)
    if recipe.model.checkpoint is not None and os.path.exists(recipe.model.checkpoint):
        settings["model.checkpoint"] = os.path.realpath(recipe.model.checkpoint)
    return settings


def _split(images: Images) -> Split:
    return Split(images=len(images), sha256=images.listing())


def _show(inputs: Inputs, key: str) -> str:
    value = inputs.settings.get(key)
    return "unset" if value is None else str(value)[:60]
