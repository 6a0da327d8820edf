"""Weights that somebody else saved: a state dict out of .safetensors, .pth, .pt, .th or .tar, and into a model.

Files are read as data only: nothing in them is ever run.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.system.limits import check_archive

_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "ema",
)  # keys that wrap a state dict, preferred first
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile


def read_checkpoint(path: str) -> tuple[dict[str, Tensor], str, str]:
    """(state dict, sha-256 of the file, its name). Wrappers and prefixes are taken off; nothing is ever unpickled freely.

    ``builtin:NAME`` reads a checkpoint that ships with csq.
    """
    if path.startswith("builtin:"):
        file = Path(str(resources.files("csqcli") / "assets" / f"{path.removeprefix('builtin:')}.safetensors"))
    else:
        file = Path(path)
    if not file.is_file():
        raise UserError("no such checkpoint", where=path, hint="give a .safetensors, .pth, .pt, .th or .tar file")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if file.suffix == ".safetensors":
        from csqcli.file import header, io

        try:  # a quantized csq file is a fine checkpoint too
            quantized = header.is_quantized(file)
            state: Any = io.read(file).state_dict() if quantized else load_file(file)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"not a readable safetensors file ({error})", where=path) from None
    else:
        state = _unpickle_tensors(file, path)
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    tensors = {}
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor):
            name = str(name)
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            tensors[name] = value
    if not tensors:
        raise UserError("holds no tensors", where=path, hint="a state dict is expected")
    for name, value in tensors.items():
        try:
            _check_tensor(value)
        except ValueError as error:
            raise UserError(f"tensor `{name}` is {error}", where=path, hint="a plain state dict is expected") from None
        if is_damaged(value.float()):
            raise UserError(f"tensor `{name}` holds NaN or infinite values", where=path, hint="use another checkpoint")
    return tensors, digest, path if path.startswith("builtin:") else file.name


def _check_tensor(value: Tensor) -> None:
    """A plain dense tensor whose elements are all there."""
    if value.is_nested:  # whose layout is strided, and whose shape cannot be asked for
        raise ValueError("a nested tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
        raise ValueError(f"a {value.dtype} tensor of layout {value.layout} on {value.device}")
    if value.is_floating_point() and value.dtype.itemsize < 2:
        raise ValueError(f"a tensor of type {value.dtype}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"shape {list(value.shape)} on {value.untyped_storage().nbytes():,} bytes")


def is_damaged(value: Tensor) -> bool:
    """NaN, or infinite among finite values. A bound that is infinite throughout (clipping that is off) is neither."""
    if not value.is_floating_point() or bool(torch.isfinite(value).all()):
        return False
    return not bool(torch.isinf(value).all())


def _unpickle_tensors(file: Path, path: str) -> Any:
    try:
        check_archive(file)
        with warnings.catch_warnings():  # torch's remarks on pickle protocols mean nothing to the user
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower() or "unsupported class" in str(error).lower():
            raise UserError(
                "holds pickled code, which csq never runs",
                where=path,
                hint="convert it where you trust it: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
            ) from None
        raise UserError("not a readable checkpoint", where=path) from None
    except Exception as error:  # torch.load raises many kinds for damaged files; all mean the same to the user
        raise UserError(f"not a readable checkpoint ({type(error).__name__})", where=path) from None


def fit_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str,
    num_classes: int | None = None,
    num_classes_from: str = "the data",
) -> None:
    """Load ``state`` strictly, or say in one line what does not fit."""
    wanted = model.state_dict()
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state and name not in optional]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        parts = [f"{len(missing)} missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(unexpected)} unexpected (first: {unexpected[0]})"] if unexpected else []
        raise UserError(
            f"keys differ from the model's: {', '.join(parts)}", where=where, hint="is it this architecture?"
        )
    for name, value in state.items():
        if tuple(value.shape) != tuple(wanted[name].shape):
            if num_classes is not None and value.dim() and wanted[name].shape[:1] == (num_classes,):
                raise UserError(
                    f"the checkpoint has {value.shape[0]} classes, {num_classes_from} has {num_classes} (tensor {name})",
                    where=where,
                    hint="use data and checkpoint that agree",
                )
            shapes = f"{list(value.shape)} in the checkpoint, {list(wanted[name].shape)} in the model"
            raise UserError(f"tensor {name} is {shapes}", where=where, hint="is it this architecture?")
    complete = OrderedDict(wanted | dict(state))
    complete._metadata = getattr(wanted, "_metadata", {})  # type: ignore[attr-defined]  # versions: mnasnet asks for its own
    model.load_state_dict(complete)
