"""Planes that somebody wrote down: a name or glob of weights → planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csqcli.errors import UserError
from csqcli.quant.budget import Budget
from csqcli.quant.layers import Layer, match

_WHERE = "quantization.planes"


def written_planes(layers: Sequence[Layer], budget: Budget, planes: Mapping[str, int]) -> list[int]:
    """The planes of every layer; where several entries match it, the last one counts.

    UserError for a name that matches nothing, a layer that is named nowhere, and planes that the budget or the layers' rules
    do not allow.
    """
    if not planes:
        raise UserError("says no planes", where=_WHERE, hint="--planes FILE, as `csq allocate --output FILE` writes it")
    names = [layer.name for layer in layers]
    found: dict[str, int] = {}
    for pattern, count in planes.items():
        found.update(dict.fromkeys(match(pattern, names, where=_WHERE), count))
    for name, few, most in zip(names, budget.limits.min_planes, budget.limits.max_planes, strict=True):
        if name not in found:
            raise UserError(f"says nothing of `{name}`", where=_WHERE, hint='name every layer; "*": 3 is for all')
        if not few <= found[name] <= most:
            hint = "change it, or layers.floor, layers.min_bits, layers.max_bits or layers.keep"
            raise UserError(
                f"`{name}` at {found[name]} planes; its rules and the method allow {few} to {most}",
                where=_WHERE,
                hint=hint,
            )
    chosen = [found[name] for name in names]
    for ceiling in budget.ceilings:
        if ceiling.spent(chosen) <= ceiling.allowed:
            continue
        mean, share = budget.mean_planes(chosen), ceiling.spent(chosen) / max(ceiling.allowed, 1)
        what = f"{mean:.4f} planes per weight cost {share:.4g} times what the target of {ceiling.target:g} allows"
        raise UserError(what, where=_WHERE, hint="raise --target-bits, or lower them")
    return chosen
