"""csq's passes over gates (materialise, then gradients and momentum SGD) against autograd on the paper's equations.

    python benchmarks/gate_update.py --json runs/gate_update.json

The reference keeps per-layer tensors [*weight, bits] and lets autograd differentiate Eq. 5, as one writes it down: forward
for all layers, backward from dL/dW, torch.optim.SGD with momentum and weight decay. All sides hold the same model's gates;
csq's in float32 and in bfloat16. `ratio` is reference time over csq's in float32: larger is better. Memory is each side's peak
in a process of its own, beyond weights and their gradients.

The default method's passes over its latents are timed beside them, and all of csq's against a copy of a large tensor:
`bandwidth_shares` are the bytes that a pass cannot avoid to move, per second, over what the copy moves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import measure

from csqcli.models import libraries as sources
from csqcli.quant.layers import Layer, find_layers
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.csq import max_abs_scale
from csqcli.quant.methods.staged import Staged
from csqcli.quant.passes.bitplanes import BitPlanes

BITS, BETA = 8, 3.0
STATES = {"csq, float32": torch.float32, "csq, bfloat16": torch.bfloat16}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def weights_of(name: str, device: str) -> list[Layer]:
    torch.manual_seed(0)
    model = sources.load(name, num_classes=1000, pretrained=False).model.to(device)
    layers, _ = find_layers(model)
    for layer in layers:
        layer.parameter.grad = torch.randn_like(layer.parameter) * 1e-3
    return layers


def flat(layers: list[Layer], state_dtype: torch.dtype) -> Callable[[], None]:
    planes = BitPlanes(layers, bits=BITS, device=layers[0].parameter.device, state_dtype=state_dtype)
    scales = [max_abs_scale(layer.parameter) for layer in layers]
    planes.initialise(logit=1.0, mask_logit=1.0, beta=BETA, scales=scales)

    def work() -> None:
        planes.materialise(BETA)
        planes.update_gates(BETA, **SGD)

    return work


def reference(layers: list[Layer]) -> Callable[[], None]:
    """Eq. 5 per layer under autograd."""

    def leaf(value: Tensor) -> nn.Parameter:
        return nn.Parameter(value)

    gates = [
        {
            "pos": leaf(torch.randn(*layer.parameter.shape, BITS, device=layer.parameter.device)),
            "neg": leaf(torch.randn(*layer.parameter.shape, BITS, device=layer.parameter.device)),
            "mask": leaf(torch.ones(BITS, device=layer.parameter.device)),
            "scale": leaf(max_abs_scale(layer.parameter)),
        }
        for layer in layers
    ]
    powers = 2.0 ** torch.arange(BITS, device=layers[0].parameter.device)
    optimizer = torch.optim.SGD([value for layer in gates for value in layer.values()], **SGD)

    def work() -> None:
        soft = []
        for gate in gates:
            digits = torch.sigmoid(BETA * gate["pos"]) - torch.sigmoid(BETA * gate["neg"])
            per_plane = powers * torch.sigmoid(BETA * gate["mask"])
            soft.append(gate["scale"] / (2**BITS - 1) * (digits * per_plane).sum(dim=-1))
        torch.autograd.backward(soft, [layer.parameter.grad for layer in layers])
        optimizer.step()
        optimizer.zero_grad()

    return work


def latents(layers: list[Layer], state_dtype: torch.dtype) -> Callable[[], None]:
    planes = [3] * len(layers)
    method = Staged(layers, plan_for(layers, 3, Schedule(1000, 100), planes=planes, state_dtype=state_dtype))

    def work() -> None:  # on the soft staircase
        method.collect(300, lr=1e-3, lr_share=0.5)
        method.materialise(301)

    return work


def bytes_moved(side: str) -> int:
    """Per weight: what `materialise` reads and writes, then what the update does."""
    size = torch.empty(0, dtype=STATES[side]).element_size()
    return (2 * BITS * size + 4) + (4 + 2 * 4 * BITS * size)


def latent_bytes_moved(side: str) -> int:
    """The same for latents: the latent and the weight, then gradient, latent and two moments."""
    size = torch.empty(0, dtype=STATES[side]).element_size()
    return (4 + 4) + (4 + 2 * (4 + 2 * size))


def peak(side: str, name: str, device: str) -> float:
    """Peak bytes per weight beyond what the weights and their gradients take."""
    layers = weights_of(name, device)
    before = measure.peak_bytes(device)
    work = reference(layers) if side == "reference" else flat(layers, STATES[side])
    for _ in range(3):
        work()
    return (measure.peak_bytes(device) - before) / sum(layer.weights for layer in layers)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", default="torchvision:resnet18")
    arguments = parser.parse_args()
    memory: dict[str, Any] = {  # first: a process inherits the peak of the one that starts it
        side: measure.in_fresh_process(peak, side, arguments.model, arguments.device) for side in (*STATES, "reference")
    }
    layers = weights_of(arguments.model, arguments.device)
    weights = sum(layer.weights for layer in layers)
    source = torch.zeros(2**27, device=arguments.device)  # half a GiB
    target = torch.empty_like(source)
    works = {
        **{side: flat(layers, dtype) for side, dtype in STATES.items()},
        **{f"latents of {side}": latents(layers, dtype) for side, dtype in STATES.items()},
        "copy": lambda: target.copy_(source),
        "reference": reference(layers),
    }
    seconds = measure.interleaved(works, arguments.repeats, arguments.device)
    ratios = {side: seconds["reference"] / seconds[side] for side in STATES}
    copied = 2 * source.nbytes / seconds["copy"]
    shares = {side: weights * bytes_moved(side) / seconds[side] / copied for side in STATES} | {
        name: weights * latent_bytes_moved(side) / seconds[name] / copied
        for side in STATES
        for name in [f"latents of {side}"]
    }
    measure.emit(
        {
            "ratio": ratios["csq, float32"],
            "ratio_of": "seconds of autograd on per-layer [*, bits] tensors / csq's flat passes",
            "ratios": ratios,
            "memory_ratios": {side: memory[side] / memory["reference"] for side in STATES},
            "memory_ratios_of": "peak bytes per weight of csq's gates / of the reference's",
            "bandwidth_shares": shares,
            "copy_bytes_per_second": copied,
            "seconds": seconds,
            "peak_bytes_per_weight": memory,
            "model": arguments.model,
            "weights": weights,
            "repeats": arguments.repeats,
            "machine": measure.machine(arguments.device),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
