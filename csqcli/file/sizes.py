"""What follows from a manifest's layers: sizes and bit operations. One place, for those who write files and those who check.

Plain arithmetic: no torch, no NumPy, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from csqcli.file.manifest import ActivationEntry, ComputeRecord, LayerRecord, SizesRecord
from csqcli.quant.costs import operations_of
from csqcli.quant.names import FLOAT_BITS, owner_of


def stored_bits(mask: str, *, basis: bool = False) -> int:
    """Bits per weight of a dense layout: the span of the mask's planes plus a sign, 0 for an empty mask; with a learned
    ``basis`` a bit per plane, whose digits are ±1."""
    if basis:
        return mask.count("1")
    span = len(mask.strip("0"))
    return span + 1 if span else 0


def mean_over_weights(layers: Sequence[LayerRecord], value: Callable[[LayerRecord], float]) -> float:
    """Σ value · weights / Σ weights; 32 for a file without quantized layers."""
    total = sum(layer.weights for layer in layers)
    return sum(value(layer) * layer.weights for layer in layers) / total if total else float(FLOAT_BITS)


def sizes(layers: Sequence[LayerRecord], *, float_bytes: int) -> SizesRecord:
    """The counts of size that the layers' records give; ``float_bytes`` of all parameters and buffers."""
    mean_bits = mean_over_weights(layers, lambda layer: layer.bits)
    return SizesRecord(
        float_bytes=float_bytes,
        paper_compression=FLOAT_BITS / mean_bits if mean_bits else None,
        stored_bits_per_weight=mean_over_weights(layers, lambda layer: layer.stored_bits),
        entropy_bits_per_weight=mean_over_weights(layers, lambda layer: layer.entropy_bits),
    )


def bit_operations(layer: LayerRecord, input_bits: Mapping[str, int]) -> int:
    """Those of a layer, of one image; ``input_bits`` by the module whose input is rounded."""
    return operations_of(layer.macs or 0, layer.bits, input_bits.get(owner_of(layer.name), FLOAT_BITS))


def compute(
    layers: Sequence[LayerRecord],
    activations: Sequence[ActivationEntry],
    *,
    input_size: Sequence[int],
    macs: int,  # of the whole network; the layers' own stand in their records
) -> ComputeRecord:
    """Bit operations of one image, from multiply-accumulates, planes and the widths of activations."""
    input_bits = {entry.module: entry.bits for entry in activations}
    quantized = sum(layer.macs or 0 for layer in layers)
    rest = max(macs - quantized, 0)
    return ComputeRecord(
        input_size=list(input_size),
        macs=macs,
        quantized_macs=quantized,
        bops=sum(bit_operations(layer, input_bits) for layer in layers) + operations_of(rest, FLOAT_BITS, FLOAT_BITS),
    )
