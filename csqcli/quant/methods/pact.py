"""PACT's weights, for its learned activation clip (`act_method: pact`).

Choi, Wang, Venkataramani, Chuang, Srinivasan and Gopalakrishnan, PACT: Parameterized Clipping Activation for Quantized
Neural Networks, 2018 (arXiv 1805.06085), takes DoReFa's weights. The same group's Accurate and Efficient 2-bit Quantized
Neural Networks, MLSys 2019 (arXiv 1807.06964), takes SAWB, statistics-aware weight binning.
"""

from __future__ import annotations

from torch import Tensor

from csqcli.errors import UserError
from csqcli.quant.method_settings import PACTSettings
from csqcli.quant.methods.dorefa import DoReFa
from csqcli.quant.methods.latents import SMALLEST, odd_integers

SAWB = {  # (c1, c2) of the clip c1·√E[W²] + c2·E|W|, fitted by the authors over six weight distributions
    2: (3.12, -2.064),
    3: (7.509, -6.892),
    4: (12.68, -12.80),
    5: (17.74, -18.64),
    8: (31.76, -35.04),
}


class PACT(DoReFa):
    """DoReFa's weights (2018), or with ``quantizer: sawb`` 2^k even steps between ±α, α = c1·√E[W²] + c2·E|W| (2019).

    2^k levels at k planes either way. Under SAWB gradients pass where |V| ≤ α, and α is taken anew at every step.
    """

    name = "pact"
    Settings = PACTSettings
    settings: PACTSettings  # type: ignore[assignment]

    def begin(self) -> None:
        if self.settings.quantizer == "sawb":
            for layer, k in zip(self.layers, self.planes, strict=True):
                if k not in SAWB:
                    hint = "take pact.quantizer=dorefa, or one of these targets"
                    what = f"SAWB has coefficients for {', '.join(map(str, SAWB))} planes, not for {k}"
                    raise UserError(what, where=layer.name, hint=hint)
        super().begin()

    def before_rounding(self, index: int) -> Tensor:
        return super().before_rounding(index) if self.settings.quantizer == "dorefa" else self.latents[index].detach()

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        if self.settings.quantizer == "dorefa":
            return super().rounded(index)
        alpha, k = self._clip(index), self.planes[index]
        return odd_integers((self.latents[index].detach() / alpha).clamp_(-1, 1), k), alpha / (2**k - 1)

    def latent_gradient(self, index: int, gradient: Tensor) -> Tensor:
        if self.settings.quantizer == "dorefa":
            return super().latent_gradient(index, gradient)
        return gradient * (self.latents[index].abs() <= self._clip(index))

    def _clip(self, index: int) -> Tensor:
        """α, [1]; of a layer whose statistics give none (few weights far from the rest) its largest magnitude."""
        magnitude, k = self.latents[index].detach().abs(), self.planes[index]
        c1, c2 = SAWB[k]
        clip = c1 * magnitude.square().mean().sqrt() + c2 * magnitude.mean()
        largest = magnitude.max()
        return clip.where(clip > 0, largest).clamp_min(SMALLEST * 2**k).reshape(1)
