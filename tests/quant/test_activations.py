"""Activation quantizers: static, learned, attached without touching the model, stored and restored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import csqcli
from csqcli.errors import UserError
from csqcli.file import header
from csqcli.file.manifest import ActivationEntry
from csqcli.quant import activations
from csqcli.quant.activations import ActivationQuantizer, InputSample, attach, calibrate, owners, quantizer_of
from csqcli.quant.layers import find_layers
from csqcli.quant.one_image import inputs_from_one_image


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_values_and_gradients_are_those_of_a_straight_through_graph(bits: int, signed: bool) -> None:
    quantizer = ActivationQuantizer(bits, signed=signed, scale=0.11)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x = (torch.randn(8, 50, generator=torch.Generator().manual_seed(bits)) * 0.5).requires_grad_()
    upstream = torch.randn(8, 50, generator=torch.Generator().manual_seed(9))
    out = quantizer(x)
    (out * upstream).sum().backward()

    twin, scale = x.detach().double().requires_grad_(), torch.tensor(0.11, dtype=torch.float64, requires_grad=True)
    expected = _Round.apply((twin / scale).clamp(low, high)) * scale
    (expected * upstream).sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), twin.grad, atol=1e-6, rtol=1e-5)
    damped = scale.grad / (50 * high) ** 0.5  # features of the layer, of which the paper's N_F are, not of the batch
    torch.testing.assert_close(quantizer.scale.grad[0].double(), damped, atol=1e-5, rtol=1e-3)


def test_pact_moves_the_clipping_level_by_clipped_values_only() -> None:
    quantizer = ActivationQuantizer(2, signed=False, scale=1.0, method="pact")  # α = 3
    quantizer(torch.tensor([0.4, 1.6, 2.2])).sum().backward()
    assert quantizer.scale.grad.item() == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_step_of_sgd_takes_pacts_clipping_level_where_the_papers_step_does(bits: int) -> None:
    """Choi et al. 2018, Eq. 3: dy/dα is 1 where x ≥ α, so α falls by lr · Σ upstream there."""
    alpha, lr, top = 3.0, 0.01, 2**bits - 1
    quantizer = ActivationQuantizer(bits, signed=False, scale=alpha / top, method="pact")
    upstream = torch.tensor([0.7, -0.2, 1.5])
    (quantizer(torch.tensor([5.0, 9.0, 0.5])) * upstream).sum().backward()
    torch.optim.SGD([quantizer.scale], lr=lr).step()
    assert quantizer.scale.item() * top == pytest.approx(alpha - lr * (0.7 - 0.2), rel=1e-5)


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_a_scale_that_a_step_took_below_zero_learns_on(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    layers, _ = find_layers(model)
    quantizers = calibrate(model, layers, [torch.rand(8, 4)], bits=8, method=method)
    (scale,) = quantizers.parameters()
    scale.data.fill_(-0.01)
    quantizers.keep_positive()
    (-model(torch.rand(8, 4)).abs().sum()).backward()
    assert scale.item() > 0
    assert scale.grad.item() != 0


@pytest.mark.parametrize(("method", "parts"), [("lsq", 4), ("pact", 4), ("xnor", 2)])
def test_a_batch_in_parts_moves_scales_as_the_whole_batch_does(method: str, parts: int) -> None:
    bits = 1 if method == "xnor" else 3
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    layers, _ = find_layers(model)
    images = torch.randn(32, 6)
    quantizers = calibrate(model, layers, [images], bits=bits, method=method)
    model(images).square().mean().backward()
    whole = [scale.grad.clone() for scale in quantizers.parameters()]
    for scale in quantizers.parameters():
        scale.grad = None
    for part in images.chunk(parts):
        (model(part).square().mean() / parts).backward()
    for scale, expected in zip(quantizers.parameters(), whole, strict=True):
        torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-7)


def test_calibration_sees_all_columns_of_a_feature_map() -> None:
    """2^22 values of which 2^16 are looked at: every 64th of maps that are 64 wide would be their border."""
    images = torch.rand(16, 64, 64, 64, generator=torch.Generator().manual_seed(3))
    images[..., 0] *= 1e-3
    model = nn.Sequential(nn.Conv2d(64, 2, 1))
    layers, _ = find_layers(model)
    (quantizer,) = calibrate(model, layers, [images], bits=8).quantizers.values()
    with torch.no_grad():
        error = (quantizer(images) - images).square().mean().sqrt()
    assert error < 1 / 255  # of a step that reaches the largest value; half of it at most


def test_every_user_of_a_shared_weight_has_its_input_rounded() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    layers, _ = find_layers(model)
    assert owners(model, layers) == ["0", "2", "3"]
    found = calibrate(model, layers, [torch.rand(8, 4)], bits=4)
    assert (list(found.quantizers), found.unreached) == (["0", "2", "3"], [])


def test_another_processs_quantizers_bring_their_signs() -> None:
    """A shard may lack the rare negative values that another has."""
    model = nn.Sequential(nn.Linear(4, 3))
    layers, _ = find_layers(model)
    mine = calibrate(model, layers, [torch.rand(8, 4)], bits=4)
    theirs = calibrate(nn.Sequential(nn.Linear(4, 3)), layers, [torch.rand(8, 4) - 0.5], bits=4)
    assert [record.signed for record in mine.records()] == [False]
    mine.take(theirs.records())
    assert mine.records() == theirs.records()


def test_one_signed_bit_is_the_sign_and_passes_gradients_where_the_papers_does() -> None:
    quantizer = ActivationQuantizer(1, signed=True, scale=0.3, method="xnor")
    x = torch.tensor([[-2.0, -0.5, 0.0, 0.7, 1.0, 1.5]], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    out = quantizer(x)
    assert out[0].tolist() == pytest.approx([-0.3, -0.3, 0.3, 0.3, 0.3, 0.3])
    (out * upstream).sum().backward()
    assert x.grad[0].tolist() == [0, 2, 3, 4, 5, 0]  # where |x| ≤ 1
    assert quantizer.scale.grad.item() == pytest.approx((-1 - 2 + 3 + 4 + 5 + 6) / 6**0.5)


def test_one_bit_of_inputs_that_are_never_negative_is_0_or_the_scale() -> None:
    quantizer = ActivationQuantizer(1, signed=False, scale=0.4, method="xnor")
    assert quantizer(torch.tensor([0.0, 0.19, 0.21, 3.0])).tolist() == pytest.approx([0, 0, 0.4, 0.4])


def test_the_sign_s_scale_is_calibrated_to_the_mean_magnitude_and_the_networks_input_keeps_8_bits() -> None:
    model = small_model()
    layers, _ = find_layers(model)
    seen: list[torch.Tensor] = []
    handle = model[5].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    images = torch.randn(8, 1, 8, 8)
    records = calibrate(model, layers, [images], bits=1, method="xnor").records()
    handle.remove()
    assert [(r.module, r.bits, r.signed) for r in records] == [("0", 8, True), ("2", 1, False), ("5", 1, True)]
    assert records[2].scale == pytest.approx(float(seen[-1].abs().double().mean()), rel=1e-5)  # least squares for ±s


def test_the_networks_input_has_more_than_8_bits_where_more_are_asked_for() -> None:
    model = small_model()
    records = calibrate(model, find_layers(model)[0], [torch.randn(8, 1, 8, 8)], bits=12).records()
    assert [record.bits for record in records] == [12, 12, 12]


def test_dorefa_does_not_clip_an_image_of_positive_pixels_to_1() -> None:
    model = small_model()
    pixels = torch.linspace(0, 255, 4 * 64).view(4, 1, 8, 8)
    records = calibrate(model, find_layers(model)[0], [pixels], bits=2, method="dorefa").records()
    assert not records[0].signed
    assert records[0].scale == pytest.approx(1.0, rel=0.05)  # 255 steps over 0 … 255
    assert records[1].scale == pytest.approx(1 / 3)  # 3 steps over 0 … 1: Eq. 5 behind a ReLU


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3))


def test_signs_and_the_eight_bits_of_the_networks_input_come_from_calibration() -> None:
    model = small_model()
    layers, _ = find_layers(model)
    records = calibrate(model, layers, [torch.randn(8, 1, 8, 8)], bits=3).records()
    assert [(r.module, r.bits, r.signed) for r in records] == [("0", 8, True), ("2", 3, False), ("5", 3, True)]


class Branches(nn.Module):
    """Two layers read the image, one of them what the model's own preparation makes of it; the third reads their sum."""

    def __init__(self, prepare) -> None:
        super().__init__()
        self.near, self.far, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)
        self.prepare = prepare

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.near(x) + self.far(self.prepare(x))).relu()).mean((2, 3))


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: x,
        lambda x: x.view(len(x), -1).view_as(x),
        lambda x: x.clone(memory_format=torch.channels_last),
        lambda x: x.double().float(),
        lambda x: (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.2,
        lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
        nn.BatchNorm2d(3),
    ],
    ids=["itself", "a view", "another layout", "another type", "normalised", "channels turned", "BatchNorm"],
)
def test_every_layer_that_reads_the_image_has_8_bits(prepare) -> None:
    model = Branches(prepare)
    records = calibrate(model, find_layers(model)[0], [torch.rand(4, 3, 6, 6)], bits=2).records()
    assert {record.module: record.bits for record in records} == {"near": 8, "far": 8, "last": 2}


@pytest.mark.parametrize(("bits", "method"), [(1, "xnor"), (2, "lsq"), (2, "dorefa")])
def test_behind_a_first_layer_that_is_left_out_no_layer_has_8_bits(bits: int, method: str) -> None:
    model = small_model()
    layers, _ = find_layers(model, exclude=["0"])
    records = calibrate(model, layers, [5 * torch.randn(8, 1, 8, 8)], bits=bits, method=method).records()
    assert [(record.module, record.bits) for record in records] == [("2", bits), ("5", bits)]
    if method == "dorefa":
        assert records[0].scale == pytest.approx(1 / 3)  # [0, 1] is its range, but for the image


def test_a_layer_behind_a_recurrence_does_not_read_the_image() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.fc = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.rows(x.squeeze(1))[0][:, -1])

    model = Recurrent()
    records = calibrate(model, find_layers(model)[0], [torch.rand(4, 1, 8, 8)], bits=2).records()
    assert {record.module: record.bits for record in records} == {"rows": 8, "fc": 2}


class Tokens(nn.Module):
    """Two layers on 12 tokens of an image; the second may get them otherwise than [images, tokens, 6]."""

    def __init__(self, form: str = "batch first") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.form, self.first, self.second = form, nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        if self.form == "windows":
            return self.second(x.reshape(-1, 4, 6)).reshape(-1, 12, 2).mean(1)
        return self.second(x.transpose(0, 1)).mean(0) if self.form == "tokens first" else self.second(x).mean(1)


@pytest.mark.parametrize(("bits", "method"), [(3, "lsq"), (1, "xnor"), (3, "pact")])
@pytest.mark.parametrize("form", ["windows", "tokens first"])
def test_a_step_learns_as_fast_whatever_the_first_dimension_of_its_input_is(form: str, bits: int, method: str) -> None:
    """LSQ's N is the values of one image, here 72; the networks differ in how these are laid out, not in what they compute."""
    gradients = []
    for network in (Tokens(), Tokens(form)):
        images = torch.randn(16, 12, 6, generator=torch.Generator().manual_seed(1))
        quantizers = calibrate(network, find_layers(network)[0], [images], bits=bits, method=method)
        network(images[:7]).square().mean().backward()  # another batch than that of calibration
        gradients.append([scale.grad for scale in quantizers.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-8)
    assert [quantizer.image_values for quantizer in quantizers.quantizers.values()] == [None, 72]


def test_an_input_that_is_the_same_for_every_image_has_all_its_values_as_those_of_one() -> None:
    """The table of positions of Swin-V2's attention: [1, positions, 2], whatever the batch."""

    class Positions(Tokens):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x).mean(1)[:, :2] + self.second(torch.linspace(0, 1, 30).view(1, 5, 6)).mean(1)

    for count in (1, 4):
        model = Positions()
        quantizers = calibrate(model, find_layers(model)[0], [torch.randn(count, 12, 6)], bits=3).quantizers
        assert quantizers["second"].image_values == (None if count == 1 else 30)


def test_quantizers_from_a_file_count_the_values_of_an_image_anew() -> None:
    images = torch.randn(4, 12, 6)
    records = calibrate(Tokens("windows"), find_layers(Tokens())[0], [images], bits=3).records()
    model = Tokens("windows")
    attached = attach(model, records)
    assert attached.quantizers["second"].image_values is None
    attached.count_image_values(model, images)
    assert {name: q.image_values for name, q in attached.quantizers.items()} == {"first": None, "second": 72}
    assert attached.records() == records


def test_evaluation_does_not_depend_on_the_batch() -> None:
    model = small_model().eval()
    layers, _ = find_layers(model)
    calibrate(model, layers, [torch.randn(8, 1, 8, 8)], bits=3)
    x = torch.randn(6, 1, 8, 8)
    x[0] *= 100  # an outlier must not move its neighbours' scale
    alone = torch.cat([model(x[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(model(x), alone, atol=1e-6, rtol=1e-5)


def test_the_state_dict_stays_that_of_the_plain_model() -> None:
    model = small_model()
    before = set(model.state_dict())
    quantizers = calibrate(model, find_layers(model)[0], [torch.randn(2, 1, 8, 8)], bits=4)
    assert set(model.state_dict()) == before
    fresh = small_model()
    attach(fresh, quantizers.records())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), fresh(x))


def test_layers_that_no_hook_reaches_are_listed() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.a(x), self.b.weight)

    model = Functional()
    assert calibrate(model, find_layers(model)[0], [torch.randn(3, 4)], bits=4).unreached == ["b"]


def test_self_attention_keeps_getting_one_tensor_three_times() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    seen = []
    quantizers = attach(attention, [])
    assert quantizers.records() == []
    model = nn.ModuleDict({"attention": attention})
    layer = find_layers(model)[0][0]
    assert layer.name == "attention.in_proj_weight"
    from csqcli.quant.activations import ActivationRecord

    attach(model, [ActivationRecord("attention", 4, True, 0.2)])
    attention.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    x = torch.randn(1, 5, 8)
    attention(x, x, x)
    assert seen[0] is seen[1] is seen[2]
    assert len(seen[0].unique()) <= 16


@pytest.mark.parametrize("extra", [(), ("--set", "act_method=pact")], ids=["lsq", "pact"])
def test_activation_bits_reach_the_file_and_the_reloaded_model(csq, tmp_path: Path, extra: tuple[str, ...]) -> None:
    run = ("search", "--recipe", "digits", "--act-bits", 3, "--epochs", 2, "--quiet", "-o", tmp_path, *extra)
    assert csq(*run)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parity"]["max_logit_gap"] == 0
    assert [entry["bits"] for entry in report["activations"]] == [8, 3, 3, 3]
    result = json.loads(csq("evaluate", tmp_path / "model.safetensors", "--data", "digits", "--json")[1])
    assert result["top1"] == report["accuracy"]["hard_top1"]
    seen = {}
    model = csqcli.load(tmp_path / "model.safetensors")
    model.conv2.register_forward_pre_hook(lambda _, inputs: seen.update(conv2=inputs[0]))
    model(torch.randn(4, 1, 8, 8))
    scale = next(
        e.scale for e in header.read_manifest(tmp_path / "model.safetensors").activations if e.module == "conv2"
    )
    levels = (seen["conv2"] / scale).round()
    assert torch.equal(levels * scale, seen["conv2"])  # the quotient itself may miss a whole number by its last bit
    assert int(levels.max()) <= 7


def test_a_search_with_activations_resumes_to_the_same_bytes(csq, tmp_path: Path, monkeypatch) -> None:
    from csqcli.training.loop import Trainer

    arguments = ("search", "--recipe", "digits", "--act-bits", 4, "--epochs", 3, "--finetune-epochs", 1, "--quiet")
    assert csq(*arguments, "-o", tmp_path / "whole")[0] == 0
    original, calls = Trainer.run_epoch, iter(range(9))

    def interrupted(self, epoch, **more):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(self, epoch, **more)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    assert csq(*arguments, "-o", tmp_path / "broken")[0] == 130
    monkeypatch.setattr(Trainer, "run_epoch", original)
    assert csq(*arguments, "-o", tmp_path / "broken", "--resume")[0] == 0
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_finetuning_goes_on_with_one_quantizer_per_layer(csq, tmp_path: Path, monkeypatch) -> None:
    from csqcli.training.loop import Trainer

    plain = ("search", "--recipe", "digits", "--act-bits", 3, "--epochs", 1, "--quiet", "-o", tmp_path / "a")
    assert csq(*plain)[0] == 0
    hooks = []
    original = Trainer.run_epoch

    def counted(self, epoch, **more):
        hooks.extend(len(module._forward_pre_hooks) for module in (self.model.conv1, self.model.fc))
        return original(self, epoch, **more)

    monkeypatch.setattr(Trainer, "run_epoch", counted)
    model = tmp_path / "a" / "model.safetensors"
    assert csq("finetune", model, "--data", "digits", "--epochs", 1, "-o", tmp_path / "b", "--quiet")[0] == 0
    assert hooks == [1, 1]
    before, after = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    assert after["finetune"]["input_top1"] == before["accuracy"]["hard_top1"]
    if after["finetune"]["kept"] == "finetuned":
        assert [e["scale"] for e in after["activations"]] != [e["scale"] for e in before["activations"]]


def test_a_module_that_is_registered_twice_has_one_quantizer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model.alias = model[2]
    layers, _ = find_layers(model)
    assert layers[1].aliases == ("alias.weight",)
    images = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    found = calibrate(model, layers, [images], bits=4)
    assert list(found.quantizers) == ["0", "2"]
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 2


def fresh_network() -> nn.Sequential:
    """Two BatchNorms of a fresh network, whose inputs have another scale than the BatchNorms' running statistics say."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


IMAGES = 20 * torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_scales_of_an_untrained_network_fit_what_training_gives_its_layers() -> None:
    model = fresh_network()
    found = calibrate(model, find_layers(model)[0], [IMAGES], bits=3, untrained=True).records()
    # behind a BatchNorm of the batch half of all values are those of a normal distribution; the least squared error of 8 levels
    # of its positive half is at a step of about 0.3
    assert [0.2 < record.scale < 0.5 for record in found[1:]] == [True, True]
    in_eval = calibrate(fresh_network(), find_layers(model)[0], [IMAGES], bits=3).records()
    assert in_eval[1].scale > 2


def test_calibrating_an_untrained_network_leaves_it_as_it_was() -> None:
    model = fresh_network()
    model.train()
    model[1].eval()  # one that was frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = {name: value.data_ptr() for name, value in model.state_dict().items()}
    modes, rng = [module.training for module in model.modules()], torch.get_rng_state()
    calibrate(model, find_layers(model)[0], [IMAGES, IMAGES[:4]], bits=3, untrained=True)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name: value.data_ptr() for name, value in after.items()} == held


def test_an_untrained_network_with_statistics_is_calibrated_under_them() -> None:
    """A factory's own weights, or BatchNorms of a part that was trained."""
    models = fresh_network(), fresh_network()
    for model in models:
        model[1].running_mean.fill_(0.3)
        model[5].running_var.fill_(7.0)
    plain, untrained = (
        calibrate(model, find_layers(model)[0], [IMAGES], bits=3, untrained=asked).records()
        for model, asked in zip(models, (False, True), strict=True)
    )
    assert plain == untrained


def test_an_untrained_network_without_batchnorm_is_calibrated_as_any() -> None:
    records = [
        calibrate(model, find_layers(model)[0], [torch.ones(8, 1, 8, 8).cumsum(2)], bits=3, untrained=asked).records()
        for model, asked in ((small_model(), False), (small_model(), True))
    ]
    assert records[0] == records[1]


def test_an_untrained_network_is_not_calibrated_on_single_values_of_a_channel() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(UserError, match="no statistics of one image at a time"):
        calibrate(model, find_layers(model)[0], [torch.randn(1, 4)], bits=4, untrained=True)
    assert model.training


@pytest.mark.parametrize(
    ("extra", "batch"),
    [((), True), (("--float-epochs", 1), False), (("--epochs", 0), False), (("--set", "batchnorm=frozen"), False)],
    ids=["from scratch", "after float epochs", "nothing is trained", "BatchNorm is not trained"],
)
def test_a_run_calibrates_under_the_statistics_that_its_training_will_see(
    csq, tmp_path: Path, monkeypatch, extra: tuple[str, ...], batch: bool
) -> None:
    from csqcli.training import run

    asked = []
    original = run.activations.calibrate

    def calibrated(*positional, untrained, **more):
        asked.append(untrained)
        return original(*positional, untrained=untrained, **more)

    monkeypatch.setattr(run.activations, "calibrate", calibrated)
    search = (
        "search",
        "digits_cnn",
        "--no-pretrained",
        "--data",
        "digits",
        "--target-bits",
        3,
        "--act-bits",
        3,
        "--epochs",
        1,
        "--quiet",
    )
    limits = ("--set", "train_limit=128", "--set", "val_limit=50")
    code, _, err = csq(*search, *limits, "-o", tmp_path, *extra)
    assert code == 0, err
    assert asked == [batch]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_few_enormous_activations_do_not_round_all_others_to_zero(bits: int) -> None:
    values = torch.randn(2**16, generator=torch.Generator().manual_seed(bits))
    values[:10] = 60.0  # as in some tokens of large transformers
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(scale: float) -> float:
        array = values.double().numpy()
        return float(np.square(np.clip(np.round(array / scale), low, high) * scale - array).sum())

    scale = float(quantizer_of(bits, InputSample(values, signed=True)).scale.detach())
    assert error(scale) <= 1.05 * min(error(candidate) for candidate in np.geomspace(0.01, 70, 2000))
    assert bits > 2 or (torch.round(values / scale) != 0).float().mean() > 0.4


def test_a_fresh_networks_faint_activations_have_a_scale_that_the_file_holds() -> None:
    faint = quantizer_of(8, InputSample(torch.linspace(0, 1e-12, 100), signed=False))
    record = ActivationEntry(module="a", bits=8, signed=False, scale=float(faint.scale.detach()))
    assert 0 < record.scale < 1e-12


class Mixed(nn.Module):
    """A first convolution whose features meet the image again before the second reads them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second = how, nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x / 2)
        if self.how == "sum":
            y = y + x.mean(dim=1, keepdim=True)
        elif self.how == "mask":
            y = y * (x > 0)
        elif self.how == "in place":
            y = x.clone().add_(y)
        elif self.how == "sparse":
            y = y + torch.eye(8).to_sparse().to_dense()
        return self.second(y)


@pytest.mark.parametrize("how", ["sum", "mask", "in place", "sparse", ""])
def test_features_that_meet_the_image_again_are_no_image(how: str) -> None:
    given = inputs_from_one_image(Mixed(how), ["first", "second"], torch.randn(1, 3, 8, 8))
    assert (given["first"].is_image, given["second"].is_image) == (True, False)


@pytest.mark.parametrize(
    ("words", "untrained"),
    [
        ("--no-pretrained --set model.checkpoint=null", True),
        ("--no-pretrained --set model.checkpoint=null --set batchnorm=frozen", False),
        ("--no-pretrained --set model.checkpoint=null --epochs 0", False),
        ("--no-pretrained --set model.checkpoint=null --float-epochs 1 --set adaptation.lr=0.1", False),
        ("", False),
    ],
)
def test_a_search_calibrates_as_untrained_what_will_find_its_statistics(
    csq, tmp_path, words: str, untrained: bool
) -> None:
    asked = []
    whole = activations.calibrate

    def noted(*given, **options):
        asked.append(options["untrained"])
        return whole(*given, **options)

    settings = "--act-bits 3 --target-bits 2 --set max_steps=3 -q"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "calibrate", noted)
        epochs = "" if "--epochs 0" in words else "--epochs 1"
        code, _, error = csq(*f"search --recipe digits {words} {epochs} {settings}".split(), "-o", tmp_path / "run")
    assert code == 0, error
    assert asked == [untrained]
