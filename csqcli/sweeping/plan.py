"""The runs of a sweep: which recipe, in which folder, after which other run. Loads no PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from csqcli.errors import UserError
from csqcli.quant.catalog import UNIFORM, MethodCard, find_card
from csqcli.quant.names import MOST_PLANES
from csqcli.recipe.complete import check_complete, check_data_given, check_model_given
from csqcli.recipe.keys import of_every_method
from csqcli.recipe.resolve import resolve
from csqcli.recipe.schema import Recipe
from csqcli.system.progress import counted
from csqcli.system.run_files import LATENT_FILE, as_file_name, default_folder

MAX_SEEDS = 1000
WARM_SHARE = 0.4  # of the epochs, for a run that begins with another's weights: five targets cost 2.6 runs
_DROP_TARGET = 4.0  # planes, from which --max-drop looks down where no targets are given
START = "start"  # key and folder of what the runs share
FORM = "bit-packed"  # of the file whose size counts
PACKED_FILE = f"model-{FORM}.safetensors"
_TARGET, _METHOD = "quantization.target_bits", "quantization.method"


@dataclass(frozen=True)
class Member:
    """One run of a sweep. It is what ``csq search --recipe FOLDER/recipe.yaml`` repeats."""

    key: str  # its folder inside the sweep's
    method: str
    target: float  # mean planes asked for
    recipe: Recipe
    begins_with: str | None = None  # key of the run whose weights it begins with
    is_first: bool = False  # whether it keeps its weights for others to begin with


@dataclass(frozen=True)
class Sweep:
    """What was asked for: a recipe without a target, targets, and how they are run."""

    recipe: str  # name or file
    overrides: Mapping[str, Any]  # recipe keys laid over it, none of them a target
    output: Path | None  # None: runs/MODEL-sweep
    targets: Sequence[float] | None  # mean planes; None: the highest alone, which --max-drop begins with
    baselines: Sequence[str] = ()
    warm: bool = False  # whether all targets but the highest begin with that one's weights; docs/sweeps.md has the cost
    warm_epochs: int | None = None
    seeds: int = 1  # runs of every target and method: the recipe's seed and those after it
    max_drop: float | None = None  # points below the float top-1 that the smallest file may be; None: nobody asks
    base: Recipe = field(init=False)
    folder: Path = field(init=False)
    planes: list[float] = field(init=False)  # the targets, from high to low

    def __post_init__(self) -> None:
        base = resolve(self.recipe, {**self.overrides, _TARGET: None})
        check_model_given(base)
        check_data_given(base)
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "folder", self.output or sweep_folder(base))
        if self.targets is None and self.max_drop is None:
            raise UserError("no targets given", hint="pass --targets, e.g. --targets 1,1.5,2,3,4, or --max-drop 1")
        asked = [min(_DROP_TARGET, base.card.max_planes)] if self.targets is None else _checked_targets(self.targets)
        object.__setattr__(self, "planes", sorted(asked, reverse=True))
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise UserError(f"{self.max_drop:g} is no number of points from 0 to 100", where="--max-drop")
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise UserError(f"{self.seeds} is no number of seeds from 1 to {MAX_SEEDS}", where="--seeds")
        if base.card.name == "float":
            raise UserError("`float` has no targets to sweep", where="--method", hint="name a method that quantizes")
        if base.quantization.planes:
            hint = "leave --planes out, or run `csq search` with it"
            raise UserError("planes that are written down have one target", hint=hint)
        for name in self.baselines:
            card = find_card(name, where="--with")
            if card.name in ("float", base.card.name):
                what = (
                    "is the sweep's own method" if name != "float" else "quantizes nothing, and is on the page anyway"
                )
                raise UserError(f"`{name}` {what}", where="--with", hint="leave it out")
            if card.trains != base.card.trains:
                what = (
                    f"`{name}` {'trains' if card.trains else 'trains nothing'}, and this sweep has {base.epochs} epochs"
                )
                raise UserError(what, where="--with", hint="leave it out, or sweep it by itself")
        if self.warm and not base.card.trains:
            raise UserError(
                "nothing is trained at 0 epochs, so nothing begins with it", where="--warm", hint="leave it out"
            )
        if self.warm and not base.card.keeps_unrounded:
            what = f"`{base.card.name}` does not keep weights from before they were rounded, for others to begin with"
            hint = "leave it out, or write the method's `unrounded`"
            raise UserError(what, where="--warm", hint=hint)
        if self.warm_epochs is not None and not self.warm:
            raise UserError(
                "is for runs that begin with another's weights", where="--warm-epochs", hint="pass --warm too"
            )

    @property
    def shorter_epochs(self) -> int:
        """Epochs of a run that begins with another's weights."""
        return self.warm_epochs or max(1, round(WARM_SHARE * self.base.epochs))

    def members(self) -> list[Member]:
        """Every run, seed after seed: from high to low targets, the sweep's own method first. UserError where one cannot be run."""
        found: list[Member] = []
        for seed in self._every_seed():
            found += [self._member(target, seed) for target in self.planes]
            found += self._of_baselines(seed)
        return found

    def members_at(self, target: float) -> list[Member]:
        """The runs of the sweep's own method at a target, one of each seed."""
        return [self._member(target, seed) for seed in self._every_seed()]

    def _every_seed(self) -> range:
        return range(self.base.seed, self.base.seed + self.seeds)

    def _member(self, target: float, seed: int) -> Member:
        """The run of the sweep's own method at a target; the highest begins with the float model."""
        name, highest, suffix = self.base.card.name, self.planes[0], self._suffix(seed)
        if target == highest or not self.warm:
            recipe = resolve(self.recipe, {**self.overrides, "seed": seed, _TARGET: target})
            is_first = self.base.card.trains and target == highest
            return _checked(Member(_key(name, target) + suffix, name, target, recipe, is_first=is_first))
        first = _key(name, highest) + suffix
        settings = {
            **self.overrides,
            "seed": seed,
            _TARGET: target,
            _METHOD: self.base.quantization.method,  # `auto` looks at the epochs, which are fewer here
            "model.warm_start": str(self.folder / first / LATENT_FILE),
            "epochs": self.shorter_epochs,
        }
        return _checked(
            Member(f"{_key(name, target)}-from{highest:g}{suffix}", name, target, resolve(self.recipe, settings), first)
        )

    @property
    def mixes(self) -> bool:
        """Whether the sweep's own method gives layers different planes."""
        return self._mixes(self.base.card)

    def _suffix(self, seed: int) -> str:
        """Of a folder's name: the first seed's are named as those of a sweep with one, which may thus go on with more."""
        return "" if seed == self.base.seed else f"-seed{seed}"

    def left_out(self) -> list[str]:
        """What the baselines cannot do, in words."""
        return [
            f"{name} at {target:g}: {why}"
            for name in self.baselines
            for target in self.planes
            if (why := self._why_not(name, target))
        ]

    def _of_baselines(self, seed: int) -> Iterator[Member]:
        settings = of_every_method(self.overrides)
        for name in self.baselines:
            for target in self.planes:
                if not self._why_not(name, target):
                    own = resolve(self.recipe, {**settings, "seed": seed, _METHOD: name, _TARGET: target})
                    yield _checked(Member(_key(name, target) + self._suffix(seed), name, target, own))

    def _why_not(self, name: str, target: float) -> str:
        """What keeps a method from a target under the sweep's rules, in words; empty where nothing does."""
        card, rules = find_card(name, where="--with"), self.base.layers
        widest = max(target, *rules.min_bits.values(), self.base.quantization.max_bits if rules.keep else 0)
        if widest > card.max_planes:
            return f"it has layers of {counted(card.max_planes, 'plane')} at most"
        if min(target, rules.floor, *rules.max_bits.values()) < card.min_planes:
            return f"it has layers of {counted(card.min_planes, 'plane')} at least"
        if not self._mixes(card) and not (target.is_integer() and target >= 1):
            return "it gives every layer the same planes"
        return ""

    def _mixes(self, card: MethodCard) -> bool:
        return card.takes != "planes" or self.base.quantization.allocator not in (None, UNIFORM)


def words(text: str) -> list[str]:
    """The names of ``ste,lsq``. UserError for one given twice."""
    found: list[str] = []
    for word in filter(None, map(str.strip, text.split(","))):
        if word in found:
            raise UserError(f"`{word}` is there twice", where="--with", hint="leave one out")
        found.append(word)
    return found


def parse_targets(text: str) -> list[float]:
    """The numbers of ``--targets 1,1.5,2``. UserError for what is none."""
    found: list[float] = []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            raise _no_target(word.strip()) from None
    return found


def _checked_targets(targets: Sequence[float]) -> list[float]:
    """UserError for what is no number of planes above 0 and up to the most, and for one given twice."""
    for place, target in enumerate(targets):
        if not isinstance(target, Real) or not 0 < target <= MOST_PLANES:  # NaN is refused too
            raise _no_target(f"{target:g}" if isinstance(target, Real) else str(target))
        if target in targets[:place]:
            raise UserError(f"{target:g} is there twice", where="--targets", hint="leave one out")
    return [float(target) for target in targets]


def _no_target(given: str) -> UserError:
    what = f"`{given}` is no target: mean planes per weight, above 0 and at most {MOST_PLANES}"
    return UserError(what, where="--targets", hint="e.g. --targets 1,1.5,2,3,4")


def sweep_folder(recipe: Recipe) -> Path:
    """Where a sweep writes when it is told nothing: ``runs/MODEL-sweep``."""
    return default_folder((recipe.model.source or "model").rpartition(":")[2], "sweep")


def _checked(member: Member) -> Member:
    check_complete(member.recipe)
    return member


def _key(method: str, target: float) -> str:
    return f"{as_file_name(method)}-{target:g}bit"
