"""The registry of data sources.

A source is one function that turns the text after the colon into a :class:`~csqcli.data.splits.DataSet`::

    @data_source("pets:DIR", "the Oxford-IIIT pets, as downloaded")
    def pets(text: str, *, train: bool) -> DataSet: ...

``train`` is False where only the validation split is needed; a source may read it all the same. With ``recognises`` a source
is found by a bare path as well: it says of an existing file or folder whether that is its kind of data. A function from outside the
package needs no decorator: ``--data package.module:function:text`` names it. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet


@dataclass(frozen=True)
class DataSource:
    """One kind of data: how it is spelled, what it is, and the function that opens it."""

    spelling: str  # "cifar10:DIR"; just "digits" where nothing follows
    help: str  # one line without a full stop
    open: Callable[..., DataSet]
    recognises: Callable[[Path], bool] | None = None  # whether a bare path is its kind of data

    @property
    def name(self) -> str:
        return self.spelling.partition(":")[0]

    @property
    def takes_text(self) -> bool:
        return ":" in self.spelling


SOURCES: dict[str, DataSource] = {}


def data_source(
    spelling: str, help: str, *, recognises: Callable[[Path], bool] | None = None
) -> Callable[[Callable[..., DataSet]], Callable[..., DataSet]]:
    """Register a function ``(text, *, train) -> DataSet`` under a spelling such as ``"cifar10:DIR"``.

    ``text`` is what the user typed after the colon (empty where the spelling has none), or the bare path that ``recognises``
    took. ``help`` is one line that ``csq search --help`` shows. Raises ValueError for a name that is taken.
    """

    def register(function: Callable[..., DataSet]) -> Callable[..., DataSet]:
        source = DataSource(spelling, help, function, recognises)
        if source.name in SOURCES:
            raise ValueError(f"there is a data source `{source.name}` already")
        SOURCES[source.name] = source
        return function

    return register
