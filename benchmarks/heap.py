"""A training step with and without memory that stays with the process (`csqcli.system.heap`): milliseconds and peak memory.

    python benchmarks/heap.py --rounds 5 tf_efficientnet_lite0:128 resnet18:224

One thread, batches of 32 random images, forward and backward, each way in a process of its own, in turns; medians. System
time is what the kernel spends on clearing and mapping pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

STEPS = """
import json, resource, sys, time
name, size, keep = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kept"
if keep:
    from csqcli.system.heap import keep_freed_memory
    assert keep_freed_memory({}), "needs Linux with glibc"
import timm, torch
torch.set_num_threads(1)
model = timm.create_model(name, num_classes=10).train()
images = torch.randn(32, 3, size, size)
def step():
    model(images).sum().backward()
step(), step()
began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
for _ in range(4):
    step()
seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([seconds / 4, (after.ru_stime - before.ru_stime) / 4, after.ru_maxrss * 1024]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL:PIXELS")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for model in given.models:
        name, _, size = model.partition(":")
        found: dict[str, list[list[float]]] = {"as it is": [], "kept": []}
        for _ in range(given.rounds):
            for way, rows in found.items():
                command = [sys.executable, "-c", STEPS, name, size, way]
                rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        medians = {
            way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()
        }
        for way, (seconds, system, peak) in medians.items():
            print(
                f"{model:<32} {way:<9} {1000 * seconds:6.0f} ms a step, {1000 * system:5.0f} of the system, {peak / 2**20:,.0f} MiB"
            )
        print(f"{model:<32} {medians['as it is'][0] / medians['kept'][0]:.2f} times faster", flush=True)


if __name__ == "__main__":
    main()
