"""What a file says of its own size, counted again from its header and integers. Without torch.

Whoever made a file can write anything into its manifest. Budget, bits and masks are checked wherever a manifest is read; here
follow the numbers that a report shows: stored and entropy bits, compression, float bytes, bit operations. What nobody can
recompute without data or the model's code (accuracy, multiply-accumulates) stays as the file states it, and is marked so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from csqcli.errors import UserError
from csqcli.file import codes, sizes
from csqcli.file.header import (
    CODES_TENSOR,
    GRAPHS,
    ROWS,
    manifest_of,
    open_safetensors,
    parts,
    read_manifest,
    spans,
    tensor_of,
    torchao_names,
)
from csqcli.file.manifest import LayerRecord, Manifest
from csqcli.reporting.histogram import Histogram, histogram
from csqcli.reporting.sparsity import LayerSparsity, count_sparsity

AS_STATED = ("accuracy", "compute.macs", "classes", "trained_outputs", "left_float", "environment", "recipe", "parity")
_AS_STATED_IN_GRAPHS = ("sizes.entropy_bits_per_weight", "sizes.float_bytes")  # its integers are inside of a graph


class Recomputed(NamedTuple):
    """What a file is, by its own bytes."""

    manifest: Manifest
    as_stated: list[str]  # fields that are only the file's word
    histograms: dict[
        str, Histogram
    ]  # of each layer's integers; none for an ONNX or LiteRT file, whose integers are inside of a graph
    sparsity: dict[str, LayerSparsity]  # of each layer; none, likewise


def recomputed(path: Path) -> Recomputed:
    """The manifest of a file with every number that can be recomputed in its place, and the fields that cannot be.

    Raises UserError for a file that is not csq's, and where a layer's bytes are not what the manifest says.
    """
    sparse: dict[str, LayerSparsity] = {}
    if path.suffix in GRAPHS:
        manifest = read_manifest(path)
        found, float_bytes = None, manifest.sizes.float_bytes
    else:
        with open_safetensors(path) as file:
            manifest = manifest_of(file, path)
            found, sparse = _integers(file, manifest, path)
            float_bytes = 4 * _elements(file, manifest)
            manifest.sizes.parts = parts(file, path)
        manifest.sizes.file_bytes = path.stat().st_size
    for layer in manifest.layers:
        layer.stored_bits = sizes.stored_bits(layer.mask, basis=layer.basis is not None)
        layer.entropy_bits = found[layer.name].entropy_bits if found is not None else layer.entropy_bits
    counted = sizes.sizes(manifest.layers, float_bytes=float_bytes)
    measured = {"file_bytes": manifest.sizes.file_bytes, "parts": manifest.sizes.parts}
    manifest.sizes = counted.model_copy(update=measured)
    if manifest.compute is not None:
        size, macs = manifest.compute.input_size, manifest.compute.macs
        manifest.compute = sizes.compute(manifest.layers, manifest.activations, input_size=size, macs=macs)
    return Recomputed(manifest, [*AS_STATED, *(_AS_STATED_IN_GRAPHS if found is None else ())], found or {}, sparse)


def _integers(file: Any, manifest: Manifest, path: Path) -> tuple[dict[str, Histogram], dict[str, LayerSparsity]]:
    """How each layer's integers are spread and where they are 0, a layer in memory at a time."""
    found, sparse = {}, {}
    try:
        bit_packed = CODES_TENSOR in file.keys()
        places = spans(manifest.layers, file.get_slice(CODES_TENSOR).get_shape()) if bit_packed else {}
        for layer in manifest.layers:
            try:
                low, counts, nonzero = _counts(file, layer, places)
            except (ValueError, SafetensorError) as error:
                raise ValueError(f"layer {layer.name}: {error}") from None
            if counts.sum() != layer.weights:
                raise ValueError(f"layer {layer.name}: {counts.sum()} integers for {layer.weights} weights")
            found[layer.name] = histogram(counts, low=low)
            sparse[layer.name] = count_sparsity(nonzero.reshape(layer.shape), channel_dim=layer.channel_dim)
    except (ValueError, SafetensorError) as error:
        raise UserError(str(error), where=str(path), hint="the file is damaged") from None
    return found, sparse


def _counts(file: Any, layer: LayerRecord, places: Mapping[str, tuple[int, int]]) -> tuple[int, np.ndarray, np.ndarray]:
    """The first integer counted, how often it and those after it occur, and where integers are not 0, whatever the form.

    ValueError where the bytes are not the layer's.
    """
    if layer.name in places:
        start, end = places[layer.name]
        return _of_codes(file.get_slice(CODES_TENSOR)[start:end].tobytes(), layer)
    if layer.encoding == "float32":
        return _of_integers(_integers_of(tensor_of(file, layer.name), layer))
    payload = tensor_of(file, torchao_names(layer.name)[0] if layer.encoding == ROWS else f"{layer.name}_packed")
    if layer.encoding in ("int8", "int16", ROWS):
        if str(payload.dtype) != layer.encoding.partition("-")[0]:
            raise ValueError(f"integers of type {payload.dtype}")
        return _of_integers(payload)
    return _of_codes(payload.tobytes(), layer)


def _of_integers(integers: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    return int(integers.min(initial=0)), codes.count(integers), integers != 0


def _of_codes(payload: bytes, layer: LayerRecord) -> tuple[int, np.ndarray, np.ndarray]:
    if layer.encoding.startswith("codes16"):
        return _of_integers(codes.decode(payload, layer.encoding, (layer.weights,)))
    counts = codes.count_encoded(payload, layer.encoding, layer.weights)
    nonzero = codes.nonzero_encoded(payload, layer.encoding, (layer.weights,))
    return 1 - len(counts) // 2, counts, nonzero  # codes of w bits are −(2^(w−1) − 1) and up


def _integers_of(weight: np.ndarray, layer: LayerRecord) -> np.ndarray:
    """Integers of float weights: weight / scale, rounded. ValueError for weights that are no multiples of their scale."""
    scale = np.asarray(layer.scale, dtype=np.float32).reshape(-1)
    shape = [1] * len(layer.shape)
    shape[layer.channel_dim] = scale.size
    if list(weight.shape) != layer.shape or scale.size not in (1, layer.shape[layer.channel_dim]):
        raise ValueError(f"weight of shape {list(weight.shape)} with {scale.size} scales")
    if layer.basis:
        return _integers_on_basis(weight, np.asarray(layer.basis, dtype=np.float32), layer.channel_dim)
    unit = scale.reshape(shape)
    with np.errstate(all="ignore"):
        integers = weight / unit  # of float32 and below 2^15, so within 0.01 of an integer
    np.rint(integers, out=integers)
    np.copyto(integers, 0, where=unit == 0)
    if not -codes.WIDTHS[16] <= integers.min() <= integers.max() <= codes.WIDTHS[16]:  # NaN is not, either
        raise ValueError("the weights are no longer integers × scale; they were changed after the export")
    return integers.astype(np.int16)


def _integers_on_basis(weight: np.ndarray, basis: np.ndarray, channel_dim: int) -> np.ndarray:
    """Odd integers of weights that are levels of a basis (`quant.basis`). ValueError for weights that are none."""
    rows = np.moveaxis(weight, channel_dim, 0).reshape(weight.shape[channel_dim], -1)
    integers = np.zeros(rows.shape, dtype=np.int16)
    for number in range(2 ** len(basis)):
        level = np.zeros((), dtype=np.float32)
        for plane, values in enumerate(basis):
            level = level + (values if number >> plane & 1 else -values)
        here = (integers == 0) & (rows == level[:, None])
        integers[here] = 2 * number - (2 ** len(basis) - 1)
    if not integers.all():
        raise ValueError("the weights are no longer levels of the basis; they were changed after the export")
    return integers


def _elements(file: Any, manifest: Manifest) -> int:
    """Elements of all parameters and buffers of the model, shared weights once, from the shapes in the header."""
    names = [name for layer in manifest.layers for name in (layer.name, *layer.aliases)]
    helpers = {
        f"{layer.name}_{part}" for layer in manifest.layers for part in ("packed", "scale", "shape", "basis")
    } | set(names)
    if manifest.packed_others:
        others = {record.name: record.shape for record in manifest.packed_others}
    elif CODES_TENSOR in file.keys():
        others = {}
    else:
        others = {name: file.get_slice(name).get_shape() for name in file.keys()}
    quantized = sum(layer.weights for layer in manifest.layers)
    return quantized + sum(math.prod(shape) for name, shape in others.items() if name not in helpers)
