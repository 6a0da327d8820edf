"""How a quantized file's tensors are laid out: one form per purpose, one reader for all of them.

compact      what `csq search` writes: codes of `codes`, a tensor per layer
int8-packed  integers as they are (int8, int16 where |Q| > 127): readable with safetensors and NumPy alone
bit-packed   the smallest: every payload in one tensor, manifest and float tensors deflated; random access per layer
state-dict   the float weights under their own names, for any program that loads a state dict
torchao      the same, but matrices as int8 and scales under the names that torchao gives its packed weights

All are safetensors files. The manifest records each layer's encoding, and reading dispatches on it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csqcli.errors import UserError
from csqcli.file import codes
from csqcli.file.codes import Encoded
from csqcli.file.deflate import deflate_mixed, inflate
from csqcli.file.header import CODES_TENSOR, ROWS, raw_bytes, spans, torchao_names
from csqcli.file.manifest import ITEM_BYTES, Form, LayerRecord, TensorRecord
from csqcli.models.checkpoints import is_damaged
from csqcli.quant.basis import nearest, values_of
from csqcli.quant.hard_layer import HardLayer, spread

BASIS_IN_INTEGERS = "has a learned basis, whose levels are not integers × scale"
BASIS_HINT = "take --bit-packed, --bit-packed-small or --state-dict"
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}


@dataclass
class Stored:
    """A file's tensors, and what its manifest must say to find the layers again."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    encodings: list[tuple[str, int]] = field(default_factory=list)  # per layer: encoding, payload bytes
    others: list[TensorRecord] = field(default_factory=list)  # bit-packed only


def store(
    layers: Sequence[HardLayer],
    others: Mapping[str, Tensor],
    form: Form,
    *,
    encoded: Sequence[Encoded] | None = None,
    rows: Collection[str] = (),
) -> Stored:
    """Lay ``layers`` and the ``others`` (parameters and buffers that are not quantized) out in ``form``.

    ``encoded`` are the layers' codes, for callers who have them already; ``rows`` those layers that torchao gets packed.
    """
    if form in ("compact", "bit-packed"):
        encoded = encoded if encoded is not None else encode_layers(layers)
        return (_store_compact if form == "compact" else _store_bit_packed)(layers, others, encoded)
    stored = Stored(dict(others))
    for layer in layers:
        if form == "torchao" and layer.name in rows:
            qdata, scale = torchao_names(layer.name)
            stored.tensors[qdata] = layer.integers.to(torch.int8).contiguous()
            stored.tensors[scale] = layer.scale.reshape(-1, 1)
            stored.encodings.append((ROWS, layer.integers.numel()))
            continue
        if form in ("state-dict", "torchao"):
            weight = layer.weight()
            stored.tensors |= {name: weight.clone() for name in (layer.name, *layer.aliases)}
            stored.encodings.append(("float32", 4 * weight.numel()))
            continue
        if layer.basis is not None:
            raise UserError(BASIS_IN_INTEGERS, where=layer.name, hint=BASIS_HINT)
        payload, encoding = plain_integers(layer.integers)
        stored.tensors[f"{layer.name}_packed"] = payload
        stored.tensors[f"{layer.name}_scale"] = layer.scale
        stored.tensors[f"{layer.name}_shape"] = torch.tensor(layer.integers.shape)
        stored.encodings.append((encoding, payload.numel() * payload.element_size()))
    return stored


def encode_layers(layers: Sequence[HardLayer]) -> list[Encoded]:
    """The layers' integers as codes."""
    return [codes.encode(layer.integers.cpu().numpy()) for layer in layers]


def plain_integers(integers: Tensor) -> tuple[Tensor, str]:
    """The integers in the narrowest exact of int8 and int16, in their own shape, and that type's name."""
    largest = int(integers.abs().max()) if integers.numel() else 0
    if codes.code_width(largest) == 16:
        return integers.to(torch.int16).contiguous(), "int16"
    return integers.to(torch.int8).contiguous(), "int8"


def as_tensor(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor of one dimension."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _store_compact(layers: Sequence[HardLayer], others: Mapping[str, Tensor], encoded: Sequence[Encoded]) -> Stored:
    stored = Stored(dict(others))
    for layer, (data, encoding) in zip(layers, encoded, strict=True):
        stored.tensors[f"{layer.name}_packed"] = as_tensor(data)
        stored.tensors[f"{layer.name}_scale"] = layer.scale
        if layer.basis is not None:
            stored.tensors[f"{layer.name}_basis"] = layer.basis
        stored.encodings.append((encoding, len(data)))
    return stored


def _store_bit_packed(layers: Sequence[HardLayer], others: Mapping[str, Tensor], encoded: Sequence[Encoded]) -> Stored:
    stored, floats = Stored(), dict(others)
    stored.encodings = [(encoding, len(data)) for data, encoding in encoded]
    for layer in layers:
        if layer.scale.numel() > 1:  # a single scale stands in the manifest, to the last bit
            floats[f"{layer.name}_scale"] = layer.scale
        if layer.basis is not None:
            floats[f"{layer.name}_basis"] = layer.basis
    groups: dict[str, list[Tensor]] = {}
    for name, value in sorted(
        floats.items(), key=lambda item: item[0].rpartition(".")[::-1]
    ):  # all biases, all means, …
        record = TensorRecord(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=list(value.shape))
        halved = _as_float16(value)
        if halved is not None:
            record.stored, (value, record.exponent) = "float16", halved
        stored.others.append(record)
        groups.setdefault(record.file_dtype, []).append(value.flatten())
    stored.tensors[CODES_TENSOR] = as_tensor(b"".join(data for data, _ in encoded))
    for dtype, values in groups.items():  # exponents next to exponents, and so on: DEFLATE finds more
        joined = torch.cat(values)
        planes = joined.view(torch.uint8).view(joined.numel(), joined.element_size()).t().contiguous()
        stored.tensors[f"csq_{dtype}"] = as_tensor(deflate_mixed(planes.numpy().tobytes()))
    return stored


def _as_float16(value: Tensor) -> tuple[Tensor, int] | None:
    """A float32 tensor times a power of two as float16, and the exponent, where that loses nothing; else None."""
    if value.dtype != torch.float32 or value.numel() == 0:
        return None
    exponent = half_exponent(value)
    halved = (value.double() * 2.0**exponent).half()
    return (halved, exponent) if torch.equal(_widened(halved, exponent), value) else None


def half_exponent(value: Tensor) -> int:
    """k such that the largest magnitude of ``value`` times 2^k lies in [2^14, 2^15), at the upper end of float16; 0 for zeros."""
    largest = float(value.abs().max())
    return 15 - math.frexp(largest)[1] if largest else 0


def _widened(halved: Tensor, exponent: int) -> Tensor:
    return (halved.double() * 2.0**-exponent).float()


class Reader:
    """Tensors of an open safetensors file (torch), layer by layer. ValueError wherever they contradict the manifest."""

    def __init__(self, file: Any, layers: Sequence[LayerRecord], others: Sequence[TensorRecord]) -> None:
        self.file = file
        self.unread = set(file.keys())
        self.bit_packed = CODES_TENSOR in self.unread
        self.weights = {name for record in layers for name in (record.name, *record.aliases)}
        self.floats: dict[str, Tensor] = {}
        if self.bit_packed:
            self.unread.clear()
            self.floats = _unpack_tensors(file, others)
            self.spans = spans(layers, file.get_slice(CODES_TENSOR).get_shape())

    def layer(self, record: LayerRecord) -> tuple[Tensor, Tensor, Tensor | None]:
        """Integers (int32, the weight's shape), scale (float32, [1] or [channels]), and basis (float32,
        [planes, channels or 1]) where the layer has one."""
        basis = self._basis(record)
        integers, scale = self._layer(record, basis)
        if (
            scale.dtype != torch.float32
            or scale.dim() != 1
            or scale.numel() not in (1, record.shape[record.channel_dim])
        ):
            raise ValueError(f"scale of shape {list(scale.shape)} and dtype {scale.dtype}")
        return integers, scale, basis

    def _basis(self, record: LayerRecord) -> Tensor | None:
        if record.basis is None:
            return None
        name = f"{record.name}_basis"
        if self.bit_packed:
            found = self.floats.pop(name, None)
        elif record.encoding == "float32":
            found = torch.tensor(record.basis, dtype=torch.float32)
        else:
            found = self._take(name)
        widths = (1, record.shape[record.channel_dim])
        if found is None or found.dtype != torch.float32 or found.dim() != 2:
            raise ValueError(f"tensor {name} is missing or no float32 matrix")
        if found.shape[0] != record.bits or found.shape[1] not in widths:
            raise ValueError(f"basis of shape {list(found.shape)}")
        return found

    def _layer(self, record: LayerRecord, basis: Tensor | None) -> tuple[Tensor, Tensor]:
        name = record.name
        if self.bit_packed:
            start, end = self.spans[name]
            payload = self.file.get_slice(CODES_TENSOR)[start:end]
            scale = self.floats.pop(f"{name}_scale", None)
            if scale is None:
                scale = _recorded_scale(record)
            return _decoded(payload, record), scale
        if record.encoding == "float32":
            return self._from_weight(record, basis)
        if record.encoding == ROWS:
            rows, scales = (self._take(part) for part in torchao_names(name))
            if rows.dtype != torch.int8 or list(rows.shape) != record.shape or scales.dim() != 2 or record.channel_dim:
                raise ValueError(f"integers of shape {list(rows.shape)} and dtype {rows.dtype}")
            return rows.to(torch.int32), scales.flatten()
        payload, scale = self._take(f"{name}_packed"), self._take(f"{name}_scale")
        if record.encoding in ("int8", "int16"):
            if payload.dtype != _DTYPES[record.encoding] or list(payload.shape) != record.shape:
                raise ValueError(f"integers of shape {list(payload.shape)} and dtype {payload.dtype}")
            if self._take(f"{name}_shape").tolist() != record.shape:
                raise ValueError(f"{name}_shape disagrees with the manifest")
            return payload.to(torch.int32), scale
        return _decoded(payload, record), scale

    def others(self) -> dict[str, Tensor]:
        """What is left after every layer was read: plain numbers, none of them under a layer's name."""
        left = {name: self.file.get_tensor(name) for name in sorted(self.unread)} | self.floats
        for name, value in left.items():
            if value.dtype not in _DTYPES.values() or name in self.weights:
                raise ValueError(f"tensor {name} of type {value.dtype} does not belong here")
            if is_damaged(value.float()):
                raise ValueError(f"tensor {name} holds NaN or infinite values")
            if name.endswith("running_var") and bool((value < 0).any()):
                raise ValueError(f"tensor {name} holds a variance below 0")
        return left

    def _take(self, name: str) -> Tensor:
        if name not in self.unread:
            raise ValueError(f"tensor {name} is missing")
        self.unread.discard(name)
        return self.file.get_tensor(name)

    def _from_weight(self, record: LayerRecord, basis: Tensor | None) -> tuple[Tensor, Tensor]:
        """Integers back from float weights: |Q| < 2^15 and one rounding of 2^-24, so W / scale rounds to Q exactly."""
        weight, scale = self._take(record.name), _recorded_scale(record)
        if scale.numel() not in (1, record.shape[record.channel_dim]):
            raise ValueError(f"{scale.numel()} scales")
        if list(weight.shape) != record.shape or weight.dtype != torch.float32:
            raise ValueError(f"weight of shape {list(weight.shape)} and dtype {weight.dtype}")
        if basis is not None:
            integers = nearest(weight, basis, record.channel_dim)
            if not torch.equal(values_of(integers, basis, record.channel_dim), weight):
                raise ValueError("the weights are no longer levels of the basis; they were changed after the export")
        else:
            unit = spread(scale, weight, record.channel_dim)
            integers = torch.where(unit != 0, weight.double() / unit.double(), 0.0).round()
            if not bool((integers.abs() <= codes.WIDTHS[16]).all()) or not torch.equal(integers.float() * unit, weight):
                raise ValueError("the weights are no longer integers × scale; they were changed after the export")
        for alias in record.aliases:
            if not torch.equal(self._take(alias), weight):
                raise ValueError(f"the tied tensor {alias} differs")
        return integers.to(torch.int32), scale


def _decoded(payload: Tensor, record: LayerRecord) -> Tensor:
    if payload.dtype != torch.uint8 or payload.dim() != 1:
        raise ValueError(f"codes of type {payload.dtype} and shape {list(payload.shape)}")
    integers = codes.decode(payload.numpy().tobytes(), record.encoding, tuple(record.shape))
    return torch.from_numpy(integers).to(torch.int32)


def _recorded_scale(record: LayerRecord) -> Tensor:
    return torch.tensor(record.scale if isinstance(record.scale, list) else [record.scale], dtype=torch.float32)


def _unpack_tensors(file: Any, records: Sequence[TensorRecord]) -> dict[str, Tensor]:
    """The other tensors of a bit-packed file; ValueError when the bytes are not what the records say."""
    groups: dict[str, list[TensorRecord]] = {}
    for record in records:
        groups.setdefault(record.file_dtype, []).append(record)
    tensors: dict[str, Tensor] = {}
    for dtype, members in groups.items():
        counts = [math.prod(record.shape) for record in members]
        width = ITEM_BYTES[dtype]
        raw = inflate(raw_bytes(file, f"csq_{dtype}"), sum(counts) * width)
        flat = np.frombuffer(raw, dtype=np.uint8).reshape(width, sum(counts)).T.reshape(-1).copy()
        values = torch.from_numpy(flat).view(_DTYPES[dtype]).split(counts)
        for record, part in zip(members, values, strict=True):
            part = part.view(record.shape).clone()
            tensors[record.name] = part if record.stored is None else _widened(part, record.exponent)
    return {record.name: tensors[record.name] for record in records}
