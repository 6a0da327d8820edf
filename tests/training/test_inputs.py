"""A resumed run has the inputs of its start, or says by name what is not the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from csqcli.data.splits import DataSet, Images
from csqcli.errors import UserError
from csqcli.recipe.resolve import resolve
from csqcli.system.distributed import Shard
from csqcli.training import inputs
from csqcli.training.loop import Trainer


def test_the_path_of_weights_to_begin_with_is_no_input_but_their_hash_is(tmp_path: Path) -> None:
    images = Images(torch.zeros(2, dtype=torch.long), pixels=torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    data = DataSet("two", ["one"], images, images)

    def asked(path: str, digest: str) -> inputs.Inputs:
        recipe = resolve("digits", {"quantization.target_bits": 2, "model.warm_start": path})
        return inputs.inputs_of(recipe, data, Shard(), source_sha256=digest)

    assert inputs.difference(asked("here.safetensors", "1"), asked("there.safetensors", "1")) == ""
    assert (
        inputs.difference(asked("here.safetensors", "1"), asked("here.safetensors", "2"))
        == "was started from another file"
    )


def test_a_setting_that_a_later_version_has_and_that_is_unset_is_no_difference() -> None:
    images = Images(torch.zeros(2, dtype=torch.long), pixels=torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    data = DataSet("two", ["one"], images, images)
    now = inputs.inputs_of(resolve("digits", {"quantization.target_bits": 2}), data, Shard())
    earlier = now.model_copy(update={"settings": {k: v for k, v in now.settings.items() if k != "finetune.staged_lr"}})
    assert now.settings["finetune.staged_lr"] is None
    assert inputs.difference(earlier, now) == ""
    other = now.model_copy(update={"settings": earlier.settings | {"finetune.staged_lr": 0.5}})
    assert "finetune.staged_lr unset then, 0.5 now" in inputs.difference(earlier, other)


@pytest.fixture
def stopped(csq, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A run on an image folder, stopped after its first epoch; call it to resume with further arguments: (code, stderr)."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    from csqcli.models.networks import digits_cnn

    save_file(digits_cnn(num_classes=2).state_dict(), tmp_path / "weights.safetensors")
    arguments = [
        *("search", "digits_cnn", "--checkpoint", "weights.safetensors", "--data", "images", "--target-bits", 2),
        *("--epochs", 2, "--distill", 0.5, "-o", "run", "-q"),
    ]
    original = Trainer.run_epoch

    def once(self: Trainer, epoch: int, **more: object) -> dict:
        if epoch == 1:
            raise KeyboardInterrupt
        return original(self, epoch, **more)

    monkeypatch.setattr(Trainer, "run_epoch", once)
    assert csq(*arguments)[0] == 130
    monkeypatch.setattr(Trainer, "run_epoch", original)

    def resume(*more: object) -> tuple[int, str]:
        code, _, err = csq(*arguments, "--resume", *more)
        return code, err

    return resume


def change_an_image(root: Path) -> None:
    Image.new("RGB", (9, 9)).save(root / "images" / "train" / "dark" / "0.png")


def add_an_image(root: Path) -> None:
    shutil.copy(root / "images" / "val" / "dark" / "0.png", root / "images" / "val" / "dark" / "9.png")


def rename_an_image(root: Path) -> None:
    (root / "images" / "val" / "dark" / "0.png").rename(root / "images" / "val" / "dark" / "9.png")


def rename_a_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / "images" / split / "dark").rename(root / "images" / split / "darker")


def train_the_checkpoint_on(root: Path) -> None:
    state = load_file(root / "weights.safetensors")
    save_file(
        {name: value + 1 if name == "fc.bias" else value for name, value in state.items()}, root / "weights.safetensors"
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (change_an_image, "was started on other training images (their names, sizes or order differ)"),
        (add_an_image, "was started on 6 validation images, now there are 7"),
        (rename_an_image, "was started on other validation images (their names, sizes or order differ)"),
        (rename_a_class, "was started on other classes (2 then, 2 now)"),
        (train_the_checkpoint_on, "was started from another checkpoint"),
    ],
)
def test_what_changed_is_refused_by_name(stopped, tmp_path: Path, change: Callable, complaint: str) -> None:
    state = (tmp_path / "run" / "resume.pt").read_bytes()
    change(tmp_path)
    code, err = stopped()
    hint = "resume with what it was started with, or pass --force to start over"
    assert (code, err) == (2, f"csq: error: run: {complaint}; {hint}\n")
    assert (tmp_path / "run" / "resume.pt").read_bytes() == state


def test_settings_that_changed_are_named(stopped) -> None:
    code, err = stopped("--seed", 5, "--lr", 0.5)
    assert code == 2
    assert "was started with other settings (optimizer.lr unset then, 0.5 now; seed 0 then, 5 now)" in err


def test_the_same_place_in_another_spelling_goes_on_and_a_copy_is_another_place(stopped, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    code, err = stopped("--data", "copy")
    assert (code, "data.source" in err) == (2, True)
    assert stopped("--data", "./images/", "--checkpoint", tmp_path / "weights.safetensors")[0] == 0


def test_what_may_change_the_last_bits_is_a_warning(stopped, caplog) -> None:
    assert stopped("--set", "device=cpu")[0] == 0
    assert caplog.messages == []
    then, now = (
        inputs.inputs_of(resolve("digits", {}), _two_images(), Shard()).model_copy(
            update={"torch": version, "threads": 2}
        )
        for version in ("1.0", "2.0")
    )
    inputs.warn_of_last_bits(then, now)
    assert caplog.messages == [
        "torch 1.0 then, 2.0 now: the result may differ in its last bits from that of an unbroken run"
    ]


def test_a_run_of_several_processes_goes_on_with_as_many() -> None:
    then, now = (inputs.inputs_of(resolve("digits", {}), _two_images(), Shard(0, world)) for world in (2, 1))
    with pytest.raises(UserError, match="run: was started with 2 processes, now there are 1"):
        inputs.check_same(then, now, where="run")


def _two_images() -> DataSet:
    images = Images(torch.tensor([0, 1]), pixels=torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    return DataSet("two", ["a", "b"], images, images)


def test_a_finished_run_is_what_its_report_says_or_an_error(csq, tmp_path: Path) -> None:
    arguments = (
        "search",
        "--recipe",
        "digits",
        "--target-bits",
        2,
        "--epochs",
        1,
        "--set",
        "max_steps=1",
        "-q",
        "-o",
        tmp_path,
    )
    assert csq(*arguments)[0] == 0
    assert csq(*arguments, "--resume")[0] == 0
    code, _, err = csq(*arguments, "--resume", "--seed", 3)
    assert (code, "was started with other settings (seed 0 then, 3 now)" in err) == (2, True)
    model = tmp_path / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, err = csq(*arguments, "--resume")
    assert code == 2
    assert "is not the model that this run wrote: its SHA-256 is not that in report.json; put it back" in err
    model.write_bytes(whole)
    assert csq(*arguments, "--resume")[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["inputs"]["torch"] == torch.__version__
