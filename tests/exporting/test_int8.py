"""int8 activations: trained scales are used as they are, and none of the engine's silent traps is stepped into."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import quantized_models as models
import torch
from torch import Tensor, nn

from csqcli.file import io, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ActivationEntry, ModelRecord, ParityRecord
from csqcli.models import libraries as sources
from csqcli.quant import activations
from csqcli.quant.hard_layer import HardLayer, top_planes
from csqcli.quant.layers import find_layers

if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("needs the [onnx] extra", allow_module_level=True)

import onnx
import onnxruntime
from onnx import numpy_helper

from csqcli.exporting import int8_graph, onnx_graph, run, verify

pytestmark = pytest.mark.usefixtures("remembered_traces")

NARROW = ("11100000", "11000000", "11110000")


class Chain(nn.Module):
    """Convolutions with awkward BatchNorm, and a linear layer on three dimensions (MatMul of a transposed weight)."""

    data_config: dict = {"input_size": (3, 12, 12), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear"}  # noqa: RUF012

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, groups=2)
        self.norm2 = nn.BatchNorm2d(12)
        self.tokens = nn.Linear(12, 12)
        self.head = nn.Linear(12, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


def _file(masks: tuple[str, ...] = NARROW, *, bits: int = 8, gamma: float | None = None) -> QuantizedFile:
    torch.manual_seed(0)
    model = Chain().eval()
    for norm in (model.norm1, model.norm2):
        nn.init.normal_(norm.running_mean, 0, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        norm.weight.data[::3] *= -1
        nn.init.normal_(norm.bias, 0, 0.5)
    if gamma is not None:
        model.norm2.weight.data[1] = gamma
        model.norm2.bias.data[1] = 1.0
    hard = models.harden(model, masks)
    batches = [torch.randn(8, 3, 12, 12) for _ in range(2)]
    quantizers = activations.calibrate(model, find_layers(model)[0], batches, bits=bits)
    entries = [ActivationEntry(**vars(record)) for record in quantizers.records()]
    spec = sources.parse("tests.exporting.test_int8:Chain")
    record = ModelRecord(source=spec.source, library="factory", name=spec.name, num_classes=10, weights_from="random")
    return io.assemble(model, hard, record=record, data_config=Chain.data_config, target_bits=None, activations=entries)


def _export(folder: Path, file: QuantizedFile, **options: object) -> tuple[ParityRecord, onnx.ModelProto]:
    io.write(folder / "model.safetensors", file)
    manifest = run.export_file(
        folder / "model.safetensors",
        folder / "a.onnx",
        form="onnx",
        activations=options.pop("activations", "int8"),  # type: ignore[arg-type]
        trust_code=True,
        force=True,
        **options,  # type: ignore[arg-type]
    )
    assert manifest.parity is not None
    return manifest.parity, onnx.load(folder / "a.onnx")


def _constant(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(value for value in proto.graph.initializer if value.name == name))


@pytest.mark.parametrize("bits", [8, 4])
def test_every_layer_runs_on_its_own_integers_with_the_trained_scales(tmp_path: Path, bits: int) -> None:
    file = _file(bits=bits)
    parity, proto = _export(tmp_path, file)
    assert parity.layers_int8 == [layer.name for layer in file.layers]
    assert parity.layers_matched == 4
    scales = sorted(float(_constant(proto, n.input[1])) for n in proto.graph.node if n.op_type == "QuantizeLinear")
    assert scales == sorted(np.float32(entry.scale) for entry in file.manifest.activations)
    clips = [node for node in proto.graph.node if node.op_type == "Clip"]
    assert len(clips) == (3 if bits == 4 else 0)  # the network's own input has 8 bits
    assert not any(node.op_type in ("Round", "BatchNormalization") for node in proto.graph.node)


def test_without_optimizations_the_file_computes_the_hard_model_itself(tmp_path: Path) -> None:
    file = _file(bits=4)
    _, proto = _export(tmp_path, file)
    model = _model(file)
    images = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        wanted = model(images).numpy()
    errors = np.abs(logits - wanted).max(axis=1) / wanted.std()
    assert np.median(errors) < 1e-5  # a value on the edge between two integers may flip in single images


def _model(file: QuantizedFile) -> nn.Module:
    return loading.hard_model(file, trust_code=True)


def test_folding_batchnorm_negates_channels_of_negative_gamma_and_nothing_else(tmp_path: Path) -> None:
    file = _file()
    graphs = onnx_graph.trace(_model(file), file.layers, (3, 12, 12))
    weights = int8_graph.quantize(graphs.proto, graphs.used).weights
    gamma = file.others["norm1.weight"].numpy()
    variance = file.others["norm1.running_var"].numpy()
    integers = file.layers[0].integers.numpy()
    sign = np.where(gamma < 0, -1, 1)
    assert (sign < 0).any()
    assert np.array_equal(weights["conv1.weight"].integers, integers * sign[:, None, None, None])
    factor = np.abs(gamma) / np.sqrt(variance + 1e-5)  # BatchNorm2d's ε
    assert np.allclose(weights["conv1.weight"].scale, float(file.layers[0].scale) * factor, rtol=1e-6)
    assert np.array_equal(weights["tokens.weight"].integers, file.layers[2].integers.numpy().T)


@pytest.mark.parametrize("runs_in_int8", [True, False])
def test_a_folded_layer_of_negative_scale_is_the_layer_times_its_batchnorm(runs_in_int8: bool) -> None:
    """csq writes none, and its format allows it: docs/format.md, section 6."""
    file = _file()
    file.layers[0] = replace(file.layers[0], scale=-file.layers[0].scale)
    graphs = onnx_graph.trace(_model(file), file.layers, (3, 12, 12))
    graph = int8_graph.quantize(graphs.proto, graphs.used)
    if not runs_in_int8:
        graph = int8_graph.Int8Graph(int8_graph.copied(graphs.proto))
    folded = graph.weights if runs_in_int8 else int8_graph.fold_others(graph, graphs.used)
    gamma, variance = (file.others[f"norm1.{name}"].double().numpy() for name in ("weight", "running_var"))
    weight = file.layers[0].integers.double().numpy() * float(file.layers[0].scale)
    wanted = weight * (gamma / np.sqrt(variance + 1e-5))[:, None, None, None]  # BatchNorm2d's ε
    assert (folded["conv1.weight"].scale > 0).all()
    assert np.allclose(folded["conv1.weight"].weight(), wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1e-12, -1e-9])
def test_a_bias_that_would_overflow_int32_raises_its_channel_s_scale(tmp_path: Path, gamma: float) -> None:
    file = _file(gamma=gamma)
    parity, proto = _export(tmp_path, file)
    assert "BatchNormalization" not in [node.op_type for node in proto.graph.node]
    assert "conv2.weight" in parity.layers_int8
    assert any("scale is raised" in note for note in parity.notes)
    assert parity.max_logit_error <= parity.tolerance_in_std * parity.logit_std + 1e-6


def test_a_channel_that_cannot_be_raised_unseen_keeps_its_batchnorm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_graph, "UNSEEN", 0.0)
    parity, proto = _export(tmp_path, _file(gamma=1e-12))
    assert [node.op_type for node in proto.graph.node].count("BatchNormalization") == 1
    assert "conv2.weight" in parity.layers_int8  # its integers are int8 all the same
    assert parity.max_logit_error <= parity.tolerance_in_std * parity.logit_std + 1e-6


def test_layers_beyond_int8_keep_float_weights_and_their_rounding(tmp_path: Path) -> None:
    """ONNX Runtime would round a float weight behind DequantizeLinear to int8 without a word."""
    parity, proto = _export(tmp_path, _file(("11111111", "11000000")))
    assert parity.layers_int8 == ["conv2.weight", "head.weight"]
    assert [node.op_type for node in proto.graph.node].count("Round") == 2


def test_an_all_zero_channel_keeps_a_positive_scale(tmp_path: Path) -> None:
    file = _file()
    for number, layer in enumerate(file.layers):
        integers = layer.integers.clone()
        integers[0] = 0
        file.layers[number] = replace(layer, integers=integers)
    file.manifest.payload_sha256 = io.payload_sha256(file.layers)
    _, proto = _export(tmp_path, file)
    for layer in file.layers:
        assert (_constant(proto, f"{layer.name}_scale") > 0).all()


def test_float_activations_keep_the_rounding_of_a_trained_file(tmp_path: Path) -> None:
    parity, proto = _export(tmp_path, _file(bits=4), activations="float")
    assert [node.op_type for node in proto.graph.node].count("Round") == 4
    assert parity.layers_int8 == []


def test_the_float_baseline_rounds_nothing() -> None:
    file = _file()
    graphs = onnx_graph.trace(_model(file), file.layers, (3, 12, 12))
    kinds = {node.op_type for node in graphs.plain().graph.node}
    assert not kinds & {"Round", "Div", "QuantizeLinear"}


def test_the_floor_grows_with_the_bias_unit_and_leaves_no_hook_behind() -> None:
    file = _file(bits=4)
    model = _model(file)
    probe = verify.make_probe(model, (3, 12, 12), None, source="")
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    small = verify.rounding_floor(model, probe, {}, {})
    large = verify.rounding_floor(model, probe, {"tokens": torch.tensor([0.5])}, {})
    assert large > small
    assert verify.rounding_floor(model, probe, {}, {"conv2": torch.full((12,), 0.5)}) > small
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_the_floor_is_never_below_one_flip_of_an_input_of_the_last_layer() -> None:
    file = _file(bits=4)
    model = _model(file)
    probe = verify.make_probe(model, (3, 12, 12), None, source="")
    last = file.manifest.activations[-1]
    flip = last.scale * float(model.get_submodule(last.module).weight.detach().abs().max())
    found = verify.rounding_floor(model, probe, {}, {}, relative=0.0, repeats=1)  # which sees no flip here
    assert found * probe.spread == pytest.approx(flip)


def test_the_floor_of_a_grouped_transposed_convolution_has_a_unit_per_channel_of_a_group() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 2, groups=3), nn.Flatten())
    probe = verify.make_probe(model, (3, 4, 4), None, source="")
    first = verify.rounding_floor(model, probe, {"0": torch.tensor([0.5, 0.0])}, {})
    assert 0 < first < verify.rounding_floor(model, probe, {"0": torch.tensor([0.5, 8.0])}, {})


def test_openvino_runs_the_same_file(tmp_path: Path) -> None:
    """In a process of its own: with OpenVINO's libraries loaded, a later fork of the test process may crash."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("needs the [openvino] extra")
    io.write(tmp_path / "model.safetensors", _file())
    command = [sys.executable, "-m", "csqcli", "export", str(tmp_path / "model.safetensors"), "--trust-code"]
    command += ["--onnx", "--activations", "int8", "--target", "openvino", "-o", str(tmp_path / "a.onnx")]
    paths = os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[1])))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 of 4 layers run in int8" in done.stdout
    assert "openvino" in done.stdout


class Residual(nn.Module):
    """A convolution whose output only an addition reads: no trained scale rounds it."""

    data_config: dict = Chain.data_config

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.branch_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rectify(self.norm(self.stem(x)))
        x = self.rectify(x + self.branch_norm(self.branch(x)))
        return self.head(x.mean((2, 3)))

    def rectify(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class ResidualOfRelu6(Residual):
    """The same with the rectifier of mobile networks."""

    def rectify(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x)


@pytest.mark.parametrize("network", [Residual, ResidualOfRelu6])
def test_calibration_scales_only_outputs_that_no_trained_scale_rounds(
    tmp_path: Path, image_folder: Path, network: type[Residual]
) -> None:
    torch.manual_seed(0)
    model = models.shake(network()).eval()
    model.norm.weight.data[0] = model.branch_norm.weight.data[0] = 0.5  # type: ignore[union-attr,operator]
    hard = models.harden(model, NARROW)
    quantizers = activations.calibrate(model, find_layers(model)[0], [torch.randn(8, 3, 12, 12)], bits=8)
    entries = [ActivationEntry(**vars(record)) for record in quantizers.records()]
    record = ModelRecord(
        source="x",
        library="factory",
        name=f"tests.exporting.test_int8:{network.__name__}",
        num_classes=2,
        weights_from="random",
    )
    file = io.assemble(
        model, hard, record=record, data_config=Residual.data_config, target_bits=None, activations=entries
    )
    without, _ = _export(tmp_path, file)
    assert without.calibrated == []
    parity, proto = _export(tmp_path, file, calib=str(image_folder), data_source=str(image_folder))
    assert parity.calibrated == ["branch.weight"]
    trained = {np.float32(entry.scale) for entry in entries}
    used = {_constant(proto, n.input[1])[()] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    assert trained <= used
    assert len(used - trained) == 1
    assert parity.samples == 6


def test_calibration_without_int8_activations_is_refused(digits_run: Path, tmp_path: Path, csq) -> None:
    arguments = ["-o", tmp_path / "a.onnx", "--onnx", "--calib", "digits"]
    code, _, error = csq("export", digits_run / "model.safetensors", *arguments)
    assert code == 2
    assert "--calib belongs to --activations int8" in error


class Unusual(nn.Module):
    """Transposed convolutions, one with BatchNorm and one grouped; packed attention; a layer that is called twice."""

    data_config: dict = Chain.data_config

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.up, self.norm = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.BatchNorm2d(12)
        self.down = nn.ConvTranspose2d(12, 16, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.again = nn.Linear(16, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.up(torch.relu(self.stem(x)))))
        x = self.down(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        x = self.again(torch.relu(self.again(x)))
        return self.head(x.mean(1))


def _unusual() -> QuantizedFile:
    torch.manual_seed(0)
    model = models.shake(Unusual()).eval()
    with torch.no_grad():
        model.norm.weight[0], model.norm.weight[1] = 0.3, -0.4
    return models.file_with_scales(model, "tests.exporting.test_int8:Unusual", NARROW, bits=8)


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_transposed_packed_and_twice_read_weights_run_in_int8(tmp_path: Path, target: str) -> None:
    file = _unusual()
    parity, proto = _export(tmp_path, file, target=target)
    # attention.out_proj is computed inside of nn.MultiheadAttention: no module is called whose input could be rounded
    rest = {layer.name for layer in file.layers} - set(parity.layers_int8)
    assert rest == {"attention.out_proj.weight"}
    up = next(node for node in proto.graph.node if node.output[0] == "up.weight")
    assert {a.name: a.i for a in up.attribute} == {"axis": 1}
    layer = next(layer for layer in file.layers if layer.name == "up.weight")
    gamma, variance = (file.others[f"norm.{part}"].numpy() for part in ("weight", "running_var"))
    wanted = float(layer.scale) * np.abs(gamma) / np.sqrt(variance + 1e-5)
    assert np.allclose(_constant(proto, up.input[1]), wanted, rtol=1e-6)
    assert sum("again.weight" in node.input for node in proto.graph.node) == 2
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)


def test_unusual_layers_in_int8_compute_the_hard_model_itself(tmp_path: Path) -> None:
    file = _unusual()
    _, proto = _export(tmp_path, file)
    images = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        wanted = _model(file)(images).numpy()
    assert np.median(np.abs(logits - wanted).max(axis=1) / wanted.std()) < 5e-3


@pytest.mark.parametrize(
    ("instructions", "largest", "said"),
    [
        (["sse4_2", "avx", "avx2"], 127, True),
        (["sse4_2", "avx2"], 65, True),
        (["sse4_2", "avx2"], 64, False),
        (["avx2", "avx512f", "avx512_vnni"], 127, False),
        (["avx2", "avx_vnni"], 127, False),
        (["asimd", "asimddp"], 127, False),
    ],
)
def test_a_processor_whose_int8_kernels_saturate_is_named_as_the_reason(
    instructions: list[str], largest: int, said: bool
) -> None:
    layer = HardLayer(
        "conv1.weight", torch.tensor([[largest, -3]], dtype=torch.int32), torch.ones(1), top_planes(7, 8), 0, ()
    )
    hint = verify.saturates([layer], instructions)
    assert bool(hint) == said
    assert not said or f"conv1.weight has {largest}" in hint


def test_an_int8_graph_that_a_processor_saturates_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "processor", lambda: {"instructions": ["avx2"]})

    def differs(*_: object, **__: object) -> float:
        raise verify.ParityError("logits differ", hint="please report the model")

    monkeypatch.setattr(verify, "check_logits", differs)
    with pytest.raises(verify.ParityError) as refused:
        _export(tmp_path, _file(("11111110",) * 3))
    assert "VNNI" in refused.value.line()
    assert "max_bits=6" in refused.value.line()
    assert "report the model" not in refused.value.line()
