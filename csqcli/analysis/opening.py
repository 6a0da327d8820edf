"""Models and images for the commands that look and do not train. Nothing is written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.data.loaders import LoaderSettings, make_loader
from csqcli.data.specs import WORKERS, ValSplit
from csqcli.data.splits import DataSet, Images
from csqcli.data.transforms import choose_augment
from csqcli.file import io
from csqcli.file.io import QuantizedFile
from csqcli.file.loading import hard_model
from csqcli.file.manifest import Manifest
from csqcli.models.coverage import Operations, count_macs
from csqcli.models.spec import parse
from csqcli.quant import activations
from csqcli.quant.activation_widths import find_widths
from csqcli.quant.activations import CALIBRATION_BATCHES, ActivationQuantizers
from csqcli.quant.layers import FloatTensor, Layer, find_layers, layers_named
from csqcli.quant.names import FLOAT_BITS
from csqcli.recipe.schema import Recipe
from csqcli.system.device import pick_device
from csqcli.system.progress import Display, counted
from csqcli.training.evaluate import check_scores
from csqcli.training.labels import open_held_out, with_labels_of
from csqcli.training.latencies import Latencies
from csqcli.training.limits import Ways, measure_ways
from csqcli.training.opening import check_task, open_images, open_model
from csqcli.training.run import ShippedSize, data_config, is_untrained


@dataclass
class Opened:
    """A model on its device, its layers, and batches of images with labels."""

    source: str  # as messages call the model
    model: nn.Module
    layers: list[Layer]
    batches: list[tuple[Tensor, Tensor]]  # images [B, C, H, W] and labels [B], on the model's device
    config: dict[str, Any]  # how images are prepared
    images: DataSet
    left_float: list[FloatTensor] = field(default_factory=list)
    operations: Operations | None = None
    activations: ActivationQuantizers | None = None
    ships: ShippedSize | None = None  # no file is in sight
    latencies: Latencies | None = None  # of a budget in milliseconds
    ways: Ways | None = None  # through the network, where layers may lose their last plane

    @property
    def device(self) -> torch.device:
        return self.batches[0][0].device


def open_for_search(recipe: Recipe, display: Display) -> Opened:
    """The float model and the batches that a search by this recipe calibrates on: the first ones of its training."""
    opened = _opened(recipe, display, calibrating=True)
    batches = opened.batches
    opened.ways = measure_ways(recipe, opened.model, opened.layers, lambda: batches[0][0], display=display)
    return opened


def open_for_looking(recipe: Recipe, display: Display, *, images: int) -> Opened:
    """The float model that a recipe names, and so many validation images."""
    return _opened(recipe, display, calibrating=False, limit=images)


def _opened(recipe: Recipe, display: Display, *, calibrating: bool, limit: int | None = None) -> Opened:
    spec = parse(recipe.model.source or "", recipe.model.arguments)
    check_task(spec)
    device = pick_device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with display.step(f"listing the images of {recipe.data.source}"):
        data = open_images(recipe, train=calibrating)
    torch.manual_seed(recipe.seed)
    with display.step(f"loading {spec.source}"):
        fitted = open_model(recipe, data)
    for line in fitted.loaded.lines:
        display.say(line)
    data = data.relabelled(fitted.outputs, fitted.names)
    config = data_config(fitted.loaded.data_config, recipe)
    model = fitted.loaded.model.to(device)
    check_scores(model, config["input_size"], data.num_classes, where=spec.source)
    layers, left = find_layers(model, exclude=recipe.layers.exclude)
    display.say(f"{spec.source}: {counted(len(layers), 'weight tensor')} ({fitted.loaded.weights_from} weights)")
    settings = LoaderSettings(
        training=calibrating,
        batch_size=recipe.data.batch_size if calibrating else recipe.data.eval_batch_size,
        augment=choose_augment(recipe.data.augment, data, config) if calibrating else "none",
        workers=recipe.data.workers,
        seed=recipe.seed,
        device=device,
    )
    split = data.train if calibrating else data.val
    assert split is not None
    batches = _batches(
        split.limited(limit), config, settings, display, most=CALIBRATION_BATCHES if calibrating else None
    )
    opened = Opened(spec.source, model, layers, batches, config, data, left)
    opened.operations = count_macs(model, layers, config["input_size"])
    if recipe.quantization.act_bits != FLOAT_BITS and calibrating:
        untrained = is_untrained(recipe, fitted.loaded.weights_from)
        opened.activations = _activations(opened, recipe, display, untrained=untrained)
    return opened


def _activations(opened: Opened, recipe: Recipe, display: Display, *, untrained: bool) -> ActivationQuantizers:
    """The inputs of layers rounded as the search would round them; ``untrained`` is as in `activations.calibrate`."""
    settings, bits, model, layers = recipe.quantization, recipe.quantization.act_bits, opened.model, opened.layers

    def images() -> Iterator[Tensor]:
        return (pixels for pixels, _ in opened.batches)

    if bits == "auto":
        assert settings.target_act_bits is not None
        with display.step("measuring which layers' inputs matter"):
            found = find_widths(
                model,
                layers,
                images,
                target=settings.target_act_bits,
                per=settings.act_per,
                macs=opened.operations.macs if opened.operations is not None else None,
                method=settings.act_method,
                seed=recipe.seed,
                untrained=untrained,
            )
    with display.step("calibrating activations"):
        return activations.calibrate(
            model,
            layers,
            images(),
            bits=found.bits if bits == "auto" else bits,
            method=settings.act_method,
            untrained=untrained,
        )


def _batches(
    split: Images, config: dict[str, Any], settings: LoaderSettings, display: Display, *, most: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    loader = make_loader(split, config, settings)
    try:
        with display.step("reading images", min(loader.batches, most or loader.batches)) as tell:
            found = []
            for batch in itertools.islice(loader.epoch(0), most):
                found.append(batch)
                tell(len(found))
    finally:
        loader.close()
    return [batch for batch in found if len(batch[1])]


@dataclass
class OpenedFile:
    """A quantized file's hard model on its device, and so many validation images."""

    file: QuantizedFile
    model: nn.Module
    layers: list[Layer]  # in the file's order
    batches: list[tuple[Tensor, Tensor]]
    images: DataSet


def open_quantized(
    path: Path,
    data: str,
    *,
    images: int | None,
    device: str = "auto",
    batch_size: int = 256,
    workers: int = WORKERS,
    val_split: ValSplit = None,
    trust_code: bool = False,
    display: Display,
) -> OpenedFile:
    """The hard model of a safetensors file that csq wrote, BatchNorm and activation quantizers as they are in it."""
    with display.step(f"loading {path}"):
        file = io.read(path)
        model = hard_model(file, trust_code=trust_code, where=str(path)).to(pick_device(device))
    batches, found = images_for(
        file.manifest,
        path,
        data,
        images=images,
        device=device,
        batch_size=batch_size,
        workers=workers,
        val_split=val_split,
        display=display,
    )
    layers = layers_named(model, [layer.name for layer in file.layers])
    return OpenedFile(file, model, layers, batches, found)


def images_for(
    manifest: Manifest,
    path: Path,
    data: str,
    *,
    images: int | None,
    device: str,
    batch_size: int,
    workers: int,
    val_split: ValSplit,
    display: Display,
) -> tuple[list[tuple[Tensor, Tensor]], DataSet]:
    """So many validation images of a source as the file's model takes them, in batches, and where they are from."""
    check_task(manifest.spec)
    with display.step(f"listing the images of {data}"):
        found = open_held_out(manifest, data, val_split=val_split, val_limit=images)
        found = with_labels_of(manifest, found, where=str(path))
    settings = LoaderSettings(training=False, batch_size=batch_size, workers=workers, device=pick_device(device))
    return _batches(found.val, manifest.data_config, settings, display), found


def shares_of(costs: Sequence[int]) -> list[float]:
    """Each cost as a share of their sum; zeros where that is 0."""
    total = sum(costs)
    return [cost / total if total else 0.0 for cost in costs]
