"""How a quantized file's tensors are laid out: one form per purpose, one reader for all of them.

compact      what `csq search` writes: codes of `packing`, a tensor per layer
int8-packed  integers as they are (int8, int16 where |Q| > 127): readable with safetensors and NumPy alone
bit-packed   the smallest: every payload in one tensor, manifest and float tensors deflated; random access per layer
state-dict   the float weights under their own names, for any program that loads a state dict

All are safetensors files. The manifest records each layer's encoding, and reading dispatches on it.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from csqcli.file import codes as packing
from csqcli.models import libraries as sources
from csqcli.quant.hard_layer import HardLayer, spread

if TYPE_CHECKING:
    from csqcli.file.io import LayerRecord

Form = Literal["compact", "int8-packed", "bit-packed", "state-dict"]
CODES, MANIFEST = (
    "csq_codes",
    "csq_manifest",
)  # tensors of a bit-packed file, beside one csq_TYPE per type of the others
MANIFEST_LIMIT = 2**23  # bytes once inflated; a manifest is a few hundred bytes per layer
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class TensorRecord(BaseModel):
    """A float parameter or buffer inside a bit-packed file; those of one type follow each other in ``csq_TYPE``."""

    name: str = Field(min_length=1, max_length=512)
    dtype: str
    shape: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(max_length=8)

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in _DTYPES:
            raise ValueError(f"unknown type {dtype}")
        return dtype


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return _DTYPES[dtype].itemsize


@dataclass
class Stored:
    """A file's tensors, and what its manifest must say to find the layers again."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    encodings: list[tuple[str, int]] = field(default_factory=list)  # per layer: encoding, payload bytes
    others: list[TensorRecord] = field(default_factory=list)  # bit-packed only


def store(layers: Sequence[HardLayer], others: Mapping[str, Tensor], form: Form) -> Stored:
    """Lay ``layers`` and the ``others`` (parameters and buffers that are not quantized) out in ``form``."""
    if form == "bit-packed":
        return _store_bit_packed(layers, others)
    stored = Stored(dict(others))
    for layer in layers:
        if form == "state-dict":
            weight, encoding = layer.weight(), "float32"
            stored.tensors |= {name: weight.clone() for name in (layer.name, *layer.aliases)}
            stored.encodings.append((encoding, 4 * weight.numel()))
            continue
        payload, encoding = packing.encode(layer.integers) if form == "compact" else plain_integers(layer.integers)
        stored.tensors[f"{layer.name}_packed"] = payload
        stored.tensors[f"{layer.name}_scale"] = layer.scale
        if form == "int8-packed":
            stored.tensors[f"{layer.name}_shape"] = torch.tensor(layer.integers.shape)
        stored.encodings.append((encoding, payload.numel() * payload.element_size()))
    return stored


def plain_integers(integers: Tensor) -> tuple[Tensor, str]:
    """The integers in the narrowest exact of int8 and int16, in their own shape, and that type's name."""
    largest = int(integers.abs().max()) if integers.numel() else 0
    if packing.code_width(largest) == 16:
        return integers.to(torch.int16).contiguous(), "int16"
    return integers.to(torch.int8).contiguous(), "int8"


class Reader:
    """Tensors of an open safetensors file, layer by layer. ValueError wherever they contradict the manifest."""

    def __init__(self, file: Any, layers: Sequence[LayerRecord], others: Sequence[TensorRecord]) -> None:
        self.file = file
        self.unread = set(file.keys())
        self.bit_packed = CODES in self.unread
        self.weights = {name for record in layers for name in (record.name, *record.aliases)}
        self.floats: dict[str, Tensor] = {}
        if self.bit_packed:
            self.unread.clear()
            self.floats = _unpack_tensors(file, others)
            ends = list(itertools.accumulate(record.packed_bytes for record in layers))
            if (ends[-1:] or [0]) != file.get_slice(CODES).get_shape():
                raise ValueError("payloads do not fill the codes")
            self.spans = {
                record.name: (end - record.packed_bytes, end) for record, end in zip(layers, ends, strict=True)
            }

    def layer(self, record: LayerRecord) -> tuple[Tensor, Tensor]:
        """Integers (int32, the weight's shape) and scale (float32, [1] or [channels])."""
        integers, scale = self._layer(record)
        if (
            scale.dtype != torch.float32
            or scale.dim() != 1
            or scale.numel() not in (1, record.shape[record.channel_dim])
        ):
            raise ValueError(f"scale of shape {list(scale.shape)} and dtype {scale.dtype}")
        return integers, scale

    def _layer(self, record: LayerRecord) -> tuple[Tensor, Tensor]:
        shape, name = tuple(record.shape), record.name
        if self.bit_packed:
            start, end = self.spans[name]
            payload = self.file.get_slice(CODES)[start:end]
            scale = self.floats.pop(f"{name}_scale", None)
            if scale is None:
                scale = _recorded_scale(record)
            return packing.decode(payload, record.encoding, shape).to(torch.int32), scale
        if record.encoding == "float32":
            return self._from_weight(record)
        payload, scale = self._take(f"{name}_packed"), self._take(f"{name}_scale")
        if record.encoding in ("int8", "int16"):
            if payload.dtype != _DTYPES[record.encoding] or tuple(payload.shape) != shape:
                raise ValueError(f"integers of shape {list(payload.shape)} and dtype {payload.dtype}")
            if self._take(f"{name}_shape").tolist() != list(shape):
                raise ValueError(f"{name}_shape disagrees with the manifest")
            return payload.to(torch.int32), scale
        return packing.decode(payload, record.encoding, shape).to(torch.int32), scale

    def others(self) -> dict[str, Tensor]:
        """What is left after every layer was read: plain numbers, none of them under a layer's name."""
        left = {name: self.file.get_tensor(name) for name in sorted(self.unread)} | self.floats
        for name, value in left.items():
            if value.dtype not in _DTYPES.values() or name in self.weights:
                raise ValueError(f"tensor {name} of type {value.dtype} does not belong here")
            if sources.is_damaged(value.float()):
                raise ValueError(f"tensor {name} holds NaN or infinite values")
        return left

    def _take(self, name: str) -> Tensor:
        if name not in self.unread:
            raise ValueError(f"tensor {name} is missing")
        self.unread.discard(name)
        return self.file.get_tensor(name)

    def _from_weight(self, record: LayerRecord) -> tuple[Tensor, Tensor]:
        """Integers back from float weights: |Q| < 2^15 and one rounding of 2^-24, so W / scale rounds to Q exactly."""
        weight, scale = self._take(record.name), _recorded_scale(record)
        if scale.numel() not in (1, record.shape[record.channel_dim]):
            raise ValueError(f"{scale.numel()} scales")
        if tuple(weight.shape) != tuple(record.shape) or weight.dtype != torch.float32:
            raise ValueError(f"weight of shape {list(weight.shape)} and dtype {weight.dtype}")
        unit = spread(scale, weight, record.channel_dim)
        integers = torch.where(unit != 0, weight.double() / unit.double(), 0.0).round()
        if not bool((integers.abs() <= packing.WIDTHS[16]).all()) or not torch.equal(integers.float() * unit, weight):
            raise ValueError("the weights are no longer integers × scale; they were changed after the export")
        for alias in record.aliases:
            if not torch.equal(self._take(alias), weight):
                raise ValueError(f"the tied tensor {alias} differs")
        return integers.to(torch.int32), scale


def _recorded_scale(record: LayerRecord) -> Tensor:
    return torch.tensor(record.scale if isinstance(record.scale, list) else [record.scale], dtype=torch.float32)


def _store_bit_packed(layers: Sequence[HardLayer], others: Mapping[str, Tensor]) -> Stored:
    stored, payloads, floats = Stored(), [], dict(others)
    for layer in layers:
        payload, encoding = packing.encode(layer.integers)
        payloads.append(payload)
        stored.encodings.append((encoding, payload.numel()))
        if layer.scale.numel() > 1:  # a single scale stands in the manifest, to the last bit
            floats[f"{layer.name}_scale"] = layer.scale
    groups: dict[str, list[Tensor]] = {}
    for name, value in floats.items():
        dtype = str(value.dtype).removeprefix("torch.")
        stored.others.append(TensorRecord(name=name, dtype=dtype, shape=list(value.shape)))
        groups.setdefault(dtype, []).append(value.flatten())
    stored.tensors[CODES] = torch.cat(payloads) if payloads else torch.empty(0, dtype=torch.uint8)
    for dtype, values in groups.items():  # exponents next to exponents, and so on: DEFLATE finds more
        joined = torch.cat(values)
        planes = joined.view(torch.uint8).view(joined.numel(), joined.element_size()).t().contiguous()
        stored.tensors[f"csq_{dtype}"] = as_tensor(deflate(planes.numpy().tobytes()))
    return stored


def _unpack_tensors(file: Any, records: Sequence[TensorRecord]) -> dict[str, Tensor]:
    """Inverse of the packing above; ValueError when the bytes are not what the records say."""
    groups: dict[str, list[TensorRecord]] = {}
    for record in records:
        groups.setdefault(record.dtype, []).append(record)
    tensors: dict[str, Tensor] = {}
    for dtype, members in groups.items():
        sizes = [math.prod(record.shape) for record in members]
        width = _DTYPES[dtype].itemsize
        raw = packing.inflate(raw_bytes(file, f"csq_{dtype}"), sum(sizes) * width)
        flat = np.frombuffer(raw, dtype=np.uint8).reshape(width, sum(sizes)).T.reshape(-1).copy()
        values = torch.from_numpy(flat).view(_DTYPES[dtype]).split(sizes)
        tensors |= {record.name: part.view(record.shape).clone() for record, part in zip(members, values, strict=True)}
    return {record.name: tensors[record.name] for record in records}


def raw_bytes(file: Any, name: str) -> bytes:
    """A tensor that holds bytes. ValueError for any other."""
    tensor = file.get_tensor(name)
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"{name} is no row of bytes")
    data: bytes = tensor.numpy().tobytes()
    return data


def deflate(data: bytes) -> bytes:
    """Raw DEFLATE at its slowest."""
    coder = zlib.compressobj(level=9, wbits=-15, memLevel=9)
    return coder.compress(data) + coder.flush()


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
