"""The seam between a training loop and a way to train quantized weights.

A weight method owns the *values* of the layers' weights. The loop runs an ordinary model; after ``backward`` it calls
:meth:`WeightMethod.collect`, which reads ``parameter.grad`` (dL/dW), lets the base optimizer step on whatever tensors
the method handed it, and calls :meth:`WeightMethod.materialise`, which writes the next weights. ``hard_layers`` is what
reaches the file. Methods differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csqcli.errors import UserError
from csqcli.quant import budget, csq
from csqcli.quant.bitplanes import BitPlanes
from csqcli.quant.hardening import choose_planes, fit_levels
from csqcli.quant.layers import Layer
from csqcli.quant.rounding import mse_step


@dataclass(frozen=True)
class HardLayer:
    """A layer as delivered: integers × scale is its weight, bit for bit.

    Trailing zero planes are shifted out of the integers and into the scale, which is exact. ``scale`` has shape [1], or
    [channels] along ``channel_dim`` of the weight.
    """

    name: str
    integers: Tensor  # int32, the weight's shape
    scale: Tensor  # float32, [1] or [channels]
    mask: Tensor  # bool [bits], index 0 the least significant plane
    channel_dim: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def planes(self) -> int:
        return int(self.mask.sum())

    @property
    def stored_bits(self) -> int:
        """Bits per weight of a dense sign-magnitude layout: the span of the mask's planes plus a sign; 0 if empty."""
        on = torch.nonzero(self.mask).flatten()
        return int(on[-1] - on[0]) + 2 if len(on) else 0

    def weight(self) -> Tensor:
        """Hard weight, float32."""
        return self.integers.to(torch.float32) * spread(self.scale, self.integers, self.channel_dim)


def spread(scale: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """A [1] or [channels] scale, shaped to broadcast over a weight."""
    if scale.numel() == 1:
        return scale.view(1)
    shape = [1] * like.dim()
    shape[channel_dim] = -1
    return scale.view(shape)


def hard_layer(layer: Layer, integers: Tensor, step: Tensor, mask: Tensor) -> HardLayer:
    """Shift trailing zero planes out of ``integers`` (over 2^0 … 2^(n−1)) and into ``step`` (the value of integer 1)."""
    on = torch.nonzero(mask).flatten()
    lowest = int(on[0]) if len(on) else 0
    shifted = (integers.abs() >> lowest) * integers.sign()
    scale = (step.detach().float() * 2.0**lowest).reshape(-1).cpu()
    return HardLayer(layer.name, shifted.to(torch.int32).cpu(), scale, mask.cpu(), layer.channel_dim, layer.aliases)


@dataclass(frozen=True)
class Clock:
    """Where training is: schedules are pure functions of it, so ranks and resumed runs agree."""

    total_steps: int
    steps_per_epoch: int

    def progress(self, step: int, *, per_epoch: bool = False) -> float:
        """0 at the first step (epoch), 1 at the last."""
        if per_epoch:
            epochs = max(self.total_steps // self.steps_per_epoch, 1)
            return min(step // self.steps_per_epoch, epochs - 1) / max(epochs - 1, 1)
        return min(step, self.total_steps - 1) / max(self.total_steps - 1, 1)


class WeightMethod:
    """What every method offers; the base class is plain float training."""

    target_bits: float | None = None  # the budget asked for

    def __init__(self, layers: Sequence[Layer], clock: Clock) -> None:
        self.layers, self.clock = list(layers), clock

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Tensors the base optimizer steps on in place of the layers' weights."""
        return [{"params": [layer.parameter for layer in self.layers]}] if self.layers else []

    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        """Take dL/dW from the parameters: update own state, or hand gradients to ``parameter_groups``' tensors.

        ``lr`` is the base optimizer's learning rate now, ``lr_share`` that rate as a share of its peak.
        """

    def materialise(self, step: int) -> None:
        """Write the weights that ``step`` trains with into the model."""

    def harden(self, step: int) -> None:
        """Fix masks and integers for good, within the budget. Idempotent."""

    def hard_layers(self) -> list[HardLayer]:
        """The delivered layers; call after :meth:`harden`."""
        return []

    def preview(self, step: int) -> list[HardLayer]:
        """What :meth:`hard_layers` would give if training stopped now; changes nothing."""
        return []

    def monitor(self, step: int) -> dict[str, float]:
        """Numbers for the progress display and metrics.jsonl."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


_MOST_GAIN = 1e4  # of a preconditioned step: beyond it a gate's share of the weight is too small to be steered by


@dataclass(frozen=True)
class GateSettings:
    """Knobs of gate training; defaults are the paper's (section IV-A) where it names one."""

    bits: int = 8
    target_bits: float | None = None  # None: planes are fixed throughout and nothing is searched (Eq. 3, Eq. 4)
    beta_initial: float = 1.0
    beta_final: float = 200.0
    beta_per_epoch: bool = True
    reg_strength: float = 0.01  # λ of Eq. 7
    logit: float = 1.0  # |m_p|, |m_n| at the start
    mask_logit: float = 1.0  # m_B at the start
    digits: str = "sign-magnitude"  # that logits start from: sign-magnitude (the authors' code) | signed
    init_scale: float | str = (
        1.0  # s at the start: share of a layer's largest magnitude | "mse", for target_bits planes
    )
    gate_steps: str = "sgd"  # on logits: sgd (the paper) | preconditioned, as large in the weights as SGD's on them
    momentum: float = 0.9
    weight_decay: float = 5e-4
    refit_scale: bool = False  # keep weights still when β moves
    precision_count: str = "sign"  # planes that Δ_S counts: m_B ≥ 0 (the paper) | soft, Σ f(m_B)
    fix_masks_at: float = 1.0  # share of training after which planes are fixed and bits train on (Eq. 4)
    restart_beta: float | None = None  # β that bits restart at once planes are fixed; None: they go on as they are
    rounding: str = "threshold"  # unit steps (the paper) | nearest, to the soft weight, with its own scale
    harden_at: float = 1.0  # share of training after which the weights are hard and only the rest adapts
    state_dtype: torch.dtype = torch.float32  # of bit logits and momenta; bfloat16 takes half the memory
    limits: budget.PlaneLimits | None = None


@dataclass
class _Hardened:
    mask: Tensor
    integers: list[Tensor]
    steps: Tensor  # [layers]: the value of integer 1, positive


class GateMethod(WeightMethod):
    """CSQ as published: gradient steps on bit logits, mask logits and scales (Eq. 5–7); Eq. 3 and 4 when planes are fixed.

    Planes are fixed throughout (no target, or a delivered model to go on from), from ``fix_masks_at`` on, or at the end.
    When they are fixed earlier, they are chosen within the budget, each scale is refitted, and what is trained from
    there on is what is delivered.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        clock: Clock,
        settings: GateSettings,
        *,
        start: Sequence[HardLayer] | None = None,
    ) -> None:
        """``start``: delivered layers to go on from, mask fixed (Eq. 4); None starts from the model's own weights."""
        super().__init__(layers, clock)
        self.settings = settings
        self.target_bits = settings.target_bits
        self.weights = [layer.weights for layer in layers]
        device = layers[0].parameter.device
        self.limits = settings.limits or budget.plane_limits(layers, bits=settings.bits)
        if settings.target_bits is not None:
            budget.check_feasible(settings.target_bits, self.weights, self.limits)
        signed = settings.digits == "signed"
        self.planes = BitPlanes(
            layers, bits=settings.bits, device=device, state_dtype=settings.state_dtype, signed=signed
        )
        self.device_weights = torch.tensor(self.weights, dtype=torch.float64, device=device)
        self.fisher = torch.zeros(len(layers), device=device)  # running Σ_i g_i² per layer
        self.hardened: _Hardened | None = None
        self.fixing_step = self._fixing_step(start)
        self.planes.mask_logits.fill_(settings.mask_logit)
        if self.fixing_step == 0:
            mask = torch.ones(len(layers), settings.bits, dtype=torch.bool)
            for index, delivered in enumerate(start or ()):
                mask[index] = delivered.mask
            self.planes.fix_mask(mask)
        beta = self.beta(0)
        if start is not None:
            for index, delivered in enumerate(start):
                self._start_from(index, delivered, beta)
        elif self.fixing_step == 0 and settings.restart_beta is not None:
            for index, layer in enumerate(layers):
                self._restart_bits(index, layer.flat(layer.parameter.detach()).float(), starts=(), beta=beta)
        else:
            scales = [initial_scale(layer.parameter, settings) for layer in layers]
            self.planes.initialise(logit=settings.logit, mask_logit=settings.mask_logit, beta=beta, scales=scales)
        self.materialise(0)

    def _fixing_step(self, start: Sequence[HardLayer] | None) -> int | None:
        """The first step with fixed planes: 0 where they are fixed throughout, None where they are soft to the end."""
        if start is not None or self.settings.target_bits is None:
            return 0
        share = self.settings.fix_masks_at
        return max(1, round(share * self.clock.total_steps)) if share < 1 else None

    def _start_from(self, index: int, layer: HardLayer, beta: float) -> None:
        if layer.scale.numel() > 1:
            raise UserError(
                "gates train one scale per layer, the file has one per channel",
                where=layer.name,
                hint="use --method csq",
            )
        lowest = int(torch.nonzero(layer.mask).flatten()[0]) if layer.planes else 0
        full_scale = layer.scale / 2.0**lowest * (2**self.settings.bits - 1)
        integers = (layer.integers << lowest).to(self.planes.pos.device)
        self.planes.set_integers(index, integers, full_scale, logit=self.settings.logit, beta=beta)

    def beta(self, step: int) -> float:
        """Algorithm 1's temperature; it starts again, from ``restart_beta``, with the first step of fixed planes."""
        settings, restarted = self.settings, self.settings.restart_beta
        if restarted is not None and self.fixing_step is not None and step >= self.fixing_step:
            last = max(settings.harden_at * self.clock.total_steps, self.fixing_step + 1)
            progress = (step - self.fixing_step) / (last - self.fixing_step)
            return csq.temperature(progress, initial=restarted, final=settings.beta_final)
        progress = self.clock.progress(step, per_epoch=settings.beta_per_epoch)
        return csq.temperature(progress, initial=settings.beta_initial, final=settings.beta_final)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        if self.hardened is not None:
            return
        beta, planes, settings = self.beta(step), self.planes, self.settings
        options = {"lr": lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
        gradients = planes.update_gates(beta, **options, gain=self._gain(beta), seed=step)
        self.fisher.mul_(0.99).add_(gradients.squared, alpha=0.01)
        sgd_(planes.scale, planes.scale_momentum, gradients.scale, **options)
        if planes.fixed_mask is None:  # Eq. 7: ∂(L + λΔ_S R)/∂m_B = (dL/df + λΔ_S)·f'
            slope = csq.gate_slope(csq.gate(planes.mask_logits, beta), beta)
            mask_gradient = (gradients.mask + settings.reg_strength * self._gap(beta)) * slope
            sgd_(planes.mask_logits, planes.mask_momentum, mask_gradient, **options)
        if step + 1 == self.fixing_step:
            self._fix_masks(beta, self.beta(step + 1))
        elif settings.refit_scale:
            planes.refit_scale(beta, self.beta(step + 1))

    def _gain(self, beta: float) -> Tensor | None:
        """[layers, 1]: what gate gradients are multiplied by; None for 1.

        With c = s·2^(n−1)/(2^n−1) of the top plane, an SGD step on a logit moves the weight by (c·β·σ')²·dL/dW: by
        (cβ/4)², at an undecided gate, of what SGD on the weight itself would. The gain takes that factor out.
        """
        if self.settings.gate_steps == "sgd":
            return None
        top = self.planes.scale * self.planes.plane_weights[-1]
        return 1 / (top * beta / 4).square().clamp_min(1 / _MOST_GAIN).unsqueeze(1)

    def _gap(self, beta: float) -> Tensor:
        """Δ_S on the device and in float64, so that a step never waits for the host."""
        mask = self.planes.mask(beta) if self.settings.precision_count == "soft" else self.planes.hard_mask()
        mean = (mask.sum(dim=1).double() @ self.device_weights) / sum(self.weights)
        return mean - (self.settings.target_bits or 0.0)

    @torch.no_grad()
    def _fix_masks(self, beta: float, new_beta: float) -> None:
        """From Eq. 5 to Eq. 4: planes chosen within the budget, scales refitted, bits restarted where that is asked for."""
        planes = self.planes
        chosen = self._choose_planes(beta)
        soft = [planes.soft_weight(index, beta) for index in range(len(self.layers))]
        starts = [self._likely_steps(index, beta) for index in range(len(self.layers))]
        planes.fix_mask(chosen)
        for index, weight in enumerate(soft):
            if self.settings.restart_beta is None:
                planes.fit_scale(index, weight, new_beta)
            else:
                self._restart_bits(index, weight, starts=starts[index], beta=new_beta)
        planes.scale_momentum.zero_()

    def _restart_bits(self, index: int, weight: Tensor, *, starts: Sequence[float], beta: float) -> None:
        """Bits of one layer anew, on its fixed planes: the soft weight at ``beta`` is ``weight``, clipped to what they reach.

        The step is the one whose levels are nearest to the weight; what lies between two levels stays in the lowest
        plane's digits, so that nothing is rounded before training has decided it.
        """
        planes = self.planes
        assert planes.fixed_mask is not None
        fit = fit_levels(weight, planes.fixed_mask[index], starts=starts)
        full_scale = fit.step * (2**planes.bits - 1)
        values = self.layers[index].unflatten(weight / fit.step)
        planes.set_integers(index, values, full_scale, logit=1.0, beta=beta, signed=True)
        where = planes.slices[index]
        planes.pos_momentum[:, where] = planes.neg_momentum[:, where] = 0

    def materialise(self, step: int) -> None:
        if self.hardened is None:
            self.planes.materialise(self.beta(step))
            return
        for layer, hard in zip(self.layers, self.hard_layers(), strict=True):
            layer.parameter.data.copy_(hard.weight())

    def harden(self, step: int) -> None:
        if self.hardened is None:
            self.hardened = self._harden(step)
            self.materialise(step)

    @torch.no_grad()
    def _harden(self, step: int) -> _Hardened:
        beta, planes = self.beta(step), self.planes
        if self.settings.rounding == "threshold":
            mask = self._project(beta)
            steps = planes.scale / (2**self.settings.bits - 1)
            signs = torch.where(steps < 0, -1, 1).to(torch.int32)  # a negative scale goes into the integers
            integers = [part * sign for part, sign in zip(planes.threshold_integers(mask), signs, strict=True)]
            return _Hardened(mask, integers, steps.abs())
        mask = planes.fixed_mask if planes.fixed_mask is not None else self._choose_planes(beta)
        fits = [
            fit_levels(planes.soft_weight(index, beta), mask[index], starts=self._likely_steps(index, beta))
            for index in range(len(self.layers))
        ]
        integers = [layer.unflatten(fit.integers.to(torch.int32)) for layer, fit in zip(self.layers, fits, strict=True)]
        return _Hardened(mask, integers, torch.stack([fit.step for fit in fits]))

    def _likely_steps(self, index: int, beta: float) -> list[float]:
        """Steps at which a layer's soft weight lies on levels if its gates are decided and its masks alike."""
        step = float(self.planes.scale[index].abs()) / (2**self.settings.bits - 1)
        return [step, *(step * soft for soft in self.planes.mask(beta)[index].tolist())]

    def _curvature(self) -> Tensor:
        """[layers]: mean squared gradient of a weight, what a squared error there costs; ones before the first gradient."""
        curvature = self.fisher / self.device_weights.to(self.fisher)
        return torch.where((curvature > 0).any(), curvature, torch.ones_like(curvature))

    def _choose_planes(self, beta: float) -> Tensor:
        """bool [layers, bits]: the planes that keep the soft model best within the budget (`hardening.choose_planes`)."""
        planes, target = self.planes, self.settings.target_bits
        assert target is not None
        weights = [planes.soft_weight(index, beta) for index in range(len(self.layers))]
        energy, masks = planes.plane_energy(beta), planes.mask(beta)
        return choose_planes(weights, masks, energy, self._curvature(), target=target, limits=self.limits)

    def _project(self, beta: float) -> Tensor:
        """bool [layers, bits]: planes with m_B ≥ 0, the least important ones dropped until the budget is met."""
        mask, target = self.planes.hard_mask(), self.settings.target_bits
        if target is None or self.planes.fixed_mask is not None:
            return mask
        importance = self.planes.plane_energy(beta) * self._curvature()[:, None]
        return budget.project(mask, importance, self.weights, target=target, limits=self.limits, spendable=mask)

    def hard_layers(self) -> list[HardLayer]:
        assert self.hardened is not None, "harden() first"
        return self._deliver(self.hardened)

    def preview(self, step: int) -> list[HardLayer]:
        return self._deliver(self.hardened or self._harden(step))

    def _deliver(self, hardened: _Hardened) -> list[HardLayer]:
        columns = zip(self.layers, hardened.integers, hardened.steps, hardened.mask, strict=True)
        return [hard_layer(layer, integers, step, mask) for layer, integers, step, mask in columns]

    def mean_bits(self) -> float:
        mask = self.planes.hard_mask() if self.hardened is None else self.hardened.mask
        return budget.mean_planes(mask.sum(dim=1).tolist(), self.weights)

    def budget_gap(self) -> float:
        """Δ_S: mean planes over weight elements minus the target; 0 where nothing is searched."""
        return self.mean_bits() - self.settings.target_bits if self.settings.target_bits is not None else 0.0

    def monitor(self, step: int) -> dict[str, float]:
        beta, gap = self.beta(step), self.budget_gap()
        penalty = 0.0
        if self.planes.fixed_mask is None:
            regulariser = float(csq.mask_regulariser(self.planes.mask_logits, beta))
            penalty = self.settings.reg_strength * float(self._gap(beta)) * regulariser
        return {"beta": beta, "mean_bits": self.mean_bits(), "budget_gap": gap, "reg_loss": penalty}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"planes": self.planes.state_dict(), "fisher": self.fisher}
        return state if self.hardened is None else state | {"hardened": vars(self.hardened)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.planes.load_state_dict(state["planes"])
        self.fisher.copy_(state["fisher"])
        self.hardened = _Hardened(**state["hardened"]) if "hardened" in state else None


def sgd_(value: Tensor, velocity: Tensor, gradient: Tensor, *, lr: float, momentum: float, weight_decay: float) -> None:
    """PyTorch's SGD update in place: v ← μv + (g + wd·x); x ← x − lr·v."""
    velocity.mul_(momentum).add_(gradient + weight_decay * value)
    value.sub_(velocity, alpha=lr)


def initial_scale(weight: Tensor, settings: GateSettings) -> Tensor:
    """s of a layer ([1]) before training: a share of its largest magnitude, or what suits the planes that it will keep."""
    if settings.init_scale != "mse":
        return max_abs_scale(weight) * float(settings.init_scale)
    planes = max(1, min(settings.bits, round(settings.target_bits or settings.bits)))
    step = mse_step(weight, planes, channel_dim=None).to(weight)  # of the top planes' integers
    return step * (2**settings.bits - 1) / 2 ** (settings.bits - planes)


def max_abs_scale(weight: Tensor) -> Tensor:
    """s = max |W| of a layer ([1]); 1 for an all-zero layer, whose integers are zero at any scale."""
    largest = weight.detach().abs().amax().reshape(1)
    return torch.where(largest > 0, largest, torch.ones_like(largest))
