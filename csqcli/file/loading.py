"""From a quantized file to its model: the architecture that the file names, or one that the caller has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.file import io
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ActivationEntry, Manifest
from csqcli.models.checkpoints import fit_state_dict
from csqcli.models.libraries import build
from csqcli.models.spec import LIBRARIES, ModelSpec, parse
from csqcli.quant import activations
from csqcli.quant.activations import ActivationRecord
from csqcli.quant.wrappers import unwrap
from csqcli.system.allocation import AllocationLimit

_SPARE_ELEMENTS, _SPARE_TENSORS = 2**24, 2**10  # that a constructor may make beside the file's own, four times over


def load_file(path: str | Path, *, trust_code: bool = False) -> nn.Module:
    """The hard model of the file at ``path``; see :func:`hard_model`."""
    return hard_model(io.read(path), trust_code=trust_code, where=str(path))


def hard_model(file: QuantizedFile, *, trust_code: bool = False, where: str = "model file") -> nn.Module:
    """The architecture that a file names with its dequantized weights, loaded strictly, and its activation quantizers.

    In eval mode, on the CPU, float32. ``trust_code`` allows a file to name a ``package.module:factory`` to import.
    Raises UserError, its line beginning with ``where``, when the file names what csq cannot or must not build.
    """
    model = plain_model(file, trust_code=trust_code, where=where)
    activations.attach(model, activation_records(file.manifest))
    return model


def plain_model(file: QuantizedFile, *, trust_code: bool, where: str) -> nn.Module:
    """As :func:`hard_model`, without activation quantizers, for those who go on training them."""
    state = file.state_dict()
    model = architecture(
        file.manifest.spec,
        num_classes=file.manifest.model.num_classes,
        state=state,
        trust_code=trust_code,
        where=where,
    )
    model.float()  # a factory may make it in another precision, which would round what is loaded
    fit_state_dict(model, state, where=where)
    return model.eval()


def architecture(
    spec: ModelSpec, *, num_classes: int, state: Mapping[str, Tensor], trust_code: bool, where: str
) -> nn.Module:
    """The network of a spec that may come out of a file, with the weights that its constructor gives it.

    ``state`` is what it should hold: without ``trust_code`` the constructor may make a few times as many tensors and numbers,
    no more, and nothing is imported. Raises UserError.
    """
    if spec.library not in (*LIBRARIES, "factory"):
        raise UserError(f"unknown model library `{spec.library}`", where=where)
    check_trusted(spec, trust_code=trust_code, where=where)
    if spec.library != "factory":
        spec = parse(spec.source, spec.arguments)
    elements = 4 * sum(value.numel() for value in state.values()) + _SPARE_ELEMENTS
    limit = AllocationLimit(elements, tensors=4 * len(state) + _SPARE_TENSORS)
    with contextlib.nullcontext() if trust_code else limit:
        return build(spec, num_classes=num_classes)


def check_trusted(spec: ModelSpec, *, trust_code: bool, where: str) -> None:
    """UserError for a spec out of a file that names a factory to import, without ``trust_code``."""
    if spec.library == "factory" and not trust_code:
        hint = "pass --trust-code (trust_code=True) if you trust this file"
        raise UserError(f"the file asks to import `{spec.name}`", where=where, hint=hint)


def load_into(model: nn.Module, file: QuantizedFile, *, where: str = "model file") -> None:
    """Load a file's dequantized weights strictly into ``model``, and replace its activation quantizers by the file's.

    Wrappers of torch.compile, data parallelism and weight averaging are looked through. Weights are rounded where the
    model's own type is narrower than float32. The model's mode stays. Raises UserError, and changes nothing, when names
    or shapes differ.
    """
    plain = unwrap(model)
    modules, records = dict(plain.named_modules()), activation_records(file.manifest)
    for record in records:
        if record.module not in modules:
            hint = "is it this architecture?"
            raise UserError(f"the model has no module `{record.module}`", where=where, hint=hint)
    fit_state_dict(plain, file.state_dict(), where=where)
    activations.detach(plain)
    activations.attach(plain, records)


def activation_records(manifest: Manifest) -> list[ActivationRecord]:
    """The activation quantizers of a manifest, as ``quant.activations.attach`` takes them."""
    return [ActivationRecord(entry.module, entry.bits, entry.signed, entry.scale) for entry in manifest.activations]


def activation_entries(records: Iterable[ActivationRecord]) -> list[ActivationEntry]:
    """The other way round: as a manifest holds them."""
    return [ActivationEntry(**vars(record)) for record in records]
