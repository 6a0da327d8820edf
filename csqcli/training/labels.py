"""The classes of a file and of a data set, brought together."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from csqcli.data.classes import match_classes
from csqcli.data.specs import ValSplit, open_data
from csqcli.data.splits import DataSet
from csqcli.errors import UserError
from csqcli.file.manifest import Manifest
from csqcli.models.heads import IMAGENET_CLASSES, imagenet_ids, map_labels
from csqcli.recipe.schema import DataSettings


def open_held_out(
    manifest: Manifest, source: str, *, val_split: ValSplit = None, val_limit: int | None = None
) -> DataSet:
    """The validation images of a source. Where it has no such split: what the file's own training held out of it, or what
    ``val_split`` says."""
    asked = val_split if val_split is not None else _trained_with(manifest, "val_split")
    seed = _trained_with(manifest, "val_seed")
    try:
        settings = DataSettings(val_split=asked, val_seed=0 if seed is None else seed)
    except ValidationError:
        raise UserError("its recipe holds no usable data.val_split", where=manifest.model.source) from None
    return open_data(source, train=False, val_split=settings.val_split, val_seed=settings.val_seed, val_limit=val_limit)


def _trained_with(manifest: Manifest, key: str) -> Any:
    data = manifest.recipe.get("data")
    return data.get(key) if isinstance(data, dict) else None


def with_labels_of(
    manifest: Manifest, images: DataSet, *, where: str, by_position: bool = False, whole: bool = False
) -> DataSet:
    """The images with the labels that the file's model gives their classes.

    Classes are matched by name where the file holds names and ``by_position`` is not set, else by number. Data named by
    WordNet ids or ImageNet's class names is mapped into a head of ImageNet's 1000 classes. ``whole`` asks for all classes
    that the model was trained on. Raises UserError that names the file, ``where``, or the data, where they do not belong
    together.
    """
    names, count = manifest.classes, manifest.model.num_classes
    outputs = None
    if not by_position and images.classes != names and count == IMAGENET_CLASSES:
        ids = imagenet_ids()
        outputs = map_labels(images.classes, count) if names in ([], ids) else None
        names = ids if outputs is not None else names
    if outputs is None:
        if not names:
            if images.num_classes != count:
                raise _other_classes(count, images, where)
            return images
        if whole and manifest.trained_outputs is None and images.num_classes != count:
            raise _other_classes(count, images, where)
        outputs = match_classes(names, images.classes, where=images.source, by_position=by_position)
    trained = range(count) if manifest.trained_outputs is None else manifest.trained_outputs
    if whole and not set(trained) <= set(outputs):
        raise _other_classes(len(trained), images, where)
    return images.relabelled(outputs, names)


def _other_classes(trained: int, images: DataSet, where: str) -> UserError:
    what = f"the model has {trained} classes, {images.source} has {images.num_classes}"
    return UserError(what, where=where, hint="give data with the classes that it was trained on")
