"""The ONNX form computes the hard weights bit for bit with its own nodes, and the engine the hard model's logits."""

from __future__ import annotations

import builtins
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import quantized_models as models
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from csqcli.file import io

if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("needs the [onnx] extra", allow_module_level=True)

import onnx
import onnxruntime

from csqcli.exporting import onnx_graph, run, runtime, timing, unpacking, verify
from csqcli.exporting.forms.onnx import Onnx
from csqcli.exporting.verify import ParityError

pytestmark = pytest.mark.usefixtures("remembered_traces")

TRAPS = "quantized_models:Traps"


def _written(folder: Path, source: str, masks: tuple[str, ...] = models.MASKS, **details: object) -> Path:
    path = folder / "model.safetensors"
    io.write(path, models.make_file(source, masks, **details))
    return path


def _unpacked(packed: unpacking.Packed, count: int) -> np.ndarray:
    """Inverse of `pack`, straight from its description and sharing nothing with the tables."""
    base = len(packed.levels)
    if packed.per_byte:
        digits = [packed.data.astype(int) // base**place % base for place in range(packed.per_byte)]
        numbers = np.stack(digits, axis=1).reshape(-1)
    else:
        bits = np.unpackbits(packed.data, axis=1, bitorder="little").astype(int)
        numbers = sum(row << plane for plane, row in enumerate(bits))
    return packed.levels[numbers[:count]]


@given(
    hnp.arrays(np.int32, st.integers(1, 70), elements=st.integers(-255, 255)),
    st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 40, 300, 600]),
)
def test_packing_is_lossless_at_every_number_of_levels(integers: np.ndarray, levels: int) -> None:
    integers = integers % levels - levels // 2
    packed = unpacking.pack(integers)
    assert np.array_equal(_unpacked(packed, integers.size), integers)


@pytest.mark.parametrize(
    ("levels", "bits"),  # k planes have 2^(k+1) − 1 levels; five trits in eight bits, else k+1 bits
    [(3, 8 / 5), (7, 3), (15, 4), (31, 5), (63, 6), (255, 8), (511, 9)],
)
def test_packing_takes_one_bit_more_than_the_planes(levels: int, bits: float) -> None:
    integers = np.resize(np.arange(levels) - levels // 2, 8 * 5 * 512)
    assert unpacking.pack(integers).data.size * 8 / integers.size == bits


@given(
    hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.integers(-255, 255)),
    st.sampled_from([2, 3, 7, 15, 31, 511]),
    st.booleans(),
)
def test_the_nodes_compute_integers_times_scale_bit_for_bit(integers: np.ndarray, levels: int, channels: bool) -> None:
    integers = integers % levels - levels // 2
    scale = np.linspace(-0.3, 0.7, integers.shape[0] if channels else 1, dtype=np.float32)
    scale = scale.reshape([-1] + [1] * (integers.ndim - 1))
    unpacker = unpacking.Unpacker()
    unpacker.add("w", integers, scale)
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in ("w_integers", "w")]
    graph = onnx.helper.make_graph(unpacker.nodes, "unpack", [], outputs, unpacker.initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", onnx_graph.OPSET)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got_integers, got_weight = session.run(None, {})
    assert np.array_equal(got_integers, integers)
    assert np.array_equal(got_weight, integers.astype(np.float32) * scale)


def test_no_trap_changes_an_integer_or_a_logit(tmp_path: Path) -> None:
    """Negative and zero γ, all-zero channel and layer, tied, grouped, depthwise, transposed, packed attention, 9 bits."""
    source = _written(tmp_path, TRAPS)
    manifest = run.export_file(source, tmp_path / "a.onnx", form="onnx", trust_code=True)
    assert manifest.parity is not None
    assert manifest.parity.layers_absent == ["unused.weight"]
    assert manifest.parity.layers_matched == len(manifest.layers) - 1
    assert manifest.parity.max_logit_error <= 5e-4 * manifest.parity.logit_std
    encodings = {record.name: record.encoding for record in manifest.layers}
    assert encodings["zeros.weight"] == "base1"
    assert encodings["unused.weight"] == "absent"
    proto = onnx.load(tmp_path / "a.onnx")
    weights = {value.name for value in proto.graph.initializer} & {record.name for record in manifest.layers}
    assert not weights  # no quantized weight is left as floats
    (transpose,) = (node for node in proto.graph.node if "tied.weight" in node.input)  # one, shared by both layers
    assert sum(transpose.output[0] in node.input for node in proto.graph.node) == 2
    assert not any("tied_too" in name for node in proto.graph.node for name in (*node.input, *node.output))


@pytest.mark.parametrize("source", ["cifar_resnet20", "cifar_vgg19bn"])
def test_the_papers_networks_export(tmp_path: Path, source: str) -> None:
    path = _written(tmp_path, source, ("11000000", "11100000", "11110000"))
    manifest = run.export_file(path, tmp_path / "a.onnx", form="onnx")
    assert manifest.parity is not None
    assert manifest.parity.layers_matched == len(manifest.layers)
    assert manifest.parity.file_bytes == (tmp_path / "a.onnx").stat().st_size
    assert manifest.parity.engine == f"onnxruntime {onnxruntime.__version__}"
    assert manifest.sizes.float_bytes / manifest.parity.file_bytes > 5


def test_the_engine_folds_the_unpacking_and_batchnorm_away(tmp_path: Path) -> None:
    path = _written(tmp_path, "cifar_resnet20")
    run.export_file(path, tmp_path / "a.onnx", form="onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node}
    assert "Conv" in kinds or "FusedConv" in kinds
    assert not kinds & {"Gather", "Cast", "Mul", "BatchNormalization"}


def test_any_batch_size_runs_and_the_preprocessing_is_recorded(tmp_path: Path) -> None:
    path = _written(tmp_path, "digits_cnn")
    run.export_file(path, tmp_path / "a.onnx", form="onnx")
    model, manifest = runtime.open_model(tmp_path / "a.onnx")
    images = torch.randn(5, 1, 8, 8)
    assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)
    assert list(manifest.data_config["mean"]) == [0.2873]
    assert manifest.data_config["input_size"] == [1, 8, 8]


def test_no_path_of_this_machine_is_left_in_the_graph(tmp_path: Path) -> None:
    path = _written(tmp_path, TRAPS)
    run.export_file(path, tmp_path / "a.onnx", form="onnx", trust_code=True)
    content = (tmp_path / "a.onnx").read_bytes()
    for trace in (b"site-packages", b".py", str(Path(__file__).parent).encode(), b"stack_trace", b"name_scopes"):
        assert trace not in content


def test_evaluate_and_report_take_the_onnx_file(digits_run: Path, tmp_path: Path, csq) -> None:
    model = digits_run / "model.safetensors"
    code, text, error = csq(
        "export", model, "-o", tmp_path / "a.onnx", "--onnx", "--data", "digits", "--val-limit", 100
    )
    assert (code, error) == (0, "")
    assert "4 layers bit-exact" in text
    wanted = json.loads(csq("evaluate", model, "--data", "digits", "--json")[1])
    assert json.loads(csq("evaluate", tmp_path / "a.onnx", "--data", "digits", "--json")[1]) == wanted
    report = json.loads(csq("report", tmp_path / "a.onnx", "--json")[1])
    assert report["form"] == "onnx"
    assert report["parity"]["samples"] == 100
    assert report["parity"]["latency_ratio"] > 0
    assert "verified     4 layers bit-exact" in csq("report", tmp_path / "a.onnx")[1]


def test_int8_activations_are_refused_without_scales(digits_run: Path, tmp_path: Path, csq) -> None:
    arguments = ["-o", tmp_path / "a.onnx", "--onnx", "--activations", "int8"]
    code, _, error = csq("export", digits_run / "model.safetensors", *arguments)
    assert code == 2
    assert "has no activation scales" in error
    assert not (tmp_path / "a.onnx").exists()


def test_a_model_that_cannot_be_traced_is_one_line(tmp_path: Path, csq) -> None:
    path = _written(tmp_path, "quantized_models:Branching")
    code, _, error = csq("export", path, "-o", tmp_path / "a.onnx", "--onnx", "--trust-code")
    assert (code, error.count("\n")) == (2, 1)
    assert "torch cannot export this model to ONNX" in error
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_one_line_with_the_pip_command(
    digits_run: Path, tmp_path: Path, csq, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    honest = runtime.importlib.import_module

    def import_module(name: str):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return honest(name)

    monkeypatch.setattr(runtime.importlib, "import_module", import_module)
    code, _, error = csq("export", digits_run / "model.safetensors", "-o", tmp_path / "a.onnx", "--onnx")
    assert (code, error) == (2, f"csq: error: ONNX: needs the package {missing}; pip install 'csq[onnx]'\n")


def test_the_library_never_imports_onnx_unasked(monkeypatch: pytest.MonkeyPatch, digits_run: Path) -> None:
    honest = builtins.__import__

    def guarded(name: str, *rest, **more):
        assert name.partition(".")[0] not in ("onnx", "onnxruntime", "onnxscript", "openvino"), name
        return honest(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", guarded)
    io.read(digits_run / "model.safetensors")


def _tampered(path: Path, edit) -> None:
    proto = onnx.load(path)
    edit(proto)
    onnx.save(proto, path)


def _change_a_byte(proto) -> None:
    value = next(value for value in proto.graph.initializer if value.name == "conv2.weight_packed")
    content = onnx.numpy_helper.to_array(value).copy()
    content.reshape(-1)[7] += 1
    value.CopyFrom(onnx.numpy_helper.from_array(content, value.name))


def _change_a_scale(proto) -> None:
    value = next(value for value in proto.graph.initializer if value.name == "conv3.weight_scale")
    content = np.nextafter(onnx.numpy_helper.to_array(value), np.float32(9))
    value.CopyFrom(onnx.numpy_helper.from_array(content, value.name))


def _change_a_bias(proto) -> None:
    value = next(value for value in proto.graph.initializer if value.name.endswith("fc.bias"))
    value.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value) + np.float32(1), value.name))


def _change_a_norm(proto) -> None:
    names = [node.input[2] for node in proto.graph.node if node.op_type == "BatchNormalization"]
    value = next(value for value in proto.graph.initializer if value.name == names[1])  # its shift, behind conv2
    value.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value) + np.float32(1), value.name))


def _disconnect(proto) -> None:
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name == "fc.weight":
                node.input[index] = "fc.weight_integers"


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (_change_a_byte, "conv2.weight: integers differ"),
        (_change_a_scale, "conv3.weight: integers × scale is not the hard weight"),
        (_disconnect, "fc.weight: is computed but never used"),
        (_change_a_bias, "although every layer's weights are exact; outputs begin to differ at fc.weight"),
        (
            _change_a_norm,
            "outputs begin to differ at conv3.weight",
        ),  # behind whose BatchNorm nothing is compared before it
    ],
)
def test_any_difference_in_the_written_graph_is_found_and_named(
    tmp_path: Path, csq, monkeypatch: pytest.MonkeyPatch, edit, complaint: str
) -> None:
    path = _written(tmp_path, "digits_cnn")
    honest = Onnx.write

    def write(self, path: Path, parity) -> None:
        honest(self, path, parity)
        _tampered(path, edit)

    monkeypatch.setattr(Onnx, "write", write)
    code, _, error = csq("export", path, "-o", tmp_path / "a.onnx", "--onnx")
    assert code == 2
    assert complaint in error
    assert (tmp_path / "a.onnx.rejected").is_file()
    assert not (tmp_path / "a.onnx").exists()


def test_files_that_are_no_csq_onnx_are_refused_in_one_line(tmp_path: Path, csq) -> None:
    (tmp_path / "noise.onnx").write_bytes(b"noise" * 100)
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    for command in (("report",), ("evaluate", "--data", "digits")):
        for name in ("noise.onnx", "other.onnx", "missing.onnx"):
            code, _, error = csq(command[0], tmp_path / name, *command[1:])
            assert (code, error.count("\n")) == (2, 1), (command, name)


def test_logits_of_another_shape_or_nan_never_pass() -> None:
    probe = verify.Probe(torch.zeros(1), torch.randn(2, 3), "")
    for logits in (torch.zeros(2, 4), torch.full((2, 3), float("nan"))):
        with pytest.raises(ParityError):
            verify.check_logits(logits, probe, tolerance_in_std=5e-4, where="x")


def test_medians_are_taken_in_turns() -> None:
    order: list[str] = []
    slow, fast = timing.interleaved_medians(
        [lambda: (order.append("a"), time.sleep(0.002)), lambda: order.append("b")], repeats=3
    )
    assert slow > fast
    assert "".join(order) == "abababab"  # the first pair warms up
