"""``csq finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csqcli.cli.options import (
    LOG_EVERY,
    BatchOption,
    DataOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    LogOption,
    QuietOption,
    ResumeOption,
    RunArgument,
    SetOption,
    TrackOption,
    TrustOption,
    ValSplitOption,
    batch_settings,
    val_split,
    with_settings,
)
from csqcli.cli.output import result_of_run
from csqcli.system.launcher import is_main_process


def finetune(
    file: RunArgument,
    data: DataOption = None,
    val_split_: ValSplitOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs; 5 unless the file's recipe says otherwise.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Float weights that --set distill=F and distill_features=F follow: a checkpoint, or a float run's folder."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder; runs/NAME-finetuned if unset, NAME that of RUN's folder."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and augmentation.")] = None,
    batch_size: BatchOption = None,
    device: DeviceOption = None,
    settings: SetOption = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    trust_code: TrustOption = False,
    log: TrackOption = None,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a quantized model further, its bits fixed.

    Keeps the better of the two models: never a worse one than it was given.

    Example: csq finetune runs/resnet18 --data /imagenet --epochs 5
    """
    from csqcli.api.runs import finetune_recipe
    from csqcli.file.header import read_manifest
    from csqcli.recipe.complete import check_data_given
    from csqcli.recipe.keys import parse_assignments
    from csqcli.recipe.resolve import check_of_finetune
    from csqcli.system.progress import Display
    from csqcli.system.run_files import MODEL_FILE, finetune_folder, model_of

    file = model_of(file)
    manifest = read_manifest(file)
    typed = {
        "data.source": data,
        "data.val_split": val_split(val_split_),
        "finetune.epochs": epochs,
        "finetune.teacher": teacher,
        "seed": seed,
        "device": device,
        "log": log,
        **batch_settings(batch_size),
    }
    assigned = parse_assignments(settings or [])
    check_of_finetune(assigned)
    overrides = with_settings(typed, assigned, finetune__epochs="--epochs")
    resolved = finetune_recipe(file, overrides, trust_code=trust_code)
    check_data_given(resolved)
    target = output or finetune_folder(file)
    display = Display(quiet=quiet or not is_main_process(), log_every=log_every)
    display.say(f"finetune {file}: {manifest.model.source} on {resolved.data.source}, into {target}")

    with display.step("loading PyTorch"):
        from csqcli import finetuning

    report = finetuning.finetune(
        file, resolved, target, display=display, force=force, resume=resume, trust_code=trust_code
    )
    result_of_run(target / MODEL_FILE, report, json_wanted=as_json, display=display)
