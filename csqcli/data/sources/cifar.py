"""CIFAR-10 and CIFAR-100 in the form of their python batches, as downloaded."""

from __future__ import annotations

import io
import os
import pickle
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csqcli.data.registry import data_source
from csqcli.errors import UserError
from csqcli.system.pickled import check_memo

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet, Images


@data_source("cifar10:DIR", "CIFAR-10's python batches")
def cifar10(text: str, *, train: bool) -> DataSet:
    """50,000 training and 10,000 validation images of 32×32 pixels."""
    root = _inner(Path(text), "cifar-10-batches-py")
    names = [f"data_batch_{number}" for number in range(1, 6)]
    _check_no_images("cifar10", root, names[0], text)
    splits = _batches(root, names, "labels", 10), _batches(root, ["test_batch"], "labels", 10)
    return _data_set("cifar10", root, splits, ("batches.meta", "label_names"))


@data_source("cifar100:DIR", "CIFAR-100's python batches, fine labels")
def cifar100(text: str, *, train: bool) -> DataSet:
    """50,000 training and 10,000 validation images of 32×32 pixels."""
    root = _inner(Path(text), "cifar-100-python")
    _check_no_images("cifar100", root, "train", text)
    splits = _batches(root, ["train"], "fine_labels", 100), _batches(root, ["test"], "fine_labels", 100)
    return _data_set("cifar100", root, splits, ("meta", "fine_label_names"))


def _inner(root: Path, name: str) -> Path:
    """The folder that the archive unpacks to, also where its parent was given."""
    return root / name if (root / name).is_dir() else root


def _check_no_images(kind: str, root: Path, first: str, text: str) -> None:
    """UserError for folders of images, which CIFAR comes in as well, where the ``first`` batch is not there."""
    from csqcli.data.class_folders import SUFFIXES

    files = (file.lower() for _, _, names in os.walk(root) for file in names)
    if not (root / first).is_file() and any(file.endswith(SUFFIXES) for file in files):
        hint = f"drop `{kind}:` and pass --data {shlex.quote(text)}"
        raise UserError("holds images, not CIFAR's python batches", where=text, hint=hint)


def _data_set(kind: str, root: Path, splits: tuple[Images, Images], meta: tuple[str, str]) -> DataSet:
    """``meta`` is the file of the class names and their key in it; numbers are used where the file is not there."""
    from csqcli.data.splits import DataSet

    train, val = splits
    count = int(max(train.labels.max(), val.labels.max())) + 1
    classes = [str(number) for number in range(count)]
    file, key = meta
    if (root / file).is_file():
        named = _read_pickle(root / file).get(key, classes)
        if not isinstance(named, list) or not all(isinstance(name, (str, bytes)) for name in named):
            raise UserError("no list of class names", where=str(root / file))
        classes = [name.decode("latin1") if isinstance(name, bytes) else name for name in named]
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
            images = torch.from_numpy(_integers(batch["data"], dimensions=2).astype(np.uint8)).view(-1, 3, 32, 32)
            numbers = torch.from_numpy(_integers(batch[label_key], dimensions=1).astype(np.int64))
        except (KeyError, ValueError, RuntimeError, OverflowError):
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


class _Type:
    """Takes the place of a NumPy dtype: one of the kinds of integers that images and labels come in."""

    def __init__(self, text: str, *_: Any) -> None:
        if text not in ("u1", "i1", "i2", "i4", "i8"):
            raise pickle.UnpicklingError(f"numbers of type {text[:20]}")
        self.text = text

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) < 2 or state[1] not in ("|", "<"):
            raise pickle.UnpicklingError("numbers in another order of bytes")


class _Array:
    """Takes the place of a NumPy array, which is made once its bytes are known to be there."""

    shape: tuple[int, ...] = ()
    values: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        import numpy as np

        _, shape, kind, by_columns, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # as Python 2 wrote bytes
        self.values = np.frombuffer(raw, "<" + kind.text).reshape(shape, order="F" if by_columns else "C")


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's batches are pickles; this reader builds arrays of integers and nothing else."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.left = len(data)  # bytes that may still be encoded out of texts

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return _Array
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of _reconstruct, never called itself
        if (module, name) == ("numpy", "dtype"):
            return _Type
        if (module, name) == ("_codecs", "encode"):
            return self._encoded
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def _encoded(self, text: str, code: str) -> bytes:
        self.left -= len(text)
        if code != "latin1" or self.left < 0:
            raise pickle.UnpicklingError("bytes that the file does not hold")
        return text.encode("latin1")


_DAMAGE = (  # what unpickling raises for bytes that are no pickle, or not of these objects
    *(pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, OverflowError),
)


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        check_memo(data)
        raw = _ArraysOnly(data).load()
    except OSError:
        raise UserError("no such file", where=str(path), hint="give the folder of the CIFAR python batches") from None
    except _DAMAGE as error:
        raise UserError(f"not a CIFAR python batch ({error})", where=str(path)) from None
    if not isinstance(raw, dict):
        raise UserError("not a CIFAR python batch", where=str(path))
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in raw.items()}


def _integers(value: Any, *, dimensions: int) -> Any:
    """The array, or the list of whole numbers, as a NumPy array. ValueError for anything else."""
    import numpy as np

    if isinstance(value, list) and dimensions == 1 and all(type(number) is int for number in value):
        return np.array(value, np.int64)
    if not isinstance(value, _Array) or value.values is None or value.values.ndim != dimensions:
        raise ValueError("no array of integers")
    return value.values
