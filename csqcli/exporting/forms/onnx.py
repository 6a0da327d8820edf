"""The ONNX form: a graph that unpacks its own weights, for ONNX Runtime and OpenVINO; or explicit Q/DQ pairs, for TensorRT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from csqcli.exporting import int8_graph, runtime, verify
from csqcli.exporting.form import Form, Options, Subject
from csqcli.exporting.int8_graph import Int8Graph
from csqcli.exporting.int8_plan import Int8Plan, check_scales, halved, module_of, notes_of_raised, plan_int8
from csqcli.exporting.verify import ParityError
from csqcli.file import header
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import METADATA_KEY, Manifest, ParityRecord
from csqcli.quant.measuring import calls_of, logits_of
from csqcli.quant.names import owner_of
from csqcli.system import files
from csqcli.system.progress import counted

if TYPE_CHECKING:
    from csqcli.exporting.onnx_graph import PackedGraph

BASELINE_LIMIT = 1.9e9  # bytes: protobuf refuses a float baseline of 2 GiB


class Onnx(Form):
    """One graph whose quantized weights stand in it packed; the engine unpacks them once, when it loads the file.

    For TensorRT they stand in it as int8 (int4) behind DequantizeLinear; ONNX Runtime verifies the file.
    """

    name, suffix = "onnx", ".onnx"
    takes = frozenset({"activations", "target", "weights", "calib"})

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
        explicit = self.options.target == "tensorrt"
        self.made_for = "tensorrt" if explicit else None
        size = tuple(self.probe.images.shape[1:])
        opset = onnx_graph.INT4_OPSET if self.options.weights == "int4" else onnx_graph.OPSET
        self.graphs = onnx_graph.trace(subject.model, self.file.layers, size, opset=opset)
        self.absent = self.graphs.absent
        plan = Int8Plan(Int8Graph(int8_graph.copied(self.graphs.proto)))
        if self.options.activations == "int8":
            plan = plan_int8(self.file, self.graphs, self.options.calib, signed_only=explicit)
            self.calibrated = plan.calibrated
        self.packed = self._explicit(plan) if explicit else self.graphs.packed(plan.graph)
        self.int8 = self.packed.int8
        self.notes += notes_of_raised(plan.graph.raised, self.int8)
        if self.file.manifest.activations:  # twice what rounding alone moves the hard model's logits
            with halved(subject.model, [module_of(name) for name in plan.graph.halved]):
                if plan.graph.halved:
                    self._round_coarser(plan.graph.halved)
                floor = verify.rounding_floor(
                    subject.model, self.reference or self.probe, plan.bias_units, plan.output_units
                )
            self.tolerance = max(self.tolerance, 2 * floor)
        self.manifest = self.file.manifest.model_copy(update={"form": self.name}, deep=True)
        for record in self.manifest.layers:
            record.encoding, record.packed_bytes = self.packed.encodings.get(record.name, ("absent", 0))

    def _explicit(self, plan: Int8Plan) -> PackedGraph:
        """The graph for TensorRT, and what its reader should know."""
        from csqcli.exporting import explicit_graph

        folded = int8_graph.fold_others(plan.graph, self.graphs.used, positive_scales=True)
        packed = explicit_graph.with_integers(plan.graph, folded, int4=self.options.weights == "int4")
        explicit_graph.check(packed.proto)
        self.notes.append("for TensorRT, which did not run it; ONNX Runtime did")
        wide = [name for name, (encoding, _) in packed.encodings.items() if encoding == "float32"]
        if wide:
            self.notes.append(f"weights in float32, beyond int8: {', '.join(wide)}")
        if self.options.weights == "int4":
            count = sum(encoding == "int4" for encoding, _ in packed.encodings.values())
            self.notes.append(f"{count} of {len(packed.encodings)} layers have int4 weights, the others int8")
        return packed

    def _round_coarser(self, layers: list[str]) -> None:
        """The logits that are meant where inputs of 8 unsigned bits have 7; the model rounds them so by now."""
        with torch.no_grad():
            logits = logits_of(self.subject.model(self.probe.images))
        self.reference = replace(self.probe, logits=logits)
        moved = float((logits - self.probe.logits).abs().max()) / max(self.probe.spread, 1e-6)
        self.notes.append(
            f"TensorRT has no unsigned 8 bits: the inputs of {counted(len(layers), 'layer')} have 7, at twice the trained step, "
            f"which moves the hard model's logits by {moved:.2g} of their standard deviation; errors are measured from there"
        )

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
        constants = {value.name: value for value in proto.graph.initializer}
        for name, (wanted_integers, wanted_weight) in self.packed.weights.items():
            if self.packed.encodings[name][0] == "float32":
                self._check_float(proto, constants.get(name), wanted_weight, where=name)
                continue
            integers, weight = onnx_graph.weights_in(proto, name)
            if not np.array_equal(integers, wanted_integers):
                raise ParityError("integers differ from the source file's", where=name)
            if not np.array_equal(weight.view(np.uint32), wanted_weight.view(np.uint32)):
                raise ParityError("integers × scale is not the hard weight", where=name)

    def _check_float(self, proto: Any, stored: Any, wanted: np.ndarray, *, where: str) -> None:
        from onnx import numpy_helper

        if stored is None or not any(where in node.input for node in proto.graph.node):
            raise ParityError("is not in the graph, or never used", where=where)
        if not np.array_equal(numpy_helper.to_array(stored).view(np.uint32), wanted.view(np.uint32)):
            raise ParityError("integers × scale is not the hard weight", where=where)

    def open(self, path: Path) -> nn.Module:
        return self._engine(path)

    def begins_at(self, path: Path) -> str | None:
        """By the layers' outputs in ONNX Runtime, in the graph's order; those with a folded BatchNorm are passed over."""
        import onnx

        from csqcli.exporting.tapping import TappedModel

        tapped = TappedModel.of(onnx.load(path), self.manifest, where=str(path))
        owners = {name: owner_of(name) for name in tapped.taps if name not in tapped.folded}
        found = tapped.run(self.probe.images)[1]
        with torch.no_grad():
            calls = calls_of(self.subject.model, self.probe.images, owners.values())[1]
        order = {name: n for n, node in enumerate(self.packed.proto.graph.node) for name in node.output}
        for name in sorted(owners, key=lambda name: order[tapped.taps[name][0]]):
            wanted = [call.output for call in calls.get(owners[name], ())]
            if [one.shape for one in wanted] != [one.shape for one in found[name]]:
                continue
            for a, b in zip(wanted, found[name], strict=True):
                if not float((a - b).abs().max()) <= self.tolerance * float(a.std()) + 1e-6:
                    return name
        return None

    def twins(self, path: Path, *, threads: int) -> tuple[nn.Module, nn.Module] | None:
        if self.options.target == "tensorrt":  # ONNX Runtime's time on a processor says nothing of it
            return None
        if 4 * sum(layer.integers.numel() for layer in self.graphs.used) > BASELINE_LIMIT:
            return None
        plain = self._engine(self.graphs.plain().SerializeToString(), threads=threads)
        return self._engine(path, threads=threads), plain

    def describe(self, path: Path, parity: ParityRecord) -> Manifest:
        return header.read_manifest(path)

    def _engine(self, model: Path | bytes, *, threads: int = 0) -> nn.Module:
        engine: runtime.OnnxModel | runtime.OpenVinoModel
        if self.options.target == "openvino":
            engine = runtime.OpenVinoModel(model, threads=threads)
        else:
            engine = runtime.OnnxModel(model, threads=threads, fuses=self.made_for is None)
        self.engine = engine.engine
        return engine
