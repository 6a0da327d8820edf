"""The data sources that csq brings along: folders of images, CIFAR, digits."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from csqcli.data.loaders import LoaderSettings, make_loader
from csqcli.data.specs import open_data
from csqcli.errors import UserError
from csqcli.models.networks import CIFAR_CONFIG


def test_digits_are_1297_and_500_images_of_every_class() -> None:
    digits = open_data("digits")
    assert (len(digits.train), len(digits.val), digits.num_classes) == (1297, 500, 10)
    assert set(digits.val.labels.tolist()) == set(range(10))


def test_a_folder_is_read_in_class_order(image_folder: Path) -> None:
    opened = open_data(str(image_folder))
    assert opened.classes == ["bright", "dark"]
    assert opened.val.labels.tolist() == [0] * 3 + [1] * 3
    loader = make_loader(opened.val, CIFAR_CONFIG, LoaderSettings(training=False, batch_size=4))
    images = torch.cat([x for x, _ in loader.epoch(0)])
    assert images.shape == (6, 3, 32, 32)
    assert images[:3].mean() > 0.5 > images[3:].mean()


def write_cifar(root: Path, names: list[str], label_key: str, count: int = 8) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        batch = {
            b"data": rng.integers(0, 255, (count, 3072), dtype=np.uint8),
            label_key.encode(): rng.integers(0, 10, count).tolist(),
        }
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar_python_batches_are_read(tmp_path: Path) -> None:
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    write_cifar(inner, [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "labels")
    opened = open_data(f"cifar10:{tmp_path}")
    assert (len(opened.train), len(opened.val)) == (40, 8)
    assert opened.train.pixels.shape == (40, 3, 32, 32)
    hundred = tmp_path / "cifar100"
    hundred.mkdir()
    write_cifar(hundred, ["train", "test"], "fine_labels")
    assert len(open_data(f"cifar100:{hundred}").train) == 8


def test_a_cifar_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(UserError, match=r"not a CIFAR python batch .*print is not allowed"):
        open_data(f"cifar10:{tmp_path}")
    assert "executed" not in capsys.readouterr().out


def test_missing_and_empty_splits_are_named(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_data(str(tmp_path / "nowhere"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no class folders; expected one folder of images per class"):
        open_data(str(tmp_path / "bare"))
    (tmp_path / "bare" / "val" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="no images"):
        open_data(str(tmp_path / "bare"))
    (image_folder / "val" / "third").mkdir()
    shutil.copy(image_folder / "val" / "dark" / "0.png", image_folder / "val" / "third")
    with pytest.raises(UserError, match=r"train/ has 2 classes, val/ has 3 \(first that differs: third\)"):
        open_data(str(image_folder))


def test_splits_below_a_class_are_an_error_and_never_mixed_into_it(tmp_path: Path, image_folder: Path) -> None:
    for split in ("train", "val"):
        for label in ("dark", "bright"):
            shutil.copytree(image_folder / split / label, tmp_path / "turned" / label / f"{split}_images")
    turned = re.escape("class folder bright/ holds train_images/, which is called like a split")
    with pytest.raises(UserError, match=rf"{turned}.*; move its images to train_images/bright/, or give a CSV"):
        open_data(str(tmp_path / "turned"), val_split=0.5)
    shutil.move(image_folder, tmp_path / "several" / "a" / "images")
    shutil.copytree(tmp_path / "several" / "a" / "images", tmp_path / "several" / "b")
    for source in (tmp_path / "several", f"folder:{tmp_path / 'several'}"):
        with pytest.raises(UserError, match=r"class folder a/ holds images/train/, .* pass --data .*/several/a/images"):
            open_data(str(source), val_split=0.5)
    assert len(open_data(str(tmp_path / "several" / "a")).train) == 12
    archive = shutil.make_archive(str(tmp_path / "several"), "zip", tmp_path / "several")
    with pytest.raises(
        UserError, match=r"class folder a/ holds images/train/, .* pack the folders of one data set alone"
    ):
        open_data(archive, val_split=0.5)


def test_folders_below_a_class_that_are_called_otherwise_are_part_of_it(image_folder: Path) -> None:
    shutil.move(image_folder / "train" / "dark", image_folder / "train" / "night")
    shutil.move(image_folder / "train" / "night", image_folder / "train" / "dark" / "night")
    assert len(open_data(str(image_folder)).train) == 12


def test_a_csv_beside_images_without_class_folders_is_pointed_at(image_folder: Path) -> None:
    flat = image_folder / "train"
    shutil.rmtree(flat / "bright")
    (flat / "labels.csv").write_text("path,label\n")
    with pytest.raises(UserError, match=r"one class only \(dark\); .*: --data .*/train/labels.csv"):
        open_data(str(flat), val_split=0.5)
    with pytest.raises(UserError, match=r"no class folders; expected one folder of images per class"):
        open_data(str(flat / "dark"), val_split=0.5)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_as_class_folders_is_no_batches(image_folder: Path, kind: str) -> None:
    with pytest.raises(UserError, match=f"holds images, not CIFAR's python batches; drop `{kind}:` and pass --data"):
        open_data(f"{kind}:{image_folder}")


def test_hidden_and_empty_folders_are_no_classes_and_said_to_be_none(image_folder: Path, caplog) -> None:
    for name in (".ipynb_checkpoints", ".thumbnails"):
        for split in ("train", "val"):
            shutil.copytree(image_folder / split / "dark", image_folder / split / name)
    shutil.copytree(image_folder / "train" / "dark", image_folder / "train" / "dark" / ".ipynb_checkpoints")
    (image_folder / "train" / "zebra").mkdir()
    (image_folder / "val" / "zebra").mkdir()
    opened = open_data(str(image_folder))
    assert opened.classes == ["bright", "dark"]
    assert (len(opened.train), len(opened.val)) == (12, 6)
    assert caplog.messages == [
        f"2 folders hold no images and are no classes (first: {image_folder / 'train' / 'zebra'})"
    ]


def test_hidden_images_are_passed_over_and_counted(image_folder: Path, caplog) -> None:
    one = next((image_folder / "train" / "dark").iterdir())
    for name in (f".{one.name}", f"._{one.name}"):  # an editor's or a copying program's, and macOS'
        shutil.copyfile(one, one.with_name(name))
    assert len(open_data(str(image_folder)).train) == 12
    assert caplog.messages == ["1 hidden image passed over (the name begins with a dot)"]


@pytest.mark.parametrize(("lacking", "kind"), [("train", "training"), ("val", "validation")])
def test_a_class_with_images_in_one_split_only_is_an_error(image_folder: Path, lacking: str, kind: str) -> None:
    for split in ("train", "val"):
        shutil.copytree(image_folder / split / "dark", image_folder / split / "zebra")
    for path in (image_folder / lacking / "zebra").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"class `zebra` has no {kind} images; add some to .*{lacking}/zebra"):
        open_data(str(image_folder))


def test_files_that_are_passed_over_are_counted_and_named_in_one_line(image_folder: Path, caplog) -> None:
    for name in ("b.heic", "a.HEIC", "notes.txt", "noise", ".DS_Store", "Thumbs.db", "._0.png"):
        (image_folder / "train" / "dark" / name).write_bytes(b"x")
    opened = open_data(str(image_folder))
    assert len(opened.train) == 12
    first = image_folder / "train" / "dark" / "a.HEIC"
    assert caplog.messages == [f"4 files passed over: 2 .heic, 1 without suffix, 1 .txt (first: {first})"]


def test_a_folder_of_other_files_only_says_which_they_are(image_folder: Path) -> None:
    for path in (image_folder / "val").rglob("*.png"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"val: no images; looked for .jpg, .*: 6 .heic \(first: .*bright/0.heic\)"):
        open_data(str(image_folder), train=False)


def test_the_order_of_images_is_torchvision_s(image_folder: Path) -> None:
    from torchvision.datasets import ImageFolder

    nested = image_folder / "train" / "dark" / "more" / "deep"
    nested.mkdir(parents=True)
    for name in ("B.JPEG", "a.png", "10.png", "9.webp"):
        shutil.copy(image_folder / "val" / "dark" / "0.png", nested / name)
    wanted = ImageFolder(str(image_folder / "train")).samples
    train = open_data(str(image_folder)).train
    assert list(zip(train.paths, train.labels.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("name", ["no\u00a0break", "\u3000wide", "zwj\u200d", "zwnj\u200c", "soft\u00adhyphen", "日本"])
def test_class_names_in_any_script_are_fine(image_folder: Path, name: str) -> None:
    for split in ("train", "val"):
        (image_folder / split / "dark").rename(image_folder / split / name)
    assert name in open_data(str(image_folder)).classes


@pytest.mark.parametrize(
    "name", [b"bell\x07", b"line\nbreak", "bidi\u202eoverride".encode(), "isolate\u2066".encode(), b"latin-1 \xe9"]
)
def test_class_names_that_cannot_be_stored_are_refused_before_training(image_folder: Path, name: bytes) -> None:
    for split in ("train", "val"):
        (image_folder / split / "dark").rename(image_folder / split / os.fsdecode(name))
    with pytest.raises(UserError, match="holds control characters or bytes that are not UTF-8; rename it") as caught:
        open_data(str(image_folder))
    assert caught.value.line().isprintable()


def test_a_data_path_that_is_not_utf_8_is_refused_before_training(image_folder: Path) -> None:
    image_folder = image_folder.rename(image_folder.with_name(os.fsdecode(b"latin-1 \xe9")))
    with pytest.raises(UserError, match="not UTF-8; rename the folder"):
        open_data(str(image_folder))


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [([0, 1, 100], r"outside 0 to 99"), ([0, -1, 2], "outside 0 to 99"), ([0, 1], "2 labels for 3 images")],
)
def test_cifar_labels_that_cannot_be_are_refused(tmp_path: Path, labels: list[int], complaint: str) -> None:
    for name in ("train", "test"):
        batch = {b"data": np.zeros((3, 3072), np.uint8), b"fine_labels": labels}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError, match=complaint):
        open_data(f"cifar100:{tmp_path}")
