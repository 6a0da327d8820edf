"""Names of settings: dotted or short, of every run or of one method, and what was meant by one that there is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from csqcli.errors import UserError, did_you_mean
from csqcli.quant.catalog import CARDS, MethodCard
from csqcli.recipe import legacy
from csqcli.recipe.schema import Recipe
from csqcli.recipe.yaml_files import load_yaml

_FREE_MAPPINGS = (
    "model.arguments",
    "layers.min_bits",
    "layers.max_bits",
    "quantization.planes",
)  # whose keys are not settings


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
            read = load_yaml(value)
        except ValueError:
            raise UserError(f"`{value}` is not a YAML value", where=f"--set {key}") from None
        full = common_key(key.strip()) or key.strip()
        first, other = typed.setdefault(full, (read, assignment))
        if first != read:
            what = f"`{other}` and `{assignment}` say different things"
            raise UserError(what, where="--set", hint="give one of them")
        parsed[key.strip()] = read
    return parsed


def merged(
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
        full = common_key(key) or key
        if full in given and not _is_same(given[full], value):
            what = f"`{as_named(full, given[full])}` and `{as_setting(key, value)}` say different things"
            raise UserError(what, hint="give one of them")
    return dict(settings) | given


def _is_same(first: Any, second: Any) -> bool:
    """Whether two values of a setting are the same, one of them perhaps still as text (``off`` is False in YAML)."""
    if first == second:
        return True
    try:
        return isinstance(first, str) and bool(load_yaml(first) == second)
    except ValueError:  # no YAML: it is what it is
        return False


def of_every_method(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``overrides`` that are no settings of a method's own."""
    return {key: value for key, value in overrides.items() if common_key(key) is not None}


def common_key(key: str) -> str | None:
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
    leaves = leaves_of(card)
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
    owner = owner if owner is not None and leaf in owner.settings.model_fields else owner_of(key, other_than=card)
    if owner is not None and not did_you_mean(key, leaves):
        raise foreign(key, owner, card, where="--set")
    raise UserError(f"unknown key `{key}`", where="--set", hint=suggest(key, card) or "see `csq recipes schema`")


def owner_of(key: str, *, other_than: MethodCard) -> MethodCard | None:
    """Another method that has a setting of this name."""
    return next((c for c in CARDS.values() if c.name != other_than.name and key in c.settings.model_fields), None)


def foreign(key: str, owner: MethodCard, card: MethodCard, *, where: str) -> UserError:
    takes = ", ".join(card.settings.model_fields) or "no settings of its own"
    return UserError(
        f"`{key}` is a setting of method {owner.name}, and this run's is {card.name}",
        where=where,
        hint=f"pass --method {owner.name}, or leave it out; {card.name} takes {takes}",
    )


def elsewhere(leaf: str, card: MethodCard) -> str:
    """``did you mean `quantization.target_bits`?`` for a key that stands in the wrong section of a recipe."""
    places = [name for name in leaves_of(card) if name.rsplit(".", 1)[-1] == leaf]
    return f"did you mean {' or '.join(f'`{place}`' for place in places)}?" if places else ""


def suggest(key: str, card: MethodCard) -> str:
    leaves = leaves_of(card)
    short = [leaf.rsplit(".", 1)[-1] for leaf in leaves]
    first, then = (leaves, short) if "." in key else (short, leaves)
    return did_you_mean(key, first) or did_you_mean(key, then)


def beside(key: str) -> set[str]:
    """The keys that a recipe may have where this dotted one is: the names of its sections, or those within one."""
    section = key.rpartition(".")[0]
    dotted = [*Recipe.leaves(), *(f"{c.section}.{name}" for c in CARDS.values() for name in c.settings.model_fields)]
    inside = [leaf.removeprefix(f"{section}.") for leaf in dotted if not section or leaf.startswith(f"{section}.")]
    return {name.partition(".")[0] for name in inside}


def leaves_of(card: MethodCard) -> list[str]:
    """Dotted names of every setting that a run of this method has."""
    return [*Recipe.leaves(), *(f"{card.section}.{name}" for name in card.settings.model_fields)]


def put(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    section = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"`{parent}` is not a section", where=where)
    section[leaf] = value
