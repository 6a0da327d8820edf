"""The settings of the weight methods that ship with csq: defaults, ranges and help, for recipes and for the command line.

They stand apart from the methods' code for the same reason as `catalog`'s cards. A field's docstring is its help.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from csqcli.system.settings import LARGE, Section


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
