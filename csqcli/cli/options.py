"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from csqcli.data.specs import help_text
from csqcli.errors import UserError
from csqcli.system.choices import EngineName, Head, Weights

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, or a safetensors file that csq wrote.")
]
DataOption = Annotated[str | None, typer.Option("--data", help=f"Images: {help_text()}")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; auto takes a CUDA GPU when there is one."),
]
LogOption = Annotated[
    float,
    typer.Option(
        "--log-every",
        metavar="SECONDS",
        min=0.1,
        help="Time between two lines of progress where stderr is no terminal.",
    ),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option("--weights", help="Which weights of a checkpoint that holds averaged (EMA) and raw ones."),
]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="Weights: .safetensors, .pth, .pt, .th or .tar.")
]
HeadOption = Annotated[
    Head | None,
    typer.Option("--head", help="The weights' classifier: keep it, keep a subset of its outputs, or start a new one."),
]
PretrainedOption = Annotated[
    bool | None,
    typer.Option("--pretrained/--no-pretrained", help="Library weights when no checkpoint is given."),
]
TargetBopsOption = Annotated[
    str | None,
    typer.Option(
        "--target-bops",
        metavar="NUMBER",
        help="In place of --target-bits or beside it: bit operations of one image, e.g. 5G.",
    ),
]
TargetLatencyOption = Annotated[
    float | None,
    typer.Option(
        "--target-latency",
        metavar="MS",
        help="In place of --target-bits or beside it: milliseconds that all layers take for one image on this machine.",
    ),
]
LatencyTableOption = Annotated[
    str | None,
    typer.Option(
        "--latency-table",
        metavar="FILE",
        help="With --target-latency: what `csq bench MODEL --json` printed; measured first if unset.",
    ),
]
LatencyEngineOption = Annotated[
    EngineName | None,
    typer.Option(
        "--latency-engine", help="With --target-latency: engine to measure in; the first that is installed if unset."
    ),
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", help="A shipped recipe, as `csq recipes` lists them, or a YAML file.")
]
BatchOption = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        help="Images per step. auto: the recipe's, in as few parts as fit into memory; BatchNorm sees the parts.",
    ),
]
ValSplitOption = Annotated[
    str | None,
    typer.Option(
        "--val-split",
        metavar="SHARE|test",
        help="Without a validation split: hold out a share of the training images (0.1), or take the test split.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, e.g. optimizer.lr=0.05. Repeatable."),
]
PlanesOption = Annotated[
    Path | None,
    typer.Option(
        "--planes",
        metavar="FILE",
        help="Planes of each layer, as `csq allocate --output FILE` writes them. A target that is typed beside replaces FILE's.",
    ),
]
TrialsOption = Annotated[int | None, typer.Option("--trials", help="Networks that the allocator haq measures.")]
LookLimitOption = Annotated[
    int, typer.Option("--val-limit", min=1, help="Use only this many validation images, spread evenly.")
]
ValLimitOption = Annotated[int | None, typer.Option(min=1, help="Use only this many images, spread evenly.")]
WorkersOption = Annotated[
    int,
    typer.Option("--workers", min=0, max=1024, help="Processes that load images; does not change the result."),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-code", help="Let the file import the package.module:factory that it names, which runs code."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite a finished or unfinished run.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="NAME",
        help="Send metrics to tensorboard (in the run's folder), trackio or mlflow too. Repeatable.",
    ),
]
LOG_EVERY = 60.0  # seconds
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that were typed: those that are not None."""
    return {key: value for key, value in settings.items() if value is not None}


def settings_beside(named: Mapping[str, Any], assignments: list[str] | None, context: typer.Context) -> dict[str, Any]:
    """What ``--set`` says, for a function of the API that takes ``named`` from the command's other options. UserError for a key
    of such a name: use the option instead."""
    from csqcli.recipe.keys import parse_assignments

    found = parse_assignments(assignments or [])
    for key in (key for key in found if key in named):
        options = {option: each for each in context.command.params for option in each.opts}
        option = f"--{key.replace('_', '-')}"
        if option not in options:
            raise UserError(f"unknown key `{key}`", where="--set", hint=f"see `{context.command_path} --help`")
        value = next(text.partition("=")[2] for text in assignments or [] if text.partition("=")[0].strip() == key)
        typed = option if getattr(options[option], "is_flag", False) else f"{option} {shlex.quote(value)}"
        raise UserError(f"`{key}` is an option of {context.command_path}", where="--set", hint=f"pass {typed}")
    return found


def with_settings(
    options: Mapping[str, Any], settings: list[str] | Mapping[str, Any] | None, **names: str
) -> dict[str, Any]:
    """The settings of options ({dotted key: value, None where it was not typed}) and those of ``--set`` as overrides. UserError where
    both give one of them, with two values. ``names`` are those of options that are not called like their key."""
    from csqcli.recipe.keys import merged, parse_assignments

    assigned = settings if isinstance(settings, Mapping) else parse_assignments(settings or [])
    known = _OPTIONS | {key.replace("__", "."): name for key, name in names.items()}

    def as_option(key: str, value: Any) -> str:
        option = known.get(key, f"--{key.rpartition('.')[2].replace('_', '-')}")
        if isinstance(value, bool):
            return option if value else f"--no-{option.removeprefix('--')}"
        return f"{option} {','.join(map(str, value)) if isinstance(value, list) else _said(value)}"

    return merged(options, assigned, as_named=as_option, as_setting=_as_assignment)


# of those that are not called like their key
_OPTIONS = {
    "model.source": "MODEL",
    "data.source": "--data",
    "data.micro_batch": "--batch-size",
    "adaptation.epochs": "--float-epochs",
    "finetune.epochs": "--finetune-epochs",
}


def _as_assignment(key: str, value: Any) -> str:
    return f"--set {key}={_said(value)}"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def val_split(text: str | None) -> float | Literal["test"] | None:
    """The value of ``--val-split``. UserError for what is neither a share nor test."""
    if text is None or text == "test":
        return text  # type: ignore[return-value]
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"`{text}` is neither a share above 0 and at most 1 nor test", where="--val-split")
    return share


def model_settings(
    model: str | None,
    data: str | None,
    checkpoint: str | None,
    weights: Weights | None,
    head: Head | None,
    pretrained: bool | None,
    device: str | None,
    held_out: float | Literal["test"] | None,
) -> dict[str, Any]:
    """Recipe keys of the options that say which model, which weights and which images."""
    return {
        "model.source": model,
        "data.source": data,
        "model.checkpoint": checkpoint,
        "model.weights": weights,
        "model.head": head,
        "model.pretrained": pretrained,
        "device": device,
        "data.val_split": held_out,
    }


def batch_settings(batch_size: str | None) -> dict[str, Any]:
    """Recipe keys of ``--batch-size``. UserError for what is neither a number nor auto."""
    if batch_size is None:
        return {}
    if batch_size == "auto":
        return {"data.micro_batch": "auto"}
    try:
        return {"data.batch_size": int(batch_size)}
    except ValueError:
        raise UserError(f"`{batch_size}` is neither a number of images nor auto", where="--batch-size") from None


def copy_options(
    command: Callable[..., None],
    source: Callable[..., None],
    *,
    without: Collection[str],
    own: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    """Give a command of ``**options`` the parameters of another, but for some, and after the first of them ``own`` ones by
    name: (annotation, default). typer reads the options off the signature, so no option of ``source`` can be forgotten."""
    signature, hints = inspect.signature(source), get_type_hints(source, include_extras=True)
    kept = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature.parameters.items()
        if name not in without
    ]
    added = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
        for name, (annotation, default) in (own or {}).items()
    ]
    parameters = [kept[0], *added, *kept[1:]]
    command.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
