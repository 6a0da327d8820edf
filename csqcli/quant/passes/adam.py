"""Adam on latents, one pass over each layer, with moments in float32 or bfloat16.

The equations and the order of operations are those of `torch.optim.Adam`, bit for bit in float32 on a CPU. What is added:
the gradient is multiplied by the latents' unit on the way in, latents are clipped to their range on the way out, and
bfloat16 moments use stochastic rounding (`state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csqcli.quant.passes.state import Noise, kernels_for, of_channels, part_size, parts_of, round_into

_EPS = 1e-12  # a latent's gradient may be small everywhere; Adam's 1e-8 would then stop it


class LatentAdam:
    """The two moments of every layer's latents, which have shape [outer, channels, inner]."""

    def __init__(self, latents: Sequence[Tensor], *, beta1: float, beta2: float, state_dtype: torch.dtype) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.exp_avg = [torch.zeros_like(latent, dtype=state_dtype) for latent in latents]
        self.exp_avg_sq = [torch.zeros_like(moment) for moment in self.exp_avg]
        self.updates = [0] * len(latents)  # a layer that gets no gradient stands still
        device = latents[0].device
        self.kernels = kernels_for(device)
        self.rounded = state_dtype != torch.float32

    @torch.no_grad()
    def step(
        self,
        latents: Sequence[Tensor],
        gradients: Sequence[Tensor | None],  # dL/dW of each layer, in the latents' shape
        *,
        units: Sequence[Tensor],  # [channels, 1] or [1, 1]: W of one unit of latent
        edges: Sequence[Tensor] | None,  # the same shapes: the largest latent; None clips nothing
        lr: float,
        seed: int,
    ) -> None:
        """One update of all latents in place. ``seed`` draws the rounding of bfloat16 moments: another one every step."""
        device = latents[0].device
        noise = None
        if self.rounded and self.kernels is None:
            widest = max(part_size(device), *(latent.shape[-1] for latent in latents))
            noise = Noise(widest, seed=seed, device=device)
        for index, (latent, gradient) in enumerate(zip(latents, gradients, strict=True)):
            if gradient is None:
                continue
            self.updates[index] += 1
            unit, edge = units[index], edges[index] if edges is not None else None
            # α·m̂/(√v̂ + ε) with m̂ = m/(1 − β1^t), v̂ = v/(1 − β2^t)
            size = lr / (1 - self.beta1 ** self.updates[index])
            correction = (1 - self.beta2 ** self.updates[index]) ** 0.5
            exp_avg, exp_avg_sq = self.exp_avg[index], self.exp_avg_sq[index]
            if self.kernels is not None:
                self.kernels.update_latents(
                    latent, gradient, exp_avg, exp_avg_sq, unit, edge, size=size, correction=correction,
                    beta1=self.beta1, beta2=self.beta2, eps=_EPS, seed=seed,
                )  # fmt: skip
                continue
            for part in parts_of(latent):
                slope = gradient[part].float() * of_channels(unit, part[1])
                m, v = exp_avg[part].float(), exp_avg_sq[part].float()  # the state itself when it is float32
                m.lerp_(slope, 1 - self.beta1)
                v.mul_(self.beta2).addcmul_(slope, slope, value=1 - self.beta2)
                moved = latent[part].addcdiv_(m, v.sqrt().div_(correction).add_(_EPS), value=-size)
                if edge is not None:
                    most = of_channels(edge, part[1])
                    moved.clamp_(-most, most)
                if noise is not None:  # the first moment changes by a tenth a step: the nearest will do
                    exp_avg[part] = m
                    round_into(exp_avg_sq[part], v, noise.window(1, v.numel()).view_as(v))

    def second_moment(self, index: int) -> Tensor | None:
        """v̂ of a layer's latents, float32; None when no gradient ever reached it."""
        if self.updates[index] == 0:
            return None
        return self.exp_avg_sq[index].float() / (1 - self.beta2 ** self.updates[index])

    def state_dict(self) -> dict[str, Any]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip(
            [*self.exp_avg, *self.exp_avg_sq], [*state["exp_avg"], *state["exp_avg_sq"]], strict=True
        ):
            own.copy_(saved)
        self.updates = list(state["updates"])
