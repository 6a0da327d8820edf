"""Triton's kernels against the CPU reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from csqcli.quant.layers import find_layers
from csqcli.quant.method_settings import StagedSettings
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.csq import max_abs_scale
from csqcli.quant.methods.staged import Staged
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups
from csqcli.quant.passes.adam import LatentAdam
from csqcli.quant.passes.bitplanes import BitPlanes
from csqcli.quant.passes.rounding import Staircase, levels_of, plane_shares, soft_planes
from tests.quant.test_state import rounded_once

pytest.importorskip("triton")


def planes_of(model: nn.Module, device: str, state_dtype: torch.dtype = torch.float32) -> BitPlanes:
    layers, _ = find_layers(model)
    planes = BitPlanes(layers, bits=5, device=torch.device(device), state_dtype=state_dtype)
    planes.initialise(logit=0.7, mask_logit=0.4, beta=2.0, scales=[max_abs_scale(layer.parameter) for layer in layers])
    return planes


def compare(device: str) -> None:
    """Two updates and materialisations of both, from the same state."""
    from csqcli.quant.passes import kernels

    kernels.check(torch.device(device))
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
            if name == "orders":
                continue
            torch.testing.assert_close(tested.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(reference.layers, tested.layers, strict=True):
            torch.testing.assert_close(theirs.parameter.detach().cpu(), ours.parameter.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(reference.pos, planes_of(model, "cpu").pos)


def compare_rounding(device: str) -> None:
    """bfloat16 state after one update: the exact result's neighbours, and right on average."""
    from csqcli.quant.passes import kernels

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 50), nn.Linear(50, 30)).to(device)
    tested, exact = planes_of(model, device, torch.bfloat16), planes_of(copy.deepcopy(model), device)
    tested.kernels, exact.kernels = kernels, None
    rounded_once(tested, exact)


def compare_latents(device: str) -> None:
    """Adam's update, the soft planes and both staircases: channels in front and in the middle, a step for each or for all."""
    from csqcli.quant.passes import kernels

    rng = torch.Generator().manual_seed(0)
    for shape, per_channel in (((1, 7, 300), True), ((5, 6, 9), True), ((1, 7, 300), False)):
        latent = 2 * torch.randn(shape, generator=rng)
        channels = shape[1] if per_channel else 1
        unit, width = (0.1 + torch.rand(channels, 1, generator=rng) for _ in range(2))
        gradients = [torch.randn(shape, generator=rng) * 1e-3 for _ in range(3)]

        def on(value: Tensor) -> Tensor:
            return value.clone().to(device)

        for edge in (None, width * 1.5):
            ours, theirs = latent.clone(), on(latent)
            adam = LatentAdam([ours], beta1=0.9, beta2=0.99, state_dtype=torch.float32)
            twin = LatentAdam([theirs], beta1=0.9, beta2=0.99, state_dtype=torch.float32)
            twin.kernels = kernels
            for step, gradient in enumerate(gradients):
                edges = None if edge is None else [edge]
                options = {"lr": 0.01, "seed": step}
                adam.step([ours], [gradient], units=[unit], edges=edges, **options)
                edges = None if edge is None else [on(edge)]
                twin.step([theirs], [on(gradient)], units=[on(unit)], edges=edges, **options)
            for wanted, got in (
                (ours, theirs),
                (adam.exp_avg[0], twin.exp_avg[0]),
                (adam.exp_avg_sq[0], twin.exp_avg_sq[0]),
            ):
                torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-6)
            assert not torch.equal(ours, latent)

        out, wanted = on(latent), latent.clone()
        latent.view(-1)[:8] = torch.arange(-4, 4) + 0.5  # ties, where the step is 1
        for planes, flank in ((1, None), (3, None), (2, 1.0), (2, 0.25), (0, None), (0, 0.5)):
            stairs = Staircase(unit, torch.ones_like(width), levels_of(torch.ones(planes, dtype=torch.bool)))
            stairs.write(latent, wanted, sharpness=None if flank is None else 1 - flank)
            kernels.staircase(on(latent), out, on(unit), on(stairs.width), top=stairs.top, flank=flank)
            torch.testing.assert_close(out.cpu(), wanted, rtol=1e-5, atol=1e-5)
            if flank is None:
                assert torch.equal(out.cpu(), wanted)  # the very integers

        steps = torch.stack([width * 0.6**k for k in range(8)])
        (shares,) = plane_shares(torch.tensor([[1.0, 0.9, 0.9, 0.4, 0.1, 1e-3, 1e-5, 0.0]]))
        soft_planes(latent, wanted, unit=unit, steps=steps, shares=shares)
        kernels.soft_planes(on(latent), out, on(unit), on(steps), on(shares))
        torch.testing.assert_close(out.cpu(), wanted, rtol=1e-5, atol=1e-5)


def compare_rounded_moments(device: str) -> None:
    """bfloat16 moments after one update of float32 latents: the exact ones' neighbours, the second right on average."""
    from csqcli.quant.passes import kernels

    latent, unit = torch.zeros(1, 40, 500, device=device), torch.ones(1, 1, device=device)
    gradient = torch.rand(latent.shape, generator=torch.Generator().manual_seed(0)).to(device)
    made = [LatentAdam([latent.clone()], beta1=0.9, beta2=0.99, state_dtype=d) for d in (torch.bfloat16, torch.float32)]
    made[0].kernels, made[1].kernels = kernels, None
    for adam in made:
        adam.step([latent.clone()], [gradient], units=[unit], edges=None, lr=0.01, seed=5)
    bf16, fp32 = made
    for rounded, exact in ((bf16.exp_avg[0], fp32.exp_avg[0]), (bf16.exp_avg_sq[0], fp32.exp_avg_sq[0])):
        error = rounded.float() / exact - 1
        assert float(error.abs().max()) <= 2**-7
        assert abs(float(error.mean())) < 1e-4


def compare_searches(device: str) -> None:
    """The default method through all of its stages, with the kernels and without."""
    from csqcli.quant.passes import adam, kernels, rounding

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ConvTranspose2d(12, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    images = torch.randn(16, 2, 6, 6)
    wanted, got = (copy.deepcopy(model).to(place) for place in ("cpu", device))
    for module, used in ((wanted, None), (got, kernels)):
        with pytest.MonkeyPatch.context() as patch:  # interpreted, there is no GPU to ask for
            for user in (adam, rounding):
                patch.setattr(user, "kernels_for", lambda device, used=used: used)
            layers, _ = find_layers(module)
            plan = plan_for(layers, 2, Schedule(30, 10))
            method = Staged(layers, plan, StagedSettings(search_share=0.3, refresh_every=2))
            optimizer = QuantizedOptimizer(method, torch.optim.SGD(base_groups(module, method), lr=0.05))
            for _ in range(30):
                module(images.to(layers[0].parameter.device)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    for ours, theirs in zip(wanted.parameters(), got.parameters(), strict=True):
        moved = (ours - theirs.cpu()).abs() > 1e-3  # a last bit may decide a rounding
        assert float(moved.float().mean()) < 0.02


def keep_nan(device: str) -> None:
    """A gradient that is not a number reaches latents and weights, where it is noticed."""
    from csqcli.quant.passes import kernels

    latent, one = torch.zeros(1, 2, 3, device=device), torch.ones(1, 1, device=device)
    adam = LatentAdam([latent], beta1=0.9, beta2=0.99, state_dtype=torch.float32)
    adam.kernels = kernels
    gradient = torch.full_like(latent, torch.nan)
    adam.step([latent], [gradient], units=[one], edges=[one], lr=0.1, seed=0)
    out = torch.zeros_like(latent)
    for flank in (None, 0.5):
        kernels.staircase(latent, out.zero_(), one, one, top=3, flank=flank)
        assert out.isnan().all()
    kernels.soft_planes(latent, out.zero_(), one, torch.ones(2, 1, 1, device=device), torch.ones(2, device=device))
    assert latent.isnan().all()
    assert out.isnan().all()


COMPARISONS = compare, compare_rounding, compare_latents, compare_rounded_moments, compare_searches, keep_nan


def test_interpreted_kernels_equal_the_reference() -> None:
    """In a process of its own: Triton decides on interpretation when it is first imported."""
    pytest.importorskip(
        "triton", minversion="3.2"
    )  # earlier interpreters know less than the compilers of their release
    here = Path(__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parents[2])}
    code = "from tests.quant import test_kernels as t; [f('cpu') for f in t.COMPARISONS]"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


GATES = {"BITS": 8, "BLOCK": 1024}
SIZES, NUMBERS = ["i32"] * 5, ["fp32"] * 5


@pytest.mark.parametrize("capability", [80, 90])  # A100, H100
@pytest.mark.parametrize("state", ["*fp32", "*bf16"])
def test_kernels_compile_for_devices_that_are_not_here(
    state: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter is lenient about types; the compiler, down to machine code, is not."""
    triton = pytest.importorskip("triton", minversion="3.2")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from csqcli.quant.passes import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rounded = {"ROUND": state == "*bf16"}
    gates, floats = [state] * 4, ["*fp32"] * 5
    cases: list[tuple[Any, list[str], dict[str, Any]]] = [
        (kernels._soft_weight_kernel, [*gates[:2], *floats[:2], *SIZES[:2], "fp32"], GATES),
        (kernels._update_gates_kernel, [*gates, *floats[:4], *SIZES[:2], *NUMBERS[:4], "i32"], GATES | rounded),
        (
            kernels._update_latents_kernel,
            [*floats[:2], *gates[:2], *floats[:2], *SIZES, *NUMBERS, "i32"],
            {"CLIP": True, "BLOCK": 1024} | rounded,
        ),
        (kernels._staircase_kernel, [*floats[:4], *SIZES, *NUMBERS[:2]], {"SOFT": True, "BLOCK": 1024}),
        (kernels._soft_planes_kernel, [*floats, *SIZES, "i32"], GATES),
    ]
    for kernel, types, constants in cases:
        assert len(types) + len(constants) == len(kernel.arg_names)
        signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.OPTIONS)
        assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_kernels_equal_the_reference() -> None:
    for compare_on in COMPARISONS:
        compare_on("cuda")
