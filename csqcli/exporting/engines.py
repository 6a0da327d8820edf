"""The engines that run what csq exports: names, packages, extras. Known without importing any of them, or PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from csqcli.errors import UserError, install


@dataclass(frozen=True)
class Engine:
    """What it takes to measure in an engine."""

    title: str
    modules: tuple[str, ...]  # that must be there
    extra: str  # of csq, which brings them
    forms: tuple[str, ...]  # in which a layer may have a kernel there: fp32, and integer types of its weights


_ONNX = ("onnx", "onnxscript", "onnxruntime")
ENGINES = {  # the first that is installed is the default
    "ort": Engine("ONNX Runtime", _ONNX, "onnx", ("fp32", "int8")),
    "openvino": Engine("OpenVINO", (*_ONNX, "openvino"), "openvino", ("fp32", "int8")),
    "litert": Engine("LiteRT", (*_ONNX, "ai_edge_litert", "flatbuffers"), "litert", ("fp32", "int8", "int4", "int2")),
    "torch": Engine("PyTorch", (), "", ("fp32",)),
}
# By suffix: those that run an exported file.
ENGINES_OF = {".onnx": ("ort", "openvino"), ".tflite": ("litert",)}


def choose(engine: str | None, *, among: Iterable[str] = tuple(ENGINES), where: str = "--engine") -> str:
    """``engine``, or the first one of ``among`` that is installed. UserError for one that is not, with the extra that brings it."""
    names = list(among)
    if engine is None:
        engine = next((name for name in names if not _missing(name)), names[0])
    missing = _missing(engine)
    if missing:
        what = f"{ENGINES[engine].title} needs the package {missing[0]}"
        raise UserError(what, where=where, hint=install(ENGINES[engine].extra))
    return engine


def _missing(engine: str) -> list[str]:
    return [module for module in ENGINES[engine].modules if importlib.util.find_spec(module) is None]
