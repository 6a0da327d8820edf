"""One layer alone in an engine, for its latency: the kernel that an export's graph would have for it, weights at random.

The graph of one operation goes through the code that exports networks (`onnx_graph`, `litert_graph`), so that a layer is measured
as it would run. In an integer form the graph begins and ends with integers, as between two layers in int8: what rounds
and dequantizes at the ends of a network is taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from csqcli.errors import UserError
from csqcli.exporting import litert_graph
from csqcli.exporting.int8_graph import Int8Graph, Int8Weight
from csqcli.exporting.litert_graph import Litert
from csqcli.exporting.onnx_graph import OPSET, Graphs
from csqcli.exporting.runtime import INPUT, OUTPUT, LiteRtModel, OnnxModel, OpenVinoModel
from csqcli.models.coverage import Call
from csqcli.quant.costs import FLOAT_FORM as FP32
from csqcli.quant.costs import FORM_PLANES as PLANES
from csqcli.quant.hard_layer import HardLayer, top_planes

_WEIGHT = "weight"
_STEP = 0.02  # of activations; any will do
_KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")

Run = Callable[[], object]


def batched(call: Call, batch: int) -> Call:
    """The same operation on so many images."""
    return replace(call, input=(call.input[0] * batch, *call.input[1:]))


def runs(engine: str, call: Call, form: str, *, threads: int) -> Run | None:
    """A call that runs the operation once, in ``form``, on so many threads; None where the engine has no kernel for it.

    ``engine``: a key of `engines.ENGINES`, whose packages are there. Of torch the caller sets the threads.
    """
    if call.kind == "convolution" and call.transposed and form != FP32:
        return None  # no export has them in integers
    if engine == "torch":
        return _torch(call)
    try:
        if engine == "litert":
            return _litert(call, form, threads)
        proto = _onnx(call, form).SerializeToString()
        images = _pixels(call, np.float32 if form == FP32 else np.uint8)
        if engine == "openvino":
            return _prepared(OpenVinoModel(proto, threads=threads), images)
        model = OnnxModel(proto, threads=threads)
        model(images)
        return lambda: model(images)
    except UserError:  # the engine refuses the graph
        return None


def _prepared(model: OpenVinoModel, images: torch.Tensor) -> Run:
    """OpenVINO on an input that it has already: handing one over and fetching the result take longer than a small layer."""
    import openvino

    request = model.compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(images.numpy()))
    request.infer(share_outputs=True)
    return lambda: request.infer(share_outputs=True)


def _pixels(call: Call, dtype: type) -> torch.Tensor:
    rng = np.random.default_rng(0)
    if dtype is np.float32:
        return torch.from_numpy(rng.random(call.input, dtype=np.float32))
    return torch.from_numpy(rng.integers(0, 256, call.input, dtype=dtype))


@torch.no_grad()
def _torch(call: Call) -> Run:
    images, weight = _pixels(call, np.float32), torch.randn(call.weight) / 32
    bias = torch.zeros(_outputs(call)) if call.bias else None
    if call.kind == "linear":
        return torch.inference_mode()(lambda: F.linear(images, weight, bias))
    settings = (call.stride, call.padding, call.dilation, call.transposed, call.output_padding, call.groups)
    return torch.inference_mode()(lambda: torch.convolution(images, weight, bias, *settings))


def _outputs(call: Call) -> int:
    return call.weight[1] * call.groups if call.transposed else call.weight[0]


def _hard(call: Call, form: str) -> HardLayer:
    """Integers that just fit the form; in fp32 as many as int8 holds."""
    planes = PLANES.get(form, PLANES["int8"])
    limit = 2**planes - 1
    integers = np.random.default_rng(0).integers(-limit, limit + 1, call.weight, dtype=np.int32)
    integers.reshape(-1)[0] = limit
    # a step per channel, as csq's methods have it, so small that sums stay small
    channel_dim = int(call.transposed)  # of a grouped transposed convolution: the channels of a group
    scale = torch.full((call.weight[channel_dim],), 1 / (16 * limit))
    return HardLayer(_WEIGHT, torch.from_numpy(integers), scale, top_planes(planes, planes), channel_dim)


def _traced(call: Call, *, rounded: bool) -> Any:
    """The operation as a ModelProto of `onnx_graph.trace`: the weight an input, its own input and output ``rounded`` to 8 bits."""
    from onnx import TensorProto, helper, numpy_helper

    constants, nodes, source = [], [], INPUT
    if rounded:
        zero = numpy_helper.from_array(np.array(0, dtype=np.uint8), "zero")
        constants += [zero, numpy_helper.from_array(np.array(_STEP, dtype=np.float32), "step")]
        nodes += [
            helper.make_node("QuantizeLinear", [INPUT, "step", "zero"], ["images_quantized"]),
            helper.make_node("DequantizeLinear", ["images_quantized", "step", "zero"], ["images_dq"]),
        ]
        source = "images_dq"
    inputs, result = [source, _WEIGHT], "given" if rounded else OUTPUT
    if call.bias:
        constants.append(numpy_helper.from_array(np.zeros(_outputs(call), dtype=np.float32), "bias"))
        inputs.append("bias")
    if call.kind == "linear":
        nodes.append(helper.make_node("Gemm", inputs, [result], transB=1))
    else:
        settings: dict[str, Any] = {
            "kernel_shape": call.weight[2:],
            "strides": call.stride,
            "pads": [*call.padding, *call.padding],
            "dilations": call.dilation,
            "group": call.groups,
        }
        if call.transposed:
            settings["output_padding"] = call.output_padding
        kind = "ConvTranspose" if call.transposed else "Conv"
        nodes.append(helper.make_node(kind, inputs, [result], **settings))
    if rounded:
        nodes += [
            helper.make_node("QuantizeLinear", [result, "step", "zero"], ["given_quantized"]),
            helper.make_node("DequantizeLinear", ["given_quantized", "step", "zero"], [OUTPUT]),
        ]
    ends = [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, call.input)]
    ends.append(helper.make_tensor_value_info(_WEIGHT, TensorProto.FLOAT, call.weight))
    given = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [None] * len(call.input))
    graph = helper.make_graph(nodes, "layer", ends, [given], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _onnx(call: Call, form: str) -> Any:
    """A ModelProto for ONNX Runtime and OpenVINO."""
    from onnx import TensorProto

    hard = _hard(call, form)
    graphs = Graphs(_traced(call, rounded=form != FP32), [hard], [])
    if form == FP32:
        return graphs.plain()
    weight = Int8Weight(hard.integers.numpy(), hard.scale.numpy(), hard.channel_dim)
    proto = graphs.packed(Int8Graph(graphs.proto, {_WEIGHT: weight})).proto
    kept = [node for node in proto.graph.node if node.output[0] not in ("images_quantized", OUTPUT)]
    for node in kept:  # integers come in and go out
        if node.output[0] == "images_dq":
            node.input[0] = INPUT
        if node.output[0] == "given_quantized":
            node.output[0] = OUTPUT
    nodes = [type(node).FromString(node.SerializeToString()) for node in kept]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.UINT8
    return proto


def _litert(call: Call, form: str, threads: int) -> Run | None:
    hard = _hard(call, form)
    weight = {_WEIGHT: Int8Weight(hard.integers.numpy(), hard.scale.numpy(), hard.channel_dim)}
    traced = _traced(call, rounded=form != FP32)
    if form == FP32:
        made = litert_graph.convert(Int8Graph(traced), weight, prefer="float32")
    else:
        made = litert_graph.convert(Int8Graph(traced, weight), {})
        if made.placed[_WEIGHT].bits != int(form.removeprefix("int")):
            return None  # the export has no kernel of so few bits there
    model = LiteRtModel(_kernel_alone(made), threads=threads)
    [source] = model.interpreter.get_input_details()
    rng = np.random.default_rng(0)
    integers = rng.integers(-128, 128, source["shape"])
    images = integers.astype(np.int8) if source["dtype"] is np.int8 else rng.random(source["shape"], dtype=np.float32)
    model.interpreter.set_tensor(model.source, images)
    model.interpreter.invoke()
    run: Run = model.interpreter.invoke
    return run


def _kernel_alone(made: Litert) -> bytes:
    """The file without what turns floats into integers in front of the operation, and without all that follows it."""
    writer = made.writer
    builtin = writer.schema.BuiltinOperator
    kinds, operators = writer.kinds, writer.operators
    kernel = next(at for at, kind in enumerate(kinds) if kind in [getattr(builtin, name) for name in _KERNELS])
    source, result = made.source, operators[kernel].outputs[0]
    first = 0
    if kinds[0] == builtin.QUANTIZE:
        first, source = 1, operators[0].outputs[0]
    writer.operators = operators[first : kernel + 1]
    return writer.finish(source, result, {})
