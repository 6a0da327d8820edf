"""Every knob with its unit, range, default and reason. Unknown keys are refused with a suggestion.

A field's docstring is its help text, in ``csq recipes schema`` and in docs/recipes.md alike. Command line beats recipe
beats default.
"""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from csqcli.errors import UserError, did_you_mean
from csqcli.untrusted import MAX_DEPTH, check_arguments, check_tree

Method = Literal["csq", "csq-paper", "csq-uniform", "ste", "lsq", "float"]
DEFAULT_RECIPE = "short"
_MAX_BATCH = 2**20
_MAX_BYTES, _MAX_VALUES = 2**18, 10_000  # of a recipe file; a rule per layer of the largest model takes less


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, allow_inf_nan=False
    )


class ModelSettings(_Section):
    """Where the network and its first weights come from."""

    source: str | None = None
    """timm or torchvision name, plain or as `LIBRARY:NAME`, `cifar_resnet20`, `cifar_vgg19bn`, `digits_cnn` or `package.module:factory`."""
    pretrained: bool = True
    """Load the library's pretrained weights when no checkpoint is given."""
    checkpoint: str | None = None
    """Weights file: .safetensors, .pth, .pt, .th or .tar. `builtin:digits` is the embedded digits checkpoint."""
    arguments: Annotated[dict[str, Any], AfterValidator(check_arguments)] = Field(default_factory=dict)
    """Keyword arguments for the model's constructor, e.g. `{drop_path_rate: 0.1}`."""


class DataSettings(_Section):
    """Images, and how they become batches. What is unset follows the model's own data config."""

    source: str | None = None
    """Image folder with `train/` and `val/` (`valid/`, `validation/`, `test/`), `cifar10:DIR`, `cifar100:DIR` or `digits`."""
    batch_size: int = Field(128, ge=1, le=_MAX_BATCH)
    """Training images per step."""
    micro_batch: Annotated[int, Field(ge=1, le=_MAX_BATCH)] | Literal["auto"] | None = None
    """Most images per forward pass: a batch is split into equal parts whose gradients add up; unset takes it whole. For memory.
    `auto`: the fewest parts that fit into the memory that is free at the start."""
    eval_batch_size: int = Field(256, ge=1, le=_MAX_BATCH)
    """Validation images per step; does not change results."""
    workers: int = Field(2, ge=0, le=1024)
    """Loader processes; small data sets are held in memory and use none. Does not change results."""
    augment: Literal["auto", "none", "crop", "crop-flip", "imagenet"] = "auto"
    """`auto`: padded random crop and flip up to 64 pixels (no flip for digits), random resized crop and flip beyond."""
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

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:  # one message, where pydantic has one for each kind
        if value is None or value == "auto" or (type(value) is int and 1 <= value <= _MAX_BATCH):
            return value
        raise ValueError(f"Input should be a whole number from 1 to {_MAX_BATCH:,}, or auto")


class QuantizationSettings(_Section):
    """The budget, and how planes and bits are trained."""

    method: Method = "csq"
    """`csq`, `csq-paper` (Algorithm 1 unmodified), `csq-uniform` (Eq. 3, fixed planes), or a yardstick: `ste`, `lsq`, `float`."""
    target_bits: float | None = Field(None, gt=0)
    """Mean planes per weight element that the delivered model must not exceed; fractions are fine."""
    max_bits: int = Field(8, ge=1, le=8)
    """n: planes that each layer starts with."""
    act_bits: Literal[2, 3, 4, 8, 32] = 32
    """Bits of the inputs of quantized layers; 32 leaves them float. The network's own input has 8."""
    act_method: Literal["lsq", "pact"] = "lsq"
    """How activation scales learn: `lsq` (learned step), `pact` (learned clipping level, the paper's at 3 bits and below)."""
    search_share: float = Field(0.1, gt=0, lt=1)
    """`csq`: share of the steps in which masks are soft; then planes are fixed and integers trained."""
    soft_share: float = Field(0.5, ge=0, le=1)
    """`csq`: share of the steps after which every weight is hard; until then integers harden gradually."""
    mask_beta_initial: float = Field(1.0, gt=0)
    """`csq`: temperature of the soft masks at the first step."""
    mask_beta_final: float = Field(20.0, gt=0)
    """`csq`: temperature of the soft masks when planes are fixed."""
    latent_lr: float = Field(0.01, gt=0)
    """`csq`: peak step of the latent weights, in units of the layer's one-plane step; follows optimizer.schedule."""
    recovery: float = Field(0.25, gt=0, le=1)
    """`csq`: discount of a plane's importance per plane below it, for what training at few planes wins back."""
    per_channel: bool = True
    """`csq`: one scale per output channel instead of one per layer."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of Adam's moments (`csq`), or of bit logits and momenta (gate methods); bfloat16 takes half the memory."""
    beta_initial: float = Field(1.0, gt=0)
    """Gate methods (`csq-paper`, `csq-uniform`), as all below: β0, gate temperature at the start."""
    beta_final: float = Field(20.0, gt=0)
    """β at the end, where gates should be close to unit steps; 200 in the paper."""
    beta_schedule: Literal["epoch", "step"] = "step"
    """Raise β once per epoch (the paper) or at every step (short schedules)."""
    reg_strength: float = Field(0.01, ge=0)
    """λ of Eq. 7."""
    logit: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Distance of bit logits from the decision boundary at the start; on-bits at +logit, all others at −logit. `auto`: 1 from
    a checkpoint; from scratch what weight decay takes to |βm| = 4 by the end, at most 1."""
    mask_logit: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """m_B at the start; ≥ 0 so that every plane is in use at step 0. `auto`: as for `logit`."""
    refit_scale: bool = True
    """Refit each layer's scale in closed form when β moves, so that the weights stay where they are."""
    digits: Literal["signed", "sign-magnitude"] = "signed"
    """Code that bits start from: a sign of its own for every plane's digit, so that dropping planes rounds, or the weight's
    sign for all of them (the authors' code)."""
    init_scale: Annotated[float, Field(gt=0)] | Literal["mse"] = 0.6
    """s at the start, as a share of the layer's largest weight; `mse`: the scale with the least squared error at
    target_bits planes."""
    gate_steps: Literal["preconditioned", "sgd"] = "preconditioned"
    """Steps on bit logits: as large in the weights as SGD's on the weights would be, at every β and scale, or SGD on the
    logits (the paper)."""
    precision_count: Literal["sign", "soft"] = "sign"
    """Planes that Δ_S of Eq. 7 counts: those with m_B ≥ 0 (the paper), or Σ f(m_B)."""
    fix_masks_at: float = Field(0.4, gt=0, le=1)
    """Share of training after which planes are chosen within the budget and fixed, and bits train on (Eq. 4); 1 searches to
    the end (the paper)."""
    restart_beta: Annotated[float, Field(gt=0)] | None = 2.0
    """β that bits restart from when planes are fixed, with logits within ±1; unset leaves bits and β as they are."""
    rounding: Literal["threshold", "nearest"] = "nearest"
    """Hardening: every gate to its unit step (the paper), or each weight to the level nearest to its soft weight, with a
    least-squares scale."""
    harden_at: float = Field(0.9, gt=0, le=1)
    """Share of training after which the weights are hard and fixed, and the rest of the model adapts to them."""


class LayerRules(_Section):
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


class OptimizerSettings(_Section):
    """The base optimizer (timm) for everything that is not a gate, and the learning rate of the gates."""

    name: str = "momentum"
    """Any name of timm's optimizer factory; `momentum` is plain SGD with momentum, as in the paper (timm's `sgd` is Nesterov)."""
    lr: float = Field(0.05, gt=0)
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum, of the gates too."""
    weight_decay: float = Field(5e-4, ge=0)
    """L2 coefficient, on everything that is trained."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the run, per step."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Linear warm-up from 0."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Clip the gradient norm of dL/dW and all other parameters."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross entropy."""
    distill: float = Field(0.0, ge=0, le=1)
    """Share of the loss that follows the float model's predictions (KL divergence) instead of the labels."""
    mixup: float = Field(0.0, ge=0)
    """Mixup α (timm); 0 is off. Needs an even batch size."""
    cutmix: float = Field(0.0, ge=0)
    """CutMix α (timm); 0 is off. Needs an even batch size."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """When the loss becomes NaN or infinite: `stop`, or go back to the last saved state at half the learning rates, thrice at most."""


class FinetuneSettings(_Section):
    """The second half of Algorithm 1: masks fixed, temperature rewound, bits trained again."""

    epochs: int = Field(0, ge=0, le=10**6)
    """Epochs after a search; 0 for none."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; 0.4 of the search's when unset, since the model is already trained at its precision."""


class Recipe(_Section):
    """One run, completely. `recipe.yaml` in a run's folder is this, resolved, and reruns the job."""

    description: str = ""
    """One line for `csq recipes`."""
    model: ModelSettings = Field(default_factory=ModelSettings)
    """The network."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The images."""
    quantization: QuantizationSettings = Field(default_factory=QuantizationSettings)
    """The method and its budget."""
    layers: LayerRules = Field(default_factory=LayerRules)
    """Per-layer rules."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """Training."""
    finetune: FinetuneSettings = Field(default_factory=FinetuneSettings)
    """The optional second phase."""
    epochs: int = Field(10, ge=1, le=10**6)
    """Epochs of the search."""
    max_steps: int | None = Field(None, ge=1, le=10**9)
    """Stop every epoch after this many steps; for trying a job out."""
    bn_recalibration_batches: int = Field(100, ge=0, le=10**6)
    """Training batches that re-estimate BatchNorm statistics once the weights are hard; 0 leaves them."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds data order, augmentation and fresh weights."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads; unset leaves torch's choice. Runs repeat bit for bit at equal threads; tiny models are fastest with 1."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """Training in bfloat16 autocast: `auto` on a GPU, off on the CPU. Gates, latents and evaluation stay float32."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory format of weights and images: `auto` is channels_last on a GPU, contiguous on the CPU."""
    compile: bool = False
    """Train through torch.compile; worth its minutes of compilation in long runs. Needs a C++ compiler on the CPU."""
    save_every_minutes: float = Field(10.0, gt=0)
    """Save the resume state inside long epochs too; it is always saved after each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""

    @model_validator(mode="after")
    def _target_within_planes(self) -> Recipe:
        target, planes = self.quantization.target_bits, self.quantization.max_bits
        if target is not None and target > planes and self.quantization.method in ("csq", "csq-paper"):
            raise ValueError(f"target_bits {target:g} is more than max_bits {planes}")
        return self

    @model_validator(mode="after")
    def _pairs_to_mix(self) -> Recipe:
        if (self.optimizer.mixup or self.optimizer.cutmix) and self.data.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even data.batch_size, not {self.data.batch_size}")
        return self


def _folder() -> Path:
    """Shipped recipes: inside the installed package, or `recipes/` beside it in a checkout."""
    installed = Path(str(resources.files("csqcli"))) / "recipes"
    return installed if installed.is_dir() else installed.parent.parent / "recipes"


def builtin_names() -> list[str]:
    """Names of the recipes that ship with csq."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def read(name_or_file: str) -> tuple[dict[str, Any], str]:
    """A recipe's raw mapping, by shipped name or by path, and what to call it in messages."""
    if name_or_file in builtin_names():
        text, where = (_folder() / f"{name_or_file}.yaml").read_text(encoding="utf-8"), name_or_file
    else:
        path = Path(name_or_file)
        if not path.is_file():
            hint = did_you_mean(name_or_file, builtin_names()) or f"shipped recipes: {', '.join(builtin_names())}"
            raise UserError("no such recipe or file", where=name_or_file, hint=hint)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise UserError(f"is larger than {_MAX_BYTES:,} bytes", where=name_or_file, hint="give a recipe")
            text, where = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read ({error})", where=name_or_file) from None
    try:
        raw = _load_yaml(text) or {}
    except ValueError as error:
        raise UserError(f"not valid YAML: {error}", where=where) from None
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of settings", where=where)
    return raw, where


class _Loader(yaml.SafeLoader):
    """Stops where the nesting gets deep, which PyYAML reads in quadratic time."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _load_yaml(text: str) -> Any:
    """YAML of plain values: no objects, and no more of them than a recipe needs. ValueError for anything else."""
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, LookupError, AttributeError, TypeError) as error:  # PyYAML's own slips too
        raise ValueError(error) from None
    check_tree(value, nodes=_MAX_VALUES)
    return value


def resolve(name_or_file: str, overrides: dict[str, Any]) -> Recipe:
    """The recipe with ``overrides`` ({dotted key: value}) laid over it.

    Raises UserError for unknown keys, values out of range and ambiguous short keys.
    """
    raw, where = read(name_or_file)
    return resolve_from(raw, overrides, where=where)


def resolve_from(raw: dict[str, Any], overrides: dict[str, Any], *, where: str) -> Recipe:
    """As :func:`resolve`, from a raw mapping."""
    raw = copy.deepcopy(raw)
    for key, value in overrides.items():
        section = raw
        *parents, leaf = full_key(key).split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"`{parent}` is not a section", where=where)
        section[leaf] = value
    return validate(raw, where=where)


def resolve_stored(raw: dict[str, Any], overrides: dict[str, Any], *, where: str) -> Recipe:
    """As :func:`resolve`, from the recipe inside a model file.

    Whatever would make csq import or read something (model, data.source) or start processes (data.workers, compile) is
    left out of it: only users name those.
    """
    kept = {name: part for name, part in raw.items() if name not in ("model", "compile")}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {name: value for name, value in kept["data"].items() if name not in ("source", "workers")}
    return resolve_from(kept, overrides, where=where)


def validate(raw: dict[str, Any], *, where: str) -> Recipe:
    """A Recipe from a raw mapping; the first problem as one UserError."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            hint = _suggest(str(problem["loc"][-1]))
            raise UserError(f"unknown key `{key}`", where=where, hint=hint or "see `csq recipes schema`") from None
        given = problem.get("input")
        shown = f" (got {given!r})" if not isinstance(given, dict) and len(repr(given)) < 60 else ""
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{key}: {message}{shown}" if key else message, where=where) from None


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["optimizer.lr=0.1"]`` → {"optimizer.lr": 0.1}; values are YAML."""
    parsed = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"`{assignment}` is not key=value", where="--set", hint="e.g. --set optimizer.lr=0.05")
        try:
            parsed[full_key(key.strip())] = _load_yaml(value)
        except ValueError:
            raise UserError(f"`{value}` is not a YAML value", where=f"--set {key}") from None
    return parsed


def full_key(key: str) -> str:
    """The dotted key for a full or unambiguous short one (``max_bits`` alone is ambiguous, ``lr`` is not)."""
    leaves = _leaves()
    if key in leaves or any(key.startswith(f"{leaf}.") for leaf in _mappings()):
        return key
    matches = [leaf for leaf in leaves if leaf.rsplit(".", 1)[-1] == key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"`{key}` is ambiguous", where="--set", hint=f"write {' or '.join(f'`{m}`' for m in matches)}")
    raise UserError(f"unknown key `{key}`", where="--set", hint=_suggest(key) or "see `csq recipes schema`")


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _suggest(key: str) -> str:
    leaves = _leaves()
    return did_you_mean(key, [leaf.rsplit(".", 1)[-1] for leaf in leaves]) or did_you_mean(key, leaves)


def _leaves() -> list[str]:
    """Dotted names of every setting."""
    keys = []
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            keys += [f"{name}.{leaf}" for leaf in field.annotation.model_fields]
        else:
            keys.append(name)
    return keys


def _mappings() -> list[str]:
    return ["model.arguments", "layers.min_bits", "layers.max_bits"]
