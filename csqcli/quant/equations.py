"""CSQ's equations as pure functions, in the paper's order (Xiao et al., DAC 2023).

Symbols of the paper and their names here: n ``bits``, m_p ``pos_logits``, m_n ``neg_logits``, m_B ``mask_logits``,
s ``scale``, β ``beta``, Δ_S ``budget_gap``, λ ``reg_strength``. Plane b carries 2^b, so index 0 is the least
significant plane. These functions are the reference that `bitplanes` (chunked, in place) is tested against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gate(logits: Tensor, beta: float) -> Tensor:
    """Eq. 2: f_β(x) = σ(βx), the soft unit step."""
    return torch.sigmoid(beta * logits)


def hard_gate(logits: Tensor) -> Tensor:
    """The limit of Eq. 2 for β → ∞: 1[x ≥ 0], as float."""
    return (logits >= 0).to(logits.dtype)


def gate_slope(gate_value: Tensor, beta: float) -> Tensor:
    """df_β/dx = β σ(βx) (1 − σ(βx)), from the gate's value."""
    return beta * gate_value * (1 - gate_value)


def plane_weights(bits: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """2^b / (2^n − 1) for b = 0 … n−1: what one plane contributes to a weight at scale 1. Shape [bits]."""
    return torch.pow(2.0, torch.arange(bits, dtype=dtype, device=device)) / (2**bits - 1)


def soft_digits(pos_logits: Tensor, neg_logits: Tensor, beta: float) -> Tensor:
    """f_β(m_p) − f_β(m_n): each plane's digit, in (−1, 1). Shape as given, [bits, *weight]."""
    return gate(pos_logits, beta) - gate(neg_logits, beta)


def soft_weight(
    pos_logits: Tensor,  # [bits, *weight]
    neg_logits: Tensor,  # [bits, *weight]
    mask: Tensor,  # [bits]: f_β(m_B) in the search (Eq. 5), q_B in the finetune (Eq. 4), ones for Eq. 3
    scale: Tensor,  # [1] or scalar
    *,
    beta: float,
) -> Tensor:
    """Eq. 3, 4 and 5 in one: W = s/(2^n−1) Σ_b (f(m_p) − f(m_n)) 2^b · mask_b. Shape [*weight]."""
    bits = pos_logits.shape[0]
    per_plane = scale * plane_weights(bits, dtype=pos_logits.dtype, device=pos_logits.device) * mask
    return torch.tensordot(per_plane, soft_digits(pos_logits, neg_logits, beta), dims=1)


def mask_regulariser(mask_logits: Tensor, beta: float) -> Tensor:
    """Eq. 6: R(m_B) = Σ_b f_β(m_B), summed over whatever layers are given."""
    return gate(mask_logits, beta).sum()


def temperature(progress: float, *, initial: float = 1.0, final: float = 200.0) -> float:
    """Algorithm 1: β = β0 · βmax^(epoch/T), with ``progress`` = epoch/T in [0, 1]."""
    return float(initial * (final / initial) ** min(max(progress, 0.0), 1.0))


def plastic_logit(*, lr: float, weight_decay: float, momentum: float, steps: int, beta_final: float) -> float:
    """The initial |m| whose gates are still undecided when training from scratch begins, and decided when it ends.

    Weight decay alone takes a logit to |m|·exp(−lr·wd·S/(2(1−μ))) in S steps of a cosine that starts at ``lr``. From
    a = 4/β_final · exp(lr·wd·S/(2(1−μ))) it ends with β|m| = 4, where a gate is 98 % decided; at most 1, the paper's range.
    """
    decay = lr * weight_decay * steps / (2 * (1 - momentum))
    return min(1.0, 4 / beta_final * math.exp(min(decay, 100.0)))


def signed_digits_of(values: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    """Digits in {−1, 0, 1} of signed numbers, each with a sign of its own. Shape [bits, *values.shape], float32.

    From the top plane down, d_b = round(r/2^b) clipped to ±1, and r ← r − d_b·2^b for the planes below: every prefix of
    the planes is the number rounded to them, where sign-magnitude digits cut it off. The digit of the lowest plane is r/2^b
    itself, in [−1, 1]: a digit of an integer, and what is left of a number between two integers. With ``mask`` (bool
    [bits]) only its planes have digits: numbers in a hole between its levels get the nearest of them.
    """
    rest = values.to(torch.float32)
    digits = torch.zeros(bits, *values.shape, device=values.device)
    used = [b for b in reversed(range(bits)) if mask is None or mask[b]]
    for b in used:
        ratio = rest / 2**b
        digits[b] = (ratio if b == used[-1] else torch.round(ratio)).clamp(-1, 1)
        rest = rest - digits[b] * 2**b
    return digits


def bit_planes_of(integers: Tensor, bits: int) -> Tensor:
    """Digits in {−1, 0, 1} of signed integers in sign-magnitude form. Shape [bits, *integers.shape], float32."""
    shifts = torch.arange(bits, device=integers.device).view(-1, *([1] * integers.dim()))
    magnitude = (integers.abs().to(torch.int32).unsqueeze(0) >> shifts) & 1
    return (magnitude * integers.sign().to(torch.int32)).to(torch.float32)


def quantize_integers(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """n-bit linear symmetric quantization: round(W/s · (2^n−1)), clipped to ±(2^n−1). int32, shape of ``weight``."""
    top = 2**bits - 1
    return torch.round(weight / scale * top).clamp(-top, top).to(torch.int32)


def logits_from_digits(digits: Tensor, *, logit: float, beta: float) -> tuple[Tensor, Tensor]:
    """Bit logits whose soft digit at ``beta`` is exactly tanh(β·logit/2) times ``digits`` in [−1, 1].

    On-bits sit at +logit in the plane of their sign; every other entry at −logit, so that
    f(+a) − f(−a) = tanh(βa/2) and f(−a) − f(−a) = 0, at every β. A digit in between has the bit of its sign in between, at
    f = f(−a) + tanh(βa/2)·|d|. Both results have the shape of ``digits``.
    """
    low, spread = 1 / (1 + math.exp(min(beta * logit, 700.0))), math.tanh(beta * logit / 2)

    def logits_of(part: Tensor) -> Tensor:
        between = torch.logit(low + spread * part) / beta
        return torch.where(part >= 1, logit, torch.where(part <= 0, -logit, between)).to(torch.float32)

    return logits_of(digits), logits_of(-digits)


def mask_string(mask: Tensor) -> str:
    """``"11010000"``: most significant plane first, as reports print it."""
    return "".join("1" if bit else "0" for bit in reversed(mask.tolist()))


def formable(integers: Tensor, mask: Tensor) -> bool:
    """Whether digits in {−1, 0, 1} on the planes of ``mask`` (bool [bits], shifted down to its lowest) form them all."""
    on = torch.nonzero(mask).flatten()
    levels = torch.zeros(1, dtype=torch.int64)
    for plane in (on - on[:1]).tolist():
        levels = torch.cat([levels - 2**plane, levels, levels + 2**plane]).unique()
    top = int(levels[-1])
    if int(integers.abs().max()) > top:
        return False
    table = torch.zeros(2 * top + 1, dtype=torch.bool)
    table[levels + top] = True
    return bool(table.all() or table[(integers + top).long()].all())


def mask_from_string(mask: str) -> Tensor:
    """Inverse of :func:`mask_string`: bool tensor [bits], index 0 the least significant plane."""
    return torch.tensor([character == "1" for character in reversed(mask)])
