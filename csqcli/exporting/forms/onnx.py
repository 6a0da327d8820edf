"""The ONNX form: a graph that unpacks its own weights, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from csqcli.exporting import runtime, verify
from csqcli.exporting.form import Form, Options, Subject
from csqcli.exporting.int8_plan import check_scales, plan_int8
from csqcli.exporting.verify import ParityError
from csqcli.file import header
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import METADATA_KEY, Manifest, ParityRecord
from csqcli.system import files

BASELINE_LIMIT = 1.9e9  # bytes: protobuf refuses a float baseline of 2 GiB


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
        check_scales(file, options, where=where)

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        from csqcli.exporting import onnx_graph

        self.probe = subject.probe
        self.graphs = onnx_graph.trace(subject.model, self.file.layers, tuple(self.probe.images.shape[1:]))
        self.packed = self.graphs.packed()
        self.absent = self.graphs.absent
        plan = None
        if self.options.activations == "int8":
            plan = plan_int8(self.file, self.graphs, self.options.calib)
            self.packed, self.calibrated = self.graphs.packed(plan.graph), plan.calibrated
        self.int8 = self.packed.int8
        if self.file.manifest.activations:  # twice what rounding alone moves the hard model's logits
            units = (plan.bias_units, plan.output_units) if plan is not None else ({}, {})
            floor = verify.rounding_floor(subject.model, self.probe, *units)
            self.tolerance = max(self.tolerance, 2 * floor)
        self.manifest = self.file.manifest.model_copy(update={"form": self.name}, deep=True)
        for record in self.manifest.layers:
            record.encoding, record.packed_bytes = self.packed.encodings.get(record.name, ("absent", 0))

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

    def twins(self, path: Path, *, threads: int) -> tuple[nn.Module, nn.Module] | None:
        if 4 * sum(layer.integers.numel() for layer in self.graphs.used) > BASELINE_LIMIT:
            return None
        plain = self._engine(self.graphs.plain().SerializeToString(), threads=threads)
        return self._engine(path, threads=threads), plain

    def describe(self, path: Path, parity: ParityRecord) -> Manifest:
        return header.read_manifest(path)

    def _engine(self, model: Path | bytes, *, threads: int = 0) -> nn.Module:
        engine = (runtime.OnnxModel if self.options.target == "ort" else runtime.OpenVinoModel)(model, threads=threads)
        self.engine = engine.engine
        return engine
