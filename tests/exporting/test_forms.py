"""Every safetensors form holds the same model, is as small as promised, and refuses damage."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import quantized_models as models
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import csqcli
from csqcli.cli import app as cli
from csqcli.errors import UserError
from csqcli.file import codes, header, io, layout
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import Form
from csqcli.models import libraries as sources
from csqcli.models.networks import digits_cnn
from csqcli.quant.hard_layer import HardLayer

pytestmark = pytest.mark.usefixtures("remembered_traces")

FORMS = ("compact", "int8-packed", "bit-packed", "state-dict")
TRAPS = "quantized_models:Traps"


@pytest.fixture(scope="module")
def traps() -> QuantizedFile:
    return models.make_file(TRAPS)


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_back_the_same_integers_scales_and_tensors(
    traps: QuantizedFile, tmp_path: Path, form: Form
) -> None:
    path = tmp_path / "a.safetensors"
    io.write(path, traps, form=form)
    back = io.read(path)
    assert _same(back.state_dict(), traps.state_dict())
    assert all(torch.equal(a.integers, b.integers) for a, b in zip(back.layers, traps.layers, strict=True))
    assert [layer.scale.tolist() for layer in back.layers] == [layer.scale.tolist() for layer in traps.layers]
    assert back.manifest.payload_sha256 == traps.manifest.payload_sha256
    assert back.manifest.layers[-1].mask == traps.manifest.layers[-1].mask
    assert csqcli.load(path, trust_code=True).tied_too.weight.abs().sum() > 0


@given(st.data())
def test_any_layer_and_any_float_tensor_survives_every_form(data: st.DataObject) -> None:
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    top = data.draw(st.sampled_from([0, 1, 2, 7, 20, 127, 128, 255]))
    dim = data.draw(st.integers(0, len(shape) - 1))
    scale = torch.rand(data.draw(st.sampled_from([1, shape[dim]])), generator=rng) + 1e-3
    integers = torch.randint(-top, top + 1, shape, generator=rng, dtype=torch.int32)
    layer = HardLayer("x.weight", integers, scale, torch.ones(8, dtype=torch.bool), dim, ("y.weight",))
    others = {
        "floats": torch.randn(3, 4, generator=rng),
        "halves": torch.randn(5, generator=rng).half(),
        "brains": torch.randn(5, generator=rng).bfloat16(),
        "count": torch.tensor(7),
        "index": torch.arange(200).view(20, 10),
        "flags": torch.rand(9, generator=rng) > 0.5,
        "none": torch.empty(0, 3),
        "no_bytes": torch.empty(0, dtype=torch.int8),
    }
    record = io._layer_record(layer, *layout.encode_layers([layer]), macs=None)
    for form in FORMS:
        stored = layout.store([layer], others, form)
        encoding, size = stored.encodings[0]
        described = record.model_copy(update={"encoding": encoding, "packed_bytes": size})
        with tempfile.TemporaryDirectory() as folder:
            save_file(stored.tensors, Path(folder, "stored"))
            with safe_open(Path(folder, "stored"), "pt") as file:
                reader = layout.Reader(file, [described], stored.others)
                assert torch.equal(reader.layer(described)[0], integers)
                assert _same(reader.others(), others)


def test_int8_packed_file_is_read_by_the_ten_lines_of_the_documentation(traps: QuantizedFile, tmp_path: Path) -> None:
    io.write(tmp_path / "a.safetensors", traps, form="int8-packed")
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    namespace: dict = {}
    exec(code[1], namespace)
    state = namespace["read"](tmp_path / "a.safetensors")
    wanted = traps.state_dict()
    assert state.keys() == wanted.keys()
    assert all(np.array_equal(state[name], wanted[name].numpy()) for name in wanted)
    assert state["tied.weight"].dtype == np.float32


def test_integers_beyond_127_take_int16_and_all_others_int8(traps: QuantizedFile, tmp_path: Path) -> None:
    io.write(tmp_path / "a.safetensors", traps, form="int8-packed")
    tensors = load_file(tmp_path / "a.safetensors")
    for record in header.read_manifest(tmp_path / "a.safetensors").layers:
        wide = record.mask == "11111111"  # the only mask of the five that spans nine bits
        assert tensors[f"{record.name}_packed"].dtype == (torch.int16 if wide else torch.int8), record.name
        assert record.encoding == ("int16" if wide else "int8")
        assert tensors[f"{record.name}_shape"].tolist() == record.shape


def test_shifted_planes_reach_plus_minus_one_only() -> None:
    layers = {layer.name: layer for layer in models.harden(torch.nn.Sequential(torch.nn.Linear(9, 9)), ["10000000"])}
    assert set(layers["0.weight"].integers.unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("source", ["cifar_resnet20", "timm:efficientnet_b0"])
def test_bit_packed_file_is_within_three_percent_of_entropy_and_float_parameters(tmp_path: Path, source: str) -> None:
    file = models.make_file(source, ["11000000", "11100000", "11110000"])
    size = io.write(tmp_path / "a.safetensors", file, form="bit-packed")
    bits = 0.0
    for layer in file.layers:  # entropy from the histogram, in NumPy
        share = np.unique(layer.integers.numpy(), return_counts=True)[1] / layer.integers.numel()
        bits -= layer.integers.numel() * float((share * np.log2(share)).sum())
    floats = sum(value.numel() * value.element_size() for value in file.others.values())
    assert size <= 1.03 * (bits / 8 + floats)


def test_one_layer_is_read_without_touching_the_others(traps: QuantizedFile, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    io.write(path, traps, form="bit-packed")
    tensors = load_file(path)
    first = traps.layers[0]
    kept = len(codes.encode(first.integers.numpy()).data)
    tensors[header.CODES_TENSOR][kept:] = 255  # every other layer is noise now
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, path, metadata=metadata)
    assert torch.equal(io.read_layer(path, first.name).integers, first.integers)
    with pytest.raises(UserError, match="damaged"):
        io.read(path)
    with pytest.raises(UserError, match=r"did you mean `stem\.weight`"):
        io.read_layer(path, "stem.weights")


def test_state_dict_loads_strictly_into_the_plain_model(tmp_path: Path) -> None:
    file = models.make_file("timm:resnet10t")
    io.write(tmp_path / "a.safetensors", file, form="state-dict")
    model = sources.build(sources.parse("timm:resnet10t"), num_classes=10)
    model.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    assert _same(dict(model.state_dict()), file.state_dict())


def test_a_state_dict_that_was_trained_on_is_no_quantized_file_any_more(traps: QuantizedFile, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    io.write(path, traps, form="state-dict")
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    tensors["head.weight"] += 1e-4
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=r"layer head\.weight: the weights are no longer integers × scale"):
        io.read(path)


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (header.CODES_TENSOR, "payloads do not fill"),
        ("csq_float32", "float tensors"),
        (header.MANIFEST_TENSOR, "manifest is damaged"),
    ],
)
def test_truncated_bit_packed_files_are_one_clear_line(
    traps: QuantizedFile, tmp_path: Path, tensor: str, complaint: str
) -> None:
    path = tmp_path / "a.safetensors"
    io.write(path, traps, form="bit-packed")
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    tensors[tensor] = tensors[tensor][:-9].clone()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=complaint):
        io.read(path)


def test_a_manifest_bomb_is_stopped(traps: QuantizedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    io.write(path, traps, form="bit-packed")
    monkeypatch.setattr(header, "MANIFEST_LIMIT", 1000)  # the manifest itself is larger
    with pytest.raises(UserError, match="manifest is damaged"):
        header.read_manifest(path)


def test_every_form_exports_evaluates_and_reports_alike(digits_run: Path, tmp_path: Path, csq) -> None:
    model = digits_run / "model.safetensors"
    wanted = json.loads(csq("evaluate", model, "--data", "digits", "--json")[1])
    previous = model
    for form in FORMS[1:]:  # each made from the one before
        out = tmp_path / f"{form}.safetensors"
        code, text, error = csq("export", previous, "-o", out, f"--{form}", "--data", "digits")
        assert (code, error) == (0, "")
        assert "4 layers bit-exact" in text
        assert json.loads(csq("evaluate", out, "--data", "digits", "--json")[1]) == wanted
        report = json.loads(csq("report", out, "--json")[1])
        assert report["sizes"]["file_bytes"] == out.stat().st_size == report["parity"]["file_bytes"]
        assert report["parity"]["top1"] == wanted["top1"]
        assert report["parity"]["payload_sha256"] == header.read_manifest(model).payload_sha256
        assert report["parity"]["max_logit_error"] == 0.0
        assert report["compute"] == json.loads((digits_run / "report.json").read_text())["compute"]
        assert [layer["macs"] for layer in report["layers"]] == [9216, 73728, 55296, 480]
        assert "mean bits" in csq("report", out)[1]
        previous = out
    assert (tmp_path / "bit-packed.safetensors").stat().st_size < model.stat().st_size


def test_a_writer_that_changes_an_integer_is_caught_and_nothing_is_deleted(
    digits_run: Path, tmp_path: Path, csq, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"what was there before")
    honest = layout.plain_integers

    def lying(integers: torch.Tensor) -> tuple[torch.Tensor, str]:
        packed, encoding = honest(integers)
        if packed.shape[0] == 48:  # conv3
            packed[0, 0, 0, 0] += 1
        return packed, encoding

    monkeypatch.setattr(layout, "plain_integers", lying)
    monkeypatch.setattr(io, "payload_sha256", lambda layers: "alike")  # blind the file's own check
    code, _, error = csq("export", _resealed(digits_run, tmp_path), "-o", out, "--int8-packed", "--force")
    assert code == 2
    assert "conv3.weight: integers differ" in error
    assert out.read_bytes() == b"what was there before"
    assert (tmp_path / "a.safetensors.rejected").is_file()
    assert not list(tmp_path.glob(".candidate*"))


def _resealed(run: Path, folder: Path) -> Path:
    file = header.read_manifest(run / "model.safetensors")
    path = folder / "resealed.safetensors"
    with safe_open(run / "model.safetensors", "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    file.payload_sha256, file.sizes.file_bytes = "alike", None
    save_file(tensors, path, metadata={"csq": file.model_dump_json()})
    return path


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-o", "a.safetensors"], "0 forms chosen; pass exactly one of --int8-packed"),
        (["-o", "a.safetensors", "--bit-packed", "--onnx"], "2 forms chosen"),
        (["-o", "a.onnx", "--bit-packed"], "must end in .safetensors"),
        (["-o", "missing/a.safetensors", "--bit-packed"], "no such folder"),
        (["-o", "model.safetensors", "--bit-packed", "--force"], "is the file to export"),
        (["-o", "old.safetensors", "--bit-packed"], "exists already; choose another name or pass --force"),
        (["-o", "a.safetensors", "--bit-packed", "--target", "openvino"], "belongs to --onnx"),
        (["-o", "a.safetensors", "--bit-packed", "--data", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_wrong_command_lines_are_one_line_and_exit_2(
    digits_run: Path, tmp_path: Path, csq, monkeypatch: pytest.MonkeyPatch, arguments: list[str], complaint: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes((digits_run / "model.safetensors").read_bytes())
    (tmp_path / "old.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    code, out, error = csq("export", "model.safetensors", *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert complaint in error


@pytest.mark.parametrize("form", ["state-dict", "int8-packed"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_note_says_that_a_plain_model_does_not_round_activations(
    csq, tmp_path: Path, form: str, bits: int | None
) -> None:
    file = models.file_with_scales(digits_cnn().eval(), "csqcli.models.networks:digits_cnn", models.MASKS, bits=bits)
    source, exported = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    io.write(source, file, form="compact")
    code, out, _ = csq("export", source, f"--{form}", "-o", exported, "--trust-code", "-q")
    assert (code, "a plain PyTorch model with these weights does not round them" in " ".join(out.split())) == (
        0,
        bits is not None,
    )
    notes = csqcli.report(exported)["parity"]["notes"]
    assert [note[:60] for note in notes] == ["inputs of 4 layers are rounded by csqcli.load and csq evalua"] * (
        bits is not None
    )


def test_help_of_export_names_every_form(csq) -> None:
    assert cli.export.__doc__
    text = csq("export", "--help")[1]
    assert all(f"--{form}" in text for form in ("int8-packed", "bit-packed", "onnx", "state-dict"))


@pytest.mark.parametrize("form", FORMS[1:])
def test_finetune_goes_on_from_every_form(digits_run: Path, tmp_path: Path, csq, form: str) -> None:
    out = tmp_path / "a.safetensors"
    assert csq("export", digits_run / "model.safetensors", "-o", out, f"--{form}")[0] == 0
    code, _, error = csq("finetune", out, "--data", "digits", "--epochs", 1, "-o", tmp_path / "run", "--quiet")
    assert (code, error) == (0, "")
    tuned = header.read_manifest(tmp_path / "run" / "model.safetensors")
    assert (tuned.form, tuned.parity) == ("compact", None)  # the certificate was the other file's
