"""Every architecture of timm and torchvision through csq, once: the table of docs/coverage.md.

    python benchmarks/model_sweep.py --results FILE.jsonl [--only GLOB] [--max-parameters MILLIONS] [--jobs N]
        [--retry-failed] [--minutes PER_MODEL] [--memory GIB] [--method staged|csq] [--table docs/coverage.md]

Random weights (all-zero tensors are filled too), 10 classes, a batch of two images of noise, the smallest input that the
model takes (its own size where it takes no other). `check` says what is asserted. Each model has a process of its own, with
a limit on time and memory; a result is a line of FILE.jsonl, written when the model is done, and a second start goes on
with those that have none.
``--table`` writes the page from the results there are; it runs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import logging
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import csqcli
from csqcli.file import io
from csqcli.models import libraries as sources
from csqcli.models.coverage import coverage, example_inputs
from csqcli.quant.hard_layer import spread
from csqcli.quant.layers import Layer, find_layers
from csqcli.quant.method_settings import PAPER, CSQSettings
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.csq import BitLevelCSQ, max_abs_scale
from csqcli.quant.methods.staged import Staged
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups
from csqcli.training.loop import logits_of

CLASSES, BATCH, TARGET_BITS, STEPS = 10, 2, 3, 100
SIZES = (64, 96, 128, 160, 192, 224, 256)  # tried in order, below the model's own


@dataclass
class Progress:
    """Where a check is, for the report of a failure."""

    stage: str = "build"
    facts: dict[str, Any] = field(default_factory=dict)


def check(
    source: str,
    folder: Path,
    progress: Progress,
    *,
    method: str = "staged",
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """One model through csq; AssertionError, or whatever is raised on the way, when a claim does not hold.

    ``arguments`` go to the model's constructor.

    1. `csq inspect`'s coverage: at least one weight, and multiply-accumulates counted.
    2. The model at step 0 is the 8-bit rounded model: every weight integers · step within half a step of the original
       one, and the outputs those of exactly these integers.
    3. One training step: finite loss, masks moved, and every weight with a gradient has moved its latent.
    4. Hardened: at most 3 planes per weight.
    5. Saved and loaded: the same outputs to the last bit, state dict strict and equal; bit-packed likewise.
    """
    spec = sources.parse(source, arguments)
    task = sources.task_of(spec)
    torch.manual_seed(0)
    model = sources.build(spec, num_classes=CLASSES).float()
    for parameter in model.parameters():  # zero heads, zero last norms: nothing behind them would get a gradient
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    facts = progress.facts
    facts["parameters"] = sum(p.numel() for p in model.parameters())

    progress.stage = "input"
    config = sources.data_config(model, spec)
    size, outputs = smallest_input(model, task, config["input_size"])
    facts["input_size"] = list(size)
    images = example_inputs(task, size, batch=BATCH)

    progress.stage = "inspect"
    found = coverage(model, size, task=task)
    layers, _ = find_layers(model)
    facts |= {key: found[key] for key in ("quantized_weights", "parameter_share", "macs", "mac_share")}
    facts |= {"layers": len(layers), "left_float": [[t["name"], t["shape"], t["why"]] for t in found["left_float"]]}
    facts["uncounted"] = [layer["name"] for layer in found["layers"] if layer["macs"] is None]
    assert 0 < found["parameter_share"] <= 1
    assert found["macs"] > 0, "no multiply-accumulates counted"

    progress.stage = "initialise"
    originals = [layer.parameter.detach().clone() for layer in layers]
    chosen = make_method(method, layers)
    base = torch.optim.SGD(base_groups(model, chosen), lr=1e-3)
    optimizer = QuantizedOptimizer(chosen, base)

    progress.stage = "step 0"
    if isinstance(chosen, Staged):
        assert chosen.search is not None
        steps = [widths[-1] for widths in chosen.search.scales]
    else:
        steps = [max_abs_scale(original) / 255 for original in originals]
    check_step_0(model, task, images, layers, originals, steps, outputs)
    del originals

    progress.stage = "train"
    gates = masks_of(chosen).clone()
    optimizer.zero_grad()
    model.train()
    loss = training_loss(model, task, images, facts)
    facts["loss"] = float(loss.detach())
    assert torch.isfinite(loss), f"the loss is {float(loss)}"
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # BatchNorm over two random images has steep slopes
    slopes = [0.0 if layer.parameter.grad is None else float(layer.parameter.grad.abs().max()) for layer in layers]
    moved = [slope > 1e-14 for slope in slopes]  # Adam adds 1e-12 to its size
    facts["without_gradient"] = [layer.name for layer, has in zip(layers, moved, strict=True) if not has]
    before = [state.detach().clone() for state in weight_states(chosen)]
    optimizer.step()
    optimizer.zero_grad()
    assert any(moved), "no weight has a gradient"
    assert not torch.equal(masks_of(chosen), gates), "the masks did not move"
    rows = zip(layers, weight_states(chosen), before, moved, strict=True)
    still = [layer.name for layer, state, old, has in rows if has and torch.equal(state, old)]
    assert not still, f"weights with a gradient whose state did not change: {still[:3]}"
    del before

    progress.stage = "harden"
    path = folder / "model.safetensors"
    optimizer.harden()
    planes = sum(layer.planes * layer.integers.numel() for layer in optimizer.hard_layers())
    facts["mean_bits"] = planes / found["quantized_weights"]
    assert planes <= TARGET_BITS * found["quantized_weights"], f"{facts['mean_bits']} planes per weight"

    progress.stage = "save"
    model.eval()
    csqcli.save(model, optimizer, path, source=source, num_classes=CLASSES, arguments=arguments, data_config=config)
    facts["file_bytes"] = path.stat().st_size
    expected, state = run(model, task, images), model.state_dict()
    assert all(tensor.isfinite().all() for tensor in expected), "the hard model gives NaN or infinite values"
    del optimizer, chosen, base

    progress.stage = "load"
    loaded = csqcli.load(path)
    assert_same(state, loaded.state_dict(), what="state dict")
    again = run(loaded, task, images)
    assert len(expected) == len(again)
    for ours, theirs in zip(expected, again, strict=True):
        assert torch.equal(ours, theirs), f"outputs differ by {float((ours - theirs).abs().max())}"
    del loaded, model

    progress.stage = "bit-packed"
    file = io.read(path)
    io.write(folder / "packed.safetensors", file, form="bit-packed")
    packed = io.read(folder / "packed.safetensors")
    assert packed.manifest.payload_sha256 == file.manifest.payload_sha256
    assert_same(file.state_dict(), packed.state_dict(), what="bit-packed state dict")
    progress.stage = "done"


def make_method(name: str, layers: list[Layer]) -> Staged | BitLevelCSQ:
    plan = plan_for(layers, TARGET_BITS, Schedule(STEPS, STEPS))
    if name == "staged":
        return Staged(layers, plan)
    return BitLevelCSQ(layers, plan, CSQSettings(**PAPER))  # whose step 0 is the 8-bit model at the largest weight


def masks_of(method: Staged | BitLevelCSQ) -> Tensor:
    """What decides how many planes are in use, while they are searched."""
    if isinstance(method, BitLevelCSQ):
        return method.bit_planes.mask_logits
    assert method.search is not None, "the planes were fixed too early"
    return method.search.soft_mask


def weight_states(method: Staged | BitLevelCSQ) -> list[Tensor]:
    """What training moves, per layer: the latent, or the bit logits m_p."""
    if isinstance(method, Staged):
        return list(method.latents)
    return [method.bit_planes.pos[:, part] for part in method.bit_planes.slices]


def check_step_0(
    model: nn.Module,
    task: str,
    images: tuple[Any, ...],
    layers: list[Layer],
    originals: list[Tensor],
    steps: list[Tensor],
    float_outputs: list[Tensor],
) -> None:
    """Claim 2. Ties of the rounding may go either way, so integers are read off the soft weight, not computed again."""
    soft = run(model, task, images, smooth=True)
    for layer, original, size in zip(layers, originals, steps, strict=True):
        step = spread(size, original, layer.channel_dim)
        weight = layer.parameter.detach()
        integers = (weight / step).round()
        assert integers.abs().max() <= 255, f"{layer.name}: beyond 8 planes"
        off = float((weight / step - integers).abs().max())
        assert off < 1e-2, f"{layer.name}: {off:.2g} of a step away from integers"
        wanted = original.clamp(min=-255 * step, max=255 * step)
        far = float(((integers * step - wanted) / step).abs().max())
        assert far < 0.51, f"{layer.name}: {far:.3g} steps away from the float weight"
        weight.copy_(integers * step)
    rounded = run(model, task, images, smooth=True)
    rows = zip(soft, rounded, float_outputs, strict=True)
    if all(_apart(ours, theirs) <= max(1e-3, 0.1 * _apart(first, theirs)) for ours, theirs, first in rows):
        return
    for (
        layer
    ) in layers:  # deep untrained networks can amplify the last bit of a weight beyond that: measure by how much
        layer.parameter.detach().mul_(1 + 2.0**-23 * torch.randn_like(layer.parameter).sign())
    shaken = run(model, task, images, smooth=True)
    for ours, theirs, other in zip(soft, rounded, shaken, strict=True):
        error, noise = _apart(ours, theirs), _apart(other, theirs)
        assert error <= 10 * noise, f"outputs {error:.2g} of their size off, {noise:.2g} by the last bit alone"


def _apart(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def training_loss(model: nn.Module, task: str, images: tuple[Any, ...], facts: dict[str, Any]) -> Tensor:
    """Cross-entropy of a classifier; otherwise the model's own losses, or the mean square of all it returns."""
    if task == "detection":
        height, width = images[0][0].shape[-2:]
        box = torch.tensor([[0.2 * width, 0.2 * height, 0.7 * width, 0.8 * height]])
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, height // 5 : height // 2, width // 5 : width // 2] = 1
        points = torch.stack([torch.linspace(0.3, 0.6, 17) * width, torch.full((17,), 0.5 * height), torch.ones(17)], 1)
        target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": mask, "keypoints": points[None]}
        output = model(images[0], [target] * BATCH)
        return sum(floats(output), torch.zeros(()))
    output = model(*images)
    facts["output"] = type(output).__name__
    scores = logits_of(output)
    facts["classifier"] = task == "classification" and scores.shape == (BATCH, CLASSES)
    if scores.shape == (BATCH, CLASSES):
        return F.cross_entropy(scores, torch.tensor([0, 1]))
    return torch.stack([tensor.square().mean() for tensor in floats(output)]).sum()


def smallest_input(model: nn.Module, task: str, own: tuple[int, ...]) -> tuple[tuple[int, ...], list[Tensor]]:
    """The smallest (C, …, H, W) that gives finite outputs in training and in eval mode, and those of eval mode.

    BatchNorm keeps the statistics of these images: untrained ones let activations grow until gates are steps. What the
    model's own size raises is raised.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    try:
        return _smallest_input(model, task, own, norms)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _smallest_input(
    model: nn.Module, task: str, own: tuple[int, ...], norms: list[Any]
) -> tuple[tuple[int, ...], list[Tensor]]:
    fixed = (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size", False)
    smaller = [] if fixed or task == "detection" else [size for size in SIZES if size < own[-1]]
    for pixels in (*smaller, None):
        size = (*own[:-2], pixels, pixels) if pixels else tuple(own)
        try:
            images, trained = example_inputs(task, size, batch=BATCH), []
            if (smaller or norms) and task != "detection":
                model.train()
                with torch.no_grad():
                    trained = floats(model(*images))
            outputs = run(model, task, images, smooth=True)
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, ZeroDivisionError):
            if pixels is None:
                raise
            continue
        if outputs and all(tensor.numel() and tensor.isfinite().all() for tensor in (*trained, *outputs)):
            return size, outputs
    raise AssertionError("no input size gives finite outputs")


@torch.no_grad()
def run(model: nn.Module, task: str, images: tuple[Any, ...], *, smooth: bool = False) -> list[Tensor]:
    """All float tensors of the output in eval mode. ``smooth``: a detector's features, before boxes are selected."""
    model.eval()
    torch.manual_seed(0)
    if smooth and task == "detection":
        return floats(model.backbone(torch.stack(images[0])))
    return floats(model(*images))


def floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor in nested lists, tuples, dicts and dataclasses."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in floats(value)]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return floats(vars(output))
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in floats(value)]
    return []


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, what: str) -> None:
    assert ours.keys() == theirs.keys(), f"{what}: keys differ in {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, f"{what}: {name} is {theirs[name].dtype}"
        assert torch.equal(value, theirs[name]), f"{what}: {name} differs"


def architectures() -> list[str]:
    """``library:name`` of everything that the two libraries list."""
    names = [f"timm:{name}" for name in timm.list_models()]
    return names + [f"torchvision:{name}" for name in torchvision.models.list_models()]


def in_order(names: list[str], sizes: dict[str, int]) -> list[str]:
    """The smallest model of every module of the libraries first, then all the others; by size."""
    modules = [[f"timm:{name}" for name in timm.list_models(module=module)] for module in timm.list_modules()]
    builders: dict[str, list[str]] = {}
    for name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__
        builders.setdefault(module, []).append(f"torchvision:{name}")
    groups = [[name for name in group if name in sizes] for group in (*modules, *builders.values())]
    first = {min(group, key=lambda name: sizes[name]) for group in groups if group}
    return sorted(names, key=lambda name: (name not in first, sizes[name]))


def count_parameters(source: str) -> int:
    """Parameters, without allocating them where the constructor reads no values."""
    spec = sources.parse(source)
    try:
        with torch.device("meta"):
            model = sources.build(spec, num_classes=CLASSES)
    except (NotImplementedError, RuntimeError):  # "Cannot copy out of meta tensor", "Tensor.item() cannot be called"
        model = sources.build(spec, num_classes=CLASSES)
    return sum(p.numel() for p in model.parameters())


def _child(source: str, method: str, connection: Connection) -> None:
    """One model in its own process; sends the result."""
    _quiet()
    progress, started = Progress(), time.perf_counter()
    result: dict[str, Any] = {"model": source, "method": method, "status": "passed"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            check(source, Path(folder), progress, method=method)
    except Exception as error:  # a failure is a line of the table
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error).strip()[:400]}"
        result |= {"status": "failed", "reason": reason, "at": f"{Path(frame.filename).name}:{frame.lineno}"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = time.perf_counter() - started
    connection.send(
        result | {"stage": progress.stage, "seconds": round(seconds, 2), "peak_gib": round(peak, 3)} | progress.facts
    )
    connection.close()


def _size_child(sources_: list[str], connection: Connection) -> None:
    _quiet()
    for source in sources_:
        try:
            connection.send((source, count_parameters(source)))
        except Exception:  # the check will say what is wrong with it
            connection.send((source, 0))
    connection.close()


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


@dataclass
class Job:
    source: str
    process: Any
    connection: Connection
    started: float
    over: str = ""


class Sweep:
    """Models in processes of their own, forked from this one, which has the libraries loaded and runs no torch itself."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.context = options, multiprocessing.get_context("fork")
        self.results = options.results

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Parameters of every model, from a file beside the results where they are known."""
        path = self.results.with_suffix(".sizes.json")
        known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        unknown = [name for name in names if name not in known]
        if unknown:
            receiver, sender = self.context.Pipe(duplex=False)
            process = self.context.Process(target=_size_child, args=(unknown, sender))
            process.start()
            sender.close()
            try:
                while True:
                    name, parameters = receiver.recv()
                    known[name] = parameters
            except EOFError:
                process.join()
            path.write_text(json.dumps(known))
        return known

    def run(self, queue: list[str]) -> None:
        waiting, running = queue[::-1], list[Job]()
        while waiting or running:
            while waiting and len(running) < self.options.jobs:
                running.append(self._start(waiting.pop()))
            time.sleep(0.02)
            for job in list(running):
                if result := self._result(job):
                    running.remove(job)
                    with open(self.results, "a") as file:
                        file.write(json.dumps(result) + "\n")
                    left = len(waiting) + len(running)
                    print(f"{left:5d} left  {result['status']:7} {job.source}  {result.get('reason', '')}", flush=True)

    def _start(self, source: str) -> Job:
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(source, self.options.method, sender))
        process.start()
        sender.close()
        return Job(source, process, receiver, time.monotonic())

    def _result(self, job: Job) -> dict[str, Any] | None:
        """The job's result once it has ended, by itself or for going over a limit; None while it runs."""
        if job.connection.poll():
            try:
                result = job.connection.recv()
            except EOFError:
                result = None
            job.process.join()
            code = job.process.exitcode
            lost = {"model": job.source, "method": self.options.method, "status": "failed"}
            return result or lost | {"reason": job.over or f"the process ended with {code}"}
        if time.monotonic() - job.started > 60 * self.options.minutes:
            job.over = f"over the limit of {self.options.minutes:g} minutes"
        elif _resident_gib(job.process.pid) > self.options.memory:
            job.over = f"over the limit of {self.options.memory:g} GiB"
        if job.over:
            job.process.kill()
        return None


def _resident_gib(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The latest result of every model."""
    lines: Iterator[str] = iter(path.read_text().splitlines()) if path.exists() else iter(())
    return {result["model"]: result for result in map(json.loads, lines)}


_START, _END = "<!-- results -->\n", "<!-- end of results -->\n"


def table(names: list[str], sizes: dict[str, int], results: dict[str, dict[str, Any]]) -> str:
    """Markdown: counts per library, every failure, what was not run, shares covered and the models with the least."""
    passed = [result for name in names if (result := results.get(name)) and result["status"] == "passed"]
    failed = [result for name in names if (result := results.get(name)) and result["status"] != "passed"]
    waiting = [name for name in names if name not in results]
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    parts = [
        versions + ".\n",
        "| library | architectures | passed | failed | not run |\n|---|---|---|---|---|",
    ]
    for library in ("timm", "torchvision"):
        counts = [
            sum(name.startswith(f"{library}:") for name in group)
            for group in (names, [r["model"] for r in passed], [r["model"] for r in failed], waiting)
        ]
        parts.append(f"| {library} | {' | '.join(map(str, counts))} |")
    parts.append("\n### Failures\n")
    parts.append("None.\n" if not failed else "| model | stage | reason |\n|---|---|---|")
    parts += [f"| {r['model']} | {r.get('stage', '')} | {' '.join(r['reason'].split())[:200]} |" for r in failed]

    parts.append("\n### Shares covered\n")
    parts.append(
        "| share in quantized weights | of parameters: models | of multiply-accumulates: models |\n|---|---|---|"
    )
    edges = (0.99, 0.95, 0.9, 0.8, 0.5, 0.0)
    for low, high in zip(edges, (1.01, *edges), strict=False):
        label = f"{100 * low:g} % or more" if high > 1 else f"{100 * low:g} to {100 * high:g} %"
        counts = [sum(low <= r[key] < high for r in passed) for key in ("parameter_share", "mac_share")]
        parts.append(f"| {label} | {counts[0]} | {counts[1]} |")
    medians = [100 * statistics.median(r[key] for r in passed) for key in ("parameter_share", "mac_share")]
    parts.append(f"\nLeast share of parameters (median {medians[0]:.2f} %):\n")
    parts.append("| model | share | what most of the rest is |\n|---|---|---|")
    for result in sorted(passed, key=lambda r: r["parameter_share"])[:10]:
        parts.append(f"| {result['model']} | {100 * result['parameter_share']:.1f} % | {_left(result)} |")
    parts.append(
        f"\nLeast share of multiply-accumulates (median {medians[1]:.2f} %); the rest are products without a weight, which is "
        "attention over many positions:\n"
    )
    parts.append("| model | share | input |\n|---|---|---|")
    for result in sorted(passed, key=lambda r: r["mac_share"])[:10]:
        size = "×".join(map(str, result["input_size"]))
        parts.append(f"| {result['model']} | {100 * result['mac_share']:.1f} % | {size} |")

    idle = [r for r in passed if r["without_gradient"]]
    unused = [r for r in passed if r["uncounted"]]
    others = [r for r in passed if not r.get("classifier")]
    parts.append(
        f"\n{len(others)} of those that passed are no image classifiers with ten outputs; {len(unused)} have weights that no "
        f"operation of the forward pass uses in eval mode, {len(idle)} have weights whose "
        "gradient in the step taken was nothing or below 1e-14 (auxiliary heads, blocks that stochastic depth left out, products "
        "behind layer scales)."
    )
    for title, group, key in (("Unused", unused, "uncounted"), ("Without gradient", idle, "without_gradient")):
        listed = (f"{r['model']} ({len(r[key])} of {r['layers']}: {r[key][0]} …)" for r in group)
        if group:
            parts.append("\n" + _wrapped(f"{title}: {', '.join(listed)}."))
    parts.append("\n### Not run\n")
    if waiting:
        least = min(sizes[name] for name in waiting) / 1e6
        most = max(sizes[name] for name in waiting) / 1e6
        parts.append(
            f"{len(waiting)} architectures of {least:.0f} to {most:.0f} million parameters, for want of time:\n"
        )
        listed = sorted(waiting, key=lambda name: sizes[name])
        parts.append(_wrapped(", ".join(f"{name} ({sizes[name] / 1e6:.0f})" for name in listed) + ".") + "\n")
    else:
        parts.append("None.\n")
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _left(result: dict[str, Any]) -> str:
    """The largest group of parameters left float: one-dimensional ones, or tensors with one reason."""
    tensors = [(math.prod(shape), name, why) for name, shape, why in result["left_float"]]
    groups = {"norms, biases and other vectors": result["parameters"] - result["quantized_weights"]}
    for size, name, why in sorted(tensors, reverse=True):
        groups["norms, biases and other vectors"] -= size
        same = [group for group in groups if group.endswith(why)]
        key = same[0] if same else f"{name} and the like: {why}"
        groups[key] = groups.get(key, 0) + size
    most = max(groups, key=lambda key: groups[key])
    return f"{groups[most]:,} in {most}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("runs/model_sweep.jsonl"))
    parser.add_argument("--only", metavar="GLOB", help="over library:name")
    parser.add_argument("--max-parameters", type=float, default=1e4, metavar="MILLIONS")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="limit per model")
    parser.add_argument("--memory", type=float, default=20, metavar="GIB", help="limit per model")
    parser.add_argument("--method", choices=("staged", "csq"), default="staged")
    parser.add_argument("--retry-failed", action="store_true")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the results there are between its markers")
    options = parser.parse_args()

    options.results.parent.mkdir(parents=True, exist_ok=True)
    sweep, names = Sweep(options), fnmatch.filter(architectures(), options.only or "*")
    sizes = sweep.sizes(names)
    done = read_results(options.results)
    if options.table is not None:
        before, start, rest = options.table.read_text().partition(_START)
        _, end, after = rest.partition(_END)
        assert end, f"{options.table} has no markers"
        options.table.write_text(before + start + "\n" + table(names, sizes, done) + end + after)
        return
    queue = [
        name
        for name in in_order(names, sizes)
        if sizes[name] <= 1e6 * options.max_parameters
        and (name not in done or (options.retry_failed and done[name]["status"] != "passed"))
    ]
    sweep.run(queue)
    failed = [name for name, result in read_results(options.results).items() if result["status"] != "passed"]
    sys.exit(f"{len(failed)} failed" if failed else 0)


if __name__ == "__main__":
    main()
