"""The manifest out of a quantized file, safetensors, ONNX or LiteRT, without torch, model code or an engine.

Everything that is read here may have been made by anybody: sizes are bounded before memory is taken, and whatever is wrong
is one UserError that names the file.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from csqcli.errors import UserError, first_problem, no_such_file
from csqcli.file import flatbuffer
from csqcli.file.deflate import inflate
from csqcli.file.manifest import (
    BASIS_SCHEMA_VERSION,
    ITEM_BYTES,
    METADATA_KEY,
    SCHEMA_VERSION,
    LayerRecord,
    Manifest,
    from_json_object,
)
from csqcli.system import limits

MANIFEST_TENSOR = "csq_manifest"  # of a bit-packed or LiteRT file: most of its manifest, deflated
ROWS = "int8-rows"  # encoding of a layer that stands under `torchao_names`
CODES_TENSOR = "csq_codes"  # of a bit-packed file: all payloads, beside one csq_TYPE per type of its other tensors
MANIFEST_LIMIT = 2**23  # bytes of that tensor once inflated; a layer takes a few hundred
_JSON_BYTES, _JSON_VALUES = 2**26, 2**22  # of a manifest's JSON; a channel's scale takes 20 bytes
_TYPES = {  # as safetensors names them
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_METADATA_PROPS = 14  # field of ONNX's ModelProto: repeated StringStringEntryProto {1: key, 2: value}
GRAPHS = (".onnx", ".tflite")  # suffixes of exports that run in an engine of their own
_NUMPY_TYPES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64"}
_ENTRY_BYTES = _JSON_BYTES + 2**10


def read_manifest(path: str | Path) -> Manifest:
    """The manifest alone, with the file's measured size. UserError for anything that is not a csq file."""
    path = Path(path)
    if path.suffix == ".onnx":
        manifest = parse_manifest(onnx_metadata(path).get(METADATA_KEY), where=str(path))
    elif path.suffix == ".tflite":
        text, deflated = _litert_manifest(path)
        manifest = parse_manifest(text, where=str(path), deflated=deflated)
    else:
        with open_safetensors(path) as file:
            manifest = manifest_of(file, path)
            manifest.sizes.parts = parts(file, path)
    manifest.sizes.file_bytes = path.stat().st_size
    return manifest


def parts(file: Any, path: Path) -> dict[str, int]:
    """Bytes of an open safetensors file: its integers, its other tensors by type, and what describes them."""
    found = {"integers": 0}
    for name in file.keys():
        tensor = file.get_slice(name)
        dtype = _TYPES.get(tensor.get_dtype())
        if name == MANIFEST_TENSOR or dtype is None:
            continue
        part = name.removeprefix("csq_") if name.startswith("csq_") else dtype
        if name == CODES_TENSOR or name.endswith(("_packed", "_qdata")):
            part = "integers"
        found[part] = found.get(part, 0) + math.prod(tensor.get_shape()) * ITEM_BYTES[dtype]
    return found | {"description": path.stat().st_size - sum(found.values())}


def is_quantized(path: Path) -> bool:
    """Whether a safetensors file carries csq's manifest."""
    try:
        with safe_open(path, framework="numpy") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def open_safetensors(path: Path, *, framework: str = "numpy") -> Any:
    """safetensors' own reader over a file; ``framework`` "pt" gives torch tensors. UserError where it cannot be opened."""
    if not path.is_file():
        raise no_such_file(path)
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        hint = "it may be damaged or truncated: copy it again" if path.suffix == ".safetensors" else ""
        raise UserError(f"not a safetensors file ({error})", where=str(path), hint=hint) from None


def manifest_of(file: Any, path: Path) -> Manifest:
    """The manifest of an open safetensors file, of either framework. UserError when it is missing or damaged."""
    where = str(path)
    try:
        deflated = raw_bytes(file, MANIFEST_TENSOR) if MANIFEST_TENSOR in file.keys() else None
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"manifest is damaged ({error})", where=where) from None
    manifest = parse_manifest((file.metadata() or {}).get(METADATA_KEY), where=where, deflated=deflated)
    try:
        limits.check_unpacked(manifest.unpacked_bytes, file_bytes=path.stat().st_size)
    except ValueError as error:
        raise UserError(f"manifest is damaged ({error} of weights)", where=where) from None
    return manifest


def parse_manifest(text: str | None, *, where: str, deflated: bytes | None = None) -> Manifest:
    """A manifest from its JSON; ``deflated`` holds the larger part of it in a bit-packed file. UserError for damage."""
    if text is None:
        raise UserError("not a csq file (no manifest)", where=where, hint="`csq search` writes one")
    try:
        raw = _read_json(text)
        if raw.get("schema_version") not in (SCHEMA_VERSION, BASIS_SCHEMA_VERSION):
            hint = f"this csq reads versions {SCHEMA_VERSION} and {BASIS_SCHEMA_VERSION}; upgrade csq"
            raise UserError(f"schema version {raw.get('schema_version')!r}", where=where, hint=hint)
        if deflated is not None:
            raw |= _read_json(inflate(deflated, MANIFEST_LIMIT, exact=False))
        return from_json_object(raw)
    except ValidationError as error:
        raise UserError(f"manifest is damaged ({first_problem(error).text})", where=where) from None
    except ValueError as error:
        raise UserError(f"manifest is damaged ({error})", where=where) from None


def tensor_of(file: Any, name: str) -> Any:
    """A tensor of an open safetensors file, NumPy's or torch's. ValueError for a type that NumPy does not have."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _NUMPY_TYPES:
        raise ValueError(f"{name} is of type {dtype}")
    return file.get_tensor(name)


def torchao_names(name: str) -> tuple[str, str]:
    """The tensors that torchao keeps a packed weight's integers and scales in, when a state dict is in a safetensors file."""
    module, _, leaf = name.rpartition(".")
    return f"{module}._{leaf}_qdata", f"{module}._{leaf}_scale"


def raw_bytes(file: Any, name: str) -> bytes:
    """A one-dimensional uint8 tensor of an open safetensors file, as bytes. ValueError for any other tensor."""
    tensor = tensor_of(file, name)
    if str(tensor.dtype).removeprefix("torch.") != "uint8" or tensor.ndim != 1:
        raise ValueError(f"{name} is not a row of bytes")
    return np.asarray(tensor).tobytes()


def spans(layers: Sequence[LayerRecord], shape: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Where each layer's payload begins and ends in a codes tensor of ``shape``. ValueError when they do not fill it."""
    ends = list(itertools.accumulate(record.packed_bytes for record in layers))
    if (ends[-1:] or [0]) != list(shape):
        raise ValueError("payloads do not fill the codes")
    return {record.name: (end - record.packed_bytes, end) for record, end in zip(layers, ends, strict=True)}


def _litert_manifest(path: Path) -> tuple[str, bytes]:
    """csq's manifest out of a .tflite: the certificate's part, and the deflated rest."""
    if not path.is_file():
        raise no_such_file(path)
    try:
        with open(path, "rb") as file:
            parts = []
            for key in (METADATA_KEY, MANIFEST_TENSOR):
                begin, end = litert_span(file, path.stat().st_size, key, where=str(path))
                file.seek(begin)
                parts.append(file.read(end - begin))
        return parts[0].decode("utf-8"), parts[1]
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("manifest is damaged (not UTF-8)", where=str(path)) from None


def litert_span(file: IO[bytes], size: int, key: str, *, where: str) -> tuple[int, int]:
    """Where a part of csq's manifest begins and ends in a .tflite of ``size`` bytes. UserError for any other file."""
    try:
        span = flatbuffer.metadata_span(file, size, key)
    except ValueError as error:
        raise UserError(f"not a LiteRT file ({error})", where=where) from None
    if span is None:
        raise UserError("not a csq file (no manifest)", where=where, hint="`csq export --litert` writes one")
    if span[1] - span[0] > _JSON_BYTES:
        raise UserError(f"manifest is damaged ({span[1] - span[0]:,} bytes)", where=where)
    return span


def onnx_metadata(path: Path) -> dict[str, str]:
    """``metadata_props`` of an ONNX file: its top-level fields are skipped through, nothing else of it is parsed.

    Raises UserError for a file that is not a protobuf message, or that names a key of its metadata twice.
    """
    if not path.is_file():
        raise no_such_file(path)
    found: dict[str, str] = {}
    try:
        with open(path, "rb") as file:
            for field, value in _message_fields(file, path.stat().st_size, wanted=_METADATA_PROPS):
                if field == _METADATA_PROPS:
                    key, text = _string_entry(value)
                    if key in found:
                        raise ValueError(f"two entries named {key[:40]}")
                    found[key] = text
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except ValueError as error:
        raise UserError(f"not an ONNX file ({error})", where=str(path)) from None
    return found


def _message_fields(file: IO[bytes], size: int, *, wanted: int) -> Iterator[tuple[int, bytes]]:
    """Numbers of a protobuf message's fields, with the bytes of those that are ``wanted``. ValueError where it breaks off."""
    while file.tell() < size:
        key = _varint(file)
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            _varint(file)
            length = 0
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        elif wire_type == 2:
            length = _varint(file)
        else:
            raise ValueError(f"protobuf has no wire type {wire_type}")
        if field == 0 or length > size - file.tell():
            raise ValueError("a field that ends beyond the file")
        if field == wanted and wire_type == 2:
            if length > _ENTRY_BYTES:
                raise ValueError(f"{length:,} bytes of metadata")
            yield field, file.read(length)
        else:
            file.seek(length, 1)
            yield field, b""


def _string_entry(message: bytes) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto. ValueError for bytes that are not one."""
    parts = {1: "", 2: ""}
    for number in parts:
        for field, value in _message_fields(io.BytesIO(message), len(message), wanted=number):
            if field == number:
                parts[number] = value.decode("utf-8")
    return parts[1], parts[2]


def _varint(file: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number that does not end")


def _read_json(text: str | bytes) -> dict[str, Any]:
    if len(text) > _JSON_BYTES:
        raise ValueError(f"{len(text):,} bytes")
    return limits.read_json(text, nodes=_JSON_VALUES)
