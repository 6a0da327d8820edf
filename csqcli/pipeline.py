"""search(), finetune() and evaluate(), top to bottom: the page to start reading at."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import logging
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy
import timm
import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

import csqcli
from csqcli import checkpoint_file, data, distributed, files, memory, sources
from csqcli import report as reports
from csqcli.checkpoint_file import AccuracyRecord, Manifest, ModelRecord, QuantizedFile
from csqcli.distributed import Shard
from csqcli.errors import UserError, did_you_mean, machine_fault
from csqcli.inspect import Operations, count_macs
from csqcli.interrupt import Interrupted, StopRequest
from csqcli.lock import locked
from csqcli.progress import Display
from csqcli.quant import activations, budget, csq
from csqcli.quant.activations import ActivationQuantizers
from csqcli.quant.latent import LatentUniform, StagedCSQ, StagedSettings
from csqcli.quant.layers import FloatTensor, Layer, find_layers, layers_named
from csqcli.quant.methods import Clock, GateMethod, GateSettings, HardLayer, WeightMethod
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups
from csqcli.recipe import Recipe, to_yaml
from csqcli.train import (
    Accuracy,
    NonFinite,
    Trainer,
    check_scores,
    evaluate,
    is_finite,
    logits_of,
    recalibrate_batchnorm,
)
from csqcli.untrusted import check_archive, check_tree, read_json

MODEL_FILE, REPORT_FILE, METRICS_FILE, RECIPE_FILE, RESUME_FILE, PREVIOUS_FILE = (
    "model.safetensors",
    "report.json",
    "metrics.jsonl",
    "recipe.yaml",
    "resume.pt",
    "resume.previous.pt",
)

log = logging.getLogger(__name__)

_CALIBRATION_BATCHES = 4
_MOST_ROLLBACKS = 3
_ASK_EVERY = 8  # steps after which several processes ask each other whether one was told to stop
_REPORT_VALUES = 2**22
_CLASSIFIERS_ONLY = "csq trains image classifiers; others with csqcli.CSQ in your own loop"


def search(
    recipe: Recipe,
    output: Path,
    *,
    display: Display,
    force: bool = False,
    resume: bool = False,
    images: data.DataSet | None = None,
) -> dict[str, Any]:
    """From a pretrained checkpoint to a quantized file and its report, written into ``output``; the report.

    ``recipe.finetune.epochs`` more epochs follow with the planes fixed. ``images`` spares callers who run many jobs the
    opening of ``recipe.data.source``. Raises UserError for anything wrong with the
    input; a folder with a finished run is refused without ``force``.
    """
    if recipe.model.source is None:
        raise UserError("no model given", hint="name one, e.g. `csq search resnet18 …`, or use a recipe that does")
    _check_target(recipe)
    _check_task(sources.parse(recipe.model.source, recipe.model.arguments))
    images = images or _open_images(recipe)
    with _OutputFolder(output, recipe, force=force, resume=resume) as folder:
        if folder.finished is not None:
            folder.finish()
            return folder.finished
        torch.manual_seed(recipe.seed)
        loaded = sources.load(
            recipe.model.source,
            num_classes=images.num_classes,
            pretrained=recipe.model.pretrained,
            checkpoint=recipe.model.checkpoint,
            arguments=recipe.model.arguments,
            num_classes_from=images.source,
        )
        record = ModelRecord(
            source=loaded.spec.source,
            library=loaded.spec.library,
            name=loaded.spec.name,
            arguments=loaded.spec.arguments,
            num_classes=images.num_classes,
            weights_from=loaded.weights_from,
            checkpoint_sha256=loaded.checkpoint_sha256,
        )
        job = _Job(recipe, folder, display, loaded.model, images, _overridden(loaded.data_config, recipe), record)
        if recipe.optimizer.distill:
            job.teacher = copy.deepcopy(job.model).eval().requires_grad_(False)
        with contextlib.closing(job):
            report = job.search()
            if recipe.finetune.epochs and recipe.quantization.method != "float":
                searched = checkpoint_file.read(folder.path / MODEL_FILE) if folder.shard.is_main else None
                report = job.finetune(distributed.from_main(searched))
        folder.finish()
    return report


def finetune(
    path: Path,
    recipe: Recipe,
    output: Path,
    *,
    display: Display,
    force: bool = False,
    resume: bool = False,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Train the integers of a quantized file on, masks fixed (Algorithm 1's second half); the report.

    Never delivers a worse model than it was given: the better of the two on the validation images is written, and
    ``report["finetune"]["kept"]`` says which.
    """
    file = checkpoint_file.read(path)
    if not file.layers:
        raise UserError("holds no quantized layer", where=str(path), hint="`csq search` writes one that does")
    if recipe.optimizer.distill:
        hint = "distill in the search itself (--finetune-epochs), or --set optimizer.distill=0"
        raise UserError("the float model to distill from is not in the file", where=str(path), hint=hint)
    _check_task(file.manifest.spec)
    images = _open_images(recipe)
    _check_classes(file.manifest, images, where=str(path))
    source = file.manifest.payload_sha256
    with _OutputFolder(output, recipe, force=force, resume=resume, source=source) as folder:
        if folder.finished is not None:
            folder.finish()
            return folder.finished
        torch.manual_seed(recipe.seed)
        model = csqcli._plain_model(file, trust_code=trust_code, where=str(path))
        config = _overridden(file.manifest.data_config, recipe)
        with contextlib.closing(_Job(recipe, folder, display, model, images, config, file.manifest.model)) as job:
            report = job.finetune(file)
        folder.finish()
    return report


def evaluate_file(
    path: Path,
    data_source: str,
    *,
    device: str = "auto",
    batch_size: int = 256,
    val_limit: int | None = None,
    trust_code: bool = False,
) -> tuple[Accuracy, Manifest]:
    """Accuracy of the hard model as the file holds it, with the preprocessing stored in it.

    ONNX files run in ONNX Runtime on the CPU, all others in torch on ``device``.
    """
    target = pick_device(device)
    model: nn.Module
    if path.suffix == ".onnx":
        from csqcli.export import runtime

        target = pick_device("cpu")
        model, manifest = runtime.open_model(path)
    else:
        file = checkpoint_file.read(path)
        manifest = file.manifest
        model = csqcli.model_from_file(file, trust_code=trust_code, where=str(path)).to(target)
    _check_task(manifest.spec)
    images = data.open_data(data_source, train=False, val_limit=val_limit)
    _check_classes(manifest, images, where=str(path))
    check_scores(model, manifest.data_config["input_size"], images.num_classes, where=str(path))
    settings = data.LoaderSettings(training=False, batch_size=batch_size, workers=2, device=target)
    return evaluate(model, data.make_loader(images.val, manifest.data_config, settings)), manifest


def pick_device(name: str) -> torch.device:
    """``auto`` → a GPU when there is one. UserError when one is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available", where="--device cuda", hint="use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "csq": csqcli.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }


@dataclass
class _Job:
    """One run: everything its phases share."""

    recipe: Recipe
    folder: _OutputFolder
    display: Display
    model: nn.Module
    images: data.DataSet
    config: dict[str, Any]
    record: ModelRecord
    history: list[dict[str, Any]] = field(default_factory=list)
    accuracy: AccuracyRecord = field(default_factory=AccuracyRecord)
    activations: ActivationQuantizers | None = None
    teacher: nn.Module | None = None
    rollbacks: int = 0  # each halves the learning rates
    input_top1: float | None = None  # percent, of the file that a finetune started from
    step_images: int | None = None  # per forward pass; None until it is known that they fit
    operations: Operations | None = None

    def __post_init__(self) -> None:
        recipe, settings = self.recipe, self.recipe.data
        self.device, self.shard = self.folder.device, self.folder.shard
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.model = self.model.to(self.device)
        auto = recipe.channels_last == "auto" and self.device.type == "cuda"
        self.channels_last = recipe.channels_last == "on" or auto
        if self.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        train, val = self.images.train, self.images.val
        assert train is not None
        augment = data.choose_augment(settings.augment, self.images, self.config)
        self.display.say(
            f"{self.record.source} on {self.images.source}: {len(train)} training and {len(val)} validation images, "
            f"{self.images.num_classes} classes"
        )
        shared = functools.partial(
            data.LoaderSettings, workers=settings.workers, seed=recipe.seed, device=self.device, shard=self.shard
        )
        training = shared(training=True, batch_size=settings.batch_size, augment=augment)
        self.train_loader = data.make_loader(train, self.config, training)
        held_out = shared(training=False, batch_size=settings.eval_batch_size)
        self.val_loader = data.make_loader(val, self.config, held_out)
        whole = replace(held_out, shard=Shard())  # for the main process, which alone reads the written file back
        self.whole_val_loader = data.make_loader(val, self.config, whole) if self.shard.world > 1 else self.val_loader
        self.saved = self.folder.load_state()
        self._take_saved()

    def close(self) -> None:
        """End the loaders' worker processes."""
        for loader in (self.train_loader, self.val_loader, self.whole_val_loader):
            loader.close()

    def _take_saved(self) -> None:
        if self.saved is not None:
            self.history, self.accuracy = self.saved["history"], AccuracyRecord(**self.saved["accuracy"])
            self.rollbacks, self.input_top1 = self.saved["rollbacks"], self.saved["input_top1"]
            if self.recipe.data.micro_batch == "auto":  # found once per run: parts change what BatchNorm sees
                self.step_images = self.saved["step_images"]

    def search(self) -> dict[str, Any]:
        """Measure the float model, search, deliver. Returns at once when a resumed run is past this phase."""
        if self.saved is not None and self.saved["phase"] == "finetune":
            return {}
        if self.saved is None:
            self._check_scores()
            measured = evaluate(self.model, self.val_loader)
            self.accuracy = AccuracyRecord(float_top1=measured.top1, samples=measured.samples)
        self.display.say(
            f"float top-1 {self.accuracy.float_top1:.2f} % on {self.accuracy.samples} images "
            f"({self.record.weights_from} weights)"
        )
        layers, left_float = self._layers(self.recipe.layers.exclude)
        self._count_operations(layers)
        self._quantize_activations()
        trainer = self._train("search", self.recipe, layers)
        left = [vars(tensor) for tensor in left_float]
        file, gap = self._write(trainer, left)
        return self._report(file, parity={"max_logit_gap": gap})

    def finetune(self, start: QuantizedFile) -> dict[str, Any]:
        """Train ``start``'s integers on and deliver the better of the two."""
        recipe = self.recipe.model_copy(deep=True)
        recipe.epochs = self.recipe.finetune.epochs
        recipe.optimizer.lr = self.recipe.finetune.lr or 0.4 * self.recipe.optimizer.lr
        self.model.load_state_dict(start.state_dict() | self._untracked())
        if self.activations is None and start.manifest.activations:
            method = recipe.quantization.act_method
            self.activations = activations.attach(self.model, start.manifest.activation_records(), method=method)
        self._check_scores()
        if self.saved is None or self.saved["phase"] == "search":
            before = evaluate(self.model, self.val_loader)
            self.input_top1 = before.top1
            self.accuracy = start.manifest.accuracy.model_copy(update={"samples": before.samples, "soft_top1": None})
            self.saved = None
        input_top1 = self.input_top1 or 0.0
        self.display.say(f"finetune from top-1 {input_top1:.2f} % at {start.manifest.budget.mean_bits:.4f} bits")
        layers = layers_named(self.model, [layer.name for layer in start.layers])
        self._count_operations(layers)
        trainer = self._train("finetune", recipe, layers, start=start.layers)
        file, gap = self._write(trainer, start.manifest.left_float, at_least=input_top1)
        after = self.accuracy.hard_top1 or 0.0
        kept = "finetuned" if after >= input_top1 else "input"
        if kept == "input":
            update = {"hard_top1": input_top1, "samples": self.accuracy.samples}
            self.accuracy = start.manifest.accuracy.model_copy(update=update)
            start.manifest.accuracy, start.manifest.sizes.file_bytes, gap = self.accuracy, None, 0.0
            if self.shard.is_main:
                checkpoint_file.write(self.folder.path / MODEL_FILE, start)
            file = start
        self.display.say(f"finetuned top-1 {after:.2f} %, input {input_top1:.2f} %: kept the {kept} model")
        outcome = {"input_top1": input_top1, "finetuned_top1": after, "kept": kept}
        return self._report(file, parity={"max_logit_gap": gap}, finetune=outcome)

    def _check_scores(self) -> None:
        """Before anything is spent on the model."""
        check_scores(self.model, self.config["input_size"], self.images.num_classes, where=self.record.source)

    def _count_operations(self, layers: Sequence[Layer]) -> None:
        self.operations = count_macs(self.model, layers, self.config["input_size"])
        unused = [layer for layer in layers if self.operations.macs[layer.name] is None]
        if unused:
            self.display.say(
                f"{len(unused)} of them, {sum(layer.weights for layer in unused):,} weights, take part in no operation of an "
                f"evaluation but in the budget: {unused[0].name}, …"
            )

    def _layers(self, exclude: Sequence[str]) -> tuple[list[Layer], list[FloatTensor]]:
        if self.recipe.quantization.method == "float":
            return [], []
        layers, left = find_layers(self.model, exclude=exclude)
        self.display.say(f"{len(layers)} weight tensors, {sum(layer.weights for layer in layers):,} weights")
        return layers, left

    def _quantize_activations(self) -> None:
        """Calibrated on the first training batches, before any weight is rounded."""
        settings = self.recipe.quantization
        if settings.act_bits == 32:
            return
        hooked, _ = find_layers(self.model, exclude=self.recipe.layers.exclude)
        batches = (images for images, _ in itertools.islice(self.train_loader.epoch(0), _CALIBRATION_BATCHES))
        self.activations = activations.calibrate(
            self.model, hooked, batches, bits=settings.act_bits, method=settings.act_method
        )
        distributed.copy_from_main(scale.data for scale in self.activations.parameters())
        missed = self.activations.unreached
        note = f"; not reached by a hook: {', '.join(missed)}" if missed else ""
        self.display.say(f"{len(self.activations.quantizers)} activation quantizers of {settings.act_bits} bits{note}")

    def _untracked(self) -> dict[str, torch.Tensor]:
        """Buffers that a file may lack (old checkpoints have no num_batches_tracked)."""
        return {k: v for k, v in self.model.state_dict().items() if k.endswith("num_batches_tracked")}

    def _trainer(self, recipe: Recipe, layers: Sequence[Layer], *, start: list[HardLayer] | None = None) -> Trainer:
        settings = recipe.optimizer
        steps = min(self.train_loader.batches, recipe.max_steps or self.train_loader.batches)
        total = recipe.epochs * steps
        amp = recipe.amp == "bf16" or (recipe.amp == "auto" and self.device.type == "cuda")
        if self.step_images is None:
            self.step_images = self._fitting(recipe, method=recipe.quantization.method if layers else "float", amp=amp)
        method = make_method(recipe, layers, Clock(total, steps), start=start)
        groups = base_groups(self.model, method)
        if self.activations is not None:
            groups.append({"params": self.activations.parameters(), "weight_decay": 0.0})
        try:
            base = create_optimizer_v2(
                groups,
                opt=settings.name,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
            )
        except (ValueError, AssertionError, TypeError) as error:
            hint = did_you_mean(settings.name, map(str, list_optimizers()))
            raise UserError(str(error), where=f"optimizer.name={settings.name}", hint=hint) from error
        scheduler, _ = create_scheduler_v2(
            base,
            sched="cosine" if settings.schedule == "cosine" else "step",
            num_epochs=recipe.epochs,
            decay_epochs=recipe.epochs + 1,  # used by the constant schedule only: never decays
            warmup_epochs=settings.warmup_epochs,  # type: ignore[arg-type]  # timm multiplies it by the steps
            warmup_lr=0.0,
            min_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        gates_harden = recipe.quantization.harden_at < 1 and isinstance(method, GateMethod)  # others are hard by then
        harden_step = max(1, round(recipe.quantization.harden_at * total)) if gates_harden else None
        optimizer = QuantizedOptimizer(method, base, harden_at_step=harden_step)
        optimizer.before_harden = self._measure_soft
        mixup = None
        if settings.mixup or settings.cutmix:
            mixup = Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                label_smoothing=settings.label_smoothing,
                num_classes=self.images.num_classes,
            )
        return Trainer(
            model=self.model,
            optimizer=optimizer,
            scheduler=scheduler,
            train_loader=self.train_loader,
            val_loader=self.val_loader,
            epochs=recipe.epochs,
            steps_per_epoch=steps,
            criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else settings.label_smoothing),
            teacher=self.teacher,
            distill=settings.distill,
            mixup=mixup,
            seed=recipe.seed,
            clip_grad_norm=settings.clip_grad_norm,
            amp=amp,
            micro_batch=self.step_images,
            channels_last=self.channels_last,
            activation_scales=self.activations.parameters() if self.activations is not None else (),
            replica=self._replica(),
        )

    def _fitting(self, recipe: Recipe, *, method: str, amp: bool) -> int:
        """Images per forward pass, the same on all processes: the recipe's; for `auto`, as many as the free memory takes.

        UserError when they do not fit.
        """
        batch = min(recipe.data.batch_size, max(1, self.train_loader.samples // self.shard.world))
        asked = recipe.data.micro_batch
        images = min(asked, batch) if isinstance(asked, int) else batch
        free = memory.free_bytes(self.device)
        if free is None:
            return images
        free = distributed.smallest(free, self.device)
        step = memory.estimate(
            self.model,
            self.config["input_size"],
            method=method,
            bits=_gate_bits(recipe),
            state_dtype=recipe.quantization.state_dtype,
            amp=amp,
            device=self.device,
        )
        most = step.most_images(free)
        if asked == "auto" and 0 < most < batch:
            parts = -(-batch // most)
            images = -(-batch // parts)
            needed = memory.gib(step.of(batch))
            self.display.say(
                f"a step on {batch} images needs {needed}, {memory.gib(free)} are free: in parts of {images}"
            )
        memory.check(step, images, free, self.device)
        return images

    def _replica(self) -> Any:
        """What training calls in place of the model: data-parallel (one number per weight is averaged), compiled, or None."""
        replica: Any = None
        if self.shard.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            replica = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        if self.recipe.compile:
            if self.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
                raise UserError("no C++ compiler", where="compile", hint="install one, or leave compile off")
            replica = torch.compile(replica or self.model)
        return replica

    def _measure_soft(self) -> None:
        self.accuracy.soft_top1 = evaluate(self.model, self.val_loader).top1

    def _train(
        self, phase: str, recipe: Recipe, layers: Sequence[Layer], *, start: list[HardLayer] | None = None
    ) -> Trainer:
        """Train a phase to its end; from non-finite numbers back to the last state, where the recipe says so."""
        while True:
            trainer = self._trainer(_slowed(recipe, self.rollbacks), layers, start=start)
            try:
                self._run(phase, trainer)
            except NonFinite as error:
                self._roll_back(error)
            else:
                return trainer

    def _roll_back(self, error: NonFinite) -> None:
        if self.recipe.optimizer.on_nonfinite == "stop":
            error.hint = (
                "--resume --set optimizer.on_nonfinite=rollback goes on from the last saved state at half the rate; "
                "or start anew with a lower optimizer.lr or with optimizer.clip_grad_norm"
            )
            raise error
        if self.rollbacks == _MOST_ROLLBACKS:
            error.what += f", after {_MOST_ROLLBACKS} rollbacks"
            error.hint = "start anew with a lower optimizer.lr or with optimizer.clip_grad_norm"
            raise error
        self.saved = self.folder.load_state()
        assert self.saved is not None  # a run that may roll back saves before its first step
        self.saved["rollbacks"] += 1
        self.folder.save_state(self.saved)
        self._take_saved()
        self.model.load_state_dict(self.saved["model"])
        if self.shard.is_main:
            log.warning("%s; back to the last saved state, learning rates × %g", error.what, 0.5**self.rollbacks)

    def _restore(self, trainer: Trainer, saved: dict[str, Any]) -> None:
        """Put a saved state back. UserError for one that this run cannot have saved."""
        try:
            self.model.load_state_dict(saved["model"])
            trainer.optimizer.load_state_dict(saved["optimizer"])
            if self.accuracy.soft_top1 is not None:
                trainer.optimizer.before_harden = None
            if self.activations is not None:
                self.activations.load_state_dict(saved["activations"])
            torch.set_rng_state(saved["rng"])
            if self.device.type == "cuda" and saved["device_rng"] is not None:
                torch.cuda.set_rng_state(saved["device_rng"], self.device)
            if not 0 <= saved["batch"] <= trainer.steps_per_epoch:
                raise ValueError(f"batch {saved['batch']}")
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            if machine_fault(error) is not None:
                raise
            where, hint = str(self.folder.path / RESUME_FILE), "pass --force to start over"
            raise UserError(f"does not fit this run ({error})", where=where, hint=hint) from error

    def _run(self, phase: str, trainer: Trainer) -> None:
        fresh: dict[str, Any] = {"batch": 0, "losses": []}
        first, done = 0, fresh

        def save(epoch: int, batch: int = 0, losses: Sequence[Any] = ()) -> None:
            state = {
                "phase": phase,
                "epoch": epoch,
                "batch": batch,
                "losses": [float(loss) for loss in losses],
                "model": self.model.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "activations": self.activations.state_dict() if self.activations is not None else {},
                "rng": torch.get_rng_state(),
                "device_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "history": self.history,
                "accuracy": self.accuracy.model_dump(),
                "rollbacks": self.rollbacks,
                "input_top1": self.input_top1,
                "step_images": self.step_images,
            }
            bad = not all(is_finite(state[key]) for key in ("losses", "model", "optimizer", "activations"))
            if batch == 0:  # all processes are here
                bad = distributed.sum_counts([bad], self.device)[0] > 0
            elif bad and self.shard.world > 1:
                return  # the others learn it at the end of the epoch
            if bad:
                raise NonFinite(f"{phase} reached NaN or infinite numbers by epoch {epoch + bool(batch)}")
            self.folder.save_state(state)

        if self.saved is not None:
            self._restore(trainer, self.saved)
            first, done = self.saved["epoch"], self.saved
            self.display.say(f"resumed {phase} at epoch {first + 1}, batch {done['batch'] + 1}")
            self.saved = None
        elif self.recipe.optimizer.on_nonfinite == "rollback":
            save(0)
        self.folder.write_metrics(self.history)

        target, minutes = self.recipe.quantization.target_bits, self.recipe.save_every_minutes
        several = self.shard.world > 1  # whose launcher and scheduler may each send the signal
        with (
            StopRequest(patient=several) as request,
            self.display.training(trainer.epochs, trainer.steps_per_epoch, first_epoch=first, target_bits=target),
        ):
            saved_at = time.monotonic()
            last: tuple[int, int, Sequence[Any]] | None = None  # what `save` needs after the last step

            def on_step(epoch: int, batch: int, losses: Sequence[Any]) -> None:
                nonlocal saved_at, last
                self.display.on_step(batch, losses)
                last = epoch, batch, losses
                stop = request.signum
                if several:  # all stop after the same step
                    asks = batch % _ASK_EVERY == 0 or batch == trainer.steps_per_epoch
                    stop = distributed.largest(stop or 0, self.device) or None if asks else None
                if stop is not None or time.monotonic() - saved_at > 60 * minutes:
                    save(epoch, batch, losses)
                    saved_at = time.monotonic()
                if stop is not None:
                    distributed.wait_for_all(self.device)  # a launcher may end the others once one has left
                    distributed.stop()
                    raise Interrupted(stop, f"{phase}, epoch {epoch + 1}, batch {batch}")

            trainer.on_step = on_step
            for epoch in range(first, trainer.epochs):
                try:
                    line = {"phase": phase, **trainer.run_epoch(epoch, start=done["batch"], losses=done["losses"])}
                except data.Unavailable:  # raised between two steps
                    if last is not None:
                        save(*last)
                    raise
                done, last = fresh, None
                self.history.append(line)
                save(epoch + 1)
                self.folder.write_metrics(self.history)
                saved_at = time.monotonic()
                self.display.on_epoch(line)

    def _write(
        self, trainer: Trainer, left_float: list[dict[str, Any]], *, at_least: float = 0.0
    ) -> tuple[QuantizedFile, float]:
        """Harden, let BatchNorm settle, write, read back, and record the accuracy of what was read back.

        A model below a top-1 of ``at_least`` percent replaces no file, so that a kill here leaves the better one.
        Returns what was written and the largest logit difference between the model in memory and the one read back.
        """
        recipe = self.recipe
        trainer.optimizer.harden()
        if trainer.optimizer.method.layers:
            batches = recipe.bn_recalibration_batches
            recalibrate_batchnorm(self.model, self.train_loader, epoch=trainer.epochs, batches=batches)
            distributed.copy_from_main(self.model.buffers())
        layers = trainer.optimizer.hard_layers()
        self.model.eval()

        def assembled() -> QuantizedFile:
            return checkpoint_file.assemble(
                self.model,
                layers,
                record=self.record,
                data_config=self.config,
                target_bits=recipe.quantization.target_bits if layers else None,
                operations=self.operations,
                classes=self.images.classes,
                accuracy=self.accuracy,
                activations=[vars(r) for r in self.activations.records()] if self.activations is not None else [],
                left_float=left_float,
                environment=environment(),
                recipe=recipe.model_dump(mode="json"),
            )

        distributed.check_equal([vars(layer) for layer in layers], what="the hard model")
        results: tuple[float, float, float] | None = None
        if self.shard.is_main:
            candidate = self.folder.path / f".{MODEL_FILE}.candidate"
            try:
                checkpoint_file.write(candidate, assembled())
                file = checkpoint_file.read(candidate)
                reloaded = csqcli.model_from_file(file, trust_code=True, where=str(candidate)).to(self.device)
                measured = evaluate(reloaded, self.whole_val_loader, shared=False)
                results = measured.top1, measured.top5, self._logit_gap(reloaded)
            finally:
                candidate.unlink(missing_ok=True)
        self.accuracy.hard_top1, self.accuracy.hard_top5, gap = distributed.from_main(results)
        final = assembled()
        if self.shard.is_main and self.accuracy.hard_top1 >= at_least:
            checkpoint_file.write(self.folder.path / MODEL_FILE, final)
        return final, gap

    @torch.no_grad()
    def _logit_gap(self, reloaded: nn.Module) -> float:
        images, _ = next(iter(self.whole_val_loader.epoch(0)))
        return float((logits_of(self.model(images)) - logits_of(reloaded(images))).abs().max())

    def _report(self, file: QuantizedFile, **more: Any) -> dict[str, Any]:
        if self.shard.is_main:
            file.manifest.sizes.file_bytes = (self.folder.path / MODEL_FILE).stat().st_size
        report = reports.build(file.manifest, self.history) | more
        self.folder.write_report(report | {"fingerprint": self.folder.fingerprint})
        return report


def _slowed(recipe: Recipe, rollbacks: int) -> Recipe:
    """The recipe at the learning rates that are left after so many rollbacks."""
    slowed = recipe.model_copy(deep=True)
    slowed.optimizer.lr *= 0.5**rollbacks
    slowed.quantization.latent_lr *= 0.5**rollbacks
    return slowed


def _gate_bits(recipe: Recipe) -> int:
    """Planes of gates per weight, where the method has gates."""
    settings = recipe.quantization
    return int(settings.target_bits or 0) if settings.method == "csq-uniform" else settings.max_bits


def make_method(
    recipe: Recipe, layers: Sequence[Layer], clock: Clock, *, start: Sequence[HardLayer] | None = None
) -> WeightMethod:
    """The weight method that a recipe asks for."""
    settings = recipe.quantization
    state_dtype = torch.bfloat16 if settings.state_dtype == "bfloat16" else torch.float32
    if not layers:
        return WeightMethod(layers, clock)
    rules = recipe.layers
    limits = budget.plane_limits(
        layers,
        bits=settings.max_bits,
        floor=rules.floor,
        keep=rules.keep,
        min_bits=rules.min_bits,
        max_bits=rules.max_bits,
    )
    if settings.method in ("ste", "lsq") and start is None:
        uniform = int(settings.target_bits or 0)  # every layer alike, but for the recipe's own bounds
        planes = [min(max(uniform, few, 1), most) for few, most in zip(limits.fewest, limits.most, strict=True)]
        return LatentUniform(layers, clock, planes=planes, learned_step=settings.method == "lsq")
    if settings.method in ("csq", "ste", "lsq"):  # delivered integers are trained on alike, whoever found them
        staged = StagedSettings(
            target_bits=settings.target_bits or 0.0,
            max_bits=settings.max_bits,
            search_share=settings.search_share,
            soft_share=settings.soft_share,
            beta_initial=settings.mask_beta_initial,
            beta_final=settings.mask_beta_final,
            latent_lr=settings.latent_lr,
            recovery=settings.recovery,
            per_channel=settings.per_channel,
            limits=limits,
            state_dtype=state_dtype,
        )
        return StagedCSQ(layers, clock, staged, start=start)
    searched = settings.method != "csq-uniform" and start is None
    auto = _auto_logit(recipe, clock) if start is None else 1.0
    gates = GateSettings(
        bits=_gate_bits(recipe),
        target_bits=settings.target_bits if searched else None,
        beta_initial=settings.beta_initial,
        beta_final=settings.beta_final,
        beta_per_epoch=settings.beta_schedule == "epoch",
        reg_strength=settings.reg_strength,
        logit=auto if settings.logit == "auto" else settings.logit,
        mask_logit=auto if settings.mask_logit == "auto" else settings.mask_logit,
        momentum=recipe.optimizer.momentum,
        weight_decay=recipe.optimizer.weight_decay,
        refit_scale=settings.refit_scale,
        digits=settings.digits,
        init_scale=settings.init_scale,
        gate_steps=settings.gate_steps,
        precision_count=settings.precision_count,
        fix_masks_at=settings.fix_masks_at,
        restart_beta=settings.restart_beta,
        harden_at=settings.harden_at,
        rounding=settings.rounding,
        limits=limits if searched else None,
        state_dtype=state_dtype,
    )
    return GateMethod(layers, clock, gates, start=start)


def _auto_logit(recipe: Recipe, clock: Clock) -> float:
    """Where logits start: as far out as the schedule takes them in from scratch; 1 from weights that are to be kept."""
    optimizer = recipe.optimizer
    if recipe.model.pretrained or recipe.model.checkpoint is not None:
        return 1.0
    return csq.plastic_logit(
        lr=optimizer.lr * (1 if optimizer.schedule == "cosine" else 2),  # the rule halves it, a cosine's mean
        weight_decay=optimizer.weight_decay,
        momentum=optimizer.momentum,
        steps=clock.total_steps,
        beta_final=recipe.quantization.beta_final,
    )


def _check_task(spec: sources.ModelSpec) -> None:
    task = sources.task_of(spec)
    if task != "classification":
        raise UserError(f"is made for {task}", where=spec.source, hint=_CLASSIFIERS_ONLY)


def _check_target(recipe: Recipe) -> None:
    method, target = recipe.quantization.method, recipe.quantization.target_bits
    if method == "float":
        return
    if target is None:
        raise UserError("no target given", hint="pass --target-bits, e.g. --target-bits 3")
    if method in ("csq-uniform", "ste", "lsq") and (target != int(target) or not 1 <= target <= 8):
        hint = "take a whole number from 1 to 8, or method csq for a mixed one"
        raise UserError(f"{method} gives every layer the same planes; {target:g} is not possible", hint=hint)


def _open_images(recipe: Recipe) -> data.DataSet:
    settings = recipe.data
    if settings.source is None:
        raise UserError("no data given", hint="pass --data FOLDER (or cifar10:DIR, cifar100:DIR, digits)")
    return data.open_data(settings.source, train_limit=settings.train_limit, val_limit=settings.val_limit)


def _check_classes(manifest: Manifest, images: data.DataSet, *, where: str) -> None:
    if images.num_classes != manifest.model.num_classes:
        what = f"the model has {manifest.model.num_classes} classes, {images.source} has {images.num_classes}"
        raise UserError(what, where=where, hint="give data with the classes that it was trained on")


def _overridden(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
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
    return sources.usable_config(changed, where="recipe")


class _OutputFolder:
    """A run's folder: locked, refuses finished runs, keeps the resume state, writes everything atomically, on one process.

    Two generations of the state are kept, each under its SHA-256, so that a damaged one costs time and not the run.
    """

    def __init__(self, path: Path, recipe: Recipe, *, force: bool, resume: bool, source: str = "") -> None:
        """``source``: hash of a model file that the run starts from."""
        self.path, self.recipe, self.force, self.resume = path, recipe, force, resume
        self.shard, self.device = distributed.start(pick_device(recipe.device))
        self.fingerprint = _fingerprint(recipe, source)
        self.states = [path / RESUME_FILE, path / PREVIOUS_FILE]  # newest first
        self.finished: dict[str, Any] | None = None  # the report, when --resume finds this very run complete
        self._held = contextlib.ExitStack()

    def __enter__(self) -> _OutputFolder:
        if self.shard.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                what = "is a file" if self.path.is_file() else f"cannot be created ({error.strerror})"
                raise UserError(what, where=str(self.path), hint="choose another --output") from None
            self._held.enter_context(locked(self.path))
            try:
                self._open()
            except BaseException:
                self._held.close()
                raise
        self.finished = distributed.from_main(self.finished)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _open(self) -> None:
        model, unfinished = self.path / MODEL_FILE, any(state.exists() for state in self.states)
        if model.exists() and not unfinished and not self.force:
            if self.resume:
                self.finished = self._report_of_this_run()
            if self.finished is not None:
                return
            what = "a finished run" if (self.path / REPORT_FILE).exists() else f"a {MODEL_FILE} of no known run"
            hint = "choose another --output or pass --force"
            raise UserError(f"holds {what}", where=str(self.path), hint=hint)
        if unfinished and not (self.force or self.resume):
            hint = "pass --resume to go on, or --force to start over"
            raise UserError("holds an unfinished run", where=str(self.path), hint=hint)
        if unfinished and self.resume:
            self._read_state()  # before anything is written: it may be another run's
        else:  # a complete model stays until the new one takes its place
            for state in self.states:
                state.unlink(missing_ok=True)
        for name in (MODEL_FILE, REPORT_FILE, METRICS_FILE, RECIPE_FILE, RESUME_FILE):
            for file in files.leftovers(self.path / name):
                file.unlink(missing_ok=True)
        files.write_text(self.path / RECIPE_FILE, to_yaml(self.recipe))

    def _report_of_this_run(self) -> dict[str, Any] | None:
        try:
            report = read_json((self.path / REPORT_FILE).read_text(encoding="utf-8"), nodes=_REPORT_VALUES)
        except (OSError, ValueError):
            return None
        return report if report.get("fingerprint") == self.fingerprint else None

    def load_state(self) -> dict[str, Any] | None:
        """The last saved state, on every process; None when nothing was saved yet."""
        state = self._read_state() if self.shard.is_main else None
        state = distributed.from_main(state)
        return state

    def _read_state(self) -> dict[str, Any] | None:
        damaged: list[Path] = []
        for path in filter(Path.exists, self.states):
            state = _load_state(path)
            if state is None:
                damaged.append(path)
                continue
            if state.get("fingerprint") != self.fingerprint:
                hint = "resume with the recipe and options of the first start, or pass --force to start over"
                raise UserError("was started with other settings", where=str(self.path), hint=hint)
            for other in damaged:  # or the next save would move it over this one
                log.warning("%s: is damaged; going on from %s", other, path.name)
                other.unlink()
            return state
        if damaged:
            hint = "no whole state is left; pass --force to start over"
            raise UserError("is damaged", where=" and ".join(map(str, damaged)), hint=hint)
        return None

    def save_state(self, state: dict[str, Any]) -> None:
        if not self.shard.is_main:
            return
        newest, previous = self.states
        with files.replacing(newest, previous=previous) as temporary:
            with open(temporary, "wb") as file:
                try:
                    torch.save({**state, "fingerprint": self.fingerprint}, file)
                except RuntimeError as error:  # torch's writer hides what the operating system said
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            files.seal(temporary)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        if self.shard.is_main:
            files.write_text(self.path / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in history))

    def write_report(self, report: dict[str, Any]) -> None:
        if self.shard.is_main:
            files.write_text(self.path / REPORT_FILE, json.dumps(report, indent=2) + "\n")

    def finish(self) -> None:
        """The run is complete: its resume state is no longer needed."""
        if self.shard.is_main:
            for state in reversed(self.states):
                state.unlink(missing_ok=True)
        distributed.stop()


def _load_state(path: Path) -> dict[str, Any] | None:
    """A resume state, or None when its bytes are not those that were saved. Never unpickled freely."""
    try:
        if not files.is_intact(path):
            return None
        check_archive(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        _SavedState.model_validate(state)
        check_tree(state["history"], nodes=_REPORT_VALUES)
        return state
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except Exception as error:  # torch.load raises many kinds for damaged files; all mean the same to the user
        log.debug("%s: %r", path, error)
        return None


class _SavedState(BaseModel):
    """What a resume state holds."""

    model_config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, strict=True)

    fingerprint: str
    phase: Literal["search", "finetune"]
    epoch: int = Field(ge=0)
    batch: int = Field(ge=0)
    losses: list[float]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    activations: dict[str, torch.Tensor]
    rng: torch.Tensor
    history: list[dict[str, Any]]
    accuracy: AccuracyRecord
    rollbacks: int = Field(ge=0, le=_MOST_ROLLBACKS)
    input_top1: float | None
    step_images: int = Field(ge=1)

    @model_validator(mode="after")
    def _measured(self) -> _SavedState:
        if self.phase == "search" and self.accuracy.float_top1 is None:
            raise ValueError("a search without the float model's accuracy")
        return self


def _fingerprint(recipe: Recipe, source: str) -> str:
    """Hash of everything that changes the result; workers, device and what to do about NaN may differ on resume."""
    settings = recipe.model_dump(mode="json")
    settings.pop("device")
    settings["data"].pop("workers")
    settings["optimizer"].pop("on_nonfinite")
    return hashlib.sha256(json.dumps([settings, source], sort_keys=True).encode()).hexdigest()
