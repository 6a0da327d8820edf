"""Uniform quantization after a linear scaling function, as quantized distillation takes it.

Polino, Pascanu and Alistarh, Model Compression via Distillation and Quantization, ICLR 2018 (arXiv 1802.05668).
"""

from __future__ import annotations

from torch import Tensor

from csqcli.quant.hard_layer import spread
from csqcli.quant.method_settings import ScaledSettings
from csqcli.quant.methods.latents import SMALLEST, LatentMethod, odd_integers


class ScaledUniform(LatentMethod):
    """Q(V) = sc⁻¹(Q̂(sc(V))) (section 2): sc scales a bucket onto [0, 1], Q̂ rounds to 2^k even steps.

    Here sc(v) = v/(2·max|V|) + ½ of each bucket: around zero, where the paper's is from the least to the largest weight,
    so that levels are integers × scale: the odd ones up to ±(2^k − 1), 2^k levels at k planes. A bucket is a layer or an
    output channel, where the paper's are runs of weights. Gradients pass unchanged.
    """

    name = "scaled-uniform"
    Settings = ScaledSettings
    settings: ScaledSettings

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        latent, layer, k = self.latents[index].detach(), self.layers[index], self.planes[index]
        magnitude = latent.abs()
        if self.settings.bucket == "channel" and layer.allows_channel_scales:
            largest = magnitude.movedim(layer.channel_dim, 0).flatten(1).amax(dim=1)
        else:
            largest = magnitude.max().reshape(1)
        largest = largest.clamp_min(SMALLEST * 2**k)  # so that the scale is no less than SMALLEST
        return odd_integers(latent / spread(largest, latent, layer.channel_dim), k), largest / (2**k - 1)
