"""Hard model → ONNX graphs: one whose weights unpack themselves, and the plain float one it is measured against.

Quantized weights are made inputs of the exported graph before any optimizer sees it. So nothing can fold them into
something else, they keep their names, and each is replaced exactly once by nodes that compute integers × scale.
BatchNorm stays in the file and is folded by the engine, which changes scales, never integers; `int8_graph` has the form
whose activations are integers too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from csqcli.errors import UserError, machine_fault
from csqcli.exporting.runtime import INPUT, OUTPUT, require
from csqcli.exporting.verify import ParityError
from csqcli.quant.hard_layer import HardLayer, spread
from csqcli.quant.measuring import logits_of

if TYPE_CHECKING:
    from csqcli.exporting.int8_graph import Int8Graph

OPSET = 20  # Gelu is one operator from here on; ONNX Runtime reads it since 1.17
INT4_OPSET = 21  # from here on DequantizeLinear takes int4, and a scale per block
_PREFIX = "model."


class _Logits(nn.Module):
    """One input, one output, whatever the model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


@dataclass
class Graphs:
    """The exported network with its quantized weights as inputs, and what they are."""

    proto: Any  # onnx.ModelProto; inputs: images, then the names of `used`
    used: list[HardLayer]
    absent: list[str]  # layers that the forward pass never reads

    def packed(self, plan: Int8Graph | None = None) -> PackedGraph:
        """The graph with self-unpacking weights; ``plan`` (of `int8_graph`) says which of them are int8."""
        from csqcli.exporting.int8_graph import Int8Graph
        from csqcli.exporting.unpacking import Unpacker

        plan = plan or Int8Graph(self.proto)
        unpacker = Unpacker()
        result = PackedGraph(None)
        for layer in self.used:
            name = layer.name
            if name in plan.weights:
                weight = plan.weights[name]
                packed = unpacker.add_int8(name, weight.integers, weight.scale, axis=weight.axis)
                result.weights[name] = weight.integers, weight.weight()
                result.int8.append(name)
            else:
                scale = spread(layer.scale, layer.integers, layer.channel_dim)
                packed = unpacker.add(name, layer.integers.numpy(), scale.numpy())
                result.weights[name] = layer.integers.numpy(), layer.weight().numpy()
            result.encodings[name] = packed.encoding, packed.data.size
        result.proto = with_weights(plan.proto, unpacker.initializers, unpacker.nodes)
        return result

    def plain(self) -> Any:
        """ModelProto with the same weights as float32 initializers and no rounding: what a float export would run."""
        from onnx import numpy_helper

        from csqcli.exporting import int8_graph

        weights = [numpy_helper.from_array(layer.weight().numpy(), layer.name) for layer in self.used]
        return with_weights(int8_graph.without_rounding(self.proto), weights, [])


@dataclass
class PackedGraph:
    """A graph ready to be written, and what its nodes must compute for each layer."""

    proto: Any  # onnx.ModelProto
    weights: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # integers, float32 weight
    encodings: dict[str, tuple[str, int]] = field(default_factory=dict)  # name of the packing, bytes
    int8: list[str] = field(default_factory=list)  # layers that the engine can run in int8


def with_weights(proto: Any, initializers: Sequence[Any], nodes: Sequence[Any]) -> Any:
    """A copy of a graph whose weights are no longer inputs but come from ``initializers`` and ``nodes``."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    images = [value for value in graph.input if value.name == INPUT]
    del graph.input[:]
    graph.input.extend(images)
    graph.initializer.extend(initializers)
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *body])
    return model


def trace(
    model: nn.Module,
    layers: Sequence[HardLayer],
    input_size: Sequence[int],
    *,
    batch: int | None = None,
    opset: int = OPSET,
) -> Graphs:
    """Export the hard model (eval mode, CPU) with a dynamic batch, or for so many images at a time.

    Raises UserError when torch cannot turn the model into ONNX.
    """
    require("onnx", "onnxscript", "onnxruntime")
    import onnx_ir
    from onnxscript import optimizer

    names = {alias: layer.name for layer in layers for alias in (layer.name, *layer.aliases)}
    images = torch.zeros(batch or 2, *input_size)
    with _quiet():
        try:
            program = torch.onnx.export(
                _Logits(model),
                (images,),
                dynamo=True,
                optimize=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if batch is None else None,
                verbose=False,
            )
            assert program is not None
            graph = program.model.graph
            found: dict[str, Any] = {}
            for name, value in list(graph.initializers.items()):
                canonical = names.get(name.removeprefix(_PREFIX))
                if canonical is None:
                    continue
                graph.initializers.pop(name)
                if canonical in found:  # a tied weight under its second name
                    onnx_ir.convenience.replace_all_uses_with(value, found[canonical])
                    continue
                value.const_value, value.name = None, canonical
                graph.inputs.append(value)
                found[canonical] = value
            optimizer.optimize(program.model)
        except Exception as error:  # the exporter raises dozens of kinds; all mean the same to the user
            if machine_fault(error) is not None:
                raise
            reason = _reason(error)
            hint = "export --int8-packed or --state-dict and load the model in torch"
            raise UserError(f"torch cannot export this model to ONNX ({reason})", hint=hint) from None
    used = [layer for layer in layers if layer.name in found and found[layer.name].uses()]
    absent = [layer.name for layer in layers if layer not in used]
    return Graphs(_stripped(onnx_ir.to_proto(program.model)), used, absent)


def weights_in(proto: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(integers, float weight) of one layer as the written graph's own nodes compute them, run by ONNX Runtime.

    Integers that stand in the graph as they are come from there. Raises ParityError when the graph does not compute the
    weight exactly once or never uses it.
    """
    import onnx
    import onnxruntime

    graph = proto.graph
    producers: dict[str, list[Any]] = {}
    for node in graph.node:
        for output in node.output:
            producers.setdefault(output, []).append(node)
    stored = {value.name: value for value in graph.initializer}
    given = stored.get(f"{name}_integers")
    outputs = [name] if given is not None else [f"{name}_integers", name]
    if any(len(producers.get(output, [])) != 1 for output in outputs):
        raise ParityError("is not computed exactly once", where=name)
    if not any(name in node.input for node in graph.node):
        raise ParityError("is computed but never used", where=name)
    needed, stack = set(outputs), list(outputs)
    nodes: list[Any] = []
    while stack:
        for node in producers.get(stack.pop(), []):
            if not any(node is kept for kept in nodes):
                nodes.append(node)
                needed |= set(node.input)
                stack += node.input
    constants = [value for value in graph.initializer if value.name in needed]
    infos = [onnx.helper.make_empty_tensor_value_info(output) for output in outputs]
    body = onnx.helper.make_graph(nodes[::-1], "unpack", [], infos, constants)
    model = onnx.helper.make_model(body, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(outputs, {})
    integers = found[0] if given is None else onnx.numpy_helper.to_array(given).astype(np.int8)
    return integers, found[-1]


def measure_ranges(proto: Any, values: Sequence[str], images: Tensor) -> dict[str, tuple[float, float]]:
    """Smallest and largest of each value over ``images`` ([N, C, H, W]), run without optimizations.

    A graph that was traced for so many images gets so many at a time.
    """
    import onnx
    import onnxruntime

    if not values:  # an engine asked for nothing gives everything
        return {}
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(value) for value in values)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    at_once = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or len(images)
    ranges = dict.fromkeys(values, (float("inf"), float("-inf")))
    for first in range(0, len(images) - at_once + 1, at_once):
        results = session.run(list(values), {INPUT: images[first : first + at_once].contiguous().numpy()})
        for value, r in zip(values, results, strict=True):
            low, high = ranges[value]
            ranges[value] = min(low, float(r.min())), max(high, float(r.max()))
    return ranges


def shapes_of(proto: Any, weights: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The shape of every value of a graph that was traced for so many images, found by running it on zeros.

    ``weights`` are the shapes that its inputs have by now: `int8_graph` turns some. ONNX's own inference does not know all.
    """
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(proto)
    sides = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        sides[value.name] = list(weights.get(value.name, [dim.dim_value for dim in dims]))
        for dim, side in zip(dims, sides[value.name], strict=True):
            dim.dim_value = side
    given = {value.name for value in proto.graph.output}
    values = [name for node in proto.graph.node for name in node.output if name]
    empty = onnx.helper.make_empty_tensor_value_info
    model.graph.output.extend(empty(name) for name in values if name not in given)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    zeros = {name: np.zeros(shape, dtype=np.float32) for name, shape in sides.items()}
    found = {name: tuple(array.shape) for name, array in zeros.items()}
    return found | {n: tuple(r.shape) for n, r in zip(values, session.run(values, zeros), strict=True)}


def _stripped(proto: Any) -> Any:
    """Without doc strings, metadata and intermediate shapes: they hold stack traces with paths of this machine."""
    pending = [proto.graph, *proto.functions]
    proto.ClearField("doc_string")
    del proto.metadata_props[:]
    proto.producer_name, proto.producer_version = "csq", ""
    while pending:
        item = pending.pop()
        item.ClearField("doc_string")
        del item.metadata_props[:]
        del item.value_info[:]
        for node in item.node:
            node.ClearField("doc_string")
            del node.metadata_props[:]
            pending += [a.g for a in node.attribute if a.HasField("g")]
            pending += [graph for a in node.attribute for graph in a.graphs]
        if hasattr(item, "initializer"):
            for value in (*item.initializer, *item.input, *item.output):
                value.ClearField("doc_string")
                del value.metadata_props[:]
    return proto


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter warns and prints about its own inner workings."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        noise = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
