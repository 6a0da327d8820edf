"""A data set as csq holds it: two splits of images with labels, over one list of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from csqcli.data.images import decode, image_of_array


@dataclass
class Images:
    """One split: pixel arrays (uint8 [N, C, H, W]) or file paths, with integer labels [N]."""

    labels: Tensor
    pixels: Tensor | None = None
    paths: Sequence[str] = ()
    unreadable: list[str] = field(default_factory=list)  # images that were left out because they cannot be decoded

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """How messages call an image: its path, or its number where there is none."""
        return self.paths[index] if self.pixels is None else f"image {index}"

    def pil(self, index: int, channels: int) -> Image.Image:
        """The image in mode ``L`` (one channel) or ``RGB``; raises one of `images.UNDECODABLE` when it cannot be decoded."""
        mode = "L" if channels == 1 else "RGB"
        if self.pixels is None:
            return decode(self.paths[index], mode)
        return image_of_array(self.pixels[index].permute(1, 2, 0).numpy(), mode)

    def subset(self, indices: Tensor) -> Images:
        """The images of the given indices, in their order."""
        if self.pixels is None:
            return Images(self.labels[indices], paths=[self.paths[i] for i in indices.tolist()])
        return Images(self.labels[indices], pixels=self.pixels[indices])

    def limited(self, limit: int | None) -> Images:
        """At most ``limit`` images, spread evenly so that sorted folders keep every class."""
        if limit is None or limit >= len(self):
            return self
        return self.subset(torch.linspace(0, len(self) - 1, limit).round().long())


@dataclass
class DataSet:
    """A training and a validation split over the same classes. ``train`` is None where only evaluation is asked."""

    source: str  # as messages and the report call it
    classes: list[str]  # label -> name
    val: Images
    train: Images | None
    flips: bool = True  # False where a mirrored image is another class (digits)
    present: list[int] | None = None  # labels that the data knows, where ``classes`` has more; None: all

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def relabelled(self, outputs: Sequence[int], classes: Sequence[str]) -> DataSet:
        """The same images with label ``i`` replaced by ``outputs[i]``, an index into ``classes``."""
        index = torch.tensor(outputs, dtype=torch.long)
        train = replace(self.train, labels=index[self.train.labels]) if self.train is not None else None
        val = replace(self.val, labels=index[self.val.labels])
        present = sorted(outputs) if len(outputs) < len(classes) else None
        return replace(self, classes=list(classes), val=val, train=train, present=present)
