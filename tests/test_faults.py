"""Each fault of tests/faults once, and three kill cycles, in a process of their own that forks every run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="kills and limits are POSIX")
from tests.faults.promises import FAULTS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{fault: the traceback of a broken promise, or nothing}."""
    outcome = tmp_path_factory.mktemp("faults") / "outcome.json"
    command = [sys.executable, "-m", "tests.faults", "--cycles", "3", "--seed", "0", "--json", str(outcome)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert outcome.exists(), done.stderr
    return json.loads(outcome.read_text())


@pytest.mark.parametrize("fault", ["kill -9", *FAULTS])
def test_nothing_is_lost_and_one_line_says_what_happened(broken: dict[str, str], fault: str) -> None:
    assert not broken[fault], broken[fault]
