"""csq as an optimizer over an untouched model: a weight method plus a base optimizer for everything else."""

from __future__ import annotations

import contextlib
import copy
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from csqcli.errors import UserError, did_you_mean, first_problem
from csqcli.quant.catalog import AUTO, MethodCard, find_card
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import find_layers
from csqcli.quant.method_settings import MethodSettings
from csqcli.quant.methods.base import Schedule, WeightMethod, plan_for
from csqcli.quant.names import MOST_PLANES
from csqcli.quant.passes.state import kernels_for
from csqcli.quant.wrappers import unwrap
from csqcli.system.settings import LARGE

_SAME = 1e-3  # of a weight's norm: what swapping values in and out in half precision may leave


class QuantizedOptimizer(torch.optim.Optimizer):
    """A weight method and a base optimizer, behind ``torch.optim.Optimizer``'s face.

    ``base`` must have been built over ``method.parameter_groups()`` and the model's remaining parameters. Learning-rate
    schedulers see its groups; the gates use the first group's learning rate. Weights turn hard at step
    ``harden_at_step`` (never by themselves when None); ``before_harden`` is called just before.
    """

    before_harden: Callable[[], None] | None = None

    def __init__(self, method: WeightMethod, base: torch.optim.Optimizer, *, harden_at_step: int | None = None) -> None:
        self.method, self.base, self.step_count = method, base, 0
        self.harden_at_step = harden_at_step
        super().__init__(base.param_groups, base.defaults)
        base.param_groups = self.param_groups
        self.state = base.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the gradients now in the model, then the weights of the next step.

        ``closure`` may compute those gradients; what it returns is returned.
        """
        return self._update(closure)

    def _update(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lr, lr_share = self._rate()
        self.method.collect(self.step_count, lr=lr, lr_share=lr_share)
        self.base.step()
        self.step_count += 1
        self.method.materialise(self.step_count)
        if self.step_count == self.harden_at_step:
            self.harden()
        return loss

    def _rate(self) -> tuple[float, float]:
        """The weights' learning rate now, and that as a share of its peak."""
        lr = self.param_groups[0]["lr"]
        return lr, lr / self.base.defaults["lr"]

    @torch.no_grad()
    def harden(self) -> None:
        """Fix every layer's planes, within the budget, and put the hard weights into the model. Idempotent."""
        if self.before_harden is not None:
            callback, self.before_harden = self.before_harden, None
            callback()
        self.method.harden(self.step_count)

    def hard_layers(self) -> list[HardLayer]:
        """The delivered layers. Call after :meth:`harden`."""
        return self.method.hard_layers()

    @contextlib.contextmanager
    def hard(self) -> Iterator[list[HardLayer]]:
        """Inside, the model has the weights that it would be delivered with now; on exit, training goes on as before.

        Yields the hard layers, in the method's order. For validating within your own loop::

            with optimizer.hard():
                accuracy = validate(model)
        """
        memo: dict[int, Any] = _gpu_passes(self.method)
        for layer in self.method.layers:  # the twin writes into the same model
            memo |= {id(layer): layer, id(layer.parameter): layer.parameter}
        twin = copy.deepcopy(self.method, memo)
        try:
            with torch.no_grad():
                twin.harden(self.step_count)
            yield twin.hard_layers()
        finally:
            with torch.no_grad():
                self.method.materialise(self.step_count)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all that is trained, the quantized weights included."""
        self.base.zero_grad(set_to_none)
        for layer in self.method.layers:  # the base optimizer may not know the weights themselves
            layer.parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step_count, "method": self.method.state_dict(), "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step_count = state_dict["step"]
        self.method.load_state_dict(state_dict["method"])
        self.base.load_state_dict(state_dict["base"])
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.method.materialise(self.step_count)


class CSQ(QuantizedOptimizer):
    """CSQ for your own training loop, in the place of its optimizer.

    The model is left as it is: csq reads ``weight.grad`` and writes ``weight``. ``param_groups`` are what is not
    quantized, trained by SGD, and last the quantized weights themselves, so that gradient clipping, GradScaler, schedulers
    and averages of weights find them where they find those of any optimizer. The last group's ``lr`` is the rate of the
    gates of `csq`; for `staged` it says how far into its schedule a run is: ``settings.latent_lr`` is taken times
    (lr / peak)², where the peak is OneCycleLR's ``max_lr``, else the ``lr`` given here; beyond the peak it does not grow.
    After ``total_steps`` steps the weights in the model are hard, and stay so in steps beyond. Weights are loaded before CSQ
    is built: it takes them as they are then, and the first step refuses what was loaded since.

    Args:
        model: any module with weights of linear- or convolution-like operations, already on its device, in any wrapper
            of torch.compile or data parallelism. Wrap and move it before.
        target_bits: mean planes per weight element that the result must not exceed, in (0, 8]; fractions are fine.
        total_steps: calls of :meth:`step` in the whole run. The schedule of masks and rounding is a function of it.
            Steps that a GradScaler skips do not count.
        lr, momentum, weight_decay: of SGD, for everything that is not a quantized weight.
        exclude: a glob over weight names (``fc``, ``layer4.*``), or several, that stay float.
        method: as ``csq methods`` lists them: ``staged``, for training from a checkpoint; ``csq``, the paper's
            bit-level algorithm; or ``package.module:Class``.
        settings: the method's own, as its section in a recipe has them.
        steps_per_epoch: for settings that change once per epoch (``beta_schedule: epoch``); None makes the run one epoch.

    Raises:
        UserError: for a target that cannot be met, globs that match nothing, and numbers out of range.

    Example::

        optimizer = csqcli.CSQ(model, target_bits=3, total_steps=len(loader) * epochs)
        for images, labels in itertools.chain.from_iterable(loader for _ in range(epochs)):
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        csqcli.save(model, optimizer, "model.safetensors", source="timm:resnet18", num_classes=1000)
    """

    _went_beyond = False  # whether a step after the last was warned of

    def __init__(
        self,
        model: nn.Module,
        target_bits: float,
        *,
        total_steps: int,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        exclude: str | Sequence[str] = (),
        method: str = "staged",
        settings: MethodSettings | Mapping[str, Any] | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        _check_steps("total_steps", total_steps)
        if steps_per_epoch is not None:
            _check_steps("steps_per_epoch", steps_per_epoch)
        if not isinstance(model, nn.Module):
            hint = "give the model itself: csqcli.CSQ(model, …), not model.parameters()"
            raise UserError(f"the model must be a torch.nn.Module, not a {type(model).__name__}", hint=hint)
        check_target(target_bits)
        if not isinstance(lr, (int, float)) or not 0 < lr <= LARGE:  # NaN is refused too
            what = f"lr must be a number above 0 and at most {LARGE:g}, not {lr!r}"
            raise UserError(what, hint="schedulers may lower it to 0 later")
        model = unwrap(model)
        layers, _ = find_layers(model, exclude=exclude)
        card = _trainable(method, target_bits)
        plan = plan_for(
            layers,
            target_bits,
            Schedule(total_steps, steps_per_epoch or total_steps),
            bits=MOST_PLANES,
            planes=[int(target_bits)] * len(layers) if card.takes == "planes" else None,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
        )
        chosen = card.load()(layers, plan, settings_of(card, settings))
        base = torch.optim.SGD(base_groups(model, chosen), lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.total_steps, self.method_name = total_steps, method
        self._built = False
        super().__init__(chosen, base, harden_at_step=chosen.harden_at_step or total_steps)
        weights = [layer.parameter for layer in layers]
        self.add_param_group({"params": weights, "weight_decay": 0.0, "peak_lr": lr})
        self._built = True
        self._share_with_base()
        self._versions: list[int] | None = self._versions_now()

    def _versions_now(self) -> list[int]:
        """They move when somebody else writes to a weight in place; csq writes through ``.data``, which moves none."""
        return [layer.parameter._version for layer in self.method.layers]

    @torch.no_grad()
    def _check_untouched(self) -> None:
        """UserError before the first step where a weight holds other values than csq put there: they would be lost.

        What was put there is compared only where somebody has written; equal values may be, as by DDP's broadcast.
        """
        if self.step_count:
            return
        now = self._versions_now()
        before = [-1] * len(now) if self._versions is None else self._versions
        moved = [layer for layer, one, two in zip(self.method.layers, before, now, strict=True) if one != two]
        if not moved:
            return
        found = [layer.parameter.detach().clone() for layer in moved]
        self.method.materialise(0)
        for layer, values in zip(moved, found, strict=True):
            own = layer.parameter.detach().float()
            if not (values.float() - own).norm() <= _SAME * own.norm():  # NaN is refused too
                for replaced, theirs in zip(moved, found, strict=True):
                    replaced.parameter.data.copy_(theirs)
                what = "other weights were loaded after CSQ was built, and training would throw them away"
                raise UserError(what, where=layer.name, hint="load the weights first, then build CSQ")
        self._versions = now

    def _share_with_base(self) -> None:
        """The base optimizer steps on every group but the last, in the very same mappings."""
        self.base.__setstate__({"param_groups": self.param_groups[:-1], "state": self.state})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the gradients now in the model, then the weights of the next step.

        Args:
            closure: computes the gradients and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            UserError: at the first step, when weights were loaded after CSQ was built.

        Beyond ``total_steps`` the quantized weights stay as they are delivered, and what is not quantized trains on, at its
        groups' rates. The first such step warns.
        """
        if self.step_count >= self.total_steps:
            return self._step_beyond(closure)
        self._check_untouched()
        return self._update(closure)

    def _step_beyond(self, closure: Callable[[], Any] | None) -> Any:
        """A step of all but the quantized weights, which are hard: neither they nor what stands behind them moves."""
        if not self._went_beyond:
            self._went_beyond = True
            what = (
                f"CSQ.step: all {self.total_steps} steps of total_steps are done; quantized weights stay as they are, and the "
                "rest trains on. Build CSQ with the number of steps of the whole run"
            )
            warnings.warn(what, stacklevel=5)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.method.parameter_groups():
            for latent in group["params"]:
                latent.grad = None  # that of the last step, where nobody has taken it away
        self.base.step()
        return loss

    @torch.no_grad()
    def harden(self) -> None:
        """Fix every layer's planes, within the budget, and put the hard weights into the model. Idempotent."""
        self._check_untouched()
        super().harden()

    @contextlib.contextmanager
    def hard(self) -> Iterator[list[HardLayer]]:
        self._check_untouched()  # on exit csq's weights are in the model, and the first step would find nothing
        with super().hard() as layers:
            yield layers

    def _rate(self) -> tuple[float, float]:
        group = self.param_groups[-1]
        lr = float(group["lr"])
        return lr, min(lr / float(group.get("max_lr", group["peak_lr"])), 1.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or set them to zero."""
        torch.optim.Optimizer.zero_grad(self, set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is built: the budget and the schedule are those of the weights it was built with."""
        if self._built:
            hint = "build it over the whole model; parameters that need no gradient yet may be frozen meanwhile"
            raise UserError("takes no further parameters", where="CSQ.add_param_group", hint=hint)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """``state`` and ``param_groups`` as of any optimizer, and ``csq``: steps done, and latents with their moments.

        Plain tensors, numbers, lists and mappings: ``torch.load(weights_only=True)`` reads what ``torch.save`` writes of
        it. A run that goes on from it ends in the same bits.
        """
        own = {"step": self.step_count, **self._asked(), "method": self.method.state_dict()}
        return {**torch.optim.Optimizer.state_dict(self), "csq": own}

    def _asked(self) -> dict[str, Any]:
        """What a run was asked for; one that goes on from its state must be asked for the same."""
        return {
            "total_steps": self.total_steps,
            "target_bits": float(self.method.plan.budget.target),
            "method_name": self.method_name,
            "layers": [layer.name for layer in self.method.layers],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run where :meth:`state_dict` left it; the model's quantized weights follow.

        Raises:
            UserError: when it is another optimizer's state, or that of a run of other length, target, method or layers.
        """
        own = state_dict.get("csq")
        if own is None:
            raise UserError("is not the state of a CSQ optimizer", where="CSQ.load_state_dict")
        for name, asked in self._asked().items():
            if own.get(name, asked) != asked:  # states of csq 0.2 say total_steps alone
                said = "other layers" if name == "layers" else f"{name} {own[name]!r}, not {asked!r}"
                what = f"the state is that of a run with {said}"
                raise UserError(what, where="CSQ.load_state_dict", hint="build CSQ as at the first start")
        plain = {name: value for name, value in state_dict.items() if name != "csq"}
        torch.optim.Optimizer.load_state_dict(self, plain)
        self.method.load_state_dict(own["method"])
        self.step_count = own["step"]
        with torch.no_grad():
            self.method.materialise(self.step_count)
        self._versions = self._versions_now()

    def __getstate__(self) -> dict[str, Any]:
        names = ("method", "base", "step_count", "harden_at_step", "total_steps", "method_name", "_built")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_with_base()
        self._versions = None  # a copy's weights count anew

    def __deepcopy__(self, memo: dict[int, Any]) -> CSQ:
        """A copy with weights of its own, or with those of a model that is copied in the same call."""
        memo |= _gpu_passes(self.method)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def check_target(target_bits: float) -> None:
    """UserError for what is no mean of planes."""
    is_number = isinstance(target_bits, numbers.Real) and not isinstance(target_bits, bool)
    if not is_number or not 0 < target_bits <= MOST_PLANES:  # NaN is refused too
        raise UserError(f"target_bits must be above 0 and at most {MOST_PLANES}, not {target_bits!r}")


def _check_steps(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        hint = "give a number of optimizer steps: len(loader) for an epoch, len(loader) * epochs for the whole run"
        raise UserError(f"{name} must be a whole number of at least 1, not {value!r}", hint=hint)


def _trainable(method: str, target_bits: float) -> MethodCard:
    """The card of a method that can train towards the target. UserError for any other."""
    if method == AUTO:
        hint = "name one: staged from a checkpoint, csq from scratch"
        raise UserError(
            "`auto` chooses by where the weights come from, of which an optimizer does not know",
            where="method",
            hint=hint,
        )
    card = find_card(method, where="method")
    if card.name == "float":
        raise UserError("`float` quantizes nothing", where="method", hint="use a torch optimizer")
    if not card.trains:
        raise UserError(
            f"`{card.name}` trains nothing", where="method", hint="csqcli.quantize does it, or `csq search --epochs 0`"
        )
    if card.takes == "planes" and target_bits != int(target_bits):
        hint = "take a whole target, or a method that searches planes"
        raise UserError(
            f"`{card.name}` gives every layer the same planes, not {target_bits:g}", where="method", hint=hint
        )
    return card


def settings_of(card: MethodCard, given: MethodSettings | Mapping[str, Any] | None) -> MethodSettings:
    """The settings of a method from a mapping of some of them. UserError for what they are not."""
    if isinstance(given, MethodSettings) and not isinstance(given, card.settings):
        what = f"{type(given).__name__} are not those of the method `{card.name}`"
        raise UserError(what, where="settings", hint=f"give {card.settings.__name__}, or a mapping")
    if isinstance(given, MethodSettings):
        return given
    try:
        return card.settings.model_validate(dict(given or {}))
    except ValidationError as error:
        problem = first_problem(error)
        unknown = problem.kind == "extra_forbidden"
        hint = did_you_mean(problem.key, card.settings.model_fields) if unknown else ""
        raise UserError(problem.text, where=f"settings of `{card.name}`", hint=hint) from None


def _gpu_passes(method: WeightMethod) -> dict[int, Any]:
    """For deepcopy's memo: the kernels that a method's state refers to are a Python module, of which there is one."""
    device = method.layers[0].parameter.device if method.layers else torch.device("cpu")
    kernels = kernels_for(device)
    return {} if kernels is None else {id(kernels): kernels}


def base_groups(model: nn.Module, method: WeightMethod) -> list[dict[str, Any]]:
    """Parameter groups of the base optimizer: what is not under quantization, then what the method hands over."""
    owned = {id(layer.parameter) for layer in method.layers}
    others = [p for p in model.parameters() if id(p) not in owned and p.requires_grad]
    return [{"params": others}, *method.parameter_groups()]
