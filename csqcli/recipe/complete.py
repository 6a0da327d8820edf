"""Whether a recipe says all that a search needs; known before torch is imported or a model is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from csqcli.errors import UserError, no_data_given
from csqcli.quant.catalog import POST_TRAINING
from csqcli.recipe.keys import full_key
from csqcli.recipe.schema import Recipe

_OF_TRAINING = ("optimizer.", "max_steps", "amp", "compile", "quantization.state_dtype")


def check_complete(recipe: Recipe, *, writes: bool = True) -> None:
    """UserError for a search without a model or data, and for a target that is missing or that the method cannot meet.

    ``writes`` False: of a command that writes no model, and so has no file to measure.
    """
    check_model_given(recipe)
    target, card = recipe.quantization.target_bits, recipe.card
    quantization = recipe.quantization
    if target is None and not quantization.has_resource_target and card.name != "float":
        inside = ", or write target_bits into the file of planes" if quantization.planes else ""
        other = "--target-size 2MB" if writes else "--target-bops 5e9"
        raise UserError("no target given", hint=f"pass --target-bits, e.g. --target-bits 3, or {other}{inside}")
    if quantization.in_bytes and not writes:
        hint = "pass --target-bits, --target-bops or --target-latency"
        raise UserError("a budget of bytes is about a file, and none is written here", hint=hint)
    if quantization.has_resource_target:
        if card.name == "float":
            raise UserError("float quantizes nothing, so there is no budget to meet", hint="leave the target out")
        if card.name not in ("staged", POST_TRAINING):
            hint = "leave --method out, or pass --target-bits"
            raise UserError(f"{card.name} takes mean bits only, not a budget of bytes, operations or time", hint=hint)
        if recipe.finetune.epochs:
            if quantization.in_bytes:
                hint = "give the search more --epochs, or `csq finetune` the file without a target"
                raise UserError("finetune.epochs would change the size that was reached", hint=hint)
            hint = "give the search more --epochs, or `csq finetune` its file, which keeps the planes"
            what = "finetune.epochs go with a budget of mean bits, not with one of operations or time"
            raise UserError(what, hint=hint)
    if recipe.model.warm_start is not None and (not card.trains or card.name == "float"):
        hint = "leave model.warm_start out, or train"
        raise UserError(f"{card.name} begins with the float model, not with a quantized one", hint=hint)
    uniform = card.takes == "planes" and recipe.quantization.allocator in (None, "uniform")
    rules = (
        recipe.layers
    )  # with such, the target's whole part is for the other layers (`quant.allocators.base.uniform`)
    is_whole = target is None or target == int(target) or bool(rules.keep or rules.min_bits or rules.max_bits)
    if uniform and target is not None and not (is_whole and 1 <= target <= 8):
        hint = "take a whole number from 1 to 8, or method auto for a mixed one"
        raise UserError(f"{card.name} gives every layer the same planes; {target:g} is not possible", hint=hint)
    check_data_given(recipe)


def check_model_given(recipe: Recipe) -> None:
    """UserError for a recipe that names no model."""
    if recipe.model.source is None:
        raise UserError("no model given", hint="name one, e.g. resnet18, or use a recipe that does")


def check_data_given(recipe: Recipe) -> None:
    """UserError for a recipe that names no images."""
    if recipe.data.source is None:
        raise no_data_given()


def still_missing(recipe: Recipe) -> dict[str, str]:
    """What a search by this recipe has to be told besides, and how: ``{"model": "MODEL", "data": "--data FOLDER"}``."""
    quantization = recipe.quantization
    aimless = quantization.target_bits is None and not quantization.has_resource_target and not quantization.planes
    found = {
        "model": ("MODEL", recipe.model.source is None),
        "data": ("--data FOLDER", recipe.data.source is None),
        "target": ("--target-bits 3", aimless and recipe.card.name != "float"),
    }
    return {name: typed for name, (typed, missing) in found.items() if missing}


def without_effect(recipe: Recipe, typed: Mapping[str, Any]) -> list[str]:
    """What was typed ({dotted or short key: value}) and changes nothing in a search by this recipe: ``KEY: why`` of each."""
    found = ((key, _why_idle(recipe, key)) for key in dict.fromkeys(_full_keys(typed, recipe)))
    return [f"{key}: {why}" for key, why in found if why]


def _full_keys(typed: Iterable[str], recipe: Recipe) -> Iterable[str]:
    for key in typed:
        try:
            yield full_key(key, recipe.card)
        except UserError:  # of the method that was typed beside it, and has another name by now
            continue


def _why_idle(recipe: Recipe, key: str) -> str:
    card, settings = recipe.card, recipe.quantization
    trains = card.trains or recipe.finetune.epochs
    if card.name == "float":
        of_quantization = key.startswith(("quantization.", "layers.")) and key != "quantization.method"
        return "float quantizes nothing" if of_quantization else ""
    if key.startswith("optimizer.distill") and not trains:
        return "nothing is trained beside the float model"
    if key.startswith(_OF_TRAINING) and not trains and not recipe.adaptation.epochs:
        return "nothing is trained"
    if key == "finetune.teacher":
        return "a search follows the float model that it has at hand"
    if key == "quantization.state_dtype" and not card.takes_state_dtype:
        return f"the state of {card.name} is float32"
    if key == "quantization.trials" and settings.allocator != "haq":
        return f"{settings.allocator or card.name} makes no trials"
    if key in ("ptq.recovery", "staged.recovery") and settings.allocator is not None:
        return f"planes are those of {settings.allocator}"
    if key == "ptq.follow_inputs" and getattr(recipe.method_settings, "rounding", None) == "nearest":
        return "rounding to the nearest level follows no inputs"
    return ""
