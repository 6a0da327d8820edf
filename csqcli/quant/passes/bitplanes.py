"""Bit planes of all layers in flat buffers, and the two passes over them: materialise and update.

The gates of every layer live in ``[bits, total_weights]`` buffers; a layer is a name and a slice. No autograd touches
them: the gradient with respect to each gate is a closed form of dL/dW (Eq. 5 is elementwise per plane), so one pass
reads dL/dW and updates the gates in place, and one pass writes the new weights into the untouched model. On the CPU, the
reference, both work on slices of `state.CHUNK` weights, so their temporaries stay in cache; on a GPU with Triton each is one
kernel per layer (`kernels`), without Triton PyTorch on larger slices. Arithmetic is float32, whatever the state is held in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csqcli.quant import equations
from csqcli.quant.layers import Layer
from csqcli.quant.passes.state import Noise, chunk_size, kernels_for, round_into


@dataclass
class LayerGradients:
    """What one update pass leaves behind per layer, before regularisation."""

    mask: Tensor  # [layers, bits]: dL/d f_β(m_B), i.e. s · 2^b/(2^n−1) · Σ_i g_i d_i
    scale: Tensor  # [layers]: dL/ds
    squared: Tensor  # [layers]: Σ_i g_i², the layer's Fisher mass; with ratios that of the weight over them


class BitPlanes:
    """State of Eq. 5 for a list of layers: m_p, m_n (flat, with momentum), m_B and s per layer."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        bits: int,
        device: torch.device,
        state_dtype: torch.dtype = torch.float32,
        signed: bool = True,
        ratios: Sequence[Tensor] | None = None,
    ) -> None:
        """``state_dtype``: of m_p, m_n and their momenta; float32 or bfloat16. ``signed``: the digits that logits start from.
        ``ratios``: per layer [channels], what each output channel's scale is of the layer's; one scale per layer if unset.
        """
        self.layers, self.bits, self.signed = list(layers), bits, signed
        self.ratios = None if ratios is None else [ratio.view(-1, 1).to(device) for ratio in ratios]
        total = sum(layer.weights for layer in layers)
        self.pos = torch.empty(bits, total, dtype=state_dtype, device=device)
        self.neg = torch.empty_like(self.pos)
        self.pos_momentum, self.neg_momentum = torch.zeros_like(self.pos), torch.zeros_like(self.pos)
        self.mask_logits = torch.zeros(len(layers), bits, device=device)
        self.scale = torch.ones(len(layers), device=device)
        self.mask_momentum = torch.zeros_like(self.mask_logits)
        self.scale_momentum = torch.zeros_like(self.scale)
        self.fixed_mask: Tensor | None = None  # bool [layers, bits]: q_B of Eq. 4; None while the mask is soft
        self.used = [slice(0, bits)] * len(layers)  # planes that the passes visit: from the lowest in use upwards
        self.plane_weights = equations.plane_weights(bits, device=device)
        starts = torch.tensor([0, *(layer.weights for layer in layers)]).cumsum(0).tolist()
        self.slices = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
        self.chunk = chunk_size(device) * 4 // self.pos.element_size()
        self.kernels = kernels_for(device)

    def initialise(self, *, logit: float, mask_logit: float, beta: float, scales: Sequence[Tensor]) -> None:
        """Logits from the layers' present weights, so that the soft weight at ``beta`` is the n-bit quantized weight.

        ``scales`` holds s per layer ([1], the value of integer 2^n−1); the stored scale is divided by
        tanh(β·logit/2)·f_β(mask_logit), the factor that soft gates put on the weight.
        """
        self.mask_logits.fill_(mask_logit)
        for index, (layer, scale) in enumerate(zip(self.layers, scales, strict=True)):
            weight = layer.unflatten(self.over_ratios(index, layer.flat(layer.parameter.detach())))
            integers = equations.quantize_integers(weight, scale, self.bits)
            self.set_integers(index, integers, scale, logit=logit, beta=beta)

    def set_integers(
        self, index: int, integers: Tensor, scale: Tensor, *, logit: float, beta: float, signed: bool | None = None
    ) -> None:
        """Re-create one layer's logits from integers; its soft weight at ``beta`` equals scale/(2^n−1)·integers.

        In signed digits (None: as the method starts) it meets numbers between integers too, within the planes' reach.
        """
        flat = self.layers[index].flat(integers)
        mask = None if self.fixed_mask is None else self.fixed_mask[index]
        if signed is None:  # a mask's holes leave integers that only signed digits form
            signed = self.signed or not (mask is None or bool(mask.all()))
        for chunk, of_layer in self._chunks_of(index):
            if signed:
                digits = equations.signed_digits_of(flat[of_layer], self.bits, mask)
            else:
                digits = equations.bit_planes_of(flat[of_layer], self.bits)
            self.pos[:, chunk], self.neg[:, chunk] = equations.logits_from_digits(digits, logit=logit, beta=beta)
        softness = torch.tanh(torch.tensor(beta * logit / 2))
        if self.fixed_mask is None:
            softness = softness * equations.gate(self.mask_logits[index, 0].cpu(), beta)
        self.scale[index] = float(scale) / softness.to(self.scale.device)

    def over_ratios(self, index: int, weight: Tensor) -> Tensor:
        """A layer's weight, [weights], at one scale for the layer: each channel's values over its ratio. Float32."""
        if self.ratios is None:
            return weight.float()
        return (self.layers[index].by_channel(weight.float()) / self.ratios[index]).flatten()

    def fix_mask(self, mask: Tensor) -> None:
        """From Eq. 5 to Eq. 4: q_B for good (bool [layers, bits]). Planes below a layer's lowest are not visited again."""
        self.fixed_mask = mask.to(self.pos.device)
        lowest = torch.where(mask.any(dim=1), mask.int().argmax(dim=1), self.bits - 1).tolist()
        self.used = [slice(plane, self.bits) for plane in lowest]

    def mask(self, beta: float) -> Tensor:
        """[layers, bits]: f_β(m_B) in the search, q_B once it is fixed."""
        return equations.gate(self.mask_logits, beta) if self.fixed_mask is None else self.fixed_mask.float()

    def hard_mask(self) -> Tensor:
        """bool [layers, bits]: planes in use if every gate were a unit step now."""
        return self.mask_logits >= 0 if self.fixed_mask is None else self.fixed_mask

    @torch.no_grad()
    def materialise(self, beta: float) -> None:
        """Eq. 5 (Eq. 4 with a fixed mask) for all layers, written into the model's own parameters."""
        per_plane = self.scale.unsqueeze(1) * self.plane_weights * self.mask(beta)  # [layers, bits]
        scratch = self._scratch(2)
        for index, layer in enumerate(self.layers):
            used = self.used[index]
            with layer.writing() as weight:
                if self.kernels is not None:
                    where = self.slices[index]
                    pos, neg = self.pos[used, where], self.neg[used, where]
                    self.kernels.soft_weight(pos, neg, per_plane[index, used], beta, weight)
                else:
                    for chunk, of_layer in self._chunks_of(index):
                        on, off = scratch[:, used, : chunk.stop - chunk.start]
                        _gates(self.pos[used, chunk], beta, on)
                        _gates(self.neg[used, chunk], beta, off)
                        weight[of_layer] = per_plane[index, used] @ on.sub_(off)
                if self.ratios is not None:
                    layer.by_channel(weight).mul_(self.ratios[index])

    @torch.no_grad()
    def soft_weight(self, index: int, beta: float) -> Tensor:
        """Eq. 5 (Eq. 4 with a fixed mask) of one layer as [weights], float32, in the order of `Layer.flat`; at the layer's scale,
        without the channels' ratios."""
        per_plane = self.scale[index] * self.plane_weights * self.mask(beta)[index]
        chunks = [per_plane @ equations.soft_digits(*self._logits(chunk), beta) for chunk, _ in self._chunks_of(index)]
        return torch.cat(chunks)

    @torch.no_grad()
    def update_gates(
        self,
        beta: float,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        seed: int = 0,
        gain: Tensor | None = None,
    ) -> LayerGradients:
        """One momentum-SGD step on m_p and m_n from the parameters' ``.grad``; mask and scale gradients returned.

        ``seed`` draws the rounding of bfloat16 state: another one for every step. ``gain``, [layers, bits] or [layers, 1],
        multiplies the gates' gradients, and none of those returned.

        dL/dm_p[b] = g·c[b]·β·σ'(βm_p[b]) and dL/dm_n[b] = −g·c[b]·β·σ'(βm_n[b]), with
        c[b] = s·2^b/(2^n−1)·mask[b] and g = dL/dW times the channel's ratio; the update is PyTorch's SGD (momentum without
        dampening, coupled weight decay).
        """
        gated = self.scale.unsqueeze(1) * self.plane_weights * self.mask(beta)
        if gain is not None:
            gated = gated * gain
        mask_gradient = torch.zeros_like(self.mask_logits)
        squared = torch.zeros_like(self.scale)
        sgd = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        rounded = self.pos.dtype != torch.float32
        noise = Noise(self.chunk, seed=seed, device=self.pos.device) if rounded and self.kernels is None else None
        scratch = self._scratch(3)
        for index, layer in enumerate(self.layers):
            if layer.parameter.grad is None:
                continue
            gradient, used = layer.flat(layer.parameter.grad), self.used[index]
            if self.ratios is not None:
                gradient = (layer.by_channel(gradient) * self.ratios[index]).flatten()
            if self.kernels is not None:
                state = (buffer[used, self.slices[index]] for buffer in self._state())
                mask_gradient[index, used], squared[index] = self.kernels.update_gates(
                    *state, gradient, gated[index, used], beta, **sgd, seed=seed
                )
                continue
            for chunk, of_layer in self._chunks_of(index):
                part = gradient[of_layer].float()
                room = scratch[:, used, : len(part)]
                for sign, logits, velocity in ((1, self.pos, self.pos_momentum), (-1, self.neg, self.neg_momentum)):
                    held, moving, signed = logits[used, chunk], velocity[used, chunk], sign * gated[index, used]
                    sums = _update_chunk(held, moving, part, signed, beta, noise=noise, room=room, **sgd)
                    mask_gradient[index, used] += sign * sums
                squared[index] += part.square().sum()
        sums = mask_gradient * self.plane_weights  # [layers, bits]: 2^b/(2^n−1) Σ_i g_i d_i
        scale_gradient = (sums * self.mask(beta)).sum(dim=1)
        return LayerGradients(mask=sums * self.scale.unsqueeze(1), scale=scale_gradient, squared=squared)

    @torch.no_grad()
    def limit_logits(self, most: float, where: slice = slice(None)) -> None:
        """Logits clamped to |m| ≤ ``most``."""
        for buffer in (self.pos, self.neg):
            buffer[:, where].clamp_(-most, most)

    @torch.no_grad()
    def refit_scale(self, old_beta: float, new_beta: float, limit: float | None = None) -> None:
        """Closed-form scale that best keeps every layer's weight when β moves: s ← s·⟨W_old, W_new⟩/⟨W_new, W_new⟩.

        ``limit``: logits are clamped to |βm| ≤ limit on the way; decided bits then all shrink alike, which the scale takes up.
        """
        if old_beta == new_beta and limit is None:
            return
        cross, square = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        old_planes, new_planes = self.plane_weights * self.mask(old_beta), self.plane_weights * self.mask(new_beta)
        for index, chunk in self._chunks():
            pos, neg = self._logits(chunk)
            old = old_planes[index] @ equations.soft_digits(pos, neg, old_beta)
            if limit is not None:
                self.limit_logits(limit / new_beta, chunk)
                pos, neg = self._logits(chunk)
            new = new_planes[index] @ equations.soft_digits(pos, neg, new_beta)
            cross[index] += old @ new
            square[index] += new @ new
        self.scale.mul_(torch.where(square > 0, cross / square.clamp_min(1e-30), torch.ones_like(square)))

    @torch.no_grad()
    def fit_scale(self, index: int, weight: Tensor, beta: float) -> None:
        """s ← s·⟨V, W⟩/⟨V, V⟩: the scale at which one layer's soft weight V at ``beta`` is nearest to ``weight``, [weights]."""
        own = self.soft_weight(index, beta)
        square = own @ own
        self.scale[index] *= torch.where(square > 0, (own @ weight) / square.clamp_min(1e-30), 1.0)

    @torch.no_grad()
    def plane_energy(self, beta: float) -> Tensor:
        """[layers, bits]: Σ_i (s·2^b/(2^n−1)·f(m_B)·d_bi)², the squared change of the weights if a whole plane vanished."""
        energy = torch.zeros_like(self.mask_logits)
        for index, chunk in self._chunks():
            energy[index] += equations.soft_digits(*self._logits(chunk), beta).square().sum(dim=1)
        return energy * (self.scale.unsqueeze(1) * self.plane_weights * self.mask(beta)).square()

    @torch.no_grad()
    def threshold_integers(self, mask: Tensor) -> list[Tensor]:
        """The paper's hardening: every gate becomes its unit step. int32 per layer, the shape of the weight."""
        hardened: list[Tensor] = []
        powers = 2.0 ** torch.arange(self.bits, device=self.pos.device)
        for index, layer in enumerate(self.layers):
            integers = torch.empty(layer.weights, dtype=torch.int32, device=self.pos.device)
            for chunk, of_layer in self._chunks_of(index):
                pos, neg = self._logits(chunk)
                values = (powers * mask[index]) @ (equations.hard_gate(pos) - equations.hard_gate(neg))
                integers[of_layer] = values.to(torch.int32)
            hardened.append(layer.unflatten(integers))
        return hardened

    def state_dict(self) -> dict[str, Any]:
        names = (
            "pos",
            "neg",
            "pos_momentum",
            "neg_momentum",
            "mask_logits",
            "mask_momentum",
            "scale",
            "scale_momentum",
        )
        state = {name: getattr(self, name) for name in names}
        state["orders"] = [list(layer.memory_order) for layer in self.layers]
        if self.ratios is not None:
            state["ratios"] = self.ratios
        return state if self.fixed_mask is None else state | {"fixed_mask": self.fixed_mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        orders = state["orders"]
        for name, value in state.items():
            if name == "fixed_mask":
                self.fix_mask(value)
            elif name == "ratios":
                self.ratios = [ratio.to(self.pos.device) for ratio in value]
            elif name != "orders":
                getattr(self, name).copy_(value)
        for layer, where, order in zip(self.layers, self.slices, orders, strict=True):
            for buffer in self._state():  # the model may lie in another memory format than then
                buffer[:, where] = layer.reordered(buffer[:, where], order)

    def _scratch(self, count: int) -> Tensor:
        """[count, bits, chunk] float32 for temporaries: memory that is reused stays in cache."""
        widest = 0 if self.kernels is not None else min(self.chunk, max(layer.weights for layer in self.layers))
        return torch.empty(count, self.bits, widest, device=self.pos.device)

    def _logits(self, where: slice) -> tuple[Tensor, Tensor]:
        """m_p and m_n of some weights as float32: the state itself, or a copy of bfloat16 state."""
        return self.pos[:, where].float(), self.neg[:, where].float()

    def _state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.pos, self.neg, self.pos_momentum, self.neg_momentum

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        """(layer index, slice of the flat buffers)."""
        for index in range(len(self.layers)):
            for chunk, _ in self._chunks_of(index):
                yield index, chunk

    def _chunks_of(self, index: int) -> Iterator[tuple[slice, slice]]:
        """(slice of the flat buffers, slice of the layer's own flat weight)."""
        where = self.slices[index]
        for start in range(where.start, where.stop, self.chunk):
            stop = min(start + self.chunk, where.stop)
            yield slice(start, stop), slice(start - where.start, stop - where.start)


def _gates(logits: Tensor, beta: float, out: Tensor) -> None:
    """f_β of float32 or bfloat16 logits, computed in float32."""
    if logits.dtype == out.dtype:
        torch.mul(logits, beta, out=out).sigmoid_()
    else:
        out.copy_(logits).mul_(beta).sigmoid_()


def _update_chunk(
    logits: Tensor,  # [bits, chunk]: m_p or m_n, as the next
    velocity: Tensor,
    gradient: Tensor,  # [chunk]
    gated: Tensor,  # [bits]: c, negative for m_n
    beta: float,
    *,
    noise: Noise | None,  # None where the state is float32
    room: Tensor,  # [3, bits, chunk]
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """The update of one slice of the state in place; Σ_i g_i f(m_bi) [bits] of before."""
    gates, slope, exact = room
    value = logits if noise is None else exact.copy_(logits)
    _gates(value, beta, gates)
    sums = gates @ gradient
    torch.mul(gated.unsqueeze(1) * beta, gradient, out=slope)  # dL/df(m)
    torch.ops.aten.sigmoid_backward.grad_input(slope, gates, grad_input=slope)  # dL/dm
    moved = velocity if noise is None else gates.copy_(velocity)
    torch.add(slope, moved, alpha=momentum, out=moved)
    if weight_decay:
        moved.add_(value, alpha=weight_decay)
    value.sub_(moved, alpha=lr)
    if noise is not None:  # a momentum changes by a tenth a step, which rounding to the nearest follows
        round_into(logits, value, noise.window(*value.shape))
        velocity.copy_(moved)
    return sums
