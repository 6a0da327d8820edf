"""The network inside what torch.compile, data parallelism and weight averaging put around it."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The network whose state dict has its own names: no ``module.`` and no ``_orig_mod.`` in front of them.

    Taken off, in any order: torch.compile, DataParallel and DistributedDataParallel, torch's AveragedModel and timm's
    ModelEma, ModelEmaV2 and ModelEmaV3. Every other module is returned as it is.
    """
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile; its class is private
            inner = model._orig_mod
        elif isinstance(model, _WRAPPERS):
            inner = model.module
        elif _is_timm_average(model):
            inner = model.ema if isinstance(getattr(model, "ema", None), nn.Module) else model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def _is_timm_average(model: object) -> bool:
    """By name, because nothing in `quant` needs timm. ModelEma, the oldest, is no module itself."""
    classes = type(model).__mro__
    return any(cls.__module__ == "timm.utils.model_ema" and cls.__name__.startswith("ModelEma") for cls in classes)
