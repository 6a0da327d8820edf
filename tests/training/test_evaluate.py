"""Accuracy is counted on finite scores only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from csqcli.errors import UserError
from csqcli.training.evaluate import evaluate


class _Loader:
    batches, samples, skipped = 1, 4, 0

    def epoch(self, epoch: int, start: int = 0):
        yield torch.ones(4, 3), torch.zeros(4, dtype=torch.long)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, value)
    with pytest.raises(UserError, match="scores are NaN or infinite"):
        evaluate(model, _Loader())
    nn.init.zeros_(model.bias)
    assert evaluate(model, _Loader()).samples == 4
