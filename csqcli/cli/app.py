"""The commands, a few lines each. Heavy imports live inside them: ``csq --help`` loads no torch."""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from csqcli import __version__
from csqcli.data.specs import help_text
from csqcli.errors import UserError, machine_fault
from csqcli.system.interrupt import Interrupted

app = typer.Typer(
    name="csq",
    help="Quantize pretrained vision checkpoints to the mean bits you type, by bi-level continuous sparsification.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="List, show and describe recipes.", rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")

_INTERRUPTED = 130  # what a shell reports for SIGINT
_RESUME_HINT = "csq: interrupted; the same command with --resume goes on from the last saved state"


class Device(str, Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="timm or torchvision name, timm:NAME, torchvision:NAME, or package.module:factory."
    ),
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A model.safetensors that csq wrote.")]
DataOption = Annotated[str | None, typer.Option("--data", help=f"Images: {help_text()}")]
DeviceOption = Annotated[Device | None, typer.Option("--device", help="auto takes a GPU when there is one.")]
BatchOption = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        help="Images per step; auto keeps the recipe's and takes it in parts that fit.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, e.g. optimizer.lr=0.05. Repeatable."),
]
TrustOption = Annotated[bool, typer.Option("--trust-code", help="Let the file import the factory that it names.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"csq {__version__}")
        raise typer.Exit


@app.command()
def search(
    model: ModelArgument = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Mean planes per weight not to exceed; fractions are fine.")
    ] = None,
    data: DataOption = None,
    checkpoint: Annotated[str | None, typer.Option(help="Weights: .safetensors, .pth, .pt, .th or .tar.")] = None,
    recipe: Annotated[str, typer.Option(help="Shipped recipe name, or a YAML file.")] = "short",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model.safetensors and its report.")] = Path(
        "."
    ),
    method: Annotated[
        str | None, typer.Option(help="auto, a name that `csq methods` lists, or package.module:Class.")
    ] = None,
    allocator: Annotated[
        str | None,
        typer.Option(help="Who decides the planes before training: uniform, importance or package.module:function."),
    ] = None,
    cost: Annotated[
        str | None, typer.Option(help="What planes cost: weights, bops or package.module:function.")
    ] = None,
    act_bits: Annotated[int | None, typer.Option(help="Bits of layer inputs: 32 (float), 8, 4, 3 or 2.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Further epochs with the planes fixed.")] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that follows the float model, 0 to 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order, augmentation and fresh weights.")] = None,
    batch_size: BatchOption = None,
    device: DeviceOption = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Train through torch.compile.")
    ] = None,
    pretrained: Annotated[
        bool | None, typer.Option("--pretrained/--no-pretrained", help="Library weights when no checkpoint is given.")
    ] = None,
    settings: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a finished or unfinished run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Search a mixed-precision model within a budget and write it."""
    from csqcli.recipe.resolve import parse_assignments, resolve

    overrides = parse_assignments(settings or [])
    typed = {
        "model.source": model,
        "quantization.target_bits": target_bits,
        "data.source": data,
        "model.checkpoint": checkpoint,
        "quantization.method": method,
        "quantization.allocator": allocator,
        "quantization.cost": cost,
        "quantization.act_bits": act_bits,
        "epochs": epochs,
        "finetune.epochs": finetune_epochs,
        "optimizer.distill": distill,
        "seed": seed,
        "device": device.value if device else None,
        "model.pretrained": pretrained,
        "compile": compile_,
        **_batch_settings(batch_size),
    }
    resolved = resolve(recipe, overrides | {key: value for key, value in typed.items() if value is not None})

    from csqcli import pipeline
    from csqcli.system.progress import Display
    from csqcli.training.run_folder import MODEL_FILE

    pipeline.search(
        resolved, output, display=Display(quiet=quiet or not _is_main_process()), force=force, resume=resume
    )
    _print_result(output / MODEL_FILE)


@app.command()
def finetune(
    file: FileArgument,
    data: DataOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs; 5 unless the file's recipe says otherwise.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; FILE's folder + -finetuned if unset.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and augmentation.")] = None,
    batch_size: BatchOption = None,
    device: DeviceOption = None,
    settings: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a finished or unfinished run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    trust_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a quantized file's integers on, planes fixed; keeps the better of the two models."""
    from csqcli.file import header
    from csqcli.recipe.resolve import parse_assignments, resolve_stored

    manifest = header.read_manifest(file)
    typed = {
        "data.source": data,
        "finetune.epochs": epochs,
        "seed": seed,
        "device": device.value if device else None,
        "quantization.target_bits": manifest.budget.target_mean_bits or manifest.budget.mean_bits,
        **_batch_settings(batch_size),
    }
    overrides = {key: value for key, value in typed.items() if value is not None} | parse_assignments(settings or [])
    resolved = resolve_stored(manifest.recipe, overrides, where=f"recipe in {file}", trust_code=trust_code)
    resolved.finetune.epochs = resolved.finetune.epochs or 5
    target = output or file.absolute().parent.with_name(file.absolute().parent.name + "-finetuned")

    from csqcli import pipeline
    from csqcli.system.progress import Display
    from csqcli.training.run_folder import MODEL_FILE

    pipeline.finetune(
        file,
        resolved,
        target,
        display=Display(quiet=quiet or not _is_main_process()),
        force=force,
        resume=resume,
        trust_code=trust_code,
    )
    _print_result(target / MODEL_FILE)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Weight methods, allocators and costs: what each does, what it takes, where it is from."""
    from csqcli.quant.catalog import ALLOCATORS, AUTO, CARDS, LONG_SCHEDULE
    from csqcli.quant.costs import costs

    if as_json:
        found = {
            "methods": [
                {
                    "name": card.name,
                    "summary": card.summary,
                    "citation": card.citation,
                    "takes": card.takes,
                    "settings": list(card.settings.model_fields),
                }
                for card in CARDS.values()
            ],
            "allocators": [{"name": card.name, "summary": card.summary} for card in ALLOCATORS.values()],
            "costs": [{"name": name, "summary": costs.help[name]} for name in costs.names()],
        }
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    takes = {"target": "a target", "planes": "planes of an allocator", "either": "a target, or planes of an allocator"}
    typer.echo("Methods (--method NAME, or package.module:Class)")
    typer.echo(f"  {AUTO:<12} staged below {LONG_SCHEDULE} epochs from a checkpoint, csq beyond and from scratch")
    for card in CARDS.values():
        typer.echo(f"  {card.name:<12} {card.summary}")
        if card.name != "float":
            typer.echo(
                f"  {'':<12}   takes {takes[card.takes]}; settings: {', '.join(card.settings.model_fields) or 'none'}"
            )
        if card.citation:
            typer.echo(f"  {'':<12}   {card.citation}")
    typer.echo("Allocators (--allocator NAME, or package.module:function)")
    for allocator in ALLOCATORS.values():
        typer.echo(f"  {allocator.name:<12} {allocator.summary}")
    typer.echo("Costs (--cost NAME, or package.module:function)")
    for name in costs.names():
        typer.echo(f"  {name:<12} {costs.help[name]}")


@app.command()
def evaluate(
    file: FileArgument,
    data: Annotated[str, typer.Option("--data", help=f"Images, of which the validation split is used: {help_text()}")],
    device: DeviceOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step; does not change the result.")] = 256,
    val_limit: Annotated[int | None, typer.Option(min=1, help="Use only this many images, spread evenly.")] = None,
    trust_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Top-1 and top-5 of the hard model, as reloaded from the file."""
    from csqcli import pipeline

    accuracy, manifest = pipeline.evaluate_file(
        file,
        data,
        device=device.value if device else "auto",
        batch_size=batch_size,
        val_limit=val_limit,
        trust_code=trust_code,
    )
    if as_json:
        result = {
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "samples": accuracy.samples,
            "mean_bits": manifest.budget.mean_bits,
        }
        typer.echo(json.dumps(result))
    else:
        typer.echo(f"top-1 {accuracy.top1:.2f} %  top-5 {accuracy.top5:.2f} %  of {accuracy.samples} images")


@app.command()
def report(
    file: FileArgument, as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False
) -> None:
    """Per-layer bits, sizes and accuracy of a file; needs neither model code nor data."""
    if not as_json:
        _print_report(file)
        return
    from csqcli.file import header
    from csqcli.reporting import terminal as reports

    typer.echo(json.dumps(reports.build(header.read_manifest(file), _history_beside(file)), indent=2))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for search.")],
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Load the library's weights.")
    ] = False,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of weights that stay float. Repeatable.")] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of the head; the library's own if unset.")
    ] = None,
    strict: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail when less than this share of parameters is covered.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What csq would quantize in a model, and what stays float and why."""
    from csqcli.models import coverage as inspection
    from csqcli.models import libraries as sources

    loaded = sources.load(model, num_classes=num_classes, pretrained=pretrained)
    size, task = loaded.data_config["input_size"], sources.task_of(loaded.spec)
    found = inspection.coverage(loaded.model, size, exclude=exclude or (), task=task)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for layer in found["layers"]:
            macs = "never called" if layer["macs"] is None else f"{layer['macs']:>15,} MACs"
            shape = "×".join(map(str, layer["shape"]))
            typer.echo(f"{layer['name']:<48} {shape:<18} {layer['weights']:>12,} weights {macs}")
        for tensor in found["left_float"]:
            typer.echo(f"{tensor['name']:<48} {'×'.join(map(str, tensor['shape'])):<18} float: {tensor['why']}")
        typer.echo(
            f"{len(found['layers'])} weight tensors: {100 * found['parameter_share']:.2f} % of {found['parameters']:,} "
            f"parameters, {100 * found['mac_share']:.2f} % of {found['macs']:,} multiply-accumulates "
            f"for {'×'.join(map(str, size))}"
        )
    if strict is not None and found["parameter_share"] < strict:
        raise UserError(
            f"only {found['parameter_share']:.4f} of the parameters are covered",
            where=model,
            hint=f"--strict asks for {strict:g}",
        )


class Activations(str, Enum):
    """Type of the activations in an exported graph."""

    float = "float"
    int8 = "int8"


class Target(str, Enum):
    """Engine that an exported graph is made for and verified with."""

    ort = "ort"
    openvino = "openvino"


@app.command()
def export(
    file: FileArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="File to write; FILE's name + the form if unset."),
    ] = None,
    int8_packed: Annotated[
        bool,
        typer.Option("--int8-packed", help="safetensors, int8 integers; read it with safetensors and NumPy alone."),
    ] = False,
    bit_packed: Annotated[bool, typer.Option("--bit-packed", help="safetensors, the smallest form.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX whose packed weights the engine unpacks at load.")] = False,
    state_dict: Annotated[bool, typer.Option("--state-dict", help="safetensors, plain float state dict.")] = False,
    activations: Annotated[
        Activations, typer.Option(help="ONNX only; int8 needs activation scales in the file.")
    ] = Activations.float,
    target: Annotated[Target, typer.Option(help="ONNX only: the engine that verifies the file.")] = Target.ort,
    calib: Annotated[
        str | None,
        typer.Option(help="With --activations int8: images to scale outputs of convolutions, which ort wants in int8."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Verify on real images and record top-1 (as in csq evaluate).")
    ] = None,
    val_limit: Annotated[int | None, typer.Option(min=1, help="Use only this many images, spread evenly.")] = None,
    trust_code: TrustOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
) -> None:
    """Write a file that is small or runs elsewhere, read it back and compare it with the hard model."""
    flags = {"int8-packed": int8_packed, "bit-packed": bit_packed, "onnx": onnx, "state-dict": state_dict}
    chosen = [form for form, wanted in flags.items() if wanted]
    if len(chosen) != 1:
        options = ", ".join(f"--{form}" for form in flags)
        raise UserError(f"{len(chosen)} forms chosen", where="csq export", hint=f"pass exactly one of {options}")
    if not onnx and (activations is not Activations.float or target is not Target.ort):
        raise UserError("--activations and --target belong to --onnx", where=f"csq export --{chosen[0]}")
    from csqcli.exporting import run

    target_file = output or file.with_name(f"{file.stem}-{chosen[0]}").with_suffix(".onnx" if onnx else ".safetensors")
    manifest = run.export_file(
        file,
        target_file,
        form=chosen[0],  # type: ignore[arg-type]  # one of the keys above
        activations=activations.value,
        target=target.value,
        calib=calib,
        data_source=data,
        val_limit=val_limit,
        trust_code=trust_code,
        force=force,
    )
    for line in run.summary(manifest):
        typer.echo(line)
    typer.echo(f"wrote {target_file}")


@recipes_app.callback(invoke_without_command=True)
def _recipes_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        _list_recipes()


@recipes_app.command("list")
def recipes_list() -> None:
    """Shipped recipes, a line each."""
    _list_recipes()


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """A recipe, complete with defaults, as YAML."""
    from csqcli.recipe.resolve import resolve, to_yaml

    typer.echo(to_yaml(resolve(name, {})), nl=False)


@recipes_app.command("schema")
def recipes_schema() -> None:
    """JSON schema of recipe files; every key with its meaning."""
    from csqcli.recipe.resolve import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _list_recipes() -> None:
    from csqcli.recipe.resolve import builtin_names, read

    for name in builtin_names():
        typer.echo(f"{name:<20} {read(name)[0].get('description', '')}")


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0  # as torchrun sets it


def _print_result(file: Path) -> None:
    if _is_main_process():
        _print_report(file)
        typer.echo(f"wrote {file}")


def _print_report(file: Path) -> None:
    from rich.console import Console

    from csqcli.file import header
    from csqcli.reporting import terminal as reports

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    reports.print_table(header.read_manifest(file), console)


def _batch_settings(batch_size: str | None) -> dict[str, Any]:
    """Recipe keys of ``--batch-size``."""
    if batch_size is None:
        return {}
    if batch_size == "auto":
        return {"data.micro_batch": "auto"}
    try:
        return {"data.batch_size": int(batch_size)}
    except ValueError:
        raise UserError(f"`{batch_size}` is neither a number of images nor auto", where="--batch-size") from None


def _history_beside(file: Path) -> list[dict[str, Any]]:
    """The training history lies beside the model in metrics.jsonl; a file that travelled alone has none."""
    from csqcli.system.limits import read_json

    try:
        lines = (file.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [read_json(line, nodes=1000) for line in lines]
    except (OSError, ValueError):
        return []


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    click = sys.modules[typer.BadParameter.__module__]  # the exceptions of typer's click, vendored in newer releases
    try:
        result = app(prog_name="csq", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except UserError as error:
        _fail(error.line())
    except getattr(click, "NoArgsIsHelpError", ()) as error:  # click 8.2 and later
        typer.echo(error.format_message())
        code = 0
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "csq"
        _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`")
    except typer.Exit as error:
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
        typer.echo(_RESUME_HINT, err=True)
    except Interrupted as stop:
        if _is_main_process():
            typer.echo(f"csq: stopped and saved ({stop.where}); the same command with --resume goes on", err=True)
        code = 128 + stop.signum
    except (MemoryError, RuntimeError, OSError) as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        _fail(fault.line())
    else:
        if code == _INTERRUPTED:  # some releases of typer turn KeyboardInterrupt into this exit code
            typer.echo(_RESUME_HINT, err=True)
    sys.exit(code)


def _fail(line: str) -> NoReturn:
    typer.echo(f"csq: error: {line}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
