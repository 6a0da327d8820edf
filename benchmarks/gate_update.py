"""csq's passes over gates (materialise, then gradients and momentum SGD) against autograd on the paper's equations.

    python benchmarks/gate_update.py --json runs/gate_update.json

The reference keeps per-layer tensors [*weight, bits] and lets autograd differentiate Eq. 5, as one writes it down: forward
for all layers, backward from dL/dW, torch.optim.SGD with momentum and weight decay. All sides hold the same model's gates;
csq's in float32 and in bfloat16. `ratio` is reference time over csq's in float32: larger is better. Memory is each side's peak
in a process of its own, beyond weights and their gradients.
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

from csqcli import sources
from csqcli.quant.bitplanes import BitPlanes
from csqcli.quant.layers import Layer, find_layers
from csqcli.quant.methods import max_abs_scale

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
    works = {side: flat(layers, dtype) for side, dtype in STATES.items()} | {"reference": reference(layers)}
    seconds = measure.interleaved(works, arguments.repeats, arguments.device)
    ratios = {side: seconds["reference"] / seconds[side] for side in STATES}
    measure.emit(
        {
            "ratio": ratios["csq, float32"],
            "ratio_of": "seconds of autograd on per-layer [*, bits] tensors / csq's flat passes",
            "ratios": ratios,
            "memory_ratios": {side: memory[side] / memory["reference"] for side in STATES},
            "memory_ratios_of": "peak bytes per weight of csq's gates / of the reference's",
            "seconds": seconds,
            "peak_bytes_per_weight": memory,
            "model": arguments.model,
            "weights": sum(layer.weights for layer in layers),
            "repeats": arguments.repeats,
            "machine": measure.machine(arguments.device),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
