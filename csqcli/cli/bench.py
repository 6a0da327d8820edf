"""``csq bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from csqcli.cli import output
from csqcli.cli.options import LOG_EVERY, JsonOption, LogOption, QuietOption, TrustOption
from csqcli.system.choices import EngineName


def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="FILE|MODEL",
            help="A run's folder, a file that csq wrote (.onnx and .tflite too), or a model as for search.",
        ),
    ],
    engine: Annotated[
        EngineName | None,
        typer.Option(help="Engine to measure in: the first that is installed of ort, openvino, litert, torch."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of the engine.")] = 1,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images at a time.")] = 1,
    repeats: Annotated[
        int, typer.Option(min=1, max=10_000, help="Times that each form is measured; medians are shown.")
    ] = 15,
    input_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Of a model: side of the images in pixels; its own if unset.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Of a model: classes of the head; the library's own if unset.")
    ] = None,
    trust_code: TrustOption = False,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure latency on this machine, whole and by layer.

    In an inference engine, in fp32 and in the forms that csq exports, all interleaved.

    Example: csq bench resnet18 --engine ort
    """
    from csqcli import api
    from csqcli.system.progress import Display

    found = api.bench(
        what,
        engine=engine,
        threads=threads,
        batch=batch,
        repeats=repeats,
        input_size=input_size,
        num_classes=num_classes,
        trust_code=trust_code,
        progress=Display(quiet=quiet, log_every=log_every),
    )
    if as_json:
        output.as_json(found)
        return
    from csqcli.reporting.analyses import print_bench

    print_bench(found, output.console())
