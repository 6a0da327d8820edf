"""Every shipped recipe is valid, the paper's are the paper's, and mistakes are named."""

from __future__ import annotations

import pytest
import yaml

from csqcli.errors import UserError
from csqcli.recipe import Recipe, builtin_names, full_key, parse_assignments, resolve, to_yaml, validate


@pytest.mark.parametrize("name", builtin_names())
def test_shipped_recipe_is_valid_described_and_survives_a_round_trip(name: str) -> None:
    recipe = resolve(name, {})
    assert recipe.description
    assert validate(yaml.safe_load(to_yaml(recipe)), where=name) == recipe


def test_the_expected_recipes_ship() -> None:
    papers = {"cifar10-resnet20", "cifar10-vgg19bn", "imagenet-resnet18", "imagenet-resnet50"}
    assert {"digits", "short", *papers} <= set(builtin_names())


@pytest.mark.parametrize(
    ("name", "epochs", "finetune", "decay", "warmup"),
    [  # section IV-A of the paper
        ("cifar10-resnet20", 600, 0, 5e-4, 0),
        ("cifar10-vgg19bn", 300, 0, 5e-4, 0),
        ("imagenet-resnet18", 200, 100, 1e-4, 5),
        ("imagenet-resnet50", 200, 100, 1e-4, 5),
    ],
)
def test_the_papers_recipes_hold_the_papers_settings(
    name: str, epochs: int, finetune: int, decay: float, warmup: int
) -> None:
    recipe = resolve(name, {})
    assert (recipe.epochs, recipe.finetune.epochs) == (epochs, finetune)
    assert recipe.model.pretrained is False
    settings, optimizer = recipe.quantization, recipe.optimizer
    assert (settings.method, settings.max_bits, settings.reg_strength) == ("csq-paper", 8, 0.01)
    assert (settings.beta_initial, settings.beta_final, settings.beta_schedule) == (1, 200, "epoch")
    assert (settings.rounding, settings.harden_at, settings.refit_scale) == ("threshold", 1, False)
    assert (settings.digits, settings.init_scale, settings.gate_steps) == ("sign-magnitude", 1, "sgd")
    assert (settings.precision_count, settings.fix_masks_at, settings.restart_beta) == ("sign", 1, None)
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.schedule) == ("momentum", 0.1, 0.9, "cosine")
    assert (optimizer.weight_decay, optimizer.warmup_epochs) == (decay, warmup)


def test_the_default_recipe_is_ten_epochs_from_pretrained_weights() -> None:
    recipe = resolve("short", {})
    assert recipe.epochs == 10
    assert recipe.model.pretrained
    assert recipe.quantization.method == "csq"


def test_command_line_beats_recipe_beats_default() -> None:
    recipe = resolve("digits", parse_assignments(["batch_size=32", "quantization.target_bits=1.5"]))
    assert recipe.data.batch_size == 32  # command line over the recipe's 64
    assert recipe.data.source == "digits"  # recipe over the default
    assert recipe.optimizer.momentum == 0.9  # default
    assert recipe.quantization.target_bits == 1.5


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({"quantization": {"target_bit": 3}}, "unknown key `quantization.target_bit`; did you mean `target_bits`"),
        ({"epoch": 3}, "unknown key `epoch`; did you mean `epochs`"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1"),
        ({"quantization": {"target_bits": -1}}, "quantization.target_bits: Input should be greater than 0"),
        ({"quantization": {"target_bits": 9}}, "target_bits 9 is more than max_bits 8"),
        ({"quantization": {"method": "cqs"}}, "quantization.method"),
    ],
)
def test_wrong_recipes_are_one_line(raw: dict, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(raw, where="r.yaml")
    assert caught.value.line().startswith(f"r.yaml: {complaint}")


def test_an_ambiguous_short_key_lists_its_full_names() -> None:
    with pytest.raises(UserError, match=r"`max_bits` is ambiguous; write `quantization.max_bits` or `layers.max_bits`"):
        full_key("max_bits")


def test_every_setting_has_help_text() -> None:
    def properties(schema: dict):
        yield from schema.get("properties", {}).items()
        for definition in schema.get("$defs", {}).values():
            yield from definition.get("properties", {}).items()

    missing = [name for name, schema in properties(Recipe.model_json_schema()) if not schema.get("description")]
    assert missing == []
