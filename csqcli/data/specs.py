"""What ``--data`` takes: from a spec such as ``cifar10:DIR`` to a data set.

A spec names a registered source (`csqcli.data.registry`), a path that one of them recognises, a folder, or a function from
outside the package: ``package.module:function`` or ``package.module:function:text``. Importing this module does not import
torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from csqcli.data import sources
from csqcli.data.registry import SOURCES, DataSource
from csqcli.errors import UserError, did_you_mean
from csqcli.system.limits import is_safe_text
from csqcli.system.plugins import import_function

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet

WORKERS = 2  # processes that load images for a measurement, where nobody says how many
ValSplit = float | Literal["test"] | None  # what stands in for a validation split that the data do not have
log = logging.getLogger(__name__)
_OUTSIDE = re.compile(r"(?P<name>[A-Za-z_][\w.]*:[A-Za-z_]\w*)(?::(?P<text>.*))?", re.DOTALL)


def known_sources() -> list[DataSource]:
    """All registered sources, by name."""
    for module in pkgutil.iter_modules(sources.__path__):
        importlib.import_module(f"{sources.__name__}.{module.name}")
    return [SOURCES[name] for name in sorted(SOURCES)]


def help_text() -> str:
    """What ``--data`` takes, each source with its help line, for ``--help``."""
    listed = [f"{source.spelling} ({source.help})" for source in _usual_first()]
    return f"{', '.join(listed)}, or package.module:function[:TEXT] of your own. A bare path is told by what it holds."


def hint() -> str:
    """The same in short, for error messages: ``--data takes folder:DIR, cifar10:DIR, … or package.module:function``."""
    listed = [source.spelling for source in _usual_first()]
    return f"--data takes {', '.join(listed)} or package.module:function"


def _usual_first() -> list[DataSource]:
    return sorted(known_sources(), key=lambda source: source.name != "folder")


def open_data(
    source: str,
    *,
    train: bool = True,
    val_split: ValSplit = None,
    val_seed: int = 0,
    train_limit: int | None = None,
    val_limit: int | None = None,
) -> DataSet:
    """The data set of a spec, at most so many images of each split.

    ``train`` False leaves the training split out. ``val_split`` is for data without a validation split: a share of every
    class of the training images, chosen by ``val_seed`` and then no longer among them, or ``"test"`` for the test split.

    Raises UserError for an unknown source, a missing split, no images, class names that cannot be stored, or classes that
    differ between the splits.
    """
    if not is_safe_text(source):
        raise UserError("holds control characters or bytes that are not UTF-8", where=source, hint="rename the folder")
    opener, text = _find(source)
    data = opener(text, train=train)
    if val_split not in (None, "test") and not train and isinstance(data, _data_set_class()) and not len(data.val):
        data = opener(text, train=True)
    _check(data, source, train=train)
    if val_split is not None:
        data = _with_validation(data, source, val_split, seed=val_seed, train=train)
        _check(data, source, train=train)
    if not len(data.val):
        also = ", or --val-split test takes its test split" if data.test is not None else ""
        some = "--val-split 0.1 holds out a tenth of the training images"
        if not train:
            some += ", --val-split 1 takes them all"
        raise UserError("no validation split", where=source, hint=some + also)
    if train and data.train is not None and not len(data.train):
        raise UserError("no image is left to train on", where=f"--val-split {val_split}", hint="hold out less")
    kept = data.train.limited(train_limit) if data.train is not None and train else None
    return replace(data, train=kept, val=data.val.limited(val_limit))


def same_place(source: str, *, absolute: Callable[[str], str] = os.path.realpath) -> str:
    """A spec with its path made absolute, where it names one that exists: ``data`` and ``./data`` are the same place."""
    name, colon, text = source.partition(":")
    if os.path.exists(source):
        return absolute(source)
    return f"{name}:{absolute(text)}" if colon and os.path.exists(text) else source


def _with_validation(data: DataSet, source: str, val_split: ValSplit, *, seed: int, train: bool) -> DataSet:
    """The data set with a validation split, where it has none of its own."""
    if len(data.val):
        log.warning("%s: has a validation split of its own; val_split %s is for data without one", source, val_split)
        return data
    if val_split == "test":
        if data.test is None:
            share = "0.1 holds out a tenth of the training images" if train else "1 takes all images"
            hint = f"--val-split {share}"
            raise UserError("no test split with the classes of the training images", where=source, hint=hint)
        lacking = set(range(len(data.classes))) - set(data.test.labels.tolist())
        if train and lacking:
            hint = "add some, or remove the class from the training images"
            raise UserError(f"class `{data.classes[min(lacking)]}` has no test images", where=source, hint=hint)
        return replace(data, val=data.test, test=None)
    if data.train is None or not isinstance(val_split, (int, float)):
        raise UserError("no training split to hold images out of", where=source)
    stays, held_out = data.train.held_out(val_split, seed=seed)
    if not len(held_out):
        raise UserError("no class has a second image to hold out", where=source)
    return replace(data, train=stays, val=held_out)


def _find(source: str) -> tuple[Callable[..., DataSet], str]:
    """The function that opens a spec, and the text that it is given."""
    name, colon, text = source.partition(":")
    known = {entry.name: entry for entry in known_sources()}
    if name in known and known[name].takes_text == bool(text):
        return known[name].open, text
    path = Path(source)
    if path.exists():
        recognised = [entry for entry in known.values() if entry.recognises is not None and entry.recognises(path)]
        if recognised:
            return recognised[0].open, source
        if path.is_dir():
            return known["folder"].open, source
        raise UserError("not a kind of data that csq reads", where=source, hint=hint())
    likely = did_you_mean(name, known)
    if not colon and not likely:
        raise UserError("no such file or folder", where=source, hint=hint())
    if name in known:
        follows = "a text after" if known[name].takes_text else "no text after"
        raise UserError(f"`{name}` takes {follows} its name", where=source, hint=f"write {known[name].spelling}")
    outside = _OUTSIDE.fullmatch(source)
    if outside is None:
        raise UserError("no such file, folder or data source", where=source, hint=likely or hint())
    try:
        return import_function(outside["name"], where=source), outside["text"] or ""
    except UserError:
        if likely:
            raise UserError("no such file, folder or data source", where=source, hint=likely) from None
        raise


def _data_set_class() -> type[DataSet]:
    from csqcli.data.splits import DataSet

    return DataSet


def _check(data: DataSet, source: str, *, train: bool) -> None:
    """What every source must deliver, outside ones included."""
    if not isinstance(data, _data_set_class()):
        raise UserError(
            f"the data source returned {type(data).__name__}, not a csqcli.data.splits.DataSet", where=source
        )
    for name in data.classes:
        if not is_safe_text(name):
            what = f"class {name!r} holds control characters or bytes that are not UTF-8"
            raise UserError(what, where=source, hint="rename it")
    if train and data.train is None:
        raise UserError("no training split", where=source, hint="give data with images for training")
    for split, images in (("validation", data.val), ("training", data.train if train else None)):
        if (
            images is not None
            and len(images)
            and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(data.classes)
        ):
            raise UserError(f"a {split} label is outside 0 to {len(data.classes) - 1}", where=source)
