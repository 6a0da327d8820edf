"""The training loop's options: what they may change, and what they may not."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import plain_models
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from csqcli import pipeline
from csqcli.data.loaders import Unavailable
from csqcli.errors import UserError
from csqcli.file import io
from csqcli.quant.methods.staged import Staged
from csqcli.recipe.resolve import resolve
from csqcli.system import memory
from csqcli.system.progress import Display
from csqcli.training.evaluate import BrokenScores
from csqcli.training.loop import Trainer


def run(output: Path, display: Display | None = None, *, resume: bool = False, **overrides: Any) -> io.QuantizedFile:
    shared = {
        "model.source": "plain_models:group_norm_cnn",
        "model.checkpoint": None,
        "model.pretrained": False,
        "quantization.method": "staged",
        "quantization.target_bits": 2.5,
        "epochs": 2,
        "data.train_limit": 256,
        "data.batch_size": 64,
    }
    recipe = resolve("digits", shared | {key.replace("__", "."): value for key, value in overrides.items()})
    pipeline.search(recipe, output, display=display or Display(quiet=True), resume=resume)
    return io.read(output / "model.safetensors")


def differing(one: io.QuantizedFile, two: io.QuantizedFile) -> float:
    """Largest share of a layer's integers that differ."""
    pairs = zip(one.layers, two.layers, strict=True)
    return max(float((a.integers != b.integers).float().mean()) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> io.QuantizedFile:
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_a_batch_of_an_odd_number_is_mixed_but_for_one_image(tmp_path: Path) -> None:
    """Of 99 images a batch of 128 is one of 99."""
    one_step = {"data__train_limit": 99, "data__batch_size": 128, "epochs": 1}
    for name, mixup in (("plain", 0.0), ("mixed", 0.5)):
        run(tmp_path / name, optimizer__mixup=mixup, **one_step)
    losses = [json.loads((tmp_path / name / "metrics.jsonl").read_text())["train_loss"] for name in ("plain", "mixed")]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("micro_batch", [16, 40])
def test_micro_batches_add_up_to_the_batch(micro_batch: int, whole: Any, tmp_path: Path) -> None:
    """A network without BatchNorm sees the same mean gradient, though 64 is no multiple of 40."""
    parts = run(tmp_path / "run", data__micro_batch=micro_batch)
    assert [layer.mask.tolist() for layer in parts.layers] == [layer.mask.tolist() for layer in whole.layers]
    assert differing(parts, whole) < 0.05  # sums in another order flip few roundings


@pytest.mark.parametrize("method", ["staged", "csq", "lsq"])
def test_channels_last_trains_the_same_model(method: str, tmp_path: Path) -> None:
    more = {"quantization__method": method, "quantization__target_bits": 3}
    files = [run(tmp_path / setting, channels_last=setting, **more) for setting in ("on", "off")]
    assert differing(*files) < 0.05
    assert all(layer.integers.is_contiguous() for layer in files[0].layers)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_compiled_run_trains_the_same_model(whole: Any, tmp_path: Path) -> None:
    compiled = run(tmp_path / "run", compile=True)
    assert differing(compiled, whole) < 0.05
    torch._dynamo.reset()


class Listening(Display):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the free memory be what a step on so many images of the runs here takes, and half an image."""
    model, device = plain_models.group_norm_cnn(num_classes=10), torch.device("cpu")
    step = memory.estimate(model, (1, 8, 8), state_bytes=12, amp=False, device=device)
    return lambda images: monkeypatch.setattr(
        memory, "free_bytes", lambda _: step.of(images) + int(step.per_image * 0.5)
    )


def same_integers(one: io.QuantizedFile, two: io.QuantizedFile) -> bool:
    return differing(one, two) == 0 and one.manifest.accuracy == two.manifest.accuracy


@pytest.mark.parametrize(("images", "parts_of"), [(63, 32), (31, 22), (17, 16), (1, 1)])  # of batches of 64
def test_auto_takes_the_fewest_parts_that_fit(room: Any, images: int, parts_of: int, tmp_path: Path) -> None:
    by_hand = run(tmp_path / "hand", data__micro_batch=parts_of, max_steps=1)
    room(images)
    display = Listening()
    auto = run(tmp_path / "auto", display, data__micro_batch="auto", max_steps=1)
    assert same_integers(auto, by_hand)
    (line,) = [line for line in display.said if "images needs" in line]
    assert re.fullmatch(rf"a step on 64 images needs \S+ GiB, \S+ GiB are free: in parts of {parts_of}", line)


def test_auto_leaves_a_batch_whole_that_fits_and_refuses_where_no_image_does(
    room: Any, whole: Any, tmp_path: Path
) -> None:
    room(64)
    display = Listening()
    assert same_integers(run(tmp_path / "run", display, data__micro_batch="auto"), whole)
    assert not [line for line in display.said if "parts" in line]
    room(0)
    with pytest.raises(UserError, match="take a smaller model or a larger machine"):
        run(tmp_path / "none", data__micro_batch="auto")


def test_a_resumed_run_keeps_the_parts_that_auto_found(
    room: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    by_hand = run(tmp_path / "hand", data__micro_batch=22)
    original = Trainer.run_epoch

    def lost(self: Trainer, epoch: int, **more: Any) -> dict[str, Any]:
        if epoch == 1:
            raise Unavailable("the disk is gone")
        return original(self, epoch, **more)

    room(31)
    monkeypatch.setattr(Trainer, "run_epoch", lost)
    with pytest.raises(Unavailable):
        run(tmp_path / "auto", data__micro_batch="auto")
    monkeypatch.setattr(Trainer, "run_epoch", original)
    for free in (0, 64):
        room(free)
        copy = tmp_path / f"resumed{free}"
        shutil.copytree(tmp_path / "auto", copy)
        assert same_integers(run(copy, resume=True, data__micro_batch="auto"), by_hand)


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_the_loader_processes_end_with_the_run(image_folder: Path, tmp_path: Path) -> None:
    more = {"data__source": str(image_folder), "data__input_size": 72, "data__batch_size": 4, "data__workers": 2}
    run(tmp_path / "run", data__train_limit=None, finetune__epochs=1, max_steps=1, **more)
    assert not multiprocessing.active_children()


def test_a_step_that_cannot_fit_is_refused_and_the_advice_fits(tmp_path: Path, monkeypatch: Any) -> None:
    per_image = 4 * (64 + 2 * 16 * 64 + 2 * 32 * 16 + 32)  # image, two tensors of each stage kept, pooled; floats
    monkeypatch.setattr(memory, "free_bytes", lambda device: 200_000 + 20 * per_image)
    with pytest.raises(UserError, match=r"needs about .* --batch-size auto .* micro_batch=(\d+)") as refusal:
        run(tmp_path / "run")
    advised = int(re.search(r"micro_batch=(\d+)", str(refusal.value))[1])
    assert 8 <= advised <= 32
    run(tmp_path / "again", data__micro_batch=advised)


def test_what_does_not_grow_with_the_images_is_counted_once() -> None:
    linear = [torch.nn.Linear(1000, 1000, bias=False) for _ in range(2)]
    model = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1])
    step = memory.estimate(model, (1000,), state_bytes=12, amp=True, device=torch.device("cpu"))
    kept = step.fixed - 16 * 2 * 10**6  # gradients and states of 2 · 10⁶ weights
    assert 2 * 10**6 <= kept <= 3 * 10**6  # the second weight in bfloat16, which the image's gradient needs
    assert 4000 <= step.per_image <= 6000  # image and ReLU's output, [1000] in bfloat16 each
    assert step.most_images(step.of(7)) == 7
    assert step.most_images(step.fixed - 1) == 0


def test_kept_activations_are_counted_once_and_the_model_is_left_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.BatchNorm1d(50), torch.nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    kept = memory.activation_bytes(model, (100,), images=1, amp=False, device=torch.device("cpu"))
    # the image [100] and ReLU's output [50], which BatchNorm keeps too; BatchNorm's running statistics [2 × 50]
    assert 4 * 150 <= kept <= 4 * (150 + 200)
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batchnorm_on_single_images_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one image at a time"):
        run(tmp_path / "run", **{"model.source": "plain_models:pooled_batchnorm", "data.micro_batch": 1})
    run(tmp_path / "again", **{"model.source": "plain_models:pooled_batchnorm", "data.micro_batch": 63})  # 32 + 32


def test_unit_steps_that_overflow_do_not_end_the_run_that_delivers_others(tmp_path: Path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenScores("the model's scores are NaN or infinite")

    monkeypatch.setattr("csqcli.training.setup.evaluate", broken)  # the soft model is that of the last epoch
    paper = {"quantization.method": "csq-paper", "bn_recalibration_batches": 0, "csq.measure_unit_steps": True}
    accuracy = run(tmp_path, **paper, **{"epochs": 1, "max_steps": 1}).manifest.accuracy
    assert accuracy.unit_steps_top1 is None
    assert accuracy.soft_top1 is not None
    assert accuracy.hard_top1 is not None


def test_the_paper_s_unit_steps_are_measured_beside_what_is_delivered(tmp_path: Path) -> None:
    """Both figures are stored; where the unit steps are what is delivered, they are one figure."""
    paper = {"quantization.method": "csq-paper", "bn_recalibration_batches": 0, "csq.measure_unit_steps": True}
    delivered = {}
    for rounding in ("threshold", "nearest"):
        file = run(tmp_path / rounding, **paper, **{"csq.rounding": rounding})
        accuracy = file.manifest.accuracy
        delivered[rounding] = accuracy.hard_top1
        assert accuracy.unit_steps_top1 == delivered["threshold"]
    assert delivered["nearest"] != delivered["threshold"]


def test_networks_with_depthwise_convolutions_train_in_channels_last_by_themselves() -> None:
    from csqcli.training.run import _is_depthwise

    assert _is_depthwise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)))
    assert not _is_depthwise(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 2)))


@pytest.mark.parametrize("method", ["staged", "csq"])  # csq hardens, and evaluates before it does, within an epoch
@pytest.mark.parametrize("batchnorm", ["train", "frozen"])
def test_frozen_batchnorm_keeps_the_statistics_of_the_checkpoint(
    csq, tmp_path: Path, batchnorm: str, method: str
) -> None:
    common = ("search", "--recipe", "digits", "--epochs", 1, "--finetune-epochs", 1, "--target-bits", 3, "--quiet")
    settings = ("--method", method, "--set", "max_steps=10", "--set", f"batchnorm={batchnorm}")
    code, _, err = csq(*common, *settings, "-o", tmp_path)
    assert code == 0, err
    found = io.read(tmp_path / "model.safetensors").state_dict()
    given = load_file(str(resources.files("csqcli") / "assets" / "digits_float.safetensors"))
    statistics = [name for name in given if name.endswith(("running_mean", "running_var"))]
    kept = [torch.equal(found[name], given[name]) for name in statistics]
    assert len(kept) == 6
    assert all(kept) if batchnorm == "frozen" else not any(kept)
    trained = next(name for name in given if name.endswith("bn1.bias"))
    assert not torch.equal(found[trained], given[trained])


@pytest.mark.parametrize(("method", "usual"), [("ptq", 0.01), ("staged", 0.02)])
@pytest.mark.parametrize("typed", [None, 0.003])
def test_a_finetune_has_a_pace_of_its_own_where_it_is_given_one(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, usual: float, typed: float | None
) -> None:
    paces: list[float] = []
    collect = Staged.collect

    def noted(self: Staged, step: int, **rates: float) -> None:
        paces.append(self.settings.latent_lr)
        collect(self, step, **rates)

    monkeypatch.setattr(Staged, "collect", noted)
    own = ("--epochs", 0) if method == "ptq" else ("--epochs", 1, "--method", "staged", "--set", "latent_lr=0.02")
    finetune = ("--finetune-epochs", 1, *(("--set", f"finetune.staged_lr={typed}") if typed else ()))
    common = ("search", "--recipe", "digits", "--target-bits", 3, "--set", "max_steps=2", "--quiet", "-o", tmp_path)
    code, _, err = csq(*common, *own, *finetune)
    assert code == 0, err
    assert paces == [usual] * (0 if method == "ptq" else 2) + [typed or usual] * 2


class Evaluations(Display):
    """Notes the name of every evaluation."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.names: list[str] = []

    def evaluation(self, name: str, batches: int) -> Any:
        self.names.append(name)
        return super().evaluation(name, batches)


def test_no_model_is_evaluated_twice_in_a_row(tmp_path: Path) -> None:
    display = Evaluations()
    accuracy = run(tmp_path / "run", display).manifest.accuracy
    epochs = ["evaluating after epoch 1", "evaluating after epoch 2"]
    assert display.names == ["evaluating the float model", *epochs, "evaluating what was read back"]
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert accuracy.soft_top1 == json.loads(last)["val_top1"]


def test_a_model_that_turns_hard_within_an_epoch_is_evaluated_before(tmp_path: Path) -> None:
    display = Evaluations()
    run(tmp_path / "run", display, quantization__method="csq", csq__harden_at=0.9)  # at step 7 of 8
    assert display.names[1:4] == ["evaluating after epoch 1", "evaluating the soft model", "evaluating after epoch 2"]


def test_bits_behind_unit_steps_are_delivered_as_they_were_evaluated(
    csq: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """From half of the steps on β stands still, and the file's accuracy is that of the last epoch."""
    words = ("search", "--recipe", "digits", "--method", "csq", "--target-bits", 2, "--epochs", 4, "-o", tmp_path)
    settings = ("fix_masks_at=0.25", "straight_through_at=0.5", "straight_through_rate=2", "harden_at=1")
    sets = [word for setting in settings for word in ("--set", f"csq.{setting}")]
    code, _, err = csq(*words, *sets, "--set", "bn_recalibration_batches=0")
    assert code == 0, err
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert history[0]["beta"] < history[1]["beta"] == history[2]["beta"] == history[3]["beta"]
    accuracy = json.loads((tmp_path / "report.json").read_text())["accuracy"]
    assert accuracy["hard_top1"] == accuracy["soft_top1"] == history[-1]["val_top1"]


def test_clipping_counts_the_scales_of_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clipped: list[list[tuple[int, ...]]] = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils,
        "clip_grad_norm_",
        lambda given, limit: clipped.append([tuple(p.shape) for p in given]) or clip(given, limit),
    )
    run(tmp_path / "run", optimizer__clip_grad_norm=1.0, quantization__act_bits=4, max_steps=1, epochs=1)
    scales = io.read(tmp_path / "run" / "model.safetensors").manifest.activations
    assert clipped[0][-len(scales) :] == [(1,)] * len(scales)


def test_a_schedule_that_is_longer_than_its_phase_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", Display(), optimizer__warmup_epochs=5, max_steps=1)
    assert "optimizer.warmup_epochs 5 of 2 epochs: the rate never reaches its peak" in capsys.readouterr().err
    run(tmp_path / "steps", Display(), optimizer__schedule="steps", optimizer__milestones=[60, 120], max_steps=1)
    assert "optimizer.milestones [60, 120] lie beyond 2 epochs" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["finetune", "adaptation"])
def test_other_phases_warm_up_for_a_fifth_of_their_epochs_at_most(section: str, tmp_path: Path) -> None:
    run(tmp_path / "run", optimizer__warmup_epochs=5, max_steps=4, **{f"{section}__epochs": 2})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    phase = {"finetune": "finetune", "adaptation": "float"}[section]
    rates = [line["lr"] for line in lines if line["phase"] == phase]
    assert rates[1] < rates[0]  # the second epoch is past the peak
