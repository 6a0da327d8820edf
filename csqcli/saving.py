"""From a model trained in somebody's own loop to a quantized file, top to bottom.

What `csq search` does at the end of a run, for callers who have a model and its optimizer and no recipe: hard weights,
BatchNorm, manifest, write, read back, compare, publish. The model and the optimizer are left as they were, so that a run
can be saved at any step and go on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from csqcli.errors import FORWARD_ERRORS, UserError, cannot_run, did_you_mean, first_problem
from csqcli.exporting import verify
from csqcli.exporting.verify import ParityError
from csqcli.file import header, io, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import AccuracyRecord, Manifest, ModelRecord
from csqcli.models import libraries as sources
from csqcli.models.checkpoints import is_damaged
from csqcli.models.coverage import count_macs, example_inputs
from csqcli.models.data_config import usable_config
from csqcli.models.spec import ModelSpec, parse
from csqcli.quant import activations, basis
from csqcli.quant.hard_layer import HardLayer, spread
from csqcli.quant.layers import FloatTensor, Layer, find_layers
from csqcli.quant.layerwise import Quantized
from csqcli.quant.optimizer import CSQ, QuantizedOptimizer
from csqcli.quant.passes.rounding import levels_of, nearest_level
from csqcli.quant.wrappers import unwrap
from csqcli.training.evaluate import recalibrate_batchnorm
from csqcli.training.run import environment

_RECALIBRATION_BATCHES = 100  # at most, of the loader given
_PROBE_IMAGES = 2
_LEAST_ALIKE = 0.5  # cosine of a copy's weights to the trained ones: averages have about 1, unrelated networks about 0
_NARROW_TOLERANCE = 0.1  # of the outputs' standard deviation: a half-precision model against its float32 file


@torch.no_grad()
def save_model(
    model: nn.Module,
    optimizer: QuantizedOptimizer | Quantized,
    path: Path,
    *,
    source: str,
    num_classes: int,
    arguments: Mapping[str, Any] | None = None,
    data_config: Mapping[str, Any] | None = None,
    loader: Iterable[Any] | None = None,
    classes: Sequence[str] | None = None,
    accuracy: float | Mapping[str, float] | None = None,
) -> Manifest:
    """Write the quantized file of ``model`` and return its manifest; see :func:`csqcli.save` for the arguments."""
    if not isinstance(source, str):
        what = f"source must be text, not a {type(source).__name__}"
        raise UserError(what, where="csqcli.save", hint="name it: timm:resnet18, or package.module:factory")
    if not isinstance(optimizer, (QuantizedOptimizer, Quantized)):
        what = f"the optimizer must be a csqcli.CSQ, or what csqcli.quantize returned, not a {type(optimizer).__name__}"
        raise UserError(what, where="csqcli.save", hint="train with csqcli.CSQ(model, …), and give that")
    network = unwrap(model)
    device = _device(network)
    with torch.random.fork_rng(
        [device] if device.type == "cuda" else []
    ):  # the caller's stream goes on as if nothing was
        return _save(
            network,
            optimizer,
            path,
            spec=_importable(source, arguments),
            num_classes=num_classes,
            data_config=data_config,
            loader=loader,
            classes=classes,
            accuracy=accuracy,
        )


def _save(
    network: nn.Module,
    optimizer: QuantizedOptimizer | Quantized,
    path: Path,
    *,
    spec: ModelSpec,
    num_classes: int,
    data_config: Mapping[str, Any] | None,
    loader: Iterable[Any] | None,
    classes: Sequence[str] | None,
    accuracy: float | Mapping[str, float] | None,
) -> Manifest:
    """As :func:`save_model`, of a network out of its wrappers and a source that another program can import."""
    source, record = spec.source, _record(spec, num_classes)
    if classes is not None and len(classes) != num_classes:
        raise UserError(f"{len(classes)} class names for {num_classes} classes", where="csqcli.save")
    measured = _accuracy(accuracy)
    _check_finite(network)
    trusted = spec.library == "factory"  # the caller has named it
    rebuilt = loading.architecture(
        spec, num_classes=num_classes, state=network.state_dict(), trust_code=trusted, where=source
    ).to(_device(network))
    _check_architecture(rebuilt, network, where=source)
    config = usable_config(data_config or sources.data_config(network, spec), where=source)
    found, left = find_layers(network)
    pairs = _delivered(found, optimizer)
    names = {layer.name for layer, _ in pairs}
    left += [
        FloatTensor(layer.name, tuple(layer.parameter.shape), "not given to the optimizer")
        for layer in found
        if layer.name not in names
    ]
    with _on_hard_weights(network, pairs):
        if loader is not None:
            batches = _Batches(loader, network)
            recalibrate_batchnorm(network, batches, epoch=0, batches=_RECALIBRATION_BATCHES)  # type: ignore[arg-type]
        size, task = config["input_size"], sources.task_of(spec)
        expected = _outputs(network, task, size, where=source)
        _check_scores(expected, num_classes, task, where=source)
        file = io.assemble(
            network,
            [hard for _, hard in pairs],
            record=record,
            data_config=config,
            target_bits=optimizer.method.plan.budget.target if pairs else None,
            operations=count_macs(network, [layer for layer, _ in pairs], size, task=task),
            classes=list(classes or ()),
            accuracy=measured,
            activations=loading.activation_entries(activations.records_of(activations.attached(network))),
            left_float=[vars(tensor) for tensor in left],
            environment=environment(),
            recipe=_recipe(optimizer),
        )
    _check_within_target(file.manifest)
    loading.load_into(rebuilt.eval(), file, where=source)
    answers = _outputs(rebuilt, task, size, where=source)
    _check_answers(answers, expected, network, where=source)  # so that nothing is written that cannot be loaded
    with verify.candidate(path) as candidate:
        io.write(candidate, file)
        _check_written(candidate, file)
        loading.load_into(rebuilt, io.read(candidate), where=str(path))
        _check_answers(_outputs(rebuilt, task, size, where=source), answers, network, where=str(path))
    return header.read_manifest(path)


def _record(spec: ModelSpec, num_classes: int) -> ModelRecord:
    """What the manifest says of the architecture. UserError for a number of classes that is none."""
    try:
        return ModelRecord(
            source=spec.source,
            library=spec.library,
            name=spec.name,
            arguments=spec.arguments,
            num_classes=num_classes,
            weights_from="training loop",
        )
    except ValidationError as error:
        what = first_problem(error).message
        raise UserError(f"num_classes {num_classes!r}: {what}", where="csqcli.save") from None


def _check_within_target(manifest: Manifest) -> None:
    """UserError where the layers have more planes in the mean than their optimizer was asked for."""
    mean, target = manifest.budget.mean_bits, manifest.budget.target_mean_bits
    if target is not None and mean > target + 1e-9:
        what = f"its layers have {mean:.4f} planes in the mean, over the target of {target:g}"
        raise UserError(what, where="csqcli.save", hint="save with the optimizer that found them")


def _recipe(optimizer: QuantizedOptimizer | Quantized) -> dict[str, Any]:
    """What a recipe would say of the training, so that `csq finetune` goes on with the same method."""
    if not isinstance(optimizer, (CSQ, Quantized)):
        return {}
    asked = {"quantization": {"method": optimizer.method_name, "target_bits": optimizer.method.plan.budget.target}}
    if isinstance(optimizer, CSQ):
        return asked
    asked["quantization"]["act_bits"] = optimizer.act_bits
    return asked | {"epochs": 0, "finetune": {"epochs": 0}}


def _importable(source: str, arguments: Mapping[str, Any] | None) -> ModelSpec:
    spec = parse(source, arguments)
    if spec.library == "factory" and spec.name.startswith("__main__:"):
        hint = "put the factory into a module, and name it module:factory"
        raise UserError("another program cannot import from `__main__`", where=source, hint=hint)
    return spec


def _accuracy(given: float | Mapping[str, float] | None) -> AccuracyRecord:
    """A top-1 in percent, or any of AccuracyRecord's fields."""
    if not isinstance(given, Mapping):
        try:
            given = {} if given is None else {"hard_top1": float(given)}  # of a tensor of one number, too
        except (TypeError, ValueError, RuntimeError):
            what = f"accuracy: {given!r} is no number"
            raise UserError(what, where="csqcli.save", hint="give percent, or a mapping of several") from None
    fields = dict(given)
    for name in fields:
        if name not in AccuracyRecord.model_fields:
            known = list(AccuracyRecord.model_fields)
            hint = did_you_mean(name, known) or f"one of {', '.join(known)}"
            raise UserError(f"accuracy has no `{name}`", where="csqcli.save", hint=hint)
    try:
        return AccuracyRecord.model_validate(fields)
    except ValidationError as error:
        problem = first_problem(error)
        what = f"accuracy: {problem.message} (got {problem.given!r})"
        raise UserError(what, where="csqcli.save", hint="give percent") from None


def _check_finite(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if is_damaged(parameter):
            raise UserError("training left NaN or infinite values; nothing was written", where=name)


def _check_architecture(built: nn.Module, network: nn.Module, *, where: str) -> None:
    """UserError where what the source builds has other tensors than the network."""
    hint = "name the architecture that was trained, with its arguments and num_classes"
    theirs, ours = ({name: list(value.shape) for name, value in m.state_dict().items()} for m in (built, network))
    foreign = [name for name in theirs if name not in ours] + [name for name in ours if name not in theirs]
    if foreign:
        owner = "source" if foreign[0] in theirs else "model"
        what = f"builds another model: {len(foreign)} tensors differ in name, `{foreign[0]}` is the {owner}'s alone"
        raise UserError(what, where=where, hint=hint)
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise UserError(f"builds `{name}` of shape {theirs[name]}, the model has {shape}", where=where, hint=hint)


def _delivered(found: Sequence[Layer], optimizer: QuantizedOptimizer | Quantized) -> list[tuple[Layer, HardLayer]]:
    """The network's layers and what is delivered of each, under the names that they have in the network.

    A network that holds the optimizer's own weights, or holds them under other names, gets the hard layers as they are. A
    copy of it, as averages of weights are, gets its own weights, rounded to the planes and scales of the hard layers.
    """
    with optimizer.hard() as hard_layers:
        hard_layers = list(hard_layers)
    by_weight = {id(layer.parameter): layer for layer in found}
    by_name = {layer.name: layer for layer in found}
    pairs, copies = [], {}
    for index, (trained, hard) in enumerate(zip(optimizer.method.layers, hard_layers, strict=bool(hard_layers))):
        layer = by_weight.get(id(trained.parameter))
        if layer is None:
            layer = by_name.get(trained.name)
            if layer is None or layer.parameter.shape != trained.parameter.shape:
                what = f"the model has no weight `{trained.name}` of shape {list(trained.parameter.shape)}"
                hint = "save the model that the optimizer was built over, or an average of it"
                raise UserError(what, where="csqcli.save", hint=hint)
            hard = _rounded(hard, layer)
            copies[index] = layer
        pairs.append((layer, replace(hard, name=layer.name, aliases=layer.aliases)))
    if copies:
        _check_trained(copies, optimizer)
    return pairs


def _check_trained(copies: Mapping[int, Layer], optimizer: QuantizedOptimizer | Quantized) -> None:
    """UserError where weights that are not the optimizer's own resemble neither its unrounded nor its current ones.

    ``copies`` has layers of the network by their index in the method.
    """
    current = [layer.parameter.detach() for layer in optimizer.method.layers]
    alike = []
    for trained in (optimizer.method.unrounded(), current):
        if trained is not None:
            product = ours = theirs = 0.0
            for index, layer in copies.items():
                own, other = layer.parameter.detach().float().cpu(), trained[index].float().cpu()
                product += float((own * other).sum())
                ours, theirs = ours + float(own.square().sum()), theirs + float(other.square().sum())
            alike.append(product / math.sqrt(ours * theirs) if ours * theirs else 1.0)
    if not max(alike) >= _LEAST_ALIKE:
        what = f"the model's weights are not those trained, nor an average of them (cosine {max(alike):.2f})"
        hint = "save the model that CSQ was built over; load weights before building it, without assign=True after"
        raise UserError(what, where="csqcli.save", hint=hint)


def _rounded(hard: HardLayer, layer: Layer) -> HardLayer:
    """The layer's own weight at the nearest integers that the hard layer's planes can form."""
    if hard.basis is not None:
        weight = layer.parameter.detach().float().cpu()
        return replace(hard, integers=basis.nearest(weight, hard.basis, hard.channel_dim))
    on = torch.nonzero(hard.mask).flatten()
    levels = levels_of(hard.mask[int(on[0]) if len(on) else 0 :])
    weight = layer.parameter.detach().float().cpu()
    unit = spread(hard.scale, weight, hard.channel_dim)
    ratio = torch.where(unit != 0, weight / unit, 0.0)
    return replace(hard, integers=nearest_level(ratio, levels).to(torch.int32))


@contextlib.contextmanager
def _on_hard_weights(network: nn.Module, pairs: Sequence[tuple[Layer, HardLayer]]) -> Iterator[None]:
    """Inside, the network is in eval mode on the delivered weights; its own values, buffers and modes come back."""
    values = [(tensor, tensor.clone()) for tensor in network.buffers()]
    values += [(layer.parameter.data, layer.parameter.detach().clone()) for layer, _ in pairs]
    modes = [(module, module.training) for module in network.modules()]
    try:
        for layer, hard in pairs:
            layer.parameter.data.copy_(hard.weight())
        network.eval()
        yield
    finally:
        for tensor, before in values:
            tensor.copy_(before)
        for module, training in modes:
            module.training = training


class _Batches:
    """Anybody's loader as BatchNorm's recalibration takes it."""

    def __init__(self, loader: Iterable[Any], network: nn.Module) -> None:
        self.loader, self.network = loader, network

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, None]]:
        for images in images_of(self.loader, self.network, where="csqcli.save"):
            yield images, None


def images_of(loader: Iterable[Any], network: nn.Module, *, where: str) -> Iterator[Tensor]:
    """The images of anybody's loader, with the device and dtype of the network. A batch is images, or a tuple, list or dict that
    begins with them. UserError where it is something else, and where there is none."""
    like, empty = next(network.parameters(), None), True
    if like is None:
        raise UserError("the model has no weight", where=where)
    if not isinstance(loader, Iterable):
        hint = "give batches of images, or of (images, labels)"
        raise UserError(f"the loader must be iterable, not a {type(loader).__name__}", where=where, hint=hint)
    for batch in loader:
        while not isinstance(batch, Tensor):
            if not isinstance(batch, (Sequence, Mapping)) or not batch or isinstance(batch, str):
                what = f"a batch of the loader holds {type(batch).__name__} where images should be"
                raise UserError(what, where=where, hint="give batches of images, or of (images, labels)")
            batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
        yield batch.to(like.device, like.dtype)
        empty = False
    if empty:
        raise UserError("the loader gives no batch", where=where, hint="an iterator is spent after one use")


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _outputs(network: nn.Module, task: str, input_size: Sequence[int], *, where: str) -> list[Tensor]:
    """Every floating tensor of the network's output for synthetic images, float32 and on the CPU."""
    like = next(network.parameters())
    try:
        output = network(*example_inputs(task, input_size, batch=_PROBE_IMAGES, device=like.device, dtype=like.dtype))
    except FORWARD_ERRORS as error:
        hint = "pass data_config with the input_size (channels, height, width) of your images"
        raise UserError(cannot_run(error, input_size), where=where, hint=hint) from error
    return [tensor.float().cpu() for tensor in _tensors(output) if tensor.is_floating_point()]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _check_scores(outputs: Sequence[Tensor], num_classes: int, task: str, *, where: str) -> None:
    """UserError where a classifier's single output is [images, scores] of another number of classes."""
    if task == "classification" and len(outputs) == 1 and outputs[0].dim() == 2:
        scores = outputs[0].shape[1]
        if scores != num_classes:
            raise UserError(f"the model gives {scores} scores, num_classes is {num_classes}", where=where)


def _check_answers(answers: list[Tensor], expected: list[Tensor], network: nn.Module, *, where: str) -> None:
    """ParityError when the model built from the file answers otherwise than the one in memory."""
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in network.parameters())
    tolerance = verify.FLOAT_TOLERANCE if exact else _NARROW_TOLERANCE
    same = [answer.shape for answer in answers] == [answer.shape for answer in expected]
    for ours, theirs in zip(expected, answers, strict=True) if same else ():
        if ours.numel():
            deviation = float(ours.std(correction=0))
            same = same and float((ours - theirs).abs().max()) <= tolerance * deviation + 1e-6
    if not same:
        what = "the model that the file builds answers otherwise than the one in memory, although every weight is equal"
        raise ParityError(what, where=where, hint="does the source build this architecture, with these arguments?")


def _check_written(path: Path, wanted: QuantizedFile) -> None:
    """ParityError when the file at ``path`` is not ``wanted``, bit for bit."""
    written = io.read(path)
    for layer, other in zip(written.layers, wanted.layers, strict=True):
        verify.check_layer(layer, other)
    verify.check_others(written.others, wanted.others)
