"""scikit-learn's handwritten digits, which ship with csq."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet


@data_source("digits", "scikit-learn's 8×8 digits, embedded")
def digits(text: str, *, train: bool) -> DataSet:
    """1,297 training and 500 validation images of 8×8 pixels (CC BY 4.0), drawn once with a fixed seed."""
    import torch
    from safetensors.torch import load

    from csqcli.data.splits import DataSet, Images

    arrays = load((resources.files("csqcli") / "assets" / "digits_data.safetensors").read_bytes())
    pixels, labels = arrays["pixels"], arrays["labels"].long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    everything = Images(labels, pixels=pixels)
    val, training = everything.subset(order[:500]), everything.subset(order[500:])
    return DataSet("digits", [str(digit) for digit in range(10)], val, training, flips=False)
