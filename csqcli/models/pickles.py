"""The tensors in a file of ``torch.save`` (.pth, .pt, .th, .tar), without running anything that the file names.

Two guards stand one behind the other. The calls that the pickle would make are followed before it is loaded
(`system.pickled`): torch's own rebuilding functions are let through, for tensors that lie within their storage and storages
that lie within the file; other packages' classes (``argparse.Namespace`` in timm's checkpoints, a Lightning callback, the
class of a whole pickled model) are replaced by :class:`StandIn`, which keeps their state and does nothing; and everything
else is refused. Then torch's ``weights_only`` reader loads the file.
"""

from __future__ import annotations

import math
import pickle
import struct
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csqcli.errors import UserError, machine_fault
from csqcli.system import pickled
from csqcli.system.limits import check_archive
from csqcli.system.pickled import Call, Container

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
    *(
        f"torch._utils._rebuild_{kind}"
        for kind in (
            *("tensor", "tensor_v2", "parameter", "parameter_with_state"),
            *("sparse_tensor", "nested_tensor", "qtensor"),  # loaded, to be refused by name
        )
    ),
}
_OF_STORAGE = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "qtensor")}
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
        check_archive(file)
        names = _names_in(file)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: an encrypted zip
        what = "not a readable checkpoint (damaged, or not written by torch.save)"
        raise UserError(what, where=where) from error
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


def _names_in(file: Path) -> set[str]:
    """``module.name`` of everything that the file's pickles would import. ValueError where they ask for more than it holds."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if not pickles:
                raise ValueError("no data.pkl in the archive")
            names: set[str] = set()
            for name in pickles:
                with archive.open(name) as stream:
                    bounded = pickled.Bounded(stream, archive.getinfo(name).file_size)
                    names |= _names_in_pickle(bounded, file.stat().st_size)
            return names
    if tarfile.is_tarfile(file):
        raise ValueError("a tar archive, which torch.save has not written since 2017")
    with file.open("rb") as stream:
        bounded = pickled.Bounded(stream, file.stat().st_size)
        return set().union(*(_names_in_pickle(bounded, file.stat().st_size) for _ in range(_LEGACY_PICKLES)))


def _names_in_pickle(stream: pickled.Bounded, file_bytes: int) -> set[str]:
    """The names that one pickle would import, its calls followed."""

    def on_storage(identity: Any) -> int:
        """("storage", type, key, device, elements[, view]) → elements. A file cannot hold more of them than it has bytes."""
        values = identity.values if isinstance(identity, Container) else ()
        elements = values[4] if len(values) > 4 else 0
        if not isinstance(elements, int) or not 0 <= elements <= file_bytes:
            raise ValueError("a storage larger than the file")
        return elements

    def on_call(name: str, values: Sequence[Any]) -> Any:
        if name == "_codecs.encode":
            if len(values) != 2 or values[1] != "latin1":  # other codecs lengthen what they are given
                raise ValueError("bytes in a code that pickle does not use")
        elif name in _OF_STORAGE and len(values) > 3:
            _check_view(values, dense=name == "torch._utils._rebuild_qtensor")  # which makes room for it first
        return None

    return pickled.trace(stream, on_call=on_call, on_storage=on_storage).names


def _check_view(values: Sequence[Any], *, dense: bool) -> None:
    """(storage, offset, size, stride, …): ValueError for a tensor that reaches beyond its storage, which would be enlarged."""
    storage, offset, size, stride = values[:4]
    sizes, strides = (part.values if isinstance(part, Container) else () for part in (size, stride))
    numbers = (offset, *sizes, *strides)
    if not isinstance(storage, Call) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        return  # torch's reader refuses it, or it comes out of a call of its own (torch.Size)
    last = offset + sum((count - 1) * step for count, step in zip(sizes, strides, strict=False))
    elements = storage.about if isinstance(storage.about, int) else 0
    if 0 not in sizes and (last >= elements or (dense and math.prod(sizes) > elements)):
        raise ValueError("a tensor larger than its storage")


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
