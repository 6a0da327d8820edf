"""An independent float64 reading of Eq. 2–7 with autograd, per layer, planes in the last dimension as in the paper's code.

Shares nothing with csqcli on purpose: it is what csqcli is checked against.
"""

from __future__ import annotations

import torch


def weight(m_p, m_n, q, s, beta):
    """Eq. 5 (q = σ(β m_B)), Eq. 4 (q binary) or Eq. 3 (q = 1). m_p, m_n: [*shape, n]; q: [n]; s: [1]."""
    n = m_p.shape[-1]
    total = 0
    for b in range(n):
        f_p = 1 / (1 + torch.exp(-beta * m_p[..., b]))
        f_n = 1 / (1 + torch.exp(-beta * m_n[..., b]))
        total = total + (f_p - f_n) * 2**b * q[b]
    return s / (2**n - 1) * total


def regulariser(m_bs, beta):
    """Σ_layers R(m_B), Eq. 6."""
    return sum((1 / (1 + torch.exp(-beta * m_b))).sum() for m_b in m_bs)


def mean_precision(m_bs, sizes):
    """Planes with m_B ≥ 0, averaged over elements."""
    return sum(float((m_b >= 0).sum()) * size for m_b, size in zip(m_bs, sizes, strict=True)) / sum(sizes)
