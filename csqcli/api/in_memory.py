"""Functions of the Python API for a model in its caller's memory: quantize it, and save what was quantized or trained there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csqcli.api.arguments import Report, display_of
from csqcli.errors import UserError
from csqcli.system.callers import preserve_global_state

if TYPE_CHECKING:
    from torch import nn

    from csqcli.quant.layerwise import Quantized
    from csqcli.quant.optimizer import QuantizedOptimizer


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
            display=display_of(progress),
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
