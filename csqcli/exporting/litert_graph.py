"""An ONNX graph of `int8_graph` → a LiteRT flatbuffer: channels last, int8 kernels where both ends have trained scales.

Each operator of the traced graph becomes one of LiteRT's, or a few. Convolutions and linear layers between two rounded
values run in int8, the activation behind them fused; all others stay float, their integers behind DEQUANTIZE, which LiteRT
folds when it loads the file. Values of four dimensions stand channels last, as LiteRT's kernels want them; where the
network itself reshapes or transposes them, a TRANSPOSE brings back its own order.

LiteRT's int8 runs from −128: a value that the model rounds to 0 … 255 has the zero point −128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from csqcli.errors import UserError
from csqcli.exporting import int8_graph, onnx_graph
from csqcli.exporting.int8_graph import Int8Graph, Int8Weight
from csqcli.exporting.litert_ops import OPERATIONS
from csqcli.exporting.runtime import INPUT, OUTPUT
from csqcli.exporting.tflite import Writer, bits_that_hold

Prefer = Literal["speed", "size", "float32"]  # the last: weights as float32, for comparison
_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
ACTIVATIONS = {"NONE": 0, "RELU": 1, "RELU6": 3}  # the schema's ActivationFunctionType
_WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Value:
    """One of the traced graph's values as a tensor of the file."""

    number: int
    shape: tuple[int, ...]  # as it stands in the file
    channels_last: bool = False  # whether the traced value has its channels second
    step: tuple[float, int] | None = None  # scale and zero point of an int8 tensor; None for float32


@dataclass
class Placed:
    """How a layer's weight stands in the file."""

    integers: np.ndarray  # int32, in the tensor's shape; with the sign of a negative γ
    scale: np.ndarray  # float32 [1] or [channels]
    axis: int
    bits: int  # 2, 4 or 8; 32 for float32, where no integer type of LiteRT's holds them
    int8: bool  # whether LiteRT multiplies it with int8 activations


@dataclass
class Litert:
    """A converted network."""

    writer: Writer
    source: int
    result: int
    placed: dict[str, Placed] = field(default_factory=dict)  # by the layer's name, which is its tensor's
    shared: dict[str, float] = field(
        default_factory=dict
    )  # layer -> scale at which all readers get its output, see `convert`

    def content(self, metadata: Mapping[str, bytes]) -> bytes:
        """The file's bytes."""
        return self.writer.finish(self.source, self.result, metadata)


def convert(
    plan: Int8Graph, folded: dict[str, Int8Weight], *, prefer: Prefer = "speed", shares_rounding: bool = False
) -> Litert:
    """The graph of ``plan``, traced for one image, as a flatbuffer.

    ``folded`` has the weights of the layers that are not in ``plan.weights``. ``shares_rounding``: where some readers of a
    layer's output round it and others do not, all get it rounded, so that the layer can run in int8. UserError for an
    operator that is not known here.
    """
    return Converter(plan, folded, prefer, shares_rounding).run()


class Converter:
    """One conversion: the traced graph's values by name, and the file that grows."""

    def __init__(self, plan: Int8Graph, folded: dict[str, Int8Weight], prefer: Prefer, shares_rounding: bool) -> None:
        self.graph = int8_graph.Editor(plan.proto.graph)
        self.plan, self.weights, self.prefer = plan, folded | plan.weights, prefer
        self.shares_rounding, self.shared = shares_rounding, dict[str, float]()
        self.shapes = onnx_graph.shapes_of(
            plan.proto, {name: weight.integers.shape for name, weight in self.weights.items()}
        )
        self.writer = Writer()
        self.values: dict[str, Value] = {}
        self.floats: dict[int, Value] = {}  # int8 tensor -> the same as float32
        self.done: set[int] = set()  # nodes that are part of what another one became
        self.placed: dict[str, Placed] = {}

    def run(self) -> Litert:
        shape = self.shapes[INPUT]
        if len(shape) == 4:
            shape = tuple(shape[axis] for axis in _TO_NHWC)
        source = Value(self.writer.tensor(INPUT, shape), shape, len(shape) == 4)
        self.values[INPUT] = source
        unknown = {node.op_type for node in self.graph.graph.node} - OPERATIONS.keys() - set(_WEIGHTED) - {"Clip"}
        if unknown:
            self.refuse(", ".join(sorted(unknown)))
        for node in self.graph.graph.node:
            if id(node) in self.done:
                continue
            if node.op_type in _WEIGHTED:
                self._weighted(node)
            else:
                OPERATIONS.get(node.op_type, OPERATIONS["Identity"])(self, node)
        result = self.plain(self.float_of(OUTPUT))
        self.writer.tensors[result.number].name = OUTPUT
        return Litert(self.writer, source.number, result.number, self.placed, self.shared)

    def refuse(self, what: str) -> None:
        hint = "export --onnx, or --state-dict and a converter of your own"
        raise UserError(f"cannot be written for LiteRT: {what}", where="csq export --litert", hint=hint)

    # Looking up

    def attributes(self, node: Any) -> dict[str, Any]:
        from onnx import helper

        return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}

    def constant_of(self, name: str) -> np.ndarray | None:
        return self.graph.constants.get(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def only_reader(self, name: str) -> Any | None:
        readers = self.graph.consumers[name]
        return readers[0] if len(readers) == 1 and name not in self.graph.outputs else None

    def get(self, name: str) -> Value:
        """A value as it stands, float32 or int8; constants and weights are written when they are first asked for."""
        if name not in self.values:
            constant = self.constant_of(name)
            if constant is not None:
                if constant.dtype == np.float64:
                    constant = constant.astype(np.float32)
                self.values[name] = Value(self.writer.constant(name, constant), constant.shape)
            elif name in self.weights:
                weight = self.weights[name]
                self.values[name] = self._float_weight(name, weight.integers, weight.scale, weight.axis)
            else:
                self.refuse(f"the value {name}, which nothing computes")
        return self.values[name]

    def float_of(self, name: str) -> Value:
        value = self.get(name)
        if value.step is None:
            return value
        if value.number not in self.floats:
            number = self.writer.tensor(f"{name}_float", value.shape)
            self.writer.operator("DEQUANTIZE", [value.number], [number], version=2, table="DequantizeOptions")
            self.floats[value.number] = replace(value, number=number, step=None)
        return self.floats[value.number]

    # Order of dimensions

    def plain(self, value: Value) -> Value:
        """The same with its dimensions in the traced graph's order."""
        if not value.channels_last:
            return value
        shape = tuple(value.shape[axis] for axis in _TO_NCHW)
        return replace(self._reordered(value, _TO_NCHW, shape), channels_last=False)

    def nhwc(self, value: Value) -> Value:
        """A value of four dimensions with its channels last."""
        if value.channels_last or len(value.shape) != 4:
            return value
        shape = tuple(value.shape[axis] for axis in _TO_NHWC)
        return replace(self._reordered(value, _TO_NHWC, shape), channels_last=True)

    def _reordered(self, value: Value, order: Sequence[int], shape: tuple[int, ...]) -> Value:
        moved = [axis for axis in order if value.shape[axis] != 1]
        if moved == sorted(moved):  # only sides of 1 change places
            return self.reshaped(value, shape)
        return self.transposed(value, order)

    def transposed(self, value: Value, order: Sequence[int]) -> Value:
        shape = tuple(value.shape[axis] for axis in order)
        number = self.like(value, shape)
        order_number = self.writer.constant("order", np.array(order, dtype=np.int32))
        version = 1 if value.step is None else 2
        self.writer.operator(
            "TRANSPOSE", [value.number, order_number], [number], version=version, table="TransposeOptions"
        )
        return replace(value, number=number, shape=shape)

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """The same numbers in another shape."""
        if tuple(shape) == value.shape:
            return value
        number = self.like(value, shape)
        sides = self.writer.constant("shape", np.array(shape, dtype=np.int32))
        new_shape = [int(side) for side in shape]
        self.writer.operator("RESHAPE", [value.number, sides], [number], table="ReshapeOptions", newShape=new_shape)
        return replace(value, number=number, shape=tuple(shape))

    def like(self, value: Value, shape: Sequence[int], name: str = "") -> int:
        """A new tensor of a value's type and step."""
        name = name or f"value_{len(self.writer.tensors)}"
        if value.step is None:
            return self.writer.tensor(name, shape)
        return self.writer.tensor(name, shape, "INT8", scale=value.step[0], zero=value.step[1])

    # Convolutions and linear layers

    def _weighted(self, node: Any) -> None:
        weight = self.weights.get(node.input[1])
        if weight is None and self.constant_of(node.input[1]) is None:
            if node.op_type == "MatMul":
                OPERATIONS["BatchMatMul"](self, node)
                return
            self.refuse(f"a {node.op_type} whose weight is computed ({node.input[1]})")
        end, bias = node.output[0], self._bias(node)
        add = self.only_reader(end) if node.op_type == "MatMul" else None
        addend = self.graph.added_constant(add, end) if add is not None else None
        if add is not None and addend is not None and addend.shape == (self.shape_of(end)[-1],):
            self.done.add(id(add))
            end, bias = add.output[0], addend
        end, activation = self._activation_behind(end)
        step = self._step_of(end)
        source = self.get(node.input[0])
        int8 = node.input[1] in self.plan.weights and step is not None and source.step is not None
        if int8 and weight is not None and source.step is not None:
            int8 = int8_graph.holds(bias, source.step[0] * weight.scale)
        emit = self._convolution if node.op_type == "Conv" else self._linear
        value = emit(node, bias, activation, step if int8 else None)
        self.values[end] = value
        if int8:
            readers = self.graph.consumers[end]
            for reader in (reader for reader in readers if reader.op_type == "QuantizeLinear"):
                self.values[reader.output[0]] = value
                self.done.add(id(reader))
            if step is not None and any(reader.op_type != "QuantizeLinear" for reader in readers):
                self.shared[node.input[1]] = step[0]

    def _bias(self, node: Any) -> np.ndarray:
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros(1)
        bias = self.constant_of(node.input[2])
        if bias is None:
            self.refuse(f"a {node.op_type} whose bias is computed")
        return np.asarray(bias)

    def _activation_behind(self, name: str) -> tuple[str, str]:
        """The value that a layer can give with an activation fused, and which."""
        reader = self.only_reader(name)
        kind = int8_graph.rectifier(reader, self.graph.constants) if reader is not None else None
        if reader is None or kind is None:
            return name, "NONE"
        self.done.add(id(reader))
        return reader.output[0], kind

    def _step_of(self, name: str) -> tuple[float, int] | None:
        """Scale and zero point at which the readers round a value; None where there is none, or several."""
        readers = self.graph.consumers[name]
        rounding = [reader for reader in readers if reader.op_type == "QuantizeLinear"]
        if name in self.graph.outputs or (len(rounding) < len(readers) and not self.shares_rounding):
            return None
        steps = {self.step(reader) for reader in rounding}
        return steps.pop() if len(steps) == 1 else None

    def step(self, quantize: Any) -> tuple[float, int]:
        """LiteRT's scale and zero point of a QuantizeLinear, whose own zero is 0."""
        scale, zero = self.graph.constants[quantize.input[1]], self.graph.constants[quantize.input[2]]
        return float(scale.reshape(())), -128 if zero.dtype == np.uint8 else 0

    def _linear(self, node: Any, bias: np.ndarray, activation: str, step: tuple[float, int] | None) -> Value:
        """Gemm, and MatMul with a weight: FULLY_CONNECTED over the last dimension."""
        attributes = self.attributes(node)
        name = node.input[1]
        if attributes.get("transA") or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1:
            self.refuse("a Gemm with factors")
        turned = node.op_type == "MatMul" or not attributes.get("transB")
        source = self.plain(self.get(node.input[0]) if step is not None else self.float_of(node.input[0]))

        def place(values: np.ndarray) -> np.ndarray:
            return values.T if turned else values

        weight_axis = self.weights[name].axis if name in self.weights else 0
        axis = 1 - weight_axis if turned else weight_axis
        channels = place(np.empty(self._weight_shape(name))).shape[0]
        shape = (*source.shape[:-1], channels)
        return self._fully_connected(source, name, place, axis, shape, bias, activation, step)

    def _fully_connected(
        self,
        source: Value,
        name: str,
        place: Callable[[np.ndarray], np.ndarray],
        axis: int,
        shape: tuple[int, ...],
        bias: np.ndarray,
        activation: str,
        step: tuple[float, int] | None,
    ) -> Value:
        weight, bits = self._weight(name, place, axis, int8=step is not None, narrow=True)
        inputs = [source.number, weight, self._bias_tensor(name, bias, shape[-1], source, step)]
        result = self._result(shape, step, source.channels_last)
        version = (1 if len(shape) == 2 else 5) if step is None else {8: 12, 4: 10, 2: 14}[bits]
        self.writer.operator(
            "FULLY_CONNECTED",
            inputs,
            [result.number],
            version=version,
            table="FullyConnectedOptions",
            keepNumDims=len(shape) > 2,
            fusedActivationFunction=ACTIVATIONS[activation],
        )
        return result

    def _convolution(self, node: Any, bias: np.ndarray, activation: str, step: tuple[float, int] | None) -> Value:
        attributes, name = self.attributes(node), node.input[1]
        shape = self._weight_shape(name)
        if len(shape) != 4:
            self.refuse(f"a convolution of {len(shape) - 2} dimensions")
        outputs, per_group, *kernel = shape
        group = attributes.get("group", 1)
        strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
        pads = list(attributes.get("pads", [0, 0, 0, 0]))
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            self.refuse("a convolution that pads by itself")
        source = self.nhwc(self.get(node.input[0]) if step is not None else self.float_of(node.input[0]))
        traced = self.shape_of(node.output[0])
        result_shape = (traced[0], *traced[2:], traced[1])
        if kernel == [1, 1] and group == 1 and list(strides) == [1, 1] and not any(pads):
            weight_axis = 0
            return self._fully_connected(
                source, name, lambda v: v.reshape(v.shape[:2]), weight_axis, result_shape, bias, activation, step
            )
        depthwise = per_group == 1 and group > 1 and outputs % group == 0 and group == source.shape[-1]
        source, padding = self.padded(source, kernel, strides, dilations, pads, result_shape[1:3])
        order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
        weight, bits = self._weight(
            name, lambda v: v.transpose(order), 3 if depthwise else 0, int8=step is not None, narrow=False
        )
        inputs = [source.number, weight, self._bias_tensor(name, bias, outputs, source, step)]
        result = self._result(result_shape, step, True)
        options: dict[str, Any] = {
            "padding": padding,
            "strideH": strides[0],
            "strideW": strides[1],
            "dilationHFactor": dilations[0],
            "dilationWFactor": dilations[1],
            "fusedActivationFunction": ACTIVATIONS[activation],
        }
        version = 1 if step is None else {8: 3, 4: 7}[bits]
        if depthwise:
            version = max(version, 2 if list(dilations) != [1, 1] else 1)
            options |= {"depthMultiplier": outputs // group, "table": "DepthwiseConv2DOptions"}
            self.writer.operator("DEPTHWISE_CONV_2D", inputs, [result.number], version=version, **options)
        else:
            version = max(version, 6) if group > 1 else version
            self.writer.operator("CONV_2D", inputs, [result.number], version=version, table="Conv2DOptions", **options)
        return result

    def padded(
        self,
        source: Value,
        kernel: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
        pads: Sequence[int],
        sides: Sequence[int],
        *,
        fill: float | None = None,
    ) -> tuple[Value, int]:
        """The input with ONNX's ``pads`` around it, and what is left to LiteRT: 0 for SAME, 1 for VALID.

        SAME pads less in front than behind, which is PyTorch's padding at stride 1, and TensorFlow's at all. ``fill`` None is 0.
        """
        if not any(pads):
            return source, 1
        same = []
        for axis in range(2):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = max((sides[axis] - 1) * strides[axis] + reach - source.shape[1 + axis], 0)
            ceiling = -(-source.shape[1 + axis] // strides[axis]) == sides[axis]
            same.append((total // 2, total - total // 2) == (pads[axis], pads[2 + axis]) and ceiling)
        if all(same):
            return source, 0
        widths = np.array([[0, 0], [pads[0], pads[2]], [pads[1], pads[3]], [0, 0]], dtype=np.int32)
        shape = tuple(int(side + width.sum()) for side, width in zip(source.shape, widths, strict=True))
        number = self.like(source, shape)
        inputs = [source.number, self.writer.constant("pads", widths)]
        if fill is None:
            version = 1 if source.step is None else 2
            self.writer.operator("PAD", inputs, [number], version=version, table="PadOptions")
        else:
            lowest = self._scalar(source, fill)
            version = 1 if source.step is None else 2
            self.writer.operator("PADV2", [*inputs, lowest], [number], version=version, table="PadV2Options")
        return replace(source, number=number, shape=shape), 1

    def _scalar(self, like: Value, value: float) -> int:
        if like.step is None:
            return self.writer.constant("fill", np.array(value, dtype=np.float32))
        return self.int8_constant("fill", np.array(-128), like.step)

    def int8_constant(self, name: str, integers: np.ndarray, step: tuple[float, int]) -> int:
        name = f"{name}_{len(self.writer.tensors)}"
        number = self.writer.tensor(name, integers.shape, "INT8", scale=step[0], zero=step[1])
        self.writer.attach(number, integers.astype(np.int8).reshape(-1).view(np.uint8))
        return number

    def _weight_shape(self, name: str) -> tuple[int, ...]:
        if name in self.weights:
            return self.weights[name].integers.shape
        constant = self.constant_of(name)
        assert constant is not None
        return constant.shape

    def _weight(
        self, name: str, place: Callable[[np.ndarray], np.ndarray], axis: int, *, int8: bool, narrow: bool
    ) -> tuple[int, int]:
        """(tensor, bits) of a layer's weight, rearranged by ``place``; float32 behind DEQUANTIZE unless ``int8``.

        ``narrow`` says that LiteRT multiplies 2 and 4 bits at least as fast as 8 there.
        """
        if name not in self.weights:
            constant = self.constant_of(name)
            assert constant is not None
            return self.writer.constant(name, place(constant)), 32
        weight = self.weights[name]
        integers = np.ascontiguousarray(place(weight.integers))
        if not int8:
            return self._float_weight(name, integers, weight.scale, axis).number, 32
        bits = bits_that_hold(integers) if narrow or self.prefer == "size" else 8
        bits = bits if narrow else max(bits, 4)  # LiteRT has no kernel for two bits there
        return self._stored(name, integers, weight.scale, axis, bits, int8=True), bits

    def _float_weight(self, name: str, integers: np.ndarray, scale: np.ndarray, axis: int) -> Value:
        """integers × scale as float32, which LiteRT computes when it loads the file."""
        if np.abs(integers).max(initial=0) > 127 or self.prefer == "float32":
            spread = [1] * integers.ndim
            spread[axis] = scale.size
            self._once(name, Placed(integers, np.atleast_1d(scale), axis, 32, False))
            weight = integers.astype(np.float32) * scale.reshape(spread)
            number = self.writer.tensor(name, weight.shape)
            self.writer.attach(number, np.ascontiguousarray(weight).reshape(-1).view(np.uint8))
            return Value(number, weight.shape)
        bits = bits_that_hold(integers) if self.prefer == "size" else 8
        stored = self._stored(name, integers, scale, axis, bits, int8=False)
        number = self.writer.tensor(f"{name}_float", integers.shape)
        version = 6 if bits < 8 else 5 if scale.size > 1 else 2
        self.writer.operator("DEQUANTIZE", [stored], [number], version=version, table="DequantizeOptions")
        return Value(number, integers.shape)

    def _stored(self, name: str, integers: np.ndarray, scale: np.ndarray, axis: int, bits: int, *, int8: bool) -> int:
        self._once(name, Placed(integers, np.atleast_1d(scale), axis, bits, int8))
        return self.writer.weight(name, integers, scale, axis=axis, bits=bits)

    def _once(self, name: str, placed: Placed) -> None:
        if name in self.placed:
            self.refuse(f"{name}, which the network reads in two ways")
        self.placed[name] = placed

    def _bias_tensor(
        self, name: str, bias: np.ndarray, channels: int, source: Value, step: tuple[float, int] | None
    ) -> int:
        values = np.broadcast_to(np.asarray(bias, dtype=np.float64).reshape(-1), (channels,))
        if step is None or source.step is None:
            return self.writer.constant(f"{name}_bias", values.astype(np.float32))
        unit = source.step[0] * self.weights[name].scale.astype(np.float64).reshape(-1)  # [1] or [channels]
        return self.writer.bias(f"{name}_bias", np.rint(values / unit).astype(np.int32), unit.astype(np.float32))

    def _result(self, shape: tuple[int, ...], step: tuple[float, int] | None, channels_last: bool) -> Value:
        value = Value(-1, shape, channels_last, step)
        return replace(value, number=self.like(value, shape))
