"""The export forms by name. Known without torch: what is wrong in a command line is said before it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from csqcli.errors import UserError, did_you_mean
from csqcli.system.plugins import import_attribute

if TYPE_CHECKING:
    from csqcli.exporting.form import Form


@dataclass(frozen=True)
class FormCard:
    """What can be known of a form without its code."""

    target: str  # package.module:Class
    takes: frozenset[str] = field(default_factory=frozenset)  # of OPTIONS


OPTIONS = {
    "activations": "float",
    "target": "ort",
    "weights": "int8",
    "calib": None,
    "prefer": "speed",
}  # of `csq export` that not every form takes; defaults
_FORMS = "csqcli.exporting.forms"
CARDS = {
    "int8-packed": FormCard(f"{_FORMS}.safetensors:Int8Packed"),
    "bit-packed": FormCard(f"{_FORMS}.safetensors:BitPacked"),
    "bit-packed-small": FormCard(f"{_FORMS}.safetensors:BitPackedSmall"),
    "state-dict": FormCard(f"{_FORMS}.safetensors:StateDict"),
    "torchao": FormCard(f"{_FORMS}.torchao:Torchao"),
    "onnx": FormCard(f"{_FORMS}.onnx:Onnx", frozenset({"activations", "target", "weights", "calib"})),
    "litert": FormCard(f"{_FORMS}.litert:Litert", frozenset({"activations", "calib", "prefer"})),
}


def check_name(name: str, *, where: str) -> None:
    """UserError for a name that is none of csq's forms and does not look like ``package.module:Class``."""
    if name not in CARDS and ":" not in name:
        hint = did_you_mean(name, CARDS) or f"one of {', '.join(CARDS)}, or package.module:Class"
        raise UserError(f"no form `{name}`", where=where, hint=hint)


def check_options(name: str, options: Mapping[str, Any], *, where: str) -> None:
    """UserError for options that one of csq's forms does not take, and for combinations that mean nothing."""
    if name in CARDS:
        check_taken(CARDS[name].takes, options, where=where)
    _check_together(options, where="csq export")


def _check_together(options: Mapping[str, Any], *, where: str) -> None:
    """UserError for combinations that mean nothing."""
    if options["calib"] is not None and options["activations"] != "int8":
        raise UserError("--calib belongs to --activations int8", where=where)
    if options["calib"] is not None and options["target"] == "tensorrt":
        hint = "leave --calib out: TensorRT rounds the outputs of layers where the next layer's trained scale says so"
        raise UserError("--calib does not go with --target tensorrt", where=where, hint=hint)
    if options["weights"] == "int4" and options["target"] != "tensorrt":
        hint = "the other targets have weights packed to what their levels need"
        raise UserError("--weights int4 belongs to --target tensorrt", where=where, hint=hint)
    if options["weights"] == "int4" and options["activations"] == "int8":
        hint = "TensorRT has 4-bit weights beside float activations alone"
        raise UserError("--weights int4 goes with --activations float", where=where, hint=hint)


def check_taken(takes: frozenset[str], options: Mapping[str, Any], *, where: str) -> None:
    """UserError for an option that differs from its default and is not in ``takes``."""
    for option, default in OPTIONS.items():
        if options[option] != default and option not in takes:
            owners = [f"--{name}" for name, card in CARDS.items() if option in card.takes]
            raise UserError(f"--{option} belongs to {' and '.join(owners)}", where=where)


def find(name: str, *, where: str = "--form") -> type[Form]:
    """The class of a form. UserError for an unknown name, and for a class that lacks something."""
    check_name(name, where=where)
    found = import_attribute(CARDS[name].target if name in CARDS else name, where=where)
    from csqcli.exporting.form import Form  # torch is loaded by now

    if not (isinstance(found, type) and issubclass(found, Form)):
        raise UserError(f"`{name}` is not an export form", where=where, hint="subclass csqcli.exporting.form.Form")
    lacks = [*sorted(found.__abstractmethods__), *(part for part in ("name", "suffix") if not hasattr(found, part))]
    if lacks:
        raise UserError(f"`{name}` lacks {', '.join(lacks)}", where=where, hint="docs/architecture.md has an example")
    return found
