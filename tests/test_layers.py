"""The one rule for what is a weight, on the kinds of layers that timm and torchvision have."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from csqcli.errors import UserError
from csqcli.inspect import count_macs, coverage
from csqcli.quant.layers import find_layers


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model)[0]]


def test_convolutions_of_every_kind_and_linear_layers_are_weights() -> None:
    model = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(2, 3, 3),
            "conv3d": nn.Conv3d(1, 2, 3),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "transposed": nn.ConvTranspose2d(2, 5, 3),
            "linear": nn.Linear(3, 2),
        }
    )
    layers, left = find_layers(model)
    assert [layer.name for layer in layers] == [f"{name}.weight" for name in model]
    assert left == []
    assert {layer.name: layer.channel_dim for layer in layers}["transposed.weight"] == 1


def test_packed_attention_weights_are_weights_and_position_embeddings_are_not() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
            self.words = nn.Embedding(9, 8)
            self.norm = nn.LayerNorm((3, 8))

    layers, left = find_layers(Block())
    assert {layer.name for layer in layers} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
    }
    assert {tensor.name: tensor.why for tensor in left} == {
        "pos_embed": "no weight of a linear- or convolution-like operation",
        "words.weight": "embedding table",
        "norm.weight": "normalisation",
        "norm.bias": "normalisation",
    }


def test_damaged_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data[1, 1] = float("inf")
    with pytest.raises(UserError, match=r"0.weight: holds NaN or infinite values"):
        find_layers(model)


def test_multiply_accumulates_are_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 8·10·10 outputs × 27
        nn.Conv2d(8, 8, 3, groups=8),  # 8·8·8 outputs × 9
        nn.ConvTranspose2d(8, 4, 2, stride=2),  # 8·8·8 inputs × 4·4
        nn.Flatten(),
        nn.Linear(4 * 16 * 16, 5),
    )
    counted = count_macs(model, find_layers(model)[0], (3, 10, 10))
    assert counted.macs == {"0.weight": 21_600, "1.weight": 4_608, "2.weight": 8_192, "4.weight": 5_120}
    assert counted.total == 21_600 + 4_608 + 8_192 + 5_120


def test_a_layer_called_twice_counts_twice() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    found = coverage(model, (4,))
    assert found["layers"][0]["macs"] == 32
    assert found["layers"][0]["tied_with"] == ["1.weight"]
    assert found["mac_share"] == 1.0


def test_inspect_prints_coverage_and_strict_fails_below_it(csq) -> None:
    code, out, _ = csq("inspect", "timm:vit_tiny_patch16_224", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["parameter_share"] > 0.98
    assert 0.8 < found["mac_share"] < 0.9  # the rest is attention itself, which has no weights
    assert {tensor["name"] for tensor in found["left_float"]} == {"cls_token", "pos_embed"}
    code, _, err = csq("inspect", "digits_cnn", "--exclude", "conv3", "--strict", "0.9")
    assert code == 2
    assert err.endswith("of the parameters are covered; --strict asks for 0.9\n")
