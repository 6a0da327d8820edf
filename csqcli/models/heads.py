"""The classifier at the end of a pretrained network, and how the classes of a data set belong to its outputs.

Three ways to bring data and head together: keep the head and map the data's labels into its outputs (:func:`map_labels`),
keep only the rows of the data's classes (:func:`subset_head`), or start a fresh one (:func:`new_head`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from csqcli.errors import UserError

IMAGENET_CLASSES = 1000

Head = nn.Linear | nn.Conv2d


def map_labels(classes: Sequence[str], outputs: int) -> list[int] | None:
    """For every class, the index of the output of an ImageNet head that stands for it: ``[output of each class]``.

    Classes may be named by WordNet id (``n01440764``) or by ImageNet's own names (``tench``, ``great white shark``), in any
    case and with spaces or underscores; all of them in the same way. ``outputs`` is the number of the head's outputs.

    None where the head is not one of 1000 classes, or where a class is not one of ImageNet's or names two of them (``crane``
    is a bird and a machine).
    """
    if outputs != IMAGENET_CLASSES or not classes:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    by_id = {name: index for index, name in enumerate(imagenet_ids())}
    if all(name in by_id for name in classes):
        return [by_id[name] for name in classes]
    by_name: dict[str, set[int]] = {}
    for index in range(outputs):
        for synonym in info.index_to_description(index).split(","):
            by_name.setdefault(_plain(synonym), set()).add(index)
    found = [by_name.get(_plain(name), set()) for name in classes]
    indices = [next(iter(candidates)) for candidates in found if len(candidates) == 1]
    return indices if len(indices) == len(classes) == len(set(indices)) else None


def imagenet_ids() -> list[str]:
    """The WordNet ids of ImageNet's 1000 classes, in the order in which pretrained heads have them."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_names())


def head_of(model: nn.Module) -> str:
    """The name of the module that gives a model's scores: a linear layer, or a 1×1 convolution.

    It is what timm's ``get_classifier`` returns; for other models, the last linear layer or 1×1 convolution that the module
    order holds. Raises UserError where there is none or more than one.
    """
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        names = [name for name, module in model.named_modules() if module is classifier and _is_head(module)]
    else:
        names = [name for name, module in _heads(model)][-1:]
    if len(names) != 1:
        raise UserError("no single linear layer gives this model's scores", where=type(model).__name__)
    return names[0]


def outputs_of(model: nn.Module) -> int:
    """How many scores a model's head gives."""
    return _outputs(_head(model, head_of(model)))


def subset_head(model: nn.Module, rows: Sequence[int]) -> None:
    """Keep the given outputs of a model's head, in the given order, in place; scores of the others are gone.

    Raises UserError for a row that the head does not have.
    """
    name = head_of(model)
    old = _head(model, name)
    index = torch.tensor(list(rows), dtype=torch.long, device=old.weight.device)
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= _outputs(old):
        raise UserError(f"the head has outputs 0 to {_outputs(old) - 1}, asked for {list(rows)[:8]}", where=name)
    fresh = _like(old, len(index))
    with torch.no_grad():
        fresh.weight.copy_(old.weight[index])
        if old.bias is not None and fresh.bias is not None:
            fresh.bias.copy_(old.bias[index])
    _replace(model, name, fresh)


def new_head(model: nn.Module, classes: int, *, seed: int = 0) -> None:
    """Give a model a fresh head of ``classes`` outputs, in place: small normal weights and zero biases.

    The weights depend on ``seed`` alone; torch's global random stream is left as it is.
    """
    name = head_of(model)
    fresh = _like(_head(model, name), classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # as in most fine-tuning recipes: scores start near zero, so the first steps do not upset the features
        fresh.weight.copy_(torch.randn(fresh.weight.shape, generator=generator) * 0.01)
        if fresh.bias is not None:
            fresh.bias.zero_()
    _replace(model, name, fresh)


def _is_head(module: nn.Module) -> bool:
    pointwise = isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear) or pointwise


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name and _is_head(module))


def _head(model: nn.Module, name: str) -> Head:
    module = model.get_submodule(name)
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    return module


def _outputs(head: Head) -> int:
    return int(head.weight.shape[0])


def _like(old: Head, outputs: int) -> Head:
    """A layer of the same kind, inputs, device and type, with another number of outputs."""
    made: Head
    with torch.random.fork_rng(devices=[]):  # its first weights are overwritten
        if isinstance(old, nn.Conv2d):
            made = nn.Conv2d(old.in_channels, outputs, 1, bias=old.bias is not None)
        else:
            made = nn.Linear(old.in_features, outputs, bias=old.bias is not None)
    return made.to(old.weight.device, old.weight.dtype).train(old.training)


def _replace(model: nn.Module, name: str, head: Head) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, head)
    if isinstance(getattr(model, "num_classes", None), int):
        setattr(model, "num_classes", _outputs(head))  # noqa: B010  # timm's own record of it


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").split()).lower()
