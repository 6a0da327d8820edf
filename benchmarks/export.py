"""Tables of docs/export.md: bytes, exactness, load time and latency of every exported form.

    python benchmarks/export.py [--json FILE] [--repeats 3] [--litert] [--planes K] [MODEL …]

``--litert`` measures the LiteRT form alone, against LiteRT's own fp32.

Networks have random weights, planes mixed from 2, 3 and 4 to a mean of 3 (the paper's count: 32/3 = 10.67×), scale at
max |W|. Float parameters are random too, so that they do not compress better than trained ones. Bytes and exactness do
not depend on the machine. Latency: batch 1, one thread, medians of 9 runs taken in turns with the same graph in fp32; the
ratio is the median of the ratios of ``--repeats`` exports. The int8 table rounds activations to 8 bits with scales
calibrated on noise, because there is nothing to train: its speeds are meant, not its logits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from csqcli.exporting.run import export_file
from csqcli.file import io, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ActivationEntry, ModelRecord, ParityRecord
from csqcli.models import libraries as sources
from csqcli.quant import activations, equations
from csqcli.quant.hard_layer import HardLayer, hard_layer
from csqcli.quant.layers import find_layers
from csqcli.quant.methods.csq import max_abs_scale
from csqcli.system.environment import version_of

MODELS = (
    "timm:resnet18",
    "timm:resnet50",
    "timm:mobilenetv3_large_100",
    "timm:efficientnet_b0",
    "timm:convnext_tiny",
    "timm:vit_tiny_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
)
MEAN_BITS = 3
TARGETS = ("ort", "openvino")
PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino", "ai-edge-litert")


def make_file(source: str, planes: int | None = None) -> QuantizedFile:
    """A random network with 2, 3 or 4 planes per layer, 3 per weight at most; or ``planes`` in every layer."""
    torch.manual_seed(0)
    spec = sources.parse(source)
    model = sources.build(spec, num_classes=1000).eval()
    layers, left_float = find_layers(model)
    _randomise(model, {id(layer.parameter) for layer in layers})
    hard: list[HardLayer] = []
    mixed = _planes([layer.weights for layer in layers])
    for layer, bits in zip(layers, [planes] * len(layers) if planes else mixed, strict=True):
        scale = max_abs_scale(layer.parameter)
        integers = equations.quantize_integers(layer.parameter.detach(), scale, bits)
        hard.append(hard_layer(layer, integers, scale / (2**bits - 1), torch.ones(bits, dtype=torch.bool)))
    record = ModelRecord(
        source=spec.source, library=spec.library, name=spec.name, num_classes=1000, weights_from="random"
    )
    return io.assemble(
        model,
        hard,
        record=record,
        data_config=sources.data_config(model, spec),
        target_bits=planes or MEAN_BITS,
        left_float=[vars(tensor) for tensor in left_float],
    )


def _planes(weights: list[int]) -> list[int]:
    """2, 3, 4, 2, 3, 4 … except that a 4 needs as many weights at 2 before it."""
    planes, spare = [], 0
    for number, count in enumerate(weights):
        wanted = (2, 3, 4)[number % 3]
        if wanted == 4 and spare < count:
            wanted = 3
        spare += (MEAN_BITS - wanted) * count
        planes.append(wanted)
    for number, count in enumerate(weights):  # spend what is left
        if planes[number] == 2 and spare >= count:
            planes[number], spare = 3, spare - count
    return planes


@torch.no_grad()
def _randomise(model: nn.Module, quantized: set[int]) -> None:
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.add_(0.02 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def measure(source: str, folder: Path, *, repeats: int, planes: int | None = None) -> dict[str, Any]:
    """One row of the tables."""
    file = make_file(source, planes)
    searched = folder / "model.safetensors"
    sizes = file.manifest.sizes
    floats = sum(value.numel() * value.element_size() for value in file.others.values())
    entropy_bytes = sizes.entropy_bits_per_weight * file.manifest.budget.total_weights / 8
    row: dict[str, Any] = {
        "model": source,
        "mean_bits": file.manifest.budget.mean_bits,
        "paper_compression": sizes.paper_compression,
        "entropy_bits": sizes.entropy_bits_per_weight,
        "fp32_bytes": sizes.float_bytes,
        "float_tensor_bytes": floats,
        "entropy_and_float_bytes": entropy_bytes + floats,
        "searched_bytes": io.write(searched, file),
    }
    for form in ("bit-packed", "int8-packed", "state-dict"):
        exported = export_file(searched, folder / f"{form}.safetensors", form=form)  # type: ignore[arg-type]
        row[form] = _certificate(exported.parity)
    for target in TARGETS:
        row[target] = _median_of(searched, folder, repeats=repeats, target=target)
    rounded = _rounding_activations(file, folder)
    for target in TARGETS:
        row[f"int8_{target}"] = _median_of(rounded, folder, repeats=repeats, target=target, activations="int8")
    calib = str(_noise_images(folder / "images"))
    row["int8_calib"] = _median_of(rounded, folder, repeats=repeats, activations="int8", calib=calib)
    return row


def measure_litert(source: str, folder: Path, *, repeats: int, planes: int | None = None) -> dict[str, Any]:
    """One row of the LiteRT table: weights alone, and int8 activations made for speed and for size."""
    file = make_file(source, planes)
    rounded = _rounding_activations(file, folder)
    calib = str(_noise_images(folder / "images"))
    int8 = {"activations": "int8", "calib": calib}
    file.manifest.activations = []
    io.write(folder / "plain.safetensors", file)
    row: dict[str, Any] = {"model": source, "fp32_bytes": file.manifest.sizes.float_bytes}
    row["float"] = _median_of(folder / "plain.safetensors", folder, repeats=repeats, form="litert")
    for prefer in ("speed", "size"):
        row[prefer] = _median_of(rounded, folder, repeats=repeats, form="litert", prefer=prefer, **int8)
    return row


def print_litert(rows: list[dict[str, Any]]) -> None:
    """Markdown, as in docs/export.md."""
    print(
        "| model | fp32 MB | weights alone: MB, fp32 / this | int8, speed: MB, fp32 / this | int8, size: MB, fp32 / this | in int8 |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            f"{row[k]['file_bytes'] / 1e6:.2f}, {row[k]['latency_ratio']:.2f}×" for k in ("float", "speed", "size")
        ]
        speed = row["speed"]
        print(
            f"| {_short(row)} | {row['fp32_bytes'] / 1e6:.2f} | {' | '.join(cells)} "
            f"| {len(speed['layers_int8'])} of {speed['layers_matched']} |"
        )


def _noise_images(folder: Path) -> Path:
    """Eight images of noise for --calib."""
    (folder / "val" / "noise").mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val" / "noise" / f"{number}.png")
    return folder


def _rounding_activations(file: QuantizedFile, folder: Path) -> Path:
    """The same file with 8-bit activation quantizers, calibrated on noise."""
    model = loading.hard_model(file)
    noise = [torch.randn(4, *file.manifest.data_config["input_size"])]
    quantizers = activations.calibrate(model, find_layers(model)[0], noise, bits=8)
    file.manifest.activations = [ActivationEntry(**vars(record)) for record in quantizers.records()]
    io.write(folder / "rounded.safetensors", file)
    return folder / "rounded.safetensors"


def _median_of(source: Path, folder: Path, *, repeats: int, form: str = "onnx", **options: Any) -> dict[str, Any]:
    """The certificate of the first export, with the medians over all of them."""
    runs = []
    target = folder / ("a.onnx" if form == "onnx" else "a.tflite")
    for _ in range(repeats):
        exported = export_file(source, target, form=form, force=True, **options)
        runs.append(_certificate(exported.parity))
    timings = ("latency_ratio", "latency_ms", "load_seconds")
    return runs[0] | {key: statistics.median(run[key] for run in runs) for key in timings}


def _certificate(parity: ParityRecord | None) -> dict[str, Any]:
    assert parity is not None
    return parity.model_dump(mode="json") | {"error_in_std": parity.max_logit_error / parity.logit_std}


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Markdown, as in docs/export.md."""
    print("| model | mean planes | entropy | fp32 MB | searched | bit-packed | over entropy + float | int8 | ONNX |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        fp32, packed = row["fp32_bytes"], row["bit-packed"]["file_bytes"]
        print(
            f"| {_short(row)} | {row['mean_bits']:.3f} | {row['entropy_bits']:.2f} | {fp32 / 1e6:.2f} "
            f"| {fp32 / row['searched_bytes']:.2f}× | **{fp32 / packed:.2f}×**, {packed / 1e6:.2f} MB "
            f"| {100 * (packed / row['entropy_and_float_bytes'] - 1):+.1f} % "
            f"| {fp32 / row['int8-packed']['file_bytes']:.2f}× "
            f"| {fp32 / row['ort']['file_bytes']:.2f}×, {row['ort']['file_bytes'] / 1e6:.2f} MB |"
        )
    print(
        "\n| model | layers exact | logit error / std: ORT, OpenVINO | fp32 / this: ORT, OpenVINO | load s: ORT, OpenVINO |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        ort, vino = row["ort"], row["openvino"]
        print(
            f"| {_short(row)} | {ort['layers_matched']} of {ort['layers_matched'] + len(ort['layers_absent'])} "
            f"| {ort['error_in_std']:.0e}, {vino['error_in_std']:.0e} "
            f"| {ort['latency_ratio']:.2f}×, {vino['latency_ratio']:.2f}× "
            f"| {ort['load_seconds']:.2f}, {vino['load_seconds']:.2f} |"
        )
    print(
        "\n| int8 activations | layers in int8 | MB | fp32 / this: ORT, ORT --calib, OpenVINO | logit error, tolerance / std: ORT |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        ort, calib, vino = row["int8_ort"], row["int8_calib"], row["int8_openvino"]
        print(
            f"| {_short(row)} | {len(ort['layers_int8'])} of {ort['layers_matched']} | {ort['file_bytes'] / 1e6:.2f} "
            f"| {ort['latency_ratio']:.2f}×, {calib['latency_ratio']:.2f}×, {vino['latency_ratio']:.2f}× "
            f"| {ort['error_in_std']:.2g}, {ort['tolerance_in_std']:.2g} |"
        )


def _short(row: dict[str, Any]) -> str:
    return row["model"].partition(":")[2]


def machine() -> dict[str, Any]:
    """What the timings depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    processor = names[0] if names else platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=3, help="ONNX exports per model and engine")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--litert", action="store_true", help="the LiteRT form alone")
    parser.add_argument("--planes", type=int, choices=range(1, 8), help="in every layer, instead of 2, 3 and 4 mixed")
    arguments = parser.parse_args()
    about = machine() | {"repeats": arguments.repeats}
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    rows = []
    for source in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            take = measure_litert if arguments.litert else measure
            rows.append(take(source, Path(folder), repeats=arguments.repeats, planes=arguments.planes))
    (print_litert if arguments.litert else print_tables)(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
