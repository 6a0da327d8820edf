"""csq as an optimizer over an untouched model: a weight method plus a base optimizer for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from csqcli.quant.catalog import StagedSettings
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import find_layers
from csqcli.quant.methods.base import Schedule, WeightMethod, plan_for
from csqcli.quant.methods.staged import Staged


class QuantizedOptimizer(torch.optim.Optimizer):
    """A weight method and a base optimizer, behind ``torch.optim.Optimizer``'s face.

    ``base`` must have been built over ``method.parameter_groups()`` and the model's remaining parameters. Learning-rate
    schedulers see its groups; the gates use the first group's learning rate. Weights turn hard at step
    ``harden_at_step`` (never by themselves when None); ``before_harden`` is called just before.
    """

    def __init__(self, method: WeightMethod, base: torch.optim.Optimizer, *, harden_at_step: int | None = None) -> None:
        self.method, self.base, self.step_count = method, base, 0
        self.harden_at_step = harden_at_step
        self.before_harden: Callable[[], None] | None = None
        super().__init__(base.param_groups, base.defaults)
        base.param_groups = self.param_groups
        self.state = base.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients now in the model, then the weights of the next step."""
        if closure is not None:
            raise ValueError("closures are not supported: call backward() first, then step()")
        lr = self.param_groups[0]["lr"]
        self.method.collect(self.step_count, lr=lr, lr_share=lr / self.base.defaults["lr"])
        self.base.step()
        self.step_count += 1
        self.method.materialise(self.step_count)
        if self.step_count == self.harden_at_step:
            self.harden()

    @torch.no_grad()
    def harden(self) -> None:
        """Fix masks and integers, within the budget; from now on only the rest of the model trains. Idempotent."""
        if self.before_harden is not None:
            callback, self.before_harden = self.before_harden, None
            callback()
        self.method.harden(self.step_count)

    def hard_layers(self) -> list[HardLayer]:
        """The delivered layers. Call after :meth:`harden`."""
        return self.method.hard_layers()

    def zero_grad(self, set_to_none: bool = True) -> None:
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
    """CSQ for your own training loop: ``optimizer = CSQ(model, target_bits=3, total_steps=len(loader) * epochs)``.

    Takes the place of the optimizer in an ordinary loop; the model is left as it is, and csq writes its weights. After
    ``total_steps`` calls of :meth:`step`, ``csqcli.save(model, optimizer, path, …)`` writes the file. A learning-rate
    scheduler acts on the latents too, which follow the share of the peak rate.

    Args:
        model: any module with weights of linear- or convolution-like operations, already on its device.
        target_bits: mean planes per weight element that the result must not exceed.
        total_steps: optimizer steps of the whole run; the schedule of the masks is a function of it.
        lr, momentum, weight_decay: SGD for everything that is not a quantized weight.
        exclude: globs of weights that stay float.
        settings: settings of the method `staged`.

    Raises UserError for an infeasible target and for globs that match nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        target_bits: float,
        *,
        total_steps: int,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        exclude: Sequence[str] = (),
        settings: StagedSettings | None = None,
    ) -> None:
        layers, self.left_float = find_layers(model, exclude=exclude)
        method = Staged(layers, plan_for(layers, target_bits, Schedule(total_steps, total_steps)), settings)
        base = torch.optim.SGD(base_groups(model, method), lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(method, base)


def base_groups(model: nn.Module, method: WeightMethod) -> list[dict[str, Any]]:
    """Parameter groups of the base optimizer: what is not under quantization, then what the method hands over."""
    owned = {id(layer.parameter) for layer in method.layers}
    others = [p for p in model.parameters() if id(p) not in owned and p.requires_grad]
    return [{"params": others}, *method.parameter_groups()]
