"""A budget in bytes: what planes take on disk before, during and after the training of one run.

How many bytes integers take is known for certain only once they are trained, so the loop is closed in three places. Before the
search the weights' own integers are coded at every number of planes: that table is what planes cost. At `_REFIT_AT` of the
steps the latents are coded again, and an exact knapsack may give or take one plane of each layer; what follows trains the
new planes. At the end weights just above an edge between two levels fall below it, as few as bring the file within its size; where
that is not enough, some layers lose a plane.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from csqcli.errors import UserError
from csqcli.file import codes, io
from csqcli.quant.budget import BYTES, Budget, PlaneLimits, allocate
from csqcli.quant.hard_layer import HardLayer, top_planes
from csqcli.quant.layers import Layer
from csqcli.quant.methods.staged import Staged
from csqcli.quant.passes.rounding import mse_step, quantize
from csqcli.system import distributed
from csqcli.system.progress import counted
from csqcli.training.deliver import assembled
from csqcli.training.limits import limits_of
from csqcli.training.loop import Trainer
from csqcli.training.run import Run, ShippedSize

_REFIT_AT = 0.75  # of the steps; most of the drift is over, and a fourth of the schedule trains what changed
_AIM = 1.004  # of the bytes allowed, when planes are fitted: the end only ever makes the file smaller
_SPARE = 96  # bytes: numbers in the certificate and in the manifest that are known only once the file is evaluated
_BISECTIONS = 12
_SURELY_LEFT = 0.5  # of the integers' bytes, after training in float
_MOST_SHRUNK = 0.1  # of a level's width
_LONG_SECONDS = 0.012345678901234567  # written with as many digits as any measured time
_OTHERS = 16  # bytes: other seconds, and what pads a header to 8

Shipped = Callable[[Path, str], int]  # a model file and a form → bytes of the file that would ship


def most_bytes(shipped: Path, *, made_from: Path) -> int:
    """Bytes that a bit-packed file takes at most, which do not depend on the moment that it was written at: a certificate states how
    long loading took, and the same run must fit to the same size again."""
    written = io.read(shipped)
    parity = written.manifest.parity
    assert parity is not None
    parity.load_seconds, parity.file_bytes = _LONG_SECONDS, 0
    # as in what was written; reading put its own size there
    written.manifest.sizes.file_bytes = made_from.stat().st_size
    twin = shipped.with_name(f".{shipped.name}.twin")
    try:
        return io.write(twin, written, form="bit-packed", parity=parity) + _OTHERS
    finally:
        twin.unlink(missing_ok=True)


@torch.no_grad()
def measure(run: Run, layers: Sequence[Layer], left_float: list[dict[str, Any]], shipped: Shipped) -> None:
    """Set ``run.ships`` from the weights as they are. UserError where the size is below what the file holds beside integers."""
    most, rows, middle = run.recipe.quantization.max_bits, [], []
    for layer in layers:
        row = [0]
        for planes in range(1, most + 1):
            hard = _rounded(run, layer, planes)
            row.append(_bytes_of(layer, hard))
            if planes == min(2, most):
                middle.append(hard)
        rows.append(list(itertools.accumulate(row, max)))  # a coder may win a byte back; a budget may not
    _set_ships(run, rows, middle, left_float, shipped)


@torch.no_grad()
def check_reachable(run: Run, layers: Sequence[Layer], left_float: list[dict[str, Any]], shipped: Shipped) -> None:
    """UserError for a size below that of the smallest file, its layers at their fewest planes: before anything is trained.

    Only what a float phase may still change, which is the integers, is given the benefit of the doubt.
    """
    limits = limits_of(run.recipe, layers, run.ways)
    fewest = [_rounded(run, layer, max(planes, 1)) for layer, planes in zip(layers, limits.min_planes, strict=True)]
    codes_of = [_bytes_of(layer, hard) for layer, hard in zip(layers, fewest, strict=True)]
    rows = [[size if k else 0 for k in range(run.recipe.quantization.max_bits + 1)] for size in codes_of]
    _set_ships(run, rows, fewest, left_float, shipped)
    assert run.ships is not None
    coded = sum(size for size, planes in zip(codes_of, limits.min_planes, strict=True) if planes)
    sure = _SURELY_LEFT if run.recipe.adaptation.epochs else 1
    if sure * coded > run.ships.allowed:
        what = f"a target of {run.ships.asked:,} bytes cannot be met: at the fewest planes it takes about"
        hint = f"{more_bytes(run)} or relax layers.keep / layers.min_bits / layers.floor"
        raise UserError(f"{what} {run.ships.others + coded:,}", hint=hint)
    run.ships = None  # measured on the weights that the search begins with


def more_bytes(run: Run) -> str:
    """What to do about a target that leaves too few bytes: it may have been a compression, of which less is more bytes."""
    return "raise the target" if run.recipe.quantization.target_size is not None else "ask for less compression"


def _rounded(run: Run, layer: Layer, planes: int) -> HardLayer:
    """A layer rounded to the nearest levels at so many planes, as the method has its scales."""
    per_channel = run.recipe.method_settings.model_dump().get("per_channel", True)
    value = layer.by_channel(layer.flat(layer.parameter.detach())).float()
    by_channel = per_channel and layer.allows_channel_scales  # as the method has it
    scale = mse_step(value, planes, channel_dim=1 if by_channel else None)
    integers = layer.unflatten(quantize(value, scale.view(-1, 1), planes).to(torch.int32).flatten()).cpu()
    mask = top_planes(planes, run.recipe.quantization.max_bits)
    return HardLayer(layer.name, integers, scale.cpu(), mask, layer.channel_dim, layer.aliases)


def _bytes_of(layer: Layer, hard: HardLayer) -> int:
    """Bytes of a layer's codes, in the order in which its weights lie in memory."""
    return len(codes.encode(layer.flat(hard.integers).numpy()).data)


def _set_ships(
    run: Run, rows: list[list[int]], hard: Sequence[HardLayer], left_float: list[dict[str, Any]], shipped: Shipped
) -> None:
    settings = run.recipe.quantization
    asked = settings.target_size
    if asked is None:
        twice = {alias for layer in hard for alias in layer.aliases}  # a shared weight counts once
        floats = 4 * sum(value.numel() for name, value in run.model.state_dict().items() if name not in twice)
        assert settings.target_compression is not None
        asked = int(floats / settings.target_compression)
    run.ships = ShippedSize(asked, 0, distributed.from_main(rows))
    measure_others(run, hard, left_float, shipped)
    if run.ships.allowed <= 0:
        what = f"a target of {asked:,} bytes cannot be met: all but the integers takes {run.ships.others:,}"
        raise UserError(what, hint=more_bytes(run))


def measure_others(run: Run, hard: Sequence[HardLayer], left_float: list[dict[str, Any]], shipped: Shipped) -> None:
    """Set the bytes beside the integers: of a file of ``hard`` in the form that ships, less its codes."""
    assert run.ships is not None
    others = None
    if run.shard.is_main:
        candidate = run.folder.path / ".sizing.safetensors"
        try:
            file = assembled(run, hard, left_float)
            io.write(candidate, file)
            coded = sum(len(encoded.data) for encoded in file.encoded())
            others = shipped(candidate, run.recipe.quantization.ship_as) - coded + _SPARE
        finally:
            candidate.unlink(missing_ok=True)
    run.ships.others = distributed.from_main(others)


def refit(run: Run, trainer: Trainer) -> None:
    """After the step at which planes are fitted anew: give or take one plane of each layer, by an exact knapsack on bytes."""
    method, step = trainer.optimizer.method, trainer.optimizer.step_count
    assert run.ships is not None
    if step == round(_REFIT_AT * method.schedule.total_steps) and isinstance(method, Staged) and method.search is None:
        _change(run, method, step, allowed=int(_AIM * run.ships.allowed), more=1)


def _change(run: Run, method: Staged, step: int, *, allowed: int, more: int) -> bool:
    """Take a plane from each layer, or give it ``more``, where that is best within so many bytes; whether any has changed."""
    planes = [int(mask.sum()) for mask in method.masks]
    chosen = distributed.from_main(_fitted(method, planes, allowed, more) if run.shard.is_main else None)
    if chosen != planes:
        method.change_planes(chosen, step)
        changed = sum(a != b for a, b in zip(planes, chosen, strict=True))
        run.display.say(f"planes of {counted(changed, 'layer')} changed for the size: bits {method.mean_bits():.2f}")
    return chosen != planes


def _fitted(method: Staged, planes: Sequence[int], allowed: int, more: int) -> list[int]:
    limits, bits = method.budget.limits, method.bits
    few = [max(low, k - 1) for low, k in zip(limits.min_planes, planes, strict=True)]
    staying = [group for group in limits.together if any(few[layer] for layer in group)]  # as one member has to
    for layer in itertools.chain(*staying):
        few[layer] = max(few[layer], 1)
    most = tuple(min(high, k + more) for high, k in zip(limits.max_planes, planes, strict=True))
    table = []
    for index, (low, high) in enumerate(zip(few, most, strict=True)):
        row = [0] * (bits + 1)
        for k in range(low, high + 1):
            row[k] = _coded(method, index, k)
        table.append(tuple(itertools.accumulate(row, max)))
    least = sum(row[k] for row, k in zip(table, few, strict=True))
    weights = method.budget.weights
    others = tuple(ceiling for ceiling in method.budget.ceilings if ceiling.unit != BYTES)
    together = tuple(group for group in limits.together if group not in staying)
    limits = PlaneLimits(tuple(few), most, limits.needed, together)
    budget = Budget(method.budget.target, weights, limits, tuple(table), max(allowed, least), BYTES, also=others)
    return allocate(method.savings_now(), budget)


def _coded(method: Staged, index: int, planes: int) -> int:
    """Bytes of a layer's codes at so many planes."""
    return len(codes.encode(method.integers_at(index, planes).cpu().numpy()).data) if planes else 0


@torch.no_grad()
def trim(run: Run, trainer: Trainer, goal: int) -> int:
    """Bring the codes of hard weights to at most ``goal`` bytes, and return how many they are: shrunk by as little as that
    takes, or, where many planes make shrinking useless, with fewer planes in some layers. UserError where neither is enough.
    """
    method, step = trainer.optimizer.method, trainer.optimizer.step_count
    assert run.ships is not None
    assert isinstance(method, Staged)
    latents = [latent.clone() for latent in method.latents]

    def coded(share: float) -> int:
        method.shrink(latents, share, step)
        return sum(_coded(method, index, int(mask.sum())) for index, mask in enumerate(method.masks))

    found = coded(0.0)
    if found <= goal:
        return found
    low, high = 0.0, _MOST_SHRUNK
    if coded(high) > goal:
        method.shrink(latents, 0.0, step)
        changing = True
        while found > goal and changing:
            changing = _change(run, method, step, allowed=goal, more=0)
            found = sum(_coded(method, index, int(mask.sum())) for index, mask in enumerate(method.masks))
        if found > goal:
            what = f"a target of {run.ships.asked:,} bytes cannot be met with the planes that were trained"
            raise UserError(what, hint=more_bytes(run))
        return found
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if coded(middle) <= goal else (middle, high)
    found = coded(high)
    run.display.say(f"weights within {high:.3f} of a level above an edge fell below it")
    return found
