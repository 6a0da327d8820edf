"""The latencies that a budget in milliseconds counts: out of a table, or measured on the model that is searched."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csqcli.exporting.bench import Setting, bench_network
from csqcli.exporting.engines import ENGINES, choose
from csqcli.models.spec import parse
from csqcli.quant import activations
from csqcli.quant.layers import Layer
from csqcli.recipe.schema import Recipe
from csqcli.system.progress import Display
from csqcli.training.latencies import Latencies, check_covers, read_table


def check_source(recipe: Recipe) -> None:
    """UserError for a table that cannot be read, and an engine that is not installed; before there is a model to measure."""
    settings = recipe.quantization
    if settings.latency_table is not None:
        read_table(Path(settings.latency_table))
    elif settings.target_latency is not None:
        choose(settings.latency_engine, where="quantization.latency_engine")


def latencies_of(
    recipe: Recipe, model: nn.Module, layers: Sequence[Layer], config: Mapping[str, Any], *, display: Display
) -> Latencies:
    """The latencies of ``model``'s layers for a recipe with a target in milliseconds. The model and PyTorch's random stream stay as
    they are. UserError for a table of another model, and for an engine that is not installed."""
    settings, names = recipe.quantization, [layer.name for layer in layers]
    size = config["input_size"]
    if settings.latency_table is not None:
        found = read_table(Path(settings.latency_table))
        check_covers(found, names, size, where=settings.latency_table)
        return found
    engine = choose(settings.latency_engine, where="quantization.latency_engine")
    display.say(f"measuring latencies in {ENGINES[engine].title}, one thread, one image; --latency-table spares it")
    own = copy.deepcopy(model).to("cpu", torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    activations.detach(own)
    spec = parse(recipe.model.source or "", recipe.model.arguments)
    with torch.random.fork_rng([]):
        measured = bench_network(own, spec, config, Setting(engine), exclude=recipe.layers.exclude, display=display)
    found = Latencies.model_validate(measured)
    check_covers(found, names, size, where=engine)
    return found
