"""A network rounded layer by layer to what changes its outputs least, on images that it looks at; nothing is trained.

The images go through the network once per group of layers, up to the last of them, and through a float copy of it. What is
collected there (`quant.layer_inputs`) decides the group's integers and scales (`quant.second_order`), the mean shift of their
outputs goes into their biases, and the statistics of BatchNorms behind them move by what became of their inputs. The next group then sees
what all of this made of its inputs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant import activations
from csqcli.quant.allocators.importance import fisher_importance
from csqcli.quant.budget import allocate
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layer_inputs import ExecutionOrder, LayerInputs, allow_early_stop
from csqcli.quant.layers import Layer, find_layers
from csqcli.quant.measuring import Watch, evaluating, logits_of, no_progress
from csqcli.quant.method_settings import PTQSettings
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.ptq import PostTraining, start_scale
from csqcli.quant.names import FLOAT_BITS, INT8_PLANES, MOST_PLANES
from csqcli.quant.norms import following, tracking_norms
from csqcli.quant.second_order import InputMoments, damped, fit, for_moved_inputs, held_out_damping, held_out_rounding

_FISHER_BATCH = 16  # images whose mean gradient is squared
_SAMPLES = (2**13, 2**15)  # input columns that a layer's moments are taken over: the fewest and the most
_SAMPLES_PER_WEIGHT = 64  # of a filter, between the two
_MOST_COLUMNS = 2**13  # of a layer that is fitted: its moments take the square of that, seven times, in float32


class LayerwiseRounding:
    """One network on its way from float to rounded. Every forward pass is in eval mode, which is the caller's to set.

    ``batches`` are images [B, C, H, W] on the network's device; ``method`` holds the planes and takes the integers. ``model`` must be
    float when this is built. ``settle_norms``: whether BatchNorms follow what becomes of their inputs.
    """

    def __init__(
        self, model: nn.Module, method: PostTraining, batches: Sequence[Tensor], *, settle_norms: bool = True
    ) -> None:
        self.model, self.method, self.batches, self.settle_norms = model, method, batches, settle_norms
        self.layers, self.settings = method.layers, method.settings
        self.teacher = _copied(model)
        activations.detach(self.teacher)  # its hooks would be those of the model itself
        self.order, self.norms = self._execution_order()
        self.groups = _groups(self.order, self.settings.passes)
        self.done = 0  # groups
        self.tick: Callable[[], None] = lambda: None  # called many times within a group, which may take minutes
        self._settled_before = -1  # the place in the order before which every BatchNorm is settled

    @property
    def unseen(self) -> list[int]:
        """Layers that keep the nearest levels: what they multiply is not seen, or is too much."""
        return sorted(set(range(len(self.layers))) - set(self.order))

    def go_on_after(self, done: int) -> None:
        """So many groups are rounded already, in the model and the method."""
        self.done = done
        if done:
            self._settled_before = self.order.index(self.groups[done - 1][0])

    @torch.no_grad()
    def run(self, after_group: Callable[[int], None] = lambda done: None) -> None:
        """Round what is not yet rounded; ``after_group`` is told how many groups are done."""
        for index in self.unseen:
            self.method.write(index)
        for group in self.groups[self.done :]:
            self.round_group(group)
            self.done += 1
            after_group(self.done)
        self._settle_norms()

    @torch.no_grad()
    def _execution_order(self) -> tuple[list[int], dict[nn.Module, int]]:
        """Layers to fit, in the order in which they run, and how many of them ran before each BatchNorm."""
        recorder, norms = ExecutionOrder(self.layers), dict[nn.Module, int]()

        def note(module: nn.Module, inputs: object) -> None:
            norms.setdefault(module, len(recorder.order))

        hooks = [norm.register_forward_pre_hook(note) for norm in tracking_norms(self.model)]
        try:
            with recorder:
                self.model(self.batches[0][:2])
        finally:
            for hook in hooks:
                hook.remove()
        self.biases = recorder.biases
        kept = [index for index in recorder.order if _columns(self.layers[index]) <= _MOST_COLUMNS]
        ran_before = {norm: len(set(recorder.order[:count]) & set(kept)) for norm, count in norms.items()}
        return kept, ran_before

    def round_group(self, group: Sequence[int]) -> None:
        """One pass over the images, and the integers of these layers."""
        halves = self._collect(group)
        for index in group:
            self._round(index, halves.pop(index))
            self.tick()

    def _collect(self, group: Sequence[int]) -> dict[int, list[InputMoments]]:
        """One pass: moments of the group's inputs, over each half of the images; BatchNorms before it settle on the way."""
        halves = dict[int, list[InputMoments]]()
        own = [self.layers[index] for index in group]
        parameters = dict(self.teacher.named_parameters())
        float_layers = [Layer(layer.name, parameters[layer.name]) for layer in own]
        with self._open_norms(self.order.index(group[0])):
            for number, batch in enumerate(self.batches):
                float_inputs = self._inputs(self.teacher, float_layers, batch, number)
                inputs = self._inputs(self.model, own, batch, number)
                for place, index in enumerate(group):
                    if index not in halves:
                        halves[index] = [InputMoments.like(inputs[place]) for _ in range(2)]
                    parts = (columns.tensor_split(2, dim=-1) for columns in (inputs[place], float_inputs[place]))
                    for half, part, float_part in zip(halves[index], *parts, strict=True):
                        half.add(part, float_part)
                self.tick()
        return halves

    def _inputs(self, model: nn.Module, layers: Sequence[Layer], batch: Tensor, offset: int) -> dict[int, Tensor]:
        images = sum(map(len, self.batches))
        recorder = LayerInputs(layers, positions=[_positions(layer, images) for layer in layers], offset=offset)
        recorder.stop_after = set(range(len(layers)))
        with recorder, allow_early_stop():
            model(batch)
        return {index: columns.float() for index, columns in recorder.columns.items()}

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

    @contextlib.contextmanager
    def _open_norms(self, place: int) -> Iterator[None]:
        """Inside, BatchNorms behind the last group and before layer number ``place`` of the order follow what comes in. The
        float network has to see each batch first."""
        names = {module: name for name, module in self.model.named_modules()}
        with contextlib.ExitStack() as opened:
            for norm, before in self.norms.items():
                if self.settle_norms and self._settled_before < before <= place:
                    opened.enter_context(following(norm, self.teacher.get_submodule(names[norm])))
            yield
        self._settled_before = place

    def _settle_norms(self) -> None:
        """A pass for the BatchNorms behind the last layer, if any."""
        if all(before <= self._settled_before for before in self.norms.values()):
            return
        with self._open_norms(len(self.order)):
            for batch in self.batches:
                self.teacher(batch)
                self.model(batch)


class Quantized:
    """A model whose weights are rounded: what :func:`csqcli.quantize` returns and :func:`csqcli.save` writes."""

    method_name = "ptq"

    def __init__(self, method: PostTraining, act_bits: int) -> None:
        self.method, self.act_bits = method, act_bits

    @property
    def planes(self) -> dict[str, int]:
        """Planes of every quantized weight, by its name in the model."""
        return {layer.name: k for layer, k in zip(self.method.layers, self.method.planes, strict=True)}

    @property
    def mean_bits(self) -> float:
        """Planes in the mean over weight elements; at or under the target."""
        return self.method.plan.budget.mean_planes(self.method.planes)

    @contextlib.contextmanager
    def hard(self) -> Iterator[list[HardLayer]]:
        """The layers to deliver, as :meth:`csqcli.CSQ.hard`. UserError where the model's weights are not theirs any more."""
        for layer, hard in zip(self.method.layers, self.method.hard_layers(), strict=True):
            stands = layer.parameter.detach()
            if not torch.equal(stands, hard.weight().to(stands)):
                hint = "save what the last csqcli.quantize of this model returned, before training it on"
                raise UserError("was changed after the model was quantized", where=layer.name, hint=hint)
        yield self.method.hard_layers()


def quantize_model(
    model: nn.Module,
    batches: Sequence[Tensor],
    target_bits: float,
    *,
    exclude: str | Sequence[str] = (),
    act_bits: int = FLOAT_BITS,
    settings: PTQSettings | None = None,
    seed: int = 0,
    watch: Watch = no_progress,
) -> Quantized:
    """Round a model in place, planes by Fisher importance; :func:`csqcli.quantize` has the arguments. Modes come back as they were.

    Inputs of layers are rounded by hooks on the model, where ``act_bits`` are fewer than 32. What an exception leaves half rounded is put
    back.
    """
    layers, _ = find_layers(model, exclude=exclude)
    settings = settings or PTQSettings()
    before = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    hooks = activations.records_of(activations.attached(model))  # of a model that was quantized before
    generator = torch.Generator().manual_seed(seed)
    try:
        with evaluating(model):
            bits = INT8_PLANES if act_bits < FLOAT_BITS and target_bits <= INT8_PLANES else MOST_PLANES
            plan = plan_for(layers, target_bits, Schedule(0, 1), bits=bits)
            plan.budget.check_feasible()
            if act_bits < FLOAT_BITS:
                activations.detach(model)
                with watch("calibrating activations"):
                    activations.calibrate(model, layers, batches[: activations.CALIBRATION_BATCHES], bits=act_bits)
            with watch("measuring which layers matter"):
                labelled = with_own_labels(model, batches, generator)
                importance = fisher_importance(model, layers, labelled, bits, recovery=settings.recovery)
                planes = allocate(importance, plan.budget)
            method = PostTraining(layers, replace(plan, planes=planes), settings)
            rounding = LayerwiseRounding(model, method, batches)
            with watch("rounding layer by layer", len(rounding.groups)) as tell:
                rounding.tick = lambda: tell(rounding.done)
                rounding.run(tell)
    except BaseException:
        activations.detach(model)
        activations.attach(model, hooks)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise
    return Quantized(method, act_bits)


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the model. UserError where a module holds a tensor that was computed with gradients, which cannot be copied."""
    for name, module in model.named_modules():
        for held, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:  # as the old nn.utils.weight_norm leaves one
                hint = "take nn.utils.parametrizations.weight_norm in place of nn.utils.weight_norm, or remove what computes it"
                what = f"the model cannot be copied: its `{held}` is computed in the forward pass"
                raise UserError(what, where=name or type(model).__name__, hint=hint)
    return copy.deepcopy(model)


def with_own_labels(
    model: nn.Module, batches: Iterable[Tensor], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Small batches with labels drawn from the model's own predictions, whose gradients have the Fisher information as their
    second moment."""
    for batch in itertools.chain.from_iterable(images.split(_FISHER_BATCH) for images in batches):
        with torch.no_grad():
            likely = logits_of(model(batch)).softmax(dim=1).cpu()
        labels = torch.multinomial(likely, 1, generator=generator).flatten()
        yield batch, labels.to(batch.device)


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
