"""A data set as csq holds it: two splits of images with labels, over one list of classes."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from csqcli.data.images import decode, image_of_array


class Reader(Protocol):
    """Encoded images that are no files of their own: members of an archive, rows of a table. Copied to loader processes."""

    def read(self, path: str) -> bytes:
        """The bytes of an image, from anywhere in the data. One of `images.UNDECODABLE` where they are not available."""
        ...

    def size(self, path: str) -> int:
        """Bytes of the image; of the file that it is in, where that is all that is known without reading."""
        ...


@dataclass
class Images:
    """One split: pixel arrays (uint8 [N, C, H, W]) or file paths, with integer labels [N]."""

    labels: Tensor
    pixels: Tensor | None = None
    paths: Sequence[str] = ()
    root: str = ""  # what paths begin with wherever the data lie; it is no part of an image's identity
    reader: Reader | None = None  # of paths that are no files
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
            path = self.paths[index]
            return decode(path if self.reader is None else io.BytesIO(self.reader.read(path)), mode)
        return image_of_array(self.pixels[index].permute(1, 2, 0).numpy(), mode)

    def subset(self, indices: Tensor) -> Images:
        """The images of the given indices, in their order."""
        if self.pixels is None:
            return replace(self, labels=self.labels[indices], paths=[self.paths[i] for i in indices.tolist()])
        return Images(self.labels[indices], pixels=self.pixels[indices])

    def identity(self, index: int) -> str:
        """What an image is called wherever the data lie: its path below the root, or its number."""
        return self.paths[index].removeprefix(self.root) if self.pixels is None else str(index)

    def listing(self) -> str:
        """SHA-256 over identity, size and label of every image in order; over the pixels themselves where those are held."""
        digest = hashlib.sha256(self.labels.numpy().astype("<i8").tobytes())
        if self.pixels is not None:
            digest.update(repr(tuple(self.pixels.shape)).encode())
            digest.update(self.pixels.contiguous().numpy().tobytes())
            return digest.hexdigest()
        for index, path in enumerate(self.paths):
            digest.update(os.fsencode(f"{self.identity(index)}\0{self._size(path)}\0"))
        return digest.hexdigest()

    def _size(self, path: str) -> int:
        if self.reader is not None:
            return self.reader.size(path)
        try:
            return os.stat(path).st_size
        except OSError:  # whoever reads it says so
            return -1

    def held_out(self, share: float, *, seed: int) -> tuple[Images, Images]:
        """Two parts: what stays, and ``share`` of every class.

        An image's place is a function of its identity and the seed, so data that moved or grew are parted alike. A class of
        two or more images has at least one in either part, unless ``share`` is 1; a single image stays.
        """
        ranks = [
            hashlib.blake2b(os.fsencode(f"{seed}\0{self.identity(index)}"), digest_size=8).digest()
            for index in range(len(self))
        ]
        taken = torch.zeros(len(self), dtype=torch.bool)
        for label in self.labels.unique().tolist():
            members = sorted((self.labels == label).nonzero().flatten().tolist(), key=ranks.__getitem__)
            count = round(share * len(members))
            if share < 1:
                count = min(max(count, 1), len(members) - 1)
            taken[members[:count]] = True
        return self.subset((~taken).nonzero().flatten()), self.subset(taken.nonzero().flatten())

    def limited(self, limit: int | None) -> Images:
        """At most ``limit`` images, spread evenly so that sorted folders keep every class."""
        if limit is None or limit >= len(self):
            return self
        return self.subset(torch.linspace(0, len(self) - 1, limit).round().long())


NO_IMAGES = Images(torch.zeros(0, dtype=torch.long))


@dataclass
class DataSet:
    """A training and a validation split over the same classes. ``train`` is None where only evaluation is asked.

    A source whose data have no validation split leaves ``val`` empty (:data:`NO_IMAGES`), and opening the data says what can
    take its place.
    """

    source: str  # as messages and the report call it
    classes: list[str]  # label -> name
    val: Images
    train: Images | None
    test: Images | None = None  # kept for a last measurement: taken for validation only where the user says so
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
