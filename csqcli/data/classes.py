"""Class names stored in a file beside those of the data: the same class may have another number."""

from __future__ import annotations

from collections.abc import Sequence

from csqcli.errors import UserError, did_you_mean

_BY_POSITION = "`csq evaluate --classes-by-position` takes them by their numbers"


def match_classes(
    stored: Sequence[str], found: Sequence[str], *, where: str = "", by_position: bool = False
) -> list[int]:
    """For every class of ``found``, the index of the model's output that stands for it: ``[outputs of found classes]``.

    ``stored`` are the names of the model's outputs in order. Names in another order are mapped, and ``found`` may lack
    some. ``by_position`` takes the i-th class for the i-th output whatever the names.

    Raises UserError that names ``where`` the classes were found for a name that the model does not have, for one that stands
    twice, and by position for another number of classes.
    """
    stored, found = list(stored), list(found)
    if by_position:
        if len(stored) != len(found):
            what = f"the model has {len(stored)} classes, the data has {len(found)}"
            raise UserError(what, where=where, hint="classes match by position only where there are as many")
        return list(range(len(found)))
    if stored == found:
        return list(range(len(found)))
    for names, owner in ((stored, "the model"), (found, "the data")):
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise UserError(f"{owner} has two classes `{twice}`", where=where, hint=_BY_POSITION)
    foreign = [name for name in found if name not in stored]
    if foreign:
        more = f", nor are {len(foreign) - 1} more" if foreign[1:] else ""
        if len(stored) == len(found):
            hint = _BY_POSITION
        else:
            hint = "give data with the classes that it was trained on"
        likely = did_you_mean(foreign[0], stored)
        what = f"class `{foreign[0]}` is not one of the model's {len(stored)}{more}"
        raise UserError(what, where=where, hint=f"{likely} {hint}".strip())
    return [stored.index(name) for name in found]
