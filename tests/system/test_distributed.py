"""Two processes are one process with the doubled batch, and stop and go on together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import plain_models
import pytest
import torch
from safetensors.torch import save_file

from csqcli.errors import UserError
from csqcli.file import io
from csqcli.system import distributed, launcher, memory

TESTS = Path(__file__).parents[1]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "csqcli")
RANKS = """
import os, sys, traceback
{imports}
other, code = os.fork(), 1  # when all is imported: once for both
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if other else "1"
try:
    {body}
    code = 0
except SystemExit as end:
    code = end.code or 0
except BaseException:
    traceback.print_exc()
if other:
    code = os.waitpid(other, 0)[1] or code
sys.stderr.flush()
os._exit(bool(code))
"""


def search(output: Path, start: Path, batch_size: int) -> list[str]:
    """From a checkpoint planes are fixed early, before sums in another order have grown to a plane's difference."""
    return [
        *("search", "plain_models:group_norm_cnn", "--checkpoint", str(start), "--data", "digits", "--target-bits", "2.5"),
        *("--epochs", "4", "--set", f"batch_size={batch_size}", "--set", "save_every_minutes=0.001"),
        *("--set", "threads=1", "--quiet", "-o", str(output)),
    ]  # fmt: skip


def in_two_processes(body: str, *arguments: str, imports: str) -> None:
    """What torchrun does for two, without its own process and with one start of PyTorch between them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", RANKS.format(imports=imports, body=body), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT | group, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def train_in_two(arguments: list[str]) -> None:
    imports = "import csqcli.pipeline, plain_models; from csqcli.cli.app import main"
    in_two_processes("main()", *arguments, imports=imports)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "float.safetensors"
    save_file(plain_models.group_norm_cnn().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def together(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes, left alone."""
    output = tmp_path_factory.mktemp("together") / "run"
    train_in_two(search(output, start, 32))
    return output


def test_two_processes_end_like_one_with_the_doubled_batch(csq, start: Path, together: Path, tmp_path: Path) -> None:
    code, _, err = csq(*search(tmp_path / "alone", start, 64))
    assert code == 0, err
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "alone", together))
    assert [layer["mask"] for layer in two["layers"]] == [layer["mask"] for layer in one["layers"]]
    assert two["budget"]["mean_bits"] == one["budget"]["mean_bits"] <= 2.5
    assert two["accuracy"]["samples"] == 500
    assert two["accuracy"]["float_top1"] == one["accuracy"]["float_top1"]
    for alone, of_two in zip(*(_layers(folder) for folder in (tmp_path / "alone", together)), strict=True):
        differing = (alone != of_two).float().mean()
        assert differing < 0.05  # sums in another order flip few roundings
    assert {p.name for p in together.iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}


def test_processes_that_are_told_to_stop_save_the_same_step_and_go_on_bit_for_bit(
    start: Path, together: Path, tmp_path: Path
) -> None:
    """SIGTERM to the launcher, as a scheduler sends it."""
    output = tmp_path / "stopped"
    command = [sys.executable, *TORCHRUN, *search(output, start, 32)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (output / "resume.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("csq: stopped and saved (") == 1
    state = torch.load(output / "resume.pt", weights_only=True)
    assert f"epoch {state['epoch'] + 1}, batch {state['batch']})" in err
    train_in_two([*search(output, start, 32), "--resume"])
    assert (output / "model.safetensors").read_bytes() == (together / "model.safetensors").read_bytes()


def test_all_processes_learn_the_smallest_value() -> None:
    in_two_processes(
        "shard, device = distributed.start(torch.device('cpu')); "
        "assert distributed.all_reduce_min(2**40 + 7 - shard.rank, device) == 2**40 + 6; distributed.stop()",
        imports="import torch; from csqcli.system import distributed",
    )


def _layers(folder: Path) -> list[torch.Tensor]:
    return [layer.integers for layer in io.read(folder / "model.safetensors").layers]


def test_fingerprints_tell_states_apart_by_a_single_bit() -> None:
    state = {"a": [torch.zeros(3), torch.ones(2)], "step": 3}
    other = {"a": [torch.zeros(3), torch.tensor([1.0, 1.0000001])], "step": 3}
    assert distributed.fingerprint(state) == distributed.fingerprint({"a": [torch.zeros(3), torch.ones(2)], "step": 3})
    assert distributed.fingerprint(state) != distributed.fingerprint(other)


def test_a_single_process_needs_no_group() -> None:
    assert distributed.sum_counts((1, 2), torch.device("cpu")) == [1, 2]
    assert distributed.from_main("x") == "x"
    assert distributed.all_reduce_min(3, torch.device("cpu")) == 3
    distributed.check_equal(torch.ones(1), what="nothing")


@pytest.mark.parametrize("value", [torch.zeros(0), torch.tensor(1.5), torch.zeros(2, 3, dtype=torch.bfloat16)])
def test_fingerprints_take_every_tensor(value: torch.Tensor) -> None:
    assert len(distributed.fingerprint(value)) == 64


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set"),
        ({"RANK": "abc"}, "environment variable RANK: `abc` is not a number"),
        ({"WORLD_SIZE": "0"}, "there is no group of 0 processes"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "door"},
            "the processes do not find each other",
        ),
        ({"WORLD_SIZE": "many"}, "environment variable WORLD_SIZE: `many` is not a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "abc", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "environment variable RANK: `abc` is not a number",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK is 2 and WORLD_SIZE 2",
        ),
    ],
)
def test_a_launchers_variables_that_cannot_be_are_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], complaint: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        distributed.start(torch.device("cpu"))
    assert complaint in caught.value.line()


def test_a_rank_without_a_group_silences_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "5")
    assert launcher.is_main_process()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert not launcher.is_main_process()


@pytest.mark.parametrize("value", ["abc", "-1", "9" * 5000])
def test_processes_on_this_machine_are_counted_or_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert memory.free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(UserError, match=r"variable LOCAL_WORLD_SIZE: `.* is not a number"):
        memory.free_bytes(torch.device("cpu"))
