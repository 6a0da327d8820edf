"""export_file(): from a quantized file to one that is small or runs elsewhere, top to bottom."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from csqcli.data.loaders import Loader, LoaderSettings, make_loader
from csqcli.data.specs import open_data
from csqcli.errors import UserError
from csqcli.exporting import verify
from csqcli.exporting.verify import ParityError, Probe
from csqcli.file import header, io, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import METADATA_KEY, Form, Manifest, ParityRecord
from csqcli.system import files
from csqcli.training.evaluate import check_scores, evaluate
from csqcli.version import __version__

if TYPE_CHECKING:
    from csqcli.exporting.onnx_graph import PackedGraph

Target = Literal["ort", "openvino"]
LATENCY_REPEATS = 9
_CALIB_IMAGES = 32  # one batch
BASELINE_LIMIT = 1.9e9  # bytes: protobuf refuses a float baseline of 2 GiB


def export_file(
    source: Path,
    output: Path,
    *,
    form: Form | Literal["onnx"],
    activations: Literal["float", "int8"] = "float",
    target: Target = "ort",
    calib: str | None = None,
    data_source: str | None = None,
    val_limit: int | None = None,
    trust_code: bool = False,
    force: bool = False,
) -> Manifest:
    """Write ``source`` as ``output`` in ``form``, verified; the new file's manifest with its parity certificate.

    ``data_source`` gives the images to compare logits on, and the top-1 of the written file. ``calib`` gives those that
    int8 outputs of convolutions are measured on, which ONNX Runtime needs for its int8 kernels; trained scales stay.
    Raises UserError for bad input, and ParityError, a kind of it, when the written file differs from the hard model.
    """
    _check_output(source, output, suffix=".onnx" if form == "onnx" else ".safetensors", force=force)
    if form == "onnx":
        _require_engine(target)
    file = io.read(source)
    if activations == "int8" and not file.manifest.activations:
        raise UserError(
            "has no activation scales, which --activations int8 needs",
            where=str(source),
            hint="use --activations float, or train with quantized activations (--act-bits)",
        )
    if calib is not None and activations != "int8":
        raise UserError("--calib belongs to --activations int8", where="csq export")
    model = loading.hard_model(file, trust_code=trust_code, where=str(source))
    check_scores(model, file.manifest.data_config["input_size"], None, where=str(source))
    workers = 0 if target == "openvino" else 2  # processes forked once OpenVINO is loaded may crash
    loader = _loader(file, data_source, val_limit, workers=workers) if data_source is not None else None
    images = next(iter(loader.epoch(0)))[0][: verify.PROBE_IMAGES] if loader is not None else None
    probe = verify.make_probe(model, file.manifest.data_config["input_size"], images, source=data_source or "")
    exporter: _Exporter
    if form == "onnx":
        exporter = _Onnx(file, model, probe, target)
        if activations == "int8":
            scenes = _loader(file, calib, _CALIB_IMAGES, workers=0, labelled=False) if calib is not None else None
            exporter.use_int8(next(iter(scenes.epoch(0)))[0] if scenes is not None else None)
        exporter.set_tolerance(model, probe)
    else:
        exporter = _Safetensors(file, form, trust_code)
    with verify.candidate(output) as path:
        exporter.write(path, None)
        exporter.check(path)
        started = time.perf_counter()
        engine = exporter.open(path)
        load_seconds = time.perf_counter() - started
        with torch.no_grad():
            logits = engine(probe.images)
        error = verify.check_logits(logits, probe, tolerance_in_std=exporter.tolerance, where=str(output))
        accuracy = evaluate(engine, loader) if loader is not None else None
        if accuracy is not None and loader is not None:
            verify.check_accuracy(accuracy, evaluate(model, loader), where=str(output))
        latency_ms, latency_ratio = exporter.latency(path, probe)
        parity = ParityRecord(
            payload_sha256=file.manifest.payload_sha256,
            layers_matched=len(file.layers) - len(exporter.absent),
            layers_absent=exporter.absent,
            layers_int8=exporter.int8,
            calibrated=exporter.calibrated,
            inputs=probe.source,
            max_logit_error=error,
            logit_std=probe.spread,
            tolerance_in_std=exporter.tolerance,
            top1=accuracy.top1 if accuracy else None,
            samples=accuracy.samples if accuracy else 0,
            engine=exporter.engine,
            versions={"csq": __version__, "torch": torch.__version__},
            load_seconds=load_seconds,
            latency_ms=latency_ms,
            latency_ratio=latency_ratio,
        )
        exporter.write(path, parity)
        exporter.check(path)
    return header.read_manifest(output)


class _Exporter(Protocol):
    """One kind of file: how it is written, opened in the engine that will run it, and compared layer by layer."""

    engine: str
    absent: list[str]  # layers that the file does not hold because nothing reads them
    int8: list[str]  # layers whose inputs and weights the engine has as int8
    calibrated: list[str]  # layers whose outputs are rounded at a scale that was not trained
    tolerance: float  # largest logit error, in the logits' standard deviation

    def write(self, path: Path, parity: ParityRecord | None) -> None: ...

    def open(self, path: Path) -> nn.Module: ...

    def check(self, path: Path) -> None: ...

    def latency(self, path: Path, probe: Probe) -> tuple[float | None, float | None]: ...


class _Safetensors:
    def __init__(self, file: QuantizedFile, form: Form, trust_code: bool) -> None:
        self.file, self.form, self.trust_code = file, form, trust_code
        self.engine = f"torch {torch.__version__}"
        self.absent: list[str] = []
        self.int8: list[str] = []
        self.calibrated: list[str] = []
        self.tolerance = verify.FLOAT_TOLERANCE

    def write(self, path: Path, parity: ParityRecord | None) -> None:
        io.write(path, self.file, form=self.form, parity=parity)

    def open(self, path: Path) -> nn.Module:
        return loading.load_file(path, trust_code=self.trust_code)

    def check(self, path: Path) -> None:
        try:
            written = io.read(path)
        except UserError as error:
            raise ParityError(f"cannot be read back: {error.what}", where=str(path)) from None
        for layer, wanted in zip(written.layers, self.file.layers, strict=True):
            verify.check_layer(layer, wanted)
        verify.check_others(written.others, self.file.others)

    def latency(self, path: Path, probe: Probe) -> tuple[float | None, float | None]:
        return None, None  # a loaded file runs as the float model that it is


class _Onnx:
    def __init__(self, file: QuantizedFile, model: nn.Module, probe: Probe, target: Target) -> None:
        from csqcli.exporting import onnx_graph

        self.file, self.target = file, target
        self.graphs = onnx_graph.trace(model, file.layers, tuple(probe.images.shape[1:]))
        self.absent, self.engine, self.tolerance = self.graphs.absent, "", verify.FLOAT_TOLERANCE
        self.calibrated: list[str] = []
        self.bias_units: dict[str, torch.Tensor] = {}
        self.output_units: dict[str, torch.Tensor] = {}
        self.manifest = file.manifest.model_copy(update={"form": "onnx"}, deep=True)
        self._take(self.graphs.packed())

    def _take(self, packed: PackedGraph) -> None:
        self.packed, self.proto, self.int8 = packed, packed.proto, packed.int8
        for record in self.manifest.layers:
            record.encoding, record.packed_bytes = packed.encodings.get(record.name, ("absent", 0))

    def use_int8(self, images: torch.Tensor | None) -> None:
        """Layers with trained input scales become int8; ``images`` also give their outputs a scale where none is."""
        from csqcli.exporting import int8_graph, onnx_graph

        plan = int8_graph.quantize(self.graphs.proto, self.graphs.used)
        scales = {layer.name: layer.scale for layer in self.file.layers}
        steps = {f"{entry.module}.weight": entry.scale for entry in self.file.manifest.activations}
        self.bias_units = {_module(name): steps[name] * scales[name] for name in plan.weights if name in steps}
        if images is not None:
            layer_of = int8_graph.open_outputs(plan)
            ranges = onnx_graph.measure_ranges(self.graphs.packed(plan).proto, list(layer_of), images)
            for value, step in int8_graph.round_outputs(plan, ranges).items():
                name = layer_of[value]
                folded = torch.from_numpy(plan.weights[name].scale)  # BatchNorm multiplies what the module gives
                self.output_units[_module(name)] = step * scales[name] / folded
                self.calibrated.append(name)
        self._take(self.graphs.packed(plan))

    def set_tolerance(self, model: nn.Module, probe: Probe) -> None:
        """Twice what rounding alone moves the hard model's logits, where activations are rounded."""
        if self.file.manifest.activations:
            floor = verify.rounding_floor(model, probe, self.bias_units, self.output_units)
            self.tolerance = max(self.tolerance, 2 * floor)

    def write(self, path: Path, parity: ParityRecord | None) -> None:
        from csqcli.exporting import runtime

        self.manifest.parity = parity
        del self.proto.metadata_props[:]
        entry = self.proto.metadata_props.add(key=METADATA_KEY)
        if parity is not None:
            parity.graph_sha256 = runtime.graph_sha256(self.proto)
        for _ in range(4):  # the certificate states the size of the file that it is part of
            entry.value = self.manifest.model_dump_json()
            content = self.proto.SerializeToString()
            if parity is None or parity.file_bytes == len(content):
                break
            parity.file_bytes = len(content)
        with files.replacing(path) as temporary:
            temporary.write_bytes(content)

    def open(self, path: Path | bytes, *, threads: int = 0) -> nn.Module:
        from csqcli.exporting import runtime

        engine = (runtime.OnnxModel if self.target == "ort" else runtime.OpenVinoModel)(path, threads=threads)
        self.engine = engine.engine
        return engine

    def check(self, path: Path) -> None:
        import onnx

        from csqcli.exporting import onnx_graph

        proto = onnx.load(path)
        for name, (wanted_integers, wanted_weight) in self.packed.weights.items():
            integers, weight = onnx_graph.weights_in(proto, name)
            if not np.array_equal(integers, wanted_integers):
                raise ParityError("integers differ from the source file's", where=name)
            if not np.array_equal(weight.view(np.uint32), wanted_weight.view(np.uint32)):
                raise ParityError("integers × scale is not the hard weight", where=name)

    def latency(self, path: Path, probe: Probe) -> tuple[float | None, float | None]:
        """Milliseconds at batch 1 on one thread, and how many times faster that is than the same graph in fp32."""
        if 4 * sum(layer.integers.numel() for layer in self.graphs.used) > BASELINE_LIMIT:
            return None, None
        packed, plain = self.open(path, threads=1), self.open(self.graphs.plain().SerializeToString(), threads=1)
        image = probe.images[:1]
        seconds = verify.interleaved_medians([lambda: packed(image), lambda: plain(image)], repeats=LATENCY_REPEATS)
        return 1000 * seconds[0], seconds[1] / seconds[0]


def _check_output(source: Path, output: Path, *, suffix: str, force: bool) -> None:
    if output.suffix != suffix:
        raise UserError(f"the name of this form must end in {suffix}", where=str(output))
    if not output.parent.is_dir():
        raise UserError("no such folder", where=str(output.parent))
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError("is the file to export", where=str(output), hint="choose another name")
    if output.exists() and not (force and output.is_file()):
        raise UserError("exists already", where=str(output), hint="choose another name or pass --force")


def _require_engine(target: Target) -> None:
    from csqcli.exporting import runtime

    runtime.require("onnx", "onnxscript", "onnxruntime")
    if target == "openvino":
        runtime.require("openvino", extra="openvino")


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def _loader(file: QuantizedFile, source: str, val_limit: int | None, *, workers: int, labelled: bool = True) -> Loader:
    images = open_data(source, train=False, val_limit=val_limit)
    classes = file.manifest.model.num_classes
    if labelled and images.num_classes != classes:
        raise UserError(f"the model has {classes} classes, the data has {images.num_classes}", where=source)
    settings = LoaderSettings(training=False, batch_size=32, workers=workers)
    return make_loader(images.val, file.manifest.data_config, settings)


def summary(manifest: Manifest) -> list[str]:
    """What `csq export` prints: where the integers went, and the certificate."""
    parity: Any = manifest.parity
    wide = [record.name for record in manifest.layers if record.encoding == "int16"]
    size = manifest.sizes.file_bytes or 0
    ratio = manifest.sizes.float_bytes / size if size else 0.0
    lines = [f"{manifest.form}: {size:,} bytes, {ratio:.2f}× smaller than float"]
    if wide:
        lines.append(f"int16        {len(wide)} layers reach beyond ±127: {', '.join(wide)}")
    if parity.layers_int8:
        lines.append(f"int8         {len(parity.layers_int8)} of {len(manifest.layers)} layers run in int8")
    if parity.calibrated:
        lines.append(f"calibrated   {len(parity.calibrated)} convolution outputs, rounded beyond what was trained")
    if parity.layers_absent:
        lines.append(
            f"left out     {len(parity.layers_absent)} layers unused at inference: {', '.join(parity.layers_absent)}"
        )
    lines.append(
        f"verified     {parity.layers_matched} layers bit-exact; logits within {parity.max_logit_error:.1e} "
        f"(std {parity.logit_std:.2g}) on {parity.inputs}; {parity.engine}, loads in {parity.load_seconds:.2f} s"
    )
    if parity.top1 is not None:
        lines.append(f"top-1        {parity.top1:.2f} % of {parity.samples} images")
    if parity.latency_ms is not None:
        lines.append(
            f"latency      {parity.latency_ms:.2f} ms, fp32 / this {parity.latency_ratio:.2f}× (batch 1, one thread)"
        )
    return lines
