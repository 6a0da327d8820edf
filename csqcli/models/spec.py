"""What a user typed for a model, as a library and a name: ``"resnet18"``, ``"timm:…"``, ``"torchvision:…"``, ``"csq:…"`` or
``"package.module:factory"``.

Importing this module imports neither torch nor a model library. :func:`parse` and :func:`known_names` import the libraries
whose names they have to look up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csqcli.errors import UserError, did_you_mean

LIBRARIES = ("csq", "timm", "torchvision")  # in the order in which a name without a library is looked up


@dataclass(frozen=True)
class ModelSpec:
    """Enough to build an architecture again: the library, the name in it, and the constructor's keyword arguments."""

    library: str  # "timm" | "torchvision" | "csq" | "factory"
    name: str  # the library's name, or "package.module:factory"
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The spec as one types it, without arguments: ``timm:resnet18`` or ``package.module:factory``."""
        return self.name if self.library == "factory" else f"{self.library}:{self.name}"


def parse(source: str, arguments: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec for what a user typed; ``arguments`` go to the model's constructor.

    Raises UserError for a name that no library has, with the nearest ones.
    """
    kwargs = dict(arguments or {})
    library, colon, name = source.partition(":")
    if colon and library in LIBRARIES:
        known = known_names(library)
        if name.partition(".")[0] not in known:
            raise UserError(f"no model `{name}` in {library}", where=source, hint=did_you_mean(name, known))
        return ModelSpec(library, name, kwargs)
    if colon:
        if not library or not name:
            raise UserError("not a model", where=source, hint="write package.module:factory")
        return ModelSpec("factory", f"{_module_of(library, name)}:{name}", kwargs)
    known_everywhere: list[str] = []
    for library in LIBRARIES:
        known = known_names(library)
        if source.partition(".")[0] in known:
            return ModelSpec(library, source, kwargs)
        known_everywhere += known
    hint = did_you_mean(source, known_everywhere) or "give a timm or torchvision name, or package.module:factory"
    module, _, factory = source.rpartition(".")
    if module and Path(f"{module.replace('.', '/')}.py").is_file():
        hint = f"did you mean `{module}:{factory}`?"
    if Path(source).exists():
        hint = "this is a path: give a model's name, and weights by --checkpoint; `csq report` describes a csq file"
    raise UserError("unknown model", where=source, hint=hint)


def _module_of(typed: str, factory: str) -> str:
    """The module of a factory that may have been typed as a file: ``./nets/mine.py`` is ``nets.mine``.

    Raises UserError for a file that no import from the working directory reaches: a csq file could not name it.
    """
    path = Path(typed)
    if path.suffix != ".py":
        return typed
    module = path.with_suffix("")
    if not path.is_absolute() and all(part.isidentifier() for part in module.parts):
        return ".".join(module.parts)
    what = "csq imports factories by module, from the working directory or the Python path"
    raise UserError(what, where=f"{typed}:{factory}", hint=f"run csq beside it and write {module.name}:{factory}")


def known_names(library: str) -> list[str]:
    """The names of all models of a library of :data:`LIBRARIES`; imports it."""
    if library == "csq":
        from csqcli.models.networks import REGISTRY

        return list(REGISTRY)
    if library == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models()
