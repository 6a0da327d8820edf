"""The command line: see the package."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import tests.faults as package
from tests.faults.kills import every_operation, kill_cycles
from tests.faults.promises import FAULTS, Faults


def main() -> None:
    """Run everything; a line for each, exit code 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50, help="kill cycles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=FAULTS, help="these other faults")
    parser.add_argument("--every-operation", action="store_true", help="also kill at each file operation in turn")
    parser.add_argument("--json", type=Path, help="write {fault: traceback or nothing} here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    outcome: dict[str, str] = {}

    def run(name: str, fault: Callable[[], str]) -> None:
        outcome[name] = ""
        try:
            print(f"ok      {name}: {fault()}", flush=True)
        except Exception:
            outcome[name] = traceback.format_exc()
            print(f"FAILED  {name}: {outcome[name]}", flush=True)

    with tempfile.TemporaryDirectory(prefix="csq-faults-") as folder:
        work = Path(folder)
        work.chmod(0o755)  # read_only_output runs as nobody
        if options.cycles:
            run("kill -9", lambda: kill_cycles(work / "kills", options.cycles, options.seed))
        if options.every_operation:
            run("kill -9 at every file operation", lambda: every_operation(work / "operations"))
        if options.only:
            (work / "faults").mkdir()
            faults = Faults(work / "faults")
            for name in options.only:
                run(name, lambda name=name: getattr(faults, name)(work / "faults" / name))  # type: ignore[misc]
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(outcome))
    sys.exit(any(outcome.values()))


if __name__ == "__main__":
    main()
