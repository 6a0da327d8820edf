"""The main job as people have it: an ImageNet checkpoint, and photographs in folders that are named by WordNet ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from csqcli.file import header

FOLDERS = {
    "n01440764": 60,
    "n03028079": 128,
    "n03888257": 200,
}  # tench, church, parachute; and how bright they are here
OUTPUTS = [0, 497, 701]
NAMES = {"n01440764": "tench", "n03028079": "church", "n03888257": "parachute"}
MODEL = "timm:test_efficientnet"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 8), ("val", 4)):
        for name, level in FOLDERS.items():
            for called in (name, NAMES[name]):
                folder = root / ("by-id" if called == name else "by-name") / split / called
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(level - 40, level + 40, (40, 40, 3)).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), root / "imagenet.safetensors")
    return root


@pytest.fixture
def search(csq, photographs: Path, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    def run(*options: object) -> tuple[Path, str]:
        code, _, err = csq(
            *("search", MODEL, "--checkpoint", photographs / "imagenet.safetensors", "--data", photographs / "by-id"),
            *("--target-bits", 3, "--epochs", 1, "--batch-size", 12, "-o", tmp_path / "run"),
            *("--set", "data.input_size=64", "--set", "data.workers=0", "--set", "threads=1", *options),
        )
        assert code == 0, err
        return tmp_path / "run" / "model.safetensors", err

    return run


def test_photographs_are_rounded_without_training_after_an_epoch_in_float(search) -> None:
    file, _ = search("--recipe", "photographs", "--epochs", 0, "--set", "ptq.images=12", "--head", "subset")
    manifest = header.read_manifest(file)
    assert manifest.recipe["quantization"]["method"] == "ptq"
    assert manifest.recipe["adaptation"]["epochs"] == 1


def measured(csq, *words: object) -> dict[str, Any]:
    code, out, err = csq("evaluate", *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_kept_head_maps_labels_the_same_way_in_every_command(csq, photographs: Path, search, tmp_path: Path) -> None:
    file, err = search("--head", "keep")
    assert "labels mapped into its 1000 outputs" in err
    manifest = header.read_manifest(file)
    assert (manifest.model.num_classes, manifest.trained_outputs) == (1000, OUTPUTS)
    assert [manifest.classes[output] for output in OUTPUTS] == list(FOLDERS)
    by_id = measured(csq, file, "--data", photographs / "by-id")
    assert by_id["top1_present"] >= by_id["top1"]
    assert by_id["top1_present"] == manifest.accuracy.hard_top1_present
    assert by_id["top1"] == manifest.accuracy.hard_top1
    measured(csq, file, "--data", photographs / "by-name")  # the same classes under ImageNet's names

    exported = tmp_path / "exported.safetensors"
    code, out, err = csq("export", file, "--bit-packed", "-o", exported, "--data", photographs / "by-id")
    assert code == 0, err
    assert f"{manifest.accuracy.hard_top1:.2f} % of 12 images" in out

    tuned = ("finetune", exported, "--epochs", 1, "--set", "data.workers=0", "-q", "-o", tmp_path / "tuned", "--data")
    code, _, err = csq(*tuned, photographs / "by-id")
    assert code == 0, err
    assert header.read_manifest(tmp_path / "tuned" / "model.safetensors").trained_outputs == OUTPUTS


def test_a_finetune_of_a_kept_head_wants_all_classes_that_it_was_trained_on(
    csq, photographs: Path, search, tmp_path: Path
) -> None:
    file, _ = search("--head", "keep")
    for split in ("train", "val"):
        for name in list(FOLDERS)[:2]:
            (tmp_path / "two" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "two" / split / name).symlink_to(photographs / "by-id" / split / name)
    code, _, err = csq("finetune", file, "--data", tmp_path / "two", "-o", tmp_path / "tuned", "-q")
    assert (code, err.count("\n")) == (2, 1)
    assert "the model has 3 classes" in err
    assert measured(csq, file, "--data", tmp_path / "two")["samples"] == 8  # evaluating on fewer is fine


def test_a_subset_has_the_data_s_classes_only(csq, photographs: Path, search) -> None:
    file, err = search("--head", "subset")
    assert "kept 3 of the head's 1000 outputs" in err
    manifest = header.read_manifest(file)
    assert (manifest.model.num_classes, manifest.classes, manifest.trained_outputs) == (3, list(FOLDERS), None)
    assert measured(csq, file, "--data", photographs / "by-id")["top1_present"] is None


def test_a_float_checkpoint_is_evaluated_among_all_classes_and_among_those_present(csq, photographs: Path) -> None:
    words = (photographs / "imagenet.safetensors", "--model", MODEL, "--input-size", 64)
    by_id = measured(csq, *words, "--data", photographs / "by-id")
    assert (by_id["samples"], by_id["mean_bits"]) == (12, 32.0)
    # by hand: the same network and pixels, the three scores compared
    from csqcli.data.loaders import LoaderSettings, make_loader
    from csqcli.data.specs import open_data
    from csqcli.models import libraries
    from csqcli.models.checkpoints import read_checkpoint

    loaded = libraries.load(
        MODEL, num_classes=1000, checkpoint=read_checkpoint(str(photographs / "imagenet.safetensors"))
    )
    config = loaded.data_config | {"input_size": (3, 64, 64)}
    settings = LoaderSettings(training=False, batch_size=12)
    images, labels = next(iter(make_loader(open_data(str(photographs / "by-id")).val, config, settings).epoch(0)))
    with torch.no_grad():
        scores = loaded.model.eval()(images)
    right = (scores[:, OUTPUTS].argmax(1) == labels).float().mean()
    assert by_id["top1_present"] == pytest.approx(100 * float(right))
    everywhere = (scores.argmax(1) == torch.tensor(OUTPUTS)[labels]).float().mean()
    assert by_id["top1"] == pytest.approx(100 * float(everywhere))


def test_evaluate_says_what_lacks(csq, photographs: Path, image_folder: Path) -> None:
    weights = photographs / "imagenet.safetensors"
    for words, wanted in (
        (("--data", image_folder), "no run or file given; name one that csq wrote, or a float model by --model"),
        ((weights, "--model", MODEL), "no data given; pass --data FOLDER"),
        ((weights, "--model", MODEL, "--data", image_folder), "imagenet.safetensors: the weights have 1000 outputs, "),
        ((weights, "--data", image_folder), "not a csq file"),
    ):  # fmt: skip
        code, _, err = csq("evaluate", *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert wanted in err
