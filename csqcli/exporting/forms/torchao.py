"""The torchao form: a plain PyTorch model whose linear layers hold int8, for programs that have torchao and no csq."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.exporting import verify
from csqcli.exporting.form import Options, Subject
from csqcli.exporting.forms.safetensors import SafetensorsForm
from csqcli.exporting.runtime import require
from csqcli.exporting.verify import ParityError
from csqcli.file import io, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ParityRecord
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.measuring import calls_of

_SUPPORT = "torchao.prototype.safetensors.safetensors_support"
_INT8_MAX = 127


class Torchao(SafetensorsForm):
    """Linear layers as torchao's Int8Tensor, from the searched integers and scales; all other weights in float, exactly."""

    name = layout = "torchao"

    @classmethod
    def require(cls, options: Options) -> None:
        _torchao()

    @classmethod
    def accept(cls, file: QuantizedFile, options: Options, *, where: str) -> None:
        if file.manifest.activations:
            what = "rounds the inputs of its layers, which a plain PyTorch model does not do"
            raise UserError(what, where=where, hint="export --onnx, or --state-dict for csq")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        packages = _torchao()
        self.torchao, self.support = packages
        self.engine = f"torchao {self.torchao.__version__}, torch {torch.__version__}"
        held = self._matrices(subject)
        packed = {layer.name: self._packed(layer) for layer in self.file.layers if layer.name in held}
        _, metadata = self.support.flatten_tensor_state_dict(packed)
        self.rows = {name: metadata[name] for name in packed}  # what torchao reads beside integers and scales
        self.notes.append(
            f"{len(packed)} of {len(self.file.layers)} layers are int8 in torchao, the others float32, integers × scale"
        )

    def _matrices(self, subject: Subject) -> set[str]:
        """Layers that nn.Linear itself multiplies by, and whose integers fit int8."""
        model = subject.model
        owners = {layer.name: layer.name.removesuffix(".weight") for layer in self.file.layers}
        with torch.no_grad():
            called = calls_of(model, subject.probe.images[:1], owners.values())[1]
        return {
            layer.name
            for layer in self.file.layers
            if owners[layer.name] in called
            and type(model.get_submodule(owners[layer.name])) is nn.Linear
            and not layer.aliases
            and int(layer.integers.abs().max()) <= _INT8_MAX
        }

    def _packed(self, layer: HardLayer) -> Tensor:
        """The integers and scales as torchao's tensor: nothing is rounded anew."""
        block = [1 if layer.scale.numel() > 1 else layer.integers.shape[0], layer.integers.shape[1]]
        tensor: Tensor = self.torchao.quantization.Int8Tensor(
            layer.integers.to(torch.int8), layer.scale.reshape(-1, 1), block, torch.float32
        )
        return tensor

    def write(self, path: Path, parity: ParityRecord | None) -> None:
        io.write(path, self.file, form="torchao", parity=parity, rows=self.rows)

    def check(self, path: Path) -> None:
        """By csq's own reader, and what torchao makes of the file: integers, scales and weights, bit for bit."""
        super().check(path)
        state = self._state(path)
        for layer in self.file.layers:
            tensor: Any = state[layer.name]
            if layer.name in self.rows:
                same = torch.equal(tensor.qdata, layer.integers) and torch.equal(tensor.scale.flatten(), layer.scale)
                if not same:
                    raise ParityError("integers or scales differ as torchao reads them", where=layer.name)
                tensor = tensor.dequantize()
            if not verify.same_bits(tensor, layer.weight()):
                raise ParityError("integers × scale is not the hard weight", where=layer.name)

    def open(self, path: Path) -> nn.Module:
        where, trust = self.file.manifest.model.source, self.options.trust_code
        model = loading.hard_model(self.file, trust_code=trust, where=where)
        model.load_state_dict(self._state(path), strict=True, assign=True)
        return model

    def _state(self, path: Path) -> dict[str, Tensor]:
        """The state dict as the documentation tells others to read it."""
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        packed, others = self.support.unflatten_tensor_state_dict(tensors, metadata)
        state: dict[str, Tensor] = packed | others
        return state

    def twins(self, path: Path, *, threads: int) -> tuple[nn.Module, nn.Module]:
        return self.open(path), self.subject.model

    def latency(self, path: Path) -> tuple[float | None, float | None]:
        """Against the float model, neither compiled; the number of threads is PyTorch's, whoever asks."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                return super().latency(path)
        finally:
            torch.set_num_threads(threads)


def _torchao() -> list[ModuleType]:
    """torchao and its safetensors support; it logs deprecations of torch's when it is imported."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return require("torchao", _SUPPORT, extra="torchao")
    finally:
        logging.disable(level)
