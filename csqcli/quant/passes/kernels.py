"""Triton twins of the passes over gates (`bitplanes`) and latents (`adam`, `rounding`): one kernel each, every byte
moved once, nothing read back.

Imported only where there is a GPU. Without one, ``TRITON_INTERPRET=1`` runs them on CPU tensors, as the tests do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
# products and sums round one by one, as on a CPU; Triton's releases differ in their default
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _round(value, bits):  # `state.round_into`: the upper half of 32 random bits, added to the half that is cut off
    raw = value.to(tl.uint32, bitcast=True) + (bits >> 16)
    return ((raw >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _nearest(value):  # written out, since the interpreter's cast cuts off
    raw = value.to(tl.uint32, bitcast=True) + 0x8000
    return ((raw >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _next_bits(bits):  # a congruential step, whose upper half is good enough to round with
    return bits * 1664525 + 1013904223


@triton.jit
def _soft_weight_kernel(
    pos, neg, per_plane, out, count, plane_stride, beta, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = where < count
    plane_stride = tl.cast(plane_stride, tl.int64)
    weight = tl.zeros([BLOCK], tl.float32)
    for b in tl.static_range(BITS):
        on = tl.sigmoid(beta * tl.load(pos + b * plane_stride + where, mask=mask, other=0.0).to(tl.float32))
        off = tl.sigmoid(beta * tl.load(neg + b * plane_stride + where, mask=mask, other=0.0).to(tl.float32))
        weight += tl.load(per_plane + b) * (on - off)
    tl.store(out + where, weight, mask=mask)


def soft_weight(pos: Tensor, neg: Tensor, per_plane: Tensor, beta: float, out: Tensor) -> None:
    """Eq. 5 of one layer into ``out`` (flat). ``pos``, ``neg``: the layer's slice of the gate buffers, [bits, weights]."""
    _launch(_soft_weight_kernel, out, pos, neg, per_plane, out, out.numel(), pos.stride(0), beta, BITS=pos.shape[0])


@triton.jit(do_not_specialize=["seed"])
def _update_gates_kernel(
    pos, neg, pos_momentum, neg_momentum, gradient, gated, digits, squared, count, plane_stride,
    beta, lr, momentum, weight_decay, seed, BITS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    where = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = where < count
    plane_stride = tl.cast(plane_stride, tl.int64)
    slope = tl.load(gradient + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(squared + program, tl.sum(slope * slope, axis=0))
    if ROUND:
        bits = tl.randint(seed, where.to(tl.int32)).to(tl.uint32, bitcast=True)
    for b in tl.static_range(BITS):
        here = b * plane_stride + where
        pos_logit = tl.load(pos + here, mask=mask, other=0.0).to(tl.float32)
        neg_logit = tl.load(neg + here, mask=mask, other=0.0).to(tl.float32)
        on, off = tl.sigmoid(beta * pos_logit), tl.sigmoid(beta * neg_logit)
        tl.store(digits + program * BITS + b, tl.sum((on - off) * slope, axis=0))
        common = tl.load(gated + b) * beta * slope
        pos_velocity = tl.load(pos_momentum + here, mask=mask, other=0.0).to(tl.float32) * momentum
        neg_velocity = tl.load(neg_momentum + here, mask=mask, other=0.0).to(tl.float32) * momentum
        pos_velocity += on * (1 - on) * common + weight_decay * pos_logit
        neg_velocity += weight_decay * neg_logit - off * (1 - off) * common
        pos_logit -= lr * pos_velocity
        neg_logit -= lr * neg_velocity
        if ROUND:
            bits = _next_bits(bits)
            tl.store(pos + here, _round(pos_logit, bits), mask=mask)
            bits = _next_bits(bits)
            tl.store(neg + here, _round(neg_logit, bits), mask=mask)
            tl.store(pos_momentum + here, _nearest(pos_velocity), mask=mask)
            tl.store(neg_momentum + here, _nearest(neg_velocity), mask=mask)
        else:
            tl.store(pos + here, pos_logit, mask=mask)
            tl.store(neg + here, neg_logit, mask=mask)
            tl.store(pos_momentum + here, pos_velocity, mask=mask)
            tl.store(neg_momentum + here, neg_velocity, mask=mask)


def update_gates(
    pos: Tensor,  # [bits, weights]: the layer's slice of the buffers, as the next three
    neg: Tensor,
    pos_momentum: Tensor,
    neg_momentum: Tensor,
    gradient: Tensor,  # [weights]
    gated: Tensor,  # [bits]: s · 2^b/(2^n−1) · mask_b
    beta: float,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Momentum SGD on one layer's gates in place; (Σ_i g_i d_bi [bits], Σ_i g_i² []), summed in a fixed order.

    ``seed`` draws the rounding of bfloat16 state.
    """
    bits, programs = pos.shape[0], _programs(gradient)
    digits, squared = gated.new_empty(programs, bits), gated.new_empty(programs)
    _launch(
        _update_gates_kernel, gradient,
        pos, neg, pos_momentum, neg_momentum, gradient.contiguous(), gated, digits, squared, gradient.numel(),
        pos.stride(0), beta, lr, momentum, weight_decay, seed, BITS=bits, ROUND=pos.element_size() == 2,
    )  # fmt: skip
    return digits.sum(dim=0), squared.sum()


@triton.jit
def _channel_of(where, inner, channels):  # of [outer, channels, inner]
    return (where // inner) % channels


@triton.jit
def _clip(value, low, high):  # NaN stays NaN, to be noticed
    raised = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _integer(ratio, top):  # round half to even, as PyTorch does: numbers of this size have no digits behind the point
    return _clip(ratio, -top, top) + 12582912.0 - 12582912.0


@triton.jit(do_not_specialize=["seed"])
def _update_latents_kernel(
    latent, gradient, first, second, unit, edge, count, inner, channels, unit_stride, edge_stride,
    size, correction, beta1, beta2, eps, seed, CLIP: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = where < count
    channel = _channel_of(where, inner, channels)
    slope = tl.load(gradient + where, mask=mask, other=0.0).to(tl.float32)
    slope *= tl.load(unit + channel * unit_stride, mask=mask, other=0.0)
    m = tl.load(first + where, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(second + where, mask=mask, other=0.0).to(tl.float32)
    m += (1 - beta1) * (slope - m)
    v = v * beta2 + (1 - beta2) * slope * slope
    moved = tl.load(latent + where, mask=mask, other=0.0) - size * m / (tl.sqrt(v) / correction + eps)
    if CLIP:
        most = tl.load(edge + channel * edge_stride, mask=mask, other=0.0)
        moved = _clip(moved, -most, most)
    tl.store(latent + where, moved, mask=mask)
    if ROUND:
        bits = tl.randint(seed, where).to(tl.uint32, bitcast=True)
        tl.store(first + where, _nearest(m), mask=mask)
        tl.store(second + where, _round(v, bits), mask=mask)
    else:
        tl.store(first + where, m, mask=mask)
        tl.store(second + where, v, mask=mask)


def update_latents(
    latent: Tensor,  # [outer, channels, inner], as the next three
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    unit: Tensor,  # [channels, 1] or [1, 1]
    edge: Tensor | None,
    *,
    size: float,
    correction: float,
    beta1: float,
    beta2: float,
    eps: float,
    seed: int,
) -> None:
    """`adam.LatentAdam.step` of one layer, in place."""
    most = unit if edge is None else edge
    _launch(
        _update_latents_kernel, latent,
        latent, gradient.contiguous(), first, second, unit, most, latent.numel(), latent.shape[2], latent.shape[1],
        _stride(unit), _stride(most), size, correction, beta1, beta2, eps, seed,
        CLIP=edge is not None, ROUND=first.element_size() == 2,
    )  # fmt: skip


@triton.jit
def _staircase_kernel(
    latent, out, step, width, count, inner, channels, step_stride, width_stride, top, flank,
    SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = where < count
    channel = _channel_of(where, inner, channels)
    wide = tl.load(width + channel * width_stride, mask=mask, other=1.0)
    # the correctly rounded quotient: the integers are those that PyTorch finds, ties included
    ratio = tl.math.div_rn(tl.load(latent + where, mask=mask, other=0.0), wide)
    if SOFT:
        low = _clip(tl.floor(ratio), -top, top - 1)
        integer = low + _clip((ratio - low - 0.5) / flank + 0.5, 0.0, 1.0)
    else:
        integer = _integer(ratio, top)
    tl.store(out + where, integer * tl.load(step + channel * step_stride, mask=mask, other=0.0), mask=mask)


def staircase(latent: Tensor, out: Tensor, step: Tensor, width: Tensor, *, top: int, flank: float | None) -> None:
    """`rounding.Staircase.write` of one layer whose levels are −top … top; hard where ``flank`` is None."""
    _launch(
        _staircase_kernel, latent,
        latent, out, step, width, latent.numel(), latent.shape[2], latent.shape[1], _stride(step), _stride(width),
        float(top), flank or 1.0, SOFT=flank is not None and top > 0,
    )  # fmt: skip


@triton.jit
def _soft_planes_kernel(
    latent, out, unit, steps, shares, count, inner, channels, unit_stride, width_stride, step_stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = where < count
    channel = _channel_of(where, inner, channels)
    value = tl.load(latent + where, mask=mask, other=0.0)
    value *= tl.load(unit + channel * unit_stride, mask=mask, other=0.0)
    weight = tl.zeros([BLOCK], tl.float32)
    for b in tl.static_range(BITS):
        step = tl.load(steps + b * width_stride + channel * step_stride, mask=mask, other=1.0)
        weight += tl.load(shares + b) * (_integer(tl.math.div_rn(value, step), (2 << b) - 1.0) * step)
    tl.store(out + where, weight, mask=mask)


def soft_planes(latent: Tensor, out: Tensor, unit: Tensor, steps: Tensor, shares: Tensor) -> None:
    """`rounding.soft_planes` of one layer. ``steps``: [bits, channels or 1, 1]; ``shares``: [bits], f_{k−1} − f_k."""
    _launch(
        _soft_planes_kernel, latent,
        latent, out, unit, steps, shares, latent.numel(), latent.shape[2], latent.shape[1], _stride(unit),
        steps.stride(0), _stride(steps[0]), BITS=len(steps),
    )  # fmt: skip


def check(device: torch.device) -> None:
    """Run every kernel once, on one weight. Raises what Triton raises where it cannot compile them.

    It compiles at the first launch, which fails without a C compiler, on old devices, and in old releases.
    """
    latent, one = torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, device=device)
    out = torch.zeros_like(latent)
    adam: dict[str, Any] = {"size": 0.0, "correction": 1.0, "beta1": 0.9, "beta2": 0.99, "eps": 1.0, "seed": 0}
    for state_dtype in (torch.float32, torch.bfloat16):
        pos, neg, pos_momentum, neg_momentum = torch.zeros(4, 1, 1, dtype=state_dtype, device=device)
        soft_weight(pos, neg, one[0], 1.0, out.view(-1))
        sgd: dict[str, Any] = {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "seed": 0}
        update_gates(pos, neg, pos_momentum, neg_momentum, one[0], one[0], 1.0, **sgd)
        first, second = torch.zeros(2, 1, 1, 1, dtype=state_dtype, device=device)
        for edge in (None, one):
            update_latents(latent, out, first, second, one, edge, **adam)
    for flank in (None, 1.0):
        staircase(latent, out, one, one, top=1, flank=flank)
    soft_planes(latent, out, one, one.view(1, 1, 1), one[0])


def _stride(vector: Tensor) -> int:
    """From channel to channel of [channels, 1]; 0 where [1, 1] holds for all."""
    return 0 if len(vector) == 1 else vector.stride(0)


def _launch(kernel: Any, over: Tensor, *arguments: Any, **constants: Any) -> None:
    """One program per block of ``over``, on its device, which need not be the current one."""
    with torch.cuda.device_of(over):
        kernel[(_programs(over),)](*arguments, BLOCK=_BLOCK, **constants, **OPTIONS)


def _programs(over: Tensor) -> int:
    return triton.cdiv(over.numel(), _BLOCK)
