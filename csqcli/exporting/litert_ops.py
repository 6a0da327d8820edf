"""How each operator of a traced ONNX graph, weights aside, is written for LiteRT. One function per operator, in `OPERATIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from csqcli.exporting.litert_graph import Converter, Value

OPERATIONS: dict[str, Callable[[Converter, Any], None]] = {}
_LAST = {0: 0, 1: 3, 2: 1, 3: 2}  # where a dimension stands once the channels are last
_LOWEST = -3.4028234663852886e38  # float32


def _operation(*names: str) -> Callable[[Callable[[Converter, Any], None]], Callable[[Converter, Any], None]]:
    def register(function: Callable[[Converter, Any], None]) -> Callable[[Converter, Any], None]:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def _apply(
    graph: Converter, kind: str, inputs: Sequence[int], like: Value, *, table: str | None = None, **options: Any
) -> Value:
    """One float operator whose result has the shape and order of ``like``."""
    number = graph.writer.tensor(f"{kind.lower()}_{len(graph.writer.tensors)}", like.shape)
    graph.writer.operator(kind, inputs, [number], table=table, **options)
    return replace(like, number=number, step=None)


def _number(graph: Converter, value: float) -> int:
    return graph.writer.constant("number", np.array(value, dtype=np.float32))


@_operation("Identity", "DequantizeLinear", "Dropout")
def _same(graph: Converter, node: Any) -> None:
    """An int8 value keeps being one; whoever needs floats asks for them."""
    graph.values[node.output[0]] = graph.get(node.input[0])


@_operation("QuantizeLinear")
def _quantize(graph: Converter, node: Any) -> None:
    source, step = graph.get(node.input[0]), graph.step(node)
    if source.step == step:
        graph.values[node.output[0]] = source
        return
    value = replace(source, step=step)
    value = replace(value, number=graph.like(value, source.shape))
    version = 1 if source.step is None else 2
    graph.writer.operator("QUANTIZE", [source.number], [value.number], version=version, table="QuantizeOptions")
    graph.values[node.output[0]] = value


@_operation("Clip")
def _clip(graph: Converter, node: Any) -> None:
    source = graph.get(node.input[0])
    low, high = ([graph.constant_of(name) for name in node.input[1:]] + [None, None])[:2]
    quantized = low is not None and low.dtype in (np.uint8, np.int8)
    if not quantized:
        source = graph.float_of(node.input[0])
        if low is not None and high is not None and (float(low), float(high)) == (0.0, 6.0):
            graph.values[node.output[0]] = _apply(graph, "RELU6", [source.number], source)
            return
    for kind, bound, end in (("MAXIMUM", low, -128), ("MINIMUM", high, 127)):
        if bound is None:
            continue
        if not quantized:
            limit = _number(graph, float(bound))
            source = _apply(graph, kind, [source.number, limit], source, table="MaximumMinimumOptions")
            continue
        assert source.step is not None
        integer = int(bound) + source.step[1]
        if integer != end:
            limit = graph.int8_constant("bound", np.array(integer), source.step)
            result = replace(source, number=graph.like(source, source.shape))
            graph.writer.operator(
                kind, [source.number, limit], [result.number], version=2, table="MaximumMinimumOptions"
            )
            source = result
    graph.values[node.output[0]] = source


def _unary(kind: str, table: str | None = None) -> Callable[[Converter, Any], None]:
    def emit(graph: Converter, node: Any) -> None:
        source = graph.float_of(node.input[0])
        graph.values[node.output[0]] = _apply(graph, kind, [source.number], source, table=table)

    return emit


for _onnx, _kind, _table in (
    ("Relu", "RELU", None),
    ("Sigmoid", "LOGISTIC", None),
    ("Tanh", "TANH", None),
    ("HardSwish", "HARD_SWISH", "HardSwishOptions"),
    ("Exp", "EXP", "ExpOptions"),
    ("Sqrt", "SQRT", None),
    ("Round", "ROUND", None),  # half to even, as ONNX
    ("Abs", "ABS", "AbsOptions"),
    ("Neg", "NEG", "NegOptions"),
):
    OPERATIONS[_onnx] = _unary(_kind, _table)


@_operation("LeakyRelu")
def _leaky(graph: Converter, node: Any) -> None:
    source = graph.float_of(node.input[0])
    alpha = graph.attributes(node).get("alpha", 0.01)
    result = _apply(graph, "LEAKY_RELU", [source.number], source, table="LeakyReluOptions", alpha=alpha)
    graph.values[node.output[0]] = result


@_operation("Gelu")
def _gelu(graph: Converter, node: Any) -> None:
    source = graph.float_of(node.input[0])
    approximate = graph.attributes(node).get("approximate", b"none") == b"tanh"
    result = _apply(graph, "GELU", [source.number], source, table="GeluOptions", approximate=approximate)
    graph.values[node.output[0]] = result


@_operation("HardSigmoid")
def _hard_sigmoid(graph: Converter, node: Any) -> None:
    source, attributes = graph.float_of(node.input[0]), graph.attributes(node)
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    scaled = _apply(graph, "MUL", [source.number, _number(graph, alpha)], source, table="MulOptions")
    moved = _apply(
        graph, "ADD", [scaled.number, _number(graph, beta)], source, table="AddOptions", fusedActivationFunction=1
    )
    graph.values[node.output[0]] = _apply(
        graph, "MINIMUM", [moved.number, _number(graph, 1.0)], source, table="MaximumMinimumOptions"
    )


def _binary(kind: str, table: str) -> Callable[[Converter, Any], None]:
    def emit(graph: Converter, node: Any) -> None:
        constants = [graph.constant_of(name) for name in node.input]
        values = [
            graph.float_of(name) for name, known in zip(node.input, constants, strict=True) if known is None
        ]  # computed ones
        last = any(value.channels_last for value in values)
        rank = max(len(value.shape) for value in values)
        if last and any(len(value.shape) != 4 for value in values):
            values, last = [graph.plain(value) for value in values], False
        inputs, shapes, computed = [], [], iter(values)
        for name, known in zip(node.input, constants, strict=True):
            if known is None:
                value = next(computed)
                value = graph.nhwc(value) if last else value
                inputs.append(value.number)
                shapes.append(value.shape)
            else:
                constant = np.asarray(known, dtype=np.float32)
                if last and constant.ndim:
                    constant = constant.reshape((1,) * (4 - constant.ndim) + constant.shape).transpose(0, 2, 3, 1)
                inputs.append(graph.writer.constant(name, constant))
                shapes.append(constant.shape)
        shape = tuple(int(side) for side in np.broadcast_shapes(*shapes))
        assert len(shape) >= rank
        number = graph.writer.tensor(f"{kind.lower()}_{len(graph.writer.tensors)}", shape)
        end, activation = node.output[0], 0
        if kind in ("ADD", "MUL", "SUB", "DIV") and (reader := graph.only_reader(end)) is not None:
            if reader.op_type == "Relu":
                graph.done.add(id(reader))
                end, activation = reader.output[0], 1
        graph.writer.operator(kind, inputs, [number], table=table, fusedActivationFunction=activation)
        graph.values[end] = replace(values[0], number=number, shape=shape, channels_last=last, step=None)

    return emit


for _onnx in ("Add", "Mul", "Sub", "Div"):
    OPERATIONS[_onnx] = _binary(_onnx.upper(), f"{_onnx}Options")


@_operation("BatchNormalization")
def _batchnorm(graph: Converter, node: Any) -> None:
    """One that could not be folded: a scale and a shift per channel."""
    parameters = [graph.constant_of(name) for name in node.input[1:]]
    if any(value is None for value in parameters):
        graph.refuse("a BatchNorm whose statistics are computed")
    gamma, beta, mean, variance = (np.asarray(value, dtype=np.float64) for value in parameters)
    gain = gamma / np.sqrt(variance + graph.attributes(node).get("epsilon", 1e-5))
    source = graph.nhwc(graph.float_of(node.input[0]))
    spread = [1, -1] + [1] * (len(source.shape) - 2) if not source.channels_last else [1, 1, 1, -1]
    factor, shift = (
        graph.writer.constant("norm", value.astype(np.float32).reshape(spread)) for value in (gain, beta - mean * gain)
    )
    scaled = _apply(graph, "MUL", [source.number, factor], source, table="MulOptions")
    graph.values[node.output[0]] = _apply(graph, "ADD", [scaled.number, shift], source, table="AddOptions")


@_operation("LayerNormalization")
def _layernorm(graph: Converter, node: Any) -> None:
    source, attributes = graph.plain(graph.float_of(node.input[0])), graph.attributes(node)
    axis = attributes.get("axis", -1) % len(source.shape)
    axes = graph.writer.constant("axes", np.arange(axis, len(source.shape), dtype=np.int32))
    reduced = replace(source, shape=(*source.shape[:axis], *[1] * (len(source.shape) - axis)))

    def mean(value: int) -> int:
        return _apply(graph, "MEAN", [value, axes], reduced, table="ReducerOptions", keepDims=True).number

    centred = _apply(graph, "SUB", [source.number, mean(source.number)], source, table="SubOptions").number
    square = _apply(graph, "MUL", [centred, centred], source, table="MulOptions").number
    epsilon = _number(graph, attributes.get("epsilon", 1e-5))
    variance = _apply(graph, "ADD", [mean(square), epsilon], reduced, table="AddOptions").number
    inverse = _apply(graph, "RSQRT", [variance], reduced).number
    value = _apply(graph, "MUL", [centred, inverse], source, table="MulOptions")
    for kind, name in zip(("MUL", "ADD"), node.input[1:], strict=False):
        options = "MulOptions" if kind == "MUL" else "AddOptions"
        value = _apply(graph, kind, [value.number, graph.float_of(name).number], source, table=options)
    graph.values[node.output[0]] = value


@_operation("Softmax")
def _softmax(graph: Converter, node: Any) -> None:
    source = graph.plain(graph.float_of(node.input[0]))
    if graph.attributes(node).get("axis", -1) % len(source.shape) != len(source.shape) - 1:
        graph.refuse("a softmax over a dimension that is not the last")
    result = _apply(graph, "SOFTMAX", [source.number], source, table="SoftmaxOptions", beta=1.0)
    graph.values[node.output[0]] = result


@_operation("BatchMatMul")
def _batch_matmul(graph: Converter, node: Any) -> None:
    """A product of two computed values."""
    left, right = (graph.plain(graph.float_of(name)) for name in node.input)
    shape = graph.shape_of(node.output[0])
    number = graph.writer.tensor(f"matmul_{len(graph.writer.tensors)}", shape)
    graph.writer.operator("BATCH_MATMUL", [left.number, right.number], [number], table="BatchMatMulOptions")
    graph.values[node.output[0]] = replace(left, number=number, shape=shape)


@_operation("ReduceMean", "GlobalAveragePool")
def _mean(graph: Converter, node: Any) -> None:
    source, attributes = graph.float_of(node.input[0]), graph.attributes(node)
    rank, keep = len(source.shape), bool(attributes.get("keepdims", 1))
    if node.op_type == "GlobalAveragePool":
        axes, keep = list(range(2, rank)), True
    else:
        given = graph.constant_of(node.input[1]) if len(node.input) > 1 else attributes.get("axes")
        axes = [int(axis) % rank for axis in (range(rank) if given is None else given)]
    if source.channels_last and not keep and 1 not in axes and not set(range(2, rank)) <= set(axes):
        source = graph.plain(source)  # what is left would stand in another order
    if source.channels_last:
        axes = sorted(_LAST[axis] for axis in axes)
    shape = tuple(1 if axis in axes else side for axis, side in enumerate(source.shape) if keep or axis not in axes)
    number = graph.writer.tensor(f"mean_{len(graph.writer.tensors)}", shape)
    axes_number = graph.writer.constant("axes", np.array(axes, dtype=np.int32))
    graph.writer.operator("MEAN", [source.number, axes_number], [number], table="ReducerOptions", keepDims=keep)
    graph.values[node.output[0]] = replace(
        source, number=number, shape=shape, channels_last=source.channels_last and keep
    )


@_operation("MaxPool", "AveragePool")
def _pool(graph: Converter, node: Any) -> None:
    attributes, largest = graph.attributes(node), node.op_type == "MaxPool"
    source = graph.nhwc(graph.get(node.input[0]) if largest else graph.float_of(node.input[0]))
    kernel, strides = attributes["kernel_shape"], attributes.get("strides", [1, 1])
    pads = attributes.get("pads", [0, 0, 0, 0])
    dilations = attributes.get("dilations", [1, 1])
    if len(kernel) != 2 or list(dilations) != [1, 1] or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        graph.refuse(f"a {node.op_type} that is dilated, pads by itself or has not two dimensions")
    if any(pads) and not largest and not attributes.get("count_include_pad", 0):
        graph.refuse("an AveragePool that leaves its padding out of the count")
    traced = graph.shape_of(node.output[0])
    sides, padding = traced[2:], 1
    reach = [
        (side - 1) * stride + size - pads[axis]
        for axis, (side, stride, size) in enumerate(zip(sides, strides, kernel, strict=True))
    ]
    behind = [max(reach[axis] - source.shape[1 + axis], 0) for axis in range(2)]  # ceil_mode reaches further
    if behind[0] > pads[2] or behind[1] > pads[3]:
        if not largest:
            graph.refuse("an AveragePool that rounds its size up")
        pads = [*pads[:2], *(max(one, other) for one, other in zip(behind, pads[2:], strict=True))]
    if largest:
        source, padding = graph.padded(source, kernel, strides, dilations, pads, sides, fill=_LOWEST)
    elif any(pads):
        source, padding = graph.padded(source, kernel, strides, dilations, pads, (-1, -1))
    shape = (traced[0], *sides, traced[1])
    number = graph.like(source, shape)
    options = {"filterHeight": kernel[0], "filterWidth": kernel[1], "strideH": strides[0], "strideW": strides[1]}
    graph.writer.operator(
        "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D",
        [source.number],
        [number],
        version=1 if source.step is None else 2,
        table="Pool2DOptions",
        padding=padding,
        **options,
    )
    graph.values[node.output[0]] = replace(source, number=number, shape=shape)


@_operation("Pad")
def _pad(graph: Converter, node: Any) -> None:
    source, attributes = graph.plain(graph.float_of(node.input[0])), graph.attributes(node)
    given = [graph.constant_of(name) if name else None for name in node.input[1:]]
    pads, fill, axes = [*given, None, None, None][:3]
    if pads is None or attributes.get("mode", b"constant") != b"constant" or min(pads) < 0:
        graph.refuse("a Pad that crops, reflects or whose sizes are computed")
    assert pads is not None
    widths = np.zeros((len(source.shape), 2), dtype=np.int32)
    for position, axis in enumerate(range(len(source.shape)) if axes is None else axes):
        widths[axis] = pads[position], pads[position + len(pads) // 2]
    like = replace(source, shape=tuple(int(side + sum(w)) for side, w in zip(source.shape, widths, strict=True)))
    inputs = [source.number, graph.writer.constant("pads", widths)]
    value = 0.0 if fill is None else float(fill)
    if value == 0:
        result = _apply(graph, "PAD", inputs, like, table="PadOptions")
    else:
        result = _apply(graph, "PADV2", [*inputs, _number(graph, value)], like, table="PadV2Options")
    graph.values[node.output[0]] = result


@_operation("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(graph: Converter, node: Any) -> None:
    source = graph.plain(graph.get(node.input[0]))
    graph.values[node.output[0]] = graph.reshaped(source, graph.shape_of(node.output[0]))


@_operation("Transpose")
def _transpose(graph: Converter, node: Any) -> None:
    source, order = graph.get(node.input[0]), tuple(graph.attributes(node)["perm"])
    if source.channels_last and order == (0, 2, 3, 1):
        result = replace(source, channels_last=False)
    elif not source.channels_last and order == (0, 3, 1, 2):
        result = replace(source, channels_last=True)
    else:
        result = graph.transposed(graph.plain(source), order)
    graph.values[node.output[0]] = result


@_operation("Concat")
def _concat(graph: Converter, node: Any) -> None:
    values = [graph.float_of(name) for name in node.input]
    axis = graph.attributes(node)["axis"] % len(values[0].shape)
    last = any(value.channels_last for value in values)
    if last:
        values, axis = [graph.nhwc(value) for value in values], _LAST[axis]
    shape = list(values[0].shape)
    shape[axis] = sum(value.shape[axis] for value in values)
    like = replace(values[0], shape=tuple(shape), channels_last=last)
    numbers = [value.number for value in values]
    result = _apply(graph, "CONCATENATION", numbers, like, table="ConcatenationOptions", axis=axis)
    graph.values[node.output[0]] = result


@_operation("Slice")
def _slice(graph: Converter, node: Any) -> None:
    source = graph.plain(graph.float_of(node.input[0]))
    given = [graph.constant_of(name) if name else None for name in node.input[1:]]
    starts, ends = given[:2]
    axes, steps = [*given[2:], None, None][:2]
    if starts is None or ends is None or (steps is not None and (np.asarray(steps) != 1).any()):
        graph.refuse("a slice with steps, or with bounds that are computed")
    assert starts is not None
    begin = [0] * len(source.shape)
    for axis, start in zip(range(len(starts)) if axes is None else axes, starts, strict=True):
        side = source.shape[axis]
        begin[axis] = int(np.clip(start + side if start < 0 else start, 0, side))
    graph.values[node.output[0]] = _part(graph, source, begin, graph.shape_of(node.output[0]))


@_operation("Split")
def _split(graph: Converter, node: Any) -> None:
    source = graph.plain(graph.float_of(node.input[0]))
    axis, begin = graph.attributes(node).get("axis", 0) % len(source.shape), [0] * len(source.shape)
    for name in node.output:
        shape = graph.shape_of(name)
        graph.values[name] = _part(graph, source, begin, shape)
        begin[axis] += shape[axis]


def _part(graph: Converter, source: Value, begin: Sequence[int], shape: tuple[int, ...]) -> Value:
    bounds = [graph.writer.constant("bounds", np.array(value, dtype=np.int32)) for value in (begin, shape)]
    return _apply(graph, "SLICE", [source.number, *bounds], replace(source, shape=shape), table="SliceOptions")


@_operation("Gather")
def _gather(graph: Converter, node: Any) -> None:
    source, index = graph.plain(graph.float_of(node.input[0])), graph.constant_of(node.input[1])
    if index is None:
        graph.refuse("a Gather whose indices are computed")
    assert index is not None
    axis = graph.attributes(node).get("axis", 0) % len(source.shape)
    index = np.where(index < 0, index + source.shape[axis], index).astype(np.int32)
    numbers = [source.number, graph.writer.constant("index", index)]
    like = replace(source, shape=(*source.shape[:axis], *index.shape, *source.shape[axis + 1 :]))
    graph.values[node.output[0]] = _apply(graph, "GATHER", numbers, like, table="GatherOptions", axis=axis)
