"""Models of timm, torchvision, csq's own networks and factories: built from a spec, with their weights and data config."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from csqcli.errors import UserError, machine_fault, user_code_error
from csqcli.models import networks
from csqcli.models.checkpoints import Checkpoint, choose_weights, fit_state_dict
from csqcli.models.data_config import IMAGENET_CONFIG, DataConfig, usable_config
from csqcli.models.spec import ModelSpec, known_names, parse
from csqcli.system.choices import Weights
from csqcli.system.limits import check_arguments
from csqcli.system.plugins import import_attribute

log = logging.getLogger(__name__)

_INPUT_SIZES = {  # torchvision's models that are no image classifiers: an input that all of their task accept
    "detection": (3, 320, 320),
    "segmentation": (3, 520, 520),
    "video": (3, 16, 112, 112),  # C, T, H, W; H and W are the weights' own
    "optical flow": (3, 128, 128),  # of each of the two images
}


_OF_A_SEARCH = "pass --checkpoint FILE or --no-pretrained"


class NoWeights(UserError):
    """A library's pretrained weights that are not available. The hint is of a search; see :func:`without_weights`."""


@contextlib.contextmanager
def without_weights(hint: str) -> Iterator[None]:
    """Inside, weights that are not available are an error with this hint: commands name the checkpoint in different places."""
    try:
        yield
    except NoWeights as error:
        raise UserError(error.what, where=error.where, hint=hint) from error.__cause__


@dataclass
class LoadedModel:
    """A model with its first weights, and what the data must look like for it."""

    model: nn.Module
    spec: ModelSpec
    data_config: DataConfig
    weights_from: str  # "pretrained", "random", "factory" (whatever it gives), or the checkpoint's label
    checkpoint_sha256: str | None = None
    notes: tuple[str, ...] = ()  # what was done to make a checkpoint fit, one sentence each, for the user
    assumed: tuple[str, ...] = ()  # what its factory leaves open, likewise

    @property
    def lines(self) -> list[str]:
        """Notes with what they are about in front, as commands print them."""
        return [
            *(f"{self.spec.source}: {note}" for note in self.assumed),
            *(f"{self.weights_from}: {note}" for note in self.notes),
        ]


def build(spec: ModelSpec, *, num_classes: int | None, pretrained: bool = False) -> nn.Module:
    """The network of a spec. ``num_classes`` None leaves the constructor's own.

    Raises UserError when arguments do not fit or pretrained weights are not available.
    """
    kwargs = dict(spec.arguments)
    try:
        check_arguments(kwargs)
        if num_classes is not None:
            kwargs["num_classes"] = num_classes
        if spec.library == "csq":
            if pretrained:
                raise NoWeights("this architecture has no pretrained weights", where=spec.name, hint=_OF_A_SEARCH)
            return networks.REGISTRY[spec.name](**kwargs)
        if spec.library == "timm":
            return _build_timm(spec, kwargs, pretrained)
        if spec.library == "torchvision":
            return _build_torchvision(spec, kwargs, pretrained)
        return _build_factory(spec, kwargs, pretrained)
    except (TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if machine_fault(error) is not None:
            raise
        refused = UserError(f"the constructor refused its arguments: {error}", where=spec.source)
        raise (user_code_error(error) or refused) from error


def load(
    source: str,
    *,
    num_classes: int | None,
    pretrained: bool = True,
    checkpoint: Checkpoint | None = None,
    weights: Weights = "auto",
    arguments: Mapping[str, Any] | None = None,
    num_classes_from: str = "the data",
    own_head: bool = False,
) -> LoadedModel:
    """A float32 model with weights: the checkpoint's when one is given, else pretrained, else random ones.

    ``num_classes`` None takes the library's own number of outputs; with ``own_head`` it gives way to the number that the
    weights have. ``weights`` chooses between averaged and raw weights where a checkpoint holds both. Raises UserError for
    unknown models and for weights that do not fit or are not available.
    """
    spec = parse(source, arguments)
    if checkpoint is None:
        # a factory has no number of its own that could be asked for
        asked = None if own_head and pretrained and spec.library != "factory" else num_classes
        model = build(spec, num_classes=asked, pretrained=pretrained)
        label, assumed = "pretrained" if pretrained else "random", _assumed(model, spec)
        if pretrained and spec.library == "factory" and not _takes(import_attribute(spec.name), "pretrained"):
            label = "factory"
            assumed += ("no checkpoint given, and its factory takes no `pretrained`: weights are those that it gives",)
        return LoadedModel(model.float(), spec, data_config(model, spec), label, assumed=assumed)
    model = build(spec, num_classes=num_classes)
    chosen, label = choose_weights(checkpoint, model.state_dict(), weights=weights), checkpoint.label
    own = _outputs_in(chosen.state, model.state_dict(), num_classes) if own_head else None
    if own is not None:
        model, num_classes = build(spec, num_classes=own), own
    fit_state_dict(model, chosen.state, where=label, num_classes=num_classes, num_classes_from=num_classes_from)
    config, assumed = data_config(model, spec), _assumed(model, spec)
    return LoadedModel(model.float(), spec, config, label, checkpoint.sha256, chosen.notes, assumed)


def _outputs_in(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], num_classes: int | None) -> int | None:
    """The number of outputs for which ``state`` was saved, where that alone keeps it from fitting ``wanted``; else None."""
    odd = [name for name in state if name in wanted and state[name].shape != wanted[name].shape]
    heads = [name for name in odd if wanted[name].shape[:1] == (num_classes,) and state[name].dim()]
    alike = all(state[name].shape[1:] == wanted[name].shape[1:] for name in heads)
    sizes = {int(state[name].shape[0]) for name in heads}
    return sizes.pop() if alike and len(sizes) == 1 and heads == odd else None


def data_config(model: nn.Module, spec: ModelSpec) -> DataConfig:
    """Input size, mean, std, interpolation and crop of the model's pretrained weights (or of its architecture).

    Raises UserError where a factory's model states what cannot be.
    """
    return usable_config(_data_config(model, spec), where=spec.source)


def _data_config(model: nn.Module, spec: ModelSpec) -> DataConfig:
    if spec.library == "timm":
        from timm.data import resolve_model_data_config

        resolved = resolve_model_data_config(model)
        own = {key: resolved[key] for key in IMAGENET_CONFIG if key in resolved}
        return _for_channels(own, spec.arguments.get("in_chans"))
    if spec.library == "torchvision":
        return _torchvision_config(spec)
    return IMAGENET_CONFIG | dict(getattr(model, "data_config", {}))


def _for_channels(config: DataConfig, channels: Any) -> DataConfig:
    """The config of a timm model that was built for so many channels, which its own goes on giving as three.

    Where they are not its own, the mean of the means and of the deviations stands for all.
    """
    if not isinstance(channels, int) or channels == config["input_size"][0]:
        return config
    averaged = {key: (math.fsum(config[key]) / len(config[key]),) for key in ("mean", "std")}
    return config | {"input_size": (channels, *config["input_size"][1:])} | averaged


def _assumed(model: nn.Module, spec: ModelSpec) -> tuple[str, ...]:
    if spec.library != "factory" or getattr(model, "data_config", {}):
        return ()
    size = "×".join(map(str, IMAGENET_CONFIG["input_size"]))
    return (
        f"its factory sets no data_config (docs/data.md): images are taken as {size} with ImageNet's mean and std, "
        "where data.input_size, data.mean and data.std do not say otherwise",
    )


def _build_timm(spec: ModelSpec, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    reachable = not pretrained or _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with _timm_quiet(), contextlib.nullcontext() if reachable else _cache_only():
            return timm.create_model(spec.name, pretrained=pretrained, **kwargs)
    except OSError as error:  # huggingface_hub, urllib and requests all raise kinds of OSError for "no network"
        raise _no_weights(spec, error) from error
    except RuntimeError as error:
        if pretrained and ("pretrained" in str(error).lower() or "hub" in str(error).lower()):
            raise _no_weights(spec, error) from error
        raise


@contextlib.contextmanager
def _timm_quiet() -> Iterator[None]:
    """Without what timm logs below an error."""
    log_of_timm = logging.getLogger("timm")
    level = log_of_timm.level
    log_of_timm.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log_of_timm.setLevel(level)


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    """Weights out of huggingface_hub's cache alone; where no network is, its client would retry for a minute."""
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _build_torchvision(spec: ModelSpec, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    import torchvision

    if task_of(spec) == "optical flow":
        kwargs.pop("num_classes", None)
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(spec.name)).parameters:
        kwargs.setdefault("weights_backbone", None)  # its default is a download
    model = torchvision.models.get_model(spec.name, weights=None, **kwargs)
    if not pretrained:
        return model
    weights = torchvision.models.get_model_weights(spec.name).DEFAULT
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(weights.url).path).name)
    try:
        if not cached.exists() and not _reachable(weights.url):
            raise OSError(f"{urlsplit(weights.url).hostname} cannot be resolved")
        state = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise _no_weights(spec, error) from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fitting = {name: tensor for name, tensor in state.items() if shapes.get(name) == tensor.shape}
    fresh = sorted(set(shapes) - set(fitting))
    if fresh:  # another number of classes: the head starts from random weights, as timm does it
        log.warning("%s: %s start from random weights", spec.source, ", ".join(fresh))
    model.load_state_dict(fitting, strict=False)
    return model


def _build_factory(spec: ModelSpec, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    factory = import_attribute(spec.name, where=spec.name)
    if "num_classes" in kwargs and not _takes(factory, "num_classes"):
        kwargs.pop("num_classes")
    if pretrained and _takes(factory, "pretrained"):
        kwargs["pretrained"] = True
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise UserError(f"the factory returned {type(model).__name__}, not a torch.nn.Module", where=spec.name)
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        hint = "let the factory run it on an image once"
        raise UserError(
            f"the factory returned lazy modules, whose shapes are open ({lazy[0]})", where=spec.name, hint=hint
        )
    return model


def _takes(factory: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(factory).parameters
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _no_weights(spec: ModelSpec, error: Exception) -> NoWeights:
    reason = str(error).strip().splitlines()[0][:120].rstrip() if str(error).strip() else type(error).__name__
    what = f"pretrained weights are not available, no network or not in the local cache ({reason})"
    return NoWeights(what, where=spec.source, hint=_OF_A_SEARCH)


def _reachable(url: str) -> bool:
    """Whether a download can be tried at all: its host resolves, or a proxy is set that may know it."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(url).hostname, 443)
    except OSError:
        return False
    return True


def task_of(spec: ModelSpec) -> str:
    """What a model is made for: "classification" (of images), "detection", "segmentation", "video" or "optical flow".

    torchvision's modules say so; everything else is taken for a classifier.
    """
    if spec.library != "torchvision" or spec.name not in known_names("torchvision"):
        return "classification"
    import torchvision

    package = torchvision.models.get_model_builder(spec.name).__module__.removeprefix("torchvision.models.")
    task = package.partition(".")[0].replace("_", " ")
    return task if task in _INPUT_SIZES else "classification"


def _torchvision_config(spec: ModelSpec) -> DataConfig:
    import torchvision

    task = task_of(spec)
    transforms = torchvision.models.get_model_weights(spec.name).DEFAULT.transforms()
    if task in _INPUT_SIZES:
        size = _INPUT_SIZES[task]
        if task == "video":
            size = (*size[:2], *transforms.crop_size)
        return IMAGENET_CONFIG | {"input_size": size}
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "interpolation": transforms.interpolation.value,
        "crop_pct": crop_share(crop, resize),
        "crop_mode": "center",
    }


def crop_share(crop: int, resize: int) -> float:
    """crop_pct for which timm's floor(crop / crop_pct) gives back exactly ``resize``."""
    share = crop / resize
    return share if math.floor(crop / share) == resize else crop / (resize + 0.5)
