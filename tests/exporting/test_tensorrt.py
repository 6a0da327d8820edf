"""`--target tensorrt`: signed integers behind Q/DQ pairs with zero points of 0, no node that unpacks, the searched integers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import quantized_models as models
import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.evaluating import evaluate_file
from csqcli.file import io, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import Manifest
from csqcli.quant import activations

if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("needs the [onnx] extra", allow_module_level=True)

import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

from csqcli.exporting import run
from csqcli.exporting.forms.onnx import Onnx
from csqcli.exporting.verify import ParityError

pytestmark = pytest.mark.usefixtures("remembered_traces")

SOURCE = "tests.exporting.test_tensorrt:Mixed"
NARROW = ("11100000", "11000000", "11110000")  # largest |Q|: 7, 3, 15
WIDE = ("11111111", "11000000")


class Mixed(nn.Module):
    """Signed and unsigned inputs, a BatchNorm behind negative γ, and linear layers on three and on two dimensions."""

    data_config: ClassVar[dict] = models.SMALL_IMAGES

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 64, 1)
        self.tokens = nn.Linear(64, 192)
        self.head = nn.Linear(192, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.max_pool2d(x, 2)
        x = self.point(x).flatten(2).transpose(1, 2)
        return self.head(nn.functional.gelu(self.tokens(x)).mean(1))


def _file(masks: tuple[str, ...] = NARROW, *, bits: int | None = 8) -> QuantizedFile:
    torch.manual_seed(0)
    model = models.shake(Mixed()).eval()
    with torch.no_grad():
        model.norm.weight[0] = 0.3  # a γ of 0 keeps its BatchNorm, which another test is about
        model.norm.weight[1] = -0.4
    return models.file_with_scales(model, SOURCE, masks, bits=bits)


def _export(folder: Path, file: QuantizedFile, **options: Any) -> tuple[Manifest, onnx.ModelProto]:
    io.write(folder / "model.safetensors", file)
    manifest = run.export_file(
        folder / "model.safetensors",
        folder / "a.onnx",
        form="onnx",
        target="tensorrt",
        trust_code=True,
        force=True,
        **options,
    )
    assert manifest.parity is not None
    return manifest, onnx.load(folder / "a.onnx")


def _constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in proto.graph.initializer}


def _logits(proto: onnx.ModelProto, images: Tensor) -> np.ndarray:
    """What the nodes compute one by one, nothing fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return logits


def _images() -> Tensor:
    return torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bits", [8, 4])
def test_every_pair_is_signed_symmetric_and_a_constant(tmp_path: Path, bits: int) -> None:
    manifest, proto = _export(tmp_path, _file(bits=bits), activations="int8")
    onnx.checker.check_model(proto, full_check=True)
    constants = _constants(proto)
    types = {value.name: value.data_type for value in proto.graph.initializer}
    pairs = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert [node.op_type for node in pairs].count("QuantizeLinear") == 4
    for node in pairs:
        assert types[node.input[2]] == TensorProto.INT8
        assert not constants[node.input[2]].any()
        assert (constants[node.input[1]] > 0).all()
    kinds = {node.op_type for node in proto.graph.node}
    assert not kinds & {"Gather", "Cast", "Round", "BatchNormalization"}
    assert TensorProto.UINT8 not in types.values()
    assert manifest.parity.layers_int8 == [record.name for record in manifest.layers]  # type: ignore[union-attr]
    assert {record.encoding for record in manifest.layers} == {"int8"}
    assert proto.opset_import[0].version == 20


def test_the_integers_stand_in_the_file_as_they_were_searched(tmp_path: Path) -> None:
    file = _file()
    _, proto = _export(tmp_path, file, activations="int8")
    stem, point, tokens, head = (layer.integers.numpy() for layer in file.layers)
    constants = _constants(proto)
    sign = np.where(file.others["norm.weight"].numpy() < 0, -1, 1)  # scales are positive
    assert (sign < 0).any()
    assert np.array_equal(constants["stem.weight_integers"], stem * sign[:, None, None, None])
    assert np.array_equal(constants["point.weight_integers"], point)
    assert np.array_equal(constants["tokens.weight_integers"], tokens.T)  # MatMul
    assert np.array_equal(constants["head.weight_integers"], head)  # Gemm
    nodes = {node.output[0]: node for node in proto.graph.node}
    axis = {a.name: a.i for a in nodes["stem.weight"].attribute}["axis"]
    assert (axis, constants["stem.weight_scale"].shape) == (0, (16,))


def test_inputs_of_eight_unsigned_bits_have_seven_at_twice_their_step(tmp_path: Path) -> None:
    file = _file()
    manifest, proto = _export(tmp_path, file, activations="int8")
    trained = {entry.module: entry for entry in file.manifest.activations}
    assert [trained[name].signed for name in ("stem", "point", "tokens", "head")] == [True, False, True, True]
    constants = _constants(proto)
    scales = sorted(float(constants[n.input[1]]) for n in proto.graph.node if n.op_type == "QuantizeLinear")
    wanted = [entry.scale * (1 if entry.signed else 2) for entry in trained.values()]
    assert scales == sorted(float(np.float32(scale)) for scale in wanted)
    assert not any(node.op_type == "Clip" for node in proto.graph.node)  # a ReLU stands before the unsigned one
    model = loading.hard_model(file, trust_code=True)
    activations.detach(model)
    entries = [
        activations.ActivationRecord(e.module, e.bits, e.signed, e.scale)
        if e.signed
        else activations.ActivationRecord(e.module, 7, False, 2 * e.scale)
        for e in trained.values()
    ]
    activations.attach(model, entries)
    with torch.no_grad():
        seven = model(_images()).numpy()
    errors = np.abs(_logits(proto, _images()) - seven).max(axis=1) / seven.std()
    assert np.median(errors) < 1e-5
    (note,) = (note for note in manifest.parity.notes if "unsigned" in note)  # type: ignore[union-attr]
    assert note.startswith("TensorRT has no unsigned 8 bits: the inputs of 1 layer have 7")


def test_narrower_inputs_keep_their_trained_scales_and_the_model_its_answers(tmp_path: Path) -> None:
    file = _file(bits=4)
    manifest, proto = _export(tmp_path, file, activations="int8")
    constants = _constants(proto)
    scales = sorted(float(constants[n.input[1]]) for n in proto.graph.node if n.op_type == "QuantizeLinear")
    assert scales == sorted(float(np.float32(entry.scale)) for entry in file.manifest.activations)
    assert [node.op_type for node in proto.graph.node].count("Clip") == 3  # the network's own input has 8 bits
    with torch.no_grad():
        wanted = loading.hard_model(file, trust_code=True)(_images()).numpy()
    errors = np.abs(_logits(proto, _images()) - wanted).max(axis=1) / wanted.std()
    assert np.median(errors) < 1e-5
    assert not any("unsigned" in note for note in manifest.parity.notes)  # type: ignore[union-attr]


def test_an_unsigned_input_that_turns_negative_is_clipped_as_in_training(tmp_path: Path) -> None:
    """Without a rectifier in front of it, signed 8 bits would let negative values through."""
    file = _file()
    for entry in file.manifest.activations:
        if entry.module == "tokens":
            entry.signed = False
    _, proto = _export(tmp_path, file, activations="int8")
    (clip,) = (node for node in proto.graph.node if node.op_type == "Clip")
    assert float(_constants(proto)[clip.input[1]]) == 0.0
    model = loading.hard_model(file, trust_code=True)
    for quantizer in activations.attached(model).values():
        if not quantizer.signed:
            quantizer.bits, quantizer.scale.data = 7, quantizer.scale.data * 2
    with torch.no_grad():
        wanted = model(_images()).numpy()
    assert np.median(np.abs(_logits(proto, _images()) - wanted).max(axis=1) / wanted.std()) < 1e-5


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_float_activations_have_integer_weights_alone(tmp_path: Path, weights: str) -> None:
    file = _file(bits=None)
    manifest, proto = _export(tmp_path, file, weights=weights, data_source=None)
    assert manifest.parity is not None
    assert manifest.parity.max_logit_error <= 5e-4 * manifest.parity.logit_std
    assert not any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    encodings = {record.name: record.encoding for record in manifest.layers}
    # tokens: |Q| ≤ 15 does not fit; head: |Q| ≤ 7, 192 inputs are three blocks of 64
    narrow = "int4" if weights == "int4" else "int8"
    assert encodings == {
        "stem.weight": "int8",
        "point.weight": "int8",
        "tokens.weight": "int8",
        "head.weight": narrow,
    }
    with torch.no_grad():
        wanted = loading.hard_model(file, trust_code=True)(_images()).numpy()
    assert np.abs(_logits(proto, _images()) - wanted).max() < 1e-5 * wanted.std() * 10
    if weights == "int4":
        constants = _constants(proto)
        node = next(node for node in proto.graph.node if node.output[0] == "head.weight")
        assert {a.name: a.i for a in node.attribute} == {"axis": 1, "block_size": 64}
        assert constants["head.weight_scale"].shape == (10, 3)
        stored = next(value for value in proto.graph.initializer if value.name == "head.weight_integers")
        flat = np.frombuffer(stored.raw_data, dtype=np.uint8)  # two numbers a byte, the first in the lower half
        halves = np.stack([flat & 15, flat >> 4], axis=1).reshape(10, 192).astype(np.int8)
        assert np.array_equal(np.where(halves > 7, halves - 16, halves), file.layers[3].integers.numpy())
        assert proto.opset_import[0].version == 21


def test_evaluate_reads_the_file_and_its_answers_are_the_hard_models(tmp_path: Path, image_folder: Path) -> None:
    """ONNX Runtime's own choice beside such weights rounds inputs to 8 bits: 3 % of the logits' standard deviation."""
    torch.manual_seed(0)
    model = models.shake(Mixed(2)).eval()
    file = models.file_with_scales(model, SOURCE, NARROW, bits=None, num_classes=2)
    manifest, _ = _export(tmp_path, file, weights="int4", data_source=str(image_folder))
    assert manifest.parity is not None
    assert manifest.parity.top1 == manifest.parity.hard_top1
    accuracy, again = evaluate_file(tmp_path / "a.onnx", str(image_folder))[:2]
    assert again.parity == manifest.parity
    assert accuracy.top1 == manifest.parity.top1


def test_layers_beyond_eight_bits_stand_in_float_and_are_named(tmp_path: Path) -> None:
    file = _file(WIDE)
    manifest, proto = _export(tmp_path, file, activations="int8")
    assert manifest.parity is not None
    assert manifest.parity.layers_int8 == ["point.weight", "head.weight"]
    assert "weights in float32, beyond int8: stem.weight, tokens.weight" in manifest.parity.notes
    wanted = file.layers[2].weight().numpy()
    assert np.array_equal(_constants(proto)["tokens.weight"], wanted.T)


def test_a_gamma_of_zero_keeps_its_batchnorm_because_scales_must_be_positive(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.shake(Mixed()).eval()  # the first γ is 0
    _, proto = _export(tmp_path, models.file_with_scales(model, SOURCE, NARROW, bits=None))
    assert [node.op_type for node in proto.graph.node].count("BatchNormalization") == 1
    assert (_constants(proto)["stem.weight_scale"] > 0).all()


def test_the_certificate_says_that_tensorrt_was_not_there_and_states_no_speed(tmp_path: Path) -> None:
    manifest, _ = _export(tmp_path, _file(bits=None))
    assert manifest.parity is not None
    assert manifest.parity.notes == ["for TensorRT, which did not run it; ONNX Runtime did"]
    assert manifest.parity.engine == f"onnxruntime {onnxruntime.__version__}"
    assert manifest.parity.made_for == "tensorrt"
    assert (
        "made_for" not in manifest.parity.model_copy(update={"made_for": None}).model_dump()
    )  # others keep their bytes
    assert manifest.parity.latency_ms is manifest.parity.latency_ratio is None


def test_a_network_with_transposed_packed_and_tied_weights_goes_through(tmp_path: Path) -> None:
    io.write(tmp_path / "model.safetensors", models.make_file("quantized_models:Traps", NARROW))
    manifest = run.export_file(
        tmp_path / "model.safetensors", tmp_path / "a.onnx", form="onnx", target="tensorrt", trust_code=True
    )
    assert manifest.parity is not None
    assert manifest.parity.layers_matched == len(manifest.layers) - 1  # one is never used
    assert {record.encoding for record in manifest.layers} == {"int8", "absent"}


def _change_an_integer(proto: onnx.ModelProto) -> None:
    value = next(value for value in proto.graph.initializer if value.name == "point.weight_integers")
    content = numpy_helper.to_array(value).copy()
    content.reshape(-1)[7] += 1
    value.CopyFrom(numpy_helper.from_array(content, value.name))


def _change_a_scale(proto: onnx.ModelProto) -> None:
    value = next(value for value in proto.graph.initializer if value.name == "head.weight_scale")
    value.CopyFrom(numpy_helper.from_array(np.nextafter(numpy_helper.to_array(value), np.float32(9)), value.name))


def _change_a_float(proto: onnx.ModelProto) -> None:
    value = next(value for value in proto.graph.initializer if value.name == "tokens.weight")
    value.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(value), value.name))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (_change_an_integer, "point.weight: integers differ"),
        (_change_a_scale, "head.weight: integers × scale is not the hard weight"),
        (_change_a_float, "tokens.weight: integers × scale is not the hard weight"),
    ],
)
def test_any_difference_in_the_written_weights_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Any, complaint: str
) -> None:
    honest = Onnx.write

    def write(self: Onnx, path: Path, parity: Any) -> None:
        honest(self, path, parity)
        proto = onnx.load(path)
        edit(proto)
        onnx.save(proto, path)

    monkeypatch.setattr(Onnx, "write", write)
    with pytest.raises(ParityError) as caught:
        _export(tmp_path, _file(WIDE, bits=None))
    assert complaint in caught.value.line()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--calib", "digits", "--activations", "int8"], "--calib does not go with --target tensorrt"),
        (["--weights", "int4", "--activations", "int8"], "--weights int4 goes with --activations float"),
        (["--weights", "int4", "--target", "ort"], "--weights int4 belongs to --target tensorrt"),
    ],
)
def test_options_that_mean_nothing_together_are_one_line(
    digits_run: Path, tmp_path: Path, csq: Any, options: list[str], complaint: str
) -> None:
    arguments = ["-o", tmp_path / "a.onnx", "--onnx", "--target", "tensorrt", *options]
    code, _, error = csq("export", digits_run / "model.safetensors", *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert complaint in error


def test_other_forms_have_no_such_weights(digits_run: Path, tmp_path: Path) -> None:
    import csqcli

    with pytest.raises(UserError, match="--weights belongs to --onnx"):
        csqcli.export(digits_run / "model.safetensors", tmp_path / "a.tflite", form="litert", weights="int4")
