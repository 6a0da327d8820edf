"""``csq compare``: two or more quantized models, layer by layer, from what their files or reports say. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from csqcli.errors import UserError, first_problem
from csqcli.file.manifest import LayerRecord, Manifest, from_json_object
from csqcli.reporting.recompute import recomputed
from csqcli.system.files import read_regular
from csqcli.system.limits import read_json
from csqcli.system.run_files import model_of
from csqcli.system.settings import flat

_REPORT_BYTES, _REPORT_VALUES = 2**28, 2**22
_NOT_COMPARED = ("description", "data.workers", "device", "threads", "model.checkpoint")  # say nothing of a result


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Models side by side: runs' folders, files that csq wrote, and report.json files, in the order given.

    Returns ``models`` (``file``, ``model``, ``form``, ``method``, ``allocator``, ``target_bits``, ``mean_bits``, ``entropy_bits`` per
    weight, ``file_bytes``, ``float_top1``, ``hard_top1``, ``samples``), ``layers`` in the order of the first model that has them (``name``;
    ``planes``, ``bytes`` and ``entropy_bits``, a list each by model, null where it lacks the layer; ``differs``: whether planes do),
    ``settings`` (recipe keys that all have and whose values differ → the values by model). UserError for fewer than two.
    """
    if len(paths) < 2:
        raise UserError("two models or more are needed", hint="give runs, exports or reports")
    manifests = [_manifest_of(path) for path in paths]
    layers = [{layer.name: layer for layer in manifest.layers} for manifest in manifests]
    names = list(dict.fromkeys(name for known in layers for name in known))
    if not set.intersection(*({*known} for known in layers)) and names:
        raise UserError("have no layer in common", where=" and ".join(map(str, paths)), hint="compare one architecture")
    return {
        "models": [_model(path, manifest) for path, manifest in zip(paths, manifests, strict=True)],
        "layers": [_layer(name, [known.get(name) for known in layers]) for name in names],
        "settings": _differing([flat(manifest.recipe) for manifest in manifests]),
    }


def _manifest_of(path: Path) -> Manifest:
    if path.suffix.lower() != ".json":
        return recomputed(model_of(path)).manifest
    try:
        report = read_json(read_regular(path, limit=_REPORT_BYTES), nodes=_REPORT_VALUES)
        report.pop("parity", None)  # a run's own is not the certificate of an export, and is not compared
        return from_json_object(report)
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(path)) from None
    except ValidationError as error:
        what = f"is no report of csq ({first_problem(error).text})"
        raise UserError(what, where=str(path), hint="`csq report RUN --json` prints one") from None
    except ValueError as error:
        raise UserError(f"is no report of csq ({error})", where=str(path)) from None


def _model(path: Path, manifest: Manifest) -> dict[str, Any]:
    quantization = manifest.recipe.get("quantization")
    known = quantization if isinstance(quantization, Mapping) else {}
    return {
        "file": str(path),
        "model": manifest.model.source,
        "form": manifest.form,
        "method": known.get("method"),
        "allocator": known.get("allocator"),
        "target_bits": manifest.budget.target_mean_bits,
        "mean_bits": manifest.budget.mean_bits,
        "entropy_bits": manifest.sizes.entropy_bits_per_weight,
        "file_bytes": manifest.sizes.file_bytes,
        "float_top1": manifest.accuracy.float_top1,
        "hard_top1": manifest.accuracy.hard_top1,
        "samples": manifest.accuracy.samples,
    }


def _layer(name: str, records: Sequence[LayerRecord | None]) -> dict[str, Any]:
    planes = [record.bits if record is not None else None for record in records]
    return {
        "name": name,
        "planes": planes,
        "bytes": [record.packed_bytes if record is not None else None for record in records],
        "entropy_bits": [record.entropy_bits if record is not None else None for record in records],
        "differs": len(set(planes)) > 1,
    }


def _differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    shared = [key for key in recipes[0] if key not in _NOT_COMPARED and all(key in recipe for recipe in recipes)]
    if any(recipe.get("model.source") is None for recipe in recipes):  # a finetune's model is its file's
        shared = [key for key in shared if not key.startswith("model.")]
    rows = {key: [recipe[key] for recipe in recipes] for key in shared}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
