"""Every setting with its unit, range, default and reason. Unknown keys are refused with a suggestion.

A field's docstring is its help text in ``csq recipes schema``. The settings of a weight method are a section of its own, named
after the method; its model stands in `quant.catalog`, or beside a method from outside.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, SerializeAsAny, field_validator, model_validator

from csqcli.quant.catalog import AUTO, MANUAL, TRIALS, MethodCard, find_card
from csqcli.quant.costs import WEIGHTS
from csqcli.quant.method_settings import MethodSettings
from csqcli.quant.names import FLOAT_BITS, MOST_PLANES
from csqcli.system.choices import Amp, EngineName, Head, Weights
from csqcli.system.limits import check_arguments
from csqcli.system.settings import HASHED_ELSEWHERE, LARGE, RESULT_NEUTRAL, USERS_ONLY, Section

_MAX_BATCH = 2**20
ZEROQ = "zeroq"  # what data.calib takes in place of a folder
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
RESOURCE_TARGETS = ("target_size", "target_compression", "target_bops", "target_latency")
BYTE_TARGETS = ("target_size", "target_compression")
ShippedForm = Literal["bit-packed-small", "bit-packed"]
SHIPPED_FORMS: tuple[str, ...] = get_args(ShippedForm)  # those of `csq export` that a budget of bytes may be about


class ModelSettings(Section):
    """Where the network and its first weights come from."""

    source: str | None = None
    """timm or torchvision name, plain or as `LIBRARY:NAME`, `cifar_resnet20`, `cifar_vgg19bn`, `digits_cnn` or `package.module:factory`."""
    pretrained: bool = True
    """Load the library's pretrained weights when no checkpoint is given."""
    checkpoint: str | None = None
    """Weights file: .safetensors, .pth, .pt, .th or .tar. `builtin:digits` is the embedded digits checkpoint."""
    arguments: Annotated[dict[str, Any], AfterValidator(check_arguments)] = Field(default_factory=dict)
    """Keyword arguments for the model's constructor, e.g. `{drop_path_rate: 0.1}`."""
    weights: Weights = "auto"
    """Which weights to take where a checkpoint holds both averaged (EMA) and raw ones; `auto` takes the averaged."""
    warm_start: Annotated[str | None, HASHED_ELSEWHERE] = None
    """Weights that the search begins with in place of the float model's, which stays what is compared with and distilled from:
    the latents.safetensors that `csq sweep` leaves beside the model of the highest target, or another checkpoint of the network."""
    head: Head = "auto"
    """What becomes of the weights' classifier: `keep` maps labels into its outputs, `subset` keeps those of the data's classes,
    `new` makes a fresh one; `auto` leaves it where it has as many outputs as the data has classes, else `subset`."""


class DataSettings(Section):
    """Images, and how they become batches. What is unset follows the model's own data config."""

    source: Annotated[str | None, USERS_ONLY] = None
    """Folder or archive of class folders, `cifar10:DIR`, `csv:FILE`, `digits` and whatever else `csq search --help` lists."""
    calib: Annotated[str | None, USERS_ONLY] = None
    """Folder of images, labels not needed, that post-training quantization looks at in place of the training images; `zeroq`
    makes them from the model's BatchNorm statistics."""
    val_split: float | Literal["test"] | None = None
    """For data without a validation split: the share of the training images to hold out, of every class alike, or `test` to
    take the test split. Evaluation and finetuning of the file hold out the same images."""
    val_seed: int = Field(0, ge=0, lt=2**63)
    """Seeds which images `val_split` holds out; apart from `seed`, so that runs of other seeds hold out the same."""
    batch_size: int = Field(128, ge=1, le=_MAX_BATCH)
    """Training images per step."""
    micro_batch: Annotated[int, Field(ge=1, le=_MAX_BATCH)] | Literal["auto"] | None = None
    """Most images per forward pass: a batch is split into equal parts whose gradients add up; unset takes it whole. For memory.
    `auto`: the fewest parts that fit into the memory that is free at the start."""
    eval_batch_size: Annotated[int, RESULT_NEUTRAL] = Field(256, ge=1, le=_MAX_BATCH)
    """Validation images per step; does not change results."""
    workers: Annotated[int, RESULT_NEUTRAL, USERS_ONLY] = Field(2, ge=0, le=1024)
    """Loader processes; small data sets are held in memory and use none. Does not change results."""
    augment: Literal["auto", "none", "crop", "crop-flip", "imagenet"] = "auto"
    """`auto`: padded random crop and flip up to 64 pixels (no flip for digits), random resized crop and flip beyond. `imagenet`:
    the latter at any size (no flip for digits)."""
    input_size: int | None = Field(None, ge=1, le=4096)
    """Side of the square input in pixels."""
    mean: list[float] | None = None
    """Channel means in [0, 1] for normalisation."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """Channel standard deviations in [0, 1]."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "box"] | None = None
    """Resampling when images are resized."""
    crop_pct: float | None = Field(None, gt=0, le=1)
    """Centre crop at evaluation, as a share of the resized side."""
    train_limit: int | None = Field(None, ge=1)
    """Use only this many training images, spread evenly over the set."""
    val_limit: int | None = Field(None, ge=1)
    """Use only this many validation images, spread evenly over the set."""

    @field_validator("val_split", mode="before")
    @classmethod
    def _share_or_test(cls, value: Any) -> Any:
        if value is None or value == "test":
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1:
            return float(value)
        raise ValueError("Input should be a share above 0 and at most 1, or test")

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:  # one message, where pydantic has one for each kind
        if value is None or value == "auto" or (type(value) is int and 1 <= value <= _MAX_BATCH):
            return value
        raise ValueError(f"Input should be a whole number from 1 to {_MAX_BATCH:,}, or auto")


class QuantizationSettings(Section):
    """The budget and the method; the method's own settings stand in the section of its name."""

    method: str = AUTO
    """`auto` (chosen by the schedule), a name that `csq methods` lists, or `package.module:Class`."""
    target_bits: float | None = Field(None, gt=0)
    """Mean planes per weight element that the delivered model must not exceed; fractions are fine."""
    target_size: int | None = Field(None, ge=1)
    """Bytes that the file which ships must not exceed, as a number or as `2MB`, `500kB`, `1.5MiB`. Several targets are all kept."""
    target_compression: float | None = Field(None, gt=1)
    """How many times smaller than the float model (4 bytes a number) that file must be at least."""
    target_bops: float | None = Field(None, gt=0)
    """Bit operations of one image that the model must not exceed, as a number or as `5G`, `800M`."""
    target_latency: float | None = Field(None, gt=0, le=1e9)
    """Milliseconds for one image that the layers' latencies must not exceed together, from a table that `csq bench` measured."""
    latency_table: Annotated[str | None, USERS_ONLY] = None
    """File of `csq bench MODEL --json`; unset, the run measures its own when it starts."""
    latency_engine: EngineName | None = None
    """Engine that the run measures in; unset the first that is installed."""
    ship_as: ShippedForm = "bit-packed-small"
    """The form of the file that ships, which `target_size` and `target_compression` are about; it lies beside the model."""
    cost: str = WEIGHTS
    """What planes cost: `weights` (elements), `bops`, or `package.module:function`.
    The budget is what `target_bits` planes in every layer would cost."""
    allocator: str | None = None
    """Who decides the planes before training: a name that `csq methods` lists, or `package.module:function`. Unset: the method
    itself."""
    trials: int = Field(TRIALS, ge=1, le=10**6)
    """Networks that the allocator `haq` measures."""
    planes: dict[str, Annotated[int, Field(ge=0, le=MOST_PLANES)]] = Field(default_factory=dict)
    """For the allocator `manual`: planes by names or globs of weights; where several match a weight, the last one counts."""
    max_bits: int = Field(MOST_PLANES, ge=1, le=MOST_PLANES)
    """n: planes that each layer starts with. Unset, with `act_bits` 8 or fewer: 7, since int8 engines hold no integers of 8 planes."""
    act_bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, 32, "auto"] = 32
    """Bits of the inputs of quantized layers; 32 leaves them float, 1 is XNOR-Net's sign, `auto` gives each layer 2 to 8 within
    `target_act_bits`. The network's own input has 8."""
    target_act_bits: float | None = Field(None, ge=2, le=8)
    """With `act_bits: auto`: mean bits of the layers' inputs; never exceeded."""
    act_per: Literal["values", "macs"] = "values"
    """What that mean is over: the inputs' values (their bytes), or the multiply-accumulates that read them (bit operations)."""
    act_method: Literal["lsq", "pact", "dorefa", "xnor"] = "lsq"
    """How activation scales learn: `lsq` (learned step), `pact` (learned clipping level), or
    not at all: `dorefa` ([0, 1]). One bit is `xnor`, and only that. Unset: as the method's paper has it where that is one of
    these, else `lsq`."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of what training keeps per weight (moments, bit logits, momenta); bfloat16 takes half the memory."""

    @model_validator(mode="after")
    def _activations_agree(self) -> QuantizationSettings:
        if self.act_bits == "auto" and self.target_act_bits is None:
            raise ValueError("act_bits auto needs target_act_bits; pass --target-act-bits, e.g. --target-act-bits 4")
        if self.act_bits != "auto" and self.target_act_bits is not None:
            change = "say act_bits auto" if self.act_bits == FLOAT_BITS else "leave --act-bits out"
            raise ValueError(f"target_act_bits is a mean of searched widths, and act_bits is {self.act_bits}; {change}")
        if self.act_bits == 1 and self.act_method != "xnor":
            raise ValueError(f"act_bits 1 has act_method xnor, not {self.act_method}")
        if self.act_bits not in (1, FLOAT_BITS) and self.act_method == "xnor":
            raise ValueError(f"act_method xnor has act_bits 1, not {self.act_bits}")
        return self

    @field_validator("target_bops", mode="before")
    @classmethod
    def _operations_of_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg])\s*", value.lower())
        return value if found is None else float(found[1]) * _UNITS[found[2]]

    @field_validator("target_size", mode="before")
    @classmethod
    def _bytes_of_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(k|m|g|ki|mi|gi)?b?\s*", value.lower())
        if found is None:
            raise ValueError("Input should be a size: 2MB, 500kB, 1.5MiB or a number of bytes")
        return int(float(found[1]) * _UNITS[found[2] or ""])

    @model_validator(mode="after")
    def _targets_agree(self) -> QuantizationSettings:
        if self.target_size is not None and self.target_compression is not None:
            raise ValueError("target_size and target_compression are both about the same bytes; keep one")
        for key in ("latency_table", "latency_engine"):
            if getattr(self, key) is not None and self.target_latency is None:
                raise ValueError(f"{key} goes with target_latency")
        fields = type(self).model_fields
        if self.ship_as != fields["ship_as"].default and not self.in_bytes:
            raise ValueError("ship_as goes with target_size or target_compression")
        if self.cost != fields["cost"].default and self.target_bits is None and self.has_resource_target:
            raise ValueError("cost is what target_bits counts; the other targets count in their own unit")
        if self.act_per != fields["act_per"].default and self.act_bits != "auto":
            raise ValueError("act_per goes with target_act_bits")
        if self.latency_table is not None and self.latency_engine is not None:
            raise ValueError("latency_table says its engine itself; leave latency_engine out")
        return self

    @property
    def has_resource_target(self) -> bool:
        """Whether a budget is one of bytes, operations or time, not of mean planes."""
        return any(getattr(self, key) is not None for key in RESOURCE_TARGETS)

    @property
    def in_bytes(self) -> bool:
        """Whether a budget is one of bytes of the file that ships."""
        return any(getattr(self, key) is not None for key in BYTE_TARGETS)


class LayerRules(Section):
    """Rules by glob over weight names (`layer4.*`, `fc`, `*.downsample.*`); a glob that matches nothing is an error."""

    exclude: list[str] = Field(default_factory=list)
    """Stay float, and out of the budget's count."""
    keep: list[str] = Field(default_factory=list)
    """Quantized at all `max_bits` planes, counted."""
    min_bits: dict[str, int] = Field(default_factory=dict)
    """Fewest planes, e.g. `{fc: 4}`."""
    max_bits: dict[str, int] = Field(default_factory=dict)
    """Most planes, e.g. `{"layer4.*": 2}`."""
    floor: int = Field(1, ge=0, le=8)
    """Fewest planes of any layer; 0 allows the search to remove a layer's last plane."""

    @field_validator("exclude", "keep", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class OptimizerSettings(Section):
    """The base optimizer (timm) for everything that is not a gate, and the learning rate of the gates."""

    name: str = "auto"
    """Any name of timm's optimizer factory; `momentum` is plain SGD with momentum, as in the paper (timm's `sgd` is Nesterov).
    `auto` is `momentum`, but `adamw` for networks of LayerNorm and no BatchNorm (ViT, ConvNeXt, Swin) where `lr` is unset and no
    gates are trained."""
    lr: float | None = Field(None, gt=0, le=LARGE)
    """Peak learning rate; unset 0.05, or 0.001 where `auto` took adamw."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum, of the gates too."""
    weight_decay: float | None = Field(None, ge=0, le=LARGE)
    """L2 coefficient, on everything that is trained; unset 0.0005, or 0.05 where `auto` took adamw."""
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    """Learning rate over the run, per step; `steps` takes a tenth of it after each of `milestones`."""
    milestones: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Epochs of a phase after which `steps` lowers the rate, e.g. `[60, 120]`."""
    warmup_epochs: float | None = Field(None, ge=0)
    """Linear warm-up from 0; unset none, or 0.2 where `auto` took adamw."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Clip the gradient norm of dL/dW and all other parameters, the scales of activations among them."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross entropy."""
    distill: float = Field(0.0, ge=0, le=1)
    """Share of the loss that follows the float model's predictions (KL divergence) instead of the labels."""
    distill_features: float = Field(0.0, ge=0, le=LARGE)
    """Weight of a loss beside it that keeps what the classifier reads near the float model's: the squared distance over the squared
    length, mean over images."""
    mixup: float = Field(0.0, ge=0)
    """Mixup α (timm); 0 is off. Needs an even batch size."""
    cutmix: float = Field(0.0, ge=0)
    """CutMix α (timm); 0 is off. Needs an even batch size."""
    on_nonfinite: Annotated[Literal["stop", "rollback"], RESULT_NEUTRAL] = "stop"
    """When the loss becomes NaN or infinite: `stop`, or go back to the last saved state at half the learning rates, thrice at most."""

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> OptimizerSettings:
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError("schedule steps and milestones go together")
        return self

    def chosen(self, *, adamw: bool) -> OptimizerSettings:
        """The same with nothing left open: what ``auto`` means, and a value for all that is unset."""
        adamw = adamw and self.name == "auto" and self.lr is None
        usual = _ADAMW if adamw else _MOMENTUM
        unset = {key: value for key, value in usual.items() if getattr(self, key) in (None, "auto")}
        return self.model_copy(update=unset)

    @property
    def peak_lr(self) -> float:
        """`lr` of settings with nothing left open."""
        assert self.lr is not None
        return self.lr

    @property
    def l2(self) -> float:
        """`weight_decay` of settings with nothing left open."""
        assert self.weight_decay is not None
        return self.weight_decay


_MOMENTUM = {"name": "momentum", "lr": 0.05, "weight_decay": 5e-4, "warmup_epochs": 0.0}
_ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 0.2}


class AdaptationSettings(Section):
    """Float training before the search: a pretrained model learns the data first. The accuracy it reaches is the float accuracy
    of the report, and distillation follows it. The model as it came is kept where training made it worse."""

    epochs: int = Field(0, ge=0, le=10**6)
    """Epochs in float before the search; 0 for none."""
    lr: float | None = Field(None, gt=0, le=LARGE)
    """Peak learning rate; 0.2 of the search's when unset, since only the head may be new."""


class FinetuneSettings(Section):
    """The second half of Algorithm 1: masks fixed, temperature rewound, bits trained again."""

    epochs: int = Field(0, ge=0, le=10**6)
    """Epochs after a search; 0 for none."""
    lr: float | None = Field(None, gt=0, le=LARGE)
    """Peak learning rate; 0.4 of the search's when unset, since the model is already trained at its precision."""
    staged_lr: float | None = Field(None, gt=0, le=LARGE)
    """`staged.latent_lr` where `staged` trains the integers on; unset: the search's where that was `staged`, else its default."""
    teacher: Annotated[str | None, USERS_ONLY, HASHED_ELSEWHERE] = None
    """Float weights that `optimizer.distill` and `distill_features` follow where `csq finetune` trains a file on: a checkpoint, or the
    folder of a float run. A search follows the float model that it has at hand."""


class Recipe(Section):
    """One run, completely. `recipe.yaml` in a run's folder is this, resolved, and reruns the job."""

    description: Annotated[str, RESULT_NEUTRAL] = ""
    """One line for `csq recipes`."""
    model: Annotated[ModelSettings, USERS_ONLY] = Field(default_factory=ModelSettings)
    """The network."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The images."""
    quantization: QuantizationSettings = Field(default_factory=QuantizationSettings)
    """The method and its budget."""
    method_settings: SerializeAsAny[MethodSettings] = Field(default_factory=MethodSettings, exclude=True)
    """The chosen method's own settings; in YAML they stand in the section of its name."""
    method_why: str = Field("", exclude=True)
    """Why `auto` chose the method; empty where it was named."""
    layers: LayerRules = Field(default_factory=LayerRules)
    """Per-layer rules."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """Training."""
    adaptation: AdaptationSettings = Field(default_factory=AdaptationSettings)
    """The optional float phase before the search."""
    finetune: FinetuneSettings = Field(default_factory=FinetuneSettings)
    """The optional second phase."""
    epochs: int = Field(10, ge=0, le=10**6)
    """Epochs of the search; 0 is post-training quantization (method `ptq`)."""
    max_steps: int | None = Field(None, ge=1, le=10**9)
    """Stop every epoch after this many steps; for trying a job out."""
    bn_recalibration_batches: int = Field(100, ge=0, le=10**6)
    """Training batches that re-estimate BatchNorm statistics once the weights are hard; 0 leaves them."""
    batchnorm: Literal["train", "frozen"] = "train"
    """`frozen`: training uses the means and variances that there are and leaves them, and nothing is re-estimated after it; for short
    runs on a network that is already good at this image size. Scales and biases are trained; `ptq` corrects statistics as ever."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds data order, augmentation and fresh weights."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads; unset leaves torch's choice. Runs repeat bit for bit at equal threads; tiny models are fastest with 1."""
    amp: Amp = "auto"
    """Training in bfloat16 autocast: `auto` on a GPU, off on the CPU. Gates, latents and evaluation stay float32."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory format of weights and images: `auto` is channels_last on a GPU and for networks with depthwise convolutions,
    else contiguous (docs/performance.md)."""
    compile: Annotated[bool, USERS_ONLY] = False
    """Train through torch.compile; worth its minutes of compilation in long runs. Needs a C++ compiler on the CPU."""
    save_every_minutes: Annotated[float, RESULT_NEUTRAL] = Field(10.0, gt=0)
    """Save the resume state inside long epochs too; it is always saved after each."""
    log: Annotated[list[Literal["tensorboard", "trackio", "mlflow"]], RESULT_NEUTRAL, USERS_ONLY] = Field(
        default_factory=list
    )
    """Experiment trackers that get the lines of metrics.jsonl too; each is a package of its own: `pip install 'csq[mlflow]'`."""
    device: Annotated[str, RESULT_NEUTRAL] = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes a CUDA GPU when there is one."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", value) is None:
            raise ValueError("Input should be auto, cpu, cuda, cuda:N or mps")
        return value

    @field_validator("amp", "channels_last", mode="before")
    @classmethod
    def _on_and_off_are_words(cls, value: Any) -> Any:  # YAML 1.1 reads them as true and false
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _target_within_planes(self) -> Recipe:
        target, planes = self.quantization.target_bits, self.quantization.max_bits
        if target is not None and target > planes and self.card.takes != "planes":
            most = f"{planes}" if planes == MOST_PLANES else f"{planes}, which is quantization.max_bits"
            raise ValueError(f"target_bits {target:g} is too many; at most {most}")
        return self

    @model_validator(mode="after")
    def _planes_are_manual(self) -> Recipe:
        if bool(self.quantization.planes) != (self.quantization.allocator == MANUAL):
            raise ValueError("quantization.planes and the allocator manual go together; --planes FILE sets both")
        return self

    @model_validator(mode="after")
    def _pairs_to_mix(self) -> Recipe:
        if (self.optimizer.mixup or self.optimizer.cutmix) and self.data.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even data.batch_size, not {self.data.batch_size}")
        return self

    @property
    def card(self) -> MethodCard:
        """The weight method."""
        return find_card(self.quantization.method, where="quantization.method")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, the method's settings in the section of its name."""
        settings = self.method_settings.model_dump(mode="json")
        return self.model_dump(mode="json") | ({self.card.section: settings} if settings else {})
