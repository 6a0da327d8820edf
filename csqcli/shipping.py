"""The end of a run with a budget in bytes: the file that ships, beside the model, and what is done until it is within its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csqcli.errors import UserError
from csqcli.file.io import QuantizedFile
from csqcli.quant.layers import Layer
from csqcli.system import distributed
from csqcli.system.progress import Display, counted
from csqcli.training import sizing
from csqcli.training.deliver import deliver, publish
from csqcli.training.loop import Trainer
from csqcli.training.post_training import quantize_after_training
from csqcli.training.run import Run

_FITTINGS = 4  # tries at a size in bytes; the second is exact but for what BatchNorm's statistics deflate to


def round_layers(run: Run, layers: list[Layer], left: list[dict[str, Any]]) -> tuple[QuantizedFile, float]:
    """Post-training quantization of the run's model: its file, written and read back, and the largest gap between their logits."""
    return publish(run, quantize_after_training(run, layers), left)


def round_in_bytes(run: Run, layers: list[Layer], left: list[dict[str, Any]]) -> tuple[QuantizedFile, float]:
    """As `round_layers`, within a budget of bytes, and the file that ships beside the model: rounded again, with fewer bytes for the
    integers, while it is over. UserError where it stays over."""
    record, over = run.record, 0
    with run.display.step("measuring what each plane takes on disk"):
        sizing.measure(run, layers, left, shipped_bytes)
    assert run.ships is not None
    others, before = run.ships.others, {name: value.clone() for name, value in run.model.state_dict().items()}
    for _ in range(_FITTINGS):
        run.ships.others = others + record.bytes_over
        file, gap = round_layers(run, layers, left)
        over = _ship_within(run, run.ships.asked)
        if over <= 0:
            return file, gap
        run.display.say(f"{counted(over, 'byte')} over {run.ships.asked:,}: rounding again")
        record.bytes_over += over
        run.model.load_state_dict(before)
    raise _stays_over(run, over)


def deliver_in_bytes(run: Run, trainer: Trainer, left: list[dict[str, Any]]) -> tuple[QuantizedFile, float]:
    """As `deliver`, within a budget of bytes, and the file that ships beside the model. UserError where it stays over it."""
    assert run.ships is not None
    with run.display.step("measuring the file that ships"):
        trainer.optimizer.harden()
        sizing.measure_others(run, trainer.optimizer.hard_layers(), left, shipped_bytes)
    goal, over = run.ships.allowed, 0
    for _ in range(_FITTINGS):
        with run.display.step("fitting the file to its size"):
            coded = sizing.trim(run, trainer, goal)
        file, gap = deliver(run, trainer, left)
        over = _ship_within(run, run.ships.asked)
        if over <= 0:
            return file, gap
        goal = coded - over  # what is beside the integers turned out larger than it was before BatchNorm settled
    raise _stays_over(run, over)


def _ship_within(run: Run, asked: int) -> int:
    """Write the file that ships, beside the model. By how many bytes it is over what was asked for; then it does not stay."""
    form, size = run.recipe.quantization.ship_as, None
    shipped = run.folder.shipped_file(form)
    if run.shard.is_main:
        size = ship(run.folder.model_file, shipped, form, display=run.display)
        if size > asked:
            shipped.unlink()
    return int(distributed.from_main(size)) - asked


def _stays_over(run: Run, over: int) -> UserError:
    """What to raise; no model over its size is left in the folder."""
    assert run.ships is not None
    if run.shard.is_main:
        run.folder.model_file.unlink(missing_ok=True)
    what = f"stays {over:,} bytes over the {run.ships.asked:,} that were asked for"
    return UserError(what, where=str(run.folder.model_file), hint=sizing.more_bytes(run))


def ship(file: Path, output: Path, form: str, *, display: Display) -> int:
    """Write ``file`` as ``output`` in a form of `csq export`, verified. The bytes that it takes at most."""
    from csqcli.exporting.run import export_file

    export_file(file, output, form=form, trust_code=True, force=True, display=display)
    return sizing.most_bytes(output, made_from=file)


def shipped_bytes(file: Path, form: str) -> int:
    """Size of a file in a form of `csq export`, of which nothing stays."""
    output = file.with_name(f".{file.stem}-shipped.safetensors")
    try:
        return ship(file, output, form, display=Display(quiet=True))
    finally:
        output.unlink(missing_ok=True)
