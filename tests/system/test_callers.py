"""What a function of the library leaves as it found it: threads, random streams, flags of other libraries."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch

import csqcli
from csqcli import UserError, pipeline  # noqa: F401  # some library that it imports draws once from Python's stream
from csqcli.models import libraries

THREADS = 3  # of the caller; the calls below ask for one


def drawn() -> tuple[Any, ...]:
    """What each stream would give next, and the number of threads."""
    return random.random(), float(np.random.random()), torch.rand(3).tolist(), torch.initial_seed(), torch.get_num_threads()  # fmt: skip


def undisturbed_by(call: Callable[[], Any]) -> bool:
    before = torch.get_num_threads()

    def start() -> None:
        torch.set_num_threads(THREADS)
        torch.manual_seed(11)
        np.random.seed(12)
        random.seed(13)

    try:
        start()
        wanted = drawn()
        start()
        call()
        return drawn() == wanted
    finally:
        torch.set_num_threads(before)


def test_a_search_and_what_looks_at_its_file_leave_threads_and_random_streams(tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"recipe": "digits", "threads": 1}
    assert undisturbed_by(lambda: csqcli.search(target_bits=2, output=run, epochs=1, max_steps=2, **settings))
    assert undisturbed_by(lambda: csqcli.finetune(run, data="digits", epochs=1, output=tmp_path / "t", max_steps=2))
    assert undisturbed_by(lambda: csqcli.evaluate(run, "digits", val_limit=20))
    assert undisturbed_by(lambda: csqcli.load(run))
    assert undisturbed_by(lambda: csqcli.export(run, tmp_path / "x.safetensors", form="bit-packed"))
    assert undisturbed_by(lambda: csqcli.explain(run, "digits", val_limit=20, swaps=1))
    assert undisturbed_by(lambda: csqcli.inspect("digits_cnn"))
    assert undisturbed_by(lambda: csqcli.sensitivity(data="digits", widths=(1,), val_limit=20, **settings))
    assert undisturbed_by(lambda: csqcli.allocate(target_bits=2, **settings))


def test_a_search_that_fails_leaves_them_too(tmp_path: Path) -> None:
    def fails() -> None:
        with pytest.raises(UserError, match="at the fewest planes"):
            csqcli.search(recipe="digits", target_size="5kB", output=tmp_path / "run", threads=1)

    assert undisturbed_by(fails)


def test_a_download_that_fails_leaves_the_flags_of_other_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "_reachable", lambda url: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    of_timm = logging.getLogger("timm")
    before = of_timm.level, huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="pretrained weights"):
        libraries.load("timm:resnet18", num_classes=1000)
    assert (of_timm.level, huggingface_hub.constants.HF_HUB_OFFLINE) == before
