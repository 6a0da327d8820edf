"""A checkpoint of either kind: csq's own quantized files as well as those of anybody else."""

from __future__ import annotations

import hashlib
from pathlib import Path

from csqcli.file import header, io
from csqcli.models.checkpoints import Checkpoint, read_checkpoint


def open_checkpoint(path: str) -> Checkpoint:
    """The tensors of a checkpoint; the weights of a quantized file are dequantized.

    ``builtin:NAME`` names one that ships with csq. Raises UserError for what cannot be read.
    """
    file = Path(path)
    if file.suffix == ".safetensors" and file.is_file() and header.is_quantized(file):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return Checkpoint({"": io.read(file).state_dict()}, digest, file.name)
    return read_checkpoint(path)
