"""The classes of a file and of a data set, brought together."""

from __future__ import annotations

from csqcli.data.classes import match_classes
from csqcli.data.splits import DataSet
from csqcli.errors import UserError
from csqcli.file.manifest import Manifest


def with_labels_of(
    manifest: Manifest, images: DataSet, *, where: str, by_position: bool = False, whole: bool = False
) -> DataSet:
    """The images with the labels that the file's model gives their classes.

    Classes are matched by name where the file holds names and ``by_position`` is not set, else by number. ``whole`` asks
    for all of the model's classes. Raises UserError that names the file, ``where``, or the data, where they do not belong
    together.
    """
    if (whole or not manifest.classes) and images.num_classes != manifest.model.num_classes:
        what = f"the model has {manifest.model.num_classes} classes, {images.source} has {images.num_classes}"
        raise UserError(what, where=where, hint="give data with the classes that it was trained on")
    if not manifest.classes:
        return images
    outputs = match_classes(manifest.classes, images.classes, where=images.source, by_position=by_position)
    return images.relabelled(outputs, manifest.classes)
