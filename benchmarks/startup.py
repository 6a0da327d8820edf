"""How long csq takes to say something, and how much memory: ``python benchmarks/startup.py [FILE]``.

Each command runs in a process of its own, ``--repeats`` times; the fastest run is what the machine can do, the median what it
did. Reported are wall-clock seconds, processor seconds and the largest resident memory. Machine and versions are printed first.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).parents[1] / "tests" / "file" / "fixtures" / "digits_schema1.safetensors"
LIMITS = {"--help": (0.3, None), "report": (0.7, 100)}  # seconds, MiB


def measure(arguments: list[str]) -> tuple[float, float, float]:
    """Wall-clock seconds, processor seconds, and MiB at the peak, of one run."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "csqcli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default=str(FILE), help="a quantized file to report")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    packages = " ".join(f"{name} {version(name)}" for name in ("typer", "pydantic", "rich", "numpy", "safetensors"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}")
    print(f"{'command':<24} {'fastest':>8} {'median':>8} {'CPU':>8} {'memory':>10}")
    for arguments in (["--help"], ["report", options.file], ["recipes"], ["methods"], ["search", "--recipe", "digit"]):
        runs = [measure(arguments) for _ in range(options.repeats + 1)][1:]  # the first one fills the file cache
        wall, cpu, memory = zip(*runs, strict=True)
        seconds, mebibytes = LIMITS.get(arguments[0], (None, None))
        over = (seconds and min(wall) > seconds) or (mebibytes and max(memory) > mebibytes)
        print(
            f"{'csq ' + ' '.join(map(os.path.basename, arguments)):<24.24} {min(wall):>7.2f}s {statistics.median(wall):>7.2f}s "
            f"{statistics.median(cpu):>7.2f}s {max(memory):>7.0f}MiB{'  over its limit' if over else ''}"
        )


if __name__ == "__main__":
    main()
