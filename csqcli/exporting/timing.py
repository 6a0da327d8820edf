"""Seconds of several ways to do the same, taken in turns so that a busy machine slows all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LATENCY_REPEATS = 9
_MOST_CALLS = 1000  # of one turn


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over all turns: the median, and the quartiles below and above it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Of at least one turn."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0])
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high)

    def described(self) -> dict[str, float]:
        """In milliseconds, for JSON."""
        return {"ms": 1000 * self.median, "low_ms": 1000 * self.low, "high_ms": 1000 * self.high}


def interleaved(
    runs: Sequence[Callable[[], object]], *, repeats: int = LATENCY_REPEATS, least_seconds: float = 0.0
) -> list[Timing]:
    """Each callable's timing over ``repeats`` turns, after one that pays for lazy initialisation and is not counted.

    A turn calls each as often as it takes to fill about ``least_seconds``, for work that is short beside the clock's own.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    calls = [1] * len(runs)
    for repeat in range(repeats + 1):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            for _ in range(calls[index]):
                run()
            passed = (time.perf_counter() - started) / calls[index]
            if repeat:
                seconds[index].append(passed)
            elif least_seconds:
                run()  # the first call is slower than those that are counted
                started = time.perf_counter()
                run()
                once = max(time.perf_counter() - started, 1e-9)
                calls[index] = min(max(math.ceil(least_seconds / once), 1), _MOST_CALLS)
    return [Timing.of(values) for values in seconds]


def interleaved_medians(runs: Sequence[Callable[[], object]], *, repeats: int = LATENCY_REPEATS) -> list[float]:
    """Median seconds of each callable, see :func:`interleaved`."""
    return [timing.median for timing in interleaved(runs, repeats=repeats)]
