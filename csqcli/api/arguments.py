"""What functions of the Python API take alike: ranges of arguments, settings beside them, and how progress is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le

if TYPE_CHECKING:
    from csqcli.system.progress import Display

Report = dict[str, Any]
Positive: TypeAlias = Annotated[int, Ge(1)]
Pixels: TypeAlias = Annotated[int, Ge(1), Le(4096)]  # a side of an image
Processes: TypeAlias = Annotated[int, Ge(0), Le(1024)]
# a share of the training images, or the test split
HeldOut: TypeAlias = Annotated[float, Gt(0), Le(1)] | Literal["test"]


def together(named: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the dotted key that they set, and the further settings, as overrides. UserError where both give one of them,
    with two values."""
    from csqcli.recipe.keys import merged

    called = {"model.source": "model", "data.source": "data"}

    def as_argument(key: str, value: Any) -> str:
        said = f"{value:g}" if isinstance(value, float) else repr(value)
        return f"{called.get(key, key.rpartition('.')[2])}={said}"

    return merged(named, settings, as_named=as_argument, as_setting=lambda key, value: f"{key}={value!r}")


def display_of(progress: bool | Display) -> Display:
    """Where progress is shown: the display given, or one on stderr that says nothing unless ``progress``."""
    from csqcli.system.launcher import is_main_process
    from csqcli.system.progress import Display

    if isinstance(progress, Display):
        return progress
    return Display(quiet=not progress or not is_main_process())
