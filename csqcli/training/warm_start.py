"""A search that begins with the weights that another one ended with, as they were before they were rounded.

The integers of a file say nothing of where a weight stood between two levels, and fewer planes have other levels; what stands
behind them does (docs/sweeps.md has both measured).
"""

from __future__ import annotations

import copy
from pathlib import Path

from csqcli.errors import UserError
from csqcli.file.checkpoint import open_checkpoint
from csqcli.models.checkpoints import Checkpoint, fit_state_dict
from csqcli.quant.methods.base import WeightMethod
from csqcli.system import distributed
from csqcli.system.run_files import LATENT_FILE
from csqcli.training.adapt import write_weights
from csqcli.training.run import Run


def read_warm_start(path: str) -> Checkpoint:
    """The checkpoint: a latents.safetensors, that of a run's folder where it has one, or any file of plain tensors. UserError for
    anything else."""
    latents = Path(path) / LATENT_FILE
    found = open_checkpoint(str(latents) if latents.is_file() else path)
    if "" not in found.groups:
        hint = "name the latents.safetensors of another run, or a state dict"
        raise UserError("is no plain state dict", where=path, hint=hint)
    return found


def check_fits(run: Run, start: Checkpoint) -> None:
    """UserError where the run's network is not the checkpoint's: before a float phase spends time on it."""
    if run.recipe.adaptation.epochs and run.record.adaptation is None:
        fit_state_dict(copy.deepcopy(run.model), dict(start.groups[""]), where=str(run.recipe.model.warm_start))


def begin_with(run: Run, start: Checkpoint) -> None:
    """Put its weights and BatchNorms into the run's model; of a run that is resumed, the saved state follows and wins."""
    fit_state_dict(run.model, dict(start.groups[""]), where=str(run.recipe.model.warm_start))
    run.importance = None  # that of a shared start is the float model's
    run.display.say(f"begins with {run.recipe.model.warm_start!s}")


def keep_latents(run: Run, method: WeightMethod) -> None:
    """Write what a search ended with as a plain checkpoint: unrounded weights, all else as in the model. Nothing where the method
    keeps none."""
    unrounded = method.unrounded() if run.shard.is_main else None
    if unrounded is not None:
        state = dict(run.model.state_dict())
        for layer, value in zip(method.layers, unrounded, strict=True):
            state.update(dict.fromkeys((layer.name, *layer.aliases), value.to(layer.parameter.dtype)))
        write_weights(run.folder.latent_file, state)
    distributed.wait_for_all(run.device)  # before anybody begins with it
