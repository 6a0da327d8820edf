"""Running an exported ONNX file as if it were a torch module, and reading what it says about itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from csqcli import checkpoint_file
from csqcli.checkpoint_file import METADATA_KEY, Manifest
from csqcli.errors import UserError

INPUT, OUTPUT = "images", "logits"


def require(*names: str, extra: str = "onnx") -> list[ModuleType]:
    """Import optional packages; UserError with the pip command where one is missing."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        missing = error.name or names[0]
        raise UserError(f"needs the package {missing}", where="ONNX", hint=f"pip install 'csq[{extra}]'") from None


class OnnxModel(nn.Module):
    """An ONNX Runtime session (CPU) behind a module's face: images in, logits out."""

    def __init__(self, model: Path | bytes, *, threads: int = 0) -> None:
        """``threads`` 0 takes all cores. Raises UserError when the engine refuses the file."""
        super().__init__()
        (onnxruntime,) = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            source = str(model) if isinstance(model, Path) else model
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the engine's own exception classes are no public API
            where = str(model) if isinstance(model, Path) else "ONNX"
            raise UserError(f"onnxruntime cannot load it ({_first_line(error)})", where=where) from None
        self.engine = f"onnxruntime {onnxruntime.__version__}"

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run([OUTPUT], {INPUT: images.contiguous().numpy()})
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


def open_model(path: Path) -> tuple[OnnxModel, Manifest]:
    """An exported ONNX file ready to run, and its manifest. UserError for ONNX files that csq did not write."""
    if not path.is_file():
        raise UserError("no such file", where=str(path))
    model = OnnxModel(path)
    metadata = model.session.get_modelmeta().custom_metadata_map
    manifest = checkpoint_file.parse_manifest(metadata.get(METADATA_KEY), where=str(path))
    manifest.sizes.file_bytes = path.stat().st_size
    return model, manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest inside an exported ONNX file, without starting an engine."""
    (onnx,) = require("onnx")
    if not path.is_file():
        raise UserError("no such file", where=str(path))
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's exception differs between its implementations
        raise UserError(f"not an ONNX file ({_first_line(error)})", where=str(path)) from None
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    manifest = checkpoint_file.parse_manifest(metadata.get(METADATA_KEY), where=str(path))
    manifest.sizes.file_bytes = path.stat().st_size
    return manifest


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
