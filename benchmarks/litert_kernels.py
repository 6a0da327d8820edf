"""Which of LiteRT's kernels is the fastest for a layer of 8, 4 or 2 bits: the rule of `litert_graph` rests on this.

    python benchmarks/litert_kernels.py

One operator at a time, one image, one thread, medians of 31 runs taken in turns. Weights are random.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch

from csqcli.errors import UserError
from csqcli.exporting import tflite
from csqcli.exporting.runtime import LiteRtModel
from csqcli.exporting.timing import interleaved_medians

SHAPES = ((56, 24, 144), (14, 96, 576), (7, 192, 1152), (7, 1152, 320), (7, 320, 1280), (1, 1280, 1000))
KINDS = [("CONV_2D", 8), ("FULLY_CONNECTED", 8), ("FULLY_CONNECTED", 4), ("FULLY_CONNECTED", 2), ("CONV_2D", 4)]
LIMITS = {2: 1, 4: 7, 8: 127}
ONES = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}


def operator(kind: str, bits: int, side: int, inputs: int, outputs: int, *, kernel: int = 1) -> bytes:
    """A file of one operator between float images and float logits, rounded to int8 before and after; bits 32: in float."""
    writer, rng = tflite.Writer(), np.random.default_rng(0)
    depthwise = kind == "DEPTHWISE_CONV_2D"
    shape = {"FULLY_CONNECTED": (outputs, inputs), "DEPTHWISE_CONV_2D": (1, kernel, kernel, outputs)}.get(
        kind, (outputs, kernel, kernel, inputs)
    )
    source, result = writer.tensor("images", (1, side, side, inputs)), writer.tensor("logits", (1, side, side, outputs))
    table: dict[str, Any] = {"table": "Conv2DOptions"} | ONES
    if kind == "FULLY_CONNECTED":
        table = {"table": "FullyConnectedOptions", "keepNumDims": True}
    elif depthwise:
        table = {"table": "DepthwiseConv2DOptions", "depthMultiplier": 1} | ONES
    if bits == 32:
        weight = writer.constant("weight", rng.standard_normal(shape).astype(np.float32))
        bias = writer.constant("bias", np.zeros(outputs, np.float32))
        writer.operator(kind, [source, weight, bias], [result], **table)
        return writer.finish(source, result, {})
    limit, scale = LIMITS[bits], np.full(outputs, 0.01, np.float32)
    integers = rng.integers(-limit, limit + 1, shape)
    weight = writer.weight("weight", integers, scale, axis=3 if depthwise else 0, bits=bits)
    bias = writer.bias("bias", np.zeros(outputs, np.int32), scale * np.float32(0.02))
    rounded = writer.tensor("rounded", (1, side, side, inputs), "INT8", scale=0.02, zero=-128)
    given = writer.tensor("given", (1, side, side, outputs), "INT8", scale=0.05 * limit, zero=-128)
    writer.operator("QUANTIZE", [source], [rounded], table="QuantizeOptions")
    writer.operator(kind, [rounded, weight, bias], [given], version=3, **table)
    writer.operator("DEQUANTIZE", [given], [result], version=2, table="DequantizeOptions")
    return writer.finish(source, result, {})


def measure(files: list[bytes], side: int, inputs: int) -> list[float | None]:
    """Milliseconds of each file; None for those that LiteRT refuses. Rounding and its inverse are part of it."""
    engines = []
    for content in files:
        try:
            engines.append(LiteRtModel(content, threads=1))
        except UserError:
            engines.append(None)
    image = torch.rand(1, inputs, side, side)
    for engine in engines:
        if engine is not None:
            engine(image)
    there = [engine for engine in engines if engine is not None]
    times = iter(interleaved_medians([engine.interpreter.invoke for engine in there], repeats=31))
    return [1000 * next(times) if engine is not None else None for engine in engines]


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, {LiteRtModel(operator('CONV_2D', 8, 1, 8, 8)).engine}\n")
    print("| rows × inputs → outputs | " + " | ".join(f"int{bits} {kind}" for kind, bits in KINDS) + " | fp32 |")
    print("|---" * (len(KINDS) + 2) + "|")
    rows = [
        (f"{side * side} × {i} → {o}", [(k, b, side, i, o, 1) for k, b in [*KINDS, ("CONV_2D", 32)]])
        for side, i, o in SHAPES
    ]
    rows.append(("depthwise 3×3, 14×14×480", [("DEPTHWISE_CONV_2D", bits, 14, 480, 480, 3) for bits in (8, 4, 32)]))
    rows.append(("3×3, 14×14×64 → 64", [("CONV_2D", bits, 14, 64, 64, 3) for bits in (8, 4, 32)]))
    for name, kinds in rows:
        files = [operator(kind, bits, side, i, o, kernel=kernel) for kind, bits, side, i, o, kernel in kinds]
        found = measure(files, kinds[0][2], kinds[0][3])
        print(f"| {name} | " + " | ".join("refused" if t is None else f"{t:.3f}" for t in found) + " |")


if __name__ == "__main__":
    main()
