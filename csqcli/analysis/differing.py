"""``csq diff``: how far each layer's output is from the float model's, hard in torch and exported in its engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.analysis.opening import images_for
from csqcli.data.specs import WORKERS, ValSplit
from csqcli.errors import UserError, no_such_file
from csqcli.file import io
from csqcli.file.checkpoint import open_checkpoint
from csqcli.file.header import GRAPHS, is_quantized
from csqcli.file.loading import check_trusted, hard_model
from csqcli.file.manifest import Manifest
from csqcli.models.fitting import load_for
from csqcli.models.libraries import without_weights
from csqcli.models.spec import parse
from csqcli.quant.measuring import Call, calls_of, evaluating, first_tensor
from csqcli.quant.names import owner_of
from csqcli.system.device import pick_device
from csqcli.system.progress import Display
from csqcli.system.run_files import model_of

_BUILTIN = "builtin:"
_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".th", ".tar")


@dataclass
class _Power:
    """Σ a² of a layer's float outputs and Σ (a − b)² of what differs, over all images."""

    signal: float = 0.0
    noise: float = 0.0
    values: int = 0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        exact = wanted.double().cpu()
        self.signal += float(exact.square().sum())
        self.noise += float((exact - found.double().cpu()).square().sum())
        self.values += exact.numel()

    @property
    def sqnr(self) -> float | None:
        """10·log10(signal/noise) in dB; None where nothing was compared, or nothing differs, or there is no signal."""
        if not self.signal > 0 or not self.noise > 0:
            return None
        return 10 * math.log10(self.signal / self.noise)


def diff(
    float_: str,
    quantized: Path,
    data: str,
    *,
    export: Path | None = None,
    images: int | None,
    device: str = "auto",
    batch_size: int = 16,
    workers: int = WORKERS,
    val_split: ValSplit = None,
    trust_code: bool = False,
    display: Display,
) -> dict[str, Any]:
    """Signal-to-quantization-noise ratio of every layer's output, over so many validation images, worst first.

    ``float_`` is a checkpoint, a csq file or run, or a model's name for the library's own weights; ``quantized`` a run's folder, a
    safetensors file of csq, or an ONNX or LiteRT export alone; ``export`` such an export of it beside, of which LiteRT gives
    logits alone. SQNR is 10·log10(Σa²/Σ(a − b)²) in
    dB, a the float model's output of the layer (before BatchNorm; behind it, for ``engine``, where the export has it folded into
    the layer) and b the other's for the same images: ``hard`` and ``engine`` as errors add up from layer to layer, ``own`` of
    the hard layer alone, given the float model's input. Outputs of a model that was trained on differ by what it learned, too.

    Returns ``float``, ``quantized``, ``engine`` (its name and version, or null), ``images``, ``logits`` (``hard`` and ``engine`` in dB,
    ``agreement`` and ``engine_agreement`` of top-1 with the float model's in percent), ``layers`` (``name``, ``weights``, ``planes``,
    ``own``, ``hard``, ``engine``; null where nothing differs or nothing could be compared; ``signal`` and ``noise`` mean squares)
    and ``unreached`` (layers whose output no module gives).
    """
    file_path = model_of(quantized)
    target = pick_device(device)
    engine_path = file_path if file_path.suffix in GRAPHS else export
    tapped = None
    if engine_path is not None:
        if engine_path.suffix not in GRAPHS:
            hint = "other forms run in torch: give them as QUANTIZED"
            raise UserError("is no ONNX or LiteRT file", where=str(engine_path), hint=hint)
        from csqcli.exporting.tapping import LogitsOfLiteRt, TappedModel

        with display.step(f"loading {engine_path}"):
            tapped = (LogitsOfLiteRt if engine_path.suffix == ".tflite" else TappedModel)(engine_path)
    hard: nn.Module | None = None
    if file_path.suffix in GRAPHS:
        assert tapped is not None
        manifest = tapped.manifest
        check_trusted(manifest.spec, trust_code=trust_code, where=str(file_path))
    else:
        with display.step(f"loading {file_path}"):
            file = io.read(file_path)
            manifest = file.manifest
            hard = hard_model(file, trust_code=trust_code, where=str(file_path)).to(target)
        if tapped is not None and tapped.manifest.payload_sha256 != manifest.payload_sha256:
            hint = f"export it anew from {file_path}"
            raise UserError("holds other integers than the quantized file", where=str(engine_path), hint=hint)
    if not manifest.layers:
        raise UserError("holds no quantized layer", where=str(file_path))
    with display.step(f"loading {float_}"):
        reference = _float_model(float_, manifest, trust_code=trust_code).to(target).eval()
    batches, _ = images_for(
        manifest,
        file_path,
        data,
        images=images,
        device=device,
        batch_size=batch_size,
        workers=workers,
        val_split=val_split,
        display=display,
    )
    names = [layer.name for layer in manifest.layers]
    norms: dict[str, str] = {}
    if tapped is not None and tapped.folded:
        from csqcli.exporting.folding import norms_behind

        found = norms_behind(reference, names, manifest.data_config["input_size"])
        norms = {name: found.get(name, "") for name in tapped.folded}
    comparison = _Comparison(reference, hard, tapped, names, norms)
    with display.step("comparing layers", len(batches)) as tell:
        for done, (pixels, _) in enumerate(batches, 1):
            comparison.add(pixels)
            tell(done)
    return {
        "float": float_,
        "quantized": str(file_path),
        "engine": tapped.engine if tapped is not None else None,
        **comparison.summary(manifest),
    }


class _Comparison:
    """Powers of every layer, batch by batch."""

    def __init__(
        self,
        reference: nn.Module,
        hard: nn.Module | None,
        tapped: Any,
        names: Sequence[str],
        norms: Mapping[str, str],
    ) -> None:
        """``norms``: the BatchNorm whose output the engine gives for a layer; "" where it is not known which."""
        self.norms = dict(norms)
        self.reference, self.hard, self.tapped, self.names = reference, hard, tapped, list(names)
        self.powers = {kind: {name: _Power() for name in names} for kind in ("own", "hard", "engine")}
        self.logits = {kind: _Power() for kind in ("hard", "engine")}
        self.agreeing, self.images = {"hard": 0, "engine": 0}, 0

    def add(self, images: Tensor) -> None:
        owners = {name: owner_of(name) for name in self.names}
        with evaluating(self.reference):
            scores, calls = calls_of(self.reference, images, owners.values())
        wanted = {name: [call.output for call in calls.get(owner, ())] for name, owner in owners.items()}
        self.images += len(images)
        if self.hard is not None:
            with evaluating(self.hard):
                hard_scores, hard_calls = calls_of(self.hard, images, owners.values())
                found = {name: [call.output for call in hard_calls.get(owner, ())] for name, owner in owners.items()}
                alone = {name: self._alone(owner, calls.get(owner, ())) for name, owner in owners.items()}
            self._compare("hard", wanted, found, scores, hard_scores)
            for name, outputs in alone.items():
                self._layer("own", name, wanted[name], outputs)
        if self.tapped is not None:
            engine_scores, found = self.tapped.run(images)
            given = dict(wanted)
            for name, norm in self.norms.items():
                given[name] = [self._normalised(norm, output) for output in wanted[name]] if norm else []
            self._compare("engine", given, found, scores, engine_scores)

    def _normalised(self, norm: str, output: Tensor) -> Tensor:
        """What a BatchNorm of the float model makes of an output, without an activation that its module may have."""
        module: Any = self.reference.get_submodule(norm)
        statistics = module.running_mean, module.running_var, module.weight, module.bias
        with torch.no_grad():
            return nn.functional.batch_norm(output, *statistics, eps=module.eps)

    def _compare(
        self, kind: str, wanted: dict[str, list[Tensor]], found: dict[str, list[Tensor]], scores: Tensor, others: Tensor
    ) -> None:
        for name, outputs in wanted.items():
            self._layer(kind, name, outputs, found.get(name, []))
        self.logits[kind].add(scores, others)
        self.agreeing[kind] += int((scores.cpu().argmax(dim=1) == others.cpu().argmax(dim=1)).sum())

    def _layer(self, kind: str, name: str, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        if [one.shape for one in wanted] == [one.shape for one in found]:
            for a, b in zip(wanted, found, strict=True):
                self.powers[kind][name].add(a, b)

    @torch.no_grad()
    def _alone(self, owner: str, calls: Sequence[Call]) -> list[Tensor]:
        """What the hard model's module gives for the float model's inputs."""
        assert self.hard is not None
        module, outputs = self.hard.get_submodule(owner), []
        for call in calls:
            output = first_tensor(module(*call.arguments, **call.named))
            if output is not None:
                outputs.append(output)
        return outputs

    def summary(self, manifest: Manifest) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        unreached = []
        main = "hard" if self.hard is not None else "engine"
        for layer in manifest.layers:
            power = self.powers[main][layer.name]
            if not power.values:
                unreached.append(layer.name)
                continue
            rows.append(
                {
                    "name": layer.name,
                    "weights": layer.weights,
                    "planes": layer.bits,
                    **{kind: self.powers[kind][layer.name].sqnr for kind in ("own", "hard", "engine")},
                    "signal": power.signal / power.values,
                    "noise": power.noise / power.values,
                }
            )
        rows.sort(key=lambda row: row[main] if row[main] is not None else math.inf)
        agreement = {kind: 100 * self.agreeing[kind] / max(self.images, 1) for kind in ("hard", "engine")}
        return {
            "images": self.images,
            "logits": {
                "hard": self.logits["hard"].sqnr,
                "engine": self.logits["engine"].sqnr,
                "agreement": agreement["hard"] if self.hard is not None else None,
                "engine_agreement": agreement["engine"] if self.tapped is not None else None,
            },
            "layers": rows,
            "unreached": unreached,
        }


def _float_model(float_: str, manifest: Manifest, *, trust_code: bool) -> nn.Module:
    """The float model, of the architecture and with the outputs of the quantized one. UserError where it is another."""
    path = Path(float_)
    if path.is_dir() or (path.is_file() and is_quantized(path)):
        file = io.read(model_of(path))
        if file.manifest.spec.source != manifest.spec.source:
            raise UserError(f"is a {file.manifest.spec.source}, not a {manifest.spec.source}", where=float_)
        return hard_model(file, trust_code=trust_code, where=float_)
    classes = manifest.classes or [str(number) for number in range(manifest.model.num_classes)]
    source, checkpoint = manifest.spec.source, None
    if path.is_file() or float_.startswith(_BUILTIN):
        checkpoint = open_checkpoint(float_)
    elif path.suffix in _CHECKPOINTS:
        raise no_such_file(path)
    else:
        asked = parse(float_, manifest.model.arguments)
        if asked.source != source:
            hint = "name the quantized file's own model, a checkpoint of it, or a csq file"
            raise UserError(f"is not a {source}", where=float_, hint=hint)
    try:
        with without_weights("give a checkpoint of it in place of its name"):
            fitted = load_for(
                source, classes, checkpoint=checkpoint, arguments=manifest.model.arguments, classes_from="the file"
            )
    except UserError as error:
        if checkpoint is None:
            raise
        hint = f"give a checkpoint of {source} as it was before it was quantized"
        raise UserError(error.what, where=error.where, hint=hint) from error
    outputs = len(fitted.names)
    if outputs != manifest.model.num_classes:
        raise UserError(f"has {outputs} outputs, the quantized model {manifest.model.num_classes}", where=float_)
    return fitted.loaded.model
