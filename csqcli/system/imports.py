"""Objects that a user names as ``package.module:attribute``: model factories, data sources and the like."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from csqcli.errors import UserError


def import_attribute(name: str) -> Any:
    """The object that ``package.module:attribute`` names; modules in the working directory are found as by ``python -m``.

    Raises UserError where the module cannot be imported or has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UserError(f"cannot import `{module_name}` ({error})", where=name) from error
    except AttributeError:
        raise UserError(f"`{module_name}` has no `{attribute}`", where=name) from None
