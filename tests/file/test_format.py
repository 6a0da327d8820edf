"""docs/format.md is enough to read a bit-packed file: three readers that share nothing with csq find what is in the test vectors.

The one in Python below was written from that text alone; section numbers are its.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csqcli.file import io
from tests.file.vectors import FOLDER, write

READERS = Path(__file__).parents[2] / "docs" / "readers"
VECTORS = sorted(FOLDER.glob("*.safetensors"))
Found = tuple[
    dict[str, str], dict[str, dict[str, Any]]
]  # SHA-256 of integers by layer; dtype, shape, SHA-256 by tensor

NUMPY = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "V2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
}
NUMPY |= {"int8": "i1", "uint8": "u1", "bool": "?"}


def inflate(data: bytes, size: int, *, exact: bool = True) -> bytes:  # section 4
    stream = zlib.decompressobj(-15)
    raw = stream.decompress(data, size + 1)
    if len(raw) > size or not stream.eof or stream.unused_data or (exact and len(raw) < size):
        raise ValueError("a stream that does not end with its tensor")
    return raw


def read(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Integers by layer, and the state dict."""
    (length,) = struct.unpack_from("<Q", data)  # section 1
    header = json.loads(data[8 : 8 + length])

    def tensor(name: str) -> bytes:
        start, end = header[name]["data_offsets"]
        if header[name]["dtype"] != "U8" or not 0 <= start <= end <= len(data) - 8 - length:
            raise ValueError(f"{name} is damaged")
        return data[8 + length + start : 8 + length + end]

    head = json.loads(header["__metadata__"]["csq"])  # section 2
    if head["schema_version"] not in (1, 2):
        raise ValueError("unknown version")
    manifest = json.loads(inflate(tensor("csq_manifest"), 2**23, exact=False))
    others = unpack(manifest.get("packed_others", []), tensor)
    payloads, digest, integers, state = tensor("csq_codes"), hashlib.sha256(), {}, {}
    for layer in manifest["layers"]:
        name, size = layer["name"], layer["packed_bytes"]
        if size > len(payloads):
            raise ValueError("payloads beyond the codes")
        q = decode(payloads[:size], layer["encoding"], layer["shape"])
        payloads = payloads[size:]
        digest.update(name.encode() + b"\0" + q.tobytes())  # section 7
        integers[name] = q
        weight = weigh(layer, q, others)
        state |= dict.fromkeys([name, *layer.get("aliases", [])], weight)
    if payloads or digest.hexdigest() != manifest["payload_sha256"]:
        raise ValueError("integers are damaged")
    return integers, state | others


def unpack(records: list[dict[str, Any]], tensor: Callable[[str], bytes]) -> dict[str, np.ndarray]:  # section 5
    values = {}
    kinds = [record.get("stored") or record["dtype"] for record in records]
    for kind in dict.fromkeys(kinds):
        members = [record for record, own in zip(records, kinds, strict=True) if own == kind]
        counts = [int(np.prod(record["shape"], dtype=object)) for record in members]
        width = np.dtype(NUMPY[kind]).itemsize
        raw = np.frombuffer(inflate(tensor(f"csq_{kind}"), sum(counts) * width), np.uint8).reshape(width, -1)
        flat = np.ascontiguousarray(raw.T).reshape(-1).view(NUMPY[kind])
        for record, part in zip(members, np.split(flat, np.cumsum(counts)[:-1]), strict=True):
            if record.get("stored"):
                if not np.isfinite(part).all():
                    raise ValueError("not finite")
                part = np.ldexp(part.astype(np.float64), -record.get("exponent", 0)).astype("<f4")
            values[record["name"]] = part.reshape(record["shape"])
    return values


def decode(payload: bytes, encoding: str, shape: list[int]) -> np.ndarray:  # section 3
    codes, _, coder = encoding.partition("+")
    width, count = {"codes2": 2, "codes4": 4, "codes8": 8, "codes16": 16}[codes], int(np.prod(shape, dtype=object))
    size = -(-count * width // 8)
    if coder:
        payload = inflate(payload, size)
    if len(payload) != size:
        raise ValueError("codes that do not fill their shape")
    data = np.frombuffer(payload, np.uint8).astype(int)
    if width == 16:
        code = data[:count] + 256 * data[count:]
    else:
        i = np.arange(count)
        code = data[i * width // 8] >> (i * width % 8) & (2**width - 1)
    return (code - 2 ** (width - 1) + 1).astype("<i2").reshape(shape)


def weigh(layer: dict[str, Any], q: np.ndarray, others: dict[str, np.ndarray]) -> np.ndarray:  # section 6
    name, dim = layer["name"], layer.get("channel_dim", 0)
    along = [1] * q.ndim
    along[dim] = -1
    if layer.get("basis") is None:
        scale = others.pop(f"{name}_scale") if layer["scale"] == [] else np.array([layer["scale"]], np.float32)
        return q.astype("<f4") * scale.reshape(along)
    basis = others.pop(f"{name}_basis")
    k = layer["mask"].count("1")
    if len(basis) != k or not (q % 2 != 0).all() or np.abs(q).max() >= 2**k:
        raise ValueError("no sum of digits")
    c = (q.astype(int) + 2**k - 1) // 2
    weight = None
    for j in range(k):
        part = np.where(c >> j & 1, np.float32(1), np.float32(-1)) * basis[j].reshape(along)
        weight = part if weight is None else weight + part
    assert weight is not None
    return weight


def sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def in_python(path: Path) -> Found:
    integers, state = read(path.read_bytes())
    names = {np.dtype(kind): name for name, kind in NUMPY.items()}
    tensors = {n: {"dtype": names[v.dtype], "shape": list(v.shape), "sha256": sha256(v)} for n, v in state.items()}
    return {name: sha256(q) for name, q in integers.items()}, tensors


def in_csq(path: Path) -> Found:
    file, tensors = io.read(path), {}
    for name, value in file.state_dict().items():
        flat = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        tensors[name] = {"dtype": str(value.dtype)[6:], "shape": list(value.shape), "sha256": sha256(flat)}
    return {layer.name: sha256(layer.integers.numpy().astype("<i2")) for layer in file.layers}, tensors


def lines(text: str) -> Found:
    integers: dict[str, str] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        kind, digest, rest = line.split(" ", 2)
        if kind == "integers":
            integers[rest] = digest
        else:
            dtype, shape, name = rest.split(" ", 2)
            tensors[name] = {"dtype": dtype, "shape": json.loads(shape), "sha256": digest}
    return integers, tensors


@pytest.fixture(scope="module")
def c_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("c") / "csq_read"
    command = [compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, READERS / "csq_read.c", "-lm"]
    subprocess.run(command, check=True, capture_output=True)
    return program


@pytest.fixture(scope="module")
def js_reader() -> list[str]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js")
    return [node, str(READERS / "csq_read.mjs")]


def wanted(path: Path) -> Found:
    expected = json.loads(path.with_suffix(".json").read_text())
    return expected["integers"], expected["tensors"]


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_reader_written_from_the_text_finds_what_was_packed_and_so_does_csq(path: Path) -> None:
    assert in_python(path) == wanted(path)
    assert in_csq(path) == wanted(path)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_c_reader_finds_what_was_packed(c_reader: Path, path: Path) -> None:
    done = subprocess.run([c_reader, path], check=True, capture_output=True)
    assert lines(done.stdout.decode()) == wanted(path)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_javascript_reader_finds_what_was_packed(js_reader: list[str], path: Path) -> None:
    done = subprocess.run([*js_reader, path], check=True, capture_output=True)
    assert lines(done.stdout.decode()) == wanted(path)


def test_what_csq_writes_today_is_read_by_all(c_reader: Path, js_reader: list[str], tmp_path: Path) -> None:
    for path in write(tmp_path):
        assert in_python(path) == wanted(path)
        for command in ([str(c_reader)], js_reader):
            done = subprocess.run([*command, path], check=True, capture_output=True)
            assert lines(done.stdout.decode()) == wanted(path)


def test_a_run_s_exports_are_read_too(csq, digits_run: Path, c_reader: Path, tmp_path: Path) -> None:
    for form in ("--bit-packed", "--bit-packed-small"):
        out = tmp_path / f"a{form}.safetensors"
        assert csq("export", digits_run / "model.safetensors", form, "-o", out)[0] == 0
        done = subprocess.run([c_reader, out], check=True, capture_output=True)
        assert lines(done.stdout.decode()) == in_csq(out) == in_python(out)


def test_the_vectors_hold_every_width_coding_type_and_place_of_a_scale() -> None:
    manifests = [io.read(path).manifest for path in VECTORS]
    layers = [layer for manifest in manifests for layer in manifest.layers]
    others = [record for manifest in manifests for record in manifest.packed_others]
    assert {int(layer.encoding.removeprefix("codes").partition("+")[0]) for layer in layers} == {2, 4, 8, 16}
    assert {"huffman" in layer.encoding for layer in layers} == {False, True}
    assert {record.dtype for record in others} == set(NUMPY)
    assert {record.stored for record in others} == {None, "float16"}
    assert {(len(layer.shape) > 1 and layer.channel_dim, type(layer.scale)) for layer in layers} >= {
        (0, list),
        (1, list),
        (0, float),
    }
    assert {layer.basis and len(layer.basis[0]) for layer in layers} == {None, 1, 20}
    assert {manifest.schema_version for manifest in manifests} == {1, 2}
    assert {manifest.folded for manifest in manifests} == {False, True}


def test_the_example_of_section_3() -> None:
    assert decode(bytes.fromhex("A401"), "codes2", [5]).tolist() == [-1, 0, 1, 1, 0]


def damaged() -> Iterator[bytes]:
    rng = random.Random(0)
    for path in VECTORS:
        whole = path.read_bytes()
        for _ in range(25):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            yield bytes(data)
        yield whole[: len(whole) // 2]
        yield whole[:5]
        yield b""


def test_a_damaged_file_is_one_line_and_integers_that_changed_are_always_noticed(
    c_reader: Path, js_reader: list[str], tmp_path: Path
) -> None:
    known = [wanted(path)[0] for path in VECTORS]
    for number, data in enumerate(damaged()):
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(data)
        for command in ([str(c_reader)], js_reader) if number % 15 == 0 else ([str(c_reader)],):
            done = subprocess.run([*command, path], capture_output=True)
            if done.returncode == 0:  # a number beside the integers, or a word that no reader needs
                names = [set(integers.values()) for integers in known]
                assert set(lines(done.stdout.decode(errors="replace"))[0].values()) in names
            else:
                assert done.returncode == 2
                assert done.stderr.startswith(b"csq_read: ")
                assert done.stderr.count(b"\n") == 1
