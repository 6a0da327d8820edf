"""Images in folders named by their class, wherever the folders stand: on the disk, in an archive."""

from __future__ import annotations

import logging
import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from csqcli.data.splits import NO_IMAGES, DataSet, Images, Reader
from csqcli.errors import UserError

log = logging.getLogger(__name__)

Role = Literal["train", "val", "test"]
_WORDS: dict[Role, frozenset[str]] = {  # how people call a split
    "train": frozenset(("train", "training", "trn")),
    "val": frozenset(("val", "valid", "validation", "validate", "dev", "eval")),
    "test": frozenset(("test", "testing", "tst")),
}
_FILLERS = frozenset(("data", "image", "images", "img", "imgs", "set", "split"))  # train_images, val2017, test-set
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LITTER = {"thumbs.db", "desktop.ini"}  # of file managers; hidden files likewise are nobody's images
_NAMES = "train/ and one of val/, valid/, validation/, dev/"


class Tree(Protocol):
    """Folders and files below one root. Paths are relative to it, with slashes; the root itself is ``""``."""

    root: str  # what stands before a path where images are named

    @property
    def reader(self) -> Reader | None:
        """Of images that are no files."""
        ...

    def folders(self, path: str) -> list[str]:
        """Names of the folders in one, sorted."""
        ...

    def files(self, path: str) -> Iterable[str]:
        """Paths of all files below a folder: folder after folder in sorted order, sorted in each."""
        ...


@dataclass
class _Split:
    """What the class folders of one split hold."""

    path: str
    images: dict[str, list[str]] = field(default_factory=dict)  # class -> paths, sorted
    empty: list[str] = field(default_factory=list)  # class folders without an image
    others: list[str] = field(default_factory=list)  # files that are no images by their names
    hidden: int = 0  # images whose names begin with a dot


def role_of(name: str, *, strict: bool = True) -> Role | None:
    """The split that a folder's name stands for. Not ``strict``: one of its words does, as in ``beans-train-00000``."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    roles = {role for role, known in _WORDS.items() for word in words if word in known}
    if len(roles) != 1:
        return None
    (role,) = roles
    return role if not strict or all(word in _WORDS[role] or word in _FILLERS for word in words) else None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is some program's own: ``.ipynb_checkpoints``, ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def data_set(tree: Tree, where: str, *, train: bool) -> DataSet:
    """The images below ``train/CLASS/`` and ``val/CLASS/`` in any usual spelling, classes in sorted order.

    Class folders that stand in no split are training images, and a folder that holds nothing but another is looked through.
    Hidden folders and folders without images are no classes; below a class, folders called like splits are an error. Files
    that are no images by their names are counted and named in one line of the log. Without ``train`` only the validation
    split, and a test split where there is none, are listed.
    """
    base = _base(tree)
    places = _places(tree, base, where)
    val = _listed(tree, places["val"]) if "val" in places else None
    training = None
    if train:
        if not places:
            training = _listed(tree, base)
        elif "train" not in places:
            raise UserError("no training split", where=where, hint=f"expected {_NAMES}")
        else:
            training = _listed(tree, places["train"])
    if training is not None and val is not None:
        _check_same_classes(tree, training, val, where)
    known = training or val
    test = _test(tree, places["test"], known) if "test" in places and val is None else None
    shown = [split for split in (training, val, test) if split is not None]
    classes = list(shown[0].images) if shown else []
    if train and len(classes) == 1:
        hint = _table_hint(tree, base) or "a classifier needs two or more folders of images, one per class"
        raise UserError(f"one class only ({classes[0]})", where=_named(tree, shown[0].path), hint=hint)
    _tell(tree, shown)
    return DataSet(
        where,
        classes,
        _images(tree, val, classes) if val is not None else NO_IMAGES,
        _images(tree, training, classes) if training is not None else None,
        _images(tree, test, classes) if test is not None else None,
    )


def _base(tree: Tree) -> str:
    """The root, or the folder that it holds alone: archives often have one around everything."""
    base = ""
    while True:
        inner = [name for name in tree.folders(base) if not is_hidden(name)]
        if len(inner) != 1 or role_of(inner[0]) is not None or not tree.folders(posixpath.join(base, inner[0])):
            return base
        base = posixpath.join(base, inner[0])


def _places(tree: Tree, base: str, where: str) -> dict[Role, str]:
    """Which folder holds which split. UserError where two say they are the same one."""
    found: dict[Role, str] = {}
    for name in tree.folders(base):
        role = role_of(name)
        if role is None:
            continue
        if role in found:
            what = f"{posixpath.basename(found[role])}/ and {name}/ are both called like the {_KINDS[role]} split"
            raise UserError(what, where=where, hint="rename or move one of them")
        found[role] = posixpath.join(base, name)
    return found


_KINDS: dict[Role, str] = {"train": "training", "val": "validation", "test": "test"}


def _test(tree: Tree, path: str, known: _Split | None) -> _Split | None:
    """The test split, where it has class folders and no class that training lacks; those of competitions have neither."""
    try:
        split = _listed(tree, path)
    except UserError:
        return None
    return split if known is None or split.images.keys() <= known.images.keys() else None


def _listed(tree: Tree, path: str) -> _Split:
    """All images of a split. Raises UserError where there are no class folders or no images in them."""
    names = [name for name in tree.folders(path) if not is_hidden(name)]
    if not names:
        hint = _table_hint(tree, path) or "expected one folder of images per class"
        raise UserError("no class folders", where=_named(tree, path), hint=hint)
    split = _Split(path)
    for name in names:
        below = posixpath.join(path, name)
        images, inside = [], ""
        for file in tree.files(below):
            folder, base = posixpath.split(file)
            if folder != inside:
                inside, inner = folder, folder[len(below) + 1 :].split("/")
                skipped = any(map(is_hidden, inner))  # .ipynb_checkpoints holds second copies
                splits = [place for place, part in enumerate(inner) if role_of(part) is not None]
            if skipped:
                continue
            is_image = base.lower().endswith(SUFFIXES)
            if is_image and not is_hidden(base):
                if splits:
                    raise _split_in_a_class(tree, below, inner, splits[0])
                images.append(file)
            elif is_hidden(base):
                split.hidden += is_image and not base.startswith("._")  # of which macOS leaves one beside every file
            elif base.lower() not in _LITTER:
                split.others.append(file)
        if images:
            split.images[name] = images
        else:
            split.empty.append(name)
    if not split.images:
        others = _others(tree, split.others)
        raise UserError("no images", where=_named(tree, path), hint=f"looked for {', '.join(SUFFIXES)}{others}")
    return split


def _split_in_a_class(tree: Tree, below: str, inner: Sequence[str], place: int) -> UserError:
    """For a class folder ``below`` with images in a folder of it, ``inner``, of which the part at ``place`` is called like a split.

    Read as a class, it would mix training and test images. It is a data set of its own where class folders follow, and else
    the splits of this class.
    """
    split, name = inner[place], posixpath.basename(below)
    what = f"class folder {name}/ holds {'/'.join(inner[: place + 1])}/, which is called like a split: its images would be mixed in"
    data_set = _named(tree, posixpath.join(below, *inner[:place]))
    if place + 1 == len(inner):
        hint = f"move its images to {split}/{name}/, or give a CSV of path,label,split; or rename {split}/ if it is no split"
    elif tree.reader is None:
        hint = f"for the data set in it pass --data {shlex.quote(data_set)}"
    else:
        hint = "pack the folders of one data set alone"
    return UserError(what, where=_named(tree, posixpath.dirname(below)), hint=hint)


def _table_hint(tree: Tree, base: str) -> str:
    """What to pass where images are not in class folders and a CSV lies beside them; empty where none does."""
    tables = [path.lstrip("/") for path in tree.files(base) if path.lower().endswith(".csv")]
    if not tables or tree.reader is not None:
        return ""
    file = shlex.quote(_named(tree, min(tables, key=lambda path: path.count("/"))))
    return f"where a CSV names the images and their classes, pass it: --data {file}"


def _check_same_classes(tree: Tree, training: _Split, val: _Split, where: str) -> None:
    """A class with images in one split only is an error, also where the other split has an empty folder for it."""
    for split, other, kind in ((training, val, "training"), (val, training, "validation")):
        lacking = [name for name in split.empty if name in other.images]
        if lacking:
            target = _named(tree, posixpath.join(split.path, lacking[0]))
            hint = f"add some to {target}, or remove the class from {_named(tree, other.path)}"
            raise UserError(f"class `{lacking[0]}` has no {kind} images", where=where, hint=hint)
    if training.images.keys() != val.images.keys():
        odd = sorted(training.images.keys() ^ val.images.keys())
        names = [posixpath.basename(split.path) for split in (training, val)]
        raise UserError(
            f"{names[0]}/ has {len(training.images)} classes, {names[1]}/ has {len(val.images)} "
            f"(first that differs: {odd[0]})",
            where=where,
        )


def _images(tree: Tree, split: _Split, classes: Sequence[str]) -> Images:
    labels = [classes.index(name) for name, paths in split.images.items() for _ in paths]
    paths = [tree.root + path for paths in split.images.values() for path in paths]
    return Images(torch.tensor(labels), paths=paths, root=tree.root, reader=tree.reader)


def _named(tree: Tree, path: str) -> str:
    return (tree.root + path).rstrip("/")


def _tell(tree: Tree, splits: list[_Split]) -> None:
    """Say once what was passed over."""
    empty = [posixpath.join(split.path, name) for split in splits for name in split.empty]
    if empty:
        first = _named(tree, empty[0])
        log.warning(
            "%s and %s (first: %s)",
            f"{len(empty)} folders hold no images" if len(empty) > 1 else "1 folder holds no images",
            "are no classes" if len(empty) > 1 else "is no class",
            first,
        )
    hidden = sum(split.hidden for split in splits)
    if hidden:
        log.warning("%d hidden image%s passed over (the name begins with a dot)", hidden, "s" if hidden > 1 else "")
    others = [path for split in splits for path in split.others]
    if others:
        log.warning("%d file%s passed over%s", len(others), "s" if others[1:] else "", _others(tree, others))


def _others(tree: Tree, files: list[str]) -> str:
    """``: 3 .heic, 1 .txt (first: …)`` for files that are no images by their names; empty where there are none."""
    if not files:
        return ""
    kinds = Counter(posixpath.splitext(path)[1].lower() or "without suffix" for path in files).most_common(4)
    return f": {', '.join(f'{count} {kind}' for kind, count in kinds)} (first: {_named(tree, files[0])})"
