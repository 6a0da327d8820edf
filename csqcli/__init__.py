"""csq quantizes pretrained vision checkpoints in mixed precision, within a budget of mean bits; CSQ is among its methods.

The library's front door. Everything here is described in :mod:`csqcli.api` and imported when it is first used: importing
``csqcli`` loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csqcli.version import __version__ as __version__

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

if TYPE_CHECKING:
    from csqcli.api import (
        CSQ,
        UserError,
        allocate,
        bench,
        compare,
        diff,
        evaluate,
        explain,
        export,
        finetune,
        inspect,
        load,
        plan,
        quantize,
        report,
        save,
        search,
        sensitivity,
        sweep,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from csqcli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
