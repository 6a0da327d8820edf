"""A run that is asked to stop and resumed ends in the same bytes as one that was left alone; faults.py has kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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
SAVES = ["--set", "save_every_minutes=0.003"]  # every 180 ms, so that signals fall into saves too


def start(output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "csqcli", *ARGUMENTS, *SAVES, "-o", str(output), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_training(process: subprocess.Popen[str], output: Path, since: float) -> bool:
    """Until a state newer than ``since`` is on disk; False when the process ended first."""
    state = output / "resume.pt"
    while process.poll() is None:
        try:
            if state.stat().st_mtime > since:
                return True
        except FileNotFoundError:
            pass
        time.sleep(0.005)
    return False


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("unbroken")
    process = start(output)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_the_step_and_says_how_to_go_on(
    unbroken: bytes, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    process = start(tmp_path)
    assert wait_for_training(process, tmp_path, 0)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith("csq: stopped and saved (")
    assert "--resume" in err
    assert err.count("\n") == 1
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert f"epoch {state['epoch'] + 1}, batch {state['batch']}" in err
    if signum == signal.SIGINT:  # the state is the same; one resumed run is enough
        return
    process = start(tmp_path, "--resume")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert (tmp_path / "model.safetensors").read_bytes() == unbroken
