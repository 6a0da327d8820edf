"""The rivals' own code as weight methods: torchao's PARQ and Brevitas' learned steps, trained and delivered as csq's methods are.

    pip install 'csq[rivals]'
    PYTHONPATH=benchmarks/accuracy csq search --recipe digits --method rivals:TorchaoPARQ --target-bits 2
    PYTHONPATH=benchmarks/accuracy csq search --recipe digits --method rivals:Brevitas --target-bits 2

Levels, proximal maps, schedules, learned scales and all gradients are the libraries'. csq's are the loop, the base optimizer, planes,
BatchNorm recalibration and the file, which holds integers × scale: accuracy is that of the file as reloaded.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from csqcli.errors import UserError, install
from csqcli.quant.layers import Layer
from csqcli.quant.method_settings import MethodSettings, PARQSettings
from csqcli.quant.methods.latents import LatentMethod, ScaledLatentMethod
from csqcli.quant.passes.rounding import top_integer


def as_rows(values: Tensor, layer: Layer) -> Tensor:
    """[channels, weights of one] of a tensor of the weight's shape: what the libraries take as output channels."""
    return values.movedim(layer.channel_dim, 0).flatten(1)


def from_rows(rows: Tensor, layer: Layer) -> Tensor:
    """Inverse of :func:`as_rows`."""
    shape = layer.parameter.movedim(layer.channel_dim, 0).shape
    return rows.reshape(shape).movedim(0, layer.channel_dim)


class TorchaoPARQSettings(PARQSettings):
    """Those of csq's `parq`, and what torchao's quantizers are built with."""

    quantizer: Literal["max-uniform", "uniform"] = "max-uniform"
    """At k planes MaxUnifQuantizer with k + 1 bits, which is 2^(k+1) − 1 levels, zero among them; or UnifQuantizer with k bits: 2^k
    levels, without zero."""
    scale_method: Literal["mean", "max"] = "mean"
    """The outermost level: bits · mean|W| (UnifQuantizer's default), or max|W| (MaxUnifQuantizer's)."""


class TorchaoPARQ(LatentMethod):
    """``torchao.prototype.parq``: QuantOptimizer with ProxPARQ and a uniform quantizer.

    csq's base optimizer steps on the latents. QuantOptimizer then does its own step on copies of the weights, over a base
    optimizer whose step is to take these latents over: it keeps them, fits the levels and applies the proximal map.
    """

    name = "torchao-parq"
    summary = "torchao's PARQ: proximal maps that anneal to uniform levels"
    citation = "torchao.prototype.parq; Jin et al., ICML 2025"
    Settings = TorchaoPARQSettings
    settings: TorchaoPARQSettings

    def begin(self) -> None:
        self.hard = False
        rows = zip(self.latents, self.layers, strict=True)
        self.weights = [nn.Parameter(as_rows(latent.detach(), layer).clone()) for latent, layer in rows]
        self.optimizer = self._built()

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        if self.hard:
            super().materialise(step)
            return
        if step == self.optimizer.num_steps + 1:  # else a state that was loaded, or the weights of step 0
            self.optimizer.step()
        for layer, weight in zip(self.layers, self.weights, strict=True):
            layer.parameter.data.copy_(from_rows(weight, layer))

    def harden(self, step: int) -> None:
        self.hard = True
        self.materialise(step)

    @torch.no_grad()
    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        rows, levels, top = self.weights[index], self._levels(index), top_integer(self.planes[index])
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).expand(len(rows), -1).contiguous()
        place = torch.searchsorted(middles, rows.detach())
        integers = place - top if self.settings.quantizer == "max-uniform" else 2 * place - top
        return from_rows(integers.to(rows.dtype), self.layers[index]), levels[:, -1] / top

    def monitor(self, step: int) -> dict[str, float]:
        slope = self.optimizer.param_groups[0].get("inv_slope", 0.0 if self.optimizer.num_steps else 1.0)
        return super().monitor(step) | {"inverse_slope": float(slope)}

    def state_dict(self) -> dict[str, Any]:
        weights = [weight.data for weight in self.weights]
        return super().state_dict() | {"weights": weights, "optimizer": self.optimizer.state_dict(), "hard": self.hard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for own, saved in zip(self.weights, state["weights"], strict=True):
            own.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.hard = state["hard"]

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchaoPARQ:
        """QuantOptimizer has what it does not know itself from its base optimizer, and copies without one."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "optimizer"}, memo))
        twin.optimizer = twin._built()
        twin.optimizer.load_state_dict(self.optimizer.state_dict())
        return twin

    def _built(self) -> Any:
        """QuantOptimizer over the weights, a group per layer."""
        try:
            from torchao.prototype.parq import ProxPARQ, QuantOptimizer
        except ImportError as error:
            raise missing("torchao", error) from error
        settings, total = self.settings, self.schedule.total_steps
        start = int(settings.anneal_start * total)
        groups = [
            {"params": [weight], "quant_bits": self._bits(k)}
            for weight, k in zip(self.weights, self.planes, strict=True)
        ]
        return QuantOptimizer(
            LatentsTaken(groups, [lambda i=i: as_rows(self.latents[i], self.layers[i]) for i in range(len(groups))]),
            self._quantizer(),
            ProxPARQ(start, max(int(settings.anneal_end * total), start + 1), steepness=settings.steepness),
            quant_period=settings.refit_every,
            quant_per_channel=settings.per_channel,
        )

    def _quantizer(self) -> Any:
        from torchao.prototype.parq import MaxUnifQuantizer, UnifQuantizer

        kind = MaxUnifQuantizer if self.settings.quantizer == "max-uniform" else UnifQuantizer
        return kind(scale_method=self.settings.scale_method)

    def _bits(self, planes: int) -> int:
        return planes + 1 if self.settings.quantizer == "max-uniform" else planes

    def _levels(self, index: int) -> Tensor:
        """[channels or 1, levels], ascending: as last fitted, or from the weights before the first step."""
        weight, dim = self.weights[index], -1 if self.settings.per_channel else None
        fitted = self.optimizer.state[weight].get("quants") if self.optimizer.num_steps else None
        if fitted is None:
            fitted = self._quantizer().quantize(weight, self._bits(self.planes[index]), dim=dim)[1]
        return fitted.reshape(-1, fitted.shape[-1])


class LatentsTaken(torch.optim.Optimizer):
    """The base optimizer that QuantOptimizer is given: its step takes over what csq's base optimizer has stepped on."""

    def __init__(self, groups: list[dict[str, Any]], latents: list[Any]) -> None:
        self.latents = latents
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, latent in zip(self.param_groups, self.latents, strict=True):
            group["params"][0].copy_(latent())


class BrevitasSettings(MethodSettings):
    """How Brevitas' scales begin."""

    init: Literal["mse", "max"] = "mse"
    """Least squared error of the weights (Int8WeightPerChannelFloatMSE), or their largest magnitude
    (Int8WeightPerChannelFloat with PARAMETER_FROM_STATS)."""


class Brevitas(ScaledLatentMethod):
    """Brevitas' integer weight quantizer with a learned scale per output channel, k + 1 bits of narrow range: 2^(k+1) − 1 levels.

    The base optimizer trains latents and scales (these without weight decay) on Brevitas' own gradients of both.
    """

    name = "brevitas"
    summary = "Brevitas' weight quantizer with a learned scale per output channel"
    citation = "Brevitas, Int8WeightPerChannelFloatMSE at k + 1 bits"
    Settings = BrevitasSettings
    settings: BrevitasSettings

    @torch.no_grad()
    def begin(self) -> None:
        self.quantizers = [self._built(index) for index in range(len(self.layers))]
        self.scales = [quantizer.scaling_impl.value for quantizer in self.quantizers]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*super().parameter_groups(), {"params": self.scales, "weight_decay": 0.0}]

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        for layer, latent, scale, quantizer in zip(
            self.layers, self.latents, self.scales, self.quantizers, strict=True
        ):
            gradient = layer.parameter.grad
            if gradient is None:
                latent.grad = scale.grad = None
                continue
            with torch.enable_grad():
                weight, *_ = quantizer(as_rows(latent, layer))
            latent.grad, scale.grad = torch.autograd.grad(weight, (latent, scale), as_rows(gradient, layer))

    @torch.no_grad()
    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        layer = self.layers[index]
        weight, scale, *_ = self.quantizers[index](as_rows(self.latents[index], layer))
        return from_rows((weight / scale).round(), layer), scale.flatten()

    def _built(self, index: int) -> Any:
        """The quantizer of a layer, its scale begun from the layer's weights."""
        try:
            from brevitas.inject.enum import ScalingImplType
            from brevitas.nn import QuantLinear
            from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerChannelFloatMSE
        except ImportError as error:
            raise missing("brevitas", error) from error
        rows = as_rows(self.latents[index].detach(), self.layers[index])
        with torch.random.fork_rng():  # the layer is initialised at random, which is not csq's to draw
            layer = QuantLinear(
                rows.shape[1],
                rows.shape[0],
                bias=False,
                weight_quant=Int8WeightPerChannelFloatMSE if self.settings.init == "mse" else Int8WeightPerChannelFloat,
                weight_bit_width=self.planes[index] + 1,
                weight_scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS,
                device=rows.device,
            )
        layer.weight.data.copy_(rows)
        layer.quant_weight()  # the first call takes the statistics
        return layer.weight_quant.tensor_quant


def missing(library: str, error: ImportError) -> UserError:
    return UserError(f"cannot import {library} ({error})", where="rivals", hint=install("rivals"))
