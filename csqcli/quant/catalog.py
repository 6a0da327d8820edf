"""The weight methods and allocators that ship with csq: one card each.

Cards stand apart from the methods' code because a recipe is checked, and its mistakes are named, before PyTorch is loaded. A new
method is a file in `methods/` and a card here; a method from outside is a class that says the same of itself.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from csqcli.errors import UserError, did_you_mean, install
from csqcli.quant.method_settings import (
    BSQSettings,
    CSQSettings,
    DoReFaSettings,
    LQNetsSettings,
    MethodSettings,
    MSQSettings,
    PACTSettings,
    PARQSettings,
    PTQSettings,
    ScaledSettings,
    StagedSettings,
    StepSettings,
    TWNSettings,
    UniformGateSettings,
    XNORSettings,
)
from csqcli.quant.names import MOST_PLANES
from csqcli.system.plugins import import_attribute

if TYPE_CHECKING:
    from csqcli.quant.methods.base import WeightMethod

Takes = Literal["target", "planes", "either"]
AUTO = "auto"
POST_TRAINING = "ptq"  # what 0 epochs mean
_PARTS = ("summary", "citation", "takes", "Settings", "finetunes", "collect", "materialise")  # of every weight method


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
    lost_without_act_bits: str = ""  # what is said of a search that leaves activations float

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
            lost_without_act_bits="nothing is left of PACT but its weights: the learned clip is of activations",
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
