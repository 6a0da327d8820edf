"""A stand-in for HAQ (Wang et al., CVPR 2019): black-box search over the planes of every layer, rewarded by accuracy.

HAQ trains a reinforcement-learning agent (DDPG) that chooses widths layer by layer, lowers them in a fixed order until the
budget is kept, trains an epoch and takes the accuracy as reward. Here an evolution strategy (CMA-ES, by the package `cmaes`)
proposes one weight per layer on the squared rounding errors, the knapsack turns them into planes within the budget, and the
reward is the measured accuracy of the rounded network, not trained on. Every allocation that spends the budget can be
proposed that way, since what planes a layer gets rises with its weight alone; and none is wasted on one that does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import nn

from csqcli.quant.budget import Budget, allocate
from csqcli.quant.layers import Layer
from csqcli.quant.masks import savings
from csqcli.quant.measuring import Batches, Score, Watch, no_progress, rounded, score, squared_errors, weights_as

_SPREAD = 2.0  # of the first proposals, in powers of e: a plane more quarters a layer's squared error
_CACHED_BYTES = 2**30  # of rounded weights that are kept


def searched_planes(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    budget: Budget,
    *,
    trials: int,
    seed: int = 0,
    watch: Watch = no_progress,
) -> list[int]:
    """Planes of the best of ``trials`` networks that were measured: highest top-1 on ``batches``, ties by the lower loss.

    The first one weighs all layers alike. Needs the package `cmaes`.
    """
    import cmaes

    bits = len(budget.table[0]) - 1
    errors = savings(squared_errors(layers, bits), 1.0)
    kept = [(images, labels) for images, labels in batches]
    tried: dict[tuple[int, ...], Score] = {}
    table = _RoundedWeights(layers)
    count = len(layers)
    optimizer = (
        cmaes.SepCMA if count > 100 else cmaes.CMA
    )  # full covariances of many layers need more trials than there are
    search = optimizer(mean=numpy.zeros(count), sigma=_SPREAD, seed=seed % 2**32)

    def measured(logs: numpy.ndarray) -> tuple[tuple[int, ...], float]:
        """The planes of a proposal, and what the strategy minimises."""
        factors = torch.from_numpy(logs).clamp(-50, 50).exp().unsqueeze(1)
        planes = tuple(allocate(errors * factors, budget))
        if planes not in tried:
            with weights_as((layer, table.of(index, planes[index])) for index, layer in enumerate(layers)):
                tried[planes] = score(model, kept)
        return planes, -tried[planes].top1 + _tie(tried[planes])

    with watch("measuring networks", trials) as tell:
        best = min([measured(numpy.zeros(count))], key=lambda found: found[1])
        tell(1)
        done = 1
        while done < trials:
            answers = []
            for _ in range(search.population_size):
                logs = search.ask()
                answers.append((logs, *measured(logs)))
                done += 1
                tell(min(done, trials))
                if done >= trials:
                    break
            best = min([best, *((planes, value) for _, planes, value in answers)], key=lambda found: found[1])
            if len(answers) == search.population_size:
                search.tell([(logs, value) for logs, _, value in answers])
    return list(best[0])


def _tie(found: Score) -> float:
    """Less than one image's worth of top-1, growing with the loss."""
    return 99 / found.images * found.loss / (1 + found.loss)


class _RoundedWeights:
    """Layers at given planes, rounded once each as far as memory is meant for it."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers, self.room = layers, _CACHED_BYTES
        self.known: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, index: int, planes: int) -> torch.Tensor:
        if (index, planes) in self.known:
            return self.known[index, planes]
        weight = rounded(self.layers[index], planes)
        size = weight.numel() * weight.element_size()
        if size <= self.room:
            self.known[index, planes], self.room = weight, self.room - size
        return weight
