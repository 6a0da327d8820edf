"""The ONNX form: a graph that unpacks its own weights, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from csqcli.errors import UserError
from csqcli.exporting import images, runtime, verify
from csqcli.exporting.form import Form, Options, Subject
from csqcli.exporting.verify import ParityError
from csqcli.file import header
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import METADATA_KEY, Manifest, ParityRecord
from csqcli.system import files

LATENCY_REPEATS = 9
BASELINE_LIMIT = 1.9e9  # bytes: protobuf refuses a float baseline of 2 GiB
_CALIB_IMAGES = 32  # one batch


class Onnx(Form):
    """One graph whose quantized weights stand in it packed; the engine unpacks them once, when it loads the file."""

    name, suffix = "onnx", ".onnx"
    takes = frozenset({"activations", "target", "calib"})

    @classmethod
    def require(cls, options: Options) -> None:
        runtime.require("onnx", "onnxscript", "onnxruntime")
        if options.target == "openvino":
            runtime.require("openvino", extra="openvino")

    @classmethod
    def accept(cls, file: QuantizedFile, options: Options, *, where: str) -> None:
        if options.activations == "int8" and not file.manifest.activations:
            hint = "use --activations float, or train with quantized activations (--act-bits)"
            raise UserError("has no activation scales, which --activations int8 needs", where=where, hint=hint)

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        from csqcli.exporting import onnx_graph

        self.probe = subject.probe
        self.graphs = onnx_graph.trace(subject.model, self.file.layers, tuple(self.probe.images.shape[1:]))
        self.packed = self.graphs.packed()
        self.absent = self.graphs.absent
        self.bias_units: dict[str, torch.Tensor] = {}  # see verify.rounding_floor
        self.output_units: dict[str, torch.Tensor] = {}
        if self.options.activations == "int8":
            self._use_int8()
        self.int8 = self.packed.int8
        if self.file.manifest.activations:  # twice what rounding alone moves the hard model's logits
            floor = verify.rounding_floor(subject.model, self.probe, self.bias_units, self.output_units)
            self.tolerance = max(self.tolerance, 2 * floor)
        self.manifest = self.file.manifest.model_copy(update={"form": self.name}, deep=True)
        for record in self.manifest.layers:
            record.encoding, record.packed_bytes = self.packed.encodings.get(record.name, ("absent", 0))

    def _use_int8(self) -> None:
        """Layers with trained input scales become int8; images of ``calib`` give their outputs a scale where none is."""
        from csqcli.exporting import int8_graph, onnx_graph

        plan = int8_graph.quantize(self.graphs.proto, self.graphs.used)
        scales = {layer.name: layer.scale for layer in self.file.layers}
        input_scales = {f"{entry.module}.weight": entry.scale for entry in self.file.manifest.activations}
        self.bias_units = {
            _module(name): input_scales[name] * scales[name] for name in plan.weights if name in input_scales
        }
        if self.options.calib is not None:
            scenes = images.loader(self.file, self.options.calib, _CALIB_IMAGES, workers=0, labelled=False)
            batch = next(iter(scenes.epoch(0)))[0]
            layer_of = int8_graph.open_outputs(plan)
            ranges = onnx_graph.measure_ranges(self.graphs.packed(plan).proto, list(layer_of), batch)
            for value, output_scale in int8_graph.round_outputs(plan, ranges).items():
                name = layer_of[value]
                folded = torch.from_numpy(plan.weights[name].scale)  # BatchNorm multiplies what the module gives
                self.output_units[_module(name)] = output_scale * scales[name] / folded
                self.calibrated.append(name)
        self.packed = self.graphs.packed(plan)

    def write(self, path: Path, parity: ParityRecord | None) -> None:
        proto = self.packed.proto
        self.manifest.parity = parity
        del proto.metadata_props[:]
        entry = proto.metadata_props.add(key=METADATA_KEY)
        if parity is not None:
            parity.graph_sha256 = runtime.graph_sha256(proto)
        for _ in range(4):  # the certificate states the size of the file that it is part of
            entry.value = self.manifest.model_dump_json()
            content = proto.SerializeToString()
            if parity is None or parity.file_bytes == len(content):
                break
            parity.file_bytes = len(content)
        with files.replacing(path) as temporary:
            temporary.write_bytes(content)

    def check(self, path: Path) -> None:
        import onnx

        from csqcli.exporting import onnx_graph

        proto = onnx.load(path)
        for name, (wanted_integers, wanted_weight) in self.packed.weights.items():
            integers, weight = onnx_graph.weights_in(proto, name)
            if not np.array_equal(integers, wanted_integers):
                raise ParityError("integers differ from the source file's", where=name)
            if not np.array_equal(weight.view(np.uint32), wanted_weight.view(np.uint32)):
                raise ParityError("integers × scale is not the hard weight", where=name)

    def open(self, path: Path) -> nn.Module:
        return self._engine(path)

    def latency(self, path: Path) -> tuple[float | None, float | None]:
        """Milliseconds at batch 1 on one thread, and how many times faster that is than the same graph in fp32."""
        if 4 * sum(layer.integers.numel() for layer in self.graphs.used) > BASELINE_LIMIT:
            return None, None
        plain = self._engine(self.graphs.plain().SerializeToString(), threads=1)
        packed = self._engine(path, threads=1)
        image = self.probe.images[:1]
        seconds = verify.interleaved_medians([lambda: packed(image), lambda: plain(image)], repeats=LATENCY_REPEATS)
        return 1000 * seconds[0], seconds[1] / seconds[0]

    def describe(self, path: Path, parity: ParityRecord) -> Manifest:
        return header.read_manifest(path)

    def _engine(self, model: Path | bytes, *, threads: int = 0) -> nn.Module:
        engine = (runtime.OnnxModel if self.options.target == "ort" else runtime.OpenVinoModel)(model, threads=threads)
        self.engine = engine.engine
        return engine


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]
