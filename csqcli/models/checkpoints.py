"""Weights that somebody else saved: out of .safetensors (whole or in shards), .pth, .pt, .th or .tar, and into a model.

Files are read as data only: nothing in them is ever run. Wherever the weights lie in a file (``{"state_dict": …}``,
``{"net": …}``, EMA beside raw ones) and whatever their names begin with (``module.``, ``model.``, ``backbone.``,
``_orig_mod.``), one rule finds them: the place and the common prefix under which all of the model's tensors stand.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.models.pickles import StandIn, load_pickled
from csqcli.system.choices import Weights
from csqcli.system.files import sha256
from csqcli.system.limits import read_json

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")  # in order of preference
_WRAPPED_MODULES = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)"
)  # added by torch
_AVERAGED = {"ema", "swa", "averaged"}
_MAX_NESTING = 4  # of the mappings around a state dict
_MAX_MODULES = 64  # modules within each other, of a model that was pickled whole
_MAX_ENTRIES = 2**18  # of all mappings in a file
_MAX_NAME = 1024  # characters of a tensor's name
_INDEX_BYTES, _INDEX_VALUES = 2**24, 2**20  # of a sharded file's index


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a file, before a model says which of them it needs."""

    groups: dict[str, dict[str, Tensor]]  # mapping's path in the file ("" or "state_dict") -> its tensors by name
    sha256: str  # of the file; of the index and then every shard in order where there are several
    label: str  # how messages and the report call it: "builtin:NAME" or the file's name


@dataclass(frozen=True)
class ChosenWeights:
    """The state dict that fits a model, and one sentence for each thing that was done to get it."""

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_checkpoint(path: str) -> Checkpoint:
    """All tensors of a foreign file; ``builtin:NAME`` reads a checkpoint that ships with csq.

    Raises UserError for what cannot be read, names code, or holds tensors that no state dict has (sparse, quantized,
    complex, or larger than their bytes).
    """
    if path.startswith("builtin:"):
        file = Path(str(resources.files("csqcli") / "assets" / f"{path.removeprefix('builtin:')}.safetensors"))
    else:
        file = Path(path)
    if not file.is_file():
        hint = "give a .safetensors, .pth, .pt, .th or .tar file, or the .safetensors.index.json of a sharded one"
        raise UserError("no such checkpoint", where=path, hint=hint)
    files = [file]
    if file.name.endswith(".index.json"):
        files += _shards(file, where=path)
        content: Any = {}
        for shard in files[1:]:
            content |= _read_safetensors(shard, where=f"{path}: {shard.name}")
    elif file.suffix == ".safetensors":
        content = _read_safetensors(file, where=path)
    else:
        content = load_pickled(file, where=path)
    try:
        groups = {place: tensors for place, tensors in _groups(content, iter(range(_MAX_ENTRIES))) if tensors}
    except ValueError as error:
        raise UserError(f"not a readable checkpoint ({error})", where=path) from None
    if not groups:
        raise UserError("holds no tensors", where=path, hint="a state dict is expected")
    for tensors in groups.values():
        for name, value in tensors.items():
            try:
                _check_tensor(name, value)
            except ValueError as error:
                hint = "a plain state dict is expected"
                raise UserError(f"tensor `{name[:_MAX_NAME]}` is {error}", where=path, hint=hint) from None
    return Checkpoint(groups, sha256(*files), path if path.startswith("builtin:") else file.name)


def choose_weights(checkpoint: Checkpoint, wanted: Mapping[str, Tensor], *, weights: Weights = "auto") -> ChosenWeights:
    """The tensors of ``checkpoint`` that a model with the state dict ``wanted`` needs, under the model's names.

    A place in the file and a prefix fit when every wanted name, the batch counters of BatchNorm aside, stands there behind
    the prefix. Where averaged (EMA, SWA) and raw weights both fit, ``weights`` chooses. Where nothing fits, the nearest
    place is returned, so that :func:`fit_state_dict` can say what is missing.

    Raises UserError where several sets of different weights fit, where ``weights`` asks for a kind that the file does not
    hold, or where a chosen tensor holds NaN or infinite values.
    """
    required = {name for name in wanted if not _is_optional(name)}
    matches = _matches(checkpoint, wanted)
    tied = _tied(wanted)
    fitting = [
        place for place, names in matches.items() if required <= {*names, *(n for name in names for n in tied[name])}
    ]
    if not fitting:
        nearest = max(matches, key=lambda place: (len(matches[place]), -len("".join(place))), default=None)
        if nearest is None:
            nearest = (max(checkpoint.groups, key=lambda group: len(checkpoint.groups[group])), "")
        return ChosenWeights(_checked(_below(checkpoint, nearest), where=checkpoint.label))
    chosen = _preferred(checkpoint, fitting, wanted, weights)
    state, group = _below(checkpoint, chosen), checkpoint.groups[chosen[0]]
    notes = []
    averaged = [place for place in fitting if _is_averaged(place)]
    if averaged and len(averaged) < len(fitting):
        notes.append(f"took the {'averaged' if chosen in averaged else 'raw'} weights (`{_spelled(chosen)}`)")
    if chosen[1]:
        others = len(group) - len(state)
        left = f"; beside them {others} not the model's" if others else ""
        notes.append(f"took the prefix `{chosen[1]}` off {len(state)} names{left}")
    return ChosenWeights(_checked(state, where=checkpoint.label), tuple(notes))


def fit_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str,
    num_classes: int | None = None,
    num_classes_from: str = "the data",
) -> None:
    """Load ``state`` into ``model``, every tensor of it and every one that the model needs.

    Raises UserError that says in one line what does not fit; a head of another size than ``num_classes`` is named as such.
    """
    wanted = model.state_dict()
    tied = _tied(wanted)
    state = dict(state) | {  # of weights that are one, `safetensors.torch.save_model` and others write one name
        name: state[other] for name in wanted if name not in state for other in tied[name] if other in state
    }
    missing = [name for name in wanted if name not in state and not _is_optional(name)]
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
            hint = _channels_hint(value, wanted[name]) if hasattr(model, "pretrained_cfg") else ""
            raise UserError(f"tensor {name} is {shapes}", where=where, hint=hint or "is it this architecture?")
    complete = OrderedDict(wanted | dict(state))
    complete._metadata = getattr(wanted, "_metadata", {})  # type: ignore[attr-defined]  # versions: mnasnet asks for its own
    model.load_state_dict(complete)


def _channels_hint(value: Tensor, wanted: Tensor) -> str:
    """What has timm build the network for a checkpoint's channels, where nothing but these differs between two first convolutions."""
    ours, theirs = wanted.shape, value.shape
    if wanted.dim() != 4 or value.dim() != 4 or (ours[0], *ours[2:]) != (theirs[0], *theirs[2:]):
        return ""
    if theirs[1] == 3 and ours[1] in (1, 2, 4):
        return "it takes images of 3 channels: leave in_chans out of model.arguments"
    if ours[1] == 3:
        return f"it takes images of {theirs[1]} channel{'s' if theirs[1] > 1 else ''}: --set 'model.arguments={{in_chans: {theirs[1]}}}'"
    return ""


def is_damaged(value: Tensor) -> bool:
    """NaN, or infinite among finite values. A bound that is infinite throughout (clipping that is off) is neither."""
    if not value.is_floating_point() or bool(torch.isfinite(value).all()):
        return False
    return not bool(torch.isinf(value).all())


# ---- reading


def _read_safetensors(file: Path, *, where: str) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"not a readable safetensors file ({error})", where=where) from None


def _shards(index: Path, *, where: str) -> list[Path]:
    """The files that a ``….safetensors.index.json`` names, all in its own folder."""
    try:
        if index.stat().st_size > _INDEX_BYTES:
            raise ValueError("over 16 MiB")
        names = read_json(index.read_bytes(), nodes=_INDEX_VALUES).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError("no weight_map")
        files = sorted(set(map(str, names.values())))
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"`{name}` is not the name of a .safetensors file beside it")
            if not (index.parent / name).is_file():
                raise ValueError(f"no shard `{name}` beside it")
    except (OSError, ValueError) as error:
        raise UserError(f"not a readable index ({error})", where=where) from None
    return [index.parent / name for name in files]


def _groups(
    content: Any, entries: Iterator[int], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(path, tensors by name) of every mapping in the file that holds tensors, and of every model that was pickled whole.

    ``entries`` runs out before a small graph of mappings within mappings unfolds into a tree without end. ValueError then.
    """
    if isinstance(content, StandIn) and isinstance(content.state, Mapping):
        yield place, dict(_pickled_module(content, entries))
    if not isinstance(content, Mapping):
        return
    tensors = {}
    for name, value in content.items():
        _count(entries)
        if isinstance(value, Tensor):
            tensors[_WRAPPED_MODULES.sub("", str(name)).lstrip(".")] = value.detach()
        elif depth < _MAX_NESTING:
            yield from _groups(value, entries, f"{place}.{name}".lstrip("."), depth + 1)
    yield place, tensors


def _pickled_module(
    module: StandIn, entries: Iterator[int], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the state dict of a pickled ``nn.Module``, out of the state that it was pickled with."""
    state = module.state if isinstance(module.state, Mapping) else {}
    for kind in ("_parameters", "_buffers"):
        own = state.get(kind)
        for name, value in own.items() if isinstance(own, Mapping) else ():
            _count(entries)
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value.detach()
    children = state.get("_modules")
    for name, child in children.items() if isinstance(children, Mapping) else ():
        _count(entries)
        if isinstance(child, StandIn) and depth < _MAX_MODULES:
            yield from _pickled_module(child, entries, f"{prefix}{name}.", depth + 1)


def _count(entries: Iterator[int]) -> None:
    if next(entries, None) is None:
        raise ValueError(f"more than {_MAX_ENTRIES:,} entries")


def _check_tensor(name: str, value: Tensor) -> None:
    """A plain dense tensor whose elements are all there, under a name that a module could have."""
    if len(name) > _MAX_NAME:
        raise ValueError(f"called by {len(name):,} characters")
    if value.is_nested:  # whose layout is strided, and whose shape cannot be asked for
        raise ValueError("a nested tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
        raise ValueError(f"a {value.dtype} tensor of layout {value.layout} on {value.device}")
    if value.is_floating_point() and value.dtype.itemsize < 2:
        raise ValueError(f"a tensor of type {value.dtype}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"shape {list(value.shape)} on {value.untyped_storage().nbytes():,} bytes")


# ---- choosing

Place = tuple[str, str]  # (group, prefix of names in it)


def _tied(wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """By name of a model's tensor: the other names of the very same memory."""
    places: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, value in wanted.items():
        places.setdefault((value.data_ptr() or id(value), tuple(value.shape)), []).append(name)
    return {name: [other for other in names if other != name] for names in places.values() for name in names}


def _is_optional(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # many exporters leave the batch counters out


def _matches(checkpoint: Checkpoint, wanted: Mapping[str, Tensor]) -> dict[Place, set[str]]:
    """For every place that holds any wanted name: which of them."""
    found: dict[Place, set[str]] = {}
    for group, tensors in checkpoint.groups.items():
        for name in tensors:
            starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
            for start in starts:
                if name[start:] in wanted:
                    found.setdefault((group, name[:start]), set()).add(name[start:])
    return found


def _below(checkpoint: Checkpoint, place: Place) -> dict[str, Tensor]:
    group, prefix = place
    tensors = checkpoint.groups[group]
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _is_averaged(place: Place) -> bool:
    return not _AVERAGED.isdisjoint(re.split(r"[._]", ".".join(place).lower()))


def _spelled(place: Place) -> str:
    return ".".join(part.strip(".") for part in place if part) or "the file's own tensors"


def _preferred(
    checkpoint: Checkpoint, fitting: Sequence[Place], wanted: Mapping[str, Tensor], weights: Weights
) -> Place:
    averaged = [place for place in fitting if _is_averaged(place)]
    raw = [place for place in fitting if place not in averaged]
    asked = {"auto": averaged or raw, "ema": averaged, "raw": raw}[weights]
    if not asked:
        kind = "averaged (EMA)" if weights == "ema" else "raw"
        raise UserError(f"holds no {kind} weights that fit", where=checkpoint.label, hint="pass --weights auto")
    shapes = {name: value.shape for name, value in wanted.items()}

    def rank(place: Place) -> tuple[bool, int, int]:
        state = _below(checkpoint, place)
        fits = all(value.shape == shapes[name] for name, value in state.items() if name in shapes)
        last = place[0].rpartition(".")[2]
        known = _WRAPPERS.index(last) if last in _WRAPPERS else len(_WRAPPERS)
        return not fits, known if last else -1, len(place[1])

    first, *others = sorted(asked, key=rank)
    for place in others:
        plain = place[0] == first[0] and not first[1]  # the names as they stand go before longer ones beside them
        if rank(place)[:2] == rank(first)[:2] and not plain and not _same(checkpoint, first, place, wanted):
            what = f"several sets of weights fit: `{_spelled(first)}` and `{_spelled(place)}`"
            raise UserError(what, where=checkpoint.label, hint="keep one in the file")
    return first


def _same(checkpoint: Checkpoint, one: Place, other: Place, names: Mapping[str, Tensor]) -> bool:
    a, b = _below(checkpoint, one), _below(checkpoint, other)
    return all(torch.equal(a[name], b[name]) for name in names if name in a and name in b)


def _checked(state: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    for name, value in state.items():
        if is_damaged(value.float()):
            raise UserError(f"tensor `{name}` holds NaN or infinite values", where=where, hint="use another checkpoint")
    return state
