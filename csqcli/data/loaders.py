"""Data specs → batches. Transforms and normalisation come from the model's own data config.

Order and augmentation are pure functions of (seed, epoch, batch), never of the number of workers or of what ran before,
so a resumed run sees the same pixels. Inputs up to ``IN_MEMORY_SIDE`` pixels are decoded once and held as uint8;
augmentation then runs on whole batches, on the model's device.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from csqcli.errors import UserError, machine_fault
from csqcli.system.distributed import Shard

log = logging.getLogger(__name__)

IN_MEMORY_SIDE = 64  # pixels: larger inputs stream from disk through worker processes
VALIDATION_NAMES = ("val", "valid", "validation", "test")
_FEW = 10  # unreadable training images that are passed over however small the set


class Unavailable(UserError):
    """The data can no longer be read: files vanished, or a worker process died. Raised between two batches."""


@dataclass
class Images:
    """One split: pixel arrays (uint8 [N, C, H, W]) or file paths, with integer labels [N]."""

    labels: Tensor
    pixels: Tensor | None = None
    paths: Sequence[str] = ()
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.paths[index] if self.pixels is None else f"image {index}"

    def pil(self, index: int, channels: int) -> Image.Image:
        """Image in ``L`` (one channel) or ``RGB``; OSError when it cannot be decoded."""
        mode = "L" if channels == 1 else "RGB"
        if self.pixels is None:
            with Image.open(self.paths[index]) as image:
                return image.convert(mode)
        array = self.pixels[index].permute(1, 2, 0).numpy()
        return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert(mode)

    def subset(self, indices: Tensor) -> Images:
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

    source: str
    classes: list[str]
    val: Images
    train: Images | None
    flips: bool = True  # False where a mirrored image is another class (digits)

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def open_data(
    source: str, *, train: bool = True, train_limit: int | None = None, val_limit: int | None = None
) -> DataSet:
    """The data set of a spec: ``digits``, ``cifar10:DIR``, ``cifar100:DIR`` or an image folder.

    Raises UserError for a missing split, no images, or classes that differ between the splits.
    """
    kind, _, where = source.partition(":")
    if source == "digits":
        data = _digits()
    elif kind in ("cifar10", "cifar100") and where:
        data = _cifar(kind, Path(where))
    else:
        data = _folder(Path(source), train=train)
    kept = data.train.limited(train_limit) if data.train is not None and train else None
    return replace(data, train=kept, val=data.val.limited(val_limit))


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
    """The loader that fits the input size: in memory up to ``IN_MEMORY_SIDE`` pixels, else from disk."""
    if max(config["input_size"][1:]) <= IN_MEMORY_SIDE:
        return _ArrayLoader(hold(images, config, training=settings.training), config, settings)
    return _ImageLoader(images, config, settings)


def choose_augment(setting: str, data: DataSet, config: dict[str, Any]) -> str:
    """Resolve ``auto``."""
    if setting != "auto":
        return setting
    if max(config["input_size"][1:]) > IN_MEMORY_SIDE:
        return "imagenet"
    return "crop-flip" if data.flips else "crop"


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
        transform = _transform(config, settings.augment if settings.training else None)
        self.dataset = _Transformed(images, transform, config["input_size"][0])
        self.sampler = _Replaceable()
        self.loader: torch.utils.data.DataLoader | None = None  # from the first epoch on

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
                raise Unavailable("cannot be decoded", where=unreadable[0], hint=hint)
            for name in unreadable:
                log.warning("%s: cannot be decoded, skipped", name)
            self.skipped += len(unreadable)
            lost += len(unreadable)
            _check_lost(lost, self.samples, unreadable, whole_batch=len(labels) == 0)
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _planned(self, plan: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
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

    def _start(self) -> torch.utils.data.DataLoader:
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


def _begun(loader: torch.utils.data.DataLoader) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """The loader's next epoch, without torch's signal handler, which raises the news of a dead worker wherever this process
    happens to be, in the middle of a save too. Waiting for a batch tells as well, within 5 seconds and between two steps."""
    handled = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if handled else None
    batches = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return batches


class _Replaceable:
    """Batch sampler of a loader that outlives its epochs. The main process alone asks it, so that a new plan reaches
    workers that are already running."""

    plan: Sequence[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.plan)


class _Transformed(torch.utils.data.Dataset):
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

    def _one(self, index: int, seed: int) -> tuple[Tensor, int] | str:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            return self.transform(self.images.pil(index, self.channels)), int(self.images.labels[index])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return self.images.name(index)


def _check_lost(lost: int, samples: int, last: Sequence[str], *, whole_batch: bool = False) -> None:
    """Unavailable once 1 % of the training images, or a whole batch, cannot be read: a lost disk is not a bad image."""
    if lost > max(_FEW, samples // 100) or (whole_batch and len(last) > _FEW):
        hint = "check that the data is still there and whole; an unfinished run goes on with --resume"
        raise Unavailable(f"{lost} training images cannot be read", where=f"{last[-1]} and others", hint=hint)


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, list[str]]:
    good = [item for item in items if not isinstance(item, str)]
    pixels = torch.stack([item[0] for item in good]) if good else torch.empty(0)  # the loop passes over empty batches
    return pixels, torch.tensor([item[1] for item in good], dtype=torch.long), [i for i in items if isinstance(i, str)]


def _transform(config: dict[str, Any], augment: str | None) -> Any:
    """timm's transform for the data config; ``augment`` None is the evaluation transform."""
    from timm.data import create_transform

    shared = {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}
    shared["input_size"] = tuple(shared["input_size"])
    if augment in (None, "none"):
        crop = {"crop_pct": config.get("crop_pct", 1.0), "crop_mode": config.get("crop_mode", "center")}
        return create_transform(**shared, **crop, is_training=False)
    options: dict[str, Any] = {"train_crop_mode": "rkrc"} if augment != "imagenet" else {}
    flip = 0.0 if augment == "crop" else 0.5
    return create_transform(**shared, is_training=True, hflip=flip, color_jitter=None, **options)  # type: ignore[arg-type]


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's images."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed(seed, epoch)))


def hold(images: Images, config: dict[str, Any], *, training: bool) -> Images:
    """The split as uint8 pixels at the model's input size; unreadable training images are dropped and listed."""
    from timm.data.transforms import str_to_pil_interp

    channels, height, width = config["input_size"]
    if images.pixels is not None and tuple(images.pixels.shape[1:]) == (channels, height, width):
        return images
    resampling = str_to_pil_interp(config["interpolation"])
    side = int(min(height, width) / config.get("crop_pct", 1.0))
    pixels, kept, unreadable = [], [], []
    for index in range(len(images)):
        try:
            image = images.pil(index, channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            if not training:
                where = images.name(index)
                raise UserError("cannot be decoded", where=where, hint="repair or remove this image") from None
            log.warning("%s: cannot be decoded, skipped", images.name(index))
            unreadable.append(images.name(index))
            _check_lost(len(unreadable), len(images), unreadable)
            continue
        if image.size != (width, height):
            ratio = side / min(image.size)
            resized = max(round(image.width * ratio), width), max(round(image.height * ratio), height)
            image = image.resize(resized, resampling)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels.append(torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1))
        kept.append(index)
    if not kept:
        raise UserError("no image can be decoded", where=f"{images.name(0)} and all others", hint="check the data")
    return Images(images.labels[kept], pixels=torch.stack(pixels).contiguous(), unreadable=unreadable)


def _digits() -> DataSet:
    """scikit-learn's 8×8 digits (CC BY 4.0), embedded: 1,297 training and 500 validation images."""
    arrays = load_safetensors((resources.files("csqcli") / "assets" / "digits_data.safetensors").read_bytes())
    pixels, labels = arrays["pixels"], arrays["labels"].long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    everything = Images(labels, pixels=pixels)
    val, train = everything.subset(order[:500]), everything.subset(order[500:])
    return DataSet("digits", [str(digit) for digit in range(10)], val, train, flips=False)


def _folder(root: Path, *, train: bool) -> DataSet:
    where = str(root)
    if not root.is_dir():
        raise UserError(
            "no such folder", where=where, hint="--data takes an image folder, cifar10:DIR, cifar100:DIR or digits"
        )
    val_root = next((root / name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    if val_root is None:
        raise UserError("no validation split", where=where, hint=f"expected one of {', '.join(VALIDATION_NAMES)}/")
    classes = _class_names(val_root)
    val = _list_images(val_root, classes)
    if not train:
        return DataSet(where, classes, val, None)
    train_root = root / "train"
    if not train_root.is_dir():
        raise UserError("no training split", where=where, hint="expected train/")
    train_classes = _class_names(train_root)
    if train_classes != classes:
        odd = sorted(set(train_classes) ^ set(classes))
        raise UserError(
            f"{train_root.name}/ has {len(train_classes)} classes, {val_root.name}/ has {len(classes)} "
            f"(first that differs: {odd[0]})",
            where=where,
        )
    listed = _list_images(train_root, classes)
    if len(classes) == 1:
        hint = "a classifier needs two or more folders of images, one per class"
        raise UserError(f"one class only ({classes[0]})", where=str(train_root), hint=hint)
    return DataSet(where, classes, val, listed)


def _class_names(root: Path) -> list[str]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not names:
        raise UserError("no class folders", where=str(root), hint="expected one folder of images per class")
    return names


def _list_images(root: Path, classes: list[str]) -> Images:
    index = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(str(root), class_to_idx=index, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise UserError("no images", where=str(root), hint=f"looked for {', '.join(IMG_EXTENSIONS)}")
    return Images(torch.tensor([label for _, label in samples]), paths=[path for path, _ in samples])


def _cifar(kind: str, root: Path) -> DataSet:
    inner = root / ("cifar-10-batches-py" if kind == "cifar10" else "cifar-100-python")
    root = inner if inner.is_dir() else root
    if kind == "cifar10":
        train_names, test_names = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
        label_key, meta_name, names_key = "labels", "batches.meta", "label_names"
    else:
        train_names, test_names = ["train"], ["test"]
        label_key, meta_name, names_key = "fine_labels", "meta", "fine_label_names"
    train, val = (_cifar_batches(root, names, label_key) for names in (train_names, test_names))
    count = int(max(train.labels.max(), val.labels.max())) + 1
    classes = [str(number) for number in range(count)]
    if (root / meta_name).is_file():
        classes = [str(name) for name in _read_cifar_pickle(root / meta_name).get(names_key, classes)]
    return DataSet(f"{kind}:{root}", classes, val, train)


def _cifar_batches(root: Path, names: list[str], label_key: str) -> Images:
    pixels, labels = [], []
    for name in names:
        batch = _read_cifar_pickle(root / name)
        try:
            pixels.append(torch.from_numpy(np.array(batch["data"], dtype=np.uint8)).view(-1, 3, 32, 32))
            labels.append(torch.tensor(batch[label_key], dtype=torch.long))
        except (KeyError, ValueError, RuntimeError, TypeError):
            raise UserError("not a CIFAR python batch", where=str(root / name)) from None
    return Images(torch.cat(labels), pixels=torch.cat(pixels))


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's batches are pickles; this reader builds NumPy arrays and nothing else."""

    allowed = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        if name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # its module's name differs between NumPy 1 and 2
        return super().find_class(module, name)


def _read_cifar_pickle(path: Path) -> dict[str, Any]:
    try:
        raw = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except OSError:
        raise UserError("no such file", where=str(path), hint="give the folder of the CIFAR python batches") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"not a CIFAR python batch ({error})", where=str(path)) from None
    if not isinstance(raw, dict):
        raise UserError("not a CIFAR python batch", where=str(path))
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in raw.items()}
