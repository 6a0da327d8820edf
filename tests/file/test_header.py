"""The manifest out of every kind of file, without torch and without the onnx package."""

from __future__ import annotations

import builtins
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantized_models import make_file

from csqcli.errors import UserError
from csqcli.file import header, io


def varint(number: int) -> bytes:
    head = b""
    while number >= 0x80:
        head += bytes([number & 0x7F | 0x80])
        number >>= 7
    return head + bytes([number])


def entry(key: str, value: str) -> bytes:
    """``metadata_props`` as the specification of protobuf writes it: field 14 of {1: key, 2: value}."""
    body = b"".join(bytes([tag]) + varint(len(t.encode())) + t.encode() for tag, t in ((0x0A, key), (0x12, value)))
    return b"\x72" + varint(len(body)) + body


@pytest.mark.parametrize("form", ["compact", "int8-packed", "bit-packed", "state-dict"])
def test_every_form_is_described_without_torch(tmp_path: Path, form: str) -> None:
    path = tmp_path / "model.safetensors"
    io.write(path, make_file("csq:digits_cnn"), form=form)  # type: ignore[arg-type]
    script = (
        "import sys; from csqcli.file.header import read_manifest; m = read_manifest(sys.argv[1]); "
        "assert 'torch' not in sys.modules; print(m.form, len(m.layers), m.sizes.file_bytes)"
    )
    run = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == [form, "4", str(path.stat().st_size)]


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=300), max_size=4), st.binary(max_size=300))
def test_onnx_metadata_is_found_among_other_fields(tmp_path_factory, entries: dict[str, str], graph: bytes) -> None:
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    other = b"\x08\x0a" + b"\x3a" + varint(len(graph)) + graph  # ir_version 10; field 7 is the graph
    path.write_bytes(other + b"".join(entry(*pair) for pair in entries.items()) + b"\x08\x0a")
    assert header.onnx_metadata(path) == entries


def test_onnx_metadata_is_what_the_onnx_package_reads(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, {"csq": "{}", "names": "größer"})
    onnx.save(model, tmp_path / "a.onnx")
    assert header.onnx_metadata(tmp_path / "a.onnx") == {"csq": "{}", "names": "größer"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x3a\xff\xff\xff\xff\x0f", "a field that ends beyond the file"),
        (b"\x3a\xff", "a number that does not end"),
        (b"\x0b", "no wire type 3"),
        (b"\x72\x03\x0a\x05a", "a field that ends beyond the file"),
        (b"\x72\x03\x0a\x01\xff", "utf-8"),
        (entry("csq", "{}") + entry("csq", "{}"), "two entries named csq"),
        (b"\xff" * 20, "a number that does not end"),
    ],
)
def test_damaged_onnx_is_one_clear_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"not an ONNX file .*{complaint}"):
        header.read_manifest(path)


@given(st.binary(max_size=60))
def test_any_bytes_are_onnx_metadata_or_refused(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert all(isinstance(value, str) for value in header.onnx_metadata(path).values())


def test_a_missing_onnx_package_does_not_keep_a_file_from_being_described(tmp_path: Path, monkeypatch) -> None:
    text = make_file("csq:digits_cnn").manifest.model_dump_json()
    (tmp_path / "a.onnx").write_bytes(entry("csq", text))
    honest = builtins.__import__

    def guarded(name: str, *rest, **more):
        assert name.partition(".")[0] != "onnx"
        return honest(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert header.read_manifest(tmp_path / "a.onnx").model.source == "csq:digits_cnn"
