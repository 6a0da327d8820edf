"""``csq methods``."""

from __future__ import annotations

import json

from csqcli.cli import output
from csqcli.cli.options import JsonOption

_TAKES = {"target": "a target", "planes": "planes of an allocator", "either": "a target, or planes of an allocator"}


def methods(as_json: JsonOption = False) -> None:
    """Weight methods, allocators and costs: what each does, what it takes, where it is from."""
    from csqcli.quant.catalog import ALLOCATORS, AUTO, CARDS, LONG_SCHEDULE
    from csqcli.quant.costs import costs

    if as_json:
        found = {
            "methods": [
                {
                    "name": card.name,
                    "summary": card.summary,
                    "citation": card.citation,
                    "takes": card.takes,
                    "settings": list(card.settings.model_fields),
                }
                for card in CARDS.values()
            ],
            "allocators": [{"name": card.name, "summary": card.summary} for card in ALLOCATORS.values()],
            "costs": [{"name": name, "summary": costs.help[name]} for name in costs.names()],
        }
        output.block(json.dumps(found, indent=2, ensure_ascii=False))
        return
    output.line("Methods (--method NAME, or package.module:Class)")
    output.line(f"  {AUTO:<12} staged below {LONG_SCHEDULE} epochs from a checkpoint, csq beyond and from scratch")
    for card in CARDS.values():
        output.line(f"  {card.name:<12} {card.summary}")
        if card.name != "float":
            settings = ", ".join(card.settings.model_fields) or "none"
            output.line(f"  {'':<12}   takes {_TAKES[card.takes]}; settings: {settings}")
        if card.citation:
            output.line(f"  {'':<12}   {card.citation}")
    output.line("Allocators (--allocator NAME, or package.module:function)")
    for allocator in ALLOCATORS.values():
        output.line(f"  {allocator.name:<12} {allocator.summary}")
    output.line("Costs (--cost NAME, or package.module:function)")
    for name in costs.names():
        output.line(f"  {name:<12} {costs.help[name]}")
