"""bfloat16 state: half the bytes, rounded at random so that small updates are not lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from csqcli.quant.layers import Layer, find_layers
from csqcli.quant.masks import SoftMasks
from csqcli.quant.method_settings import CSQSettings, StagedSettings
from csqcli.quant.methods.base import Schedule, WeightMethod, plan_for
from csqcli.quant.methods.csq import BitLevelCSQ, max_abs_scale
from csqcli.quant.methods.staged import Staged
from csqcli.quant.passes import rounding
from csqcli.quant.passes.adam import LatentAdam
from csqcli.quant.passes.bitplanes import BitPlanes
from csqcli.quant.passes.rounding import Staircase
from csqcli.quant.passes.state import Noise, kernels_for, round_into

CPU = torch.device("cpu")


def neighbours(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers at or next below and next above each float32 in magnitude, as float32."""
    low = (value.view(torch.int32) >> 16 << 16).view(torch.float32)
    high = ((value.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    return low, high


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.integers(0, 2**32))
def test_rounding_gives_a_neighbour_and_leaves_bfloat16_numbers_alone(values: list[float], seed: int) -> None:
    exact = torch.tensor(values)
    target = torch.empty(len(values), dtype=torch.bfloat16)
    noise = Noise(len(values), seed=seed, device=CPU)
    round_into(target, exact.clone(), noise.window(1, len(values))[0])
    low, high = neighbours(exact)
    assert ((target.float() == low) | (target.float() == high)).all()
    again = target.clone()
    round_into(again, target.float(), noise.window(1, len(values))[0])
    assert torch.equal(again, target)


def test_steps_far_below_the_last_digit_add_up() -> None:
    """1 + 1000 · 1e-4; rounding to the nearest would stay at 1, whose last digit is worth 0.0078."""
    state = torch.ones(4096, dtype=torch.bfloat16)
    for step in range(1000):
        value = state.float().add_(1e-4)
        round_into(state, value, Noise(4096, seed=step, device=CPU).window(1, 4096)[0])
    assert float(state.float().mean()) == pytest.approx(1.1, abs=0.002)


def test_the_same_seed_rounds_alike_and_another_does_not() -> None:
    first, again, other = (Noise(1000, seed=seed, device=CPU).window(8, 1000) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.float().mean() == pytest.approx(2**15, rel=0.05)
    assert 0 <= int(first.min()) <= int(first.max()) < 2**16


def rounded_once(tested: BitPlanes, exact: BitPlanes) -> None:
    """One update of bfloat16 state against float32 state that starts at the same numbers."""
    for name in ("pos", "neg", "pos_momentum", "neg_momentum"):
        state = getattr(tested, name)
        state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(len(name))))
        getattr(exact, name).copy_(state)
    for ours, theirs in zip(tested.layers, exact.layers, strict=True):
        ours.parameter.grad = torch.randn_like(ours.parameter)
        theirs.parameter.grad = ours.parameter.grad.clone()
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    got, wanted = tested.update_gates(2.0, **options, seed=7), exact.update_gates(2.0, **options, seed=7)
    torch.testing.assert_close(got.mask, wanted.mask, rtol=1e-4, atol=1e-4)
    for name in ("pos", "neg"):
        value, state = getattr(exact, name), getattr(tested, name).float()
        low, high = neighbours(value)
        near = (state - value).abs() <= (high - low).abs() * 1.0001  # another order of operations moves the last bit
        assert near.all()
        place = (state - low) / (high - low)  # 1 where it was rounded away from zero
        share = (value - low) / (high - low)
        assert abs(float((place - share).mean())) < 0.01  # of a last digit; 4 standard deviations of this many numbers
        assert 0.05 < float((place > 0.5).float().mean()) < 0.95
    momentum = tested.pos_momentum.float()
    torch.testing.assert_close(momentum, exact.pos_momentum, rtol=2**-8, atol=1e-5)


def test_gates_in_bfloat16_are_the_exact_update_s_neighbours_and_right_on_average() -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(200, 60), nn.Linear(200, 60)
    twin.load_state_dict(model.state_dict())
    made = []
    for module, dtype in ((model, torch.bfloat16), (twin, torch.float32)):
        layers, _ = find_layers(module)
        planes = BitPlanes(layers, bits=5, device=CPU, state_dtype=dtype)
        scales = [max_abs_scale(layer.parameter) for layer in layers]
        planes.initialise(logit=0.7, mask_logit=0.4, beta=2.0, scales=scales)
        made.append(planes)
    rounded_once(*made)


def test_kernels_that_cannot_be_built_are_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("Failed to find C compiler.\nmore")))
    assert kernels_for(torch.device("cuda", 7)) is None
    assert kernels_for(torch.device("cuda", 7)) is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "Triton's kernels do not run here (Failed to find C compiler.)"
    ]


class NoKernels:
    """Stands for Triton's kernels where only what surrounds them matters."""

    def update_gates(self, pos: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return pos.new_zeros(len(pos)), pos.new_zeros(())

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def to_meta(value: Any) -> Any:
    """The same state on the device that has no values: whatever asks for one raises."""
    if isinstance(value, Tensor):
        return nn.Parameter(value.to("meta")) if isinstance(value, nn.Parameter) else value.to("meta")
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_meta, value))
    if isinstance(value, Staircase):  # levels are on the CPU wherever the latents are
        return replace(value, scale=to_meta(value.scale), width=to_meta(value.width))
    if isinstance(value, Layer):
        return replace(value, parameter=to_meta(value.parameter))
    if isinstance(value, (BitPlanes, LatentAdam, SoftMasks)):
        value.__dict__.update({name: to_meta(part) for name, part in value.__dict__.items()})
        if not isinstance(value, SoftMasks):
            value.kernels = NoKernels()
    return value


SCHEDULE = Schedule(40, 10)


def soft_masks(layers: list[Layer]) -> WeightMethod:
    return Staged(layers, plan_for(layers, 2, SCHEDULE), StagedSettings(search_share=0.5, refresh_every=2))


def fixed_planes(layers: list[Layer]) -> WeightMethod:
    return Staged(layers, plan_for(layers, 2, SCHEDULE, planes=[2] * len(layers)))


def gates(layers: list[Layer]) -> WeightMethod:
    return BitLevelCSQ(layers, plan_for(layers, 2, SCHEDULE), CSQSettings(refit_scale=True, beta_schedule="step"))


@pytest.mark.parametrize(("make", "steps"), [(soft_masks, 0), (fixed_planes, 22), (fixed_planes, 36), (gates, 0)])
def test_a_step_reads_nothing_back_from_the_device(
    make: Callable[[list[Layer]], WeightMethod], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "kernels_for", lambda device: NoKernels())
    layers, _ = find_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(20, 30)))
    method = make(layers)
    state = {name: to_meta(value) for name, value in vars(method).items() if name != "masks"}  # masks are on the CPU
    method.__dict__.update(state)
    for step in range(steps, steps + 4):
        for layer in method.layers:
            layer.parameter.grad = torch.zeros_like(layer.parameter)
        method.collect(step, lr=0.1, lr_share=1.0)
        method.materialise(step + 1)
    with pytest.raises(RuntimeError):  # what a read does
        method.layers[0].parameter.sum().item()
