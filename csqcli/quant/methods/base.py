"""The seam between a training loop and a way to train quantized weights.

A weight method owns the *values* of the layers' weights. The loop runs an ordinary model; after ``backward`` it calls
:meth:`WeightMethod.collect`, which reads ``parameter.grad`` (dL/dW), lets the base optimizer step on whatever tensors
the method handed it, and calls :meth:`WeightMethod.materialise`, which writes the next weights. ``hard_layers`` is what
reaches the file. Methods differ in nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from csqcli.quant.budget import Budget, make_budget
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import Layer
from csqcli.quant.method_settings import MethodSettings
from csqcli.quant.names import MOST_PLANES


@dataclass(frozen=True)
class Schedule:
    """Length of a training phase. What changes over it is a pure function of the step, so ranks and resumed runs agree."""

    total_steps: int
    steps_per_epoch: int

    def progress(self, step: int, *, per_epoch: bool = False) -> float:
        """0 at the first step (epoch), 1 at the last."""
        if per_epoch:
            epochs = max(self.total_steps // self.steps_per_epoch, 1)
            return min(step // self.steps_per_epoch, epochs - 1) / max(epochs - 1, 1)
        return min(step, self.total_steps - 1) / max(self.total_steps - 1, 1)


@dataclass(frozen=True)
class Plan:
    """What a weight method is asked to do, whichever it is. Its own settings come beside it."""

    schedule: Schedule
    budget: Budget
    planes: Sequence[int] | None = None  # of every layer, where they were decided before training
    start: Sequence[HardLayer] | None = None  # delivered layers to train on from, masks fixed
    searched: WeightMethod | None = None  # the method that found them, where its state is still at hand
    lr: float = 0.05  # peak rate of the base optimizer, and what follows it: momentum and weight decay
    momentum: float = 0.9
    weight_decay: float = 5e-4
    mean_lr_share: float = 0.5  # mean of the learning rate over the schedule, as a share of its peak; a cosine's
    from_scratch: bool = False  # the model's weights are fresh, and nothing of them needs to be kept
    rate_share: float = 1.0  # multiplies the rates that a method has of its own; less than 1 after a rollback
    state_dtype: torch.dtype = torch.float32  # of what is kept per weight; bfloat16 takes half the memory


def plan_for(
    layers: Sequence[Layer], target: float, schedule: Schedule, *, bits: int = MOST_PLANES, **more: Any
) -> Plan:
    """The plan for a target of mean planes over elements, without rules for single layers. ``more`` are Plan's fields."""
    return Plan(schedule, make_budget(layers, target, bits=bits), **more)


class WeightMethod(ABC):
    """What every method offers. Subclass it, and name the class by ``--method package.module:Class``.

    The class attributes are what `csq methods` prints and what a recipe is checked against. The constructor takes the
    layers, a :class:`Plan` and an instance of ``Settings``, and leaves the weights of step 0 in the model.
    """

    name: ClassVar[str]  # also the name of its section in a recipe
    summary: ClassVar[str] = ""  # one line
    citation: ClassVar[str] = ""
    takes: ClassVar[Literal["target", "planes", "either"]] = "target"  # searches planes itself, is given them, or both
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    min_planes: ClassVar[int] = 0  # of a layer, as max_planes: a recipe that asks for fewer or more is refused
    max_planes: ClassVar[int] = MOST_PLANES
    finetunes: ClassVar[bool] = (
        False  # whether it accepts Plan.start; delivered integers are else trained on by `staged`
    )

    def __init__(self, layers: Sequence[Layer], plan: Plan, settings: Any = None) -> None:
        self.layers, self.plan, self.schedule = list(layers), plan, plan.schedule
        self.settings = settings if settings is not None else self.Settings()

    @classmethod
    def state_bytes(cls, settings: Any, *, max_bits: int, state_dtype: torch.dtype) -> int:
        """Bytes per weight that the method keeps beside the weight and its gradient. For the memory estimate."""
        return 4

    @classmethod
    def trained_values(cls, *, max_bits: int) -> int:
        """Numbers per weight that the base optimizer trains, each with as many moments as it keeps. For the memory estimate."""
        return 1

    @property
    def harden_at_step(self) -> int | None:
        """The step at which weights turn hard and the rest of the model adapts to them; None where that is at the end."""
        return None

    @property
    def searches_planes(self) -> bool:
        """Whether planes are neither given nor those of a delivered model."""
        return self.takes != "planes" and self.plan.planes is None and self.plan.start is None

    def fixed_planes(self) -> list[int] | None:
        """Planes of every layer, once they are fixed."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Tensors the base optimizer steps on in place of the layers' weights."""
        return []

    @abstractmethod
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        """Take dL/dW from the parameters: update own state, or hand gradients to ``parameter_groups``' tensors.

        ``lr`` is the base optimizer's learning rate now, ``lr_share`` that rate as a share of its peak.
        """

    @abstractmethod
    def materialise(self, step: int) -> None:
        """Write the weights that ``step`` trains with into the model."""

    @abstractmethod
    def harden(self, step: int) -> None:
        """Fix masks and integers for good, within the budget. Idempotent."""

    @abstractmethod
    def hard_layers(self) -> list[HardLayer]:
        """The delivered layers; call after :meth:`harden`."""

    def unrounded(self) -> list[Tensor] | None:
        """What stands behind each layer's rounded weights, of their shape and at their scale, once they are hard too: another
        target may begin with it. None where nothing is kept of it, and then none does."""
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on bit for bit; tensors, numbers, lists and mappings."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def unit_steps(self, step: int) -> list[HardLayer] | None:
        """The paper's hardening, every gate to its unit step, where it is not what is delivered but is to be measured too."""
        return None

    def monitor(self, step: int) -> dict[str, Any]:
        """Numbers for the progress display and metrics.jsonl; ``masks``, a string per layer, once planes are on or off."""
        return {}


class FloatTraining(WeightMethod):
    """No quantization: the base optimizer trains the weights themselves. The same loop, for float baselines."""

    name = "float"

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [layer.parameter for layer in self.layers]}] if self.layers else []

    def collect(self, step: int, *, lr: float, lr_share: float) -> None: ...

    def materialise(self, step: int) -> None: ...

    def harden(self, step: int) -> None: ...

    def hard_layers(self) -> list[HardLayer]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    @classmethod
    def state_bytes(cls, settings: Any, *, max_bits: int, state_dtype: torch.dtype) -> int:
        return 0
