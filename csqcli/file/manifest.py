"""The manifest: everything a quantized file says about itself, as pydantic models. No input or output, no torch, no NumPy.

Writing and reading are held to different rules. Code that makes a record may use only the fields below, so a misspelt field
is an error where it is written. A file may come from a later csq that knows more: :func:`from_json_object` passes over what
this one does not know, so csq never writes a statement that it did not understand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from typing_extensions import Self

from csqcli.models.data_config import check_data_config
from csqcli.models.spec import ModelSpec
from csqcli.system.limits import MAX_CLASSES, check_arguments

SCHEMA_VERSION = 1
BASIS_SCHEMA_VERSION = 2  # of files with a learned basis, which readers of version 1 would take for integers × scale
METADATA_KEY = "csq"  # under which a safetensors or ONNX file's metadata holds the manifest
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
ITEM_BYTES = {  # of the types that a parameter or buffer may have
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

Form = Literal["compact", "int8-packed", "bit-packed", "state-dict", "torchao"]  # of a safetensors file, see `layout`
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Scale = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]
Percent = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]

_FROM_FILE = {"from_file": True}  # validation context


class Record(BaseModel):
    """Base of all parts. Unknown fields are errors, except while a file is read: there they are passed over."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _pass_over_unknown(cls, value: Any, info: ValidationInfo) -> Any:
        if info.context == _FROM_FILE and isinstance(value, Mapping):
            return {name: part for name, part in value.items() if name in cls.model_fields}
        return value

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced. Raises TypeError for a field that does not exist; pydantic would take it."""
        unknown = set(update or ()) - set(type(self).model_fields)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        return super().model_copy(update=update, deep=deep)


class ModelRecord(Record):
    """Where the architecture and its first weights come from."""

    source: Name  # what rebuilds it: "timm:resnet18", "package.module:factory"
    library: Name
    name: Name
    arguments: Annotated[dict[str, Any], AfterValidator(check_arguments)] = Field(default_factory=dict)
    num_classes: int = Field(ge=1, le=MAX_CLASSES)
    weights_from: str  # "pretrained", "random", "factory", or the checkpoint's file name
    checkpoint_sha256: str | None = None


class BudgetRecord(Record):
    """Mean planes per weight element: asked for, and reached."""

    target_mean_bits: Amount | None  # null where nothing was asked for (float)
    mean_bits: Amount
    total_weights: Count


class SizesRecord(Record):
    """The size, counted in four ways."""

    float_bytes: Count  # every parameter and buffer at 4 bytes; shared weights once
    paper_compression: Amount | None  # 32 / mean planes: the paper's count, weights only; null where no plane is left
    stored_bits_per_weight: Amount  # dense sign-magnitude layout
    entropy_bits_per_weight: Amount  # ideal order-0 coder, per layer
    file_bytes: Count | None = None  # measured; absent inside the file itself
    parts: dict[str, Count] = Field(default_factory=dict)  # of file_bytes: integers, other tensors by type, description


class AccuracyRecord(Record):
    """Accuracy in percent on ``samples`` validation images: before quantization, before hardening, and as delivered."""

    float_top1: Percent | None = None
    soft_top1: Percent | None = None
    unit_steps_top1: Percent | None = None  # every gate as its unit step instead, the paper's hardening; not delivered
    hard_top1: Percent | None = None
    hard_top5: Percent | None = None
    samples: Count = 0
    float_top1_present: Percent | None = None  # among the classes of the data, where the model has more
    hard_top1_present: Percent | None = None


class LayerRecord(Record):
    """One quantized weight tensor, and how its integers are stored."""

    name: Name
    shape: list[Annotated[int, Field(ge=1, lt=2**31)]] = Field(min_length=1, max_length=8)
    weights: Count
    mask: str = Field(pattern=r"\A[01]{1,8}\z")  # most significant plane first
    bits: int  # planes in use: the paper's precision
    stored_bits: int = Field(ge=0, le=9)  # dense sign-magnitude bits per weight
    entropy_bits: float = Field(ge=0, le=16)
    scale: (
        Scale | list[Scale]
    )  # value of integer 1; one, or one per channel; [] where a bit-packed file has tensors for it
    channel_dim: int = 0
    basis: list[list[Scale]] | None = None  # [planes][channels or 1]: levels are Σ ± these; [] as for `scale`
    encoding: str = Field(max_length=32)
    packed_bytes: Count
    aliases: list[Name] = Field(default_factory=list)  # further names of the same tensor (tied weights)
    macs: Count | None = None  # multiply-accumulates of one image; null where none use the weight or none were counted

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.weights != math.prod(self.shape) or self.bits != self.mask.count("1"):
            raise ValueError(f"{self.name}: mask, bits, shape and weights disagree")
        if not -len(self.shape) <= self.channel_dim < len(self.shape):
            raise ValueError(f"{self.name}: no dimension {self.channel_dim} in shape {self.shape}")
        if self.basis is not None and "0" in self.mask.strip("0"):
            raise ValueError(f"{self.name}: a basis on planes that have a gap")
        if self.basis:
            widths = {len(row) for row in self.basis}
            if len(self.basis) != self.bits or widths not in ({1}, {self.shape[self.channel_dim]}):
                raise ValueError(f"{self.name}: a basis of {len(self.basis)} rows of {sorted(widths)} values")
        return self


class ComputeRecord(Record):
    """Operations of one image, and of which size.

    ``bops``: bit operations, Σ MACs · planes in use · bits of the layer's input (32 where activations are float). What no
    quantized weight takes part in (attention's products, layers left float) counts 32 · 32 per multiply-accumulate.
    """

    input_size: list[Count]
    macs: Count
    quantized_macs: Count
    bops: Count


class ActivationEntry(Record):
    """The quantizer on a layer's input."""

    module: str = Field(max_length=512)  # whose input is rounded
    bits: int = Field(ge=1, le=16)
    signed: bool
    # value of integer 1; times the largest integer still a float32. One signed bit is the sign: −scale or scale.
    scale: float = Field(ge=1e-30, le=1e30)


class TensorRecord(Record):
    """A float parameter or buffer inside a bit-packed file; those stored in one type follow each other in ``csq_TYPE``."""

    name: Name
    dtype: str  # in the model
    shape: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(max_length=8)
    stored: Literal["float16"] | None = None  # in the file, where that holds every value of a float32 tensor exactly
    exponent: int = Field(0, ge=-256, le=256)  # stored values are those of the model times 2^exponent

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in ITEM_BYTES:
            raise ValueError(f"unknown type {dtype}")
        return dtype

    @property
    def file_dtype(self) -> str:
        """The type that the values have in the file."""
        return self.stored or self.dtype


class ParityRecord(Record):
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
    hard_top1: Percent | None = None  # of the hard model in torch, on the same images
    samples: Count = 0
    made_for: str | None = None  # the engine that the file is made for, where another one verified it
    notes: list[str] = Field(default_factory=list)  # what the form did that a reader should know
    engine: str  # "onnxruntime 1.32.0"
    versions: dict[str, str] = Field(default_factory=dict)
    file_bytes: Count = 0  # this file, certificate included
    graph_sha256: str | None = None  # of all of an ONNX file but its metadata
    load_seconds: Amount
    latency_ms: Amount | None = None  # batch 1, one thread, median
    latency_ratio: Amount | None = None  # fp32 time / this file's time, interleaved in one run: > 1 is faster

    @model_serializer(mode="wrap")
    def _as_stored(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """``made_for`` is written where it says something, so that all other files keep their bytes."""
        stored: dict[str, Any] = handler(self)
        if self.made_for is None:
            stored.pop("made_for", None)
        return stored


class Manifest(Record):
    """All that a quantized file says about itself."""

    schema_version: int = SCHEMA_VERSION
    model: ModelRecord
    data_config: Annotated[dict[str, Any], AfterValidator(check_data_config)]
    classes: list[str] = Field(default_factory=list)  # of the outputs, in order
    trained_outputs: list[Annotated[int, Field(ge=0, lt=MAX_CLASSES)]] | None = None  # that the data had; null: all
    budget: BudgetRecord
    sizes: SizesRecord
    compute: ComputeRecord | None = None
    accuracy: AccuracyRecord = Field(default_factory=AccuracyRecord)
    layers: list[LayerRecord]
    activations: list[ActivationEntry] = Field(default_factory=list)
    left_float: list[dict[str, Any]] = Field(default_factory=list)  # name, shape, why: tensors of ≥ 2 dimensions
    payload_sha256: str
    environment: dict[str, str] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    folded: bool = False  # BatchNorm's statistics are in its scale and shift: for inference alone
    form: str = Field(
        "compact", max_length=64
    )  # a `Form`, "onnx", "litert", or the name of an export form from outside
    packed_others: list[TensorRecord] = Field(default_factory=list)  # bit-packed files only
    parity: ParityRecord | None = None  # exported files only

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        total = sum(layer.weights for layer in self.layers)
        planes = sum(layer.weights * layer.bits for layer in self.layers)
        if total != self.budget.total_weights or (total and abs(planes / total - self.budget.mean_bits) > 1e-6):
            raise ValueError("the budget is not that of the layers")
        if self.trained_outputs is not None and max(self.trained_outputs, default=0) >= self.model.num_classes:
            raise ValueError("trained_outputs has one that the model lacks")
        if self.schema_version < BASIS_SCHEMA_VERSION and any(layer.basis is not None for layer in self.layers):
            raise ValueError(f"a learned basis in schema version {self.schema_version}")
        for kind in (itertools.chain.from_iterable((r.name, *r.aliases) for r in self.layers),
                     (r.name for r in self.packed_others), (r.module for r in self.activations)):  # fmt: skip
            names = list(kind)
            if len(set(names)) < len(names):
                raise ValueError("two tensors or modules have the same name")
        return self

    @property
    def unpacked_bytes(self) -> int:
        """Bytes that the layers' weights take as float32, and a bit-packed file's other tensors as they are."""
        others = sum(math.prod(record.shape) * ITEM_BYTES[record.dtype] for record in self.packed_others)
        return 4 * sum(layer.weights for layer in self.layers) + others

    @property
    def spec(self) -> ModelSpec:
        """What builds the architecture again."""
        return ModelSpec(self.model.library, self.model.name, self.model.arguments)


def from_json_object(raw: Mapping[str, Any]) -> Manifest:
    """A manifest as it was read out of a file. Raises pydantic's ValidationError; unknown fields are passed over."""
    return Manifest.model_validate(raw, context=_FROM_FILE)
