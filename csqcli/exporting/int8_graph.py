"""Trained activation scales and integer weights as QuantizeLinear / DequantizeLinear pairs, which engines run in int8.

The traced graph rounds a layer's input as torch does: Div by the scale, Round, Clip, Mul by the scale. Each such chain
becomes QuantizeLinear → Clip (below 8 bits) → DequantizeLinear with the same scale and range, so nothing is recalibrated.
A weight that multiplies such an input, with |Q| ≤ 127, becomes int8 behind DequantizeLinear; all others unpack to float
as in `onnx_graph`, and the chain in front of them stays: ONNX Runtime 1.23 and later would round a float weight behind
DequantizeLinear to int8 without a word.

BatchNorm after a convolution is folded here, because an engine does not fold it into int8 weights. That changes scales
and biases, never integers, except that a channel whose factor γ × scale is negative has its integers negated: scales must be
positive. An engine rounds biases to int32 at the product of input and weight scale and overflows silently; where a channel would
come near, the channel's scale is raised, or BatchNorm stays, and a layer whose own bias would overflow keeps float weights.

An engine that has signed 8 bits alone (TensorRT) gets int8 for every input: those of at most 7 unsigned bits as they are, those
of 8 unsigned bits at twice the step, which halves their levels; narrower ranges are clipped in float, before QuantizeLinear.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from csqcli.errors import UserError
from csqcli.quant.hard_layer import HardLayer

_KEEPS_SIGN = ("MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Flatten", "Reshape", "Transpose")
_LEFT_ALONE = {"QuantizeLinear", "BatchNormalization"}  # a trained scale follows; BatchNorm could not be folded
BIAS_LIMIT = 2.0**30  # int32 holds 2^31; half of it leaves room for the sum that the bias is added to
UNSEEN = 2.0**-9  # of a bias: less than half of the step at which 8 bits round an output that is as large


@dataclass
class Int8Weight:
    """How one layer's weight stands in the graph."""

    integers: np.ndarray  # int32, negated where `sign` is −1, transposed where the graph wants it
    scale: np.ndarray  # float32, [] or [channels]
    axis: int

    def weight(self) -> np.ndarray:
        """integers × scale, float32."""
        shape = [1] * self.integers.ndim
        shape[self.axis] = self.scale.size
        return self.integers.astype(np.float32) * self.scale.reshape(shape)


@dataclass
class _Activation:
    scale: float
    low: int
    high: int
    halved: bool = False  # 8 unsigned bits as 7, at twice the trained step


@dataclass
class Int8Graph:
    """An edited copy of a traced graph whose weights are still inputs, and the weights that go with it."""

    proto: Any  # onnx.ModelProto
    weights: dict[str, Int8Weight] = field(default_factory=dict)  # the layers that run in int8
    raised: dict[str, int] = field(default_factory=dict)  # layer -> channels whose scale was raised, see `quantize`
    halved: list[str] = field(default_factory=list)  # layers whose input has half of the trained levels, see `quantize`


def quantize(proto: Any, layers: list[HardLayer], *, one_reader: bool = False, signed_only: bool = False) -> Int8Graph:
    """Turn rounding chains into Q/DQ pairs and decide which weights become int8. UserError when there is no chain.

    A channel whose weights are so small beside its bias that int32 does not hold the bias gets a larger scale at the same
    integers, where that moves its output by less than 8 bits show; elsewhere its layer's BatchNorm stays in the graph, as it does
    ``signed_only``, where biases are float. Then no input is uint8: see above. With ``one_reader`` (LiteRT) a weight that
    several operations read stays float.
    """
    model = copied(proto)
    editor = Editor(model.graph, raises_scales=not signed_only, one_reader=one_reader)
    activations = editor.add_pairs(signed_only=signed_only)
    if not activations:
        raise UserError(
            "no rounded input was found in the graph", where="--activations int8", hint="use --activations float"
        )
    result = Int8Graph(model, raised=editor.raised, halved=editor.halved)
    for layer in layers:
        weight = editor.int8_weight(layer, activations)
        if weight is not None:
            result.weights[layer.name] = weight
    editor.drop_unused()
    return result


def open_outputs(graph: Int8Graph, *, every_layer: bool = False) -> dict[str, str]:
    """Layers in int8 whose output nothing rounds, by the value to round: ``{value: layer}``.

    ONNX Runtime computes a convolution in int8 only where its output is int8 too. The value is taken after a ReLU or ReLU6 that
    is the convolution's only reader; one that a trained scale already rounds is left alone. LiteRT wants that of
    ``every_layer``, linear ones too: their value is taken after the bias.
    """
    editor, found = Editor(graph.proto.graph), {}
    for node in graph.proto.graph.node:
        kinds = ("Conv", "Gemm", "MatMul") if every_layer else ("Conv",)
        if node.op_type not in kinds or node.input[1] not in graph.weights:
            continue
        value = node.output[0]
        readers = editor.consumers[value]
        if node.op_type == "MatMul" and len(readers) == 1 and editor.added_constant(readers[0], value) is not None:
            value = readers[0].output[0]
            readers = editor.consumers[value]
        if len(readers) == 1 and rectifier(readers[0], editor.constants):
            value = readers[0].output[0]
            readers = editor.consumers[value]
        if value not in editor.outputs and readers and not {r.op_type for r in readers} & _LEFT_ALONE:
            found[value] = node.input[1]
    return found


def copied(proto: Any) -> Any:
    """A copy of a ModelProto."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


def rectifier(node: Any, constants: dict[str, np.ndarray]) -> str | None:
    """RELU or RELU6 for a node that is one, whatever ONNX calls it."""
    if node.op_type == "Relu":
        return "RELU"
    bounds = [constants.get(name) for name in node.input[1:]] if node.op_type == "Clip" else []
    if len(bounds) == 2 and all(bound is not None and bound.dtype == np.float32 for bound in bounds):
        return "RELU6" if [float(bound) for bound in bounds if bound is not None] == [0.0, 6.0] else None
    return None


def fold_others(graph: Int8Graph, layers: list[HardLayer], *, positive_scales: bool = False) -> dict[str, Int8Weight]:
    """BatchNorm folded behind the layers that do not run in int8 as well; their integers, and scales for float arithmetic.

    With ``positive_scales`` a BatchNorm stays where a γ of 0 would make a scale 0.
    """
    editor = Editor(graph.proto.graph, positive_scales=positive_scales)
    found = {layer.name: editor.float_weight(layer) for layer in layers if layer.name not in graph.weights}
    editor.drop_unused()
    return found


def round_outputs(graph: Int8Graph, ranges: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Put Q/DQ pairs behind values that have none, at 8 bits over their measured (smallest, largest); their scales."""
    from onnx import helper

    editor, scales = Editor(graph.proto.graph), {}
    nodes = list(graph.proto.graph.node)
    for value, (low, high) in ranges.items():
        kind = np.uint8 if low >= 0 else np.int8
        top = high / 255 if low >= 0 else max(-low, high) / 127
        scales[value] = float(np.float32(top if top > 0 else 1.0))
        scale = editor.add_constant(f"{value}_out_scale", np.array(scales[value], dtype=np.float32))
        zero = editor.add_constant(f"{value}_out_zero", np.array(0, dtype=kind))
        for reader in editor.consumers[value]:
            for index, name in enumerate(reader.input):
                if name == value:
                    reader.input[index] = f"{value}_out"
        position = next(index for index, node in enumerate(nodes) if value in node.output) + 1
        nodes[position:position] = [
            helper.make_node("QuantizeLinear", [value, scale, zero], [f"{value}_out_quantized"]),
            helper.make_node("DequantizeLinear", [f"{value}_out_quantized", scale, zero], [f"{value}_out"]),
        ]
    del graph.proto.graph.node[:]
    graph.proto.graph.node.extend(nodes)
    return scales


def without_rounding(proto: Any) -> Any:
    """A copy of a traced graph whose activations are not rounded: the float network it is compared with in speed."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(proto)
    editor = Editor(model.graph)
    for node in model.graph.node:
        chain = editor.rounding(node)
        if chain is not None:
            node.CopyFrom(onnx.helper.make_node("Identity", [chain[0]], node.output))
    editor.drop_unused()
    return model


class Editor:
    """Look-ups and edits on one GraphProto.

    ``raises_scales`` where a bias that int32 would not hold may raise its channel's scale, ``one_reader`` where a weight of several
    readers stays float, ``positive_scales`` where a BatchNorm that would make a scale 0 is not folded.
    """

    def __init__(
        self, graph: Any, *, raises_scales: bool = False, one_reader: bool = False, positive_scales: bool = False
    ) -> None:
        from onnx import numpy_helper

        self.graph = graph
        self.constants = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
        self.raises_scales, self.one_reader, self.positive_scales = raises_scales, one_reader, positive_scales
        self.raised, self.halved = dict[str, int](), list[str]()
        self._index()

    def _index(self) -> None:
        self.producer = {output: node for node in self.graph.node for output in node.output}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        self.outputs = {value.name for value in self.graph.output}

    def add_pairs(self, *, signed_only: bool = False) -> dict[str, _Activation]:
        """Put a Q/DQ pair, ``{value}_dq``, beside every rounding chain of at most 8 bits; per value its scale and range."""
        from onnx import helper

        found: dict[str, _Activation] = {}
        nodes = []
        for node in self.graph.node:
            nodes.append(node)
            chain = self.rounding(node)
            if chain is None:
                continue
            source, activation = chain
            name = node.output[0]
            if signed_only and activation.high > np.iinfo(np.int8).max:
                activation = _Activation(2 * activation.scale, 0, np.iinfo(np.int8).max, halved=True)
            kind = np.uint8 if activation.low == 0 and not signed_only else np.int8
            clip = self._clip(name, source, activation, kind, in_float=signed_only)
            if clip is not None and signed_only:
                nodes.append(clip)
                source = clip.output[0]
            scale = self.add_constant(f"{name}_scale", np.array(activation.scale, dtype=np.float32))
            zero = self.add_constant(f"{name}_zero", np.array(0, dtype=kind))
            quantized = f"{name}_quantized"
            nodes.append(helper.make_node("QuantizeLinear", [source, scale, zero], [quantized]))
            if clip is not None and not signed_only:
                nodes.append(clip)
                quantized = clip.output[0]
            nodes.append(helper.make_node("DequantizeLinear", [quantized, scale, zero], [f"{name}_dq"]))
            found[name] = activation
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        self._index()
        return found

    def _clip(self, name: str, source: str, activation: _Activation, kind: Any, *, in_float: bool) -> Any:
        """The node that keeps what is rounded within its range, before or behind QuantizeLinear; None where that does it."""
        from onnx import helper

        limits, (low, high) = np.iinfo(kind), (activation.low, activation.high)
        bounded = low == limits.min or (in_float and low == 0 and self._never_negative(source))
        if bounded and high == limits.max:
            return None
        unit = np.float32(activation.scale) if in_float else 1
        bounds = [
            self.add_constant(f"{name}_{end}", np.array(value * unit, dtype=np.float32 if in_float else kind))
            for end, value in (("low", low), ("high", high))
        ]
        value = source if in_float else f"{name}_quantized"
        return helper.make_node("Clip", [value, *bounds], [f"{name}_{'' if in_float else 'quantized_'}clipped"])

    def _never_negative(self, value: str) -> bool:
        """Whether a rectifier gives a value, or what pools and reshapes what one gives."""
        node = self.producer.get(value)
        while node is not None and node.op_type in _KEEPS_SIGN:
            node = self.producer.get(node.input[0])
        return node is not None and rectifier(node, self.constants) is not None

    def rounding(self, mul: Any) -> tuple[str, _Activation] | None:
        """(what is rounded, how) where ``mul`` ends a chain Div → Round → Clip → Mul with one scale."""
        steps = [mul]
        for kind in ("Clip", "Round", "Div"):
            previous = self.producer.get(steps[-1].input[0]) if steps[-1].input else None
            if previous is None or previous.op_type != kind:
                return None
            steps.append(previous)
        clip, division = steps[1], steps[3]
        scale = self.constants.get(division.input[1])
        bounds = [self.constants.get(name) for name in clip.input[1:]]
        if mul.op_type != "Mul" or mul.input[1] != division.input[1] or scale is None or scale.size != 1:
            return None
        if len(bounds) != 2 or any(bound is None for bound in bounds):
            return None
        low, high = (int(bound) for bound in bounds)  # type: ignore[arg-type]
        if not (0 <= -low <= 128 and high <= (255 if low == 0 else 127)):
            return None
        return division.input[0], _Activation(float(scale.reshape(())), low, high)

    def int8_weight(self, layer: HardLayer, activations: dict[str, _Activation]) -> Int8Weight | None:
        """The int8 form of a weight, with its graph edited to match; None where it has to stay float.

        A weight that several operations read becomes int8 if each of them could have it alone; their BatchNorms stay.
        """
        if not self.consumers[layer.name] or int(layer.integers.abs().max()) > 127:
            return None
        nodes, transposed = self.consumers[layer.name], False
        through = nodes[0]
        if len(nodes) == 1 and through.op_type == "Transpose" and layer.integers.dim() == 2:
            nodes, transposed = self.consumers[through.output[0]], True
        value = through.output[0] if transposed else layer.name
        if len(nodes) > 1 and self.one_reader:  # LiteRT writes one tensor per operation
            return None
        rounded = [self._rounded_input(node, activations) for node in nodes]
        if any(name is None for name in rounded) or not nodes:
            return None
        if not all(self._multiplies(node, value, layer, transposed=transposed) for node in nodes):
            return None
        channels = layer.integers.shape[layer.channel_dim]
        scale = np.broadcast_to(layer.scale.numpy().astype(np.float64), (channels,))
        sign, folded = np.ones(channels), None
        for node, name in zip(nodes, rounded, strict=True):
            activation, bias = activations[name or ""], self._bias(node)
            if bias is None:
                return None
            if len(nodes) == 1:
                others = [d for d in range(layer.integers.dim()) if d != layer.channel_dim]
                sums = layer.integers.abs().sum(others).double().numpy()
                reach = float(max(-activation.low, activation.high)) * sums
                folded = self._fold_batchnorm(node, scale, bias, activation.scale, reach)
            per_channel = scale if bias.size in (1, channels) else scale.min()  # grouped and transposed
            if folded is None and not holds(bias, activation.scale * per_channel):
                return None
        if folded is not None:
            scale, sign = folded
        elif layer.scale.numel() == 1 and not transposed:
            scale = scale[0]
        spread_sign = [1] * layer.integers.dim()
        spread_sign[layer.channel_dim] = channels
        integers = layer.integers.numpy() * sign.reshape(spread_sign).astype(np.int32)
        for node, name in zip(nodes, rounded, strict=True):
            self._read_rounded(node, name or "")
            if transposed:
                node.input[1] = layer.name
        self.halved += [layer.name] if any(activations[name or ""].halved for name in rounded) else []
        axis = 1 - layer.channel_dim if transposed else layer.channel_dim
        return Int8Weight(
            np.ascontiguousarray(integers.T if transposed else integers), np.asarray(scale, np.float32), axis
        )

    def _multiplies(self, node: Any, value: str, layer: HardLayer, *, transposed: bool) -> bool:
        """Whether ``node`` multiplies by the weight that ``value`` is, its output channels where a scale per channel fits."""
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or list(node.input).index(value) != 1:
            return False
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Gemm" and not ("transB" in attributes and attributes["transB"].i):
            return False
        wanted = 1 if node.op_type == "ConvTranspose" else 0
        fits = layer.scale.numel() == 1 or layer.channel_dim == wanted
        return transposed == (node.op_type == "MatMul") and fits

    def _rounded_input(self, node: Any, activations: dict[str, _Activation]) -> str | None:
        """The rounded value that ``node`` reads, as it is or with its dimensions in another order; None if it reads another."""
        if not node.input or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return None
        value = node.input[0].removesuffix("_dq")
        while value not in activations and value in self.producer and self.producer[value].op_type == "Transpose":
            if self.one_reader:
                return None
            value = self.producer[value].input[0].removesuffix("_dq")
        return value if value in activations else None

    def _read_rounded(self, node: Any, value: str) -> None:
        """Let ``node`` read the Q/DQ pair beside a rounded value, with the Transposes on the way."""
        while node.input[0] != value and not node.input[0].endswith("_dq"):
            node = self.producer[node.input[0]]
        node.input[0] = f"{value}_dq"

    def float_weight(self, layer: HardLayer) -> Int8Weight:
        """A layer that stays float, BatchNorm folded where it can be; the graph is then edited. Its integers may be wide."""
        integers, scale, axis = layer.integers.numpy(), layer.scale.numpy(), layer.channel_dim
        users = self.consumers[layer.name]
        node = users[0] if len(users) == 1 else None
        if node is not None and node.op_type == "Transpose" and integers.ndim == 2:
            products = self.consumers[node.output[0]]
            if len(products) == 1 and products[0].op_type == "MatMul" and products[0].input[1] == node.output[0]:
                products[0].input[1] = layer.name
                return Int8Weight(np.ascontiguousarray(integers.T), scale, 1 - axis)
        if node is None or node.op_type != "Conv" or node.input[1] != layer.name or axis != 0:
            return Int8Weight(integers, scale, axis)
        bias = self._bias(node)
        spread = np.broadcast_to(scale.astype(np.float64), (integers.shape[0],))
        folded = self._fold_batchnorm(node, spread, bias, None) if bias is not None else None
        if folded is None:
            return Int8Weight(integers, scale, axis)
        sign = folded[1].reshape([-1] + [1] * (integers.ndim - 1)).astype(np.int32)
        return Int8Weight(integers * sign, folded[0].astype(np.float32), 0)

    def added_constant(self, node: Any, value: str) -> np.ndarray | None:
        """What ``node`` adds to ``value``, where that is a vector that is constant: a bias."""
        if node.op_type != "Add":
            return None
        constant = self.constants.get(next((name for name in node.input if name != value), value))
        return constant if constant is not None and constant.ndim == 1 else None

    def _bias(self, node: Any) -> np.ndarray | None:
        """A node's constant bias; zero where it has none, None where it is computed."""
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros(1)
        return self.constants.get(node.input[2])

    def _fold_batchnorm(
        self, conv: Any, scale: np.ndarray, bias: np.ndarray, step: float | None, reach: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(new scales, signs) when BatchNorm follows ``conv`` and can go into it; the graph is then edited.

        With the ``step`` of an int8 input, biases have to fit int32; ``reach`` is the largest sum of products per channel.
        """
        users = self.consumers[conv.output[0]]
        groups = next((a.i for a in conv.attribute if a.name == "group"), 1)
        takes = conv.op_type == "Conv" or (conv.op_type == "ConvTranspose" and groups == 1)
        if not takes or len(users) != 1 or users[0].op_type != "BatchNormalization":
            return None
        norm = users[0]
        values = [self.constants.get(name) for name in norm.input[1:]]
        if any(value is None for value in values) or conv.output[0] in self.outputs:
            return None
        gamma, beta, mean, variance = (value.astype(np.float64) for value in values if value is not None)
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        new_scale, new_bias = np.abs(scale * factor), beta + (bias - mean) * factor
        if self.positive_scales and not (new_scale > np.finfo(np.float32).tiny).all():
            return None
        if step is not None and reach is not None and self.raises_scales:
            needed = np.maximum(np.abs(new_bias) / (0.99 * BIAS_LIMIT), 2 * np.finfo(np.float32).tiny) / step
            raised = new_scale < needed
            if (raised & (reach * needed * step > np.maximum(UNSEEN * np.abs(new_bias), 1e-30))).any():
                return None
            new_scale = np.where(raised, needed, new_scale)
            self.raised |= {conv.input[1]: int(raised.sum())} if raised.any() else {}
        if step is not None and not holds(new_bias, step * new_scale):
            return None
        name = self.add_constant(f"{norm.output[0]}_bias", new_bias.astype(np.float32))
        del conv.input[2:]
        conv.input.append(name)
        conv.output[0] = norm.output[0]
        self.graph.node.remove(norm)
        self._index()
        return new_scale, np.where(scale * factor < 0, -1.0, 1.0)

    def add_constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self.constants[name] = value
        return name

    def drop_unused(self) -> None:
        """Remove nodes and initializers that nothing reads any more."""
        while True:
            self._index()
            dead = [
                node
                for node in self.graph.node
                if not any(self.consumers.get(name) or name in self.outputs for name in node.output)
            ]
            if not dead:
                break
            for node in dead:
                self.graph.node.remove(node)
        for value in [value for value in self.graph.initializer if not self.consumers.get(value.name)]:
            self.graph.initializer.remove(value)


def holds(bias: np.ndarray, unit: np.ndarray) -> bool:
    """Whether every bias fits the int32 that an engine rounds it to, and every unit is a normal float32."""
    tiny = np.finfo(np.float32).tiny
    return bool((unit > tiny).all() and (np.abs(bias) <= BIAS_LIMIT * unit).all())
