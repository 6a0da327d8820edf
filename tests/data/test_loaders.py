"""Batches: damaged images, workers, and order that depends on seed and epoch alone."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
from pathlib import Path

import pytest
import torch
from timm.data import create_transform

from csqcli.data.loaders import Loader, LoaderSettings, Unavailable, make_loader, permutation, stream_seed
from csqcli.data.specs import open_data
from csqcli.data.splits import DataSet, Images
from csqcli.data.transforms import choose_augment
from csqcli.errors import UserError
from csqcli.models.networks import CIFAR_CONFIG, DIGITS_CONFIG
from csqcli.system.distributed import Shard

LARGE = {"input_size": (3, 72, 72), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 0.9}


@pytest.mark.parametrize("config", [CIFAR_CONFIG, LARGE], ids=["in memory", "streamed"])
def test_a_corrupt_training_image_is_skipped_and_counted(image_folder: Path, config: dict, caplog) -> None:
    (image_folder / "train" / "dark" / "1.png").write_bytes(b"not an image")
    opened = open_data(str(image_folder))
    loader = make_loader(opened.train, config, LoaderSettings(training=True, batch_size=4, augment="crop-flip"))
    seen = sum(len(labels) for _, labels in loader.epoch(0))
    assert loader.skipped == 1
    assert seen in (8, 11)  # held: 11 images make 2 full batches; streamed: 3 batches, one image short
    assert "1.png: cannot be decoded (not an image by its content), skipped" in caplog.text


@pytest.mark.parametrize("config", [CIFAR_CONFIG, LARGE], ids=["in memory", "streamed"])
def test_a_lost_disk_is_not_a_few_bad_images(image_folder: Path, config: dict) -> None:
    opened = open_data(str(image_folder))
    for path in opened.train.paths[:11]:  # of 12; up to 10 are passed over
        Path(path).unlink()
    settings = LoaderSettings(training=True, batch_size=4)
    with pytest.raises(Unavailable, match="11 training images cannot be read"):
        list(make_loader(opened.train, config, settings).epoch(0))


@pytest.mark.parametrize("config", [CIFAR_CONFIG, LARGE], ids=["in memory", "streamed"])
def test_a_corrupt_validation_image_is_an_error_that_names_it(image_folder: Path, config: dict) -> None:
    (image_folder / "val" / "dark" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    opened = open_data(str(image_folder))
    with pytest.raises(UserError, match=r"dark/0.png: cannot be decoded"):
        list(make_loader(opened.val, config, LoaderSettings(training=False, batch_size=4)).epoch(0))


class Ended:
    """Garbage that says in which process it was collected."""

    def __init__(self, told: Path) -> None:
        self.told, self.itself = told, self

    def __del__(self) -> None:
        with self.told.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_workers_collect_nothing_that_they_inherit(image_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A session of onnxruntime that a worker ends waits for threads which were not forked."""
    whole, told = Images.pil, tmp_path / "told"

    def collecting(self: Images, index: int, channels: int):
        gc.collect()
        return whole(self, index, channels)

    monkeypatch.setattr(Images, "pil", collecting)
    settings = LoaderSettings(training=True, batch_size=4, augment="imagenet", workers=1)
    loader = make_loader(open_data(str(image_folder)).train, LARGE, settings)
    gc.disable()
    try:
        Ended(told)
        assert len(list(loader.epoch(0))) == 3
    finally:
        loader.close()
        gc.enable()
    gc.collect()
    assert told.read_text().split() == [str(os.getpid())]
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("config", [CIFAR_CONFIG, LARGE], ids=["in memory", "streamed"])
def test_batches_are_a_function_of_seed_and_epoch_alone(image_folder: Path, config: dict) -> None:
    opened = open_data(str(image_folder))

    def batches(epoch: int, seed: int = 1, workers: int = 0) -> list[torch.Tensor]:
        augment = "imagenet" if config is LARGE else "crop-flip"
        loader = make_loader(
            opened.train,
            config,
            LoaderSettings(training=True, batch_size=4, augment=augment, seed=seed, workers=workers),
        )
        return [images for images, _ in loader.epoch(epoch)]

    torch.manual_seed(5)
    first = batches(3)
    torch.manual_seed(6)  # the model's own stream must not matter, nor be disturbed
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, batches(3, workers=2), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first[0], batches(4)[0])
    assert not torch.equal(first[0], batches(3, seed=2)[0])


def streamed(folder: Path, *, workers: int, batch_size: int = 2) -> Loader:
    """A loader of the folder's 12 training images."""
    settings = LoaderSettings(training=True, batch_size=batch_size, augment="imagenet", workers=workers)
    return make_loader(open_data(str(folder)).train, LARGE, settings)


def worker_pids() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


def same_batches(found: list, wanted: list) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_the_same_workers_serve_every_epoch_until_the_loader_is_closed(image_folder: Path) -> None:
    loader = streamed(image_folder, workers=2)
    list(loader.epoch(0))
    first = worker_pids()
    list(loader.epoch(1))
    assert worker_pids() == first
    assert len(first) == 2
    loader.close()
    assert not worker_pids()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_early_leaves_nothing_to_the_next(image_folder: Path, workers: int) -> None:
    fresh = [list(streamed(image_folder, workers=0).epoch(epoch)) for epoch in range(3)]
    loader = streamed(image_folder, workers=workers)
    left = loader.epoch(0)
    assert same_batches([next(left)], fresh[0][:1])
    assert same_batches(list(loader.epoch(1)), fresh[1])
    assert same_batches(list(itertools.islice(loader.epoch(2), 4)), fresh[2][:4])
    assert same_batches(list(loader.epoch(2, 3)), fresh[2][3:])
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_of_one_loader_never_mix(image_folder: Path, workers: int) -> None:
    wanted = list(streamed(image_folder, workers=0).epoch(1))
    loader = streamed(image_folder, workers=workers)
    first, second = loader.epoch(0), loader.epoch(1)
    next(first)
    begun = [next(second)]
    with pytest.raises(RuntimeError, match="another epoch of this loader was begun"):
        next(first)
    assert same_batches(begun + list(second), wanted)
    loader.close()


def test_a_dead_worker_ends_its_epoch_and_the_next_has_new_ones(image_folder: Path) -> None:
    loader = streamed(image_folder, workers=1)
    epoch = loader.epoch(0)
    next(epoch)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()  # nothing is raised here, outside the loader
    with pytest.raises(Unavailable, match="a loader process died"):
        list(epoch)
    assert not worker_pids()
    assert same_batches(list(loader.epoch(1)), list(streamed(image_folder, workers=0).epoch(1)))
    loader.close()


def test_padded_crops_are_shifted_copies() -> None:
    pixels = torch.randint(0, 255, (32, 1, 8, 8), dtype=torch.uint8)
    images = Images(torch.zeros(32, dtype=torch.long), pixels=pixels)
    loader = make_loader(images, DIGITS_CONFIG, LoaderSettings(training=True, batch_size=32, augment="crop", seed=3))
    cropped, _ = next(iter(loader.epoch(0)))
    plain = (pixels.float() / 255 - DIGITS_CONFIG["mean"][0]) / DIGITS_CONFIG["std"][0]
    order = permutation(32, 3, 0)
    for image, source in zip(cropped, plain[order], strict=True):
        centre = image[0, 2:6, 2:6]
        shifts = [source[0, 2 + dy : 6 + dy, 2 + dx : 6 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert min(float((centre - shift).abs().max()) for shift in shifts) < 1e-4


def test_imagenet_crops_of_small_images_are_those_of_timm(image_folder: Path) -> None:
    train = open_data(str(image_folder)).train
    config = LARGE | {"input_size": (3, 64, 64)}

    def batch(augment: str) -> torch.Tensor:
        settings = LoaderSettings(training=True, batch_size=12, augment=augment, seed=4)
        return next(iter(make_loader(train, config, settings).epoch(0)))[0]

    cropped = batch("imagenet")
    transform = create_transform(
        (3, 64, 64), is_training=True, color_jitter=None, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    for found, index in zip(cropped, permutation(12, 4, 0).tolist(), strict=True):
        torch.manual_seed(stream_seed(4, 0, index))
        random.seed(stream_seed(4, 0, index))
        assert torch.equal(found, transform(train.pil(index, 3)))
    assert not torch.equal(cropped, batch("crop-flip"))


def test_imagenet_crops_mirror_no_digits() -> None:
    ramp = torch.arange(0, 256, 16, dtype=torch.uint8).expand(40, 1, 16, 16)  # brighter to the right in every crop
    images = Images(torch.zeros(40, dtype=torch.long), pixels=ramp.contiguous())
    mirrored = {}
    for flips in (True, False):
        data = DataSet("ramps", ["ramp"], images, images, flips=flips)
        augment = choose_augment("imagenet", data, DIGITS_CONFIG)
        settings = LoaderSettings(training=True, batch_size=40, augment=augment)
        batch, _ = next(iter(make_loader(images, DIGITS_CONFIG, settings).epoch(0)))
        mirrored[flips] = int((batch[..., -1].mean((1, 2)) < batch[..., 0].mean((1, 2))).sum())
    assert mirrored[False] == 0
    assert 8 < mirrored[True] < 32


def test_imagenet_crops_of_images_of_four_channels_are_refused() -> None:
    images = Images(torch.zeros(4, dtype=torch.long), pixels=torch.zeros(4, 4, 8, 8, dtype=torch.uint8))
    config = {"input_size": (4, 8, 8), "mean": (0.5,) * 4, "std": (0.5,) * 4, "interpolation": "bilinear"}
    make_loader(images, config, LoaderSettings(training=True, batch_size=4, augment="crop"))
    with pytest.raises(UserError, match="the model takes images of 4 channels"):
        make_loader(images, config, LoaderSettings(training=True, batch_size=4, augment="imagenet"))


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_small_images_are_evaluated_at_the_crop_mode_of_the_model(mode: str) -> None:
    draws = torch.Generator().manual_seed(2)
    for height, width in ((48, 100), (90, 64), (32, 32)):
        pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=draws)
        images = Images(torch.zeros(2, dtype=torch.long), pixels=pixels)
        config = LARGE | {"input_size": (3, 32, 32), "crop_mode": mode}
        (batch, _), *_ = make_loader(images, config, LoaderSettings(training=False, batch_size=2)).epoch(0)
        transform = create_transform(
            (3, 32, 32), crop_pct=0.9, crop_mode=mode, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
        )
        wanted = torch.stack([transform(images.pil(index, 3)) for index in range(2)])
        torch.testing.assert_close(batch, wanted, rtol=0, atol=1e-6)


def test_limits_keep_every_class() -> None:
    limited = open_data("digits", train_limit=100)
    assert len(limited.train) == 100
    images = Images(torch.arange(10).repeat_interleave(50), paths=["x"] * 500)
    assert set(images.limited(20).labels.tolist()) == set(range(10))


@pytest.mark.parametrize("config", [CIFAR_CONFIG, LARGE], ids=["in memory", "streamed"])
def test_the_batches_of_all_processes_make_up_the_global_batch(image_folder: Path, config: dict) -> None:
    opened = open_data(str(image_folder))

    def batches(batch_size: int, shard: Shard, start: int = 0) -> list[torch.Tensor]:
        settings = LoaderSettings(training=True, batch_size=batch_size, augment="crop-flip", seed=1, shard=shard)
        return [images for images, _ in make_loader(opened.train, config, settings).epoch(2, start)]

    whole = batches(4, Shard())
    first, second = batches(2, Shard(0, 2)), batches(2, Shard(1, 2))
    assert len(whole) == len(first) == len(second) == 3
    for together, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(together, torch.cat([a, b]))
    assert all(torch.equal(a, b) for a, b in zip(batches(4, Shard(), start=1), whole[1:], strict=True))


def test_the_validation_shares_of_all_processes_are_the_whole_set_once() -> None:
    val = open_data("digits").val
    counts = torch.zeros(10, dtype=torch.long)
    for rank in range(3):
        settings = LoaderSettings(training=False, batch_size=64, shard=Shard(rank, 3))
        for _, labels in make_loader(val, DIGITS_CONFIG, settings).epoch(0):
            counts += labels.bincount(minlength=10)
    assert torch.equal(counts, val.labels.bincount(minlength=10))
