"""The float phase before a search: a pretrained model learns the data, and the better of before and after goes on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from csqcli.data.loaders import stream_seed
from csqcli.errors import UserError
from csqcli.system import distributed, files
from csqcli.training import phase
from csqcli.training.run import Run
from csqcli.training.run_state import AdaptationRecord
from csqcli.training.setup import shortened

_RATE = 0.2  # of the search's peak learning rate, where the recipe says nothing


def adapt(run: Run) -> None:
    """Train the run's model in float for ``recipe.adaptation.epochs``, and leave it with the weights that are better.

    Those weights stay in the run's folder: they are what a resumed search starts from and its teacher is made of. UserError
    where a resumed run does not find them as they were.
    """
    if run.record.adaptation is None:
        run.record.adaptation = _train(run)
    done = run.record.adaptation
    state = _read(run.folder.float_file, done.sha256) if run.shard.is_main else None
    run.model.load_state_dict(distributed.from_main(state))
    verb = "adapted" if done.kept == "adapted" else "training in float made it worse: kept the model as it came,"
    better = max(done.input_top1, done.adapted_top1)
    run.display.say(f"{verb} float top-1 {better:.2f} % (as it came {done.input_top1:.2f} %)")
    # what follows draws the same dropout, whether this process trained in float or was handed the result
    torch.manual_seed(stream_seed(run.recipe.seed, run.recipe.adaptation.epochs))


def _train(run: Run) -> AdaptationRecord:
    recipe = run.recipe.model_copy(deep=True)
    recipe.epochs = recipe.adaptation.epochs
    recipe.optimizer = shortened(recipe.optimizer, recipe.epochs)
    recipe.optimizer.lr = recipe.adaptation.lr or _RATE * recipe.optimizer.peak_lr
    before = {name: value.detach().cpu().clone() for name, value in run.model.state_dict().items()}
    given = run.record.accuracy.model_copy()
    phase.train(run, "float", recipe, [])
    distributed.copy_from_main(run.model.buffers())
    run.measure_float()
    reached = run.record.accuracy.float_top1 or 0.0
    as_it_came = given.float_top1 or 0.0
    kept = reached >= as_it_came
    if not kept:
        run.record.accuracy = given
    run.record.step_images = None  # a search needs other memory
    weights = run.model.state_dict() if kept else before
    digest = distributed.from_main(write_weights(run.folder.float_file, weights) if run.shard.is_main else "")
    return AdaptationRecord(
        input_top1=as_it_came, adapted_top1=reached, kept="adapted" if kept else "input", sha256=digest
    )


def write_weights(path: Path, weights: dict[str, Tensor]) -> str:
    """Write a state dict, each tensor on its own; its SHA-256."""
    with files.replacing(path) as temporary:
        save_file({name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}, temporary)
    return files.sha256(path)


def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        if files.sha256(path) != sha256:
            raise ValueError("other bytes than were written")
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        hint = "put it back, or pass --force to start over"
        raise UserError(f"the float model of this run cannot be read ({error})", where=str(path), hint=hint) from None
