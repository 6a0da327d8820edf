"""Foreign weights: wherever they lie in a file and whatever their names begin with, and nothing is ever run."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import sys
import types
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.file.checkpoint import open_checkpoint
from csqcli.models import checkpoints, libraries, networks
from csqcli.training.warm_start import read_warm_start


def _load(name: str, *, checkpoint: Path, **options: Any) -> libraries.LoadedModel:
    return libraries.load(name, checkpoint=checkpoints.read_checkpoint(str(checkpoint)), **options)


def _digits(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return networks.digits_cnn()


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "tar"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_load_whatever_they_are_wrapped_in(
    tmp_path: Path, suffix: str, wrap: str | None, prefix: str
) -> None:
    torch.manual_seed(1)
    original = networks.digits_cnn()
    state = {prefix + name: value for name, value in original.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({wrap: state, "epoch": 3} if wrap else state, path)
    loaded = _load("digits_cnn", num_classes=10, checkpoint=(path))
    assert torch.equal(loaded.model.fc.weight, original.fc.weight)
    assert len(loaded.checkpoint_sha256 or "") == 64


def test_ema_weights_are_preferred_when_a_checkpoint_holds_both(tmp_path: Path) -> None:
    plain, ema = networks.digits_cnn(), networks.digits_cnn()
    torch.save({"state_dict": plain.state_dict(), "state_dict_ema": ema.state_dict()}, tmp_path / "both.pth")
    loaded = _load("digits_cnn", num_classes=10, checkpoint=(tmp_path / "both.pth"))
    assert torch.equal(loaded.model.fc.weight, ema.fc.weight)


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_with_pickled_code_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"state_dict": _Evil()}))
    torch.save({"state_dict": _Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(UserError, match=r"never runs|not a readable checkpoint"):
            checkpoints.read_checkpoint(str(tmp_path / name))
    assert "executed" not in capsys.readouterr().out


def test_checkpoint_problems_are_named(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=r"keys differ .* missing \(first: conv1.weight\), 2 unexpected \(first: bias\)"
    ):
        _load("digits_cnn", num_classes=10, checkpoint=(tmp_path / "other.safetensors"))
    save_file(networks.digits_cnn(num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    with pytest.raises(UserError, match=r"the checkpoint has 7 classes, /data has 10 \(tensor fc.bias\)"):
        _load("digits_cnn", num_classes=10, checkpoint=(tmp_path / "seven.safetensors"), num_classes_from="/data")
    state = networks.digits_cnn().state_dict()
    state["fc.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"tensor `fc.bias` holds NaN"):
        _load("digits_cnn", num_classes=10, checkpoint=(tmp_path / "nan.safetensors"))
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoints.read_checkpoint(str(tmp_path / "noise.pth"))


def test_a_checkpoint_of_grey_images_names_the_argument_that_builds_its_network(tmp_path: Path) -> None:
    for channels in (1, 3):
        model = timm.create_model("resnet18", in_chans=channels, num_classes=3)
        save_file(model.state_dict(), tmp_path / f"{channels}.safetensors")
    with pytest.raises(UserError, match=r"it takes images of 1 channel: --set 'model.arguments=\{in_chans: 1\}'$"):
        _load("resnet18", num_classes=3, checkpoint=tmp_path / "1.safetensors")
    with pytest.raises(UserError, match=r"it takes images of 3 channels: leave in_chans out of model.arguments$"):
        _load("resnet18", num_classes=3, checkpoint=tmp_path / "3.safetensors", arguments={"in_chans": 1})
    _load("resnet18", num_classes=3, checkpoint=tmp_path / "1.safetensors", arguments={"in_chans": 1})


def test_a_torchscript_archive_is_called_so(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's own of its end
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "scripted.pt"))
    with pytest.raises(UserError, match=r"scripted.pt: a TorchScript archive, .*; save model.state_dict\(\) instead"):
        checkpoints.read_checkpoint(str(tmp_path / "scripted.pt"))


@pytest.mark.parametrize(
    "prefix", ["model.", "backbone.", "_orig_mod.module.", "module._orig_mod.", "timm_model.", "a.b.c."]
)
def test_whatever_common_prefix_makes_the_keys_fit_is_taken_off_and_named(tmp_path: Path, prefix: str) -> None:
    original = _digits()
    state = _prefixed(prefix, original.state_dict()) | {"criterion.weight": torch.ones(10)}
    torch.save({"state_dict": state}, tmp_path / "lightning.ckpt")
    loaded = _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "lightning.ckpt")
    assert torch.equal(loaded.model.fc.weight, original.fc.weight)
    named = prefix.replace("_orig_mod.", "")
    wanted = [f"took the prefix `{named}` off 20 names; beside them 1 not the model's"]
    assert list(loaded.notes) == wanted


def test_parts_that_were_compiled_on_their_own_have_their_plain_names(tmp_path: Path) -> None:
    original = _digits()
    state = {name.replace("bn1.", "bn1._orig_mod."): value for name, value in original.state_dict().items()}
    torch.save(state, tmp_path / "part.pth")
    assert torch.equal(
        _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "part.pth").model.bn1.weight, original.bn1.weight
    )


@pytest.mark.parametrize("wrap", ["model_state_dict", "net", "weights", "whatever"])
def test_any_wrapper_is_looked_into_and_an_optimizer_beside_it_does_not_matter(tmp_path: Path, wrap: str) -> None:
    original = _digits()
    optimizer = torch.optim.AdamW(original.parameters())
    sum(parameter.sum() for parameter in original.parameters()).backward()
    optimizer.step()
    torch.save({wrap: original.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "run.pth")
    loaded = _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "run.pth")
    assert torch.equal(loaded.model.fc.weight, original.fc.weight)
    assert loaded.notes == ()


def test_stochastic_weight_averaging_s_counter_is_no_weight(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(_digits())
    torch.save(averaged.state_dict(), tmp_path / "swa.pth")
    loaded = _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "swa.pth")
    assert torch.equal(loaded.model.fc.weight, averaged.module.fc.weight)


def test_averaged_or_raw_weights_are_chosen_and_the_choice_is_named(tmp_path: Path) -> None:
    raw, averaged = _digits(1), _digits(2)
    state = _prefixed("model.", raw.state_dict()) | _prefixed("ema_model.module.", averaged.state_dict())
    torch.save({"state_dict": state}, tmp_path / "both.ckpt")
    for weights, model, word in (("auto", averaged, "averaged"), ("ema", averaged, "averaged"), ("raw", raw, "raw")):
        loaded = _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "both.ckpt", weights=weights)
        assert torch.equal(loaded.model.fc.weight, model.fc.weight)
        assert loaded.notes[0].startswith(f"took the {word} weights (`state_dict.")
    torch.save(raw.state_dict(), tmp_path / "raw.pth")
    with pytest.raises(UserError, match=r"raw.pth: holds no averaged \(EMA\) weights that fit"):
        _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "raw.pth", weights="ema")


def test_two_different_sets_of_weights_are_not_chosen_between_by_chance(tmp_path: Path) -> None:
    both = {"student": _digits(1).state_dict(), "teacher": _digits(2).state_dict()}
    torch.save(both, tmp_path / "two.pth")
    with pytest.raises(UserError, match="several sets of weights fit: `student` and `teacher`"):
        _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "two.pth")
    torch.save(both | {"teacher": both["student"]}, tmp_path / "twice.pth")
    _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "twice.pth")


def test_settings_beside_the_weights_are_passed_over_and_their_classes_never_imported(
    tmp_path: Path, monkeypatch
) -> None:
    script = types.ModuleType("some_training_script")
    script.Config = type("Config", (), {"__module__": script.__name__})
    monkeypatch.setitem(sys.modules, script.__name__, script)
    original, config = _digits(), script.Config()
    config.lr = 0.1
    content = {
        "state_dict": original.state_dict(),
        "args": argparse.Namespace(model="digits_cnn", lr=0.1, output=Path("out")),
        "metric": np.float64(98.0),
        "history": defaultdict(list, {"loss": [1.0]}),
        "config": config,
    }
    torch.save(content, tmp_path / "model_best.pth.tar")
    monkeypatch.delitem(sys.modules, script.__name__)
    loaded = _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "model_best.pth.tar")
    assert torch.equal(loaded.model.fc.weight, original.fc.weight)
    assert script.__name__ not in sys.modules


def test_a_model_that_was_pickled_whole_gives_its_tensors_without_its_class(tmp_path: Path, monkeypatch) -> None:
    original = _digits()
    torch.save(original, tmp_path / "whole.pth")
    monkeypatch.delattr(networks, "DigitsCNN")  # nobody needs it to read the tensors
    monkeypatch.setattr(nn.Module, "__setstate__", lambda *_: pytest.fail("a pickled module was built"))
    found = checkpoints.read_checkpoint(str(tmp_path / "whole.pth")).groups[""]
    assert all(torch.equal(found[name], value) for name, value in original.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "call",
    [(eval, ("1",)), (torch.Tensor, (10**12,)), (bytearray, (10**12,)), (print, ("executed",))],
    ids=lambda c: c[0].__name__,
)
def test_a_call_that_no_state_dict_needs_is_refused_before_anything_is_loaded(
    tmp_path: Path, call: tuple, legacy: bool, monkeypatch
) -> None:
    class Caller:
        def __reduce__(self) -> Any:
            return call

    torch.save(
        {"state_dict": OrderedDict(a=torch.ones(2)), "x": Caller()},
        tmp_path / "call.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"asks for `.*`: holds pickled code, which csq never runs; convert it"):
        checkpoints.read_checkpoint(str(tmp_path / "call.pth"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_both_layouts_of_torch_save_are_read(tmp_path: Path, legacy: bool) -> None:
    original = _digits()
    content = {"state_dict": original.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    loaded = _load("digits_cnn", num_classes=10, checkpoint=tmp_path / "x.pth")
    assert torch.equal(loaded.model.fc.weight, original.fc.weight)


def test_a_safetensors_index_is_read_with_all_its_shards(tmp_path: Path) -> None:
    original = _digits()
    items = list(original.state_dict().items())
    shards = {"model-00001-of-00002.safetensors": dict(items[:9]), "model-00002-of-00002.safetensors": dict(items[9:])}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {tensor: name for name, own in shards.items() for tensor in own}}))
    first = _load("digits_cnn", num_classes=10, checkpoint=index)
    assert torch.equal(first.model.fc.weight, original.fc.weight)
    save_file(_digits(2).state_dict(), tmp_path / "model-00002-of-00002.safetensors")
    assert _load("digits_cnn", num_classes=10, checkpoint=index).checkpoint_sha256 != first.checkpoint_sha256
    for name, complaint in (
        ("../x.safetensors", "not the name of a .safetensors file beside it"),
        ("gone.safetensors", "no shard"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match=f"not a readable index .*{complaint}"):
            checkpoints.read_checkpoint(str(index))


def test_a_runs_folder_stands_for_the_model_in_it(digits_run: Path, csq) -> None:
    by_folder, by_file = (open_checkpoint(str(path)) for path in (digits_run, digits_run / "model.safetensors"))
    assert (by_folder.sha256, by_folder.label) == (by_file.sha256, by_file.label)
    said = [
        csq("evaluate", "--model", "digits_cnn", path, "--data", "digits")[:2]
        for path in (digits_run, digits_run / "model.safetensors")
    ]
    assert said[0] == said[1]
    assert said[0][0] == 0


def test_a_run_that_begins_with_a_folder_begins_with_its_latents(digits_run: Path, tmp_path: Path) -> None:
    shutil.copy(digits_run / "model.safetensors", tmp_path / "model.safetensors")
    assert read_warm_start(str(tmp_path)).label == "model.safetensors"
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "latents.safetensors")
    assert read_warm_start(str(tmp_path)).label == "latents.safetensors"


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize("kept", ["first", "again"])
def test_weights_that_are_one_need_one_name_in_a_file(tmp_path: Path, kept: str) -> None:
    torch.manual_seed(1)
    wanted = {name: value for name, value in Twice().state_dict().items() if name.split(".")[0] in (kept, "head")}
    save_file(wanted, tmp_path / "one.safetensors")  # as safetensors.torch.save_model has it
    model = Twice()
    chosen = checkpoints.choose_weights(
        checkpoints.read_checkpoint(str(tmp_path / "one.safetensors")), model.state_dict()
    )
    checkpoints.fit_state_dict(model, chosen.state, where="one")
    assert torch.equal(model.first.weight, wanted[f"{kept}.weight"])
    assert model.first.weight is model.again.weight
    del wanted["head.bias"]
    with pytest.raises(UserError, match="1 missing"):
        checkpoints.fit_state_dict(Twice(), wanted, where="one")
