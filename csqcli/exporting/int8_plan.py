"""Which layers of a file run in int8 in an exported graph, and by how much the rounding of engines may move its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.exporting import images, int8_graph, onnx_graph
from csqcli.exporting.form import Options
from csqcli.exporting.int8_graph import Int8Graph
from csqcli.exporting.onnx_graph import Graphs
from csqcli.file.io import QuantizedFile
from csqcli.quant import activations

_CALIB_IMAGES = 32  # one batch


@dataclass
class Int8Plan:
    """An edited graph, and what `verify.rounding_floor` takes: units of biases and outputs, by module."""

    graph: Int8Graph
    bias_units: dict[str, Tensor] = field(default_factory=dict)
    output_units: dict[str, Tensor] = field(default_factory=dict)
    calibrated: list[str] = field(
        default_factory=list
    )  # layers whose outputs are rounded at a scale that was not trained

    def rounds_output(self, name: str, output_scale: float, file: QuantizedFile) -> None:
        """Note that the output of a layer in int8, BatchNorm included, is rounded to multiples of ``output_scale``."""
        scale = next(layer.scale for layer in file.layers if layer.name == name)
        folded = torch.from_numpy(self.graph.weights[name].scale)  # BatchNorm multiplies what the module gives
        self.output_units[module_of(name)] = output_scale * scale / folded
        if name not in self.calibrated:  # a layer that is used twice has two outputs
            self.calibrated.append(name)


def check_scales(file: QuantizedFile, options: Options, *, where: str) -> None:
    """UserError where int8 activations are asked for and the file has no scales for them."""
    if options.activations == "int8" and not file.manifest.activations:
        hint = "use --activations float, or train with quantized activations (--act-bits)"
        raise UserError("has no activation scales, which --activations int8 needs", where=where, hint=hint)


def plan_int8(
    file: QuantizedFile,
    graphs: Graphs,
    calib: str | Tensor | None,
    *,
    every_layer: bool = False,
    signed_only: bool = False,
) -> Int8Plan:
    """Layers with trained input scales become int8; images of ``calib`` give their outputs a scale where none is.

    ``every_layer`` is `int8_graph.open_outputs`' own, for LiteRT, which has no use for a layer that gives floats and takes a
    tensor for each operation;
    ``signed_only`` `int8_graph.quantize`'s, for TensorRT, which has no uint8.
    """
    plan = Int8Plan(int8_graph.quantize(graphs.proto, graphs.used, one_reader=every_layer, signed_only=signed_only))
    scales = {layer.name: layer.scale for layer in file.layers}
    input_scales = {f"{entry.module}.weight": entry.scale for entry in file.manifest.activations}
    input_scales |= {name: 2 * input_scales[name] for name in plan.graph.halved if name in input_scales}
    plan.bias_units = {
        module_of(name): input_scales[name] * scales[name] for name in plan.graph.weights if name in input_scales
    }
    if calib is not None:
        batch = calib if isinstance(calib, Tensor) else _read(file, calib)
        layer_of = int8_graph.open_outputs(plan.graph, every_layer=every_layer)
        ranges = onnx_graph.measure_ranges(graphs.packed(plan.graph).proto, list(layer_of), batch)
        for value, output_scale in int8_graph.round_outputs(plan.graph, ranges).items():
            plan.rounds_output(layer_of[value], output_scale, file)
    return plan


def notes_of_raised(raised: Mapping[str, int], int8: Collection[str]) -> list[str]:
    """What a certificate says of channels whose scale was raised, in layers that run in int8: a line, or none."""
    counts = [count for name, count in raised.items() if name in int8]
    if not counts:
        return []
    return [
        f"{sum(counts)} channels of {len(counts)} layers have weights too small beside their bias for an int32 bias: their scale "
        "is raised, integers kept, which moves their outputs by less than a step"
    ]


@contextlib.contextmanager
def halved(model: nn.Module, modules: Sequence[str]) -> Iterator[None]:
    """The hard model with the inputs of ``modules``, of 8 unsigned bits, rounded to 7 at twice their step."""
    quantizers = [quantizer for name, quantizer in activations.attached(model).items() if name in modules]
    for quantizer in quantizers:
        quantizer.bits, quantizer.scale.data = quantizer.bits - 1, quantizer.scale.data * 2
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.bits, quantizer.scale.data = quantizer.bits + 1, quantizer.scale.data / 2


def _read(file: QuantizedFile, source: str) -> Tensor:
    scenes = images.loader(file, source, _CALIB_IMAGES, workers=0, labelled=False)
    batch: Tensor = next(iter(scenes.epoch(0)))[0]
    return batch


def module_of(weight: str) -> str:
    return weight.rpartition(".")[0]
