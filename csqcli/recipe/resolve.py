"""From a recipe's name or file, and what the command line lays over it, to a checked :class:`Recipe`. Loads no PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from csqcli.errors import UserError, did_you_mean, first_problem
from csqcli.quant.catalog import (
    AUTO,
    CARDS,
    FROM_SCRATCH,
    MANUAL,
    PAPER,
    POST_TRAINING,
    MethodCard,
    MethodSettings,
    choose,
    find_allocator,
    find_card,
)
from csqcli.quant.costs import costs
from csqcli.quant.names import MOST_PLANES
from csqcli.recipe import legacy
from csqcli.recipe.schema import INT8_PLANES, USERS_TARGETS, ZEROQ, Recipe
from csqcli.system.limits import MAX_DEPTH, check_tree
from csqcli.system.settings import USERS_ONLY, without

_MAX_BYTES, _MAX_VALUES = 2**18, 10_000  # of a recipe file; a rule per layer of the largest model takes less
_OF_A_SEARCH = (
    "allocator",
    "cost",
    "planes",
    "ship_as",
    "latency_table",
    "latency_engine",
    *USERS_TARGETS,
)  # what a finetune of its file knows no more
_BEFORE_A_FINETUNE = ("quantization.", "layers.", "adaptation.")
_OF_A_FINETUNE = ("quantization.method", "quantization.act_method", "quantization.state_dtype", "layers.floor")
_TARGETS = tuple(f"quantization.{key}" for key in ("target_bits", *USERS_TARGETS))
_PREPROCESSING = (
    *(f"data.{key}" for key in ("input_size", "mean", "std", "interpolation", "crop_pct")),
    "model.arguments",
)
_MERGE = "tag:yaml.org,2002:merge"  # <<: may stand as often as one likes
_FREE_MAPPINGS = (
    "model.arguments",
    "layers.min_bits",
    "layers.max_bits",
    "quantization.planes",
)  # whose keys are not settings


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
        text, where = (_folder() / f"{name_or_file}.yaml").read_text(encoding="utf-8"), f"recipe {name_or_file}"
    else:
        path = Path(name_or_file)
        if not path.is_file():
            hint = did_you_mean(name_or_file, builtin_names()) or f"shipped recipes: {', '.join(builtin_names())}"
            raise UserError("no such recipe or file", where=name_or_file, hint=hint)
        text, where = _text_of(path), str(path)
    raw = _values(text, where) or {}
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of settings", where=where)
    return raw, where


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file, under the limits of a recipe. UserError for what cannot be read."""
    return _values(_text_of(path), str(path))


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"is larger than {_MAX_BYTES:,} bytes", where=str(path), hint="give a recipe")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path)) from None


def _values(text: str, where: str) -> Any:
    try:
        return _load_yaml(text)
    except ValueError as error:
        raise UserError(f"not valid YAML: {error}", where=where) from None


class _Loader(yaml.SafeLoader):
    """Stops where the nesting gets deep, which PyYAML reads in quadratic time, and at a key that occurs twice in a mapping."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.YAMLError(f"`{twice}` occurs twice in one section; the first would be lost")
        return super().construct_mapping(node, deep=deep)


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
    given = copy.deepcopy(legacy.modernised(_as_mapping(raw, where)))
    typed = _post_training(_renamed(overrides))
    named = typed.get("quantization.method", typed.get("method"))
    if named is not None and named != _method_of(given):  # settings of the recipe's own method do not apply to another
        given = {key: value for key, value in given.items() if key not in CARDS}
    targets = {full for key in typed if (full := _common_key(key)) in _TARGETS}
    section = given.get("quantization")
    if targets and isinstance(
        section, dict
    ):  # a target that is typed takes the place of the recipe's, in whatever unit
        given["quantization"] = {k: value for k, value in section.items() if f"quantization.{k}" not in _TARGETS}
    of_method = {}
    for key, value in typed.items():
        full = _common_key(key)
        if full is None:
            of_method[key] = value
        else:
            _set(given, full, value, where)
    card, _ = _chosen(given, where)  # which may depend on what was just set
    for key, value in of_method.items():
        _set(given, full_key(key, card), value, where)
    return validate(given, where=where)


def resolve_stored(raw: dict[str, Any], overrides: dict[str, Any], *, where: str, trust_code: bool = False) -> Recipe:
    """As :func:`resolve`, from the recipe inside a model file.

    Whatever would make csq read something (model, data.source) or start processes (data.workers, compile) is
    left out of it, and threads are at most as many as this machine has: only users say more. Nor is anything imported that it
    names, without ``trust_code``; the planes are fixed by then, so who decided them, and at what cost, does not matter any
    more. Integers of a method that cannot go on from them are trained by `staged`, which takes any.
    """
    kept = legacy.modernised(without(_as_mapping(raw, where), Recipe.keys_marked(USERS_ONLY)))
    section = kept.get("quantization")
    if isinstance(section, dict):
        kept["quantization"] = {key: value for key, value in section.items() if key not in _OF_A_SEARCH}
    if isinstance(kept.get("threads"), int):
        kept["threads"] = min(kept["threads"], os.cpu_count() or 1)
    method = _method_of(kept)
    if isinstance(method, str) and ":" in method and not trust_code and "quantization.method" not in overrides:
        hint = "pass --trust-code (trust_code=True) if you trust this file"
        raise UserError(f"the file asks to import the method `{method}`", where=where, hint=hint)
    if method != AUTO and "quantization.method" not in overrides:
        card, _ = _chosen(kept, where)
        if not card.trains:
            kept.pop("epochs", None)  # a finetune has its own
        if not card.finetunes and card.name != "float":
            kept = {key: value for key, value in kept.items() if key != card.section}
            _set(kept, "quantization.method", "staged", where)
    return resolve_from(kept, overrides, where=where)


def check_of_finetune(settings: Mapping[str, Any]) -> None:
    """UserError for settings of a search that would change nothing in a finetune: its file has the planes and the layers; and for
    a finetune of 0 epochs."""
    for key, value in settings.items():
        full = _common_key(key) or key
        if full.startswith(_BEFORE_A_FINETUNE) and full not in _OF_A_FINETUNE:
            what = f"`{full}` is a setting of the search, and a finetune keeps what its file has"
            raise UserError(what, where="--set", hint="pass it to `csq search`, or leave it out")
        if full == "epochs":
            raise UserError("`epochs` are those of the search", where="--set", hint="pass --epochs, or finetune.epochs")
        if full == "finetune.epochs" and value == 0:
            raise UserError("finetune.epochs: a finetune needs at least 1 (got 0)", where="--set")


def validate(raw: dict[str, Any], *, where: str) -> Recipe:
    """A Recipe from a raw mapping; the first problem as one UserError."""
    raw = legacy.modernised(_as_mapping(raw, where))
    card, why = _chosen(raw, where)
    for name, other in CARDS.items():
        if name in raw and name != card.section:
            key = next(iter(raw[name]), None) if isinstance(raw[name], dict) else None
            raise _foreign(f"{name}.{key}" if key else name, other, card, where=where)
    rest = {key: value for key, value in raw.items() if key != card.section}
    section = raw.get(card.section) or {}
    if card.name == "csq" and isinstance(section, dict) and is_from_scratch(raw):
        section = FROM_SCRATCH | section
    settings = _checked(card.settings, section, where=where, inside=f"{card.section}.", card=card)
    quantization = _as_mapping(rest.get("quantization") or {}, where)
    usual = "xnor" if quantization.get("act_bits") == 1 else card.activations
    rest["quantization"] = {"act_method": usual, **_planes_for(quantization)} | quantization
    rest["quantization"]["method"] = card.target if ":" in _method_of(raw) else card.name
    recipe: Recipe = _checked(Recipe, rest | {"method_settings": settings, "method_why": why}, where=where, card=card)
    _check_epochs(recipe.epochs, card, where)
    if recipe.data.calib is not None and (card.trains or recipe.adaptation.epochs or recipe.finetune.epochs):
        hint = "pass --epochs 0 (post-training quantization), without --float-epochs and --finetune-epochs"
        raise UserError("data.calib: images without labels cannot be trained on", where=where, hint=hint)
    _check_zeroq(settings, recipe.data.calib, where)
    _check_planes(recipe, card, where)
    if ":" not in recipe.quantization.cost:
        costs.find(recipe.quantization.cost, where=f"{where}: quantization.cost")
    if recipe.quantization.allocator is not None:
        find_allocator(recipe.quantization.allocator, where=f"{where}: quantization.allocator")
        if card.takes == "target":
            option = "--planes" if recipe.quantization.allocator == MANUAL else "--allocator"
            own = "quantizes nothing" if card.name == "float" else "finds its own planes"
            what = f"{card.name} {own}, and {option} cannot be used with it"
            hint = f"leave {option} out, or take a method that is given planes, as staged, lsq or ptq"
            raise UserError(what, where=where, hint=hint)
    return recipe


def _checked(model: Any, values: Any, *, where: str, card: MethodCard, inside: str = "") -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = first_problem(error)
        key = (inside + problem.key).removesuffix(".")  # of a whole section
        if problem.kind == "extra_forbidden":
            leaf = problem.loc[-1]
            owner = _owner(leaf, other_than=card)
            likely = _elsewhere(leaf, card) or did_you_mean(leaf, _beside(key)) or _suggest(leaf, card)
            hint = likely or "see `csq recipes schema`"
            if owner is not None and not likely:
                raise _foreign(key, owner, card, where=where) from None
            raise UserError(f"unknown key `{key}`", where=where, hint=hint) from None
        given = problem.given
        shown = f" (got {given!r})" if not isinstance(given, dict) and len(repr(given)) < 60 else ""
        message = problem.message
        raise UserError(f"{key}: {message}{shown}" if key else message, where=where) from None


def _chosen(raw: Mapping[str, Any], where: str) -> tuple[MethodCard, str]:
    """The method of a raw recipe, and why where `auto` decided."""
    method = _method_of(raw)
    if not isinstance(method, str):
        raise UserError(f"quantization.method: a name is wanted, not {method!r}", where=where)
    if method != AUTO:
        return find_card(method, where=f"{where}: quantization.method" if where else "quantization.method"), ""
    section, epochs = raw.get("quantization"), raw.get("epochs", Recipe.model_fields["epochs"].default)
    if epochs != 0 and isinstance(section, dict) and any(section.get(key) is not None for key in USERS_TARGETS):
        return CARDS["staged"], "a budget of bytes, operations or time"
    name, why = choose(epochs if isinstance(epochs, int) else 0, from_scratch=is_from_scratch(raw))
    return CARDS[name], why


def _planes_for(quantization: Mapping[str, Any]) -> dict[str, int]:
    """`max_bits` where it is unset: 7 beside rounded activations, whose aim is an int8 engine (docs/export.md)."""
    act_bits, target = (quantization.get(key) for key in ("act_bits", "target_bits"))
    fits = target is None or (isinstance(target, int | float) and target <= INT8_PLANES)
    return (
        {"max_bits": INT8_PLANES}
        if (act_bits == "auto" or (isinstance(act_bits, int) and act_bits <= 8)) and fits
        else {}
    )


def is_from_scratch(raw: Mapping[str, Any]) -> bool:
    """Whether quantization begins at fresh weights, of which nothing needs to be kept: no library's, no file's, and none that float
    epochs have trained."""
    model = _plain(raw.get("model"))
    given = model.get("checkpoint") is not None or model.get("warm_start") is not None
    return not model.get("pretrained", True) and not given and not _plain(raw.get("adaptation")).get("epochs", 0)


def _plain(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _method_of(raw: Mapping[str, Any]) -> Any:
    return _plain(raw.get("quantization")).get("method", AUTO)


def _renamed(overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides whose method, typed by an old name, has today's, with what that name stood for."""
    key = next((key for key in ("quantization.method", "method") if overrides.get(key) == "csq-paper"), None)
    if key is None:
        return overrides
    paper = {f"csq.{name}": value for name, value in PAPER.items()}
    return paper | overrides | {key: "csq"}


def _post_training(overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides in which 0 epochs bring the method without training, and that method 0 epochs, where only one is typed."""
    method = overrides.get("quantization.method", overrides.get("method"))
    if method is None and overrides.get("epochs") == 0:
        return overrides | {"quantization.method": POST_TRAINING}
    if method == POST_TRAINING and "epochs" not in overrides:
        return overrides | {"epochs": 0}
    return overrides


def _check_epochs(epochs: int, card: MethodCard, where: str) -> None:
    """UserError for a method that trains and has no epochs, and for one that has epochs and trains nothing."""
    if card.trains and epochs == 0:
        hint = f"leave --method out, or take `{POST_TRAINING}`: 0 epochs are post-training quantization"
        raise UserError(f"epochs: `{card.name}` needs at least 1", where=where, hint=hint)
    if not card.trains and epochs > 0:
        hint = "take 0, or --finetune-epochs to train on what it finds"
        raise UserError(f"epochs: `{card.name}` trains nothing (got {epochs})", where=where, hint=hint)


def _check_planes(recipe: Recipe, card: MethodCard, where: str) -> None:
    """UserError for a target and rules that ask for layers of fewer or more planes than the method has."""
    rules, target, most = recipe.layers, recipe.quantization.target_bits, card.most_planes
    wide: dict[str, float] = {f"layers.min_bits: {name}": planes for name, planes in rules.min_bits.items()}
    wide |= {} if target is None else {"target_bits": target}
    wide |= {"layers.keep": recipe.quantization.max_bits} if rules.keep else {}
    for key, planes in wide.items():
        if planes > most:
            hint = (
                f"pass --target-bits {most}"
                if key == "target_bits"
                else "take a method of more planes, or leave it out"
            )
            what = f"{key}: `{card.name}` has layers of {most} plane{'s' if most > 1 else ''} at most"
            raise UserError(what, where=where, hint=hint)
    start = recipe.quantization.max_bits
    for key, table in (("layers.min_bits", rules.min_bits), ("layers.max_bits", rules.max_bits)):
        for name, planes in table.items():
            if start < planes <= MOST_PLANES:
                is_int8 = start == INT8_PLANES and recipe.quantization.act_bits != 32
                rounded = ", which it is beside rounded activations unless set" if is_int8 else ""
                what = f"{key}: `{name}` at {planes} planes is more than quantization.max_bits {start}{rounded}"
                raise UserError(what, where=where, hint=f"--set quantization.max_bits={planes} lifts it")
    asked = {"layers.floor": rules.floor} | {f"layers.max_bits: {name}": most for name, most in rules.max_bits.items()}
    for key, planes in asked.items():
        if planes < card.least_planes:
            hint = "take staged, csq or ptq, or layers.exclude for what is to stay float"
            raise UserError(f"{key}: `{card.name}` has no layer of {planes} planes", where=where, hint=hint)


def _check_zeroq(settings: MethodSettings, calib: str | None, where: str) -> None:
    """UserError for settings of images that are not made; a recipe that is written out states their defaults."""
    fields = type(settings).model_fields
    for key in (name for name in fields if name.startswith(f"{ZEROQ}_") and calib != ZEROQ):
        if getattr(settings, key) != fields[key].default:
            hint = f"pass --calib {ZEROQ}, or leave it out"
            raise UserError(f"ptq.{key}: is for images that --calib {ZEROQ} makes", where=where, hint=hint)


def _set(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    section = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"`{parent}` is not a section", where=where)
    section[leaf] = value


def _as_mapping(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of settings", where=where)
    return raw


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["optimizer.lr=0.1"]`` → {"optimizer.lr": 0.1}; values are YAML. Keys are checked by :func:`resolve`.

    UserError for a key that is given twice with two values, be it once in short.
    """
    parsed: dict[str, Any] = {}
    typed: dict[str, tuple[Any, str]] = {}  # by full key: the value, and how it was written
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"`{assignment}` is not key=value", where="--set", hint="e.g. --set optimizer.lr=0.05")
        try:
            read = _load_yaml(value)
        except ValueError:
            raise UserError(f"`{value}` is not a YAML value", where=f"--set {key}") from None
        full = _common_key(key.strip()) or key.strip()
        first, other = typed.setdefault(full, (read, assignment))
        if first != read:
            what = f"`{other}` and `{assignment}` say different things"
            raise UserError(what, where="--set", hint="give one of them")
        parsed[key.strip()] = read
    return parsed


def laid_together(
    named: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    as_named: Callable[[str, Any], str],
    as_setting: Callable[[str, Any], str],
) -> dict[str, Any]:
    """What was given by name ({dotted key: value}, None for what was not) and by key ({dotted or short key: value}), as overrides.

    UserError for a setting that was given both ways with two values; ``as_named`` and ``as_setting`` say how each was written.
    """
    given = {key: value for key, value in named.items() if value is not None}
    for key, value in settings.items():
        full = _common_key(key) or key
        if full in given and not _is_same(given[full], value):
            what = f"`{as_named(full, given[full])}` and `{as_setting(key, value)}` say different things"
            raise UserError(what, hint="give one of them")
    return dict(settings) | given


def _is_same(first: Any, second: Any) -> bool:
    """Whether two values of a setting are the same, one of them perhaps still as text (``off`` is False in YAML)."""
    if first == second:
        return True
    try:
        return isinstance(first, str) and bool(_load_yaml(first) == second)
    except ValueError:  # no YAML: it is what it is
        return False


def preprocessing(overrides: dict[str, Any]) -> Recipe:
    """A recipe that says how a float model's images are prepared. UserError for settings of anything else."""
    for key in overrides:
        full = _common_key(key)
        if full not in _PREPROCESSING:
            what = f"`{full or key}` does not say how a float model's images are prepared"
            raise UserError(what, where="--set", hint=f"one of {', '.join(_PREPROCESSING)}")
    return resolve("short", overrides)


def of_every_method(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``overrides`` that are no settings of a method's own."""
    return {key: value for key, value in overrides.items() if _common_key(key) is not None}


def _common_key(key: str) -> str | None:
    """The dotted key of a setting that every run has; None for those of methods, ambiguous and unknown ones."""
    leaves = Recipe.leaves()
    if key in leaves or any(key.startswith(f"{leaf}.") for leaf in _FREE_MAPPINGS):
        return key
    matches = [leaf for leaf in leaves if leaf.rsplit(".", 1)[-1] == key]
    return matches[0] if len(matches) == 1 else None


def full_key(key: str, card: MethodCard) -> str:
    """The dotted key for a full or unambiguous short one (``max_bits`` alone is ambiguous, ``batch_size`` is not).

    Short names of the method in use come before those of other methods, which are refused by name.
    """
    leaves = _leaves(card)
    if key in leaves or any(key.startswith(f"{leaf}.") for leaf in _FREE_MAPPINGS):
        return key
    if key.startswith("quantization.") and key.removeprefix("quantization.") in legacy.OLD_KEYS:
        key = key.removeprefix("quantization.").replace("mask_beta_", "beta_")  # where csq 0.1 had it
    matches = [leaf for leaf in leaves if leaf.rsplit(".", 1)[-1] == key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"`{key}` is ambiguous", where="--set", hint=f"write {' or '.join(f'`{m}`' for m in matches)}")
    section, _, leaf = key.rpartition(".")
    owner = CARDS.get(section) if leaf and section != card.section else None
    owner = owner if owner is not None and leaf in owner.settings.model_fields else _owner(key, other_than=card)
    if owner is not None and not did_you_mean(key, leaves):
        raise _foreign(key, owner, card, where="--set")
    raise UserError(f"unknown key `{key}`", where="--set", hint=_suggest(key, card) or "see `csq recipes schema`")


def _owner(key: str, *, other_than: MethodCard) -> MethodCard | None:
    """Another method that has a setting of this name."""
    return next((c for c in CARDS.values() if c.name != other_than.name and key in c.settings.model_fields), None)


def _foreign(key: str, owner: MethodCard, card: MethodCard, *, where: str) -> UserError:
    takes = ", ".join(card.settings.model_fields) or "no settings of its own"
    return UserError(
        f"`{key}` is a setting of method {owner.name}, and this run's is {card.name}",
        where=where,
        hint=f"pass --method {owner.name}, or leave it out; {card.name} takes {takes}",
    )


def json_schema() -> dict[str, Any]:
    """JSON schema of recipe files: every section, those of the methods included."""
    schema = Recipe.model_json_schema()
    for internal in ("method_settings", "method_why"):
        schema["properties"].pop(internal)
    schema["$defs"].pop(MethodSettings.__name__, None)
    for card in CARDS.values():
        if card.settings is not MethodSettings:
            schema["properties"][card.section] = card.settings.model_json_schema()
    return schema


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def _elsewhere(leaf: str, card: MethodCard) -> str:
    """``did you mean `quantization.target_bits`?`` for a key that stands in the wrong section of a recipe."""
    places = [name for name in _leaves(card) if name.rsplit(".", 1)[-1] == leaf]
    return f"did you mean {' or '.join(f'`{place}`' for place in places)}?" if places else ""


def _suggest(key: str, card: MethodCard) -> str:
    leaves = _leaves(card)
    short = [leaf.rsplit(".", 1)[-1] for leaf in leaves]
    first, then = (leaves, short) if "." in key else (short, leaves)
    return did_you_mean(key, first) or did_you_mean(key, then)


def _beside(key: str) -> set[str]:
    """The keys that a recipe may have where this dotted one is: the names of its sections, or those within one."""
    section = key.rpartition(".")[0]
    dotted = [*Recipe.leaves(), *(f"{c.section}.{name}" for c in CARDS.values() for name in c.settings.model_fields)]
    inside = [leaf.removeprefix(f"{section}.") for leaf in dotted if not section or leaf.startswith(f"{section}.")]
    return {name.partition(".")[0] for name in inside}


def _leaves(card: MethodCard) -> list[str]:
    """Dotted names of every setting that a run of this method has."""
    return [*Recipe.leaves(), *(f"{card.section}.{name}" for name in card.settings.model_fields)]
