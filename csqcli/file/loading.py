"""From a quantized file to a model that runs: the plain architecture, its hard weights, its activation quantizers."""

from __future__ import annotations

import contextlib

from torch import nn

from csqcli.errors import UserError
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ActivationEntry, Manifest
from csqcli.models.checkpoints import fit_state_dict
from csqcli.models.libraries import build
from csqcli.models.spec import LIBRARIES, parse
from csqcli.quant import activations
from csqcli.quant.activations import ActivationQuantizers, ActivationRecord
from csqcli.system.allocation import AllocationLimit

_SPARE_ELEMENTS = 2**24  # for what a constructor makes beside its parameters


def model_from_file(file: QuantizedFile, *, trust_code: bool = False, where: str = "model file") -> nn.Module:
    """The hard model in eval mode, as a plain timm, torchvision or csq module with its activation quantizers attached.

    ``trust_code`` allows the file to name a ``package.module:factory``, which is imported and called. ``where`` is how
    messages call the file. Raises UserError where the architecture cannot be built or the weights do not fit it.
    """
    model = plain_model(file, trust_code=trust_code, where=where)
    activations.attach(model, activation_records(file.manifest))
    return model


def plain_model(file: QuantizedFile, *, trust_code: bool = False, where: str = "model file") -> nn.Module:
    """As :func:`model_from_file`, without activation quantizers: for those who go on training them."""
    spec = file.manifest.spec
    if spec.library not in (*LIBRARIES, "factory"):
        raise UserError(f"unknown model library `{spec.library}`", where=where)
    if spec.library == "factory" and not trust_code:
        hint = "pass --trust-code (trust_code=True) if you trust this file"
        raise UserError(f"the file asks to import `{spec.name}`", where=where, hint=hint)
    if spec.library != "factory":
        spec = parse(spec.source, spec.arguments)
    state, classes = file.state_dict(), file.manifest.model.num_classes
    limit = 4 * sum(value.numel() for value in state.values()) + _SPARE_ELEMENTS
    with contextlib.nullcontext() if trust_code else AllocationLimit(limit):
        model = build(spec, num_classes=classes)
    fit_state_dict(model, state, where=where)
    return model.eval()


def activation_records(manifest: Manifest) -> list[ActivationRecord]:
    """The activation quantizers of a manifest, as ``quant.activations.attach`` takes them."""
    return [ActivationRecord(entry.module, entry.bits, entry.signed, entry.scale) for entry in manifest.activations]


def activation_entries(quantizers: ActivationQuantizers | None) -> list[ActivationEntry]:
    """The activation quantizers of a model, as a manifest holds them; none for None."""
    return [ActivationEntry(**vars(record)) for record in quantizers.records()] if quantizers is not None else []
