"""``csq methods``."""

from __future__ import annotations

from csqcli.cli import output
from csqcli.cli.options import JsonOption

_TAKES = {"target": "a target", "planes": "planes of an allocator", "either": "a target, or planes of an allocator"}


def methods(as_json: JsonOption = False) -> None:
    """List the methods, allocators and costs to choose from.

    A method trains the weights, an allocator decides each layer's planes before training, a cost says what a plane takes
    of the budget.

    Example: csq methods --json
    """
    from csqcli.quant.catalog import ALLOCATORS, AUTO, CARDS
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
            "allocators": [
                {"name": card.name, "summary": card.summary, "citation": card.citation} for card in ALLOCATORS.values()
            ],
            "costs": [{"name": name, "summary": costs.help[name]} for name in costs.names()],
        }
        output.as_json(found)
        return
    rows = ["Methods (--method NAME, or package.module:Class)"]
    rows.append(f"  {AUTO:<14} ptq at 0 epochs, staged from a checkpoint, csq from scratch")
    for card in CARDS.values():
        rows.append(f"  {card.name:<14} {card.summary}")
        if card.name != "float":
            settings = ", ".join(card.settings.model_fields) or "none"
            rows.append(f"  {'':<14} takes {_TAKES[card.takes]}; settings: {settings}")
        if card.citation:
            rows.append(f"  {'':<14} {card.citation}")
    rows.append("Allocators (--allocator NAME, or package.module:function)")
    for allocator in ALLOCATORS.values():
        rows.append(f"  {allocator.name:<14} {allocator.summary}")
        if allocator.citation:
            rows.append(f"  {'':<14} {allocator.citation}")
    rows.append("Costs (--cost NAME, or package.module:function)")
    rows += [f"  {name:<14} {costs.help[name]}" for name in costs.names()]
    output.lines(rows, indent=17)
