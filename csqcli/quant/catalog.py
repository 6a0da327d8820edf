"""The weight methods and allocators that ship with csq: one card each, with the settings that a method takes.

Cards stand apart from the methods' code because a recipe is checked, and its mistakes are named, before PyTorch is loaded. A new
method is a file in `methods/` and a card here; a method from outside is a class that says the same of itself.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from csqcli.errors import UserError, did_you_mean, install
from csqcli.quant.names import MOST_PLANES
from csqcli.system.plugins import import_attribute
from csqcli.system.settings import LARGE, Section

if TYPE_CHECKING:
    from csqcli.quant.methods.base import WeightMethod

Takes = Literal["target", "planes", "either"]
AUTO = "auto"
POST_TRAINING = "ptq"  # what 0 epochs mean
_PARTS = ("summary", "citation", "takes", "Settings", "finetunes", "collect", "materialise")  # of every weight method


class MethodSettings(Section):
    """Settings of one weight method. Subclass it beside the method; a field's docstring is its help."""


class StagedSettings(MethodSettings):
    """Knobs of the two-stage method; docs/method.md says how they were chosen."""

    search_share: float = Field(0.1, gt=0, lt=1)
    """Share of the steps in which masks are soft; then planes are fixed and integers trained."""
    soft_share: float = Field(0.5, ge=0, le=1)
    """Share of the steps after which every weight is hard; until then integers harden gradually."""
    beta_initial: float = Field(1.0, gt=0, le=LARGE)
    """Temperature of the soft masks at the first step."""
    beta_final: float = Field(20.0, gt=0, le=LARGE)
    """Temperature of the soft masks when planes are fixed."""
    latent_lr: float = Field(0.01, gt=0, le=LARGE)
    """Peak step of the latent weights (Adam), in units of the layer's one-plane step; follows optimizer.schedule."""
    latent_lr_power: float = Field(2.0, ge=0, le=LARGE)
    """The latents' rate is latent_lr · (share of the peak learning rate)^power."""
    fisher_decay: float = Field(0.99, gt=0, lt=1)
    """Adam's β2: the memory of the squared gradients that importance is read from."""
    refresh_every: int = Field(10, ge=1)
    """Steps between two looks at the importance while masks are soft."""
    recovery: float = Field(0.25, gt=0, le=1)
    """Discount of a plane's importance per plane below it, for what training at few planes wins back."""
    per_channel: bool = True
    """One scale per output channel instead of one per layer."""
    step_factor: float = Field(1.0, gt=0, le=LARGE)
    """Distance of the levels that are trained, in units of the one with the least squared error. Above 1 more weights are 0, and the
    integers take fewer bits in the file."""
    scale_lr: float = Field(0.003, ge=0, le=1)
    """Peak step of the scales while integers are trained (Adam), as a share of the scale; follows optimizer.schedule. At 0 they stay
    where the squared error is least."""


class GateSettings(MethodSettings):
    """What both gate methods share; the paper's values are in its recipes (section IV-A)."""

    beta_initial: float = Field(1.0, gt=0, le=LARGE)
    """β0, gate temperature at the start."""
    beta_final: float = Field(20.0, gt=0, le=LARGE)
    """β at the end, where gates should be close to unit steps; 200 in the paper."""
    beta_schedule: Literal["epoch", "step"] = "step"
    """Raise β once per epoch (the paper) or at every step (short schedules)."""
    logit: Annotated[float, Field(gt=0, le=LARGE)] | Literal["auto"] = "auto"
    """Distance of bit logits from the decision boundary at the start; on-bits at +logit, all others at −logit. `auto`: 1 from
    a checkpoint; from scratch what weight decay takes to |βm| = 4 by the end, at most 1."""
    digits: Literal["signed", "sign-magnitude"] = "signed"
    """Code that bits start from: a sign of its own for every plane's digit, so that dropping planes rounds, or the weight's
    sign for all of them (the authors' code)."""
    init_scale: Annotated[float, Field(gt=0, le=LARGE)] | Literal["mse"] = 0.6
    """s at the start, as a share of the layer's largest weight; `mse`: the scale with the least squared error at
    target_bits planes."""
    gate_steps: Literal["preconditioned", "sgd"] = "preconditioned"
    """Steps on bit logits: as large in the weights as SGD's on the weights would be, at every β and scale, or SGD on the
    logits (the paper)."""
    refit_scale: bool = True
    """Refit each layer's scale in closed form when β moves, so that the weights stay where they are."""
    per_channel: bool = True
    """A scale for every output channel, in the ratios of the channels' own one-plane steps, of which the layer's scale is trained; or
    one scale per layer (the paper)."""
    gate_limit: Annotated[float, Field(gt=0, le=LARGE)] | None = 4.0
    """Most |βm| of a bit once planes are fixed: bits that far out are decided, and a gradient still reaches them. `refit_scale`
    compensates for the shrinkage, and without it there is no limit. Unset: none (the paper)."""
    restart_beta: Annotated[float, Field(gt=0, le=LARGE)] | None = 2.0
    """β that bits restart from when planes are fixed, with logits within ±1; unset leaves bits and β as they are."""
    straight_through_at: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of training from which, with planes fixed, every gate is a unit step in the forward pass, and gradients pass through its slope
    at the current temperature: what is trained is what is delivered. Unset: gates stay soft until they harden (the paper)."""
    straight_through_rate: float = Field(1.0, gt=0, le=LARGE)
    """From then on, the gates' rate over that of the schedule."""
    rounding: Literal["threshold", "nearest"] = "nearest"
    """Hardening: every gate to its unit step (the paper), or each weight to the level nearest to its soft weight, with a
    least-squares scale."""
    measure_unit_steps: bool = False
    """Measure what the paper's unit steps would deliver too; reported beside the accuracy of what is delivered."""
    harden_at: float = Field(0.9, gt=0, le=1)
    """Share of training after which the weights are hard and fixed, and the rest of the model adapts to them."""

    @model_validator(mode="after")
    def _straight_through_has_steps(self) -> GateSettings:
        start = self.straight_through_at
        if self.straight_through_rate != 1 and start is None:
            raise ValueError("straight_through_rate is for straight_through_at, which is unset")
        if start is not None and start >= self.harden_at:
            raise ValueError(f"straight_through_at {start:g} is not below harden_at {self.harden_at:g}")
        return self


class CSQSettings(GateSettings):
    """Knobs of Algorithm 1. Their defaults are for training on from a checkpoint; from scratch they are the paper's, but for
    the count of planes, the fixing of them and the hardening (`FROM_SCRATCH`)."""

    reg_strength: float = Field(0.01, ge=0, le=LARGE)
    """λ of Eq. 7."""
    mask_logit: Annotated[float, Field(ge=0, le=LARGE)] | Literal["auto"] = "auto"
    """m_B at the start; ≥ 0 so that every plane is in use at step 0. `auto`: as for `logit`."""
    precision_count: Literal["sign", "soft"] = "sign"
    """Planes that Δ_S of Eq. 7 counts: those with m_B ≥ 0 (the paper), or Σ f(m_B)."""
    fix_masks_at: float = Field(0.4, gt=0, le=1)
    """Share of training after which planes are chosen within the budget and fixed, and bits train on (Eq. 4); 1 searches to
    the end (the paper)."""

    @model_validator(mode="after")
    def _fixed_before_straight(self) -> CSQSettings:
        if self.straight_through_at is not None and self.fix_masks_at == 1:
            raise ValueError("straight_through_at is for fixed planes: set fix_masks_at below 1, too")
        return self


class UniformGateSettings(GateSettings):
    """Knobs of Eq. 3, where no mask is trained."""


class StepSettings(MethodSettings):
    """Knobs of the straight-through baselines."""

    per_channel: bool = False
    """One scale per output channel instead of one per layer (the papers); networks with depthwise convolutions need it."""


class PARQSettings(MethodSettings):
    """Knobs of PARQ; the defaults are the authors' for ResNets."""

    anneal_start: float = Field(0.0, ge=0, lt=1)
    """Share of the run up to which weights are not rounded at all."""
    anneal_end: float = Field(0.75, gt=0, le=1)
    """Share of the run after which every weight is hard."""
    steepness: float = Field(10.0, gt=0, le=500)
    """Of the sigmoid along which the inverse slope 1/ρ falls from 1 to 0; below 1 nearly a line."""
    refit_every: int = Field(10, ge=1)
    """Steps between two fits of the levels to the latents."""
    per_channel: bool = True
    """One scale per output channel instead of one per layer."""
    step_factor: float = Field(1.2, gt=0, le=LARGE)
    """Distance of the levels, in units of the one with the least squared error. At two planes 1.2 is about the mean magnitude of the
    weights, from which the authors' code takes its levels."""

    @model_validator(mode="after")
    def _start_before_end(self) -> PARQSettings:
        if self.anneal_start >= self.anneal_end:
            raise ValueError(f"anneal_start {self.anneal_start:g} is not below anneal_end {self.anneal_end:g}")
        return self


class DoReFaSettings(MethodSettings):
    """Knobs of DoReFa-Net's weights."""

    rescale: bool = True
    """Multiply a layer's levels by the constant that starts them nearest to the checkpoint; off leaves them in [−1, 1] (the
    paper, from scratch and with BatchNorm)."""


class PACTSettings(DoReFaSettings):
    """Knobs of the weights beside PACT's activations."""

    quantizer: Literal["dorefa", "sawb"] = "dorefa"
    """Of the weights: DoReFa's (the paper of 2018), or statistics-aware weight binning (2019), which has 2, 3, 4, 5 or 8 planes."""


class TWNSettings(MethodSettings):
    """Knobs of ternary weight networks."""

    threshold: float = Field(0.7, ge=0)
    """Weights below this share of the layer's mean magnitude become 0."""


class XNORSettings(MethodSettings):
    """Knobs of XNOR-Net's weights."""

    gradient: Literal["paper", "straight-through"] = "paper"
    """What reaches a latent: dL/dW·(1/n + α·1[|V| ≤ 1]) (the paper, for Adam), or dL/dW·1[|V| ≤ 1], without the factor α."""


class ScaledSettings(MethodSettings):
    """Knobs of uniform quantization after a scaling function."""

    bucket: Literal["layer", "channel"] = "channel"
    """Weights that share a scale."""


class LQNetsSettings(MethodSettings):
    """Knobs of LQ-Nets; the defaults are the authors'."""

    iterations: int = Field(1, ge=1, le=100)
    """Alternations of digits and least-squares basis per training step (T of Algorithm 1)."""
    decay: float = Field(0.9, ge=0, lt=1)
    """Of the moving average that the basis is over steps."""
    per_channel: bool = True
    """A basis per filter (the paper), or one per layer."""


class BSQSettings(MethodSettings):
    """Knobs of bit-level sparsity quantization; the defaults are the authors' for CIFAR-10."""

    strength: float = Field(0.01, ge=0)
    """α: weight of the group lasso on bit planes."""
    requantize_share: float = Field(0.077, gt=0, le=1)
    """Share of the run between two re-quantizations (50 of 350 + 300 epochs), each of which drops planes that are all zero."""
    search_share: float = Field(0.54, gt=0, le=1)
    """Share of the run after which planes are fixed within the budget and train on without the lasso (350 of 350 + 300)."""


class MSQSettings(DoReFaSettings):
    """Knobs of memory-efficient bit sparsification."""

    strength: float = Field(5e-5, ge=0)
    """λ: weight of the L1 norm of the lowest bits."""
    prune_share: float = Field(0.1, gt=0, le=1)
    """Share of the run between two looks at the lowest bits."""
    threshold: float = Field(0.3, ge=0, le=1)
    """A layer's lowest bits are dropped when less than this share of its weights has one that is not zero."""
    search_share: float = Field(0.6, gt=0, le=1)
    """Share of the run after which planes are fixed, within the budget."""


class PTQSettings(MethodSettings):
    """Knobs of post-training quantization; docs/method.md says what they act on."""

    images: int = Field(512, ge=1, le=10**6)
    """Images that it looks at; their labels are not used."""
    passes: int = Field(16, ge=1, le=10**4)
    """Times that the images go through the network: layers are rounded in so many groups, each on inputs that the groups
    before it have changed already."""
    rounding: Literal["second-order", "nearest"] = "second-order"
    """To the levels that change the layer's outputs least, or each weight to its nearest."""
    follow_inputs: bool = True
    """Fit each layer's outputs to the float network's, not to what its own weights would make of inputs that have changed, as far as
    that holds on images that did not decide it."""
    correct_bias: bool = True
    """Take the mean shift of a layer's outputs out of its bias, where it has one."""
    damping: float = Field(0.01, gt=0, le=LARGE)
    """Added to the inputs' second moments, as a share of their mean: how little the images are trusted. It is the least; layers that
    see few inputs for their weights take more."""
    recovery: float = Field(0.5, gt=0, le=1)
    """Discount of a plane's importance per plane below it, for what better rounding wins back."""
    zeroq_images: int = Field(64, ge=1, le=10**5)
    """Images that `--calib zeroq` makes."""
    zeroq_steps: int = Field(500, ge=1, le=10**6)
    """Steps of Adam on each batch of them."""


PAPER = {  # what section IV-A says of the method itself; the old name csq-paper stands for it
    "beta_initial": 1.0,
    "beta_final": 200.0,
    "beta_schedule": "epoch",
    "digits": "sign-magnitude",
    "init_scale": 1.0,
    "per_channel": False,
    "gate_limit": None,
    "straight_through_at": None,
    "straight_through_rate": 1.0,
    "gate_steps": "sgd",
    "precision_count": "sign",
    "fix_masks_at": 1.0,
    "restart_beta": None,
    "reg_strength": 0.01,
    "refit_scale": False,
    "rounding": "threshold",
    "harden_at": 1.0,
}
# what `csq` takes where nothing is to be kept: planes that end at the target and are trained on, and weights that turn hard while
# the rest can still adapt to them (docs/results.md)
FROM_SCRATCH = PAPER | {"rounding": "nearest", "precision_count": "soft", "fix_masks_at": 0.6, "harden_at": 0.9}


@dataclass(frozen=True)
class MethodCard:
    """What can be known of a method without its code."""

    name: str
    target: str  # package.module:Class
    summary: str
    takes: Takes  # a target of mean planes that it searches under, planes decided before, or either
    settings: type[MethodSettings] = MethodSettings
    citation: str = ""
    finetunes: bool = False  # trains delivered integers on by itself; else `staged` does
    learns_basis: bool = False  # its levels are sums of a learned basis, and not integers × scale
    has_zero: bool = True  # among its levels: 2^(k+1) − 1 at k planes, else 2^k
    activations: str = "lsq"  # the activation quantizer that its paper pairs it with, where the recipe names none
    trains: bool = True  # whether it has epochs; one that has none is what 0 epochs mean
    min_planes: int = 0  # of a layer; at 1 it has no layer without planes
    max_planes: int = MOST_PLANES
    takes_state_dtype: bool = False  # keeps what it has per weight in quantization.state_dtype
    keeps_unrounded: bool = True  # weights from before they were rounded, which another run may begin with

    @property
    def section(self) -> str:
        """Name of its section in a recipe."""
        return self.name

    def load(self) -> type[WeightMethod]:
        """The class."""
        found: type[WeightMethod] = import_attribute(self.target, where=f"--method {self.name}")
        return found


_PAPER = (
    "Xiao et al., CSQ: Growing Mixed-Precision Quantization Scheme with Bi-level Continuous Sparsification, DAC 2023"
)
_METHODS = "csqcli.quant.methods"
CARDS = {
    card.name: card
    for card in (
        MethodCard(
            "csq",
            f"{_METHODS}.csq:BitLevelCSQ",
            "bit logits and mask logits under a growing temperature (Eq. 2-7, Algorithm 1)",
            "either",
            CSQSettings,
            _PAPER,
            finetunes=True,
            takes_state_dtype=True,
        ),
        MethodCard(
            "staged",
            f"{_METHODS}.staged:Staged",
            "soft masks priced by Fisher importance, a knapsack for the planes, then integers trained from latents",
            "either",
            StagedSettings,
            "csq's own; docs/method.md",
            finetunes=True,
            takes_state_dtype=True,
        ),
        MethodCard(
            "csq-uniform",
            f"{_METHODS}.csq:UniformCSQ",
            "bit logits at the same planes in every layer (Eq. 3)",
            "planes",
            UniformGateSettings,
            _PAPER,
            finetunes=True,
            takes_state_dtype=True,
        ),
        MethodCard(
            "ste",
            f"{_METHODS}.uniform:StraightThrough",
            "straight-through gradients at a fixed step, the same planes in every layer unless an allocator decides",
            "planes",
            StepSettings,
            citation="Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013",
            min_planes=1,
        ),
        MethodCard(
            "lsq",
            f"{_METHODS}.uniform:LearnedStep",
            "straight-through gradients at a learned step, the same planes in every layer unless an allocator decides",
            "planes",
            StepSettings,
            citation="Esser et al., Learned Step Size Quantization, ICLR 2020",
            min_planes=1,
        ),
        MethodCard(
            "parq",
            f"{_METHODS}.parq:PARQ",
            "proximal map of a piecewise-affine regulariser, annealed from no rounding to hard; 2^(k+1) − 1 levels",
            "planes",
            PARQSettings,
            "Jin et al., PARQ: Piecewise-Affine Regularized Quantization, ICML 2025",
            min_planes=1,
        ),
        MethodCard(
            "dorefa",
            f"{_METHODS}.dorefa:DoReFa",
            "tanh-normalised weights on 2^k even steps, and activations in [0, 1]",
            "planes",
            DoReFaSettings,
            "Zhou et al., DoReFa-Net: Training Low Bitwidth CNNs with Low Bitwidth Gradients, 2016",
            activations="dorefa",
            has_zero=False,
            min_planes=1,
        ),
        MethodCard(
            "pact",
            f"{_METHODS}.pact:PACT",
            "DoReFa's weights, or SAWB's, beside activations with a learned clip; 2^k levels",
            "planes",
            PACTSettings,
            "Choi et al., PACT, 2018; Choi et al., Accurate and Efficient 2-bit Quantized Neural Networks, MLSys 2019",
            activations="pact",
            has_zero=False,
            min_planes=1,
        ),
        MethodCard(
            "bsq",
            f"{_METHODS}.bsq:BSQ",
            "continuous bit planes under a group lasso, re-quantized and pruned; 2^(k+1) − 1 levels",
            "target",
            BSQSettings,
            "Yang et al., BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network Quantization, ICLR 2021",
        ),
        MethodCard(
            "msq",
            f"{_METHODS}.msq:MSQ",
            "L1 norm on the lowest bits of a latent, which are dropped where they are sparse; 2^(k+1) − 1 levels",
            "target",
            MSQSettings,
            "Han et al., MSQ: Memory-Efficient Bit Sparsification Quantization, ICCV 2025",
            min_planes=1,
        ),
        MethodCard(
            "lq-nets",
            f"{_METHODS}.lq_nets:LQNets",
            "a basis learned per filter by alternating least squares (QEM); 2^k levels, which the file keeps as that basis",
            "planes",
            LQNetsSettings,
            "Zhang et al., LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks, ECCV 2018",
            finetunes=True,
            learns_basis=True,
            has_zero=False,
            min_planes=1,
        ),
        MethodCard(
            "twn",
            f"{_METHODS}.twn:TernaryWeights",
            "−α, 0, α by a threshold at 0.7 of the mean magnitude; one plane",
            "planes",
            TWNSettings,
            "Li et al., Ternary Weight Networks, 2016",
            min_planes=1,
            max_planes=1,
        ),
        MethodCard(
            "xnor",
            f"{_METHODS}.xnor:BinaryWeights",
            "signs times the mean magnitude of each filter; one plane, two levels",
            "planes",
            XNORSettings,
            "Rastegari et al., XNOR-Net, ECCV 2016",
            has_zero=False,
            min_planes=1,
            max_planes=1,
        ),
        MethodCard(
            "scaled-uniform",
            f"{_METHODS}.scaled:ScaledUniform",
            "2^k even steps between ± the largest weight of each bucket, straight-through gradients",
            "planes",
            ScaledSettings,
            "Polino et al., Model Compression via Distillation and Quantization, ICLR 2018",
            has_zero=False,
            min_planes=1,
        ),
        MethodCard(
            "ptq",
            f"{_METHODS}.ptq:PostTraining",
            "post-training quantization: rounded layer by layer to what changes its outputs least, nothing trained",
            "either",
            PTQSettings,
            "Frantar et al., GPTQ, ICLR 2023; Behdin et al., QuantEase, 2023; docs/method.md",
            trains=False,
            keeps_unrounded=False,
        ),
        MethodCard(
            "float",
            f"{_METHODS}.base:FloatTraining",
            "no quantization: float baselines by the same loop",
            "target",
            keeps_unrounded=False,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class AllocatorCard:
    """What can be known of an allocator without its code."""

    name: str
    target: str  # package.module:function
    summary: str
    citation: str = ""
    asks: tuple[str, ...] = ()  # keyword arguments beside model, layers, batches and bits: seed, trials, watch
    gives: Literal["importance", "planes"] = "importance"  # planes: it is given the budget in the place of bits
    package: str = ""  # that it needs beyond csq's own; the extra has the allocator's name


UNIFORM, MANUAL = "uniform", "manual"
TRIALS = 200  # networks that `haq` measures
_ALLOCATORS = "csqcli.quant.allocators"
ALLOCATORS = {
    card.name: card
    for card in (
        AllocatorCard(UNIFORM, "", "the target in every layer, which must be whole"),
        AllocatorCard(
            "importance",
            f"{_ALLOCATORS}.importance:fisher_importance",
            "diagonal Fisher x squared rounding error at each width, by a knapsack (csq's own)",
        ),
        AllocatorCard(
            "hawq-v2",
            f"{_ALLOCATORS}.hawq_v2:trace_importance",
            "mean Hessian trace (Hutchinson) x squared rounding error, by the same knapsack",
            "Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization, NeurIPS 2020",
            ("seed", "watch"),
        ),
        AllocatorCard(
            "hawq-v1",
            f"{_ALLOCATORS}.hawq_v1:eigenvalue_importance",
            "top Hessian eigenvalue (power iteration) x squared rounding error, by the same knapsack",
            "Dong et al., HAWQ: Hessian AWare Quantization, ICCV 2019",
            ("seed", "watch"),
        ),
        AllocatorCard(
            "quanos",
            f"{_ALLOCATORS}.quanos:noise_importance",
            "adversarial noise sensitivity x relative rounding error, by the same knapsack",
            "Panda, QUANOS: Adversarial Noise Sensitivity Driven Hybrid Quantization, ISLPED 2020",
        ),
        AllocatorCard(
            "haq",
            f"{_ALLOCATORS}.haq:searched_planes",
            "black-box search (CMA-ES, for HAQ's reinforcement learning) rewarded by measured accuracy, inside the budget",
            "Wang et al., HAQ: Hardware-Aware Automated Quantization, CVPR 2019",
            ("seed", "trials", "watch"),
            "planes",
            "cmaes",
        ),
        AllocatorCard(
            "random",
            f"{_ALLOCATORS}.at_random:random_importance",
            "at random within the budget, by the seed: what the others have to beat",
            asks=("seed",),
        ),
        AllocatorCard(MANUAL, "", "as quantization.planes or --planes FILE says"),
    )
}


def find_allocator(name: str, *, where: str = "--allocator") -> AllocatorCard:
    """The card of an allocator, by its name or as ``package.module:function``. UserError for anything else, and for one whose
    package is not installed: before a run spends time on what comes first."""
    if ":" in name:
        return AllocatorCard(name, name, "")
    if name not in ALLOCATORS:
        hint = did_you_mean(name, ALLOCATORS) or f"one of {', '.join(ALLOCATORS)}, or package.module:function"
        raise UserError(f"no allocator `{name}`", where=where, hint=hint)
    card = ALLOCATORS[name]
    if card.package and importlib.util.find_spec(card.package) is None:
        what = f"`{name}` needs the package {card.package}"
        raise UserError(what, where=where, hint=install(name))
    return card


def find_card(method: str, *, where: str = "") -> MethodCard:
    """The card of a method, by its name or as ``package.module:Class``. UserError for anything else."""
    if method in CARDS:
        return CARDS[method]
    if ":" not in method:
        known = [AUTO, *CARDS]
        hint = did_you_mean(method, known) or f"one of {', '.join(known)}, or package.module:Class"
        raise UserError(f"no method `{method}`", where=where, hint=hint)
    found: Any = import_attribute(method, where=where)
    if not all(hasattr(found, part) for part in ("__mro__", *_PARTS)):  # a class, and of that kind
        hint = "subclass csqcli.quant.methods.base.WeightMethod"
        raise UserError(f"`{method}` is no weight method", where=where, hint=hint)
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing or not isinstance(getattr(found, "name", None), str):
        lacks = ", ".join(missing) or "name"
        raise UserError(f"`{method}` lacks {lacks}", where=where, hint="docs/methods.md has an example")
    if found.name in CARDS:
        raise UserError(f"`{method}` calls itself `{found.name}`, which is a method of csq", where=where)
    return MethodCard(
        found.name,
        method,
        found.summary,
        found.takes,
        found.Settings,
        found.citation,
        finetunes=found.finetunes,
        min_planes=found.min_planes,
        max_planes=found.max_planes,
        takes_state_dtype=True,  # for all that is known
        keeps_unrounded=sum("unrounded" in vars(each) for each in found.__mro__) > 1,  # WeightMethod's own keeps none
    )


def choose(epochs: int, *, from_scratch: bool) -> tuple[str, str]:
    """What `auto` takes for a schedule, and the reason in one clause (docs/results.md, bit by bit)."""
    if epochs == 0:
        return POST_TRAINING, "0 epochs"
    if from_scratch:
        return "csq", "from scratch"
    return "staged", "from trained weights"
