"""The one rule for what is a weight, on the kinds of layers that timm and torchvision have."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli import CSQ
from csqcli.errors import UserError
from csqcli.file import codes
from csqcli.models.coverage import count_macs, coverage
from csqcli.quant.layers import find_layers


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model)[0]]


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 4, 1, groups=4), False),  # a channel is one weight
        (nn.Linear(1, 6), False),
        (nn.Linear(6, 1), True),
        (nn.ConvTranspose2d(1, 6, 1), False),  # output channels are its second dimension
        (nn.ConvTranspose2d(6, 1, 1), True),
    ],
)
def test_a_layer_allows_a_scale_per_channel_where_that_is_no_scale_per_weight(module: nn.Module, allowed: bool) -> None:
    [layer] = find_layers(module)[0]
    assert layer.allows_channel_scales is allowed


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


def test_parametrised_weights_are_weights_by_what_is_behind_them() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 5, 1)),
        nn.Flatten(),
        nn.utils.parametrizations.weight_norm(nn.Linear(20, 2)),
    )
    layers, left = find_layers(model)
    assert {layer.name: layer.weights for layer in layers} == {
        "0.parametrizations.weight.original1": 12,
        "1.parametrizations.weight.original": 20,
        "3.parametrizations.weight.original1": 40,
    }
    assert [tensor.shape for tensor in left] == [(4, 1, 1, 1), (2, 1)]  # lengths
    assert list(count_macs(model, layers, (3, 2, 2)).macs.values()) == [4 * 12, 4 * 20, 40]


def test_weights_in_channels_last_order_become_the_same_integers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    delivered = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        optimizer = CSQ(copy.deepcopy(model).to(memory_format=memory_format), target_bits=3, total_steps=10)
        optimizer.harden()
        delivered.append(optimizer.hard_layers())
    for plain, permuted in zip(*delivered, strict=True):
        assert torch.equal(plain.integers, permuted.integers)
        assert codes.encode(plain.integers.numpy()) == codes.encode(permuted.integers.numpy())


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


def test_packed_and_functional_uses_of_a_weight_are_counted() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latent = nn.Parameter(torch.zeros(1, 1, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.query = nn.Linear(8, 8)
            self.functional = nn.Linear(8, 4)
            self.standardised = nn.Conv2d(3, 8, 1, bias=False)
            self.unused = nn.Linear(8, 8)
            self.recurrent = nn.LSTM(8, 5, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.standardised.weight
            x = self.standardised._conv_forward(x, weight, None)
            tokens = x.flatten(2).transpose(1, 2)  # [batch, 6, 8]
            self.recurrent(tokens)
            tokens = torch.cat([self.query(self.latent.expand(len(x), -1, -1)), tokens], 1)
            return F.linear(self.attention(tokens, tokens, tokens)[0][:, 0], self.functional.weight)

    model = Uses()
    counted = count_macs(model, find_layers(model)[0], (3, 2, 3))
    assert counted.macs == {
        "attention.in_proj_weight": 7 * 8 * 24,
        "attention.out_proj.weight": 7 * 8 * 8,
        "query.weight": 64,
        "functional.weight": 32,
        "standardised.weight": 6 * 8 * 3,
        "unused.weight": None,
        **{f"recurrent.weight_ih_l0{side}": 6 * 8 * 20 for side in ("", "_reverse")},  # four gates of five
        **{f"recurrent.weight_hh_l0{side}": 6 * 5 * 20 for side in ("", "_reverse")},
    }
    products = 2 * 7 * 7 * 8  # queries with keys, shares with values
    assert counted.total == sum(value or 0 for value in counted.macs.values()) + products


def test_a_weight_computed_from_the_layer_s_own_is_counted_with_it() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6 * 3))

        def forward(self, x: Tensor) -> Tensor:
            mixed = torch.full((1, 4), 0.25) @ self.weight
            return F.conv2d(x, mixed.view(6, 3, 1, 1))

    model = nn.Sequential(Standardised(3, 3, 1), Experts())
    counted = count_macs(model, find_layers(model)[0], (3, 5, 5))
    assert counted.macs == {"0.weight": 25 * 9, "1.weight": 4 * 18 + 25 * 18}
    assert counted.total == 25 * 9 + 4 * 18 + 25 * 18


def test_counting_leaves_statistics_modes_gradients_and_the_random_stream_alone() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Noisy(), nn.Dropout(0.5))
    model.train()
    model[1].eval()  # a frozen norm stays frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    count_macs(model, find_layers(model)[0], (3, 4, 4))
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["raft_small", "mc3_18", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "quantized_resnet18"]
)
def test_torchvision_models_of_every_task_can_be_inspected(csq, name: str) -> None:
    code, out, _ = csq("inspect", f"torchvision:{name}", "--json")
    assert code == 0
    found = json.loads(out)
    plain = torchvision.models.get_model(name, weights=None, **({"weights_backbone": None} if "v3" in name else {}))
    linear = nn.Conv2d, nn.Conv3d, nn.Linear
    assert len(found["layers"]) == sum(isinstance(module, linear) for module in plain.modules())
    assert found["parameter_share"] > 0.98
    assert found["mac_share"] > 0.98


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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("module", [nn.Conv2d(3, 5, 2), nn.ConvTranspose2d(3, 5, 2), nn.Conv2d(4, 4, 3, groups=4)])
def test_by_channel_keeps_every_output_channel_in_one_row(
    module: nn.Module, memory_format: torch.memory_format
) -> None:
    (layer,), _ = find_layers(module.to(memory_format=memory_format))
    weight = layer.parameter.detach()
    rows = layer.by_channel(layer.flat(weight))
    assert rows.shape[1] == weight.shape[layer.channel_dim]
    for channel in range(rows.shape[1]):
        wanted = weight.select(layer.channel_dim, channel).flatten().sort().values
        assert torch.equal(rows[:, channel].flatten().sort().values, wanted)
    assert torch.equal(layer.unflatten(rows.flatten()), weight)
    before = weight.clone()
    with layer.writing() as flat:
        flat.mul_(2)
        assert torch.equal(layer.parameter, 2 * before)  # the weight's own memory


def test_a_weight_with_gaps_or_moved_to_another_format_is_written_all_the_same() -> None:
    (gaps,), _ = find_layers(nn.Linear(8, 4))
    gaps.parameter.data = torch.zeros(4, 16)[:, ::2]
    (moved,), _ = find_layers(model := nn.Conv2d(3, 5, 2))
    assert moved.memory_order == (0, 1, 2, 3)
    model.to(memory_format=torch.channels_last)
    for layer in (gaps, moved):
        wanted = torch.randn(layer.parameter.shape)
        with layer.writing() as flat:
            flat.copy_(layer.flat(wanted))
        assert torch.equal(layer.parameter, wanted)


def test_values_in_another_memory_order_are_found_again() -> None:
    model = nn.Conv2d(3, 5, 2)
    (before,), _ = find_layers(model)
    flat = torch.stack([before.flat(model.weight.detach()), 2 * before.flat(model.weight.detach())])
    (after,), _ = find_layers(model.to(memory_format=torch.channels_last))
    assert after.memory_order != before.memory_order
    found = after.reordered(flat, before.memory_order)
    assert torch.equal(after.unflatten(found[1]), 2 * model.weight)


def test_a_weight_without_elements_stays_float() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remark on initialising nothing
        model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    layers, left = find_layers(model)
    assert [layer.name for layer in layers] == ["1.weight"]
    assert [(tensor.name, tensor.why) for tensor in left] == [("0.weight", "no elements")]
