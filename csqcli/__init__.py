"""csq quantizes pretrained vision checkpoints by bi-level continuous sparsification (CSQ).

The library's front door: :func:`load` reads a quantized file back into its plain model, :class:`CSQ` is an optimizer
for your own loop, :func:`save` writes what it trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CSQ", "load", "model_from_file", "save"]

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from csqcli.file.loading import model_from_file
    from csqcli.quant.optimizer import CSQ, QuantizedOptimizer


def load(path: str | Path, *, trust_code: bool = False) -> nn.Module:
    """The hard model of a quantized file, in eval mode, as a plain timm / torchvision / csq module.

    ``trust_code`` allows a file to name a ``package.module:factory`` to import. Raises UserError for damaged files.
    """
    from csqcli.file.io import read
    from csqcli.file.loading import model_from_file

    return model_from_file(read(path), trust_code=trust_code, where=str(path))


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

    from csqcli.file.io import assemble, write
    from csqcli.file.manifest import ModelRecord
    from csqcli.models import libraries as sources

    optimizer.harden()
    spec = sources.parse(source)
    record = ModelRecord(
        source=spec.source, library=spec.library, name=spec.name, num_classes=num_classes, weights_from="library"
    )
    config = sources.usable_config(data_config or sources.data_config(model, spec), where=source)
    target = optimizer.method.target_bits
    layers = optimizer.hard_layers()
    file = assemble(model, layers, record=record, data_config=config, target_bits=target)
    write(Path(path), file)


def __getattr__(name: str) -> Any:
    """Import torch only when the library is used: ``csq --help`` must stay fast."""
    if name == "CSQ":
        from csqcli.quant.optimizer import CSQ

        return CSQ
    if name == "model_from_file":
        from csqcli.file.loading import model_from_file

        return model_from_file
    raise AttributeError(name)
