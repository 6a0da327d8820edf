"""csq from Python: what the commands do, as functions of plain values, and an optimizer for your own training loop.

Everything here is re-exported by the package: ``import csqcli; csqcli.search(…)``. Commands that measure, look or write a file
call these functions. Those of runs (``search``, ``plan``, ``finetune``, ``sweep``) say first what they are about to do and where,
and call what these functions call.
It is long because it is the reference: every function says its arguments, units, errors and an example here.
Whatever is wrong with the input is a :class:`UserError`, whose ``line()`` is what the command line prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict

from annotated_types import Ge, Gt, Le

from csqcli.data.specs import WORKERS
from csqcli.errors import UserError
from csqcli.recipe import DEFAULT_RECIPE
from csqcli.system.arguments import checked
from csqcli.system.callers import preserve_global_state
from csqcli.system.choices import Activations, EngineName, Prefer, Target, Weights, WeightType

if TYPE_CHECKING:
    from torch import nn

    from csqcli.quant.layerwise import Quantized
    from csqcli.quant.optimizer import CSQ, QuantizedOptimizer
    from csqcli.recipe.schema import Recipe
    from csqcli.system.progress import Display

__all__ = [
    "CSQ",
    "UserError",
    "allocate",
    "bench",
    "compare",
    "diff",
    "evaluate",
    "explain",
    "export",
    "finetune",
    "inspect",
    "load",
    "plan",
    "quantize",
    "report",
    "save",
    "search",
    "sensitivity",
    "sweep",
]

Report = dict[str, Any]
Positive: TypeAlias = Annotated[int, Ge(1)]
Pixels: TypeAlias = Annotated[int, Ge(1), Le(4096)]  # a side of an image
Processes: TypeAlias = Annotated[int, Ge(0), Le(1024)]
# a share of the training images, or the test split
HeldOut: TypeAlias = Annotated[float, Gt(0), Le(1)] | Literal["test"]
FINETUNE_EPOCHS = 5  # where neither the caller nor the file's recipe says


class Evaluation(TypedDict):
    """What :func:`evaluate` measures."""

    top1: float  # percent
    top5: float  # percent
    top1_present: float | None  # percent, among the classes of the data alone; None where the model has no others
    samples: int  # images
    mean_bits: float  # planes per weight element; 32 of a float model


@checked
def search(
    model: str | None = None,
    *,
    target_bits: float | None = None,
    data: str | None = None,
    output: str | Path | None = None,
    recipe: str = DEFAULT_RECIPE,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Report:
    """From a pretrained checkpoint to a quantized file and its report, as ``csq search`` does it.

    Args:
        model: a timm or torchvision name, ``timm:NAME``, ``torchvision:NAME``, ``csq:NAME`` or ``package.module:factory``;
            None where the recipe names one.
        target_bits: mean planes per weight element that the result must not exceed; fractions are fine. None where the
            recipe says.
        data: what ``--data`` takes: a folder or archive of class folders, ``csv:FILE``, ``cifar10:DIR``, ``digits``, ….
        output: folder for ``model.safetensors``, ``report.json``, ``metrics.jsonl`` and ``recipe.yaml``; None takes
            ``runs/MODEL-TARGETbit``, as ``runs/resnet18-3bit``.
        recipe: the name of one that ships with csq, or a YAML file.
        resume: go on with an unfinished run in ``output``. The report of a finished one is returned as it is.
        force: overwrite a run in ``output``, finished or not, and files of these names that no run wrote.
        progress: show what is going on, on stderr.
        settings: further recipe keys, dotted or short where that is unambiguous: ``epochs=5``, ``batch_size=64``,
            ``**{"finetune.epochs": 3}``. `csq init` writes them all with their meaning. They win over the recipe.

    Returns:
        The report: budget, sizes, accuracy in percent (``report["accuracy"]["hard_top1"]``), one entry per layer, history.

    Raises:
        UserError: for anything wrong with the arguments, the data, the checkpoint or the folder; before training.

    Example::

        report = csqcli.search("resnet18", target_bits=3, data="/imagenet", output="runs/resnet18", epochs=5)
        print(report["budget"]["mean_bits"], report["accuracy"]["hard_top1"])
    """
    resolved, display = _search_recipe(model, target_bits, data, recipe, settings, progress)

    from csqcli import pipeline

    folder = Path(output) if output is not None else search_folder(resolved)
    with preserve_global_state():
        return pipeline.search(resolved, folder, display=display, force=force, resume=resume)


@checked
def plan(
    model: str | None = None,
    *,
    target_bits: float | None = None,
    data: str | None = None,
    recipe: str = DEFAULT_RECIPE,
    progress: bool | Display = False,
    **settings: Any,
) -> Report:
    """What :func:`search` would come to, from a few of its own steps, as ``csq plan`` says it; nothing is written.

    Args:
        model, target_bits, data, recipe, settings: as for :func:`search`.
        progress: show what is going on, on stderr.

    Returns:
        ``bytes`` of the ``model`` file and of its ``bit_packed_small`` form, predicted; ``memory`` (``bytes`` of a step on ``images`` at
        once, ``free_bytes``); ``time`` (``step_seconds``, ``steps``, ``evaluation_seconds``, ``evaluations``, ``seconds`` in all);
        ``mean_bits`` (planes per weight element), ``target_mean_bits``; ``layers`` (name, shape, weights, macs, planes as far as a few
        steps tell), ``left_float``; ``recipe`` as resolved, ``method_why``.

    Raises:
        UserError: for whatever would stop the search, and for 0 epochs, which have no steps to be timed.

    Example::

        found = csqcli.plan("resnet18", target_bits=3, data="/imagenet", epochs=5)
        print(found["time"]["seconds"] / 3600, found["memory"]["bytes"], found["bytes"]["model"])
    """
    resolved, display = _search_recipe(model, target_bits, data, recipe, settings, progress)

    from csqcli import pipeline

    with preserve_global_state():
        return pipeline.plan(resolved, display=display)


@checked
def finetune(
    file: str | Path,
    *,
    data: str | None = None,
    epochs: Positive | None = None,
    teacher: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    trust_code: bool = False,
    **settings: Any,
) -> Report:
    """Train a quantized file's integers on, planes fixed; the better of the two models is written.

    Args:
        file: what ``search``, ``finetune`` or ``save`` wrote, in any safetensors form of ``export``; or a run's folder.
        data: as for :func:`search`.
        epochs: of this training; None takes those of the file's recipe, or 5.
        teacher: float weights that ``optimizer.distill`` and ``distill_features`` follow: a checkpoint, or a float run's folder.
        output: folder for the result; None takes ``runs/NAME-finetuned``, NAME that of the file's folder.
        resume, force, progress, settings: as for :func:`search`. The recipe is the file's own.
        trust_code: let the file import the ``package.module:factory`` that it names.

    Returns:
        The report; ``report["finetune"]`` says which model was kept, and both top-1 in percent.

    Raises:
        UserError: for anything wrong with the arguments, the file, the data or the folder.

    Example::

        report = csqcli.finetune("runs/resnet18", data="/imagenet", epochs=3, output="runs/tuned")
    """
    from csqcli.recipe.resolve import check_of_finetune
    from csqcli.system.run_files import finetune_folder, model_of

    check_of_finetune(settings)
    path = model_of(file)
    named = {
        "data.source": data,
        "finetune.epochs": epochs,
        "finetune.teacher": None if teacher is None else str(teacher),
    }
    resolved = finetune_recipe(path, _together(named, settings), trust_code=trust_code)

    from csqcli import finetuning

    with preserve_global_state():
        return finetuning.finetune(
            path,
            resolved,
            Path(output) if output is not None else finetune_folder(path),
            display=_display(progress),
            force=force,
            resume=resume,
            trust_code=trust_code,
        )


@checked
def evaluate(
    file: str | Path | None,
    data: str,
    *,
    model: str | None = None,
    weights: Weights = "auto",
    input_size: Pixels | None = None,
    device: str = "auto",
    batch_size: Positive = 256,
    workers: Processes = WORKERS,
    val_split: HeldOut | None = None,
    val_limit: Positive | None = None,
    trust_code: bool = False,
    classes_by_position: bool = False,
    progress: bool | Display = False,
    **settings: Any,
) -> Evaluation:
    """Accuracy of the hard model, as reloaded from the file, with the preprocessing stored in it; or of a float model.

    Args:
        file: a run's folder, or any file that csq wrote; ONNX ones run in ONNX Runtime, .tflite ones in LiteRT, on the
            CPU. With ``model`` any checkpoint, or None for the library's own weights.
        data: as for :func:`search`; only the validation images are read.
        model: the float model to put the checkpoint's weights into, as for :func:`search`.
        weights: with ``model``, which ones where the checkpoint holds averaged (``ema``) and ``raw`` ones.
        input_size: with ``model``, the side of the images in pixels; None takes the model's own.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto`` takes a CUDA GPU when there is one.
        batch_size: images per step; does not change the result.
        workers: processes that load the images; does not change the result. Small sets are held in memory and use none.
        val_split: for data without a validation split, as the recipe's ``data.val_split``; None takes the file's own.
        val_limit: use only this many images, spread evenly over the set.
        trust_code: let the file import the ``package.module:factory`` that it names.
        classes_by_position: match the classes of file and data by their numbers, whatever their names.
        progress: show what is going on, on stderr.
        settings: with ``model``, recipe keys of the preprocessing: ``mean``, ``std``, ``interpolation``, ``crop_pct``; and
            ``**{"model.arguments": {"img_size": 64}}``.

    Returns:
        ``top1`` and ``top5`` in percent, ``top1_present`` (percent, among the data's classes where the model has more),
        ``samples`` (images), ``mean_bits`` (planes per weight element).

    Raises:
        UserError: for a damaged file, and for data that is not what the model was trained on.

    Example::

        print(csqcli.evaluate("runs/digits", "digits")["top1"])
    """
    from csqcli import evaluating
    from csqcli.system.run_files import model_of

    measured: dict[str, Any] = {
        "device": device,
        "batch_size": batch_size,
        "workers": workers,
        "val_split": val_split,
        "val_limit": val_limit,
        "display": _display(progress),
    }
    if model is not None:
        from csqcli.recipe.resolve import preprocessing

        prepared = preprocessing(_together({"data.input_size": input_size}, settings))
        checkpoint = None if file is None else str(file)
        with preserve_global_state():
            of_model = evaluating.evaluate_checkpoint(
                checkpoint, model, data, weights=weights, recipe=prepared, **measured
            )
        return _evaluation(of_model, 32.0)
    if file is None:
        raise UserError("no file given", where="csqcli.evaluate", hint="name one, or a float model by `model`")
    if weights != "auto" or input_size is not None or settings:
        given = "weights" if weights != "auto" else "input_size" if input_size is not None else next(iter(settings))
        what = f"`{given}` is about a float model, and none is named"
        raise UserError(what, hint="name one by --model (model=), or leave it out: a csq file knows its own")
    with preserve_global_state():
        accuracy, manifest = evaluating.evaluate_file(
            model_of(file), data, trust_code=trust_code, classes_by_position=classes_by_position, **measured
        )
    return _evaluation(accuracy, manifest.budget.mean_bits)


@checked
def export(
    file: str | Path,
    output: str | Path | None = None,
    *,
    form: str,
    activations: Activations = "float",
    target: Target = "ort",
    weights: WeightType = "int8",
    calib: str | None = None,
    prefer: Prefer = "speed",
    data: str | None = None,
    val_split: HeldOut | None = None,
    val_limit: Positive | None = None,
    workers: Processes = WORKERS,
    trust_code: bool = False,
    force: bool = False,
    progress: bool | Display = False,
) -> Report:
    """Write a file that is small or runs elsewhere, read it back and compare it with the hard model.

    Args:
        file: a run's folder, or any safetensors file that csq wrote.
        output: file to write; None takes the file's name and the form: ``model-onnx.onnx``.
        form: ``bit-packed`` (the smallest that is the searched model bit for bit), ``bit-packed-small`` (BatchNorms folded,
            numbers beside the integers in 16 bits; for inference), ``int8-packed`` (read with safetensors and NumPy
            alone), ``state-dict`` (plain float weights), ``torchao`` (linear layers in int8, read with torchao), ``onnx``,
            ``litert``, or ``package.module:Class`` of your own.
        activations: ``onnx`` and ``litert``; ``int8`` needs activation scales in the file.
        target: ``onnx`` only; the engine that the file is made for and verified with (``tensorrt``: verified in ONNX Runtime).
        weights: with ``target="tensorrt"`` and float activations, ``int4`` for linear layers whose integers fit it.
        calib: with ``int8``, images to measure the outputs of layers on; as ``data`` for :func:`search`.
        prefer: ``litert`` only; the faster kernels or the smaller file, where these differ.
        data: images to compare logits on, and to record the written file's top-1 with.
        val_split: as for :func:`evaluate`.
        val_limit: use only this many of them, spread evenly.
        workers: as for :func:`evaluate`; with ``target="openvino"`` none.
        trust_code: let the file import the ``package.module:factory`` that it names.
        force: replace ``output``.
        progress: show what is going on, on stderr.

    Returns:
        The new file's report, as :func:`report` gives it; ``report["parity"]`` is the certificate of the comparison.

    Raises:
        UserError: for bad input, and when the written file differs from the hard model; then nothing is left at ``output``.

    Example::

        csqcli.export("runs/digits", "digits.onnx", form="onnx", data="digits")
    """
    from csqcli.exporting import registry
    from csqcli.reporting.build import build, describe
    from csqcli.system.run_files import model_of

    path = model_of(file)
    registry.check_name(form, where="csqcli.export")
    options = {"activations": activations, "target": target, "weights": weights, "calib": calib, "prefer": prefer}
    registry.check_options(form, options, where=f"csqcli.export, form {form}")

    from csqcli.exporting.run import export_file, output_path

    target_path = Path(output) if output is not None else output_path(path, form)
    with preserve_global_state():
        manifest = export_file(
            path,
            target_path,
            form=form,
            activations=activations,
            target=target,
            weights=weights,
            calib=calib,
            prefer=prefer,
            data_source=data,
            val_split=val_split,
            val_limit=val_limit,
            workers=workers,
            trust_code=trust_code,
            force=force,
            display=_display(progress),
        )
    return describe(target_path) if form in registry.CARDS else build(manifest)


@checked
def bench(
    what: str | Path,
    *,
    engine: EngineName | str | None = None,
    threads: Annotated[int, Ge(1), Le(1024)] = 1,
    batch: Annotated[int, Ge(1), Le(4096)] = 1,
    repeats: Annotated[int, Ge(1), Le(10_000)] = 15,
    input_size: Pixels | None = None,
    num_classes: Positive | None = None,
    trust_code: bool = False,
    progress: bool | Display = False,
) -> Report:
    """Latency in an engine on this machine: of the network, and of each of its layers alone, all forms interleaved.

    Args:
        what: a run's folder, a safetensors, ONNX or LiteRT file that csq wrote, or a model as for :func:`search`, whose
            weights are random and whose integer form is that of 7 planes and 8-bit inputs.
        engine: ``ort``, ``openvino``, ``litert`` or ``torch``; None takes the first one that is installed.
        threads: of the engine.
        batch: images at a time; LiteRT runs a network on one after the other.
        repeats: turns that medians and quartiles are of.
        input_size: of a model: the side of the images in pixels; None takes its own.
        num_classes: of a model: of its head; None takes the library's own.
        trust_code: let the file import the ``package.module:factory`` that it names.
        progress: show what is going on, on stderr.

    Returns:
        ``engine``, ``engine_version``, ``threads``, ``batch``, ``repeats``, ``input_size``, ``processor`` (``name``,
        ``instructions``); ``network``: ``fp32`` and ``exported``, each ``ms`` (median), ``low_ms``, ``high_ms`` (quartiles), or
        null; ``layers``: name, shape, macs, calls, input, and ``latency`` by form, null where the engine has no such kernel;
        ``sum_ms`` of the layers by form. No layers for an ONNX or LiteRT file.

    Raises:
        UserError: for files that are not csq's or are damaged, unknown models, and an engine that is not installed.

    Example::

        found = csqcli.bench("resnet18", engine="ort")
        print(found["network"]["fp32"]["ms"], found["sum_ms"]["int8"])
    """
    from csqcli.exporting.engines import ENGINES, ENGINES_OF, choose

    if engine is not None and engine not in ENGINES:
        raise UserError(f"no engine `{engine}`", where="engine", hint=f"one of {', '.join(ENGINES)}")
    path = Path(what)
    is_file = path.exists() or path.suffix in (".safetensors", *ENGINES_OF)
    among = ENGINES_OF.get(path.suffix, tuple(ENGINES))
    display = _display(progress)
    if is_file:
        from csqcli.file.header import read_manifest
        from csqcli.system.run_files import model_of

        if input_size is not None or num_classes is not None:
            name = "input_size" if input_size is not None else "num_classes"
            raise UserError("is for models by name", where=name, hint="a file knows its own")
        path = model_of(path)
        read_manifest(path)  # what is wrong with the file is said before torch is imported
    chosen = choose(engine, among=among)
    if engine is None:
        display.say(f"engine {chosen} ({ENGINES[chosen].title}): the first of {', '.join(among)} that is installed")

    from csqcli.exporting.bench import Setting, bench_file, bench_model
    from csqcli.models.spec import parse

    with preserve_global_state():
        setting = Setting(chosen, threads, batch, repeats)
        if is_file:
            return bench_file(path, setting, trust_code=trust_code, display=display)
        return bench_model(parse(str(what)), setting, input_size=input_size, num_classes=num_classes, display=display)


@checked
def report(file: str | Path) -> Report:
    """What a file says of itself: bits, sizes and accuracy, per layer and in all. Needs neither model code nor data.

    Args:
        file: a run's folder, or any file that csq wrote, ONNX ones included.

    Returns:
        The report as in ``report.json``; ``history`` holds a line per epoch when ``metrics.jsonl`` lies beside the file.
        Sizes and bit operations are recomputed; ``as_stated`` lists the fields that are only the file's own word.

    Raises:
        UserError: for a file that is not csq's, or is damaged.

    Example::

        for layer in csqcli.report("runs/digits")["layers"]:
            print(layer["name"], layer["bits"])
    """
    from csqcli.reporting.build import describe
    from csqcli.system.run_files import model_of

    return describe(model_of(file))


@checked
def inspect(
    model: str | nn.Module,
    *,
    input_size: Pixels | Sequence[Positive] | None = None,
    exclude: str | Sequence[str] = (),
    num_classes: Positive | None = None,
    pretrained: bool = False,
) -> Report:
    """What csq would quantize in a model, and what stays float and why.

    Args:
        model: as for :func:`search`, or a module.
        input_size: channels, height and width of an image, or for a model by name its side in pixels; None takes the model's
            own. All three are needed with a module.
        exclude: a glob over weight names (``fc``, ``layer4.*``), or several, that stay float.
        num_classes: classes of the head; None takes the library's own.
        pretrained: load the library's weights.

    Returns:
        ``layers`` (name, shape, weights, multiply-accumulates ``macs`` of one image, null where the forward pass never
        uses the weight), ``left_float`` (name, shape, why), and the shares ``parameter_share`` and ``mac_share`` in [0, 1].

    Raises:
        UserError: for unknown models, globs that match nothing, and images that the model cannot run on.

    Example::

        print(csqcli.inspect("resnet18")["mac_share"])
    """
    from csqcli.models import coverage
    from csqcli.models import libraries as sources

    if isinstance(model, str):
        with preserve_global_state():
            with sources.without_weights("leave --pretrained (pretrained=True) out"):
                loaded = sources.load(model, num_classes=num_classes, pretrained=pretrained)
            own = loaded.data_config["input_size"]
            size = (*own[:-2], input_size, input_size) if isinstance(input_size, int) else input_size or own
            return coverage.coverage(loaded.model, size, exclude=exclude, task=sources.task_of(loaded.spec))
    if input_size is None or isinstance(input_size, int):
        raise UserError("no input_size given", where="csqcli.inspect", hint="a module needs one, e.g. (3, 224, 224)")
    from csqcli.quant.wrappers import unwrap

    with preserve_global_state():
        return coverage.coverage(unwrap(model), input_size, exclude=exclude)


@checked
def allocate(
    model: str | None = None,
    *,
    target_bits: float | None = None,
    data: str | None = None,
    allocator: str | None = None,
    recipe: str = DEFAULT_RECIPE,
    output: str | Path | None = None,
    force: bool = False,
    progress: bool | Display = False,
    **settings: Any,
) -> Report:
    """The planes that an allocator gives every layer, without training: what :func:`search` with it would fix.

    Args:
        model, target_bits, data, recipe, settings: as for :func:`search`.
        allocator: a name that `csq methods` lists, or ``package.module:function``; None takes the recipe's, or importance.
        output: a file to write the planes to, for ``csq search --planes``; None writes none.
        force: replace ``output``.
        progress: show what is going on, on stderr.

    Returns:
        ``mean_bits`` (planes per weight element), ``spent`` and ``allowed`` in the unit of ``cost``, ``budgets`` (what was asked and
        reached of each), and ``layers``: name,
        shape, weights, macs, planes, share of what is spent (0 to 1), importance of each plane (or null).

    Raises:
        UserError: as :func:`search`, for allocators that are not available, and for an ``output`` that exists.

    Example::

        found = csqcli.allocate("resnet18", target_bits=3, data="/imagenet", allocator="hawq-v2")
        print({layer["name"]: layer["planes"] for layer in found["layers"]})
    """
    from csqcli.recipe.complete import check_complete
    from csqcli.recipe.planes import planes_text
    from csqcli.recipe.resolve import resolve

    named = {
        "model.source": model,
        "quantization.target_bits": target_bits,
        "data.source": data,
        "quantization.allocator": allocator,
    }
    resolved = resolve(recipe, _together(named, settings))
    if resolved.quantization.allocator is None:
        resolved.quantization.allocator = "importance"
    check_complete(resolved, writes=False)
    target = Path(output) if output is not None else None
    if target is not None and os.path.lexists(target) and not force:
        raise UserError("exists already", where=str(target), hint="choose another name or pass --force")
    if target is not None and not target.parent.is_dir():
        raise UserError("no such folder", where=str(target.parent))

    from csqcli.analysis.allocating import allocate as allocated

    with preserve_global_state():
        found = allocated(resolved, display=_display(progress))
    if target is not None:
        from csqcli.system.files import write_text

        comment = f"{found['model']} at {found['target_bits']:g} planes by {found['allocator']}"
        planes = {layer["name"]: layer["planes"] for layer in found["layers"]}
        write_text(target, planes_text(planes, target_bits=found["target_bits"], comment=comment))
    return found


@checked
def sensitivity(
    model: str | None = None,
    *,
    data: str | None = None,
    widths: Sequence[int] = (1, 2, 3, 4),
    val_limit: Positive = 256,
    recipe: str = DEFAULT_RECIPE,
    progress: bool | Display = False,
    **settings: Any,
) -> Report:
    """Loss and top-1 of the float model with one layer at a time rounded, before any training.

    Args:
        model, data, recipe, settings: as for :func:`search`; of the images only the validation split is read.
        widths: planes to round to, 1 to 8 each.
        val_limit: use only this many images, spread evenly over the set.
        progress: show what is going on, on stderr.

    Returns:
        ``loss`` (nats) and ``top1`` (percent) of the float model on ``images``, and ``layers``: name, shape, weights, macs,
        ``loss`` and ``top1`` by ``widths``.

    Raises:
        UserError: as :func:`search`, and for widths that are none.

    Example::

        found = csqcli.sensitivity("resnet18", data="/imagenet", widths=(2, 4))
        print(max(found["layers"], key=lambda layer: layer["loss"][0])["name"])
    """
    from csqcli.recipe.complete import check_data_given, check_model_given
    from csqcli.recipe.resolve import resolve

    wanted = sorted(set(widths))
    if not wanted or not all(type(width) is int and 1 <= width <= 8 for width in wanted):
        listed = ", ".join(map(str, widths))
        raise UserError(
            f"`{listed}` is not a list of widths", where="widths", hint="whole numbers from 1 to 8, as 1,2,4"
        )
    resolved = resolve(recipe, _together({"model.source": model, "data.source": data}, settings))
    check_model_given(resolved)
    check_data_given(resolved)

    from csqcli.analysis.sensitivity import sensitivity as measured

    with preserve_global_state():
        return measured(resolved, widths=wanted, images=val_limit, display=_display(progress))


@checked
def sweep(
    model: str | None = None,
    *,
    targets: Sequence[float] | str | None = None,
    data: str | None = None,
    output: str | Path | None = None,
    recipe: str = DEFAULT_RECIPE,
    baselines: Sequence[str] = (),
    warm: bool = False,
    warm_epochs: Positive | None = None,
    seeds: Positive = 1,
    max_drop: Annotated[float, Ge(0), Le(100)] | None = None,
    jobs: Annotated[int, Ge(1), Le(1000)] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Report:
    """Search one model at many targets, what they share done once, as ``csq sweep`` does it. What is there already is not run again.

    Args:
        model, data, recipe, progress, settings: as for :func:`search`.
        targets: mean planes per weight, each above 0 and at most 8, or ``"1,1.5,2"``; None, with ``max_drop``, begins with 4.
        output: folder for the runs, ``pareto.json`` and ``pareto.html``; None takes ``runs/MODEL-sweep``.
        baselines: methods to put beside, at those targets that they can meet.
        warm: begin all targets but the highest with that one's weights, for fewer epochs: cheaper, and less accurate.
        warm_epochs: epochs of the runs that do; None takes 0.4 of the others'.
        seeds: runs of every target and method, with the recipe's seed and those after it.
        max_drop: also look for the smallest file whose top-1, the mean over seeds, is at most so many points below the float model's.
        jobs: runs at a time, each in a process of its own; None runs them here, one after the other.

    Returns:
        What pareto.json holds: ``float`` (``top1`` in percent, ``bytes``, ``bops``), ``runs`` (one each: ``run``, its folder;
        ``target_bits``, ``seed``, ``mean_bits``, ``top1``, ``bytes`` of the bit-packed file, …), ``groups`` (means over seeds, one
        for each method and target: ``top1``, ``top1_sd``, …), ``max_drop``.

    Raises:
        UserError: for anything wrong with the arguments, the data or the folder; and where no run holds ``max_drop``.

    Example::

        found = csqcli.sweep("resnet18", targets=[1, 1.5, 2, 3, 4], data="/imagenet", output="runs/sweep", epochs=5)
        print([(run["target_bits"], run["top1"], run["bytes"]) for run in found["runs"] if run["on_front_bytes"]])
    """
    from csqcli.sweeping.plan import Sweep, parse_targets

    planned = Sweep(
        recipe=recipe,
        overrides=_together({"model.source": model, "data.source": data}, settings),
        output=Path(output) if output is not None else None,
        targets=parse_targets(targets) if isinstance(targets, str) else targets,
        baselines=list(baselines),
        warm=warm,
        warm_epochs=warm_epochs,
        seeds=seeds,
        max_drop=max_drop,
    )
    planned.members()  # what cannot be run is known before PyTorch is loaded

    from csqcli.sweeping.launching import LocalProcesses
    from csqcli.sweeping.sweep import run_sweep

    launcher = None if jobs is None else LocalProcesses(jobs)
    with preserve_global_state():
        return run_sweep(planned, display=_display(progress), launcher=launcher, jobs=jobs or 1)


@checked
def explain(
    run: str | Path,
    data: str,
    *,
    val_limit: Positive = 512,
    swaps: Annotated[int, Ge(0), Le(10_000)] = 12,
    device: str = "auto",
    batch_size: Positive = 256,
    workers: Processes = WORKERS,
    val_split: HeldOut | None = None,
    trust_code: bool = False,
    progress: bool | Display = False,
) -> Report:
    """Why each layer of a quantized model has its planes, and what one more or one less would do.

    Args:
        run: a run's folder, or any safetensors file that csq wrote.
        data: as for :func:`evaluate`.
        val_limit: use only this many images; every other one is for gradients, the rest measure.
        swaps: how many swaps of one plane, of those that promise most, are measured.
        device, batch_size, workers, val_split, trust_code, progress: as for :func:`evaluate`.

    Returns:
        ``loss`` (nats) and ``top1`` (percent) as delivered; ``layers``: name, planes, share of the budget, importance of each
        plane, ``take`` (its cheapest plane away: rise of the loss) and ``give`` (a plane more: gain), both measured, null
        where the layer's rules or the method do not allow it; ``budgets``: those that were asked for, and whether swaps are held to
        them (to mean planes and bit operations they are); ``swaps``: the three best within these, expected and measured.

    Raises:
        UserError: for a damaged file, and for data that is not what the model was trained on.

    Example::

        for swap in csqcli.explain("runs/digits", "digits")["swaps"]:
            print(swap["give"], swap["take"], swap["measured"])
    """
    from csqcli.analysis.explaining import explain as explained
    from csqcli.system.run_files import model_of

    with preserve_global_state():
        return explained(
            model_of(run),
            data,
            images=val_limit,
            measured_swaps=swaps,
            device=device,
            batch_size=batch_size,
            workers=workers,
            val_split=val_split,
            trust_code=trust_code,
            display=_display(progress),
        )


def compare(*files: str | Path) -> Report:
    """Two or more quantized models, layer by layer. Needs neither model code nor data.

    Args:
        files: runs' folders, files that csq wrote (ONNX ones included), and ``report.json`` files.

    Returns:
        ``models`` (one each: file, model, form, method, target_bits, mean_bits, file_bytes, accuracy), ``layers`` (name, and
        ``planes``, ``bytes``, ``entropy_bits`` by model, null where it lacks the layer; ``differs``), ``settings`` (recipe keys
        whose values differ, with the values by model).

    Raises:
        UserError: for fewer than two files, and for what is not csq's or is damaged.

    Example::

        found = csqcli.compare("runs/a", "runs/b")
        print([layer["name"] for layer in found["layers"] if layer["differs"]])
    """
    from csqcli.reporting.comparing import compare as compared

    return compared([Path(file) for file in files])


@checked
def diff(
    float_model: str | Path,
    quantized: str | Path,
    data: str,
    *,
    export: str | Path | None = None,
    val_limit: Positive = 64,
    device: str = "auto",
    batch_size: Positive = 16,
    workers: Processes = WORKERS,
    val_split: HeldOut | None = None,
    trust_code: bool = False,
    progress: bool | Display = False,
) -> Report:
    """Signal-to-noise ratio of every layer's output against the float model's, worst first.

    Args:
        float_model: a checkpoint, a csq file or run, or the quantized model's own name, for the library's weights.
        quantized: a run's folder, a safetensors file that csq wrote, or an ONNX or LiteRT export.
        data: as for :func:`evaluate`.
        export: an ONNX or LiteRT export of ``quantized``, to be run in its engine beside; of LiteRT logits alone.
        val_limit: use only this many validation images.
        device, batch_size, workers, val_split, trust_code, progress: as for :func:`evaluate`.

    Returns:
        ``layers``, worst first: name, weights, planes, and in dB ``own`` (the layer alone, given the float model's input), ``hard``
        and ``engine`` (errors of the layers before included), null where nothing differs or could be compared; ``logits``
        and the share of images whose top-1 agrees, in percent.

    Raises:
        UserError: for files that are damaged or of different architectures.

    Example::

        worst = csqcli.diff("mine.pth", "runs/resnet18", "/imagenet")["layers"][0]
        print(worst["name"], worst["hard"])
    """
    from csqcli.analysis.differing import diff as differing

    with preserve_global_state():
        return differing(
            str(float_model),
            Path(quantized),
            data,
            export=Path(export) if export is not None else None,
            images=val_limit,
            device=device,
            batch_size=batch_size,
            workers=workers,
            val_split=val_split,
            trust_code=trust_code,
            display=_display(progress),
        )


@checked
def load(path: str | Path, *, into: nn.Module | None = None, trust_code: bool = False) -> nn.Module:
    """The hard model of a quantized file, in eval mode.

    Args:
        path: a run's folder, or any safetensors file that csq wrote.
        into: a module of the same architecture to load the dequantized weights into, strictly, and to put the file's
            activation quantizers on, in the place of those that it has. On any device; in any wrapper of torch.compile,
            data parallelism or weight averaging. None builds the architecture that the file names, on the CPU.
        trust_code: let the file import the ``package.module:factory`` that it names; not needed with ``into``.

    Returns:
        ``into``, or a plain timm, torchvision or csq module, or what the factory made.

    Raises:
        UserError: for damaged files, unknown architectures, and an ``into`` whose names or shapes differ, which is then
            unchanged.

    Example::

        model = csqcli.load("runs/digits")
        csqcli.load("runs/digits", into=my_model)
    """
    from csqcli.file import io, loading
    from csqcli.system.run_files import model_of

    file = model_of(path)
    with preserve_global_state():
        if into is None:
            return loading.load_file(file, trust_code=trust_code)
        loading.load_into(into, io.read(file), where=str(file))
        return into.eval()


def quantize(
    model: nn.Module,
    images: Iterable[Any],
    target_bits: float,
    *,
    exclude: str | Sequence[str] = (),
    act_bits: int = 32,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Quantized:
    """Post-training quantization of a model in memory, in place: what ``csq search --epochs 0`` does, without files.

    Planes go where the Fisher information says that they matter, then layers are rounded one after the other to what changes
    their outputs least; biases and BatchNorm statistics follow. The same images and seed give the same bits.

    Args:
        model: any network, with its trained weights, on any device. Afterwards it holds the quantized ones; its modes
            (train or eval) stay as they are, and after an exception its weights too.
        images: batches of training images, or of tuples that begin with them, normalised and cropped as for validation;
            labels are not used. The first ``settings["images"]`` (512) are looked at; below three planes 2,048 vary less.
        target_bits: mean planes per weight element, above 0 and at most 8; fractions are fine.
        exclude: a glob of weights that stay float and uncounted, or several, as the recipe's ``layers.exclude``.
        act_bits: of the inputs of layers, 2 to 8, at static scales measured on the first four batches; 32 leaves them float. Hooks
            on the model round them, and the file has their scales. Layers have 7 planes at most then, unless the target is higher.
        settings: of the method ``ptq``, as `csq methods` lists them: ``images``, ``passes``, ``damping``, ….
        seed: of the labels that are drawn from the model's own predictions.
        progress: show what is going on, on stderr.

    Returns:
        ``planes`` (of each weight, by name), ``mean_bits``, and what :func:`save` needs to write the file.

    Raises:
        UserError: for a target that cannot be met, images that the model does not take, and activations that overflow.

    Each process quantizes its own copy: in distributed training call it on one, and broadcast the weights.

    Example::

        quantized = csqcli.quantize(model, loader, 3)
        csqcli.save(model, quantized, "model.safetensors", source="timm:resnet18", num_classes=10)
    """
    from csqcli.rounding import quantize_in_memory

    with preserve_global_state():
        return quantize_in_memory(
            model,
            images,
            target_bits,
            exclude=exclude,
            act_bits=act_bits,
            settings=settings,
            seed=seed,
            display=_display(progress),
        )


def save(
    model: nn.Module,
    optimizer: QuantizedOptimizer | Quantized,
    path: str | Path,
    *,
    source: str,
    num_classes: int,
    arguments: Mapping[str, Any] | None = None,
    data_config: Mapping[str, Any] | None = None,
    loader: Iterable[Any] | None = None,
    classes: Sequence[str] | None = None,
    accuracy: float | Mapping[str, float] | None = None,
) -> Report:
    """Write what ``optimizer`` trained as a quantized file, read it back, and compare.

    At any step of a run: the file holds what the run would deliver if it ended there. Model and optimizer stay as they are.

    Args:
        model: the network that ``optimizer`` was built over, in any wrapper of torch.compile or data parallelism; or an
            average of its weights (timm's ModelEmaV3, torch's AveragedModel), which is rounded to the planes and scales
            that the optimizer found.
        optimizer: a :class:`CSQ`, or what :func:`quantize` returned.
        path: file to write, ``.safetensors``; replaced when it exists, and only by a file that was read back whole.
        source: what builds the architecture again, as on the command line: ``timm:resnet18``, ``package.module:factory``.
        num_classes: of the head.
        arguments: further keyword arguments of the constructor.
        data_config: ``input_size`` (channels, height, width), ``mean``, ``std``, ``interpolation``; None takes the model's.
        loader: training batches, of images or of tuples that begin with them, already augmented and normalised as for
            training: up to 100 re-estimate BatchNorm's statistics for the hard weights. None leaves them as trained.
        classes: their names, in the order of the scores.
        accuracy: top-1 of the hard model in percent, measured by you; or a mapping with any of ``float_top1``,
            ``soft_top1``, ``hard_top1``, ``hard_top5`` (percent) and ``samples`` (images).

    Returns:
        The report of the file, as :func:`report` gives it.

    Raises:
        UserError: when the file could not be loaded again (a wrong ``source``, ``arguments`` or ``num_classes``, a factory
            in ``__main__``), when training left NaN, when ``model`` is not what was trained. Nothing is written then.

    Example::

        csqcli.save(ema, optimizer, "best.safetensors", source="timm:resnet18", num_classes=10, accuracy=93.1)
    """
    from csqcli.reporting.build import describe
    from csqcli.saving import save_model

    target = Path(path)
    if target.suffix != ".safetensors":
        raise UserError("the name must end in .safetensors", where=str(target))
    with preserve_global_state():
        save_model(
            model,
            optimizer,
            target,
            source=source,
            num_classes=num_classes,
            arguments=arguments,
            data_config=data_config,
            loader=loader,
            classes=classes,
            accuracy=accuracy,
        )
    return describe(target)


def _search_recipe(
    model: str | None,
    target_bits: float | None,
    data: str | None,
    recipe: str,
    settings: Mapping[str, Any],
    progress: bool | Display,
) -> tuple[Recipe, Display]:
    """The recipe of a search and where its progress is shown; there, what was given and changes nothing is said."""
    from csqcli.recipe.complete import without_effect
    from csqcli.recipe.resolve import resolve

    named = {"model.source": model, "quantization.target_bits": target_bits, "data.source": data}
    typed = _together(named, settings)
    resolved, display = resolve(recipe, typed), _display(progress)
    for note in without_effect(resolved, typed):
        display.say(f"without effect: {note}")
    return resolved, display


def search_folder(recipe: Recipe) -> Path:
    """Where ``search`` writes when it is told nothing: ``runs/resnet18-3bit`` in the current folder."""
    from csqcli.system.run_files import default_folder

    settings = recipe.quantization
    model = (recipe.model.source or "model").rpartition(":")[2]
    parts = {
        "{:g}bit": settings.target_bits,
        "{}bytes": settings.target_size,
        "{:g}times": settings.target_compression,
        "{:g}bops": settings.target_bops,
        "{:g}ms": settings.target_latency,
    }
    asked = "-".join(text.format(value) for text, value in parts.items() if value is not None) or "float"
    return default_folder(model, asked)


def finetune_recipe(file: Path, overrides: Mapping[str, Any], *, trust_code: bool) -> Recipe:
    """What trains a file on: the recipe in it with ``overrides``, at its target, for 5 epochs where neither says how many."""
    from csqcli.file import header
    from csqcli.recipe.resolve import resolve_stored

    manifest = header.read_manifest(file)
    target = manifest.budget.target_mean_bits or manifest.budget.mean_bits
    given = {"quantization.target_bits": target, **overrides}
    found = resolve_stored(manifest.recipe, given, where=f"recipe in {file}", trust_code=trust_code)
    found.finetune.epochs = found.finetune.epochs or FINETUNE_EPOCHS
    return found


def _evaluation(accuracy: Any, mean_bits: float) -> Evaluation:
    return Evaluation(
        top1=accuracy.top1,
        top5=accuracy.top5,
        top1_present=accuracy.top1_present,
        samples=accuracy.samples,
        mean_bits=mean_bits,
    )


def _together(named: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the dotted key that they set, and the further settings, as overrides. UserError where both give one of them,
    with two values."""
    from csqcli.recipe.keys import merged

    called = {"model.source": "model", "data.source": "data"}

    def as_argument(key: str, value: Any) -> str:
        said = f"{value:g}" if isinstance(value, float) else repr(value)
        return f"{called.get(key, key.rpartition('.')[2])}={said}"

    return merged(named, settings, as_named=as_argument, as_setting=lambda key, value: f"{key}={value!r}")


def _display(progress: bool | Display) -> Display:
    from csqcli.system.launcher import is_main_process
    from csqcli.system.progress import Display

    if isinstance(progress, Display):
        return progress
    return Display(quiet=not progress or not is_main_process())


def __getattr__(name: str) -> Any:
    if name == "CSQ":  # a class of torch, which reports need not import
        from csqcli.quant.optimizer import CSQ

        return CSQ
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
