"""From a recipe's name or file, and what the command line lays over it, to a checked :class:`Recipe`. Loads no PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from csqcli.errors import UserError, did_you_mean, first_problem
from csqcli.quant.catalog import AUTO, CARDS, MANUAL, POST_TRAINING, MethodCard, choose, find_allocator, find_card
from csqcli.quant.costs import costs
from csqcli.quant.method_settings import FROM_SCRATCH, PAPER, MethodSettings
from csqcli.quant.names import FLOAT_BITS, INT8_PLANES, MOST_PLANES
from csqcli.recipe import DEFAULT_RECIPE, legacy
from csqcli.recipe.keys import beside, common_key, elsewhere, foreign, full_key, owner_of, put, suggest
from csqcli.recipe.schema import RESOURCE_TARGETS, ZEROQ, Recipe
from csqcli.recipe.yaml_files import read
from csqcli.system.settings import USERS_ONLY, without

_OF_A_SEARCH = (
    "allocator",
    "cost",
    "planes",
    "ship_as",
    "latency_table",
    "latency_engine",
    *RESOURCE_TARGETS,
)  # ignored when finetuning from its file
_BEFORE_A_FINETUNE = ("quantization.", "layers.", "adaptation.")
_OF_A_FINETUNE = ("quantization.method", "quantization.act_method", "quantization.state_dtype", "layers.floor")
_TARGETS = tuple(f"quantization.{key}" for key in ("target_bits", *RESOURCE_TARGETS))
_PREPROCESSING = (
    *(f"data.{key}" for key in ("input_size", "mean", "std", "interpolation", "crop_pct")),
    "model.arguments",
)


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
    targets = {full for key in typed if (full := common_key(key)) in _TARGETS}
    section = given.get("quantization")
    if targets and isinstance(
        section, dict
    ):  # a target that is typed takes the place of the recipe's, in whatever unit
        given["quantization"] = {k: value for k, value in section.items() if f"quantization.{k}" not in _TARGETS}
    of_method = {}
    for key, value in typed.items():
        full = common_key(key)
        if full is None:
            of_method[key] = value
        else:
            put(given, full, value, where)
    card, _ = _chosen(given, where)  # which may depend on what was just set
    for key, value in of_method.items():
        put(given, full_key(key, card), value, where)
    return validate(given, where=where)


def resolve_stored(raw: dict[str, Any], overrides: dict[str, Any], *, where: str, trust_code: bool = False) -> Recipe:
    """As :func:`resolve`, from the recipe inside a model file.

    Whatever would make csq read something (model, data.source) or start processes (data.workers, compile) is
    left out of it, and threads are at most as many as this machine has: only users say more. Nor is anything imported that it
    names, without ``trust_code``; the planes are fixed by then, so how they were decided, and at what cost, no longer
    matters. Integers of a method that cannot go on from them are trained by `staged`, which takes any.
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
            put(kept, "quantization.method", "staged", where)
    return resolve_from(kept, overrides, where=where)


def check_of_finetune(settings: Mapping[str, Any]) -> None:
    """UserError for settings of a search that would change nothing in a finetune: its file has the planes and the layers; and for
    a finetune of 0 epochs."""
    for key, value in settings.items():
        full = common_key(key) or key
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
            raise foreign(f"{name}.{key}" if key else name, other, card, where=where)
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
            owner = owner_of(leaf, other_than=card)
            likely = elsewhere(leaf, card) or did_you_mean(leaf, beside(key)) or suggest(leaf, card)
            hint = likely or "see `csq recipes schema`"
            if owner is not None and not likely:
                raise foreign(key, owner, card, where=where) from None
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
    if epochs != 0 and isinstance(section, dict) and any(section.get(key) is not None for key in RESOURCE_TARGETS):
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
    rules, target, most = recipe.layers, recipe.quantization.target_bits, card.max_planes
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
                is_int8 = start == INT8_PLANES and recipe.quantization.act_bits != FLOAT_BITS
                rounded = ", which it is beside rounded activations unless set" if is_int8 else ""
                what = f"{key}: `{name}` at {planes} planes is more than quantization.max_bits {start}{rounded}"
                raise UserError(what, where=where, hint=f"--set quantization.max_bits={planes} lifts it")
    asked = {"layers.floor": rules.floor} | {f"layers.max_bits: {name}": most for name, most in rules.max_bits.items()}
    for key, planes in asked.items():
        if planes < card.min_planes:
            hint = "take staged, csq or ptq, or layers.exclude for what is to stay float"
            raise UserError(f"{key}: `{card.name}` has no layer of {planes} planes", where=where, hint=hint)


def _check_zeroq(settings: MethodSettings, calib: str | None, where: str) -> None:
    """UserError for settings of images that are not made; a recipe that is written out states their defaults."""
    fields = type(settings).model_fields
    for key in (name for name in fields if name.startswith(f"{ZEROQ}_") and calib != ZEROQ):
        if getattr(settings, key) != fields[key].default:
            hint = f"pass --calib {ZEROQ}, or leave it out"
            raise UserError(f"ptq.{key}: is for images that --calib {ZEROQ} makes", where=where, hint=hint)


def _as_mapping(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of settings", where=where)
    return raw


def preprocessing(overrides: dict[str, Any]) -> Recipe:
    """A recipe that says how a float model's images are prepared. UserError for settings of anything else."""
    for key in overrides:
        full = common_key(key)
        if full not in _PREPROCESSING:
            what = f"`{full or key}` does not say how a float model's images are prepared"
            raise UserError(what, where="--set", hint=f"one of {', '.join(_PREPROCESSING)}")
    return resolve(DEFAULT_RECIPE, overrides)


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
