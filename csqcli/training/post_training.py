"""Post-training quantization: the planes by importance, then the layers rounded one group after the other.

The calibration images go through the network once per group of layers, up to the last of them, and through a float copy of it. What is
collected there (`quant.layer_inputs`) decides the group's integers and scales (`quant.second_order`), the mean shift of their
outputs goes into their biases, and the statistics of BatchNorms behind them move by what became of their inputs. The next group then sees
what all of this made of its inputs.

Labels of the images are never looked at: importance takes labels drawn from the model's own predictions, whose gradients have
the Fisher information as their second moment.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from csqcli.data.loaders import LoaderSettings, make_loader, stream_seed
from csqcli.data.splits import Images
from csqcli.errors import UserError
from csqcli.quant import activations
from csqcli.quant.allocators.importance import fisher_importance
from csqcli.quant.budget import allocate
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layer_inputs import LayerInputs, LayerOrder, passing
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import logits_of
from csqcli.quant.methods.base import Plan, Schedule
from csqcli.quant.methods.ptq import PostTraining, start_scale
from csqcli.quant.norms import following, tracking_norms
from csqcli.quant.second_order import InputMoments, damped, fit, for_moved_inputs, held_out_damping, held_out_rounding
from csqcli.system import distributed
from csqcli.system.interrupt import Interrupted, StopRequest
from csqcli.system.progress import counted, planes_fixed
from csqcli.training.budgets import budget_of
from csqcli.training.run import Run
from csqcli.training.run_state import RunState
from csqcli.training.setup import allocated, shared_importance
from csqcli.training.shared_start import known_importance

_BATCH = 64  # images per forward pass
_FISHER_BATCH = 16  # images whose mean gradient is squared
_SAMPLES = (2**13, 2**15)  # input columns that a layer's moments are taken over: the fewest and the most
_SAMPLES_PER_WEIGHT = 64  # of a filter, between the two
_MOST_COLUMNS = 2**13  # of a layer that is fitted: its moments take the square of that, seven times, in float32
_FEW_PLANES, _MANY_IMAGES = 2.9, 2048  # docs/results.md, how long to train
_SAVE_SECONDS = 20.0  # between two states


def quantize_after_training(run: Run, layers: Sequence[Layer]) -> list[HardLayer]:
    """Quantize the run's model, from a saved state where there is one, and leave the delivered weights in it.

    The same images and seed give the same bits. UserError for a budget that cannot be met, for an image that cannot be
    read, and for moments that are not finite; Interrupted on a signal, with the state saved.
    """
    work = _Work(run, list(layers))
    work.run_all()
    distributed.copy_from_main(run.model.parameters())
    distributed.copy_from_main(run.model.buffers())
    return distributed.from_main(work.method.hard_layers())  # type: ignore[no-any-return]


def measure_importance(run: Run, layers: Sequence[Layer]) -> tuple[Tensor | None, str | None]:
    """Importance [layers, planes] of the run's model as :func:`quantize_after_training` would measure it, and the allocator that
    measured it, if any; None where an allocator decides planes without it, or for one budget only."""
    work = _Work(run, list(layers))
    work.begin()
    allocator = run.recipe.quantization.allocator
    if allocator is None:
        with run.display.step("measuring which layers matter"):
            return work._importance(), None
    return shared_importance(run, layers, work._labelled()), allocator


@dataclass
class _Work:
    """One model on its way from float to quantized."""

    run: Run
    layers: list[Layer]
    done: int = 0  # groups
    done_layers: int = -1  # layers of the order before which every BatchNorm is settled
    saved_at: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """The model and the images to look at."""
        run = self.run
        settings = run.recipe.method_settings
        assert isinstance(settings, PostTraining.Settings)
        self.settings = settings
        run.model.eval()
        for layer in self.layers:
            layer.parameter.requires_grad_(True)  # whoever froze them meant training
        with run.display.step("reading calibration images"):
            self.batches = self._images()

    def run_all(self) -> None:
        run = self.run
        state, run.saved = run.saved if run.saved is not None and run.saved.phase == "search" else None, None
        self.begin()
        self.teacher = copy.deepcopy(run.model)
        activations.detach(self.teacher)  # its hooks would be those of the model itself
        if state is None:
            self.method = self._planned(self._planes())
        else:
            self.method = self._planned(state.optimizer["method"]["planes"])
            self.method.load_state_dict(state.optimizer["method"])
            run.model.load_state_dict(state.model)
            self.done = state.batch
            run.display.say(f"resumed after {self.done} groups of layers")
        self.order, self.norms = self._execution_order()
        self._round_unseen()
        groups = _groups(self.order, self.settings.passes)
        if self.done:
            self.done_layers = self.order.index(groups[self.done - 1][0])
        with StopRequest(patient=run.shard.world > 1) as request:
            with run.display.step("rounding layer by layer", len(groups)) as tell:
                for number, group in enumerate(groups):
                    if number < self.done:
                        continue
                    self._round_group(group)
                    self.done = number + 1
                    tell(self.done)
                    self._after_group(request)
            self._settle_norms(len(self.order))
        run.model.eval()

    # -- what is looked at

    def _images(self) -> list[Tensor]:
        """The calibration images in batches, decoded once: at evaluation's crop, in an order that the seed decides."""
        run = self.run
        assert run.images.train is not None
        count = min(self.settings.images, len(run.images.train))
        order = torch.randperm(len(run.images.train), generator=_generator(run.recipe.seed, 0))
        whole = count // _BATCH * _BATCH  # a loader of training images drops what is left of its last batch
        parts = [part for part in (order[:whole], order[whole:count]) if len(part)]
        batches = [batch for part in parts for batch in self._decoded(run.images.train.subset(part.sort().values))]
        if not batches:
            raise UserError("no calibration image could be used", where=run.images.source)
        return batches

    def _decoded(self, images: Images) -> list[Tensor]:
        """Batches of images; those that cannot be decoded are passed over."""
        run = self.run
        settings = LoaderSettings(
            training=True,
            batch_size=min(_BATCH, len(images)),
            augment="none",
            workers=run.recipe.data.workers,
            seed=run.recipe.seed,
            device=run.device,
        )
        loader = make_loader(images, run.config, settings)
        try:
            return [batch for batch, _ in loader.epoch(0) if len(batch)]
        finally:
            loader.close()

    def _planes(self) -> list[int]:
        run, quantization = self.run, self.run.recipe.quantization
        budget = budget_of(run, run.recipe, self.layers)
        if quantization.allocator is not None:
            return allocated(run, quantization.allocator, self.layers, self._labelled(), budget)
        with run.display.step("measuring which layers matter"):
            importance = known_importance(run, by=None, layers=len(self.layers), bits=quantization.max_bits)
            if importance is None:
                importance = self._importance()
            planes = allocate(importance, budget)
        return distributed.from_main(planes)  # type: ignore[no-any-return]

    def _importance(self) -> Tensor:
        bits = self.run.recipe.quantization.max_bits
        return fisher_importance(self.run.model, self.layers, self._labelled(), bits, recovery=self.settings.recovery)

    def _labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Small batches with labels drawn from the model's own predictions."""
        generator = _generator(self.run.recipe.seed, 1)
        for batch in itertools.chain.from_iterable(images.split(_FISHER_BATCH) for images in self.batches):
            with torch.no_grad():
                likely = logits_of(self.run.model(batch)).softmax(dim=1).cpu()
            labels = torch.multinomial(likely, 1, generator=generator).flatten()
            yield batch, labels.to(batch.device)

    def _planned(self, planes: Sequence[int]) -> PostTraining:
        run = self.run
        budget = budget_of(run, run.recipe, self.layers)
        mean = budget.mean_planes(planes)
        run.display.say(planes_fixed(planes, mean, run.target_bits))
        images = sum(map(len, self.batches))
        if mean < _FEW_PLANES and images < _MANY_IMAGES <= len(run.images.train or ()):
            run.display.say(
                f"at {mean:.2g} planes in the mean which {images} images are looked at may matter by a point: "
                f"--set ptq.images={_MANY_IMAGES} varies less and takes longer"
            )
        return PostTraining(self.layers, Plan(Schedule(0, 1), budget, planes=planes), self.settings)

    @torch.no_grad()
    def _execution_order(self) -> tuple[list[int], dict[nn.Module, int]]:
        """Layers to fit, in the order in which they run, and how many of them ran before each BatchNorm."""
        recorder, norms = LayerOrder(self.layers), dict[nn.Module, int]()

        def note(module: nn.Module, inputs: object) -> None:
            norms.setdefault(module, len(recorder.order))

        hooks = [norm.register_forward_pre_hook(note) for norm in tracking_norms(self.run.model)]
        try:
            with recorder:
                self.run.model(self.batches[0][:2])
        finally:
            for hook in hooks:
                hook.remove()
        self.biases = recorder.biases
        kept = [index for index in recorder.order if _columns(self.layers[index]) <= _MOST_COLUMNS]
        ran_before = {norm: len(set(recorder.order[:count]) & set(kept)) for norm, count in norms.items()}
        return kept, ran_before

    # -- rounding

    def _round_unseen(self) -> None:
        """Layers whose inputs are not available, or are too many, keep the nearest levels: they hold them from the start."""
        unseen = sorted(set(range(len(self.layers))) - set(self.order))
        for index in unseen:
            self.method.write(index)
        if unseen:
            first, more = self.layers[unseen[0]].name, ", …" if len(unseen) > 1 else ""
            self.run.display.say(
                f"{counted(len(unseen), 'layer')} rounded to the nearest levels, because what they multiply is not seen or too "
                f"much: {first}{more}"
            )

    @torch.no_grad()
    def _round_group(self, group: Sequence[int]) -> None:
        halves = self._collect(group)
        for index in group:
            self._round(index, halves.pop(index))

    def _collect(self, group: Sequence[int]) -> dict[int, list[InputMoments]]:
        """One pass: moments of the group's inputs, over each half of the images; BatchNorms before it settle on the way."""
        run, halves = self.run, dict[int, list[InputMoments]]()
        own = [self.layers[index] for index in group]
        parameters = dict(self.teacher.named_parameters())
        float_layers = [Layer(layer.name, parameters[layer.name]) for layer in own]
        with self._open_norms(self.order.index(group[0])):
            for number, batch in enumerate(self.batches):
                float_inputs = self._inputs(self.teacher, float_layers, batch, number)
                inputs = self._inputs(run.model, own, batch, number)
                for place, index in enumerate(group):
                    if index not in halves:
                        halves[index] = [InputMoments.like(inputs[place]) for _ in range(2)]
                    parts = (columns.tensor_split(2, dim=-1) for columns in (inputs[place], float_inputs[place]))
                    for half, part, float_part in zip(halves[index], *parts, strict=True):
                        half.add(part, float_part)
        return halves

    def _inputs(self, model: nn.Module, layers: Sequence[Layer], batch: Tensor, offset: int) -> dict[int, Tensor]:
        images = sum(map(len, self.batches))
        recorder = LayerInputs(layers, positions=[_positions(layer, images) for layer in layers], offset=offset)
        recorder.wanted = set(range(len(layers)))
        with recorder, passing():
            model(batch)
        return recorder.columns

    def _round(self, index: int, halves: Sequence[InputMoments]) -> None:
        layer, k = self.layers[index], self.method.planes[index]
        moments = halves[0] + halves[1]
        groups, columns = moments.mean.shape
        weight = layer.parameter.detach().float().clone().reshape(groups, -1, columns)  # placing overwrites it
        second, cross = moments.second / moments.count, moments.cross / moments.count
        if not bool(torch.isfinite(second).all()):
            hint = "its activations overflow on these images; check the checkpoint"
            raise UserError("the layer's inputs are NaN or infinite", where=layer.name, hint=hint)
        damping, seen = self.settings.damping, [half for half in halves if half.count]
        parts = [(half.second / half.count, half.cross / half.count) for half in seen]
        target = weight
        if self.settings.follow_inputs and len(parts) == 2:
            follow = held_out_damping(weight, parts, damping)
            target = weight if follow is None else for_moved_inputs(weight, damped(second, follow), cross)
        shaped = target.reshape(layer.parameter.shape)
        scale = start_scale(shaped, layer, k)
        if k and columns > 1 and self.settings.rounding == "second-order":
            start = scale.expand(groups * weight.shape[1]).reshape(groups, -1, 1)
            if moments.count < columns and len(parts) == 2:
                own = [moment for moment, _ in parts]
                damping = held_out_rounding(target, own, start, planes=k, share=damping)
            integers, fitted = fit(target, damped(second, damping), start, planes=k)
            self.method.place(index, integers.reshape(layer.parameter.shape), fitted.flatten())
        else:
            self.method.write(index)
        bias = self.biases.get(index)
        if bias is not None and self.settings.correct_bias:
            rounded = layer.parameter.detach().float().reshape(groups, -1, columns)
            mean, wanted = moments.mean, moments.float_mean if self.settings.follow_inputs else moments.mean
            shift = (weight @ wanted.unsqueeze(-1) - rounded @ mean.unsqueeze(-1)).flatten() / moments.count
            bias.data += shift.to(bias.dtype)

    # -- BatchNorm

    @contextlib.contextmanager
    def _open_norms(self, place: int) -> Iterator[None]:
        """Inside, BatchNorms behind the last group and before layer number ``place`` of the order follow what comes in. The
        float network has to see each batch first."""
        settle = self.run.recipe.bn_recalibration_batches > 0
        names = {module: name for name, module in self.run.model.named_modules()}
        with contextlib.ExitStack() as opened:
            for norm, before in self.norms.items():
                if settle and self.done_layers < before <= place:
                    opened.enter_context(following(norm, self.teacher.get_submodule(names[norm])))
            yield
        self.done_layers = place

    def _settle_norms(self, place: int) -> None:
        """A pass for the BatchNorms behind the last layer, if any."""
        if all(before <= self.done_layers for before in self.norms.values()):
            return
        with torch.no_grad(), self._open_norms(place):
            for batch in self.batches:
                self.teacher(batch)
                self.run.model(batch)

    # -- interruption

    def _after_group(self, request: StopRequest) -> None:
        run = self.run
        stop = request.signum
        if run.shard.world > 1:
            stop = distributed.all_reduce_max(stop or 0, run.device) or None
        if stop is None and time.monotonic() - self.saved_at < _SAVE_SECONDS:
            return
        run.folder.save_state(
            RunState.model_construct(
                inputs=run.folder.inputs,
                phase="search",
                epoch=0,
                batch=self.done,
                losses=[],
                model=run.model.state_dict(),
                optimizer={"method": self.method.state_dict()},
                activations=run.activations.state_dict() if run.activations is not None else {},
                rng=torch.get_rng_state(),
                device_rng=None,
                record=run.record,
            )
        )
        self.saved_at = time.monotonic()
        if stop is not None:
            distributed.stop()
            raise Interrupted(stop, f"{self.done} groups of layers rounded")


def _groups(order: Sequence[int], passes: int) -> list[list[int]]:
    """Consecutive layers in at most so many groups, whose sizes differ by one at most. With two or more, the last layer is a group of
    its own: what a layer does not see of those in its group the layers behind it make up for, and here there are none."""
    count = min(passes, len(order))
    if count < 2:
        return [list(order)] if order else []
    *front, last = order
    bounds = [len(front) * number // (count - 1) for number in range(count)]
    return [*(front[a:b] for a, b in itertools.pairwise(bounds)), [last]]


def _positions(layer: Layer, images: int) -> int:
    """Output positions of one image that a layer's moments need."""
    fewest, most = _SAMPLES
    return -(-min(max(_SAMPLES_PER_WEIGHT * _columns(layer), fewest), most) // images)


def _columns(layer: Layer) -> int:
    """Weights of one filter."""
    return layer.weights // layer.parameter.shape[layer.channel_dim]


def _generator(*keys: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(*keys))
