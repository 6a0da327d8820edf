"""What the layers inside an exported ONNX file give in its engine, not its logits alone; of a LiteRT file the logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from csqcli.errors import UserError
from csqcli.exporting.runtime import INPUT, OUTPUT, OnnxModel, checked_graph, for_its_engine, open_litert
from csqcli.file.manifest import Manifest

_PASSES = ("Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity")  # a weight on its way to its operation
_OPERATIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class TappedModel:
    """An exported file in ONNX Runtime whose layers' outputs can be read."""

    def __init__(self, path: Path) -> None:
        """UserError for files that csq did not export, or that the engine refuses."""
        self._tap(*checked_graph(path), where=str(path))

    @classmethod
    def of(cls, proto: Any, manifest: Manifest, *, where: str) -> Self:
        """As of a file, for a ModelProto of which there is no certificate yet; its graph gets the layers as outputs."""
        tapped = cls.__new__(cls)
        tapped._tap(proto, manifest, where=where)
        return tapped

    def _tap(self, proto: Any, manifest: Manifest, *, where: str) -> None:
        self.manifest = manifest
        self.taps = layer_outputs(proto.graph, [layer.name for layer in self.manifest.layers])
        self.folded = folded_layers(proto.graph, self.manifest)
        known = {value.name for value in proto.graph.output}
        for names in self.taps.values():
            for name in names:
                if name not in known:
                    proto.graph.output.append(_value(proto, name))
                    known.add(name)
        self.model = OnnxModel(proto.SerializeToString(), where=where, fuses=for_its_engine(self.manifest))
        self.engine = self.model.engine

    def run(self, images: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Class scores, and the outputs of each layer that the graph has, operation by operation; on the CPU."""
        names = [name for outputs in self.taps.values() for name in outputs]
        try:
            found = self.model.session.run([OUTPUT, *names], {INPUT: images.contiguous().cpu().numpy()})
        except Exception as error:  # the engine's own exception classes are no public API
            raise UserError(f"onnxruntime cannot run it ({error})", where=self.model.where) from None
        by_name = dict(zip([OUTPUT, *names], map(torch.from_numpy, found), strict=True))
        return by_name[OUTPUT], {layer: [by_name[name] for name in outputs] for layer, outputs in self.taps.items()}


def folded_layers(graph: Any, manifest: Manifest) -> set[str]:
    """Layers whose BatchNorm is in the graph's weights and bias: their output is the BatchNorm's, not the layer's own.

    Where it is folded, the scales in the graph are no longer the layer's (`int8_graph`, `explicit_graph`).
    """
    from onnx import numpy_helper

    constants = {value.name: value for value in graph.initializer}
    found = set()
    for layer in manifest.layers:
        stored = constants.get(f"{layer.name}_scale")
        if stored is None:
            continue
        scale = np.unique(numpy_helper.to_array(stored))
        wanted = np.unique(np.asarray(layer.scale, dtype=np.float32))
        if not np.array_equal(scale, wanted):
            found.add(layer.name)
    return found


class LogitsOfLiteRt:
    """An exported .tflite, as a `TappedModel` of no layer: its layers give what stands after BatchNorm and activation."""

    def __init__(self, path: Path) -> None:
        """UserError for files that csq did not export, or that the engine refuses."""
        self.model, self.manifest = open_litert(path)
        self.folded: set[str] = set()
        self.engine = self.model.engine

    def run(self, images: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Class scores, and nothing of the layers; on the CPU."""
        return self.model(images.cpu()), {}


def layer_outputs(graph: Any, layers: Sequence[str]) -> dict[str, list[str]]:
    """The values that hold each layer's output: of the operations that read its weight, their bias added.

    ``graph`` is a GraphProto in which a layer's weight is a value of its name. Layers without such an operation are left out.
    """
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    constants = {tensor.name for tensor in graph.initializer}
    found: dict[str, list[str]] = {}
    for layer in layers:
        pending, outputs = [layer], []
        while pending:
            for node in readers.get(pending.pop(0), ()):
                if node.op_type in _PASSES:
                    pending.append(node.output[0])
                elif node.op_type in _OPERATIONS:
                    outputs.append(_with_bias(node, readers, constants))
        if outputs:
            found[layer] = outputs
    return found


def _with_bias(node: Any, readers: dict[str, list[Any]], constants: set[str]) -> str:
    """The output of an operation, after the bias where that is added by a node of its own."""
    output: str = node.output[0]
    after = readers.get(output, [])
    if node.op_type == "MatMul" and len(after) == 1 and after[0].op_type == "Add":
        other = [value for value in after[0].input if value != output]
        if len(other) == 1 and other[0] in constants:
            bias: str = after[0].output[0]
            return bias
    return output


def _value(proto: Any, name: str) -> Any:
    """A graph output of this name, whose type and shape the engine infers."""
    value = type(proto.graph.output[0])()
    value.name = name
    return value
