"""Latencies: every layer measured on its own shape by the kernel an export would have, forms in turns, fp32 beside each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_models as models
import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.exporting import engines, float_twins, layer_graphs, runtime, timing
from csqcli.exporting.bench import Setting, bench_network
from csqcli.exporting.images import loader
from csqcli.exporting.run import export_file
from csqcli.file import io, loading
from csqcli.models.coverage import Call, count_macs
from csqcli.models.spec import parse
from csqcli.quant.layers import find_layers
from csqcli.system.progress import Display

pytestmark = pytest.mark.usefixtures("remembered_traces")

onnx = pytest.mark.skipif(engines._missing("ort") != [], reason="needs the [onnx] extra")
litert = pytest.mark.skipif(engines._missing("litert") != [], reason="needs the [litert] extra")
INPUTS = Path(__file__).parents[1] / "file" / "fixtures" / "digits_schema1.safetensors"  # with 8-bit inputs


class Shapes(nn.Module):
    """Convolutions of every kind, a layer that runs twice, one on tokens, one that nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, (5, 3), padding=(2, 1), groups=8)
        self.twice = nn.Conv2d(8, 8, 1, dilation=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.tokens = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4, bias=False)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.depthwise(self.stem(x))))
        return self.head(self.tokens(self.up(x).flatten(2).transpose(1, 2)).mean(1))


def calls_of(model: nn.Module, size: tuple[int, ...]) -> dict[str, list[Call]]:
    return count_macs(model, find_layers(model)[0], size).calls


def test_calls_are_what_the_modules_are_asked_for() -> None:
    model = Shapes().eval()
    seen: dict[str, list[tuple[int, ...]]] = {}  # by hooks, not by what runs below them
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _, inputs, __, name=name: seen.setdefault(f"{name}.weight", []).append(tuple(inputs[0].shape))
        )
    calls = calls_of(model, (3, 12, 10))
    assert calls.keys() == seen.keys()  # the one that nothing runs is in neither
    for name, shapes in seen.items():
        module = getattr(model, name.removesuffix(".weight"))
        for call, shape in zip(calls[name], shapes, strict=True):
            assert call.weight == tuple(module.weight.shape)
            if isinstance(module, nn.Linear):
                assert (call.kind, call.input) == ("linear", (int(np.prod(shape[:-1])), shape[-1]))
            else:
                assert (call.kind, call.input, call.groups) == ("convolution", shape, module.groups)
                assert call.bias == (module.bias is not None)
                assert (call.stride, call.padding, call.dilation) == (module.stride, module.padding, module.dilation)
    assert len(calls["twice.weight"]) == 2


CALLS = [
    Call("convolution", (1, 3, 9, 7), (8, 3, 3, 3), True, (2, 2), (1, 1), (1, 1)),
    Call("convolution", (2, 6, 8, 8), (12, 1, 3, 5), False, (1, 1), (2, 2), (1, 1), groups=6),
    Call("convolution", (1, 6, 5, 5), (4, 6, 1, 1), False, (1, 1), (0, 0), (1, 1)),
    Call("linear", (7, 6), (5, 6), True),
]


def reference(call: Call, images: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64, by torch's own operations."""
    x, w = torch.from_numpy(images).double(), torch.from_numpy(weight).double()
    if call.kind == "linear":
        return (x @ w.T).numpy()
    return torch.conv2d(x, w, None, call.stride, call.padding, call.dilation, call.groups).numpy()


@onnx
@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.kind}-{call.groups}")
def test_a_layer_alone_computes_what_the_layer_computes(call: Call) -> None:
    hard = layer_graphs._hard(call, "int8")
    weight = hard.weight().numpy()
    images = np.random.default_rng(1).random(call.input, dtype=np.float32)
    plain = runtime.OnnxModel(layer_graphs._onnx(call, "fp32").SerializeToString(), threads=1)
    np.testing.assert_allclose(plain(torch.from_numpy(images)), reference(call, images, weight), atol=1e-5)

    # up to 127: without VNNI, kernels saturate sums of two products of larger ones
    pixels = np.random.default_rng(2).integers(0, 128, call.input, dtype=np.uint8)
    rounded = runtime.OnnxModel(layer_graphs._onnx(call, "int8").SerializeToString(), threads=1)
    exact = reference(call, pixels * np.float32(0.02), weight) / 0.02
    found = rounded(torch.from_numpy(pixels)).numpy()
    assert found.dtype == np.uint8  # integers in, integers out
    assert np.abs(found - np.clip(np.rint(exact), 0, 255)).max() <= 1


@litert
@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.kind}-{call.groups}")
def test_litert_has_a_kernel_of_few_bits_where_an_export_has_one(call: Call) -> None:
    pointwise = call.kind == "linear" or call.weight[2:] == (1, 1)  # FULLY_CONNECTED in both
    able = {form for form in engines.ENGINES["litert"].forms if layer_graphs.runs("litert", call, form, threads=1)}
    assert able == ({"fp32", "int8", "int4", "int2"} if pointwise else {"fp32", "int8"})


@litert
def test_what_litert_measures_is_the_kernel_and_no_rounding() -> None:
    from csqcli.exporting import litert_graph, tflite
    from csqcli.exporting.int8_graph import Int8Graph, Int8Weight

    hard = layer_graphs._hard(CALLS[0], "int8")
    weight = Int8Weight(hard.integers.numpy(), hard.scale.numpy(), 0)
    made = litert_graph.convert(Int8Graph(layer_graphs._traced(CALLS[0], rounded=True), {"weight": weight}), {})
    model = tflite.read(layer_graphs._kernel_alone(made))
    names = {value: name for name, value in vars(tflite.schema().BuiltinOperator).items() if isinstance(value, int)}
    kinds = [names[model.operatorCodes[operator.opcodeIndex].builtinCode] for operator in model.subgraphs[0].operators]
    assert kinds[-1] == "CONV_2D"
    assert set(kinds) <= {"PAD", "CONV_2D"}


def test_transposed_convolutions_have_no_integer_form() -> None:
    call = Call("convolution", (1, 4, 3, 3), (4, 2, 2, 2), True, (2, 2), (0, 0), (1, 1), 1, True, (0, 0))
    assert layer_graphs.runs("torch", call, "fp32", threads=1) is not None
    assert layer_graphs.runs("ort", call, "int8", threads=1) is None


def test_turns_go_round_and_short_work_is_repeated_in_a_turn() -> None:
    order: list[str] = []
    found = timing.interleaved([lambda: order.append("a"), lambda: order.append("b")], repeats=2)
    assert "".join(order) == "ababab"
    assert all(one.low <= one.median <= one.high for one in found)
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        np.ones(10_000).sum()

    timing.interleaved([work], repeats=3, least_seconds=1e-3)
    assert calls > 3 * 10  # each of some ten microseconds


def test_quartiles_are_those_of_the_turns() -> None:
    one = timing.Timing.of([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (one.low, one.median, one.high) == (2.0, 3.0, 4.0)
    assert timing.Timing.of([7.0]) == timing.Timing(7.0, 7.0, 7.0)


@onnx
def test_the_float_twin_of_an_int8_graph_is_the_network_without_rounding(tmp_path: Path) -> None:
    export_file(INPUTS, tmp_path / "a.onnx", form="onnx", activations="int8", calib="digits")
    proto, manifest = runtime.checked_graph(tmp_path / "a.onnx")
    twin = float_twins.of_onnx(proto, [layer.name for layer in manifest.layers])
    assert not {node.op_type for node in twin.graph.node} & {"QuantizeLinear", "DequantizeLinear", "Round", "Gather"}
    images = torch.rand(5, *manifest.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    file = io.read(INPUTS)
    plain = loading.plain_model(file, trust_code=False, where="")
    assert torch.allclose(runtime.OnnxModel(twin.SerializeToString())(images), plain(images), atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(loading.hard_model(file)(images), plain(images), atol=1e-4)  # which rounds


@onnx
def test_the_float_twin_of_packed_weights_is_the_same_network(tmp_path: Path) -> None:
    io.write(tmp_path / "a.safetensors", models.make_file("csq:cifar_resnet20"))
    export_file(tmp_path / "a.safetensors", tmp_path / "a.onnx", form="onnx")
    proto, manifest = runtime.checked_graph(tmp_path / "a.onnx")
    twin = float_twins.of_onnx(proto, [layer.name for layer in manifest.layers])
    images = torch.randn(2, *manifest.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    both = [runtime.OnnxModel(graph.SerializeToString())(images) for graph in (proto, twin)]
    assert torch.allclose(*both, atol=1e-4 * float(both[0].std()))
    assert len(twin.graph.node) < len(proto.graph.node)


@litert
@pytest.mark.parametrize("prefer", ["speed", "size"])
def test_the_float_twin_of_a_tflite_is_the_network_without_rounding(tmp_path: Path, prefer: Any) -> None:
    export_file(INPUTS, tmp_path / "a.tflite", form="litert", activations="int8", calib="digits", prefer=prefer)
    content, _ = runtime.checked_flatbuffer(tmp_path / "a.tflite")
    twin = runtime.LiteRtModel(float_twins.of_litert(content))
    assert {detail["dtype"] for detail in twin.interpreter.get_tensor_details()} <= {np.float32, np.int32}
    images = next(iter(loader(io.read(INPUTS), "digits", 32, workers=0, labelled=False).epoch(0)))[0]
    with torch.no_grad():
        plain = loading.plain_model(io.read(INPUTS), trust_code=False, where="")(images)
    assert (twin(images) - plain).abs().max() < 0.05 * plain.std()  # biases are rounded in the file


@litert
def test_the_float_twin_of_a_tflite_of_float_activations_is_the_same_network(tmp_path: Path) -> None:
    io.write(tmp_path / "a.safetensors", models.make_file("csq:cifar_resnet20", ("11100000", "11000000")))
    export_file(tmp_path / "a.safetensors", tmp_path / "a.tflite", form="litert")
    content, manifest = runtime.checked_flatbuffer(tmp_path / "a.tflite")
    images = torch.randn(2, *manifest.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    both = [runtime.LiteRtModel(graph)(images) for graph in (content, float_twins.of_litert(content))]
    assert torch.allclose(*both, atol=1e-4 * float(both[0].std()))


@pytest.mark.parametrize("engine", ["torch", pytest.param("ort", marks=onnx), pytest.param("litert", marks=litert)])
def test_a_network_is_measured_layer_by_layer_and_whole(engine: str) -> None:
    torch.manual_seed(0)
    model = models.shake(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    )
    spec, config = (
        parse("tests.nowhere:Model"),
        {"input_size": (3, 8, 8), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear"},
    )
    found = bench_network(model, spec, config, Setting(engine, repeats=2), display=Display(quiet=True))
    forms = engines.ENGINES[engine].forms
    assert [row["name"] for row in found["layers"]] == ["0.weight", "4.weight"]
    for row in found["layers"]:
        assert list(row["latency"]) == list(forms)
        for form in ("fp32", "int8") if "int8" in forms else ("fp32",):
            assert 0 < row["latency"][form]["low_ms"] <= row["latency"][form]["ms"] <= row["latency"][form]["high_ms"]
    assert found["network"]["fp32"]["ms"] > 0
    assert (found["network"]["exported"] is None) == (engine == "torch")
    assert found["sum_ms"]["fp32"] == pytest.approx(sum(row["latency"]["fp32"]["ms"] for row in found["layers"]))
    assert found["network"]["why"] is None


def test_threads_of_torch_are_as_before() -> None:
    before = torch.get_num_threads()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    config = {"input_size": (1, 4, 4), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear"}
    setting = Setting("torch", threads=before + 1, repeats=1)
    bench_network(model, parse("tests.nowhere:Model"), config, setting, display=Display(quiet=True))
    assert torch.get_num_threads() == before


def test_the_default_engine_is_the_first_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"onnx", "onnxscript", "onnxruntime", "ai_edge_litert", "flatbuffers"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    assert engines.choose(None) == "ort"
    there.discard("onnxscript")
    assert engines.choose(None) == "torch"
    assert engines.choose(None, among=("torch",)) == "torch"


def test_an_engine_that_is_not_installed_is_one_line_with_its_extra(csq, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else real(name, *more)
    )
    monkeypatch.setattr(engines, "_missing", lambda name: ["openvino"] if name == "openvino" else [])
    code, out, err = csq("bench", "csq:digits_cnn", "--engine", "openvino")
    assert (code, out) == (2, "")
    assert err == "csq: error: --engine: OpenVINO needs the package openvino; pip install 'csq[openvino]'\n"


def test_a_file_of_another_engine_is_refused(csq, tmp_path: Path) -> None:
    (tmp_path / "a.tflite").write_bytes(b"no flatbuffer")
    code, _, err = csq("bench", tmp_path / "a.tflite", "--engine", "torch")
    assert (code, err.count("\n")) == (2, 1)


@onnx
def test_what_the_command_says_is_what_it_measured(csq, digits_run: Path) -> None:
    code, out, err = csq("bench", digits_run, "--engine", "ort", "--repeats", "2", "-q")
    assert (code, err) == (0, "")
    for word in (
        "conv1",
        "fp32 ms",
        "int8 ms",
        "times as fast as fp32: onnx, packed weights",
        "processor",
        "onnxruntime",
    ):
        assert word in out
    code, out, _ = csq("bench", digits_run, "--engine", "torch", "--batch", "3", "--repeats", "2", "--json", "-q")
    found = json.loads(out)
    assert (code, found["engine"], found["batch"], found["form"]) == (0, "torch", 3, "compact")


def test_a_size_is_for_models_by_name() -> None:
    import csqcli

    with pytest.raises(UserError, match="input_size: is for models by name"):
        csqcli.bench(INPUTS, engine="torch", input_size=12)
    with pytest.raises(UserError, match="no engine `tflite`"):
        csqcli.bench(INPUTS, engine="tflite")


@onnx
def test_a_grouped_transposed_convolution_is_measured_alone() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2))
    [call] = calls_of(model, (4, 5, 5))["0.weight"]
    hard = layer_graphs._hard(call, "fp32")
    assert hard.weight().shape == model[0].weight.shape == (4, 3, 2, 2)
    assert layer_graphs._onnx(call, "fp32").graph.output
