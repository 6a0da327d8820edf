"""``csq bench``: how long a network takes in an engine, as a whole and layer by layer, in fp32 and in the forms that csq exports.

All forms of a layer, and of the network, run in turns. A layer is measured alone (`layer_graphs`), on its own input shape; a
network as `csq export` would write it (`Form.twins`), or as an exported file has it (`float_twins`).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.exporting import float_twins, layer_graphs, registry, runtime, verify
from csqcli.exporting.engines import ENGINES, ENGINES_OF
from csqcli.exporting.form import Options, Subject
from csqcli.exporting.run import check_basis
from csqcli.exporting.timing import Timing, interleaved
from csqcli.file import io, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ActivationEntry, ModelRecord
from csqcli.models import libraries
from csqcli.models.coverage import Call, Operations, count_macs
from csqcli.models.spec import ModelSpec
from csqcli.quant import activations
from csqcli.quant.layers import Layer, find_layers, layers_named
from csqcli.quant.measuring import logits_of
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.ptq import PostTraining
from csqcli.system.environment import processor
from csqcli.system.progress import Display
from csqcli.training.opening import check_task
from csqcli.version import __version__

SCHEMA_VERSION = 1
_LEAST_SECONDS = 2e-3  # of a layer's turn
_PLANES, _BITS = 7, 8  # at which a float model is rounded: the most that int8 holds


@dataclass(frozen=True)
class Setting:
    """How to measure."""

    engine: str  # of `engines.ENGINES`, installed
    threads: int = 1
    batch: int = 1
    repeats: int = 15

    def described(self) -> dict[str, Any]:
        return {"engine": self.engine, "threads": self.threads, "batch": self.batch, "repeats": self.repeats}


def bench_file(path: Path, setting: Setting, *, trust_code: bool, display: Display) -> dict[str, Any]:
    """Latencies of a file that csq wrote; see :func:`csqcli.bench` for what is in them. UserError for any other file."""
    if path.suffix in ENGINES_OF:
        return _bench_exported(path, setting, display)
    with display.step(f"loading {path}"):
        file = io.read(path)
        model = loading.hard_model(file, trust_code=trust_code, where=str(path))
    if setting.engine != "torch":
        kind = registry.find(_form_of(setting.engine))
        check_basis(kind, file, where=str(path))
    size = tuple(file.manifest.data_config["input_size"])
    layers = layers_named(model, [layer.name for layer in file.layers])
    operations = count_macs(model, layers, size)
    found = _described(str(path), file.manifest.form, setting, size)
    rounded = any(entry.bits <= _BITS for entry in file.manifest.activations)
    return found | _measured(file, model, layers, operations, setting, rounded=rounded, display=display)


def bench_model(
    spec: ModelSpec,
    setting: Setting,
    *,
    input_size: int | None = None,
    num_classes: int | None = None,
    display: Display,
) -> dict[str, Any]:
    """The same of an architecture with random weights, as it would run at 7 planes and with inputs of 8 bits."""
    check_task(spec)
    with display.step(f"loading {spec.source}"):
        loaded = libraries.load(spec.source, num_classes=num_classes, pretrained=False)
    own = loaded.data_config["input_size"]
    size = (own[0], input_size, input_size) if input_size else tuple(own)
    return bench_network(loaded.model, spec, {**loaded.data_config, "input_size": size}, setting, display=display)


def bench_network(
    model: nn.Module,
    spec: ModelSpec,
    config: Mapping[str, Any],
    setting: Setting,
    *,
    exclude: Sequence[str] = (),
    display: Display,
) -> dict[str, Any]:
    """The same of a float network (CPU), whose weights are rounded by that: hand over a copy."""
    size = tuple(config["input_size"])
    layers, _ = find_layers(model.eval(), exclude=exclude)
    operations = count_macs(model, layers, size)
    file = _rounded(model, spec, config, layers)
    found = _described(spec.source, None, setting, size)
    return found | _measured(file, model, layers, operations, setting, rounded=True, display=display)


def _described(what: str, form: str | None, setting: Setting, size: tuple[int, ...]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "csq": __version__,
        "what": what,
        "form": form,
        **setting.described(),
        "input_size": list(size),
        "processor": processor(),
    }


def _form_of(engine: str) -> str:
    return "litert" if engine == "litert" else "onnx"


@torch.no_grad()
def _rounded(model: nn.Module, spec: ModelSpec, config: Mapping[str, Any], layers: Sequence[Layer]) -> QuantizedFile:
    """The network as a file of 7 planes and 8-bit inputs; it has those weights and inputs itself from then on."""
    plan = plan_for(layers, _PLANES, Schedule(0, 1), bits=_PLANES, planes=[_PLANES] * len(layers))
    method = PostTraining(layers, plan)  # every weight at its nearest level
    method.harden(0)
    hard = method.hard_layers()
    noise = _noise(config["input_size"], 4)
    classes = logits_of(model(noise[:1])).shape[1]
    quantizers = activations.calibrate(model, layers, [noise], bits=_BITS)
    record = ModelRecord(
        source=spec.source, library=spec.library, name=spec.name, num_classes=classes, weights_from="random"
    )
    entries = [ActivationEntry(**vars(entry)) for entry in quantizers.records()]
    return io.assemble(model, hard, record=record, data_config=config, target_bits=None, activations=entries)


def _noise(size: Sequence[int], images: int) -> Tensor:
    return torch.randn(images, *size, generator=torch.Generator().manual_seed(0))


def _measured(
    file: QuantizedFile,
    model: nn.Module,
    layers: Sequence[Layer],
    operations: Operations,
    setting: Setting,
    *,
    rounded: bool,
    display: Display,
) -> dict[str, Any]:
    rows = measure_layers(layers, operations, setting, display=display)
    forms = ENGINES[setting.engine].forms
    with display.step("measuring the network"), _torch_threads(setting):
        network = _network(file, model, setting, rounded=rounded)
    sums = {form: sum(_narrowest(row["latency"], forms[: at + 1]) for row in rows) for at, form in enumerate(forms)}
    return {
        "engine_version": network.pop("engine") or setting.engine,
        "forms": list(forms),
        "network": network,
        "sum_ms": sums,
        "layers": rows,
    }


def _narrowest(latency: Mapping[str, Any], forms: Sequence[str]) -> float:
    """Milliseconds in the last of ``forms``, widest first, that there is; 0 where none is."""
    return next((latency[form]["ms"] for form in reversed(forms) if latency.get(form)), 0.0)


def measure_layers(
    layers: Sequence[Layer], operations: Operations, setting: Setting, *, display: Display
) -> list[dict[str, Any]]:
    """A row per layer: ``name``, ``shape``, ``macs``, ``calls`` (how often its weight is used), ``input`` (of the first), and
    ``latency`` by form, all calls together: ``ms`` (median), ``low_ms`` and ``high_ms`` (quartiles), null where the engine
    has no such kernel; empty where nothing is measured, and ``why``."""
    forms = ENGINES[setting.engine].forms
    calls = list(
        dict.fromkeys(call for name in (layer.name for layer in layers) for call in operations.calls.get(name, ()))
    )
    timings: dict[Call, dict[str, Timing | None]] = {}
    with display.step("measuring layers", len(calls)) as tell, _torch_threads(setting):
        for number, call in enumerate(calls, 1):
            timings[call] = _time_call(layer_graphs.batched(call, setting.batch), forms, setting)
            tell(number)
    rows = []
    for layer in layers:
        own = operations.calls.get(layer.name, [])
        latency: dict[str, Any] = {}
        for form in forms if own else ():
            parts = [timings[call][form] for call in own]
            known = [part for part in parts if part is not None]
            whole = len(known) == len(parts)
            sums = Timing(*(sum(getattr(part, key) for part in known) for key in ("median", "low", "high")))
            latency[form] = sums.described() if whole else None
        why = None
        if not own:
            why = "no convolution and no matrix product reads it"
        elif not any(latency.values()):
            why, latency = "the engine does not run it", {}
        rows.append(
            {
                "name": layer.name,
                "shape": list(layer.parameter.shape),
                "macs": operations.macs.get(layer.name),
                "calls": len(own),
                "input": list(own[0].input) if own else None,
                "latency": latency,
                "why": why,
            }
        )
    return rows


def _time_call(call: Call, forms: Sequence[str], setting: Setting) -> dict[str, Timing | None]:
    ready = {form: layer_graphs.runs(setting.engine, call, form, threads=setting.threads) for form in forms}
    able = {form: run for form, run in ready.items() if run is not None}
    times = interleaved(list(able.values()), repeats=setting.repeats, least_seconds=_LEAST_SECONDS)
    return dict.fromkeys(forms) | dict(zip(able, times, strict=True))


@contextlib.contextmanager
def _torch_threads(setting: Setting) -> Iterator[None]:
    """PyTorch on so many threads, where it is the engine."""
    before = torch.get_num_threads()
    try:
        if setting.engine == "torch":
            torch.set_num_threads(setting.threads)
        yield
    finally:
        torch.set_num_threads(before)


def _network(file: QuantizedFile, model: nn.Module, setting: Setting, *, rounded: bool) -> dict[str, Any]:
    """``fp32``, ``exported`` (null where there is none), ``exported_as``, ``why`` there is nothing, ``engine`` and its version."""
    size = file.manifest.data_config["input_size"]
    images = _noise(size, setting.batch)
    if setting.engine == "torch":
        activations.detach(model)
        with torch.inference_mode():
            [plain] = interleaved([lambda: model(images)], repeats=setting.repeats)
        found = {"fp32": plain.described(), "exported": None, "exported_as": None, "why": None}
        return found | {"engine": f"torch {torch.__version__}"}
    form = registry.find(_form_of(setting.engine))
    options = Options(
        activations="int8" if rounded else "float",
        target="openvino" if setting.engine == "openvino" else "ort",
        calib=_noise(size, 4) if rounded else None,
    )
    version = ""
    try:
        probe = verify.make_probe(model, size, None, source="")
        exporter = form(Subject(file, model, probe, options))
        with tempfile.TemporaryDirectory(prefix="csq-bench-") as folder:
            path = Path(folder) / f"network{form.suffix}"
            exporter.write(path, None)
            pair = exporter.twins(path, threads=setting.threads)
            if pair is None:
                raise UserError("is too large for a float baseline", where="the network")
            times = interleaved([lambda: pair[1](images), lambda: pair[0](images)], repeats=setting.repeats)
        version = exporter.engine
    except UserError as error:
        return {"fp32": None, "exported": None, "exported_as": None, "why": error.line(), "engine": version}
    weights = "int8 weights and activations" if rounded else "packed weights, float activations"
    said = f"{form.name}, {weights}"
    return {
        "fp32": times[0].described(),
        "exported": times[1].described(),
        "exported_as": said,
        "why": None,
        "engine": version,
    }


def _bench_exported(path: Path, setting: Setting, display: Display) -> dict[str, Any]:
    if setting.engine not in ENGINES_OF[path.suffix]:
        wanted = " or ".join(ENGINES_OF[path.suffix])
        raise UserError(
            f"runs in {wanted}, not in {setting.engine}", where=str(path), hint=f"pass --engine {wanted.split()[0]}"
        )
    with display.step("measuring the network"):
        if path.suffix == ".tflite":
            content, manifest = runtime.checked_flatbuffer(path)
            this: nn.Module = runtime.LiteRtModel(content, threads=setting.threads, where=str(path))
            plain: nn.Module = runtime.LiteRtModel(float_twins.of_litert(content), threads=setting.threads)
        else:
            proto, manifest = runtime.checked_graph(path)
            kind = runtime.OnnxModel if setting.engine == "ort" else runtime.OpenVinoModel
            twin = float_twins.of_onnx(proto, [layer.name for layer in manifest.layers])
            this = kind(proto.SerializeToString(), threads=setting.threads)
            plain = kind(twin.SerializeToString(), threads=setting.threads)
        images = _noise(manifest.data_config["input_size"], setting.batch)
        times = interleaved([lambda: plain(images), lambda: this(images)], repeats=setting.repeats)
    network = {
        "fp32": times[0].described(),
        "exported": times[1].described(),
        "exported_as": "the file as it is",
        "why": None,
    }
    found = _described(str(path), manifest.form, setting, tuple(manifest.data_config["input_size"]))
    return found | {"engine_version": this.engine, "forms": ["fp32"], "network": network, "sum_ms": {}, "layers": []}
