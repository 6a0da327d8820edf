"""LiteRT flatbuffers (.tflite): tensors and operators written with LiteRT's own schema, and constants read back.

The schema is the one that ``ai_edge_litert`` ships. Integers of four and two bits stand packed, the first in the lowest
bits, as LiteRT reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from csqcli.exporting.runtime import INPUT, OUTPUT, require
from csqcli.file.flatbuffer import IDENTIFIER

_ALIGNMENT = 16  # bytes; the schema's force_align
_LIMITS = {2: 1, 4: 7, 8: 127}  # largest |Q| of a symmetric weight, by its bits
_NUMPY = {"float32": "FLOAT32", "int32": "INT32", "int64": "INT64", "int8": "INT8", "int16": "INT16", "bool": "BOOL"}


def schema() -> Any:
    """LiteRT's own generated schema. UserError where the package is missing."""
    return require("ai_edge_litert.schema_py_generated", extra="litert")[0]


def bits_that_hold(integers: np.ndarray) -> int:
    """2, 4 or 8: the narrowest symmetric type of LiteRT that holds them. ValueError beyond ±127."""
    largest = int(np.abs(integers).max(initial=0))
    for bits, limit in _LIMITS.items():
        if largest <= limit:
            return bits
    raise ValueError(f"|Q| = {largest} fits no int8")


def packed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Integers of 2, 4 or 8 bits as bytes, uint8, in C order, the first in the lowest bits."""
    flat = np.ascontiguousarray(integers).reshape(-1).astype(np.int8).view(np.uint8)
    if bits == 8:
        return flat
    per_byte = 8 // bits
    columns = np.pad(flat & (2**bits - 1), (0, -flat.size % per_byte)).reshape(-1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    return np.bitwise_or.reduce(columns << shifts, axis=1).astype(np.uint8)


def unpacked(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` integers, int32, of what :func:`packed` gave. ValueError where there are fewer."""
    if data.size != -(-count * bits // 8):
        raise ValueError(f"{data.size} bytes for {count} integers of {bits} bits")
    if bits == 8:
        return data.view(np.int8).astype(np.int32)
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    values = ((data[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:count].astype(np.int32)
    return values - (values >= 2 ** (bits - 1)) * 2**bits


@dataclass(frozen=True)
class Constant:
    """A quantized weight as it stands in a file."""

    integers: np.ndarray  # int32, the tensor's shape
    scale: np.ndarray  # float32 [1] or [channels]
    axis: int
    bits: int
    readers: int  # operators that take it as an input


class Writer:
    """One graph with one input and one output, under construction."""

    def __init__(self) -> None:
        require("ai_edge_litert", "flatbuffers", extra="litert")
        self.schema = schema()
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self._buffers: list[np.ndarray | None] = [None]  # the first is the empty one, by convention
        self._codes: dict[int, tuple[int, int]] = {}  # builtin operator -> (its number, largest version asked for)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "FLOAT32",
        *,
        scale: Any = None,
        zero: int = 0,
        axis: int = 0,
    ) -> int:
        """A new tensor's number. ``scale`` is one number or one per channel along ``axis``."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, [int(side) for side in shape], 0
        tensor.type = getattr(self.schema.TensorType, dtype)
        tensor.isVariable, tensor.hasRank = False, True
        if scale is not None:
            scales = np.atleast_1d(np.asarray(scale, dtype=np.float32))
            tensor.quantization = quantization = self.schema.QuantizationParametersT()
            quantization.scale = scales
            quantization.zeroPoint = np.full(scales.size, zero, dtype=np.int64)
            quantization.quantizedDimension = axis
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, name: str, value: np.ndarray) -> int:
        """A constant's number; equal ones are stored once."""
        value = np.ascontiguousarray(value)
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tensor(name, value.shape, _NUMPY[str(value.dtype)])
            self.attach(self._constants[key], value.reshape(-1).view(np.uint8))
        return self._constants[key]

    def weight(self, name: str, integers: np.ndarray, scale: np.ndarray, *, axis: int, bits: int) -> int:
        """A symmetric weight of 2, 4 or 8 bits; ``scale`` has one number or one per channel along ``axis``."""
        number = self.tensor(name, integers.shape, f"INT{bits}", scale=scale, axis=axis)
        self.attach(number, packed(integers, bits))
        return number

    def bias(self, name: str, integers: np.ndarray, scale: np.ndarray) -> int:
        """An int32 bias at input scale × weight scale."""
        number = self.tensor(name, integers.shape, "INT32", scale=scale)
        self.attach(number, np.ascontiguousarray(integers, dtype=np.int32).view(np.uint8))
        return number

    @property
    def kinds(self) -> list[int]:
        """The builtin operator of each operator written so far."""
        by_position = {position: code for code, (position, _) in self._codes.items()}
        return [by_position[operator.opcodeIndex] for operator in self.operators]

    def operator(
        self, kind: str, inputs: Sequence[int], outputs: Sequence[int], *, version: int = 1, **options: Any
    ) -> None:
        """One operator; ``options`` are the fields of its table in the schema, with which its class is found."""
        operator = self.schema.OperatorT()
        code = getattr(self.schema.BuiltinOperator, kind)
        position, known = self._codes.get(code, (len(self._codes), 1))
        self._codes[code] = position, max(version, known)
        operator.opcodeIndex = position
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        table = options.pop("table", None)
        if table is not None:
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
            operator.builtinOptions = getattr(self.schema, f"{table}T")()
            for field, value in options.items():
                if not hasattr(operator.builtinOptions, field):
                    raise AttributeError(f"{table} has no {field}")
                setattr(operator.builtinOptions, field, value)
        self.operators.append(operator)

    def finish(self, source: int, result: int, metadata: Mapping[str, bytes]) -> bytes:
        """The whole file, with its metadata by name."""
        schema = self.schema
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "main", self.tensors, self.operators
        graph.inputs, graph.outputs = [source], [result]
        model = schema.ModelT()
        model.version, model.description, model.subgraphs = 3, "csq", [graph]
        model.operatorCodes = []
        for code, (_, version) in self._codes.items():
            entry = schema.OperatorCodeT()
            entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), version
            model.operatorCodes.append(entry)
        model.signatureDefs = [signature := schema.SignatureDefT()]
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = [_named(schema, INPUT, source)], [_named(schema, OUTPUT, result)]
        model.metadata, contents = [], list(self._buffers)
        for name, value in metadata.items():
            entry = schema.MetadataT()
            entry.name, entry.buffer = name, len(contents)
            model.metadata.append(entry)
            contents.append(np.frombuffer(value, dtype=np.uint8))
        return packed_model(model, contents)

    def attach(self, number: int, data: np.ndarray) -> None:
        self.tensors[number].buffer = len(self._buffers)
        self._buffers.append(data)


def packed_model(model: Any, contents: Sequence[np.ndarray | None]) -> bytes:
    """The bytes of a ModelT whose buffers are ``contents``, uint8."""
    import flatbuffers

    builder = flatbuffers.Builder(sum(0 if value is None else value.size for value in contents) + 2**16)
    model.buffers = [_buffer(schema(), value) for value in contents]
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


def read(content: bytes) -> Any:
    """A file's ModelT. The content must be known to be what csq wrote: the generated reader checks no bounds."""
    return schema().ModelT.InitFromPackedBuf(content, 0)


def weights_in(model: Any) -> dict[str, Constant]:
    """The quantized constants of a ModelT by their names, as they stand in it. ValueError where two have one name."""
    s = schema()
    bits_of = {s.TensorType.INT2: 2, s.TensorType.INT4: 4, s.TensorType.INT8: 8}
    graph = model.subgraphs[0]
    readers = [0] * len(graph.tensors)
    for operator in graph.operators:
        for number in set(operator.inputs) - {-1}:
            readers[number] += 1
    found: dict[str, Constant] = {}
    for number, tensor in enumerate(graph.tensors):
        data = model.buffers[tensor.buffer].data
        if tensor.type not in bits_of or data is None or tensor.quantization is None:
            continue
        name, bits, shape = tensor.name.decode(), bits_of[tensor.type], tuple(tensor.shape)
        if name in found:
            raise ValueError(f"two constants named {name}")
        integers = unpacked(np.asarray(data, dtype=np.uint8), bits, int(np.prod(shape))).reshape(shape)
        scale = np.asarray(tensor.quantization.scale, dtype=np.float32)
        found[name] = Constant(integers, scale, tensor.quantization.quantizedDimension, bits, readers[number])
    return found


def _named(schema: Any, name: str, number: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, number
    return entry


def _buffer(schema: Any, data: np.ndarray | None) -> Any:
    """A BufferT whose bytes begin at a multiple of 16, as the schema wants and its Python writer forgets."""

    class Aligned(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:
            vector = None
            if data is not None:
                builder.StartVector(1, data.size, _ALIGNMENT)
                builder.head = builder.Head() - data.size
                builder.Bytes[builder.Head() : builder.Head() + data.size] = data.tobytes()
                vector = builder.EndVector()
            schema.BufferStart(builder)
            if vector is not None:
                schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

    return Aligned()
