"""Cases in child processes, so that a crash or a kill is reported with its number."""

from __future__ import annotations

import json
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests import commands
from tests.fuzz.cases import Case
from tests.fuzz.readers import command
from tests.fuzz.watch import Hang, Watch

GRACE = 60  # seconds of the clock after which a child that says nothing is ended


def child(corpus: Path, seed: int, first: int, last: int, keep: Path | None) -> None:
    """Run cases and print a line before and after each; parent() reads them."""
    import logging
    import warnings

    import torch

    import csqcli.exporting.runtime
    import csqcli.pipeline
    from csqcli.cli import app as cli  # noqa: F401

    commands.make_once()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        warm = Path(scratch) / "warm"
        warm.mkdir()
        for name in ("search-compact.safetensors", "search.onnx"):
            if (corpus / name).exists():
                command("report", corpus / name)
                command("evaluate", corpus / name, "--data", "digits", "--val-limit", 8)
        csqcli.load(corpus / "search-compact.safetensors")
        run = ("--recipe", corpus / "full.yaml", "--quiet", "-o", warm)
        assert command("search", *run) == "works"
        watch = Watch()
        for index in range(first, last):
            print(f"start {index}", flush=True)
            folder = Path(scratch) / "case"
            folder.mkdir()
            started = time.process_time()
            try:
                case = Case(corpus, folder, random.Random(f"{seed}:{index}"))
                with watch(folder):
                    outcome = case.run()
            except (Exception, Hang) as error:
                trace = traceback.format_exc(limit=-4)
                outcome = f"FAILED {type(error).__name__}: {str(error)[:300]}\n{trace}"
                if keep is not None:
                    shutil.copytree(folder, keep / f"case-{seed}-{index}", dirs_exist_ok=True)
            shutil.rmtree(folder)
            print(json.dumps({"case": index, "outcome": outcome, "seconds": time.process_time() - started}), flush=True)


def run(
    cases: int, seed: int, *, first: int = 0, keep: Path | None = None, corpus: Path | None = None, say: bool = False
) -> Counter[str]:
    """All cases in child processes; counts per outcome, those that start with FAILED are failures."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        if corpus is None:
            corpus = Path(scratch) / "corpus"
            subprocess.run([sys.executable, "-m", "tests.fuzz", "--build", str(corpus)], check=True)
        index, last = first, first + cases
        slowest, started = 0.0, time.monotonic()
        while index < last:
            arguments = [
                "--child",
                str(corpus),
                "--seed",
                str(seed),
                "--first",
                str(index),
                "--cases",
                str(last - index),
            ]
            arguments += ["--keep", str(keep)] if keep is not None else []
            with subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz", *arguments], stdout=subprocess.PIPE, bufsize=0
            ) as process:
                assert process.stdout is not None
                current, trouble = -1, ""
                while True:
                    ready, _, _ = select.select([process.stdout], [], [], GRACE)
                    line = process.stdout.readline().decode() if ready else ""
                    if not ready:
                        trouble = f"FAILED no answer within {GRACE} s"
                        process.kill()
                    if not line:
                        break
                    if line.startswith("start "):
                        current = int(line.split()[1])
                    elif line.startswith("{"):
                        result = json.loads(line)
                        index, current = result["case"] + 1, -1
                        slowest = max(slowest, result["seconds"])
                        _count(counts, result["outcome"], f"case {result['case']}", say)
                        if say and index % 1000 == 0:
                            spent = time.monotonic() - started
                            print(f"{index - first} cases, {spent:.0f} s, slowest {slowest:.1f} s", flush=True)
            code = process.returncode
            if index < last and current < 0:
                raise RuntimeError(f"the child ended between cases with code {code}")
            if current >= 0:
                _count(counts, trouble or f"FAILED the process ended with code {code}", f"case {current}", say)
                index = current + 1
    return counts


def _count(counts: Counter[str], outcome: str, where: str, say: bool) -> None:
    if outcome.startswith("FAILED"):
        print(f"{where}: {outcome}".encode("utf-8", "backslashreplace").decode(), flush=True)
        outcome = outcome.splitlines()[0]
    counts[outcome] += 1
