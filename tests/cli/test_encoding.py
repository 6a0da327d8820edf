"""Whatever encoding the terminal has, csq writes what it can and never fails; no name forges a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from quantized_models import make_file

from csqcli.file import io

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "file" / "fixtures" / "digits_schema1.safetensors"
ENVIRONMENTS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "latin-1 strict": {"PYTHONIOENCODING": "latin-1:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
}


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "csqcli", *map(str, arguments)]
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONIOENCODING", "LC_ALL")}
    return subprocess.run(command, capture_output=True, env=variables | {"PYTHONPATH": str(ROOT)} | environment)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_report_is_printed_in_every_encoding(name: str) -> None:
    done = run(ENVIRONMENTS[name], "report", FILE)
    assert (done.returncode, done.stderr) == (0, b"")
    arrow, times = ("→", "×") if name == "utf-8" else ("->", "x")
    text = done.stdout.decode("utf-8" if name == "utf-8" else "latin-1").replace("\xd7", "×")
    assert f"98.20 {arrow} soft" in text
    assert f"4.76{times} smaller" in text or name in ("cp1252", "latin-1 strict")


def test_a_run_and_its_errors_are_printed_in_ascii(tmp_path: Path) -> None:
    quick = ("--target-bits", 2, "--epochs", 1, "--set", "max_steps=1")
    done = run(ENVIRONMENTS["ascii"], "search", "--recipe", "digits", *quick, "-o", tmp_path / "größe")
    assert done.returncode == 0, done.stderr
    assert b"beta" in done.stderr or b"bits" in done.stderr
    assert b"gr\\xf6\\xdfe" in done.stdout
    done = run(ENVIRONMENTS["ascii"], "search", "--recipe", "digits", "--set", "epochs…")
    assert b"`epochs...` is not key=value" in done.stderr
    assert done.returncode == 2


def test_a_name_that_is_no_text_is_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.safetensors")
    done = run(ENVIRONMENTS["utf-8"], "report", tmp_path / name)
    assert done.returncode == 2
    assert b"\\udcff.safetensors: no such file" in done.stderr


def test_names_in_a_file_cannot_forge_lines_of_its_report(tmp_path: Path, csq) -> None:
    file = make_file("csq:digits_cnn")
    forged = "conv9\nmean bits    1.0000\ttop-1 100 %"
    file.manifest.layers[0].name = forged
    file.manifest.model.source = "csq:digits\nverified     all"
    file.manifest.form = "compact"
    file.layers[0] = type(file.layers[0])(**vars(file.layers[0]) | {"name": forged})
    file.manifest.payload_sha256 = io.payload_sha256(file.layers)
    io.write(tmp_path / "a.safetensors", file)
    code, out, err = csq("report", tmp_path / "a.safetensors")
    assert (code, err) == (0, "")
    assert "conv9\\nmean bits" in out
    assert sum(line.startswith("mean bits") for line in out.splitlines()) == 1
    assert not any(line.startswith("verified") for line in out.splitlines())
