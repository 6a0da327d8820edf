"""One run: the model, its images and loaders, and what is known of it; everything that its phases share."""

from __future__ import annotations

import functools
import itertools
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from csqcli.data.loaders import LoaderSettings, make_loader
from csqcli.data.splits import DataSet, Images
from csqcli.data.transforms import choose_augment
from csqcli.errors import UserError
from csqcli.file.manifest import AccuracyRecord, ModelRecord
from csqcli.models.coverage import Operations, count_macs
from csqcli.models.data_config import usable_config
from csqcli.quant import activations
from csqcli.quant.activation_widths import find_widths
from csqcli.quant.activations import ActivationQuantizers, ActivationRecord
from csqcli.quant.layers import FloatTensor, Layer, find_layers
from csqcli.quant.method_settings import GateSettings, PTQSettings
from csqcli.quant.methods.base import WeightMethod
from csqcli.quant.names import FLOAT_BITS
from csqcli.recipe.schema import ZEROQ, Recipe
from csqcli.reporting.words import near_chance
from csqcli.system import distributed
from csqcli.system.distributed import Shard
from csqcli.system.progress import Display, counted, planes_fixed
from csqcli.training.distilled_images import DISTILLED_BATCH, distill_images
from csqcli.training.evaluate import check_scores, evaluate
from csqcli.training.inputs import warn_of_last_bits, weights_hash
from csqcli.training.latencies import Latencies
from csqcli.training.limits import Ways
from csqcli.training.run_folder import RunFolder
from csqcli.training.run_state import RunRecord, RunState
from csqcli.training.teacher import Teacher
from csqcli.version import __version__


@dataclass
class ShippedSize:
    """A budget in bytes: of the file that ships, in the form that was asked for."""

    asked: int
    others: int  # bytes of it that are not integers
    table: list[list[int]]  # [layers][planes 0 … n]: bytes of a layer's codes, of the weights before the search

    @property
    def allowed(self) -> int:
        """Bytes that the integers may take."""
        return self.asked - self.others


@dataclass
class Run:
    """Everything that the phases of one run share. A context manager: leaving it ends the loaders' worker processes."""

    recipe: Recipe
    folder: RunFolder
    display: Display
    model: nn.Module
    images: DataSet
    config: dict[str, Any]
    source: ModelRecord
    record: RunRecord = field(default_factory=RunRecord)
    saved: RunState | None = None  # the state to go on from, until a phase took it
    activations: ActivationQuantizers | None = None
    teacher: Teacher | None = None
    operations: Operations | None = None
    planes_told: bool = False
    ships: ShippedSize | None = None  # of a budget in bytes
    searched: WeightMethod | None = None  # the search's method and its state, for the finetune that follows it
    importance: tuple[str | None, torch.Tensor] | None = None  # of planes, and whose, where a shared start has it

    def __post_init__(self) -> None:
        self.device, self.shard = self.folder.device, self.folder.shard
        if self.recipe.threads is not None:
            torch.set_num_threads(self.recipe.threads)
        self._know_inputs()
        self.model = self.model.to(self.device)
        self._choose_optimizer()
        recipe = self.recipe
        # bounds that are off, as the model came
        self.unbounded = {
            name for name, buffer in self.model.named_buffers(remove_duplicate=False) if bool(buffer.isinf().all())
        }
        auto = recipe.channels_last == "auto" and (self.device.type == "cuda" or _is_depthwise(self.model))
        self.channels_last = recipe.channels_last == "on" or auto
        if self.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if recipe.data.calib == ZEROQ:
            self.images = replace(self.images, train=distributed.from_main(self._distilled()))
        self._make_loaders()
        state = self.folder.load_state()
        if state is not None and self.shard.is_main:
            warn_of_last_bits(state.inputs, self.folder.inputs)
        self.take(state)

    def _make_loaders(self) -> None:
        """Those of training, of calibration and of evaluation; what images there are is said."""
        recipe, settings = self.recipe, self.recipe.data
        train, val = self.images.train, self.images.val
        assert train is not None
        augment = choose_augment(settings.augment, self.images, self.config)
        self.display.say(
            f"{self.source.source} on {self.images.source}: {len(train):,} training and "
            f"{counted(len(val), 'validation image')}, {counted(len(self.images.present or self.images.classes), 'class')}"
        )
        shared = functools.partial(
            LoaderSettings, workers=settings.workers, seed=recipe.seed, device=self.device, shard=self.shard
        )
        training = shared(training=True, batch_size=settings.batch_size, augment=augment)
        self.train_loader = make_loader(train, self.config, training)
        # where nothing is trained, ranges are those of images as they will come, without augmentation
        as_they_come = not recipe.card.trains and not recipe.finetune.epochs and augment != "none"
        plain = replace(training, augment="none")
        self.calibration_loader = make_loader(train, self.config, plain) if as_they_come else self.train_loader
        held_out = shared(training=False, batch_size=settings.eval_batch_size)
        self.val_loader = make_loader(val, self.config, held_out)
        whole = replace(held_out, shard=Shard())  # for the main process, which alone reads the written file back
        self.whole_val_loader = make_loader(val, self.config, whole) if self.shard.world > 1 else self.val_loader

    def _choose_optimizer(self) -> None:
        """What the recipe leaves open of the optimizer follows from the network's norms."""
        asked = self.recipe.optimizer
        adamw = _is_layer_norm_network(self.model) and not issubclass(self.recipe.card.settings, GateSettings)
        found = asked.chosen(adamw=adamw)
        self.recipe = self.recipe.model_copy(update={"optimizer": found})
        if asked.name == "auto" and found.name == "adamw":
            self.display.say(
                f"optimizer adamw at {found.lr:g}: a network of LayerNorm (--set optimizer.name=momentum is SGD)"
            )

    def _distilled(self) -> Images | None:
        """The calibration images of a recipe that has none; the main process makes them."""
        if not self.shard.is_main:
            return None
        ptq = self.recipe.method_settings
        assert isinstance(ptq, PTQSettings)
        batches = -(-ptq.zeroq_images // DISTILLED_BATCH)
        with self.display.step("distilling calibration images", batches * ptq.zeroq_steps) as tell:
            return distill_images(
                self.model,
                self.config,
                count=ptq.zeroq_images,
                steps=ptq.zeroq_steps,
                seed=self.recipe.seed,
                device=self.device,
                on_step=tell,
            )

    def _know_inputs(self) -> None:
        """What the folder could not know of the run's inputs before there was a model."""
        inputs = self.folder.inputs
        inputs.checkpoint_sha256 = self.source.checkpoint_sha256
        inputs.weights_sha256 = "" if self.source.weights_from == "random" else weights_hash(self.model)
        inputs.threads, inputs.device = torch.get_num_threads(), self.device.type

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for loader in (self.train_loader, self.calibration_loader, self.val_loader, self.whole_val_loader):
            loader.close()

    def take(self, state: RunState | None) -> None:
        """Go on from a saved state: what the run knew then is known again; its phase restores the rest."""
        self.saved = state
        if state is not None:
            self.record = state.record.model_copy(deep=True)
            if self.recipe.data.micro_batch != "auto":  # found once per run: parts change what BatchNorm sees
                self.record.step_images = None

    @property
    def past_search(self) -> bool:
        """Whether a resumed run's search is complete already."""
        return self.saved is not None and self.saved.phase == "finetune"

    @property
    def latencies(self) -> Latencies | None:
        """What a budget in milliseconds counts with."""
        return self.record.latencies

    @property
    def ways(self) -> Ways | None:
        """The ways through the network, where a layer may lose its last plane."""
        return self.record.ways

    @property
    def target_bits(self) -> float | None:
        return self.recipe.quantization.target_bits

    def epochs_after(self, phase: str) -> int:
        """Epochs of the phases that follow one."""
        quantizes = self.recipe.card.name != "float"
        after = {"float": self.recipe.epochs, "search": 0, "finetune": 0}[phase]
        return after + (self.recipe.finetune.epochs if phase != "finetune" and quantizes else 0)

    def tell_planes(self, method: WeightMethod, delivered: Sequence[int] | None = None) -> None:
        """Say once which planes a search found, as soon as they are fixed."""
        if self.planes_told or not method.searches_planes:
            return
        planes = delivered if delivered is not None else method.fixed_planes()
        if planes is not None:
            self.planes_told = True
            self.display.say(planes_fixed(planes, method.plan.budget.mean_planes(planes), self.target_bits))

    def keep_teacher(self, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Distillation follows the model as it is now, or with other ``weights``, if anything trains."""
        distill, features = self.recipe.optimizer.distill, self.recipe.optimizer.distill_features
        trains = self.recipe.card.trains or self.recipe.finetune.epochs > 0
        if trains and (distill or features):
            self.teacher = Teacher(self.model, distill=distill, features=features, weights=weights)

    def check_scores(self) -> None:
        """Before anything is spent on the model: UserError unless it gives one score per class."""
        check_scores(self.model, self.config["input_size"], self.images.num_classes, where=self.source.source)

    def measure_float(self) -> None:
        """Accuracy of the model as it is before the search; a resumed run has it."""
        if self.saved is None:
            with self.display.evaluation("evaluating the float model", self.val_loader.batches) as tell:
                measured = evaluate(self.model, self.val_loader, present=self.images.present, on_batch=tell)
            self.record.accuracy = AccuracyRecord(
                float_top1=measured.top1, float_top1_present=measured.top1_present, samples=measured.samples
            )
        self.tell_float()

    def tell_float(self) -> None:
        """Say the accuracy of the model before the search."""
        accuracy = self.record.accuracy
        present = accuracy.float_top1_present
        among = f", {present:.2f} % among the data's classes," if present is not None else ""
        self.display.say(
            f"float top-1 {accuracy.float_top1:.2f} %{among} on {counted(accuracy.samples, 'image')} "
            f"({self.source.weights_from} weights)"
        )
        chance = 100 / max(self.images.num_classes, 1)
        fresh = self.source.weights_from == "random" or self.recipe.model.head == "new"
        if not fresh and (accuracy.float_top1 or 0.0) <= near_chance(chance):
            what = f"which is about chance ({chance:.3g} %)"
            self.display.say(f"{what}: are the data's classes those that the weights were trained on, in this order?")

    def find_layers(self) -> tuple[list[Layer], list[FloatTensor]]:
        """Weights to quantize, none for the method `float`, and the tensors left float."""
        if self.recipe.quantization.method == "float":
            return [], []
        layers, left = find_layers(self.model, exclude=self.recipe.layers.exclude)
        self.display.say(
            f"{counted(len(layers), 'weight tensor')}, {counted(sum(layer.weights for layer in layers), 'weight')}"
        )
        return layers, left

    def count_operations(self, layers: Sequence[Layer]) -> None:
        """Multiply-accumulates of one image, layer by layer. UserError unless the model gives one score per class."""
        self.check_scores()
        with self.display.step("counting multiply-accumulates"):
            self.operations = count_macs(self.model, layers, self.config["input_size"])
        unused = [layer for layer in layers if self.operations.macs[layer.name] is None]
        if unused:
            self.display.say(
                f"{len(unused)} of them, {sum(layer.weights for layer in unused):,} weights, take part in no operation of an "
                f"evaluation but in the budget: {unused[0].name}{', …' if len(unused) > 1 else ''}"
            )

    def quantize_activations(self) -> None:
        """Calibrated on the first training batches, before any weight is rounded."""
        settings = self.recipe.quantization
        if settings.act_bits == FLOAT_BITS:
            return
        hooked, _ = find_layers(self.model, exclude=self.recipe.layers.exclude)
        bits = self._searched_widths(hooked) if settings.act_bits == "auto" else settings.act_bits
        with self.display.step("calibrating activations"):
            self.activations = activations.calibrate(
                self.model,
                hooked,
                self._calibration_images(),
                bits=bits,
                method=settings.act_method,
                untrained=self._is_untrained,
            )
        # signs too: a shard may lack the rare negative values
        self.activations.take(distributed.from_main(self.activations.records()))
        missed = self.activations.unreached
        note = f"; not reached by a hook: {', '.join(missed)}" if missed else ""
        widths = "/".join(map(str, sorted({quantizer.bits for quantizer in self.activations.quantizers.values()})))
        found = self.record.mean_act_bits
        mean = f", {found:.2f} of {settings.target_act_bits:g} in the mean" if found else ""
        self.display.say(
            f"{counted(len(self.activations.quantizers), 'activation quantizer')} of {widths} bits{mean}{note}"
        )

    def attach_activations(self, records: Sequence[ActivationRecord], *, method: str) -> None:
        """The quantizers of a file, to be trained on."""
        self.activations = activations.attach(self.model, records, method=method)
        images = next((images for images in self._calibration_images() if len(images)), None)
        if images is not None:
            self.activations.count_image_values(self.model, images)

    def _searched_widths(self, layers: Sequence[Layer]) -> Mapping[str, int]:
        settings = self.recipe.quantization
        assert settings.target_act_bits is not None
        with self.display.step("measuring which layers' inputs matter"):
            found = find_widths(
                self.model,
                layers,
                self._calibration_images,
                target=settings.target_act_bits,
                per=settings.act_per,
                macs=self.operations.macs if self.operations is not None else None,
                method=settings.act_method,
                seed=self.recipe.seed,
                untrained=self._is_untrained,
            )
        found = distributed.from_main(found)
        self.record.mean_act_bits = found.mean
        return found.bits

    @property
    def _is_untrained(self) -> bool:
        adaptation = self.record.adaptation
        learned = adaptation is not None and adaptation.kept == "adapted"
        return not learned and is_untrained(self.recipe, self.source.weights_from)

    def _calibration_images(self) -> Iterator[torch.Tensor]:
        return (images for images, _ in self.calibration_batches())

    def calibration_batches(self) -> Any:
        """The first training batches: as the first epoch sees them, or without augmentation where nothing is trained."""
        return itertools.islice(self.calibration_loader.epoch(0), activations.CALIBRATION_BATCHES)

    def untracked(self) -> dict[str, torch.Tensor]:
        """Buffers that a file may lack (old checkpoints have no num_batches_tracked)."""
        return {k: v for k, v in self.model.state_dict().items() if k.endswith("num_batches_tracked")}

    def replica(self) -> Any:
        """What training calls in place of the model: data-parallel (one number per weight is averaged), compiled, or None."""
        replica: Any = None
        if self.shard.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            replica = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        if self.recipe.compile:
            if self.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
                raise UserError("no C++ compiler", where="compile", hint="install one, or leave compile off")
            replica = torch.compile(self.model if replica is None else replica)
        return replica


def is_untrained(recipe: Recipe, weights_from: str) -> bool:
    """Whether a network as it comes may have no statistics yet, and training will find them. Unlike a recipe that is from scratch, one
    whose float epochs were not kept leaves it without."""
    fresh = weights_from in ("random", "factory") and recipe.model.warm_start is None
    return fresh and recipe.card.trains and recipe.batchnorm != "frozen"


def _is_layer_norm_network(model: nn.Module) -> bool:
    """Whether its norms are LayerNorms, timm's own among them, and none is a BatchNorm."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | _BatchNorm)]
    return bool(norms) and not any(isinstance(norm, _BatchNorm) for norm in norms)


def _is_depthwise(model: nn.Module) -> bool:
    """Whether it has convolutions of one input channel per filter, which run faster in channels_last on a CPU too."""
    return any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in model.modules())


def data_config(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The model's own data config with what the recipe says otherwise. UserError where batches cannot be made from it."""
    settings = recipe.data
    changed = dict(config)
    for key in ("mean", "std", "interpolation", "crop_pct"):
        value = getattr(settings, key)
        if value is not None:
            changed[key] = value
    for key in ("mean", "std"):
        if len(changed[key]) not in (1, config["input_size"][0]):
            what = f"{len(changed[key])} values for images of {config['input_size'][0]} channels"
            raise UserError(what, where=f"data.{key}", hint="give one, or one per channel")
    if settings.input_size is not None:
        changed["input_size"] = (config["input_size"][0], settings.input_size, settings.input_size)
    return usable_config(changed, where="recipe")


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "csq": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }
