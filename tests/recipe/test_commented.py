"""A commented recipe says what it was made of, whether its defaults stay behind their # or not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from csqcli.quant.catalog import CARDS
from csqcli.recipe.commented import commented
from csqcli.recipe.resolve import resolve
from csqcli.recipe.yaml_files import builtin_names


def uncommented(text: str) -> str:
    """Without the # before keys; help has a space behind its own."""
    return re.sub(r"^( *)#(?=\S|  \S)", r"\1", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", builtin_names())
def test_a_recipe_survives_its_comments(name: str, tmp_path: Path) -> None:
    wanted = resolve(name, {"target_bits": 0.75, "layers.max_bits": {"fc": 2}})
    written = commented(wanted)
    for text in (written, uncommented(written)):
        (tmp_path / "recipe.yaml").write_text(text)
        assert resolve(str(tmp_path / "recipe.yaml"), {}).to_dict() == wanted.to_dict()


@pytest.mark.parametrize("method", [name for name in CARDS if name != "float"])
def test_every_method_brings_its_settings(method: str) -> None:
    text = commented(resolve("short", {"quantization.method": method}))
    for setting in CARDS[method].settings.model_fields:
        assert re.search(rf"^ *#? *{setting}: ", text, re.MULTILINE)


def test_what_was_asked_for_stands_without_a_sign_at_its_default_too() -> None:
    recipe = resolve("short", {"quantization.max_bits": 8})
    assert re.search(r"^ *#  *max_bits: 8$|^  #max_bits: 8$", commented(recipe), re.MULTILINE)
    assert "\n  max_bits: 8\n" in commented(recipe, keep={"quantization.max_bits"})


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization.act_bits": 8, "quantization.max_bits": 8},
        {"model.pretrained": False, "quantization.method": "csq", "csq.fix_masks_at": 0.4},  # from scratch it is 0.6
    ],
)
def test_what_was_set_against_a_default_that_follows_from_another_key_stands(settings: dict, tmp_path: Path) -> None:
    wanted = resolve("short", settings)
    (tmp_path / "recipe.yaml").write_text(commented(wanted))
    assert resolve(str(tmp_path / "recipe.yaml"), {}).to_dict() == wanted.to_dict()
