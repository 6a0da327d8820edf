"""`optimizer.name: auto`: which base optimizer a network gets, and that nothing that was asked for is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csqcli.recipe.schema import OptimizerSettings

LAYER_NORM, GROUP_NORM = "tests.plain_models:layer_norm_cnn", "tests.plain_models:group_norm_cnn"
ADAMW, MOMENTUM = ("adamw", 0.001, 0.05, 0.2), ("momentum", 0.05, 0.0005, 0)


RUN = (
    "--no-pretrained",
    "--data",
    "digits",
    "--target-bits",
    2,
    "--epochs",
    1,
    "--set",
    "max_steps=2",
    "--method",
    "staged",
)


@pytest.mark.parametrize(
    ("model", "typed", "expected"),
    [
        (LAYER_NORM, (), ADAMW),
        (LAYER_NORM, ("--set", "optimizer.weight_decay=0.1"), ("adamw", 0.001, 0.1, 0.2)),
        (LAYER_NORM, ("--lr", 0.01), ("momentum", 0.01, 0.0005, 0)),  # a rate that was chosen was chosen for SGD
        (LAYER_NORM, ("--set", "optimizer.name=momentum"), MOMENTUM),
        (LAYER_NORM, ("--set", "optimizer.name=adamw", "--lr", 0.002), ("adamw", 0.002, 0.0005, 0)),
        (LAYER_NORM, ("--method", "csq"), MOMENTUM),  # whose gates take the optimizer's rate
        (GROUP_NORM, (), MOMENTUM),
    ],
)
def test_networks_of_layernorm_get_adamw_unless_a_rate_or_a_name_is_given(
    csq, tmp_path: Path, model: str, typed: tuple, expected: tuple
) -> None:
    code, out, err = csq("search", model, *RUN, *typed, "-o", tmp_path / "run")
    assert code == 0, err
    used = json.loads((tmp_path / "run" / "report.json").read_text())["recipe"]["optimizer"]
    assert (used["name"], used["lr"], used["weight_decay"], used["warmup_epochs"]) == expected
    assert ("a network of LayerNorm" in err + out) == (expected[0] == "adamw" and "optimizer.name=adamw" not in typed)


def test_a_recipe_that_is_written_and_read_back_chooses_alike(csq, tmp_path: Path) -> None:
    assert csq("search", LAYER_NORM, *RUN, "--quiet", "-o", tmp_path / "one")[0] == 0
    code, _, err = csq("search", "--recipe", tmp_path / "one" / "recipe.yaml", "--quiet", "-o", tmp_path / "two")
    assert code == 0, err
    assert len({(tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "two")}) == 1


def test_nothing_is_left_open() -> None:
    for adamw in (False, True):
        found = OptimizerSettings().chosen(adamw=adamw)
        assert None not in (found.lr, found.weight_decay, found.warmup_epochs)
        assert found.chosen(adamw=not adamw) == found
