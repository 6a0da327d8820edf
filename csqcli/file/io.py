"""The quantized file: defined once, used by save, load, report and export.

A safetensors file. For a quantized weight ``X`` it holds ``X_packed`` (uint8 codes, see `packing`) and ``X_scale``
(float32, [1] or [channels]); every other parameter and buffer stands under its own name; `storage` has the other forms
that `csq export` writes, and all of them are read here. One metadata key, ``csq``,
holds a JSON manifest: where the model comes from, its data config, the recipe as resolved, the budget asked and reached,
accuracy, and per layer the mask, planes, encoding and entropy. Integers × scale is the weight, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from csqcli.errors import UserError, did_you_mean, no_such_file
from csqcli.file import codes as packing
from csqcli.file import layout as storage
from csqcli.models import libraries as sources
from csqcli.models.coverage import Operations
from csqcli.models.libraries import ModelSpec
from csqcli.quant import equations
from csqcli.quant.activations import ActivationRecord
from csqcli.quant.hard_layer import HardLayer
from csqcli.system import limits as untrusted
from csqcli.system.files import replacing

SCHEMA_VERSION = 1
METADATA_KEY = "csq"
_DAMAGE = (ValueError, RuntimeError, SafetensorError)  # what decoding raises for bytes it cannot be given
_MANIFEST_BYTES, _MANIFEST_VALUES = 2**26, 2**22  # of its JSON; a layer takes a few hundred bytes, a channel's scale 20
_FLOAT32_MAX = torch.finfo(torch.float32).max

Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Scale = Annotated[float, Field(ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]
Percent = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="allow", allow_inf_nan=False
    )  # later versions may add; readers of this one ignore what they do not know


class ModelRecord(_Record):
    source: Name  # what rebuilds it: "timm:resnet18", "package.module:factory"
    library: Name
    name: Name
    arguments: Annotated[dict[str, Any], AfterValidator(untrusted.check_arguments)] = Field(default_factory=dict)
    num_classes: int = Field(ge=1, le=sources.MAX_CLASSES)
    weights_from: str
    checkpoint_sha256: str | None = None


class BudgetRecord(_Record):
    target_mean_bits: Amount | None  # null where nothing was asked for (float)
    mean_bits: Amount
    total_weights: Count


class SizesRecord(_Record):
    float_bytes: Count  # every parameter and buffer at 4 bytes
    paper_compression: Amount | None  # 32 / mean planes: the paper's count, weights only; null where no plane is left
    stored_bits_per_weight: Amount  # dense sign-magnitude layout
    entropy_bits_per_weight: Amount  # ideal order-0 coder, per layer
    file_bytes: Count | None = None  # measured; absent inside the file itself


class AccuracyRecord(_Record):
    float_top1: Percent | None = None
    soft_top1: Percent | None = None
    hard_top1: Percent | None = None
    hard_top5: Percent | None = None
    samples: Count = 0


class LayerRecord(_Record):
    name: Name
    shape: list[Annotated[int, Field(ge=1, lt=2**31)]] = Field(min_length=1, max_length=8)
    weights: Count
    mask: str = Field(pattern=r"\A[01]{1,8}\z")  # most significant plane first
    bits: int  # planes in use: the paper's precision
    stored_bits: int = Field(ge=0, le=9)  # dense sign-magnitude bits per weight
    entropy_bits: float = Field(ge=0, le=16)
    scale: Scale | list[Scale]  # value of integer 1
    channel_dim: int = 0
    encoding: str = Field(max_length=32)
    packed_bytes: Count
    aliases: list[Name] = Field(default_factory=list)
    macs: Count | None = (
        None  # multiply-accumulates of one image; absent where nothing uses the weight or none were counted
    )

    @model_validator(mode="after")
    def _agrees(self) -> LayerRecord:
        if self.weights != math.prod(self.shape) or self.bits != self.mask.count("1"):
            raise ValueError(f"{self.name}: mask, bits, shape and weights disagree")
        if not -len(self.shape) <= self.channel_dim < len(self.shape):
            raise ValueError(f"{self.name}: no dimension {self.channel_dim} in shape {self.shape}")
        return self


class ComputeRecord(_Record):
    """Operations of one image, and of which size.

    ``bops``: bit operations, Σ MACs · planes in use · bits of the layer's input (32 where activations are float). What no
    quantized weight takes part in (attention's products, layers left float) counts 32 · 32 per multiply-accumulate.
    """

    input_size: list[Count]
    macs: Count
    quantized_macs: Count
    bops: Count


class ActivationEntry(_Record):
    module: str = Field(max_length=512)  # whose input is rounded
    bits: int = Field(ge=1, le=16)
    signed: bool
    scale: float = Field(gt=0, allow_inf_nan=False)  # value of integer 1


class ParityRecord(_Record):
    """The certificate of an export: what was compared, between the hard model in torch and the file just written."""

    payload_sha256: str  # of the integers as read back
    layers_matched: Count
    layers_absent: list[str] = Field(default_factory=list)  # weights that the forward pass never uses (ONNX only)
    layers_int8: list[str] = Field(default_factory=list)  # inputs and weights both int8 (ONNX with int8 activations)
    calibrated: list[str] = Field(default_factory=list)  # layers whose output scale was measured, not trained
    inputs: str  # "8 synthetic images", "8 images of DATA"
    max_logit_error: Amount
    logit_std: Amount
    tolerance_in_std: Amount
    top1: Percent | None = None  # of this file through its engine
    samples: Count = 0
    engine: str  # "onnxruntime 1.32.0"
    versions: dict[str, str] = Field(default_factory=dict)
    file_bytes: Count = 0  # this file, certificate included
    graph_sha256: str | None = None  # of all of an ONNX file but its metadata
    load_seconds: Amount
    latency_ms: Amount | None = None  # batch 1, one thread, median
    latency_ratio: Amount | None = None  # fp32 time / this file's time, interleaved in one run: > 1 is faster


class Manifest(_Record):
    schema_version: int = SCHEMA_VERSION
    model: ModelRecord
    data_config: Annotated[dict[str, Any], AfterValidator(sources.check_data_config)]
    classes: list[str] = Field(default_factory=list)
    budget: BudgetRecord
    sizes: SizesRecord
    compute: ComputeRecord | None = None
    accuracy: AccuracyRecord = Field(default_factory=AccuracyRecord)
    layers: list[LayerRecord]
    activations: list[ActivationEntry] = Field(default_factory=list)
    left_float: list[dict[str, Any]] = Field(default_factory=list)  # tensors of ≥ 2 dimensions not quantized, and why
    payload_sha256: str
    environment: dict[str, str] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    form: storage.Form | Literal["onnx"] = "compact"  # how the tensors are laid out, see `storage`
    packed_others: list[storage.TensorRecord] = Field(default_factory=list)  # bit-packed files only
    parity: ParityRecord | None = None  # exported files only

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        total = sum(layer.weights for layer in self.layers)
        planes = sum(layer.weights * layer.bits for layer in self.layers)
        if total != self.budget.total_weights or (total and abs(planes / total - self.budget.mean_bits) > 1e-6):
            raise ValueError("the budget is not that of the layers")
        for kind in (itertools.chain.from_iterable((r.name, *r.aliases) for r in self.layers),
                     (r.name for r in self.packed_others), (r.module for r in self.activations)):  # fmt: skip
            names = list(kind)
            if len(set(names)) < len(names):
                raise ValueError("a name stands twice")
        return self

    @property
    def unpacked_bytes(self) -> int:
        """Bytes that the layers' weights take as float32, and a bit-packed file's other tensors as they are."""
        others = sum(math.prod(record.shape) * storage.itemsize(record.dtype) for record in self.packed_others)
        return 4 * sum(layer.weights for layer in self.layers) + others

    def activation_records(self) -> list[ActivationRecord]:
        """The activation quantizers, as `activations.attach` takes them."""
        return [ActivationRecord(entry.module, entry.bits, entry.signed, entry.scale) for entry in self.activations]

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(self.model.library, self.model.name, self.model.arguments)


@dataclass
class QuantizedFile:
    """A quantized file in memory."""

    manifest: Manifest
    layers: list[HardLayer]
    others: dict[str, Tensor]  # parameters and buffers that are not quantized

    def state_dict(self) -> dict[str, Tensor]:
        """Dequantized state dict; loads ``strict=True`` into the plain model."""
        state = dict(self.others)
        for layer in self.layers:
            weight = layer.weight()
            state.update(dict.fromkeys((layer.name, *layer.aliases), weight))
        return state


def assemble(
    model: nn.Module,
    layers: list[HardLayer],
    *,
    record: ModelRecord,
    data_config: Mapping[str, Any],
    target_bits: float | None,
    operations: Operations | None = None,
    **details: Any,
) -> QuantizedFile:
    """The file for a trained model: ``layers`` as hardened, all else from the model's own state dict.

    ``operations`` are what `inspect.count_macs` found. ``details`` are further manifest fields (classes, accuracy, recipe,
    environment, activations, left_float).
    """
    names = {name for layer in layers for name in (layer.name, *layer.aliases)}
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    others = {name: value.clone().contiguous() for name, value in state.items() if name not in names}
    trained = [(layer.name, value) for layer in layers for value in (layer.scale, state[layer.name])]
    for name, value in [*others.items(), *trained]:
        if sources.is_damaged(value):
            raise UserError("training left NaN or infinite values; nothing was written", where=name)
    records = [_layer_record(layer) for layer in layers]
    total = sum(r.weights for r in records)

    def mean(values: list[float]) -> float:
        return sum(v * r.weights for v, r in zip(values, records, strict=True)) / total if total else 32.0

    mean_bits = mean([r.bits for r in records])
    sizes = SizesRecord(
        float_bytes=4 * sum(value.numel() for value in state.values()),
        paper_compression=32 / mean_bits if mean_bits else None,
        stored_bits_per_weight=mean([r.stored_bits for r in records]),
        entropy_bits_per_weight=mean([r.entropy_bits for r in records]),
    )
    manifest = Manifest(
        model=record,
        data_config=dict(data_config),
        budget=BudgetRecord(target_mean_bits=target_bits, mean_bits=mean_bits, total_weights=total),
        sizes=sizes,
        layers=records,
        payload_sha256=payload_sha256(layers),
        **details,
    )
    if operations is not None:
        for layer in manifest.layers:
            layer.macs = operations.macs[layer.name]
        manifest.compute = _compute_record(manifest, operations)
    return QuantizedFile(manifest, layers, others)


def _compute_record(manifest: Manifest, operations: Operations) -> ComputeRecord:
    input_bits = {entry.module: entry.bits for entry in manifest.activations}
    quantized = bops = 0
    for layer in manifest.layers:
        macs = layer.macs or 0
        quantized += macs
        bops += macs * layer.bits * input_bits.get(layer.name.rpartition(".")[0], 32)
    rest = max(operations.total - quantized, 0)
    size = list(operations.input_size)
    return ComputeRecord(input_size=size, macs=operations.total, quantized_macs=quantized, bops=bops + rest * 32 * 32)


def _layer_record(layer: HardLayer) -> LayerRecord:
    data, encoding = packing.encode(layer.integers)
    scale = layer.scale.tolist()
    return LayerRecord(
        name=layer.name,
        shape=list(layer.integers.shape),
        weights=layer.integers.numel(),
        mask=equations.mask_string(layer.mask),
        bits=layer.planes,
        stored_bits=layer.stored_bits,
        entropy_bits=round(packing.entropy_bits(layer.integers), 6),
        scale=scale[0] if len(scale) == 1 else scale,
        channel_dim=layer.channel_dim,
        encoding=encoding,
        packed_bytes=data.numel(),
        aliases=list(layer.aliases),
    )


def payload_sha256(layers: list[HardLayer]) -> str:
    """SHA-256 over name and integers (little-endian int16) of every layer in order."""
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(layer.name.encode() + b"\0")
        digest.update(layer.integers.contiguous().to(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def write(
    path: Path, file: QuantizedFile, *, form: storage.Form = "compact", parity: ParityRecord | None = None
) -> int:
    """Write atomically in the given form; the bytes on disk. A certificate that ``file`` was read with is not kept."""
    stored = storage.store(file.layers, file.others, form)
    manifest = _described(file.manifest, stored, form)
    manifest.parity = parity
    with replacing(path) as temporary:
        for _ in range(4):  # the certificate states the size of the file that it is part of
            try:
                tensors, metadata = _with_manifest(stored.tensors, manifest)
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:
                raise UserError(f"cannot be written ({error})", where=str(path)) from None
            size = temporary.stat().st_size
            if parity is None or parity.file_bytes == size:
                break
            parity.file_bytes = size
    return path.stat().st_size


def _described(manifest: Manifest, stored: storage.Stored, form: storage.Form) -> Manifest:
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
    text = manifest.model_dump_json(exclude={"parity"}, exclude_defaults=True)
    packed = storage.as_tensor(storage.deflate(text.encode()))
    return tensors | {storage.MANIFEST: packed}, {METADATA_KEY: json.dumps(head)}


def is_quantized(path: Path) -> bool:
    """Whether a safetensors file carries csq's manifest."""
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_manifest(path: str | Path) -> Manifest:
    """The manifest alone, with the file's measured size. UserError for anything that is not a csq file."""
    path = Path(path)
    if path.suffix == ".onnx":
        from csqcli.export import runtime

        return runtime.read_manifest(path)
    with _opened(path) as file:
        manifest = _manifest(file, path)
    manifest.sizes.file_bytes = path.stat().st_size
    return manifest


def read(path: str | Path) -> QuantizedFile:
    """The whole file, checked: every tensor present, integers as hashed, masks and shapes consistent."""
    path = Path(path)
    where = str(path)
    with _opened(path) as file:
        manifest = _manifest(file, path)
        layers = []
        try:
            reader = storage.Reader(file, manifest.layers, manifest.packed_others)
        except _DAMAGE as error:
            raise UserError(f"float tensors: {error}", where=where, hint="the file is damaged") from None
        for record in manifest.layers:
            try:
                integers, scale = reader.layer(record)
                layers.append(_checked_layer(record, integers, scale))
            except _DAMAGE as error:
                raise UserError(f"layer {record.name}: {error}", where=where, hint="the file is damaged") from None
            record.scale = scale.tolist() if scale.numel() > 1 else float(scale)
        try:
            others = reader.others()
        except _DAMAGE as error:
            raise UserError(f"float tensors: {error}", where=where, hint="the file is damaged") from None
    if payload_sha256(layers) != manifest.payload_sha256:
        raise UserError("integers do not match their sha-256", where=where, hint="the file is damaged")
    manifest.sizes.file_bytes = path.stat().st_size
    return QuantizedFile(manifest, layers, others)


def read_layer(path: str | Path, name: str) -> HardLayer:
    """One layer, without reading the others' weights. UserError for an unknown name or a damaged file."""
    path = Path(path)
    with _opened(path) as file:
        manifest = _manifest(file, path)
        record = next((record for record in manifest.layers if record.name == name), None)
        if record is None:
            hint = did_you_mean(name, [record.name for record in manifest.layers])
            raise UserError(f"no quantized layer `{name}`", where=str(path), hint=hint)
        try:
            reader = storage.Reader(file, manifest.layers, manifest.packed_others)
            return _checked_layer(record, *reader.layer(record))
        except _DAMAGE as error:
            raise UserError(f"layer {name}: {error}", where=str(path), hint="the file is damaged") from None


def _checked_layer(record: LayerRecord, integers: Tensor, scale: Tensor) -> HardLayer:
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
    return HardLayer(record.name, integers, scale, mask, record.channel_dim, tuple(record.aliases))


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise no_such_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"not a safetensors file ({error})", where=str(path)) from None


def _manifest(file: Any, path: Path) -> Manifest:
    where = str(path)
    try:
        squeezed = storage.raw_bytes(file, storage.MANIFEST) if storage.MANIFEST in file.keys() else None
    except _DAMAGE as error:
        raise UserError(f"manifest is damaged ({error})", where=where) from None
    manifest = parse_manifest((file.metadata() or {}).get(METADATA_KEY), where=where, deflated=squeezed)
    try:
        untrusted.check_unpacked(manifest.unpacked_bytes, file_bytes=path.stat().st_size)
    except ValueError as error:
        raise UserError(f"manifest is damaged ({error} of weights)", where=where) from None
    return manifest


def parse_manifest(text: str | None, *, where: str, deflated: bytes | None = None) -> Manifest:
    """A manifest from its JSON; ``deflated`` holds the larger part of it in a bit-packed file. UserError for damage."""
    if text is None:
        raise UserError("not a csq file (no manifest)", where=where, hint="`csq search` writes one")
    try:
        raw = _read_json(text)
        if raw.get("schema_version") != SCHEMA_VERSION:
            hint = f"this csq reads version {SCHEMA_VERSION}; upgrade csq"
            raise UserError(f"schema version {raw.get('schema_version')!r}", where=where, hint=hint)
        if deflated is not None:
            raw |= _read_json(packing.inflate(deflated, storage.MANIFEST_LIMIT, exact=False))
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"manifest is damaged ({_first(error)})", where=where) from None
    except ValueError as error:
        raise UserError(f"manifest is damaged ({error})", where=where) from None


def _read_json(text: str | bytes) -> dict[str, Any]:
    if len(text) > _MANIFEST_BYTES:
        raise ValueError(f"{len(text):,} bytes")
    return untrusted.read_json(text, nodes=_MANIFEST_VALUES)


def _first(error: ValidationError) -> str:
    """The first problem: ``layers.0.bits: Input should be a valid integer``."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
