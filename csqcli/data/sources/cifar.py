"""CIFAR-10 and CIFAR-100 in the form of their python batches, as downloaded."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csqcli.data.registry import data_source
from csqcli.errors import UserError

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet, Images


@data_source("cifar10:DIR", "CIFAR-10's python batches")
def cifar10(text: str, *, train: bool) -> DataSet:
    """50,000 training and 10,000 validation images of 32×32 pixels."""
    root = _inner(Path(text), "cifar-10-batches-py")
    names = [f"data_batch_{number}" for number in range(1, 6)]
    splits = _batches(root, names, "labels", 10), _batches(root, ["test_batch"], "labels", 10)
    return _data_set("cifar10", root, splits, ("batches.meta", "label_names"))


@data_source("cifar100:DIR", "CIFAR-100's python batches, fine labels")
def cifar100(text: str, *, train: bool) -> DataSet:
    """50,000 training and 10,000 validation images of 32×32 pixels."""
    root = _inner(Path(text), "cifar-100-python")
    splits = _batches(root, ["train"], "fine_labels", 100), _batches(root, ["test"], "fine_labels", 100)
    return _data_set("cifar100", root, splits, ("meta", "fine_label_names"))


def _inner(root: Path, name: str) -> Path:
    """The folder that the archive unpacks to, also where its parent was given."""
    return root / name if (root / name).is_dir() else root


def _data_set(kind: str, root: Path, splits: tuple[Images, Images], meta: tuple[str, str]) -> DataSet:
    """``meta`` is the file of the class names and their key in it; numbers are used where the file is not there."""
    from csqcli.data.splits import DataSet

    train, val = splits
    count = int(max(train.labels.max(), val.labels.max())) + 1
    classes = [str(number) for number in range(count)]
    file, key = meta
    if (root / file).is_file():
        classes = [str(name) for name in _read_pickle(root / file).get(key, classes)]
        if len(classes) < count:
            raise UserError(f"{len(classes)} class names for {count} classes", where=str(root / file))
    return DataSet(f"{kind}:{root}", classes, val, train)


def _batches(root: Path, names: list[str], label_key: str, num_classes: int) -> Images:
    import numpy as np
    import torch

    from csqcli.data.splits import Images

    pixels, labels = [], []
    for name in names:
        batch = _read_pickle(root / name)
        try:
            images = torch.from_numpy(np.array(batch["data"], dtype=np.uint8)).view(-1, 3, 32, 32)
            numbers = torch.tensor(batch[label_key], dtype=torch.long)
        except (KeyError, ValueError, RuntimeError, TypeError, OverflowError):
            raise UserError("not a CIFAR python batch", where=str(root / name)) from None
        if numbers.shape != images.shape[:1]:
            raise UserError(f"{numbers.numel()} labels for {len(images)} images", where=str(root / name))
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_classes:
            raise UserError(f"a label is outside 0 to {num_classes - 1}", where=str(root / name))
        pixels.append(images)
        labels.append(numbers)
    if not sum(map(len, labels)):
        raise UserError("no images", where=str(root / names[0]))
    return Images(torch.cat(labels), pixels=torch.cat(pixels))


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's batches are pickles; this reader builds NumPy arrays and nothing else."""

    allowed = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        if name == "_reconstruct":
            import numpy as np

            return np.empty(0).__reduce__()[0]  # its module's name differs between NumPy 1 and 2
        return super().find_class(module, name)


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        raw = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except OSError:
        raise UserError("no such file", where=str(path), hint="give the folder of the CIFAR python batches") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"not a CIFAR python batch ({error})", where=str(path)) from None
    if not isinstance(raw, dict):
        raise UserError("not a CIFAR python batch", where=str(path))
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in raw.items()}
