"""Functions of the Python API that look at a model and train nothing: inspect, bench, allocate, sensitivity, explain, diff."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from csqcli.api.arguments import HeldOut, Pixels, Positive, Processes, Report, display_of, together
from csqcli.data.specs import WORKERS
from csqcli.errors import UserError
from csqcli.recipe import DEFAULT_RECIPE
from csqcli.system.arguments import checked
from csqcli.system.callers import preserve_global_state
from csqcli.system.choices import EngineName

if TYPE_CHECKING:
    from torch import nn

    from csqcli.system.progress import Display


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
    display = display_of(progress)
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
    resolved = resolve(recipe, together(named, settings))
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
        found = allocated(resolved, display=display_of(progress))
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
    resolved = resolve(recipe, together({"model.source": model, "data.source": data}, settings))
    check_model_given(resolved)
    check_data_given(resolved)

    from csqcli.analysis.sensitivity import sensitivity as measured

    with preserve_global_state():
        return measured(resolved, widths=wanted, images=val_limit, display=display_of(progress))


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
            display=display_of(progress),
        )


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
            display=display_of(progress),
        )
