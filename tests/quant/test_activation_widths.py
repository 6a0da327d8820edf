"""Widths of layer inputs: the loss that each would cost, the exact choice among them, and a run from the command line to an export."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from csqcli.errors import UserError
from csqcli.file import io
from csqcli.quant.activation_widths import _losses, _macs_of, find_widths
from csqcli.quant.activations import ActivationQuantizer, InputSample, quantizer_of
from csqcli.quant.layers import find_layers

pytestmark = pytest.mark.usefixtures("remembered_traces")

IMAGES = torch.randn(40, 6, generator=torch.Generator().manual_seed(5))


def network() -> nn.Sequential:
    """Three linear layers; the inputs of the second and third are unsigned and signed."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))


@torch.no_grad()
def candidates_of(model: nn.Sequential) -> dict[str, list[ActivationQuantizer]]:
    """Quantizers of 2 to 8 bits for the inputs of the second and third layer."""
    inputs = {"2": model[:2](IMAGES), "4": model[:4](IMAGES)}
    return {
        name: [quantizer_of(b, InputSample(values.flatten(), signed=name == "4")) for b in range(2, 9)]
        for name, values in inputs.items()
    }


def reference(model: nn.Sequential, scales: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """E[½ Σ g² (x − q(x))²] by hand in NumPy's float64: the gradient of softmax cross entropy carried back through the layers."""
    w = [model[i].weight.detach().double().numpy() for i in (0, 2, 4)]
    b = [model[i].bias.detach().double().numpy() for i in (0, 2, 4)]
    first = np.maximum(IMAGES.double().numpy() @ w[0].T + b[0], 0)
    second = np.tanh(first @ w[1].T + b[1])
    logits = second @ w[2].T + b[2]
    likely = np.exp(logits - logits.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    drawn, generator = [], torch.Generator().manual_seed(0)
    for part in torch.from_numpy(likely).float().split(32):  # as many images at a time as the code takes
        drawn.append(torch.multinomial(part, 1, generator=generator).flatten())
    onto_logits = likely - np.eye(3)[torch.cat(drawn).numpy()]
    onto_second = onto_logits @ w[2]
    onto_first = (onto_second * (1 - second**2)) @ w[1]
    found: dict[str, dict[int, float]] = {}
    for name, x, g, signed in (("2", first, onto_first, False), ("4", second, onto_second, True)):
        found[name] = {}
        for bits, scale in scales[name].items():
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            rounded = np.clip(np.round(x / scale), low, high) * scale
            found[name][bits] = float((0.5 * g**2 * (x - rounded) ** 2).sum(axis=1).mean())
    return found


def test_what_a_width_costs_is_the_fisher_weighted_squared_error() -> None:
    model = network()
    layers, _ = find_layers(model)
    candidates = candidates_of(model)
    lost = _losses(model, layers, [IMAGES], candidates, seed=0)
    scales = {name: {q.bits: float(q.scale.detach()) for q in quantizers} for name, quantizers in candidates.items()}
    wanted = reference(model, scales)
    for name in ("2", "4"):
        assert lost[name].tolist() == pytest.approx(list(wanted[name].values()), rel=1e-3)
        assert lost[name][0] > 100 * lost[name][-1]  # six bits less


@settings(max_examples=12)
@given(st.floats(2, 8), st.sampled_from(["values", "macs"]))
def test_the_choice_is_the_best_within_the_mean(target: float, per: str) -> None:
    model = network()
    layers, _ = find_layers(model)
    macs = {"0.weight": 54, "2.weight": 500, "4.weight": 21}
    found = find_widths(model, layers, lambda: [IMAGES], target=target, per=per, macs=macs)
    weights = {"2": 9, "4": 7} if per == "values" else {"2": 500, "4": 21}
    total = sum(weights.values())
    assert found.mean == pytest.approx(sum(weights[name] * found.bits[name] for name in weights) / total)
    assert found.mean <= target + 1e-9
    candidates = candidates_of(model)
    lost = _losses(model, layers, [IMAGES], candidates, seed=0)
    costs = {
        pair: float(lost["2"][: pair[0] - 1].min() + lost["4"][: pair[1] - 1].min())
        for pair in itertools.product(range(2, 9), repeat=2)
        if weights["2"] * pair[0] + weights["4"] * pair[1] <= target * total + 1e-9
    }
    assert costs[found.bits["2"], found.bits["4"]] == pytest.approx(min(costs.values()), rel=1e-6)


def test_a_batch_of_which_no_image_could_be_decoded_is_passed_over() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Unflatten(1, (3, 3)), nn.Linear(3, 3), nn.Flatten())

    class Folding(nn.Module):
        """Does not run on no image: -1 beside a side of 0 could be anything."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).view(len(x), -1)

    folding = Folding()
    layers, _ = find_layers(folding)
    found = [
        find_widths(folding, layers, lambda empty=empty: [*empty, IMAGES], target=4.0) for empty in ([], [IMAGES[:0]])
    ]
    assert found[0] == found[1]


def test_the_operations_of_a_module_are_those_of_all_its_weights() -> None:
    model = nn.LSTM(4, 5)
    layers, _ = find_layers(model)
    macs = {"weight_ih_l0": 80, "weight_hh_l0": 100}  # 4 gates of 5: 20×4 and 20×5
    assert [layer.name for layer in layers] == list(macs)
    assert _macs_of([""], layers, macs) == {"": 180}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_widths_are_found_where_the_model_is() -> None:
    model = network().cuda()
    layers, _ = find_layers(model)
    found = find_widths(model, layers, lambda: [IMAGES.cuda()], target=4)
    assert found.bits == find_widths(network(), find_layers(network())[0], lambda: [IMAGES], target=4).bits


def test_a_network_whose_only_input_is_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(UserError, match="no input of a layer to choose a width for"):
        find_widths(model, find_layers(model)[0], lambda: [IMAGES], target=4)


class TwoStems(nn.Module):
    """Two layers that read the image, and two that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.hidden, self.last = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden((self.near(x) + self.far(x)).relu()).tanh())


@pytest.mark.parametrize(
    ("exclude", "searched"),
    [([], ["hidden", "last"]), (["near", "far"], ["hidden", "last"]), (["near", "far", "hidden"], ["last"])],
)
def test_widths_are_searched_for_all_inputs_but_the_image(exclude: list[str], searched: list[str]) -> None:
    torch.manual_seed(2)
    model = TwoStems()
    found = find_widths(model, find_layers(model, exclude=exclude)[0], lambda: [IMAGES], target=4)
    assert list(found.bits) == searched
    assert found.mean <= 4


def test_windows_that_are_folded_into_the_batch_count_with_all_values_of_an_image() -> None:
    class Windows(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self[0](x).tanh()  # [images, 8, 6]
            return self[2](self[1](x.reshape(-1, 2, 6)).tanh().reshape(len(x), 8, 4).mean(1))

    torch.manual_seed(4)
    model = Windows(nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 3))
    images = torch.randn(10, 8, 6)
    found = find_widths(model, find_layers(model)[0], lambda: [images], target=4)
    assert found.mean == pytest.approx((48 * found.bits["1"] + 4 * found.bits["2"]) / 52)


def test_searched_widths_are_trained_stored_finetuned_and_exported(csq, tmp_path: Path) -> None:
    run = ("search", "--recipe", "digits", "--epochs", 2, "--target-bits", 3, "--target-act-bits", 2.5, "--quiet")
    files = []
    for name in ("one", "two"):
        code, _, err = csq(*run, "-o", tmp_path / name)
        assert code == 0, err
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    asked = next(entry for entry in report["budgets"] if entry["budget"] == "act_bits")
    assert asked["asked"] == 2.5
    assert 2 <= asked["reached"] <= 2.5
    manifest = io.read(tmp_path / "one" / "model.safetensors").manifest
    widths = {entry.module: entry.bits for entry in manifest.activations}
    assert len(set(widths.values())) > 2  # not one for all, beside the 8 of the network's own input
    code, _, err = csq(
        "finetune",
        tmp_path / "one" / "model.safetensors",
        "--data",
        "digits",
        "--epochs",
        1,
        "--quiet",
        "-o",
        tmp_path / "on",
    )
    assert code == 0, err
    kept = io.read(tmp_path / "on" / "model.safetensors").manifest.activations
    assert {entry.module: entry.bits for entry in kept} == widths
    graph = tmp_path / "a.onnx"
    code, _, err = csq("export", tmp_path / "one" / "model.safetensors", "--onnx", "--activations", "int8", "-o", graph)
    assert code == 0, err
    tops = {
        int(onnx.numpy_helper.to_array(tensor))
        for tensor in onnx.load(graph).graph.initializer
        if tensor.data_type == onnx.TensorProto.UINT8 and not tensor.dims
    }
    assert {2**bits - 1 for bits in set(widths.values()) if bits < 8} <= tops
