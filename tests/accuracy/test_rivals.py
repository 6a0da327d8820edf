"""The rivals' own code behind csq's seam: it trains what it trains by itself, and what it delivers is integers × scale in the file."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy.rivals import Brevitas, BrevitasSettings, TorchaoPARQ, TorchaoPARQSettings
from csqcli.file import io
from csqcli.quant.layers import Layer
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.optimizer import QuantizedOptimizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own code

LIBRARIES = {"TorchaoPARQ": "torchao.prototype.parq", "Brevitas": "brevitas"}
STEPS, LR, MOMENTUM, DECAY = 40, 0.05, 0.9, 1e-3
SHAPE = (6, 4, 3, 3)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.1


def gradient(weight: Tensor) -> Tensor:
    """Of ½‖W − T‖², for a T that the weights do not begin at."""
    return weight.detach() - normal(2)


def through_csq(kind: Callable[..., Any], planes: int, settings: Any) -> QuantizedOptimizer:
    layers = [Layer("conv.weight", nn.Parameter(normal(1)))]
    method = kind(layers, plan_for(layers, planes, Schedule(STEPS, STEPS), planes=[planes]), settings)
    groups = method.parameter_groups()
    return QuantizedOptimizer(method, torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY))


def step(optimizer: QuantizedOptimizer) -> Tensor:
    weight = optimizer.method.layers[0].parameter
    weight.grad = gradient(weight)
    optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize("name", list(LIBRARIES))
def test_a_search_delivers_a_file_of_the_levels_and_the_accuracy_that_are_promised(
    csq, tmp_path: Path, name: str
) -> None:
    pytest.importorskip(LIBRARIES[name])
    run = tmp_path / "run"
    code, _, err = csq(
        *("search", "--recipe", "digits", "--method", f"benchmarks.accuracy.rivals:{name}", "--target-bits", 1),
        *("--epochs", 4, "--quiet", "--output", run),
    )
    assert code == 0, err
    report = json.loads((run / "report.json").read_text())
    assert report["budget"]["mean_bits"] == 1
    assert report["accuracy"]["hard_top1"] > 92  # float 98.2; rounded and not trained 47.0 (PARQ) and 52.2 (Brevitas)

    file = run / "model.safetensors"
    code, out, err = csq("evaluate", file, "--data", "digits", "--json")
    assert code == 0, err
    assert json.loads(out)["top1"] == report["accuracy"]["hard_top1"]
    found: set[int] = set()
    for layer in io.read(file).layers:
        found |= set(layer.integers.unique().tolist())
        assert len(layer.scale) == layer.integers.shape[layer.channel_dim]
    assert found == {-1, 0, 1}  # 2^2 − 1 levels

    code, _, err = csq("export", file, "--bit-packed")
    assert code == 0, err


@pytest.mark.parametrize("planes", [1, 2])
def test_torchao_s_parq_trains_as_torchao_s_optimizer_does_by_itself(planes: int) -> None:
    parq = pytest.importorskip("torchao.prototype.parq")
    weight = nn.Parameter(normal(1))
    by_itself = parq.QuantOptimizer(
        torch.optim.SGD([{"params": [weight], "quant_bits": planes + 1}], lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
        parq.MaxUnifQuantizer(scale_method="mean"),
        parq.ProxPARQ(anneal_start=0, anneal_end=30, steepness=10),
        quant_period=10,
        quant_per_channel=True,
    )
    ours = through_csq(TorchaoPARQ, planes, TorchaoPARQSettings())
    for at in range(STEPS):
        weight.grad = gradient(weight)
        by_itself.step()
        assert torch.equal(step(ours), weight.detach()), f"step {at}"
    ours.harden()
    (layer,) = ours.hard_layers()
    torch.testing.assert_close(layer.weight(), weight.detach(), rtol=1e-6, atol=0)
    assert torch.equal(layer.weight(), ours.method.layers[0].parameter.detach())
    assert set(layer.integers.unique().tolist()) == set(range(1 - 2**planes, 2**planes))


@pytest.mark.parametrize("per_channel", [True, False])
def test_torchao_s_uniform_levels_are_odd_integers(per_channel: bool) -> None:
    pytest.importorskip("torchao.prototype.parq")
    ours = through_csq(TorchaoPARQ, 2, TorchaoPARQSettings(quantizer="uniform", per_channel=per_channel))
    for _ in range(STEPS):
        last = step(ours)
    ours.harden()
    (layer,) = ours.hard_layers()
    assert set(layer.integers.unique().tolist()) == {-3, -1, 1, 3}
    assert len(layer.scale) == (6 if per_channel else 1)
    torch.testing.assert_close(layer.weight(), last, rtol=1e-6, atol=0)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_brevitas_trains_as_its_layer_does_by_itself(planes: int) -> None:
    pytest.importorskip("brevitas")
    from brevitas.nn import QuantConv2d
    from brevitas.quant import Int8WeightPerChannelFloatMSE

    layer = QuantConv2d(
        4, 6, 3, bias=False, weight_quant=Int8WeightPerChannelFloatMSE, weight_bit_width=planes + 1
    )  # whose scales are PARAMETER_FROM_STATS
    layer.weight.data.copy_(normal(1))
    scale = layer.weight_quant.tensor_quant.scaling_impl.value
    ours = through_csq(Brevitas, planes, BrevitasSettings())
    torch.testing.assert_close(layer.quant_weight().value, ours.method.layers[0].parameter)
    groups = [{"params": [layer.weight]}, {"params": [scale], "weight_decay": 0.0}]
    by_itself = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    before = scale.detach().clone()
    for _ in range(STEPS):
        by_itself.zero_grad()
        weight = layer.quant_weight().value
        weight.backward(gradient(weight))
        by_itself.step()
        torch.testing.assert_close(step(ours), layer.quant_weight().value.detach(), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(scale, before, rtol=0.01)  # it learned
    (delivered,) = ours.hard_layers()
    assert torch.equal(delivered.weight(), ours.method.layers[0].parameter.detach())
    assert set(delivered.integers.unique().tolist()) == set(range(1 - 2**planes, 2**planes))


@pytest.mark.parametrize(("kind", "settings"), [(TorchaoPARQ, TorchaoPARQSettings), (Brevitas, BrevitasSettings)])
def test_a_resumed_run_and_a_copy_go_on_bit_for_bit(kind: Any, settings: Any) -> None:
    pytest.importorskip(LIBRARIES[kind.__name__])
    whole = through_csq(kind, 2, settings())
    for _ in range(15):
        step(whole)
    saved = copy.deepcopy(whole.state_dict())
    resumed = through_csq(kind, 2, settings())
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.method.layers[0].parameter, whole.method.layers[0].parameter)
    with whole.hard() as (layer,):  # of a copy, which leaves training as it was
        assert layer.planes == 2
    for _ in range(15):
        assert torch.equal(step(resumed), step(whole))


@pytest.mark.parametrize(("name", "library"), [("TorchaoPARQ", "torchao"), ("Brevitas", "brevitas")])
def test_a_missing_library_is_one_line(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err = csq(
        *("search", "--recipe", "digits", "--method", f"benchmarks.accuracy.rivals:{name}", "--quiet"),
        *("--output", tmp_path / "run"),
    )
    assert code == 2
    assert "Traceback" not in err
    [err] = [line for line in err.splitlines() if line.startswith("csq: error: ")]  # torch may log lines of its own
    assert f"cannot import {library}" in err
    assert "pip install 'csq[rivals]'" in err
