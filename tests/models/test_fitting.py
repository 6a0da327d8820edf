"""A checkpoint's head and a data set's classes: kept, cut down, replaced when asked to, and never in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from csqcli.errors import UserError
from csqcli.models import heads
from csqcli.models.checkpoints import Checkpoint, read_checkpoint
from csqcli.models.fitting import FittedModel, load_for

FOLDERS = ["n03888257", "n01440764", "n03028079"]  # parachute, tench, church
ROWS = [701, 0, 497]  # theirs among ImageNet's synsets sorted by id


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny network with a head of 1000 outputs."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "imagenet.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return read_checkpoint(str(path))


def fitted(checkpoint: Checkpoint, classes: list[str], **options) -> FittedModel:
    return load_for("timm:test_efficientnet", classes, checkpoint=checkpoint, classes_from="photos/", **options)


def test_keep_maps_classes_into_the_whole_head(imagenet: Checkpoint) -> None:
    found = fitted(imagenet, FOLDERS, head="keep")
    assert (found.outputs, len(found.names), found.names[701]) == (ROWS, 1000, "n03888257")
    assert heads.outputs_of(found.loaded.model) == 1000
    assert found.loaded.notes == ("labels mapped into its 1000 outputs",)


@pytest.mark.parametrize("head", ["auto", "subset"])
def test_subset_keeps_the_rows_of_the_classes_bit_for_bit(imagenet: Checkpoint, head) -> None:
    found = fitted(imagenet, FOLDERS, head=head)
    assert (found.outputs, found.names) == ([0, 1, 2], FOLDERS)
    assert torch.equal(found.loaded.model.classifier.weight, imagenet.groups[""]["classifier.weight"][ROWS])
    note = "kept 3 of the head's 1000 outputs, those of the data's classes (--head keep keeps all)"
    assert found.loaded.notes == (note,)


def test_new_replaces_the_head_alone_and_says_so(imagenet: Checkpoint) -> None:
    found = fitted(imagenet, ["cat", "dog"], head="new", seed=3)
    state, saved = found.loaded.model.state_dict(), imagenet.groups[""]
    assert {name for name in state if not torch.equal(state[name], saved[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert found.loaded.notes == ("its head of 1000 outputs was replaced by a fresh one of 2",)


@pytest.mark.parametrize("head", ["auto", "keep", "subset"])
def test_classes_that_the_head_does_not_have_end_in_what_to_type(imagenet: Checkpoint, head) -> None:
    with pytest.raises(UserError, match="the weights have 1000 outputs, photos/ has 2 classes") as error:
        fitted(imagenet, ["cat", "dog"], head=head)
    assert ("--head new" in error.value.hint) == (head != "keep")
    assert "named by WordNet ids" in error.value.hint


def test_as_many_outputs_as_classes_belong_together_by_position_and_imagenet_s_by_name(imagenet: Checkpoint) -> None:
    model = timm.create_model("test_efficientnet", num_classes=2)
    found = fitted(Checkpoint({"": model.state_dict()}, "", "mine"), ["cat", "dog"])
    assert (found.outputs, found.names, found.loaded.notes) == ([0, 1], ["cat", "dog"], ())
    backwards = list(reversed(heads.imagenet_ids()))
    assert fitted(imagenet, backwards).outputs == list(reversed(range(1000)))


def test_a_library_s_pretrained_head_is_not_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from csqcli.models import libraries

    def weights(spec, kwargs, pretrained):  # as timm: with another number of classes the head is random
        assert pretrained <= ("num_classes" not in kwargs), "asked for another head"
        return timm.create_model(spec.name, **kwargs)

    monkeypatch.setattr(libraries, "_build_timm", weights)
    with pytest.raises(UserError, match="the weights have 1000 outputs"):
        load_for("timm:test_efficientnet", ["cat", "dog"])
    assert heads.outputs_of(load_for("timm:test_efficientnet", ["cat", "dog"], head="new").loaded.model) == 2
    assert heads.outputs_of(load_for("timm:test_efficientnet", FOLDERS).loaded.model) == 3


def test_random_weights_have_no_head_to_keep() -> None:
    with pytest.raises(UserError, match="random weights have no head to keep"):
        load_for("csq:digits_cnn", ["cat", "dog"], head="keep", pretrained=False)


def test_a_model_whose_constructor_cannot_make_the_new_head_is_refused_before_training(tmp_path: Path) -> None:
    model = fixed_head()
    with pytest.raises(UserError, match=r"does not make a model of 2 outputs .*let it take num_classes"):
        load_for(
            "tests.models.test_fitting:fixed_head",
            ["cat", "dog"],
            head="new",
            checkpoint=Checkpoint({"": model.state_dict()}, "", "mine"),
        )


def fixed_head() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
