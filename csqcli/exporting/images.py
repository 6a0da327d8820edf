"""Images to verify an export on, preprocessed as the file says."""

from __future__ import annotations

from csqcli.data import loaders
from csqcli.data.loaders import Loader, LoaderSettings
from csqcli.errors import UserError
from csqcli.file.io import QuantizedFile

_BATCH = 32


def loader(file: QuantizedFile, source: str, val_limit: int | None, *, workers: int, labelled: bool = True) -> Loader:
    """Batches of validation images. UserError where they are ``labelled`` and have other classes than the file's model."""
    images = loaders.open_data(source, train=False, val_limit=val_limit)
    classes = file.manifest.model.num_classes
    if labelled and images.num_classes != classes:
        raise UserError(f"the model has {classes} classes, the data has {images.num_classes}", where=source)
    settings = LoaderSettings(training=False, batch_size=_BATCH, workers=workers)
    return loaders.make_loader(images.val, file.manifest.data_config, settings)
