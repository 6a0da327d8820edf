"""csq quantizes pretrained vision checkpoints by bi-level continuous sparsification (CSQ).

The library's front door: :func:`load` reads a quantized file back into its plain model, :class:`CSQ` is an optimizer
for your own loop, :func:`save` writes what it trained.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CSQ", "load", "model_from_file", "save"]

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from csqcli.file.io import QuantizedFile
    from csqcli.quant.optimizer import CSQ, QuantizedOptimizer


def load(path: str | Path, *, trust_code: bool = False) -> nn.Module:
    """The hard model of a quantized file, in eval mode, as a plain timm / torchvision / csq module.

    ``trust_code`` allows a file to name a ``package.module:factory`` to import. Raises UserError for damaged files.
    """
    from csqcli.file import io as checkpoint_file

    return model_from_file(checkpoint_file.read(path), trust_code=trust_code, where=str(path))


def model_from_file(file: QuantizedFile, *, trust_code: bool = False, where: str = "model file") -> nn.Module:
    """Build the architecture that a file names, load the dequantized weights strictly, attach its activation quantizers."""
    from csqcli.quant import activations

    model = _plain_model(file, trust_code=trust_code, where=where)
    activations.attach(model, file.manifest.activation_records())
    return model


def _plain_model(file: QuantizedFile, *, trust_code: bool, where: str) -> nn.Module:
    """The same without activation quantizers, for those who go on training them."""
    from csqcli.errors import UserError
    from csqcli.models import libraries as sources
    from csqcli.system.allocation import AllocationLimit

    spec = file.manifest.spec
    if spec.library not in ("timm", "torchvision", "csq", "factory"):
        raise UserError(f"unknown model library `{spec.library}`", where=where)
    if spec.library == "factory" and not trust_code:
        hint = "pass --trust-code (trust_code=True) if you trust this file"
        raise UserError(f"the file asks to import `{spec.name}`", where=where, hint=hint)
    if spec.library != "factory":
        spec = sources.parse(spec.source, spec.arguments)
    state, classes = file.state_dict(), file.manifest.model.num_classes
    elements = 4 * sum(value.numel() for value in state.values()) + 2**24
    with contextlib.nullcontext() if trust_code else AllocationLimit(elements):
        model = sources.build(spec, num_classes=classes)
    sources.fit_state_dict(model, state, where=where)
    return model.eval()


def save(
    model: nn.Module,
    optimizer: QuantizedOptimizer,
    path: str | Path,
    *,
    source: str,
    num_classes: int,
    data_config: dict[str, Any] | None = None,
) -> None:
    """Harden what ``optimizer`` trained and write the quantized file.

    ``source`` names the architecture as on the command line (``timm:resnet18``, ``package.module:factory``).
    """
    from pathlib import Path

    from csqcli.file import io as checkpoint_file
    from csqcli.models import libraries as sources

    optimizer.harden()
    spec = sources.parse(source)
    record = checkpoint_file.ModelRecord(
        source=spec.source, library=spec.library, name=spec.name, num_classes=num_classes, weights_from="library"
    )
    config = sources.usable_config(data_config or sources.data_config(model, spec), where=source)
    target = optimizer.method.plan.budget.target
    layers = optimizer.hard_layers()
    file = checkpoint_file.assemble(model, layers, record=record, data_config=config, target_bits=target)
    checkpoint_file.write(Path(path), file)


def __getattr__(name: str) -> Any:
    """Import torch only when the library is used: ``csq --help`` must stay fast."""
    if name == "CSQ":
        from csqcli.quant.optimizer import CSQ

        return CSQ
    raise AttributeError(name)
