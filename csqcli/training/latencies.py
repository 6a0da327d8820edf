"""A budget in milliseconds: the latencies that it counts, as `csq bench --json` wrote them or the run measured them itself.

They are part of what a run knows (`RunRecord`), so that a resumed run, and the report, count with the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from csqcli.errors import UserError, first_problem
from csqcli.quant.costs import FLOAT_FORM, FORM_PLANES
from csqcli.system import files
from csqcli.system.limits import read_json

NANOSECONDS_PER_MS = 10**6
_BYTES, _VALUES = 2**24, 2**20  # of a table; a layer takes some 40 values
_HINT = "`csq bench MODEL --json` writes one"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Time(_Part):
    """A median."""

    ms: float = Field(ge=0, le=1e9)


class LayerTime(_Part):
    """A layer's, by form; none where nothing was measured."""

    name: str = Field(max_length=512)
    latency: dict[str, Time | None]


class NetworkTime(_Part):
    """The whole network's in fp32, where it was measured."""

    fp32: Time | None = None


class Latencies(_Part):
    """What `csq bench` says that a budget needs; further fields are passed over."""

    schema_version: Literal[1]
    engine: str = Field(max_length=64)
    engine_version: str = Field(max_length=64)
    threads: int = Field(ge=1)
    batch: int = Field(ge=1)
    input_size: list[int]
    network: NetworkTime
    layers: list[LayerTime] = Field(min_length=1)

    @property
    def by_layer(self) -> dict[str, dict[str, int]]:
        """Nanoseconds of one image by layer and form, of the forms that csq knows and the engine has."""
        known = (FLOAT_FORM, *FORM_PLANES)
        return {
            layer.name: {
                form: round(time.ms * NANOSECONDS_PER_MS / self.batch)
                for form, time in layer.latency.items()
                if time is not None and form in known
            }
            for layer in self.layers
        }

    @property
    def beside(self) -> int:
        """Nanoseconds that the network takes beyond its layers in fp32; 0 where it was not measured or its layers take longer alone."""
        if self.network.fp32 is None:
            return 0
        layers = sum(forms.get(FLOAT_FORM, 0) for forms in self.by_layer.values())
        return max(round(self.network.fp32.ms * NANOSECONDS_PER_MS / self.batch) - layers, 0)


def read_table(path: Path) -> Latencies:
    """The latencies in a file. UserError for one that is none."""
    try:
        raw = read_json(files.read_regular(path, limit=_BYTES), nodes=_VALUES)
        found = Latencies.model_validate(raw)
    except ValidationError as error:
        raise UserError(
            f"is no table of latencies ({first_problem(error).text})", where=str(path), hint=_HINT
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot be read ({reason})", where=str(path), hint=_HINT) from None
    for name, forms in found.by_layer.items():
        if forms and FLOAT_FORM not in forms:
            raise UserError(f"says nothing of `{name}` in {FLOAT_FORM}", where=str(path), hint=_HINT)
    return found


def check_covers(found: Latencies, names: Sequence[str], input_size: Sequence[Any], *, where: str) -> None:
    """UserError where a table is of another network, or of images of another size."""
    size, own = ("×".join(map(str, sides)) for sides in (input_size, found.input_size))
    if size != own:
        raise UserError(
            f"is for images of {own}, and these are {size}", where=where, hint="bench the model at that size"
        )
    missing = [name for name in names if name not in {layer.name for layer in found.layers}]
    if missing:
        raise UserError(f"says nothing of `{missing[0]}`", where=where, hint="bench the model that is searched")
