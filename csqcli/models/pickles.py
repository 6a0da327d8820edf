"""The tensors in a file of ``torch.save`` (.pth, .pt, .th, .tar), without running anything that the file names.

Two guards stand one behind the other. The names that the pickle would call are listed before it is loaded: torch's own
rebuilding functions are let through, other packages' classes (``argparse.Namespace`` in timm's checkpoints, a Lightning
callback, the class of a whole pickled model) are replaced by :class:`StandIn`, which keeps their state and does nothing,
and everything else is refused. Then torch's ``weights_only`` reader loads the file.
"""

from __future__ import annotations

import pickle
import pickletools
import sys
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # names of Python 2, which protocol 2 writes
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch

from csqcli.errors import UserError
from csqcli.system.limits import check_archive

_LEGACY_PICKLES = 4  # before torch 1.6: magic number, protocol, system, then the object itself
_FORBIDDEN_HINT = "convert it where you trust it: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
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
    except (OSError, ValueError, EOFError, IndexError, zipfile.BadZipFile):
        what = "not a readable checkpoint (damaged, or not written by torch.save)"
        raise UserError(what, where=where) from None
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
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises many kinds for damaged files; all mean the same to the user
        raise UserError(f"not a readable checkpoint ({type(error).__name__})", where=where) from None


def _names_in(file: Path) -> set[str]:
    """``module.name`` of everything that the file's pickles would import."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if not pickles:
                raise ValueError("no data.pkl in the archive")
            names: set[str] = set()
            for name in pickles:
                with archive.open(name) as stream:
                    names |= _names_in_pickle(stream)
            return names
    if tarfile.is_tarfile(file):
        raise ValueError("a tar archive, which torch.save has not written since 2017")
    with file.open("rb") as stream:
        return set().union(*(_names_in_pickle(stream) for _ in range(_LEGACY_PICKLES)))


def _names_in_pickle(stream: IO[bytes]) -> set[str]:
    """The names that the GLOBAL opcodes of one pickle hold, as of Python 3. Protocols above 2, which torch.save does not
    write, have other opcodes for them; torch's reader refuses those."""
    names = set()
    for opcode, value, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            module, _, name = str(value).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
    return names


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
