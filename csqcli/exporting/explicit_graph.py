"""Weights as integers behind DequantizeLinear, with no node that unpacks: what TensorRT reads as explicit quantization.

Per layer one initializer ``{name}_integers`` of int8, or int4, and one DequantizeLinear to the value ``name``, with a zero
point of 0 and one positive scale, or one per output channel. TensorRT has 4-bit weights for matrix products alone, with a scale
per block of 64 or 128 inputs: the layer's own scale is repeated for each block, which is exact. What neither type
holds stands as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from csqcli.errors import UserError
from csqcli.exporting.int8_graph import Int8Graph, Int8Weight
from csqcli.exporting.onnx_graph import PackedGraph, with_weights

BLOCKS = (128, 64)  # inputs per scale that TensorRT has
INT8_MAX, INT4_MAX = 127, 7


def with_integers(graph: Int8Graph, folded: Mapping[str, Int8Weight], *, int4: bool) -> PackedGraph:
    """The graph with its weights as initializers: those of ``graph.weights`` run in int8, those of ``folded`` in float.

    With ``int4`` those of matrix products in float become int4 where their integers are at most 7 and their sides fit.
    """
    result = PackedGraph(None, int8=list(graph.weights))
    products = {node.input[1] for node in graph.proto.graph.node if node.op_type in ("MatMul", "Gemm")}
    initializers: list[Any] = []
    nodes: list[Any] = []
    for name, weight in (graph.weights | dict(folded)).items():
        value = weight.weight()
        result.weights[name] = weight.integers, value
        largest = int(np.abs(weight.integers).max(initial=0))
        scale = weight.scale.reshape(()) if weight.scale.size == 1 else weight.scale
        if largest > INT8_MAX or not (scale > np.finfo(np.float32).tiny).all():
            initializers.append(numpy_helper.from_array(value, name))
            result.encodings[name] = "float32", value.nbytes
            continue
        block = _block(weight) if int4 and name in products and largest <= INT4_MAX else None
        if block is None:
            attributes: dict[str, Any] = {"axis": weight.axis} if scale.size > 1 else {}
            stored = numpy_helper.from_array(weight.integers.astype(np.int8), f"{name}_integers")
            zero = numpy_helper.from_array(np.zeros(scale.shape, dtype=np.int8), f"{name}_zero")
        else:
            inputs = 1 - weight.axis
            blocks = [*weight.integers.shape]
            blocks[inputs] //= block
            spread = scale if scale.size == 1 else np.expand_dims(scale, inputs)
            scale = np.ascontiguousarray(np.broadcast_to(spread, blocks))
            attributes = {"axis": inputs, "block_size": block}
            stored = _int4(f"{name}_integers", weight.integers)
            zero = _int4(f"{name}_zero", np.zeros(blocks, dtype=np.int8))
        initializers += [stored, numpy_helper.from_array(scale, f"{name}_scale"), zero]
        inputs_ = [stored.name, f"{name}_scale", zero.name]
        nodes.append(helper.make_node("DequantizeLinear", inputs_, [name], name=f"dequantize_{name}", **attributes))
        result.encodings[name] = "int8" if block is None else "int4", len(stored.raw_data)
    result.proto = with_weights(graph.proto, initializers, nodes)
    return result


def check(proto: Any) -> None:
    """UserError where the graph is no valid ONNX, or holds what TensorRT refuses: uint8, or zero points that are not 0."""
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"onnx refuses it ({str(error).splitlines()[0][:160]})", where="the graph") from None
    constants = {value.name: value for value in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = constants.get(node.input[2])
        if zero is None or zero.data_type not in (TensorProto.INT8, TensorProto.INT4):
            raise UserError("is not a constant of signed integers", where=node.input[2])
        if numpy_helper.to_array(zero).astype(np.int8).any():
            raise UserError("is a zero point other than 0", where=node.input[2])


def _block(weight: Int8Weight) -> int | None:
    """How many inputs share a scale; None where TensorRT has no 4 bits for a matrix of such sides."""
    if weight.integers.ndim != 2 or weight.integers.shape[1] % 2:  # two numbers a byte in every row
        return None
    return next((block for block in BLOCKS if weight.integers.shape[1 - weight.axis] % block == 0), None)


def _int4(name: str, integers: np.ndarray) -> Any:
    """A TensorProto of two numbers a byte, the first in the lower half."""
    flat = (integers.reshape(-1).astype(np.int8) & 0xF).astype(np.uint8)
    flat = np.pad(flat, (0, -len(flat) % 2))
    packed = flat[0::2] | (flat[1::2] << 4)
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=integers.shape, raw_data=packed.tobytes())
