"""A split → batches on the model's device, normalised as the model's data config says.

Order and augmentation are pure functions of (seed, epoch, batch), never of the number of workers or of what ran before,
so a resumed run sees the same pixels. Inputs up to ``IN_MEMORY_SIDE`` pixels are decoded once and held as uint8;
augmentation then runs on whole batches, on the model's device. Random resized crops are cut from whole images at any size,
as timm does it, and by worker processes.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from csqcli.data import transforms
from csqcli.data.images import UNDECODABLE, why_undecodable
from csqcli.data.splits import Images
from csqcli.data.transforms import IN_MEMORY_SIDE, RESIZED_CROPS
from csqcli.errors import UserError, machine_fault
from csqcli.system.distributed import Shard

log = logging.getLogger(__name__)

_FEW = 10  # unreadable training images that are passed over however small the set


class Unavailable(UserError):
    """The data can no longer be read: files vanished, or a worker process died. Raised between two batches."""


@dataclass(frozen=True)
class _Undecodable:
    """What a worker returns for an image that it cannot decode."""

    name: str
    why: str


class Loader(Protocol):
    """Batches of (images [B, C, H, W] float, labels [B]) on the target device."""

    batches: int
    samples: int
    skipped: int  # images left out because they could not be decoded

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``start`` … ``batches − 1`` of an epoch; one whose images are all unreadable is empty.

        One epoch at a time: one that was left early must not be gone on with once another was begun.
        """
        ...

    def close(self) -> None:
        """End the worker processes, if any; another epoch would start new ones."""
        ...


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made from a split."""

    training: bool
    batch_size: int  # per process
    augment: str = "none"
    workers: int = 0
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shard: Shard = field(default_factory=Shard)


def make_loader(images: Images, config: dict[str, Any], settings: LoaderSettings) -> Loader:
    """The loader that fits: in memory up to ``IN_MEMORY_SIDE`` pixels, else, or for random resized crops, image by image."""
    channels = config["input_size"][0]
    crops = settings.training and settings.augment in RESIZED_CROPS
    if channels not in (1, 3) and (crops or images.pixels is None or images.pixels.shape[1] != channels):
        raise UserError(
            f"the model takes images of {channels} channels", hint="csq reads grey and RGB images, 1 or 3 channels"
        )
    if max(config["input_size"][1:]) <= IN_MEMORY_SIDE and not crops:
        return _ArrayLoader(hold(images, config, training=settings.training), config, settings)
    return _ImageLoader(images, config, settings)


def stream_seed(*keys: int) -> int:
    """A 63-bit seed that is a pure function of its keys."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _Plan:
    """Which images make which batch, on this process."""

    def __init__(self, samples: int, settings: LoaderSettings) -> None:
        self.samples, self.settings = samples, settings
        world = settings.shard.world
        if settings.training:
            self.batch_size = max(1, min(settings.batch_size, samples // world))
            self.batches = max(1, samples // (self.batch_size * world))
        else:
            self.mine = torch.arange(settings.shard.rank, samples, world)
            self.batch_size = settings.batch_size
            self.batches = -(-len(self.mine) // self.batch_size)

    def order(self, epoch: int) -> list[Tensor]:
        """Image indices of every batch; a process's batch is its share of the global one."""
        if not self.settings.training:
            return list(self.mine.split(self.batch_size))
        shard = self.settings.shard
        shuffled = permutation(self.samples, self.settings.seed, epoch)
        return [
            shuffled[(b * shard.world + shard.rank) * self.batch_size :][: self.batch_size] for b in range(self.batches)
        ]


class _ArrayLoader:
    def __init__(self, images: Images, config: dict[str, Any], settings: LoaderSettings) -> None:
        assert images.pixels is not None
        self.settings, self.device = settings, settings.device
        self.pixels, self.labels = images.pixels.to(self.device), images.labels.to(self.device)
        self.plan = _Plan(len(images), settings)
        self.batches, self.samples, self.skipped = self.plan.batches, len(images), len(images.unreadable)
        channels = self.pixels.shape[1]
        mean = torch.tensor(config["mean"], device=self.device).expand(channels).view(1, -1, 1, 1)
        std = torch.tensor(config["std"], device=self.device).expand(channels).view(1, -1, 1, 1)
        self.gain, self.shift = 1 / (255 * std), mean / std
        self.fill = (mean * 255).round().to(torch.uint8)
        self.padding = max(1, self.pixels.shape[-1] // 8)  # 4 at 32 pixels, as usual for CIFAR

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, where in enumerate(self.plan.order(epoch)[start:], start):
            where = _send(where, self.device)
            pixels = self.pixels[where]
            if self.settings.training and self.settings.augment != "none":
                pixels = self._crop(pixels, epoch, batch, flip=self.settings.augment != "crop")
            yield pixels.float() * self.gain - self.shift, self.labels[where]

    def close(self) -> None:
        pass

    def _crop(self, pixels: Tensor, epoch: int, batch: int, *, flip: bool) -> Tensor:
        """Per-image random crop out of the padded image, and a mirror for half of them."""
        count, _, height, width = pixels.shape
        pad, shard = self.padding, self.settings.shard
        padded = self.fill.expand(count, -1, height + 2 * pad, width + 2 * pad).clone()
        padded[:, :, pad : pad + height, pad : pad + width] = pixels
        rng = torch.Generator().manual_seed(stream_seed(self.settings.seed, epoch, batch))
        mine = slice(shard.rank * count, (shard.rank + 1) * count)  # draws are those of the global batch
        offsets = torch.randint(0, 2 * pad + 1, (2, count * shard.world, 1), generator=rng)[:, mine]
        rows = offsets[0] + torch.arange(height)  # [B, H]
        columns = offsets[1] + torch.arange(width)  # [B, W]
        if flip:
            mirrored = torch.rand(count * shard.world, 1, generator=rng)[mine] < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        rows, columns = _send(rows, self.device), _send(columns, self.device)
        which = torch.arange(count, device=self.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _ImageLoader:
    def __init__(self, images: Images, config: dict[str, Any], settings: LoaderSettings) -> None:
        self.images, self.settings = images, settings
        self.plan = _Plan(len(images), settings)
        self.batches, self.samples, self.skipped = self.plan.batches, len(images), 0
        self.workers = min(settings.workers, self.batches)
        transform = transforms.image_transform(config, settings.augment if settings.training else None)
        self.dataset = _Transformed(images, transform, config["input_size"][0])
        self.sampler = _Replaceable()
        self.loader: torch.utils.data.DataLoader[Any] | None = None  # from the first epoch on

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        seed, device = self.settings.seed, self.settings.device
        plan = [
            [(index, stream_seed(seed, epoch, index)) for index in where.tolist()]
            for where in self.plan.order(epoch)[start:]
        ]
        lost = 0
        for pixels, labels, unreadable in self._planned(plan):
            if unreadable and not self.settings.training:
                hint = "repair or remove this validation image"
                raise Unavailable(unreadable[0].why, where=unreadable[0].name, hint=hint)
            for image in unreadable:
                log.warning("%s: %s, skipped", image.name, image.why)
            self.skipped += len(unreadable)
            lost += len(unreadable)
            names = [image.name for image in unreadable]
            _check_lost(lost, self.samples, names, whole_batch=len(labels) == 0)
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _planned(self, plan: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor, list[_Undecodable]]]:
        """The batches of a plan; Unavailable when a worker process died or found no memory."""
        self.sampler.plan = plan
        try:
            if self.loader is None:
                self.loader = self._start()
            for batch in _begun(self.loader):
                yield batch
                if self.sampler.plan is not plan:  # the next batch is the other epoch's
                    raise RuntimeError("another epoch of this loader was begun before this one ended")
        except (RuntimeError, MemoryError, ConnectionError, FileNotFoundError, EOFError) as error:
            # a batch of which the process that made it died before it was fetched from there: the last three
            lost = not isinstance(error, (RuntimeError, MemoryError))
            fault = machine_fault(RuntimeError(f"DataLoader worker gone: {error}") if lost else error)
            if fault is None:
                raise
            self.close()
            raise Unavailable(fault.what, hint=fault.hint) from error

    def _start(self) -> torch.utils.data.DataLoader[Any]:
        """Workers are started once, at the first epoch, not for each."""
        return torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=self.sampler,  # type: ignore[arg-type]  # indices carry their seeds
            collate_fn=_collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.settings.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.settings.seed),  # leave the global stream to the model
        )

    def close(self) -> None:
        self.loader = None  # the processes end with it


def _begun(loader: torch.utils.data.DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor, list[_Undecodable]]]:
    """The loader's next epoch, without torch's signal handler, which raises the news of a dead worker wherever this process
    happens to be, in the middle of a save too. Waiting for a batch tells as well, within 5 seconds and between two steps.

    What workers inherit is not theirs to collect: an engine's session that ends there waits for threads that were not forked.
    """
    handled = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if handled else None
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        batches = iter(loader)
    finally:
        if not frozen:  # by the caller
            gc.unfreeze()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return batches


class _Replaceable:
    """Batch sampler of a loader that outlives its epochs. The main process alone asks it, so that a new plan reaches
    workers that are already running."""

    plan: Sequence[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.plan)


class _Transformed(torch.utils.data.Dataset[Any]):
    """Decode and transform images, each with the random streams set to its own seed."""

    def __init__(self, images: Images, transform: Any, channels: int) -> None:
        self.images, self.transform, self.channels = images, transform, channels

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[Any]:
        state, numpy_state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            done = [self._one(index, seed) for index, seed in indices]
        random.setstate(state)
        np.random.set_state(numpy_state)
        return done

    def _one(self, index: int, seed: int) -> tuple[Tensor, int] | _Undecodable:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            return self.transform(self.images.pil(index, self.channels)), int(self.images.labels[index])
        except UNDECODABLE as error:
            return _Undecodable(self.images.name(index), why_undecodable(error))


def _check_lost(lost: int, samples: int, last: Sequence[str], *, whole_batch: bool = False) -> None:
    """Unavailable once 1 % of the training images, or a whole batch, cannot be read: a lost disk is not a bad image."""
    if lost > max(_FEW, samples // 100) or (whole_batch and len(last) > _FEW):
        hint = "check that the data is still there and whole; an unfinished run goes on with --resume"
        raise Unavailable(f"{lost} training images cannot be read", where=f"{last[-1]} and others", hint=hint)


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, list[_Undecodable]]:
    good = [item for item in items if not isinstance(item, _Undecodable)]
    bad = [item for item in items if isinstance(item, _Undecodable)]
    pixels = torch.stack([item[0] for item in good]) if good else torch.empty(0)  # the loop passes over empty batches
    return pixels, torch.tensor([item[1] for item in good], dtype=torch.long), bad


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's images."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed(seed, epoch)))


def hold(images: Images, config: dict[str, Any], *, training: bool) -> Images:
    """The split as uint8 pixels at the model's input size; unreadable training images are dropped and listed."""
    channels, height, width = config["input_size"]
    centred = config.get("crop_mode", "center") == "center"
    fits = images.pixels is not None and tuple(images.pixels.shape[1:]) == (channels, height, width)
    if fits and (centred or config.get("crop_pct", 1.0) == 1):
        return images
    prepare = _centre_crop(config) if centred else transforms.image_transform(config, None, normalize=False)
    pixels, kept, unreadable = [], [], []
    for index in range(len(images)):
        try:
            image = images.pil(index, channels)
        except UNDECODABLE as error:
            why = why_undecodable(error)
            if not training:
                raise UserError(why, where=images.name(index), hint="repair or remove this image") from None
            log.warning("%s: %s, skipped", images.name(index), why)
            unreadable.append(images.name(index))
            _check_lost(len(unreadable), len(images), unreadable)
            continue
        pixels.append(prepare(image))
        kept.append(index)
    if not kept:
        raise UserError("no image can be decoded", where=f"{images.name(0)} and all others", hint="check the data")
    return Images(images.labels[kept], pixels=torch.stack(pixels).contiguous(), unreadable=unreadable)


def _centre_crop(config: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Resize to the shorter side and crop, as measured figures have it.

    timm's own transform rounds the longer side and the crop's corner the other way, so that images which are not square come
    out a pixel apart, and it enlarges and crops images that have the model's size already, such as those of CIFAR.
    """
    from timm.data.transforms import str_to_pil_interp

    channels, height, width = config["input_size"]
    resampling = str_to_pil_interp(config["interpolation"])
    side = int(min(height, width) / config.get("crop_pct", 1.0))

    def prepare(image: Image.Image) -> Tensor:
        if image.size != (width, height):
            ratio = side / min(image.size)
            resized = max(round(image.width * ratio), width), max(round(image.height * ratio), height)
            image = image.resize(resized, resampling)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)

    return prepare
