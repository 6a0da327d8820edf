"""export_file(): from a quantized file to one that is small or runs elsewhere, top to bottom."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from csqcli.data.specs import WORKERS, ValSplit
from csqcli.errors import UserError
from csqcli.exporting import images, registry, verify
from csqcli.exporting.form import Form, Options, Subject
from csqcli.exporting.verify import ParityError
from csqcli.file import io, layout, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import Manifest, ParityRecord
from csqcli.quant.measuring import logits_of
from csqcli.system.choices import Activations, Prefer, Target, WeightType
from csqcli.system.environment import processor
from csqcli.system.progress import Display
from csqcli.training.evaluate import check_scores, evaluate
from csqcli.version import __version__


def export_file(
    source: Path,
    output: Path,
    *,
    form: str | type[Form],
    activations: Activations = "float",
    target: Target = "ort",
    weights: WeightType = "int8",
    calib: str | None = None,
    prefer: Prefer = "speed",
    data_source: str | None = None,
    val_split: ValSplit = None,
    val_limit: int | None = None,
    workers: int = WORKERS,
    trust_code: bool = False,
    force: bool = False,
    display: Display | None = None,
) -> Manifest:
    """Write ``source`` as ``output`` in ``form``, verified; the new file's manifest with its parity certificate.

    Args:
        source: a safetensors file that csq wrote.
        output: the file to write; it gets its name when everything was compared.
        form: the name of a form, ``package.module:Class``, or the class.
        activations, target, weights, calib: of the graph forms, see `forms.onnx`. ``calib`` gives the images that int8 outputs
            of layers are measured on, which ONNX Runtime and LiteRT need for their int8 kernels; trained scales stay.
        prefer: of the LiteRT form: the faster kernels or the smaller file where these differ.
        data_source: images to compare logits on, and to measure the written file's top-1 with.
        val_split: what takes the place of a validation split that they do not have; None takes the file's own.
        val_limit: use only so many of them, spread evenly.
        workers: processes that load them; none where the file is for OpenVINO.
        trust_code: let the file import the factory that it names.
        force: replace ``output``.
        display: where progress is shown; None for nowhere.

    Raises UserError for bad input, and ParityError, a kind of it, when the written file differs from the hard model.
    """
    display = display or Display(quiet=True)
    kind = registry.find(form) if isinstance(form, str) else form
    options = Options(activations, target, weights, calib, prefer, trust_code)
    registry.check_taken(kind.takes, options.as_mapping(), where=f"csq export --form {kind.name}")
    _check_output(source, output, suffix=kind.suffix)
    with verify.candidate(output, force=force) as path:
        kind.require(options)
        file = io.read(source)
        check_basis(kind, file, where=str(source))
        kind.accept(file, options, where=str(source))
        with display.step("loading the hard model"):
            model = loading.hard_model(file, trust_code=trust_code, where=str(source))
            check_scores(model, file.manifest.data_config["input_size"], None, where=str(source))

        loader = None
        if data_source is not None:
            processes = 0 if target == "openvino" else workers  # forked once OpenVINO is loaded, they may crash
            loader = images.loader(file, data_source, val_limit, workers=processes, val_split=val_split)
        scenes = next(iter(loader.epoch(0)))[0][: verify.PROBE_IMAGES] if loader is not None else None
        size = file.manifest.data_config["input_size"]
        probe = verify.make_probe(model, size, scenes, source=data_source or "")

        exporter = kind(Subject(file, model, probe, options))
        with display.step(f"writing {kind.name} and reading it back"):
            exporter.write(path, None)
            exporter.check(path)

        started = time.perf_counter()
        engine = exporter.open(path)
        load_seconds = time.perf_counter() - started
        with torch.no_grad():
            logits = logits_of(engine(probe.images))
        reference = exporter.reference or probe
        try:
            error = verify.check_logits(logits, reference, tolerance_in_std=exporter.tolerance, where=str(output))
        except ParityError as mismatch:
            layer = exporter.begins_at(path)
            mismatch.what += f"; outputs begin to differ at {layer}" if layer is not None else ""
            wide = [layer for layer in file.layers if layer.name in exporter.int8]
            if exporter.made_for is None:  # it ran in the engine that it is for
                mismatch.hint = verify.saturates(wide, processor()["instructions"]) or mismatch.hint
            raise
        accuracy = hard_accuracy = None
        if loader is not None:
            with display.evaluation("evaluating the written file", loader.batches) as tell:
                accuracy = evaluate(engine, loader, on_batch=tell)
            with display.evaluation("evaluating the hard model", loader.batches) as tell:
                hard_accuracy = evaluate(model, loader, on_batch=tell)
            verify.check_accuracy(accuracy, hard_accuracy, where=str(output))
        with display.step("measuring latency"):
            latency_ms, latency_ratio = exporter.latency(path)

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
            hard_top1=hard_accuracy.top1 if hard_accuracy else None,
            samples=accuracy.samples if accuracy else 0,
            made_for=exporter.made_for,
            notes=exporter.notes,
            engine=exporter.engine,
            versions={"csq": __version__, "torch": torch.__version__},
            load_seconds=load_seconds,
            latency_ms=latency_ms,
            latency_ratio=latency_ratio,
        )
        exporter.write(path, parity)
        exporter.check(path)
    return exporter.describe(output, parity)


def output_path(file: Path, form: str | type[Form]) -> Path:
    """Where an export goes that is told nothing: ``net.v2.safetensors`` → ``net.v2-onnx.onnx``."""
    kind = registry.find(form) if isinstance(form, str) else form
    return file.with_name(f"{file.stem}-{kind.name}{kind.suffix}")


def check_basis(kind: type[Form], file: QuantizedFile, *, where: str) -> None:
    """UserError where a layer has a learned basis and the form holds integers × scale alone."""
    learned = [layer.name for layer in file.layers if layer.basis is not None]
    if learned and not kind.takes_basis:
        what = f"{learned[0]} {layout.BASIS_IN_INTEGERS}, and {kind.name} holds nothing else"
        raise UserError(what, where=where, hint=layout.BASIS_HINT)


def _check_output(source: Path, output: Path, *, suffix: str) -> None:
    if output.suffix != suffix:
        raise UserError(f"the name of this form must end in {suffix}", where=str(output))
    if not output.parent.is_dir():
        raise UserError("no such folder", where=str(output.parent))
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError("is the file to export", where=str(output), hint="choose another name")
