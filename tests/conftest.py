"""Shared fixtures. Everything runs on one thread, so results do not depend on the machine's core count."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from csqcli.cli import app as cli
from csqcli.system.heap import keep_freed_memory
from tests import commands, traces

commands.make_once()
keep_freed_memory()  # as the command does, from the first test on
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: workers share the cores already
# The same examples at every run, so that a failure belongs to the change that shows it; HYPOTHESIS_PROFILE=default draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
os.environ.pop("COLUMNS", None)  # the terminal of whoever runs the tests, as pytest-xdist hands it on


_LONG = (
    *("test_model_sweep", "test_faults", "test_int8", "test_distributed", "test_options", "test_fuzz", "test_kernels"),
    *("test_onnx", "test_loop", "test_sweep", "test_litert", "test_tensorrt", "test_bench", "test_app", "test_latent"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first, or one process would still be at them when the others have nothing left to do."""
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(_LONG)))


@pytest.fixture
def csq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line through the real entry point: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["csq", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def remembered_traces() -> Iterator[None]:
    """The networks that a file's tests export are traced once: for files that export the same ones again and again."""
    with traces.remembered():
        yield


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes that a network can tell apart (dark, bright), 12 training and 6 validation images of 40×32 pixels."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 6), ("val", 3)):
        for label, level in (("dark", 60), ("bright", 190)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level - 40, level + 40, (32, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short digits search at 2 bits (session-wide)."""
    from csqcli import pipeline
    from csqcli.recipe.resolve import resolve
    from csqcli.system.progress import Display

    output = tmp_path_factory.mktemp("digits")
    recipe = resolve("digits", {"epochs": 4, "quantization.target_bits": 2})
    pipeline.search(recipe, output, display=Display(quiet=True))
    return output
