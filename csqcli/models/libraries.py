"""``"resnet18"``, ``"timm:…"``, ``"torchvision:…"``, ``"pkg.module:factory"`` and checkpoints → a model and its data config."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import math
import os
import pickle
import socket
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from csqcli.errors import UserError, did_you_mean, machine_fault
from csqcli.models import networks as own
from csqcli.system.limits import check_archive, check_arguments

log = logging.getLogger(__name__)

DataConfig = dict[str, Any]
MAX_SIDE, MAX_CLASSES = 4096, 10**6
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "ema",
)  # keys that wrap a state dict, preferred first
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
_FALLBACK_CONFIG: DataConfig = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
_INPUT_SIZES = {  # torchvision's models that are no image classifiers: an input that all of their task accept
    "detection": (3, 320, 320),
    "segmentation": (3, 520, 520),
    "video": (3, 16, 112, 112),  # C, T, H, W; H and W are the weights' own
    "optical flow": (3, 128, 128),  # of each of the two images
}


class _DataConfigRules(BaseModel):
    """What a data config may say."""

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
        if len(self.mean) not in (1, channels) or len(self.std) not in (1, channels):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations for {channels} channels")
        return self


@dataclass(frozen=True)
class ModelSpec:
    """Enough to build the architecture again: library, name, constructor arguments."""

    library: str  # "timm" | "torchvision" | "csq" | "factory"
    name: str  # the library's name, or "package.module:factory"
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.name if self.library == "factory" else f"{self.library}:{self.name}"


@dataclass
class LoadedModel:
    """A model with its first weights, and what the data must look like for it."""

    model: nn.Module
    spec: ModelSpec
    data_config: DataConfig
    weights_from: str  # "pretrained", "random", or the checkpoint's file name
    checkpoint_sha256: str | None = None


def parse(source: str, arguments: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec for what a user typed. UserError for unknown names, with the nearest ones."""
    kwargs = dict(arguments or {})
    library, colon, name = source.partition(":")
    if colon and library in ("timm", "torchvision", "csq"):
        known = _known_names(library)
        if name.partition(".")[0] not in known:
            raise UserError(f"no model `{name}` in {library}", where=source, hint=did_you_mean(name, known))
        return ModelSpec(library, name, kwargs)
    if colon:
        if not library or not name:
            raise UserError("not a model", where=source, hint="write package.module:factory")
        return ModelSpec("factory", source, kwargs)
    known_everywhere: list[str] = []
    for library in ("csq", "timm", "torchvision"):
        known = _known_names(library)
        if source.partition(".")[0] in known:
            return ModelSpec(library, source, kwargs)
        known_everywhere += known
    hint = did_you_mean(source, known_everywhere) or "give a timm or torchvision name, or package.module:factory"
    if Path(source).exists():
        hint = "this is a path: give a model's name, and weights by --checkpoint; `csq report` describes a csq file"
    raise UserError("unknown model", where=source, hint=hint)


def build(spec: ModelSpec, *, num_classes: int | None, pretrained: bool = False) -> nn.Module:
    """The network of a spec. ``num_classes`` None leaves the constructor's own.

    Raises UserError when arguments do not fit or pretrained weights cannot be had.
    """
    kwargs = dict(spec.arguments)
    try:
        check_arguments(kwargs)
        if num_classes is not None:
            kwargs["num_classes"] = num_classes
        if spec.library == "csq":
            if pretrained:
                raise UserError(
                    "this architecture has no pretrained weights",
                    where=spec.name,
                    hint="pass --checkpoint FILE or --no-pretrained",
                )
            return own.REGISTRY[spec.name](**kwargs)
        if spec.library == "timm":
            return _build_timm(spec, kwargs, pretrained)
        if spec.library == "torchvision":
            return _build_torchvision(spec, kwargs, pretrained)
        return _build_factory(spec, kwargs, pretrained)
    except (TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if machine_fault(error) is not None:
            raise
        raise UserError(f"the constructor refused its arguments: {error}", where=spec.source) from error


def load(
    source: str,
    *,
    num_classes: int | None,
    pretrained: bool = True,
    checkpoint: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    num_classes_from: str = "the data",
) -> LoadedModel:
    """Model with weights: a checkpoint when given, else pretrained, else random ones.

    Without data, ``num_classes`` None takes the checkpoint's or the library's own.
    """
    spec = parse(source, arguments)
    if checkpoint is None:
        model = build(spec, num_classes=num_classes, pretrained=pretrained)
        origin = "pretrained" if pretrained else "random"
        return LoadedModel(model.float(), spec, data_config(model, spec), origin)
    state, digest, label = read_checkpoint(checkpoint)
    model = build(spec, num_classes=num_classes)
    fit_state_dict(model, state, where=label, num_classes=num_classes, num_classes_from=num_classes_from)
    return LoadedModel(model.float(), spec, data_config(model, spec), label, digest)


def read_checkpoint(path: str) -> tuple[dict[str, Tensor], str, str]:
    """(state dict, sha-256 of the file, its name). Wrappers and prefixes are taken off; nothing is ever unpickled freely.

    ``builtin:NAME`` reads a checkpoint that ships with csq.
    """
    if path.startswith("builtin:"):
        file = Path(str(resources.files("csqcli") / "assets" / f"{path.removeprefix('builtin:')}.safetensors"))
    else:
        file = Path(path)
    if not file.is_file():
        raise UserError("no such checkpoint", where=path, hint="give a .safetensors, .pth, .pt, .th or .tar file")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if file.suffix == ".safetensors":
        from csqcli.file import io as checkpoint_file

        try:  # a quantized csq file is a fine checkpoint too
            quantized = checkpoint_file.is_quantized(file)
            state: Any = checkpoint_file.read(file).state_dict() if quantized else load_file(file)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"not a readable safetensors file ({error})", where=path) from None
    else:
        state = _unpickle_tensors(file, path)
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    tensors = {}
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor):
            name = str(name)
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            tensors[name] = value
    if not tensors:
        raise UserError("holds no tensors", where=path, hint="a state dict is expected")
    for name, value in tensors.items():
        try:
            _check_tensor(value)
        except ValueError as error:
            raise UserError(f"tensor `{name}` is {error}", where=path, hint="a plain state dict is expected") from None
        if is_damaged(value.float()):
            raise UserError(f"tensor `{name}` holds NaN or infinite values", where=path, hint="use another checkpoint")
    return tensors, digest, path if path.startswith("builtin:") else file.name


def _check_tensor(value: Tensor) -> None:
    """A plain dense tensor whose elements are all there."""
    if value.is_nested:  # whose layout is strided, and whose shape cannot be asked for
        raise ValueError("a nested tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
        raise ValueError(f"a {value.dtype} tensor of layout {value.layout} on {value.device}")
    if value.is_floating_point() and value.dtype.itemsize < 2:
        raise ValueError(f"a tensor of type {value.dtype}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"shape {list(value.shape)} on {value.untyped_storage().nbytes():,} bytes")


def is_damaged(value: Tensor) -> bool:
    """NaN, or infinite among finite values. A bound that is infinite throughout (clipping that is off) is neither."""
    if not value.is_floating_point() or bool(torch.isfinite(value).all()):
        return False
    return not bool(torch.isinf(value).all())


def _unpickle_tensors(file: Path, path: str) -> Any:
    try:
        check_archive(file)
        with warnings.catch_warnings():  # torch's remarks on pickle protocols mean nothing to the user
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower() or "unsupported class" in str(error).lower():
            raise UserError(
                "holds pickled code, which csq never runs",
                where=path,
                hint="convert it where you trust it: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
            ) from None
        raise UserError("not a readable checkpoint", where=path) from None
    except Exception as error:  # torch.load raises many kinds for damaged files; all mean the same to the user
        raise UserError(f"not a readable checkpoint ({type(error).__name__})", where=path) from None


def fit_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str,
    num_classes: int | None = None,
    num_classes_from: str = "the data",
) -> None:
    """Load ``state`` strictly, or say in one line what does not fit."""
    wanted = model.state_dict()
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state and name not in optional]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        parts = [f"{len(missing)} missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(unexpected)} unexpected (first: {unexpected[0]})"] if unexpected else []
        raise UserError(
            f"keys differ from the model's: {', '.join(parts)}", where=where, hint="is it this architecture?"
        )
    for name, value in state.items():
        if tuple(value.shape) != tuple(wanted[name].shape):
            if num_classes is not None and value.dim() and wanted[name].shape[:1] == (num_classes,):
                raise UserError(
                    f"the checkpoint has {value.shape[0]} classes, {num_classes_from} has {num_classes} (tensor {name})",
                    where=where,
                    hint="use data and checkpoint that agree",
                )
            shapes = f"{list(value.shape)} in the checkpoint, {list(wanted[name].shape)} in the model"
            raise UserError(f"tensor {name} is {shapes}", where=where, hint="is it this architecture?")
    complete = OrderedDict(wanted | dict(state))
    complete._metadata = getattr(wanted, "_metadata", {})  # type: ignore[attr-defined]  # versions: mnasnet asks for its own
    model.load_state_dict(complete)


def data_config(model: nn.Module, spec: ModelSpec) -> DataConfig:
    """Input size, mean, std, interpolation and crop of the model's pretrained weights (or of its architecture).

    Raises UserError where a factory's model states what cannot be.
    """
    return usable_config(_data_config(model, spec), where=spec.source)


def _data_config(model: nn.Module, spec: ModelSpec) -> DataConfig:
    if spec.library == "timm":
        from timm.data import resolve_model_data_config

        resolved = resolve_model_data_config(model)
        return {key: resolved[key] for key in _FALLBACK_CONFIG if key in resolved}
    if spec.library == "torchvision":
        return _torchvision_config(spec)
    return _FALLBACK_CONFIG | dict(getattr(model, "data_config", {}))


def usable_config(config: Mapping[str, Any], *, where: str) -> DataConfig:
    """As :func:`check_data_config`, with a UserError."""
    try:
        return check_data_config(config)
    except ValueError as error:
        raise UserError(f"data config: {error}", where=where) from None


def check_data_config(config: Mapping[str, Any]) -> DataConfig:
    """The config, when batches can be made from it; else ValueError."""
    try:
        _DataConfigRules.model_validate(dict(config))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{where}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")) from None
    return dict(config)


def _known_names(library: str) -> list[str]:
    if library == "csq":
        return list(own.REGISTRY)
    if library == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models()


def _build_timm(spec: ModelSpec, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    if pretrained and not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True  # read the cache only; the client would retry for a minute
    import timm

    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        return timm.create_model(spec.name, pretrained=pretrained, **kwargs)
    except OSError as error:  # huggingface_hub, urllib and requests all raise kinds of OSError for "no network"
        raise _no_weights(spec, error) from error
    except RuntimeError as error:
        if pretrained and ("pretrained" in str(error).lower() or "hub" in str(error).lower()):
            raise _no_weights(spec, error) from error
        raise


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
    module_name, _, attribute = spec.name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a factory in the working directory, as `python -m` would find it
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UserError(f"cannot import `{module_name}` ({error})", where=spec.name) from error
    except AttributeError:
        raise UserError(f"`{module_name}` has no `{attribute}`", where=spec.name) from None
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "num_classes" in kwargs and "num_classes" not in parameters and not takes_any:
        kwargs.pop("num_classes")
    if pretrained and ("pretrained" in parameters or takes_any):
        kwargs["pretrained"] = True
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise UserError(f"the factory returned {type(model).__name__}, not a torch.nn.Module", where=spec.name)
    return model


def _no_weights(spec: ModelSpec, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    return UserError(
        f"pretrained weights could not be had, no network or not in the local cache ({reason})",
        where=spec.source,
        hint="pass --checkpoint FILE with the weights, or --no-pretrained for random ones",
    )


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
    if spec.library != "torchvision" or spec.name not in _known_names("torchvision"):
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
        return _FALLBACK_CONFIG | {"input_size": size}
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
