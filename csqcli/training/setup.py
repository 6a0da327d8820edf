"""From a recipe to the trainer of one phase: weight method, base optimizer, schedule, images per step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from csqcli.errors import UserError, did_you_mean
from csqcli.quant.allocators.base import Allocation, allocation_by
from csqcli.quant.budget import Budget, allocate, make_budget
from csqcli.quant.catalog import CARDS, MANUAL, UNIFORM, MethodCard, find_allocator
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import Batches, Watch
from csqcli.quant.methods.base import FloatTraining, Plan, Schedule, WeightMethod
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups
from csqcli.recipe.resolve import is_from_scratch
from csqcli.recipe.schema import RESOURCE_TARGETS, OptimizerSettings, Recipe
from csqcli.system import distributed, memory
from csqcli.system.progress import counted
from csqcli.training.budgets import budget_of
from csqcli.training.evaluate import BrokenScores, evaluate
from csqcli.training.loop import NonFinite, Trainer
from csqcli.training.run import Run
from csqcli.training.shared_start import known_importance

_DECAY = 0.1  # of the learning rate at a milestone


def make_trainer(
    run: Run, recipe: Recipe, layers: Sequence[Layer], *, start: Sequence[HardLayer] | None = None
) -> Trainer:
    """The trainer of a phase. ``recipe`` is the run's with the phase's own epochs and rates; ``start`` are delivered layers
    to train on from. UserError for what does not fit the machine or the optimizer."""
    settings = recipe.optimizer
    if not any(parameter.requires_grad for parameter in run.model.parameters()):
        hint = "unfreeze in the factory what shall be trained"
        raise UserError("every parameter is frozen (requires_grad is False)", where=run.source.source, hint=hint)
    frozen = [layer for layer in layers if not layer.parameter.requires_grad]
    for layer in frozen:
        layer.parameter.requires_grad_(True)
    if frozen:
        more = ", …" if len(frozen) > 1 else ""
        run.display.say(f"{counted(len(frozen), 'frozen weight tensor')} trained all the same: {frozen[0].name}{more}")
    batches = run.train_loader.batches
    steps = min(batches, recipe.max_steps or batches)
    amp = recipe.amp == "bf16" or (recipe.amp == "auto" and run.device.type == "cuda")
    if run.record.step_images is None:
        run.record.step_images = _images_per_step(run, recipe, method_card(recipe, layers, start), amp=amp, start=start)
    _tell_odd_schedule(run, recipe)
    method = make_method(run, recipe, layers, Schedule(recipe.epochs * steps, steps), start=start)
    base = _base_optimizer(run, recipe, method)
    optimizer = QuantizedOptimizer(method, base, harden_at_step=method.harden_at_step)
    mixup = None
    if settings.mixup or settings.cutmix:
        mixup = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing,
            num_classes=run.images.num_classes,
        )
    if run.teacher is not None:
        run.teacher.watch(run.model)
    trainer = Trainer(
        model=run.model,
        optimizer=optimizer,
        scheduler=_scheduler(base, recipe, steps),
        train_loader=run.train_loader,
        val_loader=run.val_loader,
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else settings.label_smoothing),
        teacher=run.teacher,
        mixup=mixup,
        seed=recipe.seed,
        clip_grad_norm=settings.clip_grad_norm,
        amp=amp,
        micro_batch=run.record.step_images,
        channels_last=run.channels_last,
        activations=run.activations,
        batchnorm_frozen=recipe.batchnorm == "frozen",
        replica=run.replica(),
        watch_evaluation=run.display.evaluation,
    )
    optimizer.before_harden = lambda: _measured_soft(run, trainer)
    return trainer


def method_card(recipe: Recipe, layers: Sequence[Layer], start: Sequence[HardLayer] | None) -> MethodCard:
    """The method that trains: `float` without layers; `staged` where the chosen one cannot go on from delivered integers."""
    if not layers:
        return CARDS["float"]
    return CARDS["staged"] if start is not None and not recipe.card.finetunes else recipe.card


def make_method(
    run: Run,
    recipe: Recipe,
    layers: Sequence[Layer],
    schedule: Schedule,
    *,
    start: Sequence[HardLayer] | None = None,
) -> WeightMethod:
    """The weight method of a phase, its planes decided where the recipe has an allocator decide them."""
    card = method_card(recipe, layers, start)
    if not layers:
        return FloatTraining((), Plan(schedule, make_budget((), 0.0)))
    for hard in start or ():
        if hard.basis is not None and not card.learns_basis:
            hint = "finetune it by the method that learned it: --set quantization.method=lq-nets"
            raise UserError(f"has a learned basis, and {card.name} trains integers × scale", where=hard.name, hint=hint)
    budget = budget_of(run, recipe, layers)
    planes = None
    allocator = recipe.quantization.allocator or (UNIFORM if card.takes == "planes" else None)
    if allocator is not None and start is None:
        if run.record.planes is None:  # a resumed run has them, and so has one that went back to a state
            run.record.planes = allocated(run, allocator, layers, run.calibration_batches(), budget)
        planes = run.record.planes
    plan = Plan(
        schedule=schedule,
        budget=budget,
        planes=planes,
        start=start,
        searched=run.searched if start is not None else None,
        lr=recipe.optimizer.peak_lr,
        momentum=recipe.optimizer.momentum,
        weight_decay=recipe.optimizer.l2,
        mean_lr_share=_mean_lr_share(recipe),
        from_scratch=is_from_scratch(recipe.to_dict()),
        rate_share=0.5**run.record.rollbacks,
        state_dtype=state_dtype(recipe),
    )
    settings = recipe.method_settings if card.name == recipe.card.name else card.settings()
    if start is not None and recipe.finetune.staged_lr is not None and card.name == "staged":
        settings = settings.model_copy(update={"latent_lr": recipe.finetune.staged_lr})
    return card.load()(layers, plan, settings)


def allocated(run: Run, allocator: str, layers: Sequence[Layer], batches: Batches, budget: Budget) -> list[int]:
    """Planes of every layer by an allocator, the same on all processes; said."""
    with run.display.step("measuring which layers matter"):
        known = known_importance(run, by=allocator, layers=len(layers), bits=len(budget.table[0]) - 1)
        if known is not None:
            found = Allocation(allocate(known, budget), known)
        else:
            found = allocation(run.recipe, allocator, run.model, layers, batches, budget, watch=run.display.step)
    planes = distributed.from_main(found.planes)
    run.display.say(f"planes by {allocator}: {' '.join(map(str, planes))}")
    return planes  # type: ignore[no-any-return]


def shared_importance(run: Run, layers: Sequence[Layer], batches: Batches) -> torch.Tensor | None:
    """Importance [layers, planes] by the recipe's allocator, which does not depend on the target; None where it has none, or
    where it decides planes for one budget at a time."""
    name = run.recipe.quantization.allocator
    if name is None or name in (UNIFORM, MANUAL) or find_allocator(name).gives != "importance":
        return None
    # any budget that can be met will do: what it allocates is not looked at
    target = {"target_bits": float(run.recipe.quantization.max_bits)} | dict.fromkeys(RESOURCE_TARGETS)
    settings = run.recipe.quantization.model_copy(update=target)
    recipe = run.recipe.model_copy(update={"quantization": settings})
    with run.display.step("measuring which layers matter"):
        budget = budget_of(run, recipe, layers)
        return allocation(recipe, name, run.model, layers, batches, budget, watch=run.display.step).importance


def allocation(
    recipe: Recipe,
    allocator: str,
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    budget: Budget,
    *,
    watch: Watch,
) -> Allocation:
    """What an allocator decides, with the settings that a recipe has for it."""
    settings = recipe.quantization
    return allocation_by(
        allocator,
        model,
        layers,
        batches,
        budget,
        planes=settings.planes,
        trials=settings.trials,
        seed=recipe.seed,
        watch=watch,
    )


def state_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.quantization.state_dtype == "bfloat16" else torch.float32


def _base_optimizer(run: Run, recipe: Recipe, method: WeightMethod) -> torch.optim.Optimizer:
    groups = base_groups(run.model, method)
    if run.activations is not None:
        groups.append({"params": run.activations.parameters(), "weight_decay": 0.0})
    return optimizer_of(groups, recipe.optimizer)


def optimizer_of(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over ``groups``. UserError for none, and for one that csq's steps are not enough for."""
    where = f"optimizer.name={settings.name}"
    try:
        base = create_optimizer_v2(
            groups,
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.l2,
            momentum=settings.momentum,
        )
    except (ValueError, AssertionError, TypeError) as error:
        hint = did_you_mean(settings.name, {*map(str, list_optimizers())} - {settings.name})
        raise UserError(str(error), where=where, hint=hint) from error
    if _needs_more_passes(base):
        what = "needs more than one backward pass per step (second derivatives, or a closure)"
        raise UserError(what, where=where, hint="take a first-order optimizer, such as momentum or adamw")
    return base


def _needs_more_passes(base: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(base.step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return required or bool(getattr(base, "is_second_order", False))


def _scheduler(base: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Any:
    settings = recipe.optimizer
    scheduler, _ = create_scheduler_v2(
        base,
        sched="cosine" if settings.schedule == "cosine" else "multistep",
        num_epochs=recipe.epochs,
        decay_milestones=sorted(settings.milestones),  # none: constant
        decay_rate=_DECAY,
        warmup_epochs=settings.warmup_epochs,  # type: ignore[arg-type]  # timm multiplies it by the steps
        warmup_lr=0.0,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


def _tell_odd_schedule(run: Run, recipe: Recipe) -> None:
    """Say where a phase is too short for its schedule; trying a long recipe out for an epoch is no mistake."""
    settings, epochs = recipe.optimizer, counted(recipe.epochs, "epoch")
    if (settings.warmup_epochs or 0) >= recipe.epochs:
        run.display.say(
            f"optimizer.warmup_epochs {settings.warmup_epochs:g} of {epochs}: the rate never reaches its peak"
        )
    if settings.milestones and min(settings.milestones) >= recipe.epochs:
        run.display.say(f"optimizer.milestones {settings.milestones} lie beyond {epochs}: the rate stays at its peak")


def shortened(optimizer: OptimizerSettings, epochs: int) -> OptimizerSettings:
    """A search's schedule for another phase of so many epochs: its warm-up takes at most a fifth of them."""
    warmup = optimizer.warmup_epochs
    return optimizer.model_copy(update={"warmup_epochs": None if warmup is None else min(warmup, epochs / 5)})


def _mean_lr_share(recipe: Recipe) -> float:
    """Mean of the learning rate over the schedule, as a share of its peak."""
    if recipe.optimizer.schedule == "cosine":
        return 0.5
    passed = [sum(epoch >= at for at in recipe.optimizer.milestones) for epoch in range(recipe.epochs)]
    return sum(_DECAY**count for count in passed) / recipe.epochs


def _measured_soft(run: Run, trainer: Trainer) -> None:
    try:
        _measure_soft(run, trainer)
    except BrokenScores as error:
        raise NonFinite("evaluation met NaN or infinite numbers before the planes were fixed") from error


def _measure_soft(run: Run, trainer: Trainer) -> None:
    """Accuracy of the soft model, just before it turns hard, and of the paper's unit steps where they are asked for.

    That of the last epoch, where no step has been taken since.
    """
    optimizer = trainer.optimizer
    accuracy, method = run.record.accuracy, optimizer.method
    step, top1 = trainer.evaluated
    if step != optimizer.step_count:
        with run.display.evaluation("evaluating the soft model", run.val_loader.batches) as tell:
            top1 = evaluate(run.model, run.val_loader, on_batch=tell).top1
    accuracy.soft_top1 = top1
    unit_steps = method.unit_steps(optimizer.step_count)
    if unit_steps is not None:
        for layer, hard in zip(method.layers, unit_steps, strict=True):
            layer.parameter.data.copy_(hard.weight())
        try:
            accuracy.unit_steps_top1 = evaluate(run.model, run.val_loader).top1
        except BrokenScores:  # of weights that are not delivered
            run.display.say("with unit steps the scores are NaN or infinite: the report leaves their accuracy out")
        method.materialise(optimizer.step_count)


def step_memory(
    run: Run, recipe: Recipe, card: MethodCard, *, amp: bool, start: Sequence[HardLayer] | None = None
) -> memory.StepMemory:
    """What a training step takes beyond the weights; ``start`` as of :func:`make_trainer`."""
    method, bits = card.load(), _most_planes(run, recipe, card, start)
    kept = method.state_bytes(recipe.method_settings, max_bits=bits, state_dtype=state_dtype(recipe))
    trained = method.trained_values(max_bits=bits)
    if trained:
        kept += trained * moment_bytes(recipe.optimizer, run.device)
    return memory.estimate(run.model, run.config["input_size"], state_bytes=kept, amp=amp, device=run.device)


def _most_planes(run: Run, recipe: Recipe, card: MethodCard, start: Sequence[HardLayer] | None) -> int:
    """Planes of the layer that has most, which every layer may hold state for; where they are not known yet, the most allowed."""
    settings, rules = recipe.quantization, recipe.layers
    most = min(settings.max_bits, card.max_planes)
    if start:
        return len(start[0].mask)
    if card.takes != "planes":
        return most
    if run.record.planes is not None:
        return max(run.record.planes)
    alike = settings.allocator in (None, UNIFORM) and not (rules.keep or rules.min_bits)
    return int(settings.target_bits or most) if alike else most


def moment_bytes(settings: OptimizerSettings, device: torch.device) -> int:
    """Bytes that the base optimizer keeps per number that it trains, counted after a step on a small tensor."""
    tried = nn.Parameter(torch.zeros(64, 64, device=device))
    tried.grad = torch.ones_like(tried)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # a resumed run does not try
        optimizer = optimizer_of([{"params": [tried]}], settings)
        optimizer.step()
    kept = [value for value in optimizer.state[tried].values() if isinstance(value, torch.Tensor)]
    return round(sum(value.numel() * value.element_size() for value in kept) / tried.numel())


def _images_per_step(
    run: Run, recipe: Recipe, card: MethodCard, *, amp: bool, start: Sequence[HardLayer] | None
) -> int:
    """Images per forward pass, the same on all processes: the recipe's; for `auto`, as many as the free memory takes.

    UserError when they do not fit.
    """
    batch = min(recipe.data.batch_size, max(1, run.train_loader.samples // run.shard.world))
    asked = recipe.data.micro_batch
    images = min(asked, batch) if isinstance(asked, int) else batch
    free = memory.free_bytes(run.device)
    if free is None:
        return images
    free = distributed.all_reduce_min(free, run.device)
    step = step_memory(run, recipe, card, amp=amp, start=start)
    most = step.most_images(free)
    if asked == "auto" and 0 < most < batch:
        parts = -(-batch // most)
        images = -(-batch // parts)
        needed = memory.gib(step.of(batch))
        run.display.say(f"a step on {batch} images needs {needed}, {memory.gib(free)} are free: in parts of {images}")
    memory.check(step, images, free, run.device)
    return images
