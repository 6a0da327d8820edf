"""What the speed and memory benchmarks share: machine line, interleaved timing, fresh processes, the JSON file."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the result here; `ratio` and `ratio_of` are always in it")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return made


def machine(device: str) -> str:
    """One line: processor, threads, versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    )


def interleaved(works: Mapping[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each work, run in turns so that a slow moment of the machine hits all; first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            seconds[name].append(seconds_of(work, device))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Seconds that ``work`` takes once, until the device is done."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """``work``'s result from a process of its own, so that peaks of memory do not add up."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def peak_bytes(device: str) -> int:
    """Most memory that this process ever held: resident on a CPU, allocated on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def emit(result: dict[str, Any], path: Path | None) -> None:
    """Print the result; write it where --json says."""
    for key, value in result.items():
        print(f"{key}: {json.dumps(value)}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
