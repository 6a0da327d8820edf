"""Arguments of the functions of csq's Python API: held against the types and ranges that their signatures state."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_type_hints

from csqcli.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

P = ParamSpec("P")
R = TypeVar("R")

# Names that a signature may use without their modules being loaded: of such a type anything is let through.
_UNCHECKED = {"nn": types.SimpleNamespace(Module=Any), "Display": Any}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that raises UserError for an argument that its signature rules out: ``batch_size: Annotated[int, Ge(1)]``.

    Numbers may come as NumPy's or as text; the function gets those of Python. What goes into ``*args`` and ``**settings`` is
    its own to check. A call that does not bind is a TypeError, as ever.
    """
    signature = inspect.signature(function)
    fixed = {
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }

    @functools.cache
    def adapters() -> dict[str, TypeAdapter[Any]]:
        from pydantic import ConfigDict, TypeAdapter  # importing csqcli takes no time

        hints = get_type_hints(function, localns=_UNCHECKED, include_extras=True)
        config = ConfigDict(allow_inf_nan=False)
        return {name: TypeAdapter(hints[name], config=config) for name in hints if name in fixed}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        from pydantic import ValidationError

        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in fixed:
                try:
                    bound.arguments[name] = adapters()[name].validate_python(value)
                except ValidationError as error:
                    raise _refused(name, value, error) from None
        return function(*bound.args, **bound.kwargs)

    return call


def _refused(name: str, value: Any, error: ValidationError) -> UserError:
    wanted = dict.fromkeys(problem["msg"].removeprefix("Input ") for problem in error.errors())
    given = repr(value) if len(repr(value)) < 60 else type(value).__name__
    return UserError(f"{' or '.join(wanted)} (got {given})", where=name)
