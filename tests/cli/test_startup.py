"""What needs no torch does not import it: help, reports, recipes, and whatever is wrong in a command line or recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "file" / "fixtures" / "digits_schema1.safetensors"
SCRIPT = """
import contextlib, io, json, sys
from csqcli.cli.app import main
for line in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["csq", *line.split()]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    loaded = sorted({"torch", "timm", "torchvision", "onnx"} & set(sys.modules))
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue(), "loaded": loaded}))
"""


def run(lines: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What each command line said, in turn, in one process that has not loaded anything."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


DESCRIBES = {
    "--help": "search",
    "-h": "search",
    "--version": "csq 0",
    "search --help": "--target-bits",
    "search -h": "--target-bits",
    "export -h": "--bit-packed",
    "recipes": "digits",
    "recipes list": "digits",
    "recipes show digits": "batch_size:",
    "recipes schema": "properties",
    "methods": "csq",
    f"report {FILE}": "mean bits",
    f"report {FILE} --json": '"payload_sha256"',
}
WRONG = {
    "serach": "no command `serach`",
    "search --target-bit 2": "no option `--target-bit`",
    "search --recipe digits --epochs three": "Invalid value for '--epochs'",
    "search --recipe digits --batch-size many": "neither a number of images nor auto",
    "search --recipe digit": "did you mean `digits`?",
    "search --recipe digits --set epoch=3": "did you mean `epochs`?",
    "search --recipe digits --set epochs=-1 --target-bits 2": "epochs: Input should be greater than or equal to 0",
    "search --recipe wrong.yaml": "unknown key `quantisation`",
    "search --recipe digits --target-bits 99": "target_bits 99 is too many; at most 8",
    "search --recipe digits --method csqq --target-bits 2": "did you mean",
    "search --recipe digits --method ste --target-bits 1.5": "the same planes",
    "search": "no model given",
    "search resnet18": "no target given",
    "search resnet18 --target-bits 3": "no data given",
    "finetune nothing.safetensors": "no such file",
    "evaluate nothing.safetensors --data digits": "no such file",
    "report wrong.yaml": "not a safetensors file",
    "export nothing.safetensors": "0 forms chosen",
    "export nothing.safetensors --onnx --bit-packed": "2 forms chosen",
    "export nothing.safetensors --form bit-paked": "did you mean `bit-packed`",
    "export nothing.safetensors --bit-packed --target openvino": "--target belongs to --onnx",
    "export nothing.safetensors --onnx --calib digits": "--calib belongs to --activations int8",
    "export nothing.safetensors --onnx": "no such file",
}


@pytest.fixture(scope="module")
def described() -> dict[str, dict[str, Any]]:
    return run(list(DESCRIBES), ROOT)


@pytest.mark.parametrize("arguments", DESCRIBES)
def test_what_only_describes_loads_no_torch(arguments: str, described: dict[str, dict[str, Any]]) -> None:
    found = described[arguments]
    assert (found["code"], found["loaded"]) == (0, []), found["err"]
    assert DESCRIBES[arguments] in found["out"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "wrong.yaml").write_text("quantisation: {target_bits: 2}\n")
    found = run(list(WRONG), folder)
    assert [path.name for path in folder.iterdir()] == ["wrong.yaml"]
    return found


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_said_before_torch_is_loaded(arguments: str, refused: dict[str, dict[str, Any]]) -> None:
    found = refused[arguments]
    assert (found["code"], found["loaded"]) == (2, []), found["err"]
    assert WRONG[arguments] in found["err"]
    assert found["err"].count("\n") == 1


ROOMS = ("api", "cli", "exporting", "file", "models", "recipe", "reporting", "system")


@pytest.mark.parametrize("package", ["csqcli", *(f"csqcli.{room}" for room in ROOMS)])
def test_importing_a_room_loads_no_torch(package: str) -> None:
    script = f"import sys, {package}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
