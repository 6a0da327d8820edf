"""The fp32 network of an exported file, made from the file alone: same graph, weights as float32, nothing rounded.

What is compared with in speed where the searched model is not at hand. Neither is meant to be accurate: BatchNorm is folded
into the weights or not, as in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from csqcli.exporting import int8_graph, onnx_graph, tflite


def of_onnx(proto: Any, layers: Sequence[str]) -> Any:
    """The ModelProto of an exported graph, its unpacked ``layers`` float32 initializers. ParityError where one is not computed once."""
    from onnx import helper, numpy_helper

    model = int8_graph.copied(proto)
    graph = model.graph
    known = {name for node in graph.node for name in node.output}
    for name in layers:
        if name not in known:  # the forward pass never reads it
            continue
        _, weight = onnx_graph.weights_in(proto, name)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), name))
        for node in [node for node in graph.node if name in node.output]:
            graph.node.remove(node)
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        source = producer.get(node.input[0])
        if source is not None and source.op_type == "Clip":
            source = producer.get(source.input[0])
        if source is not None and source.op_type == "QuantizeLinear":
            node.CopyFrom(helper.make_node("Identity", [source.input[0]], node.output))
    return int8_graph.without_rounding(model)  # which drops what nothing reads


def of_litert(content: bytes) -> bytes:
    """The bytes of an exported .tflite with every tensor float32. The content must be known to be what csq wrote."""
    model, s = tflite.read(content), tflite.schema()
    graph, buffers = model.subgraphs[0], [_bytes(buffer.data) for buffer in model.buffers]
    bits_of = {s.TensorType.INT2: 2, s.TensorType.INT4: 4, s.TensorType.INT8: 8, s.TensorType.INT32: 32}
    for tensor in graph.tensors:
        quantization = tensor.quantization
        if tensor.type not in bits_of or quantization is None or quantization.scale is None:
            continue  # float32, or whole numbers that are meant: shapes, axes
        data, bits = buffers[tensor.buffer], bits_of[tensor.type]
        if data is not None:
            count = int(np.prod(tensor.shape))
            integers = data.view(np.int32) if bits == 32 else tflite.unpacked(data, bits, count)
            scale = np.asarray(quantization.scale, dtype=np.float32)
            spread = [1] * len(tensor.shape)
            spread[quantization.quantizedDimension if scale.size > 1 else 0] = scale.size
            zero = np.asarray(quantization.zeroPoint).reshape(spread)
            values = (integers.reshape(tensor.shape) - zero).astype(np.float32) * scale.reshape(spread)
            tensor.buffer = len(buffers)
            buffers.append(values.reshape(-1).view(np.uint8))
        tensor.type, tensor.quantization = s.TensorType.FLOAT32, None
    codes = [code.builtinCode for code in model.operatorCodes]
    rounding = (s.BuiltinOperator.QUANTIZE, s.BuiltinOperator.DEQUANTIZE)
    same: dict[int, int] = {}  # a tensor -> the one that is now the same
    kept = []
    for operator in graph.operators:  # in the order in which they run
        operator.inputs = [same.get(number, number) for number in operator.inputs]
        if codes[operator.opcodeIndex] in rounding:
            same[operator.outputs[0]] = operator.inputs[0]
        else:
            kept.append(operator)
    graph.operators = kept
    graph.outputs = [same.get(number, number) for number in graph.outputs]
    for signature in model.signatureDefs or ():
        for entry in signature.outputs:
            entry.tensorIndex = same.get(entry.tensorIndex, entry.tensorIndex)
    model.metadata = []
    return tflite.packed_model(model, buffers)


def _bytes(data: Any) -> np.ndarray | None:
    return None if data is None else np.asarray(data, dtype=np.uint8)
