"""Functions of the Python API about the files that csq writes: evaluate, export, load, report, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from csqcli.api.arguments import HeldOut, Pixels, Positive, Processes, Report, display_of, together
from csqcli.data.specs import WORKERS
from csqcli.errors import UserError
from csqcli.system.arguments import checked
from csqcli.system.callers import preserve_global_state
from csqcli.system.choices import Activations, Prefer, Target, Weights, WeightType

if TYPE_CHECKING:
    from torch import nn

    from csqcli.system.progress import Display


class Evaluation(TypedDict):
    """What :func:`evaluate` measures."""

    top1: float  # percent
    top5: float  # percent
    top1_present: float | None  # percent, among the classes of the data alone; None where the model has no others
    samples: int  # images
    mean_bits: float  # planes per weight element; 32 of a float model


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
        "display": display_of(progress),
    }
    if model is not None:
        from csqcli.recipe.resolve import preprocessing

        prepared = preprocessing(together({"data.input_size": input_size}, settings))
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
            display=display_of(progress),
        )
    return describe(target_path) if form in registry.CARDS else build(manifest)


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


def _evaluation(accuracy: Any, mean_bits: float) -> Evaluation:
    return Evaluation(
        top1=accuracy.top1,
        top5=accuracy.top5,
        top1_present=accuracy.top1_present,
        samples=accuracy.samples,
        mean_bits=mean_bits,
    )
