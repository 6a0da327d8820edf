"""LQ-Nets: levels that are sums of ± a basis learned per filter or layer, by alternating least squares (QEM).

Zhang, Yang, Ye and Hua, LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks, ECCV 2018
(arXiv 1807.10029).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from csqcli.errors import UserError
from csqcli.quant import basis as bases
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.method_settings import LQNetsSettings
from csqcli.quant.methods.latents import LatentMethod

_MEDIAN = 0.6745  # of the magnitude of a standard normal number: where the authors place the outer basis value
_STARTING_ITERATIONS = 20  # of QEM on the weights that training starts from
_RIDGE = 1e-4  # added to BᵀB, as the authors do: filters may have fewer different digits than basis values


class LQNets(LatentMethod):
    """W ≈ Σ_j v_j·b_j with b_j ∈ {−1, 1} (Eq. 3, 4): 2^k levels at k planes; v is a filter's, or a layer's.

    QEM (Algorithm 1) alternates the nearest level of every weight, which gives its digits B, and the least-squares basis
    v = (BᵀB)⁻¹Bᵀw (Eq. 8). In training it takes ``iterations`` of them per step, and the basis is their moving average.
    Gradients pass unchanged.
    """

    name = "lq-nets"
    Settings = LQNetsSettings
    finetunes = True
    settings: LQNetsSettings

    def starting_planes(self) -> list[int]:
        if self.plan.start is not None:
            return [hard.planes for hard in self.plan.start]
        return super().starting_planes()

    @torch.no_grad()
    def begin(self) -> None:
        searched = self.plan.searched
        if self.plan.start is None:
            self.bases = [self._started(index) for index in range(len(self.layers))]
        elif isinstance(searched, LQNets):  # where latents stand between two levels is in no file
            for own, found in zip(self.latents, searched.latents, strict=True):
                own.data.copy_(found)
            self.bases = [basis.clone() for basis in searched.bases]
        else:
            self.bases = [
                self._delivered(hard).to(own) for hard, own in zip(self.plan.start, self.latents, strict=True)
            ]

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        latent = self.latents[index].detach()
        integers = bases.nearest(latent, self.bases[index], self.layers[index].channel_dim)
        return integers, latent.new_ones(1)

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        super().collect(step, lr=lr, lr_share=lr_share)
        for index, basis in enumerate(self.bases):
            fitted = self._fitted(index, basis, self.settings.iterations)
            self.bases[index] = torch.lerp(fitted, basis, self.settings.decay)

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        for index, (layer, basis) in enumerate(zip(self.layers, self.bases, strict=True)):
            integers, _ = self.rounded(index)
            layer.parameter.data.copy_(bases.values_of(integers, basis, layer.channel_dim))

    def hard_layers(self) -> list[HardLayer]:
        layers = zip(super().hard_layers(), self.bases, strict=True)
        return [replace(layer, basis=basis.detach().float().cpu()) for layer, basis in layers]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"bases": self.bases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.bases = [saved.to(own) for own, saved in zip(self.bases, state["bases"], strict=True)]

    def _started(self, index: int) -> Tensor:
        """[planes, filters or 1]: doubling values whose largest is the weights' median magnitude were they normal, then QEM."""
        rows, k = self._rows(index), self.planes[index]
        spread = rows.square().mean(dim=1).sqrt()
        powers = 2.0 ** torch.arange(1 - k, 1, device=rows.device, dtype=rows.dtype)
        return self._fitted(index, powers[:, None] * _MEDIAN * spread, _STARTING_ITERATIONS)

    def _fitted(self, index: int, basis: Tensor, iterations: int) -> Tensor:
        """The basis after so many iterations of QEM on a layer's latents."""
        rows = self._rows(index)
        for _ in range(iterations):
            basis = _least_squares(rows, bases.nearest(rows, basis, 0), len(basis))
        return basis

    def _rows(self, index: int) -> Tensor:
        """[filters or 1, weights]: the latents that share a basis."""
        layer, latent = self.layers[index], self.latents[index].detach()
        if self._is_per_filter(index):
            return latent.movedim(layer.channel_dim, 0).flatten(1)
        return latent.reshape(1, -1)

    def _is_per_filter(self, index: int) -> bool:
        """Whether a layer's filters have a basis each: what the settings say, or the file that is trained on."""
        delivered = self.plan.start[index].basis if self.plan.start is not None else None
        if delivered is not None:
            return delivered.shape[1] > 1
        return self.settings.per_channel and self.layers[index].allows_channel_scales

    def _delivered(self, hard: HardLayer) -> Tensor:
        if hard.basis is None:
            hint = "finetune it by its own method, or by staged"
            raise UserError("holds integers × scale, and lq-nets trains a basis", where=hard.name, hint=hint)
        return hard.basis


def _least_squares(rows: Tensor, integers: Tensor, planes: int) -> Tensor:
    """[planes, rows]: v = (BᵀB)⁻¹Bᵀw of each row (Eq. 8), B the digits of its integers. Solved in float64."""
    numbers = (integers + 2**planes - 1) // 2
    digits = [((numbers >> plane) & 1).to(rows.dtype) * 2 - 1 for plane in range(planes)]
    gram = torch.stack([torch.stack([(a * b).sum(dim=1) for b in digits], dim=1) for a in digits], dim=1).double()
    right = torch.stack([(digit * rows).sum(dim=1) for digit in digits], dim=1).double()
    gram += _RIDGE * torch.eye(planes, dtype=gram.dtype, device=gram.device)
    basis, _ = torch.linalg.solve_ex(gram, right)  # unlike solve, it does not wait for a GPU to say whether it could
    return basis.t().to(rows.dtype).contiguous()
