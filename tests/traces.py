"""Networks that tests export to ONNX or LiteRT again and again are traced once in a process.

``torch.onnx.export`` takes nearly all of an export's time, and its graph follows from the network alone: quantized weights are
inputs of it, so the same network with other integers has the same graph. What is exported for the first time, and whatever
this cannot describe completely, goes through the real thing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from csqcli.exporting import onnx_graph
from csqcli.quant import activations
from csqcli.quant.hard_layer import HardLayer

_PLAIN = (bool, int, float, str, type(None))


_FOUND: dict[str, tuple[bytes, set[str]]] = {}  # of this process: the same few networks are exported in many files


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Inside, `onnx_graph.trace` traces what it has not traced before in this process, and copies what it has."""
    honest, found = onnx_graph.trace, _FOUND

    def trace(
        model: nn.Module,
        layers: Sequence[HardLayer],
        input_size: Sequence[int],
        *,
        batch: int | None = None,
        opset: int = onnx_graph.OPSET,
    ) -> onnx_graph.Graphs:
        onnx_graph.require("onnx", "onnxscript", "onnxruntime")  # as it does, so that a test may take one away
        import onnx

        described = _description(model, layers)
        if described is None:
            return honest(model, layers, input_size, batch=batch, opset=opset)
        key = f"{described} {tuple(input_size)} {batch} {opset}"
        if key not in found:
            graphs = honest(model, layers, input_size, batch=batch, opset=opset)
            found[key] = graphs.proto.SerializeToString(), {layer.name for layer in graphs.used}
            return graphs
        content, names = found[key]
        absent = [layer.name for layer in layers if layer.name not in names]
        return onnx_graph.Graphs(
            onnx.ModelProto.FromString(content), [layer for layer in layers if layer.name in names], absent
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "trace", trace)
        yield


def _description(model: nn.Module, layers: Sequence[HardLayer]) -> str | None:
    """Everything that the graph depends on, hashed; None where a hook may do anything."""
    quantized = {name for layer in layers for name in (layer.name, *layer.aliases)}
    quantizers = activations.attached(model)
    hasher = hashlib.sha256(repr(sorted(quantized)).encode())
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if len(hooks) != (name in quantizers):
            return None
        kind = type(module)
        settings = {key: value for key, value in vars(module).items() if _is_plain(value)}
        hasher.update(f"{name} {kind.__module__}.{kind.__qualname__} {sorted(settings.items())} {module!r}".encode())
        if name in quantizers:
            quantizer = quantizers[name]
            hasher.update(f"{sorted(item for item in vars(quantizer).items() if _is_plain(item[1]))}".encode())
            hasher.update(quantizer.scale.detach().numpy().tobytes())
    parameters, buffers = (find(remove_duplicate=False) for find in (model.named_parameters, model.named_buffers))
    for name, value in (*parameters, *buffers):
        hasher.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if name not in quantized:
            hasher.update(_content(value))
    return hasher.hexdigest()


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(map(_is_plain, value)))


def _content(value: Tensor) -> bytes:
    return value.detach().contiguous().cpu().numpy().tobytes()
