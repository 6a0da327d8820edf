"""The quantized file: assembled, written, read, and checked on the way.

A safetensors file. For a quantized weight ``X`` it holds ``X_packed`` (uint8, see `codes`) and ``X_scale`` (float32, [1] or
[channels]); every other parameter and buffer stands under its own name. `layout` has the other forms that `csq export`
writes, and all of them are read here. One metadata key, ``csq``, holds the `manifest` as JSON: where the model comes from,
its data config, the recipe as resolved, the budget asked and reached, accuracy, and per layer the mask, planes, encoding and
entropy. Integers × scale is the weight, bit for bit; where a method learns a basis instead (`quant.basis`), the file has
``X_basis`` (float32, [planes, channels or 1]) beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from csqcli.errors import UserError, did_you_mean
from csqcli.file import codes, layout, sizes
from csqcli.file.codes import Encoded
from csqcli.file.deflate import deflate_mixed
from csqcli.file.header import MANIFEST_TENSOR, manifest_of, open_safetensors
from csqcli.file.manifest import (
    BASIS_SCHEMA_VERSION,
    METADATA_KEY,
    SCHEMA_VERSION,
    AccuracyRecord,
    ActivationEntry,
    BudgetRecord,
    Form,
    LayerRecord,
    Manifest,
    ModelRecord,
    ParityRecord,
)
from csqcli.models.checkpoints import is_damaged
from csqcli.models.coverage import Operations
from csqcli.quant import equations
from csqcli.quant.basis import are_finite
from csqcli.quant.hard_layer import HardLayer
from csqcli.system.files import replacing

_DAMAGE = (ValueError, RuntimeError, SafetensorError)  # what decoding raises for bytes it cannot be given
_HINT = "the file is damaged"


@dataclass
class QuantizedFile:
    """A quantized file in memory."""

    manifest: Manifest
    layers: list[HardLayer]
    others: dict[str, Tensor]  # parameters and buffers that are not quantized
    _encoded: list[tuple[HardLayer, Encoded]] = field(default_factory=list, repr=False, compare=False)

    def state_dict(self) -> dict[str, Tensor]:
        """Dequantized state dict; loads ``strict=True`` into the plain model."""
        state = dict(self.others)
        for layer in self.layers:
            weight = layer.weight()
            state.update(dict.fromkeys((layer.name, *layer.aliases), weight))
        return state

    def encoded(self) -> list[Encoded]:
        """The layers' integers as codes. Encoding takes long, so a layer's codes are kept for as long as it stays."""
        known = {id(layer): encoded for layer, encoded in self._encoded}
        missing = [layer for layer in self.layers if id(layer) not in known]
        known |= {id(layer): codes for layer, codes in zip(missing, layout.encode_layers(missing), strict=True)}
        self._encoded = [(layer, known[id(layer)]) for layer in self.layers]
        return [encoded for _, encoded in self._encoded]


def assemble(
    model: nn.Module,
    layers: Sequence[HardLayer],
    *,
    record: ModelRecord,
    data_config: Mapping[str, Any],
    target_bits: float | None,
    operations: Operations | None = None,
    classes: Sequence[str] = (),
    trained_outputs: Sequence[int] | None = None,
    accuracy: AccuracyRecord | None = None,
    activations: Sequence[ActivationEntry] = (),
    left_float: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> QuantizedFile:
    """The file for a trained model: ``layers`` as hardened, all else from the model's own state dict.

    Args:
        model: the trained model; the weights of ``layers`` in it are replaced by the layers themselves.
        layers: the hard layers, in the order in which the file lists them.
        record: what builds the architecture again.
        data_config: what images must look like for it.
        target_bits: mean planes per weight that were asked for; None for a float file.
        operations: multiply-accumulates, as ``models.coverage.count_macs`` found them.
        classes: names of the outputs.
        trained_outputs: those that the training data had images for; None for all.
        accuracy: what was measured so far.
        activations: the quantizers on the layers' inputs.
        left_float: name, shape and reason (``why``) of tensors of two or more dimensions that are not quantized.
        environment: versions that the result depends on.
        recipe: the recipe as resolved.

    Raises UserError, naming the tensor, where training left NaN or infinite values.
    """
    twice = {alias for layer in layers for alias in layer.aliases}  # a shared weight is one, in float as in the file
    names = twice | {layer.name for layer in layers}
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # what get_extra_state gives
            raise UserError(f"holds a {type(value).__name__}; a file holds tensors only", where=name)
        state[name] = value.detach().cpu()
    others = {name: value.clone().contiguous() for name, value in state.items() if name not in names}
    trained = [(layer.name, value) for layer in layers for value in (layer.scale, state[layer.name])]
    trained += [(layer.name, layer.basis) for layer in layers if layer.basis is not None]
    for name, value in [*others.items(), *trained]:
        if is_damaged(value):
            raise UserError("training left NaN or infinite values; nothing was written", where=name)
    encoded = layout.encode_layers(layers)
    macs = operations.macs if operations is not None else {}
    records = [_layer_record(*pair, macs=macs.get(pair[0].name)) for pair in zip(layers, encoded, strict=True)]
    learned = any(layer.basis is not None for layer in layers)
    manifest = Manifest(
        schema_version=BASIS_SCHEMA_VERSION if learned else SCHEMA_VERSION,
        model=record,
        data_config=dict(data_config),
        classes=list(classes),
        trained_outputs=list(trained_outputs) if trained_outputs is not None else None,
        budget=BudgetRecord(
            target_mean_bits=target_bits,
            mean_bits=sizes.mean_over_weights(records, lambda layer: layer.bits),
            total_weights=sum(layer.weights for layer in records),
        ),
        sizes=sizes.sizes(records, float_bytes=4 * sum(state[name].numel() for name in state.keys() - twice)),
        accuracy=accuracy if accuracy is not None else AccuracyRecord(),
        layers=records,
        activations=list(activations),
        left_float=[dict(tensor) for tensor in left_float],
        payload_sha256=payload_sha256(layers),
        environment=dict(environment or {}),
        recipe=dict(recipe or {}),
    )
    if operations is not None:
        size, total = operations.input_size, operations.total
        manifest.compute = sizes.compute(records, manifest.activations, input_size=size, macs=total)
    return QuantizedFile(manifest, list(layers), others, list(zip(layers, encoded, strict=True)))


def _layer_record(layer: HardLayer, encoded: Encoded, *, macs: int | None) -> LayerRecord:
    scale = layer.scale.tolist()
    mask = equations.mask_string(layer.mask)
    return LayerRecord(
        name=layer.name,
        shape=list(layer.integers.shape),
        weights=layer.integers.numel(),
        mask=mask,
        bits=layer.planes,
        stored_bits=sizes.stored_bits(mask, basis=layer.basis is not None),
        entropy_bits=round(codes.entropy_bits(codes.count(layer.integers.cpu().numpy())), 6),
        scale=scale[0] if len(scale) == 1 else scale,
        channel_dim=layer.channel_dim,
        basis=layer.basis.tolist() if layer.basis is not None else None,
        encoding=encoded.encoding,
        packed_bytes=len(encoded.data),
        aliases=list(layer.aliases),
        macs=macs,
    )


def payload_sha256(layers: Sequence[HardLayer]) -> str:
    """SHA-256 over name and integers (little-endian int16) of every layer in order."""
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(layer.name.encode() + b"\0")
        digest.update(layer.integers.contiguous().to(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def write(
    path: Path,
    file: QuantizedFile,
    *,
    form: Form = "compact",
    parity: ParityRecord | None = None,
    rows: Mapping[str, str] | None = None,
) -> int:
    """Write atomically in the given form; the bytes on disk. A certificate that ``file`` was read with is not kept.

    ``rows``, of the form torchao: the layers that it gets packed, and what torchao wants to read of each in the metadata.
    """
    encoded = file.encoded() if form in ("compact", "bit-packed") else None
    stored = layout.store(file.layers, file.others, form, encoded=encoded, rows=rows or {})
    manifest = _described(file.manifest, stored, form)
    manifest.parity = parity
    with replacing(path) as temporary:
        for _ in range(4):  # the certificate states the size of the file that it is part of
            try:
                tensors, metadata = _with_manifest(stored.tensors, manifest)
                if form == "torchao":
                    metadata |= dict(rows or {}) | {"tensor_names": json.dumps(list(rows or {}))}
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:
                raise UserError(f"cannot be written ({error})", where=str(path)) from None
            size = temporary.stat().st_size
            if parity is None or parity.file_bytes == size:
                break
            parity.file_bytes = size
    return path.stat().st_size


def _described(manifest: Manifest, stored: layout.Stored, form: Form) -> Manifest:
    """The manifest with every layer's encoding and bytes as ``stored``."""
    described = manifest.model_copy(update={"form": form, "packed_others": stored.others}, deep=True)
    for record, (encoding, size) in zip(described.layers, stored.encodings, strict=True):
        record.encoding, record.packed_bytes = encoding, size
    return described


def _with_manifest(tensors: dict[str, Tensor], manifest: Manifest) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and safetensors metadata. A bit-packed file deflates its manifest, all but the certificate."""
    if manifest.form != "bit-packed":
        return tensors, {METADATA_KEY: manifest.model_dump_json(exclude_none=False)}
    parity = manifest.parity.model_dump(mode="json") if manifest.parity else None
    head = {"schema_version": manifest.schema_version, "form": manifest.form, "parity": parity}
    for record in manifest.layers:
        if isinstance(record.scale, list):
            record.scale = []  # stands among the tensors
        if record.basis is not None:
            record.basis = []
    text = manifest.model_dump_json(exclude={"parity"}, exclude_defaults=True)
    packed = layout.as_tensor(deflate_mixed(text.encode()))
    return tensors | {MANIFEST_TENSOR: packed}, {METADATA_KEY: json.dumps(head)}


def read(path: str | Path) -> QuantizedFile:
    """The whole file, checked: every tensor present, integers as hashed, masks and shapes consistent.

    UserError, in one line that names the layer, for a file that csq did not write or that is damaged.
    """
    path = Path(path)
    where = str(path)
    with open_safetensors(path, framework="pt") as file:
        manifest = manifest_of(file, path)
        layers = []
        try:
            reader = layout.Reader(file, manifest.layers, manifest.packed_others)
        except _DAMAGE as error:
            raise UserError(f"float tensors: {error}", where=where, hint=_HINT) from None
        for record in manifest.layers:
            try:
                layers.append(_checked_layer(record, *reader.layer(record)))
            except _DAMAGE as error:
                raise UserError(f"layer {record.name}: {error}", where=where, hint=_HINT) from None
            scale, basis = layers[-1].scale, layers[-1].basis
            record.scale = scale.tolist() if scale.numel() > 1 else float(scale)
            record.basis = basis.tolist() if basis is not None else None
        try:
            others = reader.others()
        except _DAMAGE as error:
            raise UserError(f"float tensors: {error}", where=where, hint=_HINT) from None
    if payload_sha256(layers) != manifest.payload_sha256:
        raise UserError("integers do not match their sha-256", where=where, hint=_HINT)
    manifest.sizes.file_bytes = path.stat().st_size
    return QuantizedFile(manifest, layers, others)


def read_layer(path: str | Path, name: str) -> HardLayer:
    """One layer, without reading the others' weights. UserError for an unknown name or a damaged file."""
    path = Path(path)
    with open_safetensors(path, framework="pt") as file:
        manifest = manifest_of(file, path)
        record = next((record for record in manifest.layers if record.name == name), None)
        if record is None:
            hint = did_you_mean(name, [record.name for record in manifest.layers])
            raise UserError(f"no quantized layer `{name}`", where=str(path), hint=hint)
        try:
            reader = layout.Reader(file, manifest.layers, manifest.packed_others)
            return _checked_layer(record, *reader.layer(record))
        except _DAMAGE as error:
            raise UserError(f"layer {name}: {error}", where=str(path), hint=_HINT) from None


def _checked_layer(record: LayerRecord, integers: Tensor, scale: Tensor, basis: Tensor | None) -> HardLayer:
    """The layer, when its integers are ones that the mask can form and its weights are finite. Else ValueError."""
    mask = equations.mask_from_string(record.mask)
    if not scale.isfinite().all():
        raise ValueError("scale is not finite")
    recorded = torch.tensor(record.scale, dtype=torch.float32).reshape(-1)
    if recorded.numel() and not torch.equal(recorded, scale):  # a bit-packed file's manifest does without
        raise ValueError("scale disagrees with the manifest")
    largest = int(integers.abs().max())
    if not equations.formable(integers, mask):
        raise ValueError(f"integers that mask {record.mask} cannot form")
    if not bool((scale.abs() * largest).isfinite().all()):
        raise ValueError("integers × scale is not finite")
    if basis is not None:
        if not bool((integers % 2 != 0).all()):
            raise ValueError("even integers, which no digits ±1 form")
        if not are_finite(basis):
            raise ValueError("levels that are not finite")
        if record.basis and not torch.equal(torch.tensor(record.basis, dtype=torch.float32), basis):
            raise ValueError("basis disagrees with the manifest")
    return HardLayer(record.name, integers, scale, mask, record.channel_dim, tuple(record.aliases), basis)
