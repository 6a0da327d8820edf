"""Names that people type for parts of csq, their own included: ``importance`` or ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from csqcli.errors import UserError, did_you_mean, machine_fault, user_code_location

T = TypeVar("T")


class Registry(Generic[T]):
    """Functions of one kind by name. Whatever holds a colon is imported: ``package.module:function``."""

    def __init__(self, kind: str) -> None:
        """``kind`` is how messages call a part: "allocator"."""
        self.kind = kind
        self._parts: dict[str, T] = {}
        self.help: dict[str, str] = {}  # one line per name

    def register(self, name: str, help_line: str = "") -> Callable[[T], T]:
        """A decorator that gives a part its name."""

        def add(part: T) -> T:
            self._parts[name], self.help[name] = part, help_line
            return part

        return add

    def find(self, name: str, *, where: str = "") -> T:
        """The part of a name. UserError for one that is unknown or cannot be imported."""
        if ":" in name:
            found: T = import_function(name, where=where)
            return found
        if name not in self._parts:
            hint = did_you_mean(name, self._parts) or f"one of {', '.join(self._parts)}, or package.module:name"
            raise UserError(f"no {self.kind} `{name}`", where=where, hint=hint)
        return self._parts[name]

    def names(self) -> list[str]:
        return list(self._parts)


def import_attribute(name: str, *, where: str = "") -> Any:
    """``package.module:attribute``, the working directory included. UserError in one line where it cannot be imported."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"`{name}` is not package.module:name", where=where)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, "")  # as `python -m` would find it
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"cannot import `{module_name}` ({error})", where=where) from error
    except SystemExit as error:
        raise UserError(f"importing `{module_name}` ends the program (sys.exit)", where=where) from error
    if not hasattr(module, attribute):
        raise UserError(f"`{module_name}` has no `{attribute}`", where=where)
    return getattr(module, attribute)


def import_function(name: str, *, where: str = "") -> Any:
    """As :func:`import_attribute`, of a function. One that cannot be called as csq calls it is a UserError too.

    What a function raises in its own lines is raised as it is.
    """
    function = import_attribute(name, where=where)
    if not callable(function):
        raise UserError(f"`{name}` is {type(function).__name__}, not a function", where=where)

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if machine_fault(error) is not None or user_code_location(error):
                raise
            raise UserError(f"`{name}` cannot be called as csq calls it ({error})", where=where) from error

    return call
