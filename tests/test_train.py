"""The training loop's options: what they may change, and what they may not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from csqcli import checkpoint_file, pipeline
from csqcli.progress import Display
from csqcli.recipe import resolve


def run(output: Path, **overrides: Any) -> checkpoint_file.QuantizedFile:
    shared = {
        "model.source": "plain_models:group_norm_cnn",
        "model.checkpoint": None,
        "model.pretrained": False,
        "quantization.target_bits": 2.5,
        "epochs": 2,
        "data.train_limit": 256,
        "data.batch_size": 64,
    }
    recipe = resolve("digits", shared | {key.replace("__", "."): value for key, value in overrides.items()})
    pipeline.search(recipe, output, display=Display(quiet=True))
    return checkpoint_file.read(output / "model.safetensors")


def differing(one: checkpoint_file.QuantizedFile, two: checkpoint_file.QuantizedFile) -> float:
    """Largest share of a layer's integers that differ."""
    pairs = zip(one.layers, two.layers, strict=True)
    return max(float((a.integers != b.integers).float().mean()) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> checkpoint_file.QuantizedFile:
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("micro_batch", [16, 40])
def test_micro_batches_add_up_to_the_batch(micro_batch: int, whole: Any, tmp_path: Path) -> None:
    """A network without BatchNorm sees the same mean gradient, though 64 is no multiple of 40."""
    parts = run(tmp_path / "run", data__micro_batch=micro_batch)
    assert [layer.mask.tolist() for layer in parts.layers] == [layer.mask.tolist() for layer in whole.layers]
    assert differing(parts, whole) < 0.05  # sums in another order flip few roundings


@pytest.mark.parametrize("method", ["csq", "csq-paper", "lsq"])
def test_channels_last_trains_the_same_model(method: str, tmp_path: Path) -> None:
    more = {"quantization__method": method, "quantization__target_bits": 3}
    files = [run(tmp_path / setting, channels_last=setting, **more) for setting in ("on", "off")]
    assert differing(*files) < 0.05
    assert all(layer.integers.is_contiguous() for layer in files[0].layers)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_compiled_run_trains_the_same_model(whole: Any, tmp_path: Path) -> None:
    compiled = run(tmp_path / "run", compile=True)
    assert differing(compiled, whole) < 0.05
    torch._dynamo.reset()
