"""Nested settings as dotted keys."""

from __future__ import annotations

from csqcli.system.settings import flat


def test_a_nested_mapping_is_its_dotted_keys_and_an_empty_one_a_value() -> None:
    tree = {"seed": 0, "data": {"mean": [0.5], "more": {"deep": None}}, "arguments": {}}
    assert flat(tree) == {"seed": 0, "data.mean": [0.5], "data.more.deep": None, "arguments": {}}
