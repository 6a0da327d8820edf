"""LiteRT files: the searched integers in LiteRT's own types, found by reading the flatbuffer, and the hard model's answers."""

from __future__ import annotations

import importlib.util
import io as streams
import itertools
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import quantized_models as models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.evaluating import evaluate_file
from csqcli.exporting import litert_graph, runtime, tflite
from csqcli.exporting.int8_graph import Int8Graph
from csqcli.exporting.run import export_file
from csqcli.file import flatbuffer, header, io
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ActivationEntry, ModelRecord, ParityRecord
from csqcli.models import libraries
from csqcli.quant import activations
from csqcli.quant.layers import find_layers

pytestmark = pytest.mark.usefixtures("remembered_traces")

_PACKAGES = ("ai_edge_litert", "flatbuffers", "onnx", "onnxscript", "onnxruntime")
litert = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in _PACKAGES), reason="needs the [litert] extra"
)
WIDTHS = ("11100000", "11000000", "11110000", "10000000")  # largest |Q|: 7, 3, 15, 1


class Small(nn.Module):
    """A stem, a depthwise and a pointwise convolution, a linear layer in the middle, a head; a skip whose sum is rounded."""

    data_config: ClassVar[dict] = models.SMALL_IMAGES

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(8)
        self.tokens = nn.Linear(8, 12)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm1(self.stem(x)))
        x = nn.functional.relu6(self.norm2(self.deep(x)))
        x = x + self.norm3(self.point(x))
        x = torch.relu(self.tokens(x.mean((2, 3))))
        return self.head(x)


class Zoo(nn.Module):
    """Every operator that `litert_ops` writes, in shapes that catch a wrong order of dimensions: no two sides are equal."""

    data_config: ClassVar[dict] = {
        "input_size": (3, 14, 10),
        "mean": (0.5,),
        "std": (0.25,),
        "interpolation": "bilinear",
    }

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, stride=2, padding=(2, 1))
        self.conv2 = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4)
        self.conv3 = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.free = nn.BatchNorm2d(12)
        self.gate = nn.Conv2d(24, 24, 1)
        self.norm = nn.LayerNorm(24)
        self.qkv = nn.Linear(24, 72)
        self.out = nn.Linear(24, 24)
        self.head = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.conv1(x))
        x = nn.functional.max_pool2d(nn.functional.pad(x, (0, 1, 0, 1)) - 1.5, 3, 2, 1, ceil_mode=True)
        x = nn.functional.leaky_relu(self.free(nn.functional.silu(self.conv2(x))), 0.1)
        x = self.conv3(torch.clamp(x, -0.5, 0.75))
        x = nn.functional.avg_pool2d(x, 2, 1) * nn.functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.cat([x, x.abs().sqrt() - x / 3], dim=2)
        x = x.flatten(2).transpose(1, 2)  # [N, positions, 24]
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), -1, 3, 2, 12).permute(2, 0, 3, 1, 4)
        x = x + self.out(((q @ k.transpose(-2, -1) / 4).softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = nn.functional.gelu(x)[:, 1:-1].mean(1)
        return self.head(torch.tanh(x))


def _file(kind: type[nn.Module], masks: tuple[str, ...] = WIDTHS, *, bits: int | None = 8) -> QuantizedFile:
    torch.manual_seed(0)
    model = models.shake(kind()).eval()
    hard = models.harden(model, masks)
    entries = []
    if bits is not None:
        batches = [torch.randn(8, *kind.data_config["input_size"]) for _ in range(2)]  # type: ignore[attr-defined]
        quantizers = activations.calibrate(model, find_layers(model)[0], batches, bits=bits)
        entries = [ActivationEntry(**vars(record)) for record in quantizers.records()]
    spec = libraries.parse(f"tests.exporting.test_litert:{kind.__name__}")
    record = ModelRecord(source=spec.source, library="factory", name=spec.name, num_classes=10, weights_from="random")
    config = kind.data_config  # type: ignore[attr-defined]
    return io.assemble(model, hard, record=record, data_config=config, target_bits=None, activations=entries)


def _export(folder: Path, file: QuantizedFile, **options: Any) -> ParityRecord:
    io.write(folder / "model.safetensors", file)
    manifest = export_file(
        folder / "model.safetensors", folder / "a.tflite", form="litert", trust_code=True, force=True, **options
    )
    assert manifest.parity is not None
    return manifest.parity


def _images(folder: Path) -> str:
    """Eight pictures of noise, as --calib takes them."""
    from PIL import Image

    (folder / "images" / "val" / "noise").mkdir(parents=True)
    for number in range(8):
        pixels = 255 * np.random.default_rng(number).integers(0, 2, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "val" / "noise" / f"{number}.png")
    return str(folder / "images")


def _tensors(path: Path) -> dict[str, Any]:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    return {tensor.name.decode(): (tensor, model.buffers[tensor.buffer].data) for tensor in model.subgraphs[0].tensors}


def _operators(path: Path) -> list[tuple[str, Any]]:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    codes = [names[code.builtinCode] for code in model.operatorCodes]
    return [(codes[operator.opcodeIndex], operator) for operator in model.subgraphs[0].operators]


def test_narrow_integers_stand_in_bytes_the_first_in_the_lowest_bits() -> None:
    assert tflite.packed(np.array([1, -1, 7, -7, 3]), 4).tolist() == [0xF1, 0x97, 0x03]  # by hand
    assert tflite.packed(np.array([1, -1, 0, 1, -1]), 2).tolist() == [0b01_00_11_01, 0b11]
    assert tflite.packed(np.array([-127, 127]), 8).tolist() == [129, 127]


@given(st.sampled_from([2, 4, 8]), st.lists(st.integers(-127, 127), min_size=1, max_size=40))
def test_packed_integers_come_back(bits: int, values: list[int]) -> None:
    limit = 2 ** (bits - 1) - 1
    integers = np.clip(values, -limit, limit)
    data = tflite.packed(integers, bits)
    assert data.size == math.ceil(len(values) * bits / 8)
    assert tflite.unpacked(data, bits, len(values)).tolist() == integers.tolist()


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_make_the_manifest_reader_do_more_than_refuse(content: bytes, named: bool) -> None:
    content = content[:4] + b"TFL3" + content[4:] if named else content
    try:
        found = flatbuffer.metadata_span(streams.BytesIO(content), len(content), "csq")
    except ValueError:
        return
    assert found is None or 0 <= found[0] <= found[1] <= len(content)


def test_a_file_that_is_none_of_litert_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.tflite").write_bytes(b"PK\3\4 not a flatbuffer")
    with pytest.raises(UserError, match=r"a\.tflite: not a LiteRT file"):
        header.read_manifest(tmp_path / "a.tflite")


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(runtime.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"LiteRT: needs the package ai_edge_litert.*pip install 'csq\[litert\]'"):
        runtime.require("ai_edge_litert", extra="litert")


@litert
@pytest.mark.parametrize("prefer", ["speed", "size"])
def test_the_searched_integers_stand_in_the_flatbuffer_in_the_narrowest_type_of_their_kernel(
    tmp_path: Path, prefer: str
) -> None:
    file = _file(Small)
    parity = _export(tmp_path, file, activations="int8", calib=_images(tmp_path), prefer=prefer)
    assert parity.layers_int8 == [layer.name for layer in file.layers if layer.name != "head.weight"]
    small = prefer == "size"
    # stem |Q| ≤ 7, deep 3, point 15, tokens 1, head 7; only FULLY_CONNECTED has fast kernels below 8 bits, and none has CONV_2D for 2
    bits = {"stem": 4 if small else 8, "deep": 4 if small else 8, "point": 8, "tokens": 2, "head": 4 if small else 8}
    tensors = _tensors(tmp_path / "a.tflite")
    types = {9: 8, 17: 4, 19: 2}  # TensorType: INT8, INT4, INT2
    for layer in file.layers:
        name = layer.name.removesuffix(".weight")
        tensor, data = tensors[layer.name]
        assert types[tensor.type] == bits[name], name
        digits = np.unpackbits(data, bitorder="little").reshape(-1, bits[name]).astype(int)  # two's complement, by hand
        values = digits @ (2 ** np.arange(bits[name])) - digits[:, -1] * 2 ** bits[name]
        found = values[: layer.integers.numel()].reshape(tensor.shape)
        wanted = layer.integers.numpy()
        if name in ("stem", "point"):
            wanted = wanted.transpose(0, 2, 3, 1)  # outputs, height, width, inputs
        elif name == "deep":
            wanted = wanted.transpose(1, 2, 3, 0)  # 1, height, width, channels
        norm = {"stem": "norm1", "deep": "norm2", "point": "norm3"}.get(name)
        if norm is not None:
            sign = np.where(file.others[f"{norm}.weight"].numpy() < 0, -1, 1)
            wanted = wanted * (sign if name == "deep" else sign.reshape(-1, 1, 1, 1))
        assert np.array_equal(found, wanted.reshape(tensor.shape)), name


@litert
def test_inputs_are_rounded_at_the_trained_scales_and_the_kinds_of_operators_are_those_measured_fastest(
    tmp_path: Path,
) -> None:
    file = _file(Small)
    _export(tmp_path, file, activations="int8", calib=_images(tmp_path))
    kinds = [kind for kind, _ in _operators(tmp_path / "a.tflite")]
    assert kinds.count("FULLY_CONNECTED") == 3  # point, tokens, head
    assert (kinds.count("CONV_2D"), kinds.count("DEPTHWISE_CONV_2D")) == (1, 1)
    steps = {
        np.float32(tensor.quantization.scale[0])
        for tensor, data in _tensors(tmp_path / "a.tflite").values()
        if tensor.type == 9 and data is None
    }
    assert {np.float32(entry.scale) for entry in file.manifest.activations} <= steps


@litert
def test_without_calib_only_layers_between_trained_scales_run_in_int8(tmp_path: Path) -> None:
    parity = _export(tmp_path, _file(Small), activations="int8")
    assert parity.layers_int8 == ["stem.weight", "tokens.weight"]  # `deep` is read by the skip, unrounded
    assert parity.calibrated == []
    assert "--calib" in parity.notes[0]


@litert
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_every_operator_computes_what_torch_computes(tmp_path: Path, bits: int | None) -> None:
    parity = _export(tmp_path, _file(Zoo, bits=bits))  # raises beyond the tolerance
    assert parity.layers_matched == 7
    assert parity.max_logit_error <= (1e-4 if bits is None else 0.2) * parity.logit_std
    written = {kind for kind, _ in _operators(tmp_path / "a.tflite")}
    assert {
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "FULLY_CONNECTED",
        "BATCH_MATMUL",
        "SOFTMAX",
        "GELU",
        "HARD_SWISH",
    } <= written
    assert {"LOGISTIC", "LEAKY_RELU", "PADV2", "AVERAGE_POOL_2D", "MEAN", "SLICE", "DEQUANTIZE", "RSQRT"} <= written


@litert
@pytest.mark.parametrize("bits", [8, 4])
def test_every_operator_in_int8(tmp_path: Path, bits: int) -> None:
    file = _file(Zoo, bits=bits)
    parity = _export(tmp_path, file, activations="int8", calib=_images(tmp_path))
    assert parity.layers_int8 == [layer.name for layer in file.layers if layer.name != "head.weight"]
    assert parity.max_logit_error <= parity.tolerance_in_std * parity.logit_std


def _through_litert(nodes: list[Any], constants: dict[str, list[int]], images: np.ndarray, sides: int) -> np.ndarray:
    """What LiteRT computes of an ONNX graph of ``nodes`` from ``images`` to ``logits`` of so many dimensions."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, images.shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None] * sides)],
        [numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content = litert_graph.convert(Int8Graph(proto), {}).content({})
    [result] = runtime.LiteRtModel(content, threads=1).outputs(torch.from_numpy(images))
    return result.numpy()


@litert
@pytest.mark.parametrize(
    ("axes", "keep"),
    [
        *itertools.product(
            [(1,), (2,), (3,), (-1,), (2, 3), (3, 2), (1, 2), (-3, -1), (1, 2, 3), (0, 1)], [False, True]
        ),
        (None, True),  # all of them
    ],
)
def test_a_mean_is_over_the_dimensions_that_the_traced_graph_names(axes: tuple[int, ...] | None, keep: bool) -> None:
    from onnx import helper

    images = np.random.default_rng(0).standard_normal((1, 3, 5, 7), dtype=np.float32)  # no two sides are equal
    wanted = images.mean(axis=axes, keepdims=keep)
    constants = {} if axes is None else {"axes": list(axes)}
    node = helper.make_node("ReduceMean", ["images", *constants], ["logits"], keepdims=int(keep))
    found = _through_litert([node], constants, images, wanted.ndim)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@litert
@pytest.mark.parametrize(("axes", "keep"), [((1,), False), ((2,), True), ((1, 2), False), ((0,), False)])
def test_a_mean_of_tokens_is_over_the_dimensions_as_they_stand(axes: tuple[int, ...], keep: bool) -> None:
    from onnx import helper

    images = np.random.default_rng(0).standard_normal((1, 3, 5, 7), dtype=np.float32)
    tokens = images.reshape(1, 15, 7)
    wanted = tokens.mean(axis=axes, keepdims=keep)
    nodes = [
        helper.make_node("Reshape", ["images", "sides"], ["tokens"]),
        helper.make_node("ReduceMean", ["tokens", "axes"], ["logits"], keepdims=int(keep)),
    ]
    found = _through_litert(nodes, {"sides": list(tokens.shape), "axes": list(axes)}, images, wanted.ndim)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@litert
def test_a_global_average_keeps_its_channels_where_the_next_operator_looks_for_them() -> None:
    from onnx import helper

    images = np.random.default_rng(0).standard_normal((1, 3, 5, 7), dtype=np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Mul", ["images", "pooled"], ["logits"]),
    ]
    found = _through_litert(nodes, {}, images, 4)
    np.testing.assert_allclose(found, images * images.mean(axis=(2, 3), keepdims=True), rtol=1e-5, atol=1e-6)


@litert
def test_a_channel_too_small_for_an_int32_bias_keeps_its_integers_and_is_told(tmp_path: Path) -> None:
    file = _file(Small)
    file.others["norm1.weight"][1], file.others["norm1.bias"][1] = 1e-12, 1.0
    parity = _export(tmp_path, file, activations="int8", calib=_images(tmp_path))
    assert "stem.weight" in parity.layers_int8
    assert any("scale is raised" in note for note in parity.notes)


@litert
def test_a_changed_integer_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tflite.packed

    def dishonest(integers: np.ndarray, bits: int) -> np.ndarray:
        data = honest(integers, bits)
        data[0] ^= 1
        return data

    monkeypatch.setattr(tflite, "packed", dishonest)
    with pytest.raises(UserError, match="integers differ from the source file's"):
        _export(tmp_path, _file(Small, bits=None))
    assert not (tmp_path / "a.tflite").exists()


@litert
def test_evaluating_the_file_gives_its_certificate_and_a_flipped_byte_is_noticed(tmp_path: Path, csq) -> None:
    source = Path(__file__).parents[1] / "file" / "fixtures" / "digits_schema1.safetensors"
    path = tmp_path / "digits.tflite"
    arguments = ["--litert", "--activations", "int8", "--calib", "digits", "--data", "digits", "-q"]
    assert csq("export", str(source), *arguments, "-o", str(path))[0] == 0
    accuracy, manifest = evaluate_file(path, "digits")
    assert manifest.parity is not None
    assert (accuracy.top1, accuracy.samples) == (manifest.parity.top1, manifest.parity.samples)
    assert manifest.parity.file_bytes == path.stat().st_size
    code, stdout, stderr = csq(
        "diff", "builtin:digits_float", str(path), "--data", "digits", "--val-limit", "8", "--json"
    )
    assert code == 0, stderr
    assert json.loads(stdout)["engine"].startswith("ai-edge-litert ")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    code, _, stderr = csq("evaluate", str(path), "--data", "digits")
    assert code == 2
    assert len(stderr.strip().splitlines()) == 1


@litert
def test_an_operator_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written for LiteRT: Erf"):
        _export(tmp_path, _file(Odd, bits=None))


class Odd(Small):
    """A network with an operator that `litert_ops` does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.erf(x))
