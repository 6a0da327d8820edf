"""Running an exported ONNX file as if it were a torch module, and reading what it says about itself."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.errors import UserError, install
from csqcli.file import header
from csqcli.file.header import parse_manifest
from csqcli.file.manifest import METADATA_KEY, Manifest

INPUT, OUTPUT = "images", "logits"


def require(*names: str, extra: str = "onnx") -> list[ModuleType]:
    """Import optional packages; UserError with the pip command where one is missing."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        missing = error.name or names[0]
        where = {"litert": "LiteRT", "torchao": "torchao"}.get(extra, "ONNX")
        raise UserError(f"needs the package {missing}", where=where, hint=install(extra)) from None


class OnnxModel(nn.Module):
    """An ONNX Runtime session (CPU) behind a module's face: images in, logits out."""

    def __init__(self, model: Path | bytes, *, threads: int = 0, where: str = "ONNX", fuses: bool = True) -> None:
        """``threads`` 0 takes all cores. Raises UserError when the engine refuses the file.

        Without ``fuses`` QuantizeLinear and DequantizeLinear are computed as they stand: the engine's kernels for pairs round
        float inputs to 8 bits beside integer weights, and saturate on processors without integer dot products.
        """
        super().__init__()
        (onnxruntime,) = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4  # an error is raised, not printed
        if not fuses:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.where = str(model) if isinstance(model, Path) else where
        try:
            source = str(model) if isinstance(model, Path) else model
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the engine's own exception classes are no public API
            raise UserError(f"onnxruntime cannot load it ({_first_line(error)})", where=self.where) from None
        self.engine = f"onnxruntime {onnxruntime.__version__}"

    def forward(self, images: Tensor) -> Tensor:
        try:
            (logits,) = self.session.run([OUTPUT], {INPUT: images.contiguous().numpy()})
        except Exception as error:  # as above
            raise UserError(f"onnxruntime cannot run it ({_first_line(error)})", where=self.where) from None
        return torch.from_numpy(logits)


class OpenVinoModel(nn.Module):
    """The same for OpenVINO, in float32 (it would pick bfloat16 where the processor has it)."""

    def __init__(self, model: Path | bytes, *, threads: int = 0) -> None:
        super().__init__()
        (openvino,) = require("openvino", extra="openvino")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} | (
            {"INFERENCE_NUM_THREADS": threads} if threads else {}
        )
        try:
            core = openvino.Core()
            read = core.read_model(str(model)) if isinstance(model, Path) else core.read_model(model=model)
            self.compiled = core.compile_model(read, "CPU", options)
        except Exception as error:
            where = str(model) if isinstance(model, Path) else "ONNX"
            raise UserError(f"OpenVINO cannot load it ({_first_line(error)})", where=where) from None
        self.engine = f"openvino {openvino.__version__.partition('-')[0]}"

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled({INPUT: images.contiguous().numpy()})[OUTPUT].copy())


class LiteRtModel(nn.Module):
    """A LiteRT interpreter (CPU, XNNPACK) behind a module's face, an image at a time as on a device."""

    def __init__(self, content: bytes, *, threads: int = 0, where: str = "LiteRT") -> None:
        """``threads`` 0 takes as many as torch. Raises UserError when the engine refuses the file."""
        super().__init__()
        (interpreter,) = require("ai_edge_litert.interpreter", extra="litert")
        self.where = where
        try:
            with _silent():
                self.interpreter = interpreter.Interpreter(
                    model_content=content, num_threads=threads or torch.get_num_threads()
                )
                self.interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"LiteRT cannot load it ({_first_line(error)})", where=where) from None
        self.source = self.interpreter.get_input_details()[0]["index"]
        self.results = [detail["index"] for detail in self.interpreter.get_output_details()]
        self.engine = f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.outputs(image[None])[0] for image in images])

    def outputs(self, image: Tensor) -> list[Tensor]:
        """Every output of the graph for one image, [1, C, H, W]."""
        try:
            self.interpreter.set_tensor(self.source, image.permute(0, 2, 3, 1).contiguous().numpy())
            self.interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"LiteRT cannot run it ({_first_line(error)})", where=self.where) from None
        return [torch.from_numpy(self.interpreter.get_tensor(number)) for number in self.results]


def open_litert(path: Path) -> tuple[LiteRtModel, Manifest]:
    """An exported .tflite ready to run, and its manifest. UserError for files that csq did not write, or that are damaged."""
    content, manifest = checked_flatbuffer(path)
    return LiteRtModel(content, where=str(path)), manifest


def checked_flatbuffer(path: Path) -> tuple[bytes, Manifest]:
    """The bytes of an exported .tflite that is as it was exported, and its manifest. UserError for any other."""
    manifest = header.read_manifest(path)
    content = path.read_bytes()
    if manifest.parity is None or manifest.parity.graph_sha256 != flatbuffer_sha256(content, where=str(path)):
        raise UserError("the graph does not match its sha-256", where=str(path), hint="the file is damaged")
    return content, manifest


def flatbuffer_sha256(content: bytes, *, where: str) -> str:
    """SHA-256 of a .tflite without the part of csq's manifest that holds its certificate."""
    begin, end = header.litert_span(io.BytesIO(content), len(content), METADATA_KEY, where=where)
    digest = hashlib.sha256(content[:begin])
    digest.update(content[end:])
    return digest.hexdigest()


def open_model(path: Path) -> tuple[OnnxModel, Manifest]:
    """An exported ONNX file ready to run, and its manifest. UserError for ONNX files that csq did not write.

    The engine is given nothing but a graph that is as it was exported, and never a path that it could follow to others.
    """
    proto, manifest = checked_graph(path)
    return OnnxModel(proto.SerializeToString(), where=str(path), fuses=for_its_engine(manifest)), manifest


def for_its_engine(manifest: Manifest) -> bool:
    """Whether ONNX Runtime is what an exported graph is made for, and not only what it is verified in."""
    return manifest.parity is None or manifest.parity.made_for is None


def checked_graph(path: Path) -> tuple[Any, Manifest]:
    """The ModelProto of an exported file that is as it was exported, and its manifest. UserError for any other."""
    proto, manifest = _read(path)
    if manifest.parity is None or manifest.parity.graph_sha256 != graph_sha256(proto):
        raise UserError("the graph does not match its sha-256", where=str(path), hint="the file is damaged")
    if any(tensor.data_location for tensor in itertools.chain(*map(_tensors, (proto.graph, *proto.functions)))):
        raise UserError("keeps tensors in other files, which csq never follows", where=str(path))
    return proto, manifest


def graph_sha256(proto: Any) -> str:
    """SHA-256 of a ModelProto without its metadata, where csq's manifest is."""
    bare = type(proto)()
    bare.CopyFrom(proto)
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def _tensors(graph: Any) -> Iterator[Any]:
    """Every TensorProto of a GraphProto or FunctionProto, those of nodes and subgraphs too."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _tensors(inner)


def _read(path: Path) -> tuple[Any, Manifest]:
    (onnx,) = require("onnx")
    if not path.is_file():
        raise UserError("no such file", where=str(path))
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's exception differs between its implementations
        raise UserError(f"not an ONNX file ({_first_line(error)})", where=str(path)) from None
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    manifest = parse_manifest(metadata.get(METADATA_KEY), where=str(path))
    manifest.sizes.file_bytes = path.stat().st_size
    return proto, manifest


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """LiteRT writes which delegates it makes to the process's stderr, past Python; what is wrong it raises."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
