"""The tensors in a file of ``torch.save`` (.pth, .pt, .th, .tar), without running anything that the file names.

Two guards stand one behind the other. The calls that the pickle would make are followed before it is loaded
(`system.pickled`): torch's own rebuilding functions are let through, for tensors that lie within their storage and storages
that lie within the file; other packages' classes (``argparse.Namespace`` in timm's checkpoints, a Lightning callback, the
class of a whole pickled model) are replaced by :class:`StandIn`, which keeps their state and does nothing; and everything
else is refused. Then torch's ``weights_only`` reader loads the file.
"""

from __future__ import annotations

import pickle
import struct
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from csqcli.errors import UserError, machine_fault
from csqcli.system import pickled
from csqcli.system.limits import check_archive
from csqcli.system.pickled import Call, Container, Name

_LEGACY_PICKLES = 5  # before torch 1.6: magic number, protocol, system, the object itself, the names of its storages
_FORBIDDEN_HINT = "convert it where you trust it: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
_DAMAGE = (  # what torch.load raises for bytes that are not what they say
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError, ArithmeticError),
    *(OSError, struct.error),
)
# Names that rebuild what a state dict holds. torch's reader would also call torch.Tensor(10**12) or bytearray(10**12).
_REBUILDING = {
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "_codecs.encode",  # bytes in pickles of protocol 2
    "builtins.set",
    *(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter", "parameter_with_state")),
}
_ITEM_BYTES = {  # of the storages that torch.save writes
    f"{kind}Storage": size
    for size, kinds in {
        1: ("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"),
        2: ("Short", "Half", "BFloat16"),
        4: ("Int", "Float", "QInt32"),
        8: ("Long", "Double", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for kind in kinds
}
_OTHER_TENSORS = {  # of no use here, and not all of torch's releases check them
    f"torch._utils._rebuild_{kind}": what
    for kind, what in {
        "sparse_tensor": "a sparse tensor",
        "nested_tensor": "a nested tensor",
        "qtensor": "a quantized tensor",
        "tensor_v3": "a tensor of a newer type (8-bit floats, unsigned integers)",
        "meta_tensor_no_storage": "a tensor without memory",
    }.items()
}
_OF_STORAGE = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2")}
_HARMLESS = {  # of the standard library: settings beside the weights
    "argparse.Namespace",
    "collections.defaultdict",
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "object", "slice", "str", "tuple")),
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "functools.partial",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
}


class StandIn:
    """Takes the place of an object of a class that csq does not import. It keeps the object's state and runs nothing."""

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Entries:
    """Takes the place of a dictionary's subclass: its objects are plain dictionaries, which torch's reader can fill."""

    def __new__(cls, *args: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # the point of this class
        return OrderedDict()


def load_pickled(file: Path, *, where: str) -> Any:
    """What ``torch.save`` wrote into ``file``, tensors on the CPU, foreign objects as :class:`StandIn`.

    Raises UserError for a file that is damaged, names code, or is no such file at all.
    """
    try:
        if _is_torchscript(file):
            hint = "where you trust it: torch.save(torch.jit.load(FILE).state_dict(), 'model.pth')"
            raise UserError(
                "a TorchScript archive, which holds code; save model.state_dict() instead", where=where, hint=hint
            )
        check_archive(file)
        names = _names_in(file)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: an encrypted zip
        what = "not a readable checkpoint (damaged, or not written by torch.save)"
        raise UserError(what, where=where) from error
    for name in sorted(names & _OTHER_TENSORS.keys()):
        raise UserError(f"holds {_OTHER_TENSORS[name]}", where=where, hint="a plain state dict is expected")
    forbidden = [name for name in sorted(names) if _is_forbidden(name)]
    if forbidden:
        what = f"asks for `{forbidden[0]}`: holds pickled code, which csq never runs"
        raise UserError(what, where=where, hint=_FORBIDDEN_HINT)
    stand_ins = [_stand_in(name) for name in sorted(names - _REBUILDING) if not _is_element_type(name)]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols mean nothing to the user
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported" in str(error).lower():
            raise UserError("holds pickled code, which csq never runs", where=where, hint=_FORBIDDEN_HINT) from None
        raise UserError("not a readable checkpoint", where=where) from None
    except _DAMAGE as error:
        if machine_fault(error) is not None:
            raise
        raise UserError(f"not a readable checkpoint ({type(error).__name__})", where=where) from error


def _is_torchscript(file: Path) -> bool:
    """Whether an archive was written by ``torch.jit.save``: beside its tensors lies the code of the model."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def check_state(file: Path) -> None:
    """ValueError for a file of csq's own states that names more than tensors and plain values, or asks for more than it holds."""
    check_archive(file)
    for name in sorted(_names_in(file)):
        if name not in _REBUILDING and not _is_element_type(name):
            raise ValueError(f"names {name}")


def _names_in(file: Path) -> set[str]:
    """``module.name`` of everything that the file's pickles would import. ValueError where they ask for more than it holds."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if not pickles:
                raise ValueError("no data.pkl in the archive")
            names: set[str] = set()
            for name in pickles:
                sizes = {
                    entry.filename.removeprefix(f"{name.removesuffix('data.pkl')}data/"): entry.file_size
                    for entry in archive.infolist()
                }
                with archive.open(name) as stream:
                    bounded = pickled.Bounded(stream, archive.getinfo(name).file_size)
                    names |= _names_in_pickle(bounded, sizes.get)
            return names
    if tarfile.is_tarfile(file):
        raise ValueError("a tar archive, which torch.save has not written since 2017")
    size = (
        file.stat().st_size
    )  # its storages follow the pickles, each with its own length, which torch's reader compares
    with file.open("rb") as stream:
        bounded = pickled.Bounded(stream, size)
        return set().union(*(_names_in_pickle(bounded, None, at_most=size) for _ in range(_LEGACY_PICKLES)))


def _names_in_pickle(
    stream: pickled.Bounded, size_of: Callable[[str], int | None] | None, *, at_most: int = 0
) -> set[str]:
    """The names that one pickle would import, its calls followed. ``size_of`` gives the bytes of a storage by its key; where
    there is no telling, storages of ``at_most`` so many bytes are let through."""

    def on_storage(identity: Any) -> int:
        """("storage", type, key, device, elements[, view]) → elements."""
        values = identity.values if isinstance(identity, Container) else ()
        if len(values) < 5 or not isinstance(values[1], Name) or not isinstance(values[4], int) or values[4] < 0:
            raise ValueError("a storage that does not say what it is")
        stated = values[4] * _item_bytes(values[1].full)
        if stated > at_most if size_of is None else stated != size_of(str(values[2])):
            raise ValueError("a storage of another size than the file has for it")
        return int(values[4])

    def on_call(name: str, values: Sequence[Any]) -> None:
        if name == "_codecs.encode":
            if len(values) != 2 or values[1] != "latin1":  # other codecs lengthen what they are given
                raise ValueError("bytes in a code that pickle does not use")
        elif name in _OF_STORAGE:
            _check_view(values)

    return pickled.trace(stream, on_call=on_call, on_storage=on_storage).names


def _check_view(values: Sequence[Any]) -> None:
    """(storage, offset, size, stride, …): ValueError for a tensor that reaches beyond its storage, which would be enlarged."""
    storage, offset, size, stride = (*values, None, None, None, None)[:4]
    sizes, strides = (part.values if isinstance(part, Container) else None for part in (size, stride))
    if not isinstance(storage, Call) or not isinstance(storage.about, int) or sizes is None or strides is None:
        raise ValueError("a tensor that is not made of a storage")
    numbers = (offset, *sizes, *strides)
    if len(sizes) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor of no shape")
    last = offset + sum((count - 1) * step for count, step in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= storage.about:
        raise ValueError("a tensor larger than its storage")


def _item_bytes(name: str) -> int:
    """Of one element of ``torch.FloatStorage`` and the like. ValueError for what is no storage."""
    module, _, kind = name.rpartition(".")
    if name == "torch.storage.UntypedStorage":  # of newer types, whose tensors are refused by name
        return 1
    if module not in ("torch", "torch.cuda") or kind not in _ITEM_BYTES:
        raise ValueError("a storage of no type")
    return _ITEM_BYTES[kind]


def _is_element_type(name: str) -> bool:
    """``torch.float32`` and the like, and ``torch.FloatStorage``, by which a pickle says what a storage holds."""
    module, _, last = name.rpartition(".")
    if (
        module in ("torch", "torch.cuda")
        and last.endswith("Storage")
        and last not in ("UntypedStorage", "TypedStorage")
    ):
        return True
    return module == "torch" and isinstance(getattr(torch, last, None), (torch.dtype, torch.qscheme))


def _is_forbidden(name: str) -> bool:
    """Whether a state dict has no reason to name this: functions of Python itself, and torch's constructors of tensors, which
    would allocate whatever they are told to."""
    if name in _REBUILDING or name in _HARMLESS or _is_element_type(name):
        return False
    package, _, rest = name.partition(".")
    if package == "torch":  # torch.nn.modules.conv.Conv2d is a class of a pickled model; torch.Tensor makes a tensor
        return rest.split(".")[0] in ("Tensor", "storage", "cuda", "sparse", "_tensor", "_utils") or "." not in rest
    return package in sys.stdlib_module_names or package in ("nt", "posix")


def _stand_in(name: str) -> Any:
    """A class of the given full name that takes the place of the real one."""
    module, _, last = name.rpartition(".")
    return type(last, (_Entries if name == "collections.defaultdict" else StandIn,), {"__module__": module})
