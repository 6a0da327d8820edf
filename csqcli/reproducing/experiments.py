"""What each table and figure of the paper (section IV) needs: rows, their recipes, and the paper's own numbers.

Numbers are those of the DAC 2023 paper. Its Table IV and the values behind its figures are not printed as text
(``in_text`` False), so those rows have none but what its other tables say. Rivals are listed with the paper's numbers; a row
is trained only where csq has the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from csqcli.errors import UserError, did_you_mean
from csqcli.quant.catalog import CARDS

RESNET20, VGG19BN = "cifar10-resnet20", "cifar10-vgg19bn"
PAPERS_OWN = ("float", "csq", "csq-uniform", "ste")  # methods that the paper trained itself; all others are rivals
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
    compression: float | None = None  # the paper's: 32 / mean planes, of weights alone
    pretrain: bool = False  # in float first, for as many epochs: the method begins with a trained network

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
    plot: Literal["precision", "layers", "tradeoff"] = "tradeoff"
    in_text: bool = True  # whether the paper prints its values, as numbers that can be copied


def _csq(
    target: float, act_bits: int, accuracy: float | None, compression: float | None, bits: str = "MP", **settings: Any
) -> Row:
    asked = {"quantization.target_bits": float(target), **settings}
    return Row(f"CSQ T{target:g}", "csq", act_bits, asked, accuracy, bits, compression)


def _float(accuracy: float | None) -> Row:
    return Row("FP", "float", 32, {}, accuracy, "32", 1.00)


def _rival(
    label: str, method: str, planes: float, act_bits: int, accuracy: float, compression: float, bits: str = ""
) -> Row:
    settings = {"quantization.target_bits": float(planes)}
    return Row(label, method, act_bits, settings, accuracy, bits or f"{planes:g}", compression)


def _bsq(compression: float, act_bits: int, accuracy: float) -> Row:
    """The bits that BSQ ended with, 32 / the paper's compression, are the target here."""
    row = _rival("BSQ", "bsq", round(32 / compression, 3), act_bits, accuracy, compression, "MP")
    return replace(row, pretrain=True)


def _not_here(label: str, act_bits: int, accuracy: float, compression: float, bits: str) -> Row:
    return Row(label, None, act_bits, {}, accuracy, bits, compression)


def _experiments() -> list[Experiment]:
    three = {  # Table V and the ablation: ResNet-20 with 3-bit activations
        1: (90.33, 32.00, "1.00"), 2: (91.70, 16.24, "1.97"), 3: (92.42, 10.49, "3.05"), 4: (92.51, 8.00, "4.00"),
        5: (92.61, 6.34, "5.05"),
    }  # fmt: skip
    tradeoff = [_csq(target, 3, *figures) for target, figures in three.items()]
    return [
        Experiment("table1", "Table I: ResNet-20 on CIFAR-10", RESNET20, [
            _float(92.62),
            _rival("LQ-Nets", "lq-nets", 3, 32, 92.00, 10.67), _bsq(19.24, 32, 91.87),
            _csq(1, 32, 91.70, 26.67), _csq(2, 32, 92.68, 16.00),
            _rival("LQ-Nets", "lq-nets", 3, 3, 91.60, 10.67), _rival("PACT", "pact", 3, 3, 91.10, 10.67),
            _rival("DoReFa", "dorefa", 3, 3, 89.90, 10.67), _bsq(11.04, 3, 92.16),
            _csq(2, 3, 92.14, 16.93), _csq(3, 3, 92.42, 10.49),
            _rival("LQ-Nets", "lq-nets", 2, 2, 90.20, 16.00), _rival("PACT", "pact", 2, 2, 89.70, 16.00),
            _rival("DoReFa", "dorefa", 2, 2, 88.20, 16.00), _bsq(18.85, 2, 90.19),
            _csq(1, 2, 90.08, 22.86), _csq(2, 2, 90.33, 16.41),
        ]),
        Experiment("table2", "Table II: VGG19BN on CIFAR-10", VGG19BN, [
            _float(94.22),
            _rival("LQ-Nets", "lq-nets", 3, 32, 93.80, 10.67), _csq(2, 32, 94.10, 16.00),
            _not_here("ZeroQ", 8, 92.69, 8.00, "4"), _not_here("ZAQ", 8, 93.06, 8.00, "4"), _csq(3, 8, 93.90, 10.67),
            _not_here("QUANOS", 4, 90.70, 7.11, "MP"), _csq(3, 4, 93.62, 10.67),
            _rival("LQ-Nets", "lq-nets", 3, 3, 93.80, 10.67), _not_here("Non-Linear", 3, 93.40, 9.14, "3"),
            _csq(2, 3, 93.58, 16.00),
        ]),
        Experiment("table3-resnet18", "Table III: ResNet-18 on ImageNet", "imagenet-resnet18", [
            _float(69.76), _csq(2, 4, 69.11, 15.23), _csq(3, 8, 69.73, 10.67),
        ]),
        Experiment("table3-resnet50", "Table III: ResNet-50 on ImageNet", "imagenet-resnet50", [
            _float(76.13), _csq(2, 4, 75.25, 14.54), _csq(3, 8, 75.47, 10.67),
        ]),
        Experiment("table4", "Table IV: bits against straight-through latents, ResNet-20, 3-bit activations", RESNET20, [
            replace(_float(92.62), compression=None),
            *(
                Row(f"{label} {bits}", method, 3, {"quantization.target_bits": float(bits)}, None, str(bits))
                for bits in (1, 2, 3, 4)
                for label, method in (("STE-Uniform", "ste"), ("CSQ-Uniform", "csq-uniform"), ("CSQ-MP", "csq"))
            ),
        ], in_text=False),
        Experiment("table5", "Table V: accuracy against size, ResNet-20, 3-bit activations", RESNET20,
                   [_float(92.62), *tradeoff]),
        Experiment("fig2", "Figure 2: mean precision for regularisation strengths λ, target 3", RESNET20, [
            replace(_csq(3, 3, None, None, "", **{"csq.reg_strength": strength}), label=f"λ = {strength:g}")
            for strength in _STRENGTHS
        ], plot="precision", in_text=False),
        Experiment("fig3", "Figure 3: mean precision for targets 1 to 5", RESNET20, tradeoff, plot="precision",
                   in_text=False),
        Experiment("fig4", "Figure 4: planes per layer for targets 1 to 5", RESNET20, tradeoff, plot="layers",
                   in_text=False),
    ]  # fmt: skip


EXPERIMENTS = {experiment.name: experiment for experiment in _experiments()}


def find_experiment(name: str) -> Experiment:
    """UserError for an unknown name."""
    if name not in EXPERIMENTS:
        hint = did_you_mean(name, list(EXPERIMENTS)) or f"there are {', '.join(EXPERIMENTS)}"
        raise UserError(f"no table or figure `{name}`", where="reproduce", hint=hint)
    return EXPERIMENTS[name]
