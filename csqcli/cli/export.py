"""``csq export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csqcli.cli import output
from csqcli.cli.options import (
    LOG_EVERY,
    JsonOption,
    LogOption,
    QuietOption,
    RunArgument,
    TrustOption,
    ValLimitOption,
    ValSplitOption,
    WorkersOption,
    val_split,
)
from csqcli.data.specs import WORKERS
from csqcli.errors import UserError
from csqcli.system.choices import Activations, Prefer, Target, WeightType


def export(
    file: RunArgument,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="File to write; beside the model if unset, named by the form."
        ),
    ] = None,
    int8_packed: Annotated[
        bool,
        typer.Option("--int8-packed", help="safetensors, int8 integers; read it with safetensors and NumPy alone."),
    ] = False,
    bit_packed: Annotated[
        bool, typer.Option("--bit-packed", help="safetensors, the smallest that is bit for bit the searched model.")
    ] = False,
    bit_packed_small: Annotated[
        bool,
        typer.Option("--bit-packed-small", help="The smallest: BatchNorms folded, 16-bit numbers beside the integers."),
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX whose packed weights the engine unpacks at load.")] = False,
    litert: Annotated[
        bool, typer.Option("--litert", help="A .tflite for LiteRT: weights of 8, 4 and 2 bits, int8 kernels.")
    ] = False,
    state_dict: Annotated[bool, typer.Option("--state-dict", help="safetensors, plain float state dict.")] = False,
    torchao: Annotated[
        bool, typer.Option("--torchao", help="safetensors that torchao reads: linear layers in int8, the rest float.")
    ] = False,
    form: Annotated[
        str | None, typer.Option(metavar="NAME", help="A form by its name, or package.module:Class of your own.")
    ] = None,
    activations: Annotated[
        Activations, typer.Option(help="ONNX and LiteRT only; int8 needs a model that was searched with --act-bits.")
    ] = "float",
    target: Annotated[
        Target, typer.Option(help="ONNX only: the engine that the file is for; tensorrt writes explicit Q/DQ pairs.")
    ] = "ort",
    weights: Annotated[
        WeightType,
        typer.Option(help="With --target tensorrt: int4 for linear layers whose integers fit, float activations."),
    ] = "int8",
    calib: Annotated[
        str | None,
        typer.Option(
            help="With --activations int8: images to find the range of layers' outputs on, which ort and LiteRT need."
        ),
    ] = None,
    prefer: Annotated[
        Prefer, typer.Option(help="LiteRT only: the faster kernels or the smaller file, where these differ.")
    ] = "speed",
    data: Annotated[
        str | None, typer.Option("--data", help="Verify on real images and record top-1 (as in csq evaluate).")
    ] = None,
    val_split_: ValSplitOption = None,
    val_limit: ValLimitOption = None,
    workers: WorkersOption = WORKERS,
    trust_code: TrustOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model in a form that is small or runs elsewhere.

    What was written is read back and compared with the searched model before it gets its name.

    Example: csq export runs/resnet18 --bit-packed
    """
    from csqcli.exporting import registry
    from csqcli.file.header import read_manifest
    from csqcli.system.run_files import model_of

    flags = {
        "int8-packed": int8_packed,
        "bit-packed": bit_packed,
        "bit-packed-small": bit_packed_small,
        "onnx": onnx,
        "litert": litert,
        "state-dict": state_dict,
        "torchao": torchao,
    }
    chosen = [name for name, wanted in flags.items() if wanted] + ([form] if form is not None else [])
    if len(chosen) != 1:
        names = ", ".join(f"--{name}" for name in flags)
        raise UserError(
            f"{len(chosen)} forms chosen", where="csq export", hint=f"pass exactly one of {names}, --form NAME"
        )
    registry.check_name(chosen[0], where="--form")
    options = {
        "activations": activations,
        "target": target,
        "weights": weights,
        "calib": calib,
        "prefer": prefer,
    }
    registry.check_options(chosen[0], options, where=f"csq export --{chosen[0]}")
    file = model_of(file)
    read_manifest(file)  # what is wrong with the file is said before torch is imported

    from csqcli import api
    from csqcli.file.manifest import from_json_object
    from csqcli.reporting.terminal import export_lines
    from csqcli.system.progress import Display

    display = Display(quiet=quiet, log_every=log_every, names_steps=False)
    with display.step("loading PyTorch"):
        from csqcli.exporting.run import output_path

    target_file = output_file or output_path(file, chosen[0])
    report = api.export(
        file,
        target_file,
        form=chosen[0],
        activations=activations,
        target=target,
        weights=weights,
        calib=calib,
        prefer=prefer,
        data=data,
        val_split=val_split(val_split_),
        val_limit=val_limit,
        workers=workers,
        trust_code=trust_code,
        force=force,
        progress=display,
    )
    if as_json:
        output.as_json(report)
        return
    output.lines(export_lines(from_json_object(report)), indent=13)
    output.line(f"wrote {target_file}")
