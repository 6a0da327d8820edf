"""The LiteRT form: a flatbuffer for phones, boards and everything else that runs .tflite files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import nn

from csqcli.errors import UserError
from csqcli.exporting import int8_graph, int8_plan, litert_graph, onnx_graph, runtime, tflite, verify
from csqcli.exporting.form import Form, Options, Subject
from csqcli.exporting.int8_graph import Int8Graph
from csqcli.exporting.int8_plan import Int8Plan, check_scales, plan_int8
from csqcli.exporting.verify import ParityError
from csqcli.file import header
from csqcli.file.deflate import deflate_mixed
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import METADATA_KEY, Manifest, ParityRecord
from csqcli.system import files

BASELINE_LIMIT = 1.9e9  # bytes; a flatbuffer's offsets end at 2 GiB
_NO_SHA256 = "0" * 64


class Litert(Form):
    """int8, int4 and int2 weights in LiteRT's own types; int8 activations at the trained scales with ``--activations int8``."""

    name, suffix = "litert", ".tflite"
    takes = frozenset({"activations", "calib", "prefer"})

    @classmethod
    def require(cls, options: Options) -> None:
        runtime.require("onnx", "onnxscript", "onnxruntime")
        runtime.require("ai_edge_litert.interpreter", "flatbuffers", extra="litert")

    @classmethod
    def accept(cls, file: QuantizedFile, options: Options, *, where: str) -> None:
        check_scales(file, options, where=where)

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.probe = subject.probe
        size = tuple(self.probe.images.shape[1:])
        self.graphs = onnx_graph.trace(subject.model, self.file.layers, size, batch=1)
        self.absent = self.graphs.absent
        plan = Int8Plan(Int8Graph(int8_graph.copied(self.graphs.proto)))
        if self.options.activations == "int8":
            plan = plan_int8(self.file, self.graphs, self.options.calib, every_layer=True)
        folded = int8_graph.fold_others(plan.graph, self.graphs.used)
        self.litert = litert_graph.convert(
            plan.graph, folded, prefer=self.options.prefer, shares_rounding=self.options.calib is not None
        )
        for name, scale in self.litert.shared.items():
            plan.rounds_output(name, scale, self.file)
        placed = self.litert.placed
        self.int8 = [layer.name for layer in self.graphs.used if layer.name in placed and placed[layer.name].int8]
        self.calibrated, self.raised = plan.calibrated, plan.graph.raised
        if self.options.activations == "int8":
            self._note_floats()
        if self.file.manifest.activations:  # twice what rounding alone moves the hard model's logits
            floor = verify.rounding_floor(subject.model, self.probe, plan.bias_units, plan.output_units)
            self.tolerance = max(self.tolerance, 2 * floor)
        self.manifest = self.file.manifest.model_copy(update={"form": self.name}, deep=True)
        for record in self.manifest.layers:
            record.encoding, record.packed_bytes = "absent", 0
            if isinstance(record.scale, list):
                record.scale = []  # stands beside the tensor, BatchNorm folded into it
            if record.name in placed:
                bits = placed[record.name].bits
                record.encoding = f"int{bits}" if bits < 32 else "float32"
                record.packed_bytes = -(-placed[record.name].integers.size * bits // 8)
        self.manifest.parity = None
        text = self.manifest.model_dump_json(exclude={"parity"}, exclude_defaults=True)
        self._deflated = deflate_mixed(text.encode())

    def _note_floats(self) -> None:
        rest = [layer.name for layer in self.graphs.used if layer.name not in self.int8]
        if rest and self.options.calib is None:
            self.notes.append(
                f"{len(rest)} layers run in float because nothing rounds what they give; --calib measures scales for them"
            )
        self.notes += int8_plan.notes_of_raised(self.raised, self.int8)
        if rest and self.options.calib is not None:
            self.notes.append(f"in float: {', '.join(rest)}")

    def write(self, path: Path, parity: ParityRecord | None) -> None:
        self.manifest.parity = parity
        if parity is None:
            content = self._content()
        else:
            parity.graph_sha256 = _NO_SHA256
            for _ in range(4):  # the certificate states the size of the file that it is part of
                content = self._content()
                if parity.file_bytes == len(content):
                    break
                parity.file_bytes = len(content)
            parity.graph_sha256 = runtime.flatbuffer_sha256(content, where=str(path))
            content = self._content()  # as long as before
        with files.replacing(path) as temporary:
            temporary.write_bytes(content)

    def _content(self) -> bytes:
        """Its manifest deflated, all but the certificate, whose length does not depend on what it says."""
        parity = self.manifest.parity.model_dump(mode="json") if self.manifest.parity else None
        head = {"schema_version": self.manifest.schema_version, "form": self.name, "parity": parity}
        metadata = {METADATA_KEY: json.dumps(head).encode(), header.MANIFEST_TENSOR: self._deflated}
        return self.litert.content(metadata)

    def check(self, path: Path) -> None:
        """Every layer's tensor, unpacked from the file's own bytes and read by an operator, against the searched integers."""
        constants = tflite.weights_in(tflite.read(path.read_bytes()))
        hard = {layer.name: layer for layer in self.graphs.used}
        for name, placed in self.litert.placed.items():
            if name not in hard or placed.bits == 32:
                continue
            if name not in constants:
                raise ParityError("is not in the file", where=name)
            found = constants[name]
            if found.readers == 0:
                raise ParityError("is in the file but never used", where=name)
            if not np.array_equal(found.integers, placed.integers):
                raise ParityError("integers differ from the source file's", where=name)
            wanted = hard[name].integers.abs().flatten().sort().values.numpy()
            if not np.array_equal(np.sort(np.abs(found.integers), axis=None), wanted):
                raise ParityError("integers differ from the source file's", where=name)
            scale = np.broadcast_to(placed.scale, found.scale.shape)
            if found.axis != placed.axis and found.scale.size > 1:
                raise ParityError("has its scales along another dimension", where=name)
            if not np.array_equal(found.scale.view(np.uint32), np.ascontiguousarray(scale).view(np.uint32)):
                raise ParityError("integers × scale is not the hard weight", where=name)
        missing = hard.keys() - self.litert.placed.keys()
        if missing:
            raise ParityError("is not in the file", where=min(missing))

    def open(self, path: Path) -> nn.Module:
        return self._engine(path.read_bytes())

    def twins(self, path: Path, *, threads: int) -> tuple[nn.Module, nn.Module] | None:
        if 4 * sum(layer.integers.numel() for layer in self.graphs.used) > BASELINE_LIMIT:
            return None
        plain = self._engine(self._float_network(), threads=threads)
        return self._engine(path.read_bytes(), threads=threads), plain

    def _float_network(self) -> bytes:
        """The same network in float32, BatchNorm folded and nothing rounded: what a float converter would write."""
        graph = Int8Graph(int8_graph.without_rounding(self.graphs.proto))
        folded = int8_graph.fold_others(graph, self.graphs.used)
        return litert_graph.convert(graph, folded, prefer="float32").content({})

    def describe(self, path: Path, parity: ParityRecord) -> Manifest:
        return header.read_manifest(path)

    def _engine(self, content: bytes, *, threads: int = 0) -> runtime.LiteRtModel:
        try:
            engine = runtime.LiteRtModel(content, threads=threads)
        except UserError as error:
            raise ParityError(error.what, where=error.where, hint="please report the model") from None
        self.engine = engine.engine
        return engine
