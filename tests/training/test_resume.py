"""A process that is asked to stop is resumed to the bytes of one that was left alone; tests/faults has all other ways to end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from csqcli import pipeline
from csqcli.recipe.resolve import resolve
from csqcli.system.progress import Display

ARGUMENTS = [
    "search",
    "--recipe",
    "digits",
    "--target-bits",
    "1.5",
    "--epochs",
    "4",
    "--finetune-epochs",
    "2",
    "--quiet",
]
SAVES = {"save_every_minutes": 0.003}  # every 180 ms, so that signals fall into saves too


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("unbroken")
    recipe = resolve("digits", {"quantization.target_bits": 1.5, "epochs": 4, "finetune.epochs": 2, **SAVES})
    pipeline.search(recipe, output, display=Display(quiet=True))
    return (output / "model.safetensors").read_bytes()


def test_a_process_that_is_told_to_stop_saves_the_step_and_says_how_to_go_on(
    csq, unbroken: bytes, tmp_path: Path
) -> None:
    command = [*ARGUMENTS, *(word for key, value in SAVES.items() for word in ("--set", f"{key}={value}"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "csqcli", *command, "-o", str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (tmp_path / "resume.pt").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.startswith("csq: stopped and saved (")
    assert "--resume" in err
    assert err.count("\n") == 1
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert f"epoch {state['epoch'] + 1}, batch {state['batch']}" in err
    code, _, err = csq(*command, "-o", tmp_path, "--resume")
    assert code == 0, err
    assert (tmp_path / "model.safetensors").read_bytes() == unbroken
