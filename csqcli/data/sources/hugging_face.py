"""Parquet and Arrow files as Hugging Face `datasets` writes them: downloads from the Hub, its cache, `save_to_disk`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source
from csqcli.errors import UserError, install

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet

_SUFFIXES = (".parquet", ".arrow")


def _recognises(root: Path) -> bool:
    from csqcli.data.shards import holds_shards

    return holds_shards(root, _SUFFIXES)


@data_source(
    "hf:PATH",
    "parquet or Arrow as Hugging Face datasets writes them; PATH#COLUMN names the label",
    recognises=_recognises,
)
def hugging_face(text: str, *, train: bool) -> DataSet:
    """Images and labels of a table in files whose names or folders say the split; class names are those of its features.

    Rows are read one by one, so order and resume are exact. Needs pyarrow (``pip install 'csq[hf]'``), not `datasets`.
    """
    from csqcli.data.shards import find_shards

    name, _, label = text.partition("#")
    root = Path(name)
    found = find_shards(root, _SUFFIXES) if root.exists() else {}
    if not found:
        raise UserError("no .parquet or .arrow files", where=name)
    try:
        from csqcli.data import tables
    except ImportError:
        raise UserError("needs the package pyarrow", where=text, hint=install("hf")) from None
    wanted = {role: files for role, files in found.items() if role != "train" or train}
    return tables.data_set(wanted, root.parent if root.is_file() else root, label or None, where=text)
