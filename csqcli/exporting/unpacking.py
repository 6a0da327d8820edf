"""Integers packed below a byte, and the ONNX nodes that unpack them with look-up tables.

An engine folds those nodes when it loads the file, because everything they read is constant; from then on it runs the
ordinary float network. Shifts and masks would do the same but take seconds in one engine and crash another. Tables
turn into float32 before the look-up: OpenVINO would keep int8 results and quantize activations on the fly.

A layer's distinct integers, sorted, are its levels; a weight is the number of its level. With L levels, m = ⌊log_L 256⌋
numbers make one byte in base L (five ternary weights, two of 15 levels), or ⌈log2 L⌉ bit planes hold one bit of each
number: whichever takes fewer bits. k planes of CSQ give at most 2^(k+1) − 1 levels, wherever the planes lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

MAX_PER_BYTE = 8


@dataclass(frozen=True)
class Packed:
    """A layer's integers as bytes."""

    data: np.ndarray  # uint8: [bytes] in base L, or [planes, bytes], eight weights per byte
    levels: np.ndarray  # [L], int8 or int16, ascending
    per_byte: int  # weights per byte in base L; 0: bit planes

    @property
    def encoding(self) -> str:
        return f"base{len(self.levels)}" if self.per_byte else f"planes{len(self.data)}"


def pack(integers: np.ndarray) -> Packed:
    """Pack integers (any shape, |Q| ≤ 32767) losslessly."""
    flat = integers.reshape(-1)
    levels, numbers = np.unique(flat, return_inverse=True)
    levels = levels.astype(np.int8 if np.abs(levels).max(initial=0) <= 127 else np.int16)
    base, planes = len(levels), max(1, int(len(levels) - 1).bit_length())
    per_byte = next((m for m in range(MAX_PER_BYTE, 0, -1) if base**m <= 256), 0)
    if not per_byte or 8 / per_byte > planes:
        bits = [np.packbits((numbers >> plane) & 1, bitorder="little") for plane in range(planes)]
        return Packed(np.stack(bits), levels, 0)
    columns = np.pad(numbers, (0, -len(numbers) % per_byte)).reshape(-1, per_byte)
    data = columns @ base ** np.arange(per_byte)
    return Packed(data.astype(np.uint8), levels, per_byte)


def digit_table(levels: np.ndarray, per_byte: int) -> np.ndarray:
    """[256, per_byte]: the integers that each byte stands for; bytes beyond L^per_byte never occur."""
    return levels[np.arange(256)[:, None] // len(levels) ** np.arange(per_byte) % len(levels)]


def bit_table() -> np.ndarray:
    """[256, 8], int8: the bits of each byte, lowest first."""
    return ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.int8)


class Unpacker:
    """Initializers and nodes for all layers of one graph; equal tables are stored once."""

    def __init__(self) -> None:
        self.initializers: list[TensorProto] = []
        self.nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._made: set[str] = set()  # tables computed from constants

    def add(self, name: str, integers: np.ndarray, scale: np.ndarray) -> Packed:
        """Make the graph compute the float weight ``name``; its integers are the value ``{name}_integers``.

        ``scale`` is float32 and broadcasts over the weight.
        """
        packed = self._add_integers(name, integers, TensorProto.FLOAT)
        self._initializer(f"{name}_scale", scale.astype(np.float32))
        self._node("Mul", [f"{name}_integers", f"{name}_scale"], name)
        return packed

    def add_int8(self, name: str, integers: np.ndarray, scale: np.ndarray, *, axis: int) -> Packed:
        """The same for |Q| ≤ 127 as int8 and DequantizeLinear, which engines fuse into int8 kernels.

        ``scale`` is float32 of shape [] or [channels] along ``axis``, and positive.
        """
        packed = self._add_integers(name, integers, TensorProto.INT8)
        self._initializer(f"{name}_scale", scale.astype(np.float32))
        zero = self._constant("csq_zero", np.zeros(scale.shape, dtype=np.int8))
        self._node("DequantizeLinear", [f"{name}_integers", f"{name}_scale", zero], name, axis=axis)
        return packed

    def _add_integers(self, name: str, integers: np.ndarray, to: int) -> Packed:
        packed = pack(integers)
        self._initializer(f"{name}_packed", packed.data)
        if packed.per_byte:
            table = self._table(digit_table(packed.levels, packed.per_byte), to)
            index = self._node("Cast", [f"{name}_packed"], f"{name}_bytes", to=TensorProto.INT32)
            values = self._node("Gather", [table, index], f"{name}_groups")
            held = packed.data.size * packed.per_byte
        else:
            numbers = self._sum_planes(name, len(packed.data))
            values = self._node("Gather", [self._table(packed.levels, to), numbers], f"{name}_groups")
            held = packed.data.shape[1] * 8
        if held != integers.size:  # cut off what fills the last byte
            flat = self._node("Reshape", [values, self._constant("csq_shape", np.array([-1]))], f"{name}_flat")
            bounds = [self._constant("csq_shape", np.array([bound])) for bound in (0, integers.size)]
            values = self._node("Slice", [flat, *bounds], f"{name}_cut")
        shape = self._constant("csq_shape", np.array(integers.shape, dtype=np.int64))
        self._node("Reshape", [values, shape], f"{name}_integers")
        return packed

    def _sum_planes(self, name: str, planes: int) -> str:
        """Numbers of the levels, int32: Σ_b 2^b · plane_b."""
        index = self._node("Cast", [f"{name}_packed"], f"{name}_bytes", to=TensorProto.INT32)
        total = ""
        for plane in range(planes):
            row = self._constant("csq_row", np.array(plane, dtype=np.int64))
            data = self._node("Gather", [index, row], f"{name}_plane{plane}")
            bits = self._node("Gather", [self._plane_table(plane), data], f"{name}_bits{plane}")
            total = self._node("Add", [total, bits], f"{name}_sum{plane}") if total else bits
        return total

    def _plane_table(self, plane: int) -> str:
        """[256, 8], int32: what each byte of bit plane ``plane`` adds to the numbers of eight weights."""
        if plane == 0:
            return self._table(bit_table(), TensorProto.INT32)
        name = f"csq_plane_{plane}"
        if name not in self._made:
            factor = self._constant("csq_factor", np.array(2**plane, dtype=np.int32))
            self._made.add(self._node("Mul", [self._plane_table(0), factor], name))
        return name

    def _table(self, values: np.ndarray, to: int) -> str:
        """A small constant stored in its own narrow type and cast to ``to``."""
        stored = self._constant("csq_table", values)
        name = f"{stored}_as{to}"
        if name not in self._made:
            self._made.add(self._node("Cast", [stored], name, to=to))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"unpack_{output}", **attributes))
        return output

    def _constant(self, prefix: str, value: np.ndarray) -> str:
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = f"{prefix}_{len(self._constants)}"
            self._initializer(self._constants[key], value)
        return self._constants[key]

    def _initializer(self, name: str, value: np.ndarray) -> None:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
