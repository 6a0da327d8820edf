"""What each table and figure of the paper (section IV) needs: rows, their recipes, and the paper's own numbers.

Numbers are those of the DAC 2023 paper. Its Table IV and the values behind its figures are not printed as text, so those
rows have none. Rivals are listed with the paper's numbers; a row is trained only where csq has the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from csqcli.errors import UserError, did_you_mean
from csqcli.quant.catalog import CARDS

RESNET20, VGG19BN = "cifar10-resnet20", "cifar10-vgg19bn"
_STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Row:
    """One line of a table: a run per seed, and what the paper says of it."""

    label: str
    method: str | None  # of csq's catalogue; None for a rival that csq does not have
    act_bits: int = 32
    settings: Mapping[str, Any] = field(default_factory=dict)  # recipe keys beside the experiment's own
    accuracy: float | None = None  # percent, as the paper prints it
    bits: str = ""  # the paper's W-Bits, or average precision

    @property
    def trained(self) -> bool:
        """Whether csq can run it."""
        return self.method in CARDS


@dataclass(frozen=True)
class Experiment:
    """A table or figure: its rows and the recipe that they share."""

    name: str
    title: str
    recipe: str  # shipped recipe with the paper's schedule
    rows: Sequence[Row]
    plot: Literal["precision", "layers", "tradeoff"] | None = None


def _csq(target: float, act_bits: int, accuracy: float | None, bits: str = "MP", **settings: Any) -> Row:
    asked = {"quantization.target_bits": float(target), **settings}
    return Row(f"CSQ T{target:g}", "csq", act_bits, asked, accuracy, bits)


def _float(accuracy: float | None) -> Row:
    return Row("FP", "float", 32, {}, accuracy, "32")


def _rival(label: str, method: str, planes: float, act_bits: int, accuracy: float, bits: str) -> Row:
    settings = {"quantization.target_bits": float(planes)}
    return Row(label, method if method in CARDS else None, act_bits, settings, accuracy, bits)


def _bsq(compression: float, act_bits: int, accuracy: float) -> Row:
    """The bits that BSQ ended with, 32 / the paper's compression, are the target here."""
    return _rival("BSQ", "bsq", round(32 / compression, 3), act_bits, accuracy, "MP")


def _experiments() -> list[Experiment]:
    three = {  # Table V and the ablation: ResNet-20 with 3-bit activations
        1: (90.33, "1.00"), 2: (91.70, "1.97"), 3: (92.42, "3.05"), 4: (92.51, "4.00"), 5: (92.61, "5.05"),
    }  # fmt: skip
    tradeoff = [_csq(target, 3, *figures) for target, figures in three.items()]
    return [
        Experiment("table1", "Table I: ResNet-20 on CIFAR-10", RESNET20, [
            _float(92.62),
            _rival("LQ-Nets", "lq-nets", 3, 32, 92.00, "3"), _bsq(19.24, 32, 91.87),
            _csq(1, 32, 91.70), _csq(2, 32, 92.68),
            _rival("LQ-Nets", "lq-nets", 3, 3, 91.60, "3"), _rival("PACT", "pact", 3, 3, 91.10, "3"),
            _rival("DoReFa", "dorefa", 3, 3, 89.90, "3"), _bsq(11.04, 3, 92.16),
            _csq(2, 3, 92.14), _csq(3, 3, 92.42),
            _rival("LQ-Nets", "lq-nets", 2, 2, 90.20, "2"), _rival("PACT", "pact", 2, 2, 89.70, "2"),
            _rival("DoReFa", "dorefa", 2, 2, 88.20, "2"), _bsq(18.85, 2, 90.19),
            _csq(1, 2, 90.08), _csq(2, 2, 90.33),
        ]),
        Experiment("table2", "Table II: VGG19BN on CIFAR-10", VGG19BN, [
            _float(94.22),
            _rival("LQ-Nets", "lq-nets", 3, 32, 93.80, "3"), _csq(2, 32, 94.10),
            Row("ZeroQ", None, 8, {}, 92.69, "4"), Row("ZAQ", None, 8, {}, 93.06, "4"), _csq(3, 8, 93.90),
            Row("QUANOS", None, 4, {}, 90.70, "MP"), _csq(3, 4, 93.62),
            _rival("LQ-Nets", "lq-nets", 3, 3, 93.80, "3"), Row("Non-Linear", None, 3, {}, 93.40, "3"),
            _csq(2, 3, 93.58),
        ]),
        Experiment("table3-resnet18", "Table III: ResNet-18 on ImageNet", "imagenet-resnet18", [
            _float(69.76), _csq(2, 4, 69.11), _csq(3, 8, 69.73),
        ]),
        Experiment("table3-resnet50", "Table III: ResNet-50 on ImageNet", "imagenet-resnet50", [
            _float(76.13), _csq(2, 4, 75.25), _csq(3, 8, 75.47),
        ]),
        Experiment("table4", "Table IV: bits against straight-through latents, ResNet-20, 3-bit activations", RESNET20, [
            _float(92.62),
            *(
                Row(f"{label} {bits}", method, 3, {"quantization.target_bits": float(bits)}, None, str(bits))
                for bits in (1, 2, 3, 4)
                for label, method in (("STE-Uniform", "ste"), ("CSQ-Uniform", "csq-uniform"), ("CSQ-MP", "csq"))
            ),
        ]),
        Experiment("table5", "Table V: accuracy against size, ResNet-20, 3-bit activations", RESNET20,
                   [_float(92.62), *tradeoff], plot="tradeoff"),
        Experiment("fig2", "Figure 2: mean precision for regularisation strengths λ, target 3", RESNET20, [
            replace(_csq(3, 3, None, "", **{"csq.reg_strength": strength}), label=f"λ = {strength:g}")
            for strength in _STRENGTHS
        ], plot="precision"),
        Experiment("fig3", "Figure 3: mean precision for targets 1 to 5", RESNET20, tradeoff, plot="precision"),
        Experiment("fig4", "Figure 4: planes per layer for targets 1 to 5", RESNET20, tradeoff, plot="layers"),
    ]  # fmt: skip


EXPERIMENTS = {experiment.name: experiment for experiment in _experiments()}


def find_experiment(name: str) -> Experiment:
    """UserError for an unknown name."""
    if name not in EXPERIMENTS:
        hint = did_you_mean(name, list(EXPERIMENTS)) or f"there are {', '.join(EXPERIMENTS)}"
        raise UserError(f"no table or figure `{name}`", where="reproduce", hint=hint)
    return EXPERIMENTS[name]
