"""Images to verify an export on, preprocessed as the file says."""

from __future__ import annotations

from csqcli.data.loaders import Loader, LoaderSettings, make_loader
from csqcli.data.specs import ValSplit
from csqcli.file.io import QuantizedFile
from csqcli.training.labels import open_held_out, with_labels_of

_BATCH = 32


def loader(
    file: QuantizedFile,
    source: str,
    val_limit: int | None,
    *,
    workers: int,
    labelled: bool = True,
    val_split: ValSplit = None,
) -> Loader:
    """Batches of validation images. UserError where they are ``labelled`` and have other classes than the file's model."""
    images = open_held_out(file.manifest, source, val_split=val_split, val_limit=val_limit)
    if labelled:
        images = with_labels_of(file.manifest, images, where=file.manifest.model.source)
    settings = LoaderSettings(training=False, batch_size=_BATCH, workers=workers)
    return make_loader(images.val, file.manifest.data_config, settings)
