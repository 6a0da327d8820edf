"""A checkpoint of either kind: csq's own quantized files as well as those of anybody else."""

from __future__ import annotations

from csqcli.file import header, io
from csqcli.models.checkpoints import Checkpoint, read_checkpoint
from csqcli.system.files import sha256
from csqcli.system.run_files import model_of


def open_checkpoint(path: str) -> Checkpoint:
    """The tensors of a checkpoint; the weights of a quantized file, or of the one in a run's folder, are dequantized.

    ``builtin:NAME`` names one that ships with csq. Raises UserError for what cannot be read.
    """
    file = model_of(path)
    if file.suffix == ".safetensors" and file.is_file() and header.is_quantized(file):
        return Checkpoint({"": io.read(file).state_dict()}, sha256(file), file.name)
    return read_checkpoint(path if path.startswith("builtin:") else str(file))
