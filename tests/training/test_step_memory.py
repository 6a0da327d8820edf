"""What the memory estimate counts as kept per weight: planes of the widest layer, moments of the base optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import csqcli
from csqcli.quant.hard_layer import HardLayer, top_planes
from csqcli.recipe.resolve import resolve
from csqcli.system import memory
from csqcli.training import setup

GATES = 16  # bytes per plane: two float32 logits and their momenta


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes per weight of every estimate that is made."""
    seen: list[int] = []
    estimate = memory.estimate

    def listening(*given: Any, state_bytes: int, **more: Any) -> memory.StepMemory:
        seen.append(state_bytes)
        return estimate(*given, state_bytes=state_bytes, **more)

    monkeypatch.setattr(memory, "estimate", listening)
    return seen


class Known:
    """What the estimate asks of a run."""

    def __init__(self, planes: list[int] | None) -> None:
        self.record = type("Record", (), {"planes": planes})()
        self.model, self.config = torch.nn.Linear(4, 4), {"input_size": (4,)}
        self.device = torch.device("cpu")


@pytest.mark.parametrize(
    ("planes", "more", "most"),
    [
        (None, {}, 2),
        ([8, 3, 1, 8], {"quantization.allocator": "importance"}, 8),
        ([3, 3, 1, 2], {"quantization.allocator": "importance"}, 3),
        (None, {"quantization.allocator": "importance"}, 8),
        (None, {"layers.min_bits": {"fc": 5}}, 8),
        (None, {"layers.keep": ["fc"]}, 8),
    ],
)
def test_gates_at_given_planes_are_counted_at_those_of_the_widest_layer(
    planes: list[int] | None, more: dict[str, Any], most: int, counted: list[int]
) -> None:
    recipe = resolve("digits", {"quantization.method": "csq-uniform", "quantization.target_bits": 2, **more})
    setup.step_memory(Known(planes), recipe, recipe.card, amp=False)  # type: ignore[arg-type]
    assert counted == [GATES * most]


def test_gates_that_train_a_delivered_file_on_are_counted_at_its_planes(counted: list[int]) -> None:
    recipe = resolve("digits", {"quantization.method": "csq-uniform", "quantization.target_bits": None})
    start = [HardLayer("fc.weight", torch.zeros(4, 4, dtype=torch.int32), torch.ones(1), top_planes(2, 5))]
    setup.step_memory(Known(None), recipe, recipe.card, amp=False, start=start)  # type: ignore[arg-type]
    assert counted == [GATES * 5]


@pytest.mark.parametrize(
    ("method", "optimizer", "kept"),
    [
        ("lsq", "momentum", 4 + 4),  # a latent, its momentum
        ("lsq", "adamw", 4 + 8),  # and two moments
        ("lsq", "adan", 4 + 16),
        ("bsq", "adamw", 8 * (8 + 16)),  # p and n of eight planes, two moments of each
        ("float", "adamw", 8),
        ("staged", "adamw", 12),  # a latent and Adam's moments of its own
        ("csq", "adamw", GATES * 8),
    ],
)
def test_moments_of_the_base_optimizer_are_counted_where_it_trains_the_weights(
    method: str, optimizer: str, kept: int, counted: list[int]
) -> None:
    target = None if method == "float" else 2
    settings = {"quantization.method": method, "quantization.target_bits": target, "optimizer.name": optimizer}
    recipe = resolve("digits", {"epochs": 2, **settings})
    setup.step_memory(Known(None), recipe, recipe.card, amp=False)  # type: ignore[arg-type]
    assert counted == [kept]


def test_a_run_of_mixed_planes_keeps_no_more_than_was_counted(counted: list[int], tmp_path: Path) -> None:
    settings = {"quantization.method": "csq-uniform", "quantization.allocator": "importance"}
    report = csqcli.search(
        output=tmp_path, recipe="digits", target_bits=2, epochs=1, max_steps=2, threads=1, **settings
    )
    assert max(counted) >= GATES * max(layer["bits"] for layer in report["layers"])


def test_trying_an_optimizer_draws_no_number_of_the_runs() -> None:
    recipe = resolve("digits", {"optimizer.name": "adamw"})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert setup.moment_bytes(recipe.optimizer, torch.device("cpu")) == 8
    assert torch.equal(torch.get_rng_state(), before)
