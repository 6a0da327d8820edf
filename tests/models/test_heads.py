"""Heads: labels mapped into a pretrained head, rows of it kept, or a fresh one."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from csqcli.errors import UserError
from csqcli.models import heads, networks


def test_wordnet_ids_and_imagenet_names_are_mapped_into_a_head_of_1000() -> None:
    # ImageNet's synsets sorted by id: 0 is tench, 217 the English springer, 497 church, 701 parachute
    assert heads.map_labels(["n01440764", "n02102040", "n03028079", "n03888257"], 1000) == [0, 217, 497, 701]
    assert heads.map_labels(["tench", "English_springer", "church", "Parachute"], 1000) == [0, 217, 497, 701]


def test_what_is_not_imagenet_s_has_no_mapping() -> None:
    assert heads.map_labels(["n01440764", "n02102040"], 10) is None
    assert heads.map_labels(["tench", "smartphone app"], 1000) is None
    assert heads.map_labels(["crane", "tench"], 1000) is None  # 134 is the bird, 517 the machine
    assert heads.map_labels(["tench", "Tinca tinca"], 1000) is None  # twice the same
    assert heads.map_labels([], 1000) is None


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "mobilenetv3_small_050"])
def test_a_subset_of_the_head_gives_exactly_the_scores_of_its_rows(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=12).eval()
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        whole = model(images)
        heads.subset_head(model, [7, 0, 11])
        assert torch.allclose(model(images), whole[:, [7, 0, 11]], atol=1e-6)
    assert (model.num_classes, heads.outputs_of(model)) == (3, 3)


def test_rows_that_the_head_does_not_have_are_refused() -> None:
    for rows in ([0, 10], [-1], []):
        with pytest.raises(UserError, match="the head has outputs 0 to 9"):
            heads.subset_head(networks.digits_cnn(), rows)


def test_a_new_head_depends_on_its_seed_alone_and_leaves_the_features() -> None:
    model = timm.create_model("test_efficientnet", num_classes=12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    heads.new_head(model, 5, seed=3)
    assert torch.equal(torch.get_rng_state(), stream)
    assert heads.outputs_of(model) == 5
    head = heads.head_of(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{head}.weight", f"{head}.bias"}
    other = timm.create_model("test_efficientnet", num_classes=7)
    heads.new_head(other, 5, seed=3)
    assert torch.equal(model.get_submodule(head).weight, other.get_submodule(head).weight)
    assert not model.get_submodule(head).bias.any()


def test_models_of_other_libraries_have_their_last_linear_layer_as_head() -> None:
    assert heads.head_of(networks.digits_cnn()) == "fc"
    with pytest.raises(UserError, match="no single linear layer gives this model's scores"):
        heads.head_of(nn.Sequential(nn.Conv2d(1, 4, 3)))
