"""The seam of exports: one class per kind of file.

`run.export_file` makes one instance per export and calls, in this order: ``write`` and ``check`` (every number in the file is
the hard model's), ``open`` (its logits are compared, its accuracy measured), ``latency``, then ``write`` and ``check`` again
with the certificate of all that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from csqcli.exporting.timing import interleaved_medians
from csqcli.exporting.verify import FLOAT_TOLERANCE, Probe
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import Manifest, ParityRecord
from csqcli.system.choices import Activations, Prefer, Target, WeightType


@dataclass(frozen=True)
class Options:
    """What `csq export` was told beyond the form."""

    activations: Activations = "float"
    target: Target = "ort"
    weights: WeightType = "int8"
    calib: str | Tensor | None = None  # images, as --data takes them, or themselves: [N, C, H, W]
    prefer: Prefer = "speed"
    trust_code: bool = False

    def as_mapping(self) -> dict[str, Any]:
        names = ("activations", "target", "weights", "calib", "prefer")
        return {name: getattr(self, name) for name in names}


@dataclass
class Subject:
    """What is exported: the file, its hard model in eval mode, and images with the model's answers."""

    file: QuantizedFile
    model: nn.Module
    probe: Probe
    options: Options = field(default_factory=Options)


class Form(ABC):
    """One kind of file: how it is written, opened in the engine that will run it, and compared layer by layer."""

    name: ClassVar[str]  # as in `csq export --form`, and in the file's manifest
    suffix: ClassVar[str]  # with which its files' names must end
    takes: ClassVar[frozenset[str]] = frozenset()  # of `registry.OPTIONS`
    takes_basis: ClassVar[bool] = False  # whether it can hold layers whose levels a learned basis gives

    made_for: str | None = None  # the engine that will run the file, where that is not the one that is opened
    engine: str = ""  # name and version of what runs the file; set when it is opened
    tolerance: float = FLOAT_TOLERANCE  # largest logit error, in the logits' standard deviation
    reference: Probe | None = None  # the logits that are meant, where the form rounds more than the hard model does

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.file, self.options = subject.file, subject.options
        self.absent: list[str] = []  # layers that the file does not hold because nothing reads them
        self.int8: list[str] = []  # layers whose inputs and weights the engine has as int8
        self.calibrated: list[str] = []  # layers whose outputs are rounded at a scale that was not trained
        self.notes: list[str] = []  # what else a reader of the certificate should know, a clause each

    @classmethod  # noqa: B027  # most forms need nothing
    def require(cls, options: Options) -> None:
        """UserError where a package is missing that this form needs. Called before anything is read."""

    @classmethod  # noqa: B027  # most hold any file
    def accept(cls, file: QuantizedFile, options: Options, *, where: str) -> None:
        """UserError where this form cannot hold ``file`` as ``options`` ask. Called before the model is built."""

    @abstractmethod
    def write(self, path: Path, parity: ParityRecord | None) -> None:
        """Write the file; ``parity`` is None the first time. It must state ``parity.file_bytes`` if it holds the certificate."""

    @abstractmethod
    def check(self, path: Path) -> None:
        """Read the file back. ParityError, naming the layer, where a number differs from the hard model's."""

    @abstractmethod
    def open(self, path: Path) -> nn.Module:
        """The file in the engine that will run it: images [N, C, H, W] in, logits [N, classes] out. Sets ``engine``."""

    def twins(self, path: Path, *, threads: int) -> tuple[nn.Module, nn.Module] | None:
        """The file in its engine on so many threads, and the same network in fp32 there; None where that means nothing."""
        return None

    def begins_at(self, path: Path) -> str | None:
        """The first layer whose output is not the hard model's, for a file whose logits are not; None where it cannot be told."""
        return None

    def latency(self, path: Path) -> tuple[float | None, float | None]:
        """Milliseconds for one image on one thread, and fp32 time / this time; None where that means nothing."""
        pair = self.twins(path, threads=1)
        if pair is None:
            return None, None
        image = self.subject.probe.images[:1]
        this, plain = interleaved_medians([lambda: pair[0](image), lambda: pair[1](image)])
        return 1000 * this, plain / this

    def describe(self, path: Path, parity: ParityRecord) -> Manifest:
        """The manifest of the file that was written."""
        manifest = self.file.manifest.model_copy(update={"form": self.name, "parity": parity}, deep=True)
        manifest.sizes.file_bytes = path.stat().st_size
        return manifest
