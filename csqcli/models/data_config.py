"""The data config: what images must look like for a model, in timm's terms, and the rules that it must keep.

A config is a dictionary of ``input_size`` (channels, height, width; video has frames after the channels), ``mean`` and
``std`` (per channel or one for all, of pixels from 0 to 1), ``interpolation``, ``crop_pct`` (share of the resized image
that the central crop keeps) and ``crop_mode``. Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from csqcli.errors import UserError, first_problem

DataConfig = dict[str, Any]
MAX_SIDE = 4096  # of every entry of input_size
MAX_NUMBERS = 3 * MAX_SIDE**2  # of one image
IMAGENET_CONFIG: DataConfig = {  # for models that state no config of their own
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


class _DataConfigRules(BaseModel):
    """The keys of a data config that csq uses, with their types and ranges."""

    model_config = ConfigDict(allow_inf_nan=False)

    input_size: tuple[Annotated[int, Field(strict=True)], ...] = Field(min_length=3, max_length=4)  # C, (T,) H, W
    mean: list[Annotated[float, Field(strict=True, ge=-1e6, le=1e6)]]
    std: list[Annotated[float, Field(strict=True, ge=1e-6, le=1e6)]]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
    crop_pct: float = Field(1.0, strict=True, gt=0.01, le=1)
    crop_mode: Literal["center", "squash", "border"] = "center"

    @model_validator(mode="after")
    def _fits(self) -> _DataConfigRules:
        channels = self.input_size[0]
        if not 1 <= min(self.input_size) or max(self.input_size) > MAX_SIDE:
            raise ValueError(f"input_size {list(self.input_size)} is not within 1 to {MAX_SIDE}")
        if math.prod(self.input_size) > MAX_NUMBERS:
            raise ValueError(f"input_size {list(self.input_size)} is more than {MAX_NUMBERS:,} numbers")
        if len(self.mean) not in (1, channels) or len(self.std) not in (1, channels):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations for {channels} channels")
        return self


def check_data_config(config: Mapping[str, Any]) -> DataConfig:
    """The config as a dictionary of its own, when batches can be made from it. Raises ValueError when they cannot."""
    try:
        _DataConfigRules.model_validate(dict(config))
    except ValidationError as error:
        raise ValueError(first_problem(error).text) from None
    return dict(config)


def usable_config(config: Mapping[str, Any], *, where: str) -> DataConfig:
    """As :func:`check_data_config`, but raises a UserError that names ``where`` the config came from."""
    try:
        return check_data_config(config)
    except ValueError as error:
        raise UserError(f"data config: {error}", where=where) from None
