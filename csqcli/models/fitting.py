"""A model with its first weights, made to fit the classes of a data set. A pretrained head is never replaced in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from csqcli.errors import UserError
from csqcli.models import heads
from csqcli.models.checkpoints import Checkpoint
from csqcli.models.libraries import LoadedModel, build, load
from csqcli.models.spec import ModelSpec, parse
from csqcli.system.choices import Head, Weights


@dataclass(frozen=True)
class FittedModel:
    """A loaded model whose outputs the classes of a data set belong to."""

    loaded: LoadedModel
    names: list[str]  # of the model's outputs, in order
    outputs: list[int]  # [output of each class]


def load_for(
    source: str,
    classes: Sequence[str],
    *,
    head: Head = "auto",
    pretrained: bool = True,
    checkpoint: Checkpoint | None = None,
    weights: Weights = "auto",
    arguments: Mapping[str, Any] | None = None,
    classes_from: str = "the data",
    seed: int = 0,
) -> FittedModel:
    """As :func:`libraries.load`, for data with the given ``classes``; ``head`` says what becomes of the weights' own head.

    - ``keep``: it stays whole, and labels are mapped into its outputs.
    - ``subset``: of its outputs those of the classes stay.
    - ``new``: a fresh one takes its place, of weights that depend on ``seed``.
    - ``auto``: it stays where it has as many outputs as there are classes, else ``subset``.

    Raises UserError, which says what to type, where classes and outputs cannot be brought together.
    """
    spec, count = parse(source, arguments), len(classes)
    identity = list(range(count))
    if checkpoint is None and not pretrained:
        if head in ("keep", "subset"):
            raise UserError("random weights have no head to keep", where=f"--head {head}", hint="leave --head out")
        loaded = load(source, num_classes=count, pretrained=False, arguments=arguments)
        return FittedModel(loaded, list(classes), identity)
    loaded = load(
        source,
        num_classes=count,
        pretrained=pretrained,
        checkpoint=checkpoint,
        weights=weights,
        arguments=arguments,
        num_classes_from=classes_from,
        own_head=True,
    )
    found = _outputs(loaded.model, count)
    if head == "new":
        return _with_new_head(loaded, spec, classes, seed=seed, had=found)
    mapped = heads.map_labels(classes, found) if found is not None else None
    if found == count and mapped is None and head != "subset":
        return FittedModel(loaded, list(classes), identity)
    if found is None or mapped is None:
        what = f"the weights have {_so_many(found)}, {classes_from} has {count} classes"
        if found == count:
            what = f"the classes of {classes_from} have no names of ImageNet's"
        where = checkpoint.label if checkpoint is not None else spec.source
        if loaded.weights_from == "factory" and found not in (None, count):
            what = f"the factory built {found} outputs for {count} classes"  # which it was asked for
            raise UserError(what, where=where, hint="let it take num_classes and pass it on to the last layer")
        raise UserError(what, where=where, hint=_advice(found, count, head))
    if head == "keep" or found == count:
        note = f"labels mapped into its {found} outputs"
        return FittedModel(_noted(loaded, note), heads.imagenet_ids(), mapped)
    heads.subset_head(loaded.model, mapped)
    _check_rebuilds(loaded.model, spec, count)
    note = f"kept {count} of the head's {found} outputs, those of the data's classes (--head keep keeps all)"
    return FittedModel(_noted(loaded, note), list(classes), identity)


def _with_new_head(
    loaded: LoadedModel, spec: ModelSpec, classes: Sequence[str], *, seed: int, had: int | None
) -> FittedModel:
    heads.new_head(loaded.model, len(classes), seed=seed)
    _check_rebuilds(loaded.model, spec, len(classes))
    note = f"its head of {_so_many(had)} was replaced by a fresh one of {len(classes)}"
    return FittedModel(_noted(loaded, note), list(classes), list(range(len(classes))))


def _outputs(model: nn.Module, count: int) -> int | None:
    """How many scores the model gives; None where it has no head at all.

    A factory was asked for ``count`` outputs, and what its last layer is used for is not known: it is taken at its word.
    """
    known = getattr(model, "num_classes", None)
    if isinstance(known, int):
        return known or None
    try:
        return heads.outputs_of(model)
    except UserError:
        return count


def _check_rebuilds(model: nn.Module, spec: ModelSpec, count: int) -> None:
    """UserError where the constructor does not make this model with so many classes: its file could not be loaded."""
    made = build(spec, num_classes=count).state_dict()
    own = model.state_dict()
    odd = [name for name in own if name not in made or made[name].shape != own[name].shape]
    if odd or made.keys() != own.keys():
        what = f"does not make a model of {count} outputs when it is asked to ({(odd or sorted(made))[0]} differs)"
        raise UserError(what, where=spec.source, hint="let it take num_classes")


def _noted(loaded: LoadedModel, note: str) -> LoadedModel:
    return replace(loaded, notes=(*loaded.notes, note))


def _so_many(outputs: int | None) -> str:
    return "no head" if outputs is None else f"{outputs} outputs"


def _advice(outputs: int | None, count: int, head: Head) -> str:
    if outputs == count:
        return "leave --head out: there are as many outputs as classes"
    ways = ["--head new starts with a fresh head"] if head != "keep" else []
    if outputs == heads.IMAGENET_CLASSES:
        ways.append("folders named by WordNet ids or ImageNet's class names are mapped into it")
    return "; ".join(ways) or "give data with the classes that it was trained on"
