"""The safetensors forms: files that csq itself reads back, and other programs with a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from csqcli.errors import UserError
from csqcli.exporting import verify
from csqcli.exporting.folding import fold as folding_of
from csqcli.exporting.folding import in_16_bits
from csqcli.exporting.form import Form, Options, Subject
from csqcli.exporting.verify import ParityError
from csqcli.file import header, io, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import Form as Layout
from csqcli.file.manifest import Manifest, ParityRecord
from csqcli.quant import activations
from csqcli.quant.basis import nearest
from csqcli.quant.measuring import logits_of
from csqcli.system.progress import counted

# Of the logits' standard deviation; trained EfficientNet-lite0 at two planes moves by 0.03 at most.
ROUNDING_TOLERANCE = 0.1
_HALF = 2.0**-12  # by how much float16 moves a number on average, as a share of it; 2⁻¹¹ at most


class SafetensorsForm(Form):
    """A layout of `file.layout`; a loaded file runs as the float model that it is."""

    suffix = ".safetensors"
    layout: ClassVar[Layout]

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.engine = f"torch {torch.__version__}"

    def write(self, path: Path, parity: ParityRecord | None) -> None:
        io.write(path, self.file, form=self.layout, parity=parity)

    def check(self, path: Path) -> None:
        try:
            written = io.read(path)
        except UserError as error:
            raise ParityError(f"cannot be read back: {error.what}", where=str(path)) from None
        for layer, wanted in zip(written.layers, self.file.layers, strict=True):
            verify.check_layer(layer, wanted)
        verify.check_others(written.others, self.file.others)

    def open(self, path: Path) -> nn.Module:
        return loading.load_file(path, trust_code=self.options.trust_code)

    def describe(self, path: Path, parity: ParityRecord) -> Manifest:
        return header.read_manifest(path)


class Int8Packed(SafetensorsForm):
    """Integers as int8, int16 where |Q| > 127: readable with safetensors and NumPy alone."""

    name = layout = "int8-packed"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.notes += _notes_for_plain_models(subject.file)


class BitPacked(SafetensorsForm):
    """The smallest form."""

    name = layout = "bit-packed"
    takes_basis = True


class BitPackedSmall(SafetensorsForm):
    """The smallest: BatchNorms folded, and all numbers but the integers in 16 bits. For inference."""

    name, layout = "bit-packed-small", "bit-packed"
    takes_basis = True
    tolerance = ROUNDING_TOLERANCE

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        source, trust = subject.file, subject.options.trust_code
        where, size = source.manifest.model.source, source.manifest.data_config["input_size"]
        folding = folding_of(source, loading.hard_model(source, trust_code=trust, where=where), size)
        unrounded = [loading.hard_model(file, trust_code=trust, where=where) for file in (source, folding.file)]
        for model in unrounded:  # whose activations flip between integers where sums differ in their last digit
            activations.detach(model)
        probe = verify.make_probe(unrounded[0], size, subject.probe.images, source=subject.probe.source)
        with torch.no_grad():
            logits = logits_of(unrounded[1](probe.images))
        verify.check_logits(logits, probe, tolerance_in_std=verify.FLOAT_TOLERANCE, where="folded BatchNorms")
        if source.manifest.activations:
            floor = verify.rounding_floor(subject.model, subject.probe, {}, {}, relative=_HALF)
            self.tolerance = max(self.tolerance, 2 * floor)
        self.file = in_16_bits(folding.file)  # the model that is written, and whose accuracy is measured
        if folding.norms:
            self.notes.append(
                f"{counted(folding.norms, 'BatchNorm')} folded, "
                f"with the per-channel steps of {folding.steps} of {len(source.layers)} layers"
            )
        self.notes += [f"{name} kept as it is: {why}" for name, why in folding.kept.items()]


class StateDict(SafetensorsForm):
    """Plain float weights under their own names."""

    name = layout = "state-dict"
    takes_basis = True

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.notes += _notes_for_plain_models(subject.file)

    @classmethod
    def accept(cls, file: QuantizedFile, options: Options, *, where: str) -> None:
        for layer in file.layers:
            if layer.basis is None:
                continue
            found = nearest(layer.weight(), layer.basis, layer.channel_dim)
            if not torch.equal(found, layer.integers):
                what = f"two integers of {layer.name} have the same level, so its weights do not tell its integers"
                raise UserError(what, where=where, hint="take --bit-packed")


def _notes_for_plain_models(file: QuantizedFile) -> list[str]:
    """What a reader that takes the weights alone leaves out."""
    rounded = len(file.manifest.activations)
    if not rounded:
        return []
    return [
        f"inputs of {counted(rounded, 'layer')} are rounded by csqcli.load and csq evaluate; "
        "a plain PyTorch model with these weights does not round them, and may be less accurate"
    ]
