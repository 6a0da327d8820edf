"""Triton's kernels against the CPU reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from csqcli.quant.bitplanes import BitPlanes
from csqcli.quant.layers import find_layers
from csqcli.quant.methods import max_abs_scale
from tests.test_state import rounded_once

pytest.importorskip("triton")


def planes_of(model: nn.Module, device: str, state_dtype: torch.dtype = torch.float32) -> BitPlanes:
    layers, _ = find_layers(model)
    planes = BitPlanes(layers, bits=5, device=torch.device(device), state_dtype=state_dtype)
    planes.initialise(logit=0.7, mask_logit=0.4, beta=2.0, scales=[max_abs_scale(layer.parameter) for layer in layers])
    return planes


def compare(device: str) -> None:
    """Two updates and materialisations of both, from the same state."""
    from csqcli.quant import kernels

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Linear(40, 30)).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).to(device)
    reference, tested = planes_of(model, "cpu"), planes_of(twin, device)
    tested.kernels = kernels
    for step in range(2):
        for ours, theirs in zip(reference.layers, tested.layers, strict=True):
            ours.parameter.grad = torch.randn_like(ours.parameter)
            theirs.parameter.grad = ours.parameter.grad.to(device)
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
        wanted, got = (planes.update_gates(2.0 + step, **options) for planes in (reference, tested))
        for name in ("mask", "scale", "squared"):
            torch.testing.assert_close(getattr(got, name).cpu(), getattr(wanted, name), rtol=1e-5, atol=1e-5)
        for planes in (reference, tested):
            planes.materialise(2.0 + step)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(tested.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(reference.layers, tested.layers, strict=True):
            torch.testing.assert_close(theirs.parameter.detach().cpu(), ours.parameter.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(reference.pos, planes_of(model, "cpu").pos)


def compare_rounding(device: str) -> None:
    """bfloat16 state after one update: the exact result's neighbours, and right on average."""
    from csqcli.quant import kernels

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 50), nn.Linear(50, 30)).to(device)
    tested, exact = planes_of(model, device, torch.bfloat16), planes_of(copy.deepcopy(model), device)
    tested.kernels, exact.kernels = kernels, None
    rounded_once(tested, exact)


def test_interpreted_kernels_equal_the_reference() -> None:
    """In a process of its own: Triton decides on interpretation when it is first imported."""
    here = Path(__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parent.parent)}
    code = "from tests import test_kernels as t; t.compare('cpu'); t.compare_rounding('cpu')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_kernels_equal_the_reference() -> None:
    compare("cuda")
    compare_rounding("cuda")
