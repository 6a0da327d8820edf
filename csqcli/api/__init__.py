"""csq from Python: what the commands do, as functions of plain values, and an optimizer for your own training loop.

Everything here is re-exported by the package: ``import csqcli; csqcli.search(…)``. Every function says its arguments, units, errors
and an example.
Whatever is wrong with the input is a :class:`UserError`, whose ``line()`` is what the command line prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csqcli.api.analyses import allocate, bench, diff, explain, inspect, sensitivity
from csqcli.api.files import compare, evaluate, export, load, report
from csqcli.api.in_memory import quantize, save
from csqcli.api.runs import finetune, plan, search, sweep
from csqcli.errors import UserError

if TYPE_CHECKING:
    from csqcli.quant.optimizer import CSQ

__all__ = [
    "CSQ",
    "UserError",
    "allocate",
    "bench",
    "compare",
    "diff",
    "evaluate",
    "explain",
    "export",
    "finetune",
    "inspect",
    "load",
    "plan",
    "quantize",
    "report",
    "save",
    "search",
    "sensitivity",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name == "CSQ":  # a class of torch, which reports need not import
        from csqcli.quant.optimizer import CSQ

        return CSQ
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
