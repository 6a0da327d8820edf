"""What needs no torch does not import it: help, reports, recipes, and whatever is wrong in a command line or recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "file" / "fixtures" / "digits_schema1.safetensors"
SCRIPT = """
import sys
from csqcli.cli.app import main
sys.argv = ["csq", *sys.argv[1:]]
try:
    main()
except SystemExit as error:
    loaded = {"torch", "timm", "torchvision", "onnx"} & set(sys.modules)
    assert not loaded, loaded
    sys.exit(error.code)
"""


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    root = str(Path(__file__).parents[2])
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or root, env=_environment(root))


def _environment(root: str) -> dict[str, str]:

    return {**os.environ, "PYTHONPATH": root}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("--help", "search"),
        ("-h", "search"),
        ("--version", "csq 0"),
        ("search --help", "--target-bits"),
        ("search -h", "--target-bits"),
        ("export -h", "--bit-packed"),
        ("recipes", "digits"),
        ("recipes list", "digits"),
        ("recipes show digits", "batch_size:"),
        ("recipes schema", "properties"),
        ("methods", "csq"),
        (f"report {FILE}", "mean bits"),
        (f"report {FILE} --json", '"payload_sha256"'),
    ],
)
def test_what_only_describes_loads_no_torch(arguments: str, shown: str) -> None:
    done = run(*arguments.split())
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("serach", "No such command"),
        ("search --target-bit 2", "No such option"),
        ("search --recipe digits --epochs three", "Invalid value for '--epochs'"),
        ("search --recipe digits --batch-size many", "neither a number of images nor auto"),
        ("search --recipe digit", "did you mean `digits`?"),
        ("search --recipe digits --set epoch=3", "did you mean `epochs`?"),
        (
            "search --recipe digits --set epochs=-1 --target-bits 2",
            "epochs: Input should be greater than or equal to 0",
        ),
        ("search --recipe wrong.yaml", "unknown key `quantisation`"),
        ("search --recipe digits --target-bits 99", "more than max_bits 8"),
        ("search --recipe digits --method csqq --target-bits 2", "did you mean"),
        ("search --recipe digits --method ste --target-bits 1.5", "the same planes"),
        ("search", "no model given"),
        ("search resnet18", "no target given"),
        ("search resnet18 --target-bits 3", "no data given"),
        ("finetune nothing.safetensors", "no such file"),
        ("evaluate nothing.safetensors --data digits", "no such file"),
        ("report wrong.yaml", "not a safetensors file"),
        ("export nothing.safetensors", "0 forms chosen"),
        ("export nothing.safetensors --onnx --bit-packed", "2 forms chosen"),
        ("export nothing.safetensors --form bit-paked", "did you mean `bit-packed`"),
        ("export nothing.safetensors --bit-packed --target openvino", "--target belongs to --onnx"),
        ("export nothing.safetensors --onnx --calib digits", "--calib belongs to --activations int8"),
        ("export nothing.safetensors --onnx", "no such file"),
    ],
)
def test_what_is_wrong_is_said_before_torch_is_loaded(tmp_path: Path, arguments: str, complaint: str) -> None:
    (tmp_path / "wrong.yaml").write_text("quantisation: {target_bits: 2}\n")
    done = run(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong.yaml"]


ROOMS = ("api", "cli", "exporting", "file", "models", "recipe", "reporting", "system")


@pytest.mark.parametrize("package", ["csqcli", *(f"csqcli.{room}" for room in ROOMS)])
def test_importing_a_room_loads_no_torch(package: str) -> None:
    script = f"import sys, {package}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
