"""Hostile files: five hundred mutated inputs per run of the suite (the script does 20,000), and what was found by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import csqcli
from csqcli.errors import UserError
from csqcli.file import codes, header, io, loading
from csqcli.file.io import QuantizedFile
from csqcli.models import checkpoints
from csqcli.models import libraries as sources
from csqcli.models import networks as models
from csqcli.recipe import resolve as recipe
from csqcli.recipe import yaml_files
from csqcli.system import limits as untrusted
from csqcli.system.allocation import AllocationLimit
from tests.fuzz import runner, tensors, text, values
from tests.fuzz.corpus import build_corpus
from tests.quantized_models import make_file

pytestmark = pytest.mark.usefixtures("remembered_traces")

SHARED = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_five_hundred_hostile_inputs_work_or_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    build_corpus(tmp_path / "corpus")
    counts = runner.run(500, seed=2, corpus=tmp_path / "corpus")
    failures = {outcome: count for outcome, count in counts.items() if outcome.startswith("FAILED")}
    assert not failures
    assert sum(counts.values()) == 500
    assert (
        sum(count for outcome, count in counts.items() if outcome.endswith("works")) > 25
    )  # not everything is refused


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "model.safetensors"
    io.write(path, make_file("csq:digits_cnn"))
    return path


def forged(source: Path, target: Path, edit: Any) -> Path:
    """``source`` with its manifest as ``edit`` leaves it."""
    header, body = tensors.split(source.read_bytes())
    manifest = json.loads(header["__metadata__"]["csq"])
    edit(manifest)
    header["__metadata__"]["csq"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return target


# ---- Hypothesis: small inputs, shrunk when they fail


@SHARED
@given(rng=st.randoms(use_true_random=False))
def test_a_manifest_is_valid_or_refused_whatever_its_fields_say(digits_file: Path, rng: random.Random) -> None:
    top, _ = tensors.split(digits_file.read_bytes())
    manifest = values.mutate_tree(json.loads(top["__metadata__"]["csq"]), rng)
    try:
        read = header.parse_manifest(json.dumps(manifest), where="file")
    except UserError:
        return
    assert sum(layer.weights for layer in read.layers) == read.budget.total_weights
    json.dumps(read.model_dump(mode="json"), allow_nan=False)


@SHARED
@given(
    data=st.binary(max_size=200) | st.builds(values.bad_huffman, st.just(b""), st.randoms(use_true_random=False)),
    encoding=st.sampled_from(
        ["codes2", "codes4", "codes8", "codes16", "codes2+huffman", "codes16+huffman", "codes3", "x"]
    ),
    shape=st.lists(st.integers(0, 50), max_size=3),
)
@example(data=values.bomb(2**24), encoding="codes8+huffman", shape=[10])
def test_any_bytes_decode_to_the_declared_shape_or_are_refused(data: bytes, encoding: str, shape: list[int]) -> None:
    try:
        integers = codes.decode(data, encoding, tuple(shape))
    except ValueError:
        return
    assert list(integers.shape) == shape


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


def assert_comes_back(raw: dict[str, Any]) -> None:
    """Whatever is taken as a recipe is the same recipe after it was written as YAML and read again; the rest is refused."""
    try:
        checked = recipe.validate(raw, where="recipe")
    except UserError:
        return
    again = recipe.validate(yaml_files.load_yaml(recipe.to_yaml(checked)), where="again")
    assert repr(again.to_dict()) == repr(checked.to_dict())  # in words, since NaN is not equal to itself


@SHARED
@given(YAML_VALUES)
def test_any_value_that_is_taken_as_a_section_of_a_recipe_comes_back_from_its_yaml(value: Any) -> None:
    assert_comes_back({"layers": value})


@SHARED
@given(YAML_VALUES)
@example(value={"a": [1, 2.5, None, "three", True]})
@example(value="0x10")
@example(value="1e3")
@example(value="2020-01-01")
@example(value=1e300)
def test_any_argument_of_a_model_that_is_taken_comes_back_from_the_recipes_yaml(value: Any) -> None:
    assert_comes_back({"model": {"arguments": {"x": value}}})


@SHARED
@given(YAML_VALUES)
def test_any_yaml_is_read_or_refused(value: Any) -> None:
    text = yaml.safe_dump(value)
    with contextlib.suppress(ValueError):  # what read() turns into a line
        assert repr(yaml_files.load_yaml(text)) == repr(yaml.safe_load(text))


# ---- code and paths out of files


def test_a_finetune_takes_neither_model_nor_data_from_the_file(
    csq, digits_file: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    named = {
        "source": "planted:model",
        "checkpoint": str(tmp_path / "planted.pth"),
        "arguments": {"checkpoint_path": "x"},
    }
    planted = {"model": named, "data": {"source": "cifar10:/etc", "batch_size": 64, "workers": 999}, "compile": True}
    path = forged(digits_file, tmp_path / "in.safetensors", lambda manifest: manifest.update(recipe=planted))
    code, _, err = csq("finetune", path, "-o", tmp_path / "out")
    assert (code, err) == (
        2,
        "csq: error: no data given; pass --data FOLDER, or another kind of data that `csq search --help` lists\n",
    )
    run = ("--data", "digits", "--epochs", 1, "--set", "max_steps=1", "--quiet")
    assert csq("finetune", path, "-o", tmp_path / "out", *run)[0] == 0
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (kept["model"]["source"], kept["model"]["checkpoint"], kept["data"]["source"]) == (None, None, "digits")
    assert (kept["data"]["workers"], kept["compile"], kept["data"]["batch_size"]) == (2, False, 64)
    assert "planted" not in sys.modules


@pytest.mark.parametrize("command", ["evaluate", "finetune", "export"])
def test_a_factory_named_by_a_file_is_imported_with_consent_only(
    csq, digits_file: Path, tmp_path: Path, monkeypatch, command: str
) -> None:
    (tmp_path / "planted2.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)

    def edit(manifest: dict[str, Any]) -> None:
        manifest["model"].update(library="factory", name="planted2:model", source="planted2:model")

    path = forged(digits_file, tmp_path / "in.safetensors", edit)
    more = ("--int8-packed",) if command == "export" else ("--data", "digits")
    more += ("-o", tmp_path / "out") if command == "finetune" else ()
    code, _, err = csq(command, path, *more)
    assert code == 2
    assert "the file asks to import `planted2:model`; pass --trust-code" in err
    assert "planted2" not in sys.modules


@pytest.mark.parametrize(
    ("library", "arguments", "complaint"),
    [
        ("timm", {"checkpoint_path": "/tmp/x.pth"}, "`checkpoint_path` would load weights"),  # timm unpickles it
        ("timm", {"pretrained_cfg_overlay": {"file": "/tmp/x"}}, "`pretrained_cfg_overlay` would load weights"),
        ("torchvision", {"weights": "DEFAULT"}, "`weights` would load weights"),
        ("torchvision", {"weights_backbone": "DEFAULT"}, "`weights_backbone` would load weights"),
        ("timm", {"img_size": 10**9}, "an integer beyond 65,536"),
    ],
)
def test_a_file_s_constructor_arguments_cannot_load_or_cost_anything(
    digits_file: Path, tmp_path: Path, library: str, arguments: dict[str, Any], complaint: str
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["model"].update(library=library, name="resnet18", source=f"{library}:resnet18", arguments=arguments)

    path = forged(digits_file, tmp_path / "in.safetensors", edit)
    with pytest.raises(UserError, match=complaint):
        csqcli.load(path)
    with pytest.raises(UserError, match=complaint):
        recipe.resolve("digits", {"model.arguments": arguments})


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vit_tiny_patch16_224", {"depth": 60_000}),
        ("vit_tiny_patch16_224", {"img_size": 60_000, "patch_size": 1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 60_000, "window_size": 60_000}),
        ("resnet18", {"num_classes": 10**6}),
    ],
)
def test_a_constructor_s_tensors_are_bounded_before_they_are_made(name: str, more: dict[str, Any]) -> None:
    spec = sources.ModelSpec("timm", name, {key: value for key, value in more.items() if key != "num_classes"})
    with AllocationLimit(2**22), pytest.raises(UserError, match="arguments that ask for tensors of"):
        sources.build(spec, num_classes=more.get("num_classes", 10))


def test_a_constructor_s_tensors_are_counted_too() -> None:
    """Sixty thousand blocks of one number each are few numbers."""
    small = {"depth": 60_000, "embed_dim": 1, "num_heads": 1, "mlp_ratio": 1.0, "img_size": 16}
    state = {"head.weight": torch.zeros(1000, 1)}
    spec = sources.ModelSpec("timm", "vit_tiny_patch16_224", small)
    with pytest.raises(UserError, match=r"arguments that ask for more than 1,028 tensors"):
        loading.architecture(spec, num_classes=10, state=state, trust_code=False, where="file")


def test_an_input_size_is_bounded_as_a_whole(digits_file: Path, tmp_path: Path) -> None:
    path = forged(digits_file, tmp_path / "in.safetensors", lambda m: m["data_config"].update(input_size=[4096] * 3))
    with pytest.raises(UserError, match="is more than 50,331,648 numbers"):
        csqcli.load(path)


def test_the_bound_changes_nothing_in_a_model_that_keeps_it() -> None:
    torch.manual_seed(3)
    plain = sources.build(sources.parse("timm:vit_tiny_patch16_224"), num_classes=10).state_dict()
    torch.manual_seed(3)
    with AllocationLimit(2 * sum(value.numel() for value in plain.values())):
        bounded = sources.build(sources.parse("timm:vit_tiny_patch16_224"), num_classes=10).state_dict()
    assert all(torch.equal(value, bounded[name]) for name, value in plain.items())


# ---- bombs and lies


def test_shapes_far_over_the_file_s_size_are_refused_before_they_are_unpacked(
    digits_file: Path, tmp_path: Path
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        layer = manifest["layers"][0]
        layer.update(shape=[2**15, 2**15], weights=2**30, encoding="codes2+huffman")
        manifest["budget"]["total_weights"] = sum(layer["weights"] for layer in manifest["layers"])
        planes = sum(layer["weights"] * layer["bits"] for layer in manifest["layers"])
        manifest["budget"]["mean_bits"] = planes / manifest["budget"]["total_weights"]

    path = forged(digits_file, tmp_path / "in.safetensors", edit)
    with pytest.raises(UserError, match=r"manifest is damaged \([\d,]+ bytes declare 4,29\d,\d+,\d+ of weights\)"):
        io.read(path)


def test_a_zip_that_unpacks_or_overlaps_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(models.digits_cnn().state_dict(), tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for entry in good.infolist():
            bad.writestr(entry.filename, good.read(entry) if entry.file_size < 10_000 else bytes(2**20))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoints.read_checkpoint(str(tmp_path / "b.pth"))
    checkpoints.read_checkpoint(str(tmp_path / "good.pth"))


def test_a_tensor_without_its_bytes_is_no_weight(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1).expand(10**9)}, tmp_path / "thin.pth")
    with pytest.raises(UserError, match=r"tensor `fc.weight` is shape \[1000000000\] on 4 bytes"):
        checkpoints.read_checkpoint(str(tmp_path / "thin.pth"))
    torch.save({"fc.weight": torch.zeros(3).to_sparse()}, tmp_path / "sparse.pth")
    with pytest.raises(UserError, match="holds a sparse tensor"):
        checkpoints.read_checkpoint(str(tmp_path / "sparse.pth"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        torch.save({"fc.weight": torch.nested.nested_tensor([torch.zeros(3)])}, tmp_path / "nested.pth")
    with pytest.raises(UserError, match=r"holds a nested tensor|pickled code"):  # newer releases do not load them
        checkpoints.read_checkpoint(str(tmp_path / "nested.pth"))


@pytest.mark.parametrize("text", text.YAML_SNIPPETS[:2])
def test_yaml_aliases_that_unfold_without_end_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(UserError, match=r"more than 10,000 values|nested deeper than 32"):
        recipe.resolve(str(tmp_path / "bomb.yaml"), {})


def test_a_tree_is_measured_as_a_tree() -> None:
    leaf: list[Any] = ["x"] * 10
    for _ in range(20):
        leaf = [leaf] * 10
    with pytest.raises(ValueError, match="more than 1,000 values"):
        untrusted.check_tree(leaf, nodes=1000)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": NaN}', "a number that is NaN"),
        ('{"a": 1e999}', "a number that is inf"),
        ('{"a": 1, "a": 2}', "a key occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not a JSON object"),
        ('{"a": 18446744073709551616}', "an integer beyond 64 bits"),
        ('{"a": "\\u001b[2J"}', "control characters"),
        ('{"a": "\\ud800"}', "control characters"),
    ],
)
def test_json_that_readers_would_disagree_on_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        untrusted.read_json(text, nodes=1000)


def _reach_beyond_the_mask(file: QuantizedFile) -> None:
    integers = file.layers[0].integers.clone()
    integers.view(-1)[0] = 300
    file.layers[0] = dataclasses.replace(file.layers[0], integers=integers)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (_reach_beyond_the_mask, "cannot form"),
        (lambda file: file.layers[0].scale.fill_(3e38), r"integers × scale is not finite|cannot be written"),
        (lambda file: file.others["bn1.bias"].__setitem__(0, float("nan")), "bn1.bias holds NaN"),
        (lambda file: file.others["bn1.running_var"].__setitem__(0, -1.0), "bn1.running_var holds a variance below 0"),
        (
            lambda file: file.others.update({"conv1.weight": torch.zeros(16, 1, 3, 3)}),
            "conv1.weight .* does not belong",
        ),
    ],
)
def test_a_file_whose_hash_is_right_still_has_to_be_what_it_says(tmp_path: Path, edit: Any, complaint: str) -> None:
    file = make_file("csq:digits_cnn")
    edit(file)
    record = file.manifest.layers[0]
    record.scale = file.layers[0].scale.tolist()
    file.manifest.payload_sha256 = io.payload_sha256(file.layers)
    io.write(tmp_path / "in.safetensors", file)
    with pytest.raises(UserError, match=complaint):
        io.read(tmp_path / "in.safetensors")


def test_names_out_of_files_cannot_steer_the_terminal(csq, digits_file: Path, tmp_path: Path) -> None:
    path = forged(digits_file, tmp_path / "a.safetensors", lambda m: m["model"].update(source="[red]conv1[/nothing]"))
    code, out, _ = csq("report", path)
    assert (code, "[red]conv1[/nothing]" in out) == (0, True)
    path = forged(digits_file, tmp_path / "d.safetensors", lambda m: m["layers"][0].update(name="[red]conv1[/nothing]"))
    code, _, err = csq("report", path)  # a layer of that name has no integers in the file
    assert (code, "[red]conv1[/nothing]" in err) == (2, True)
    path = forged(digits_file, tmp_path / "b.safetensors", lambda m: m["layers"][0].update(name="\x1b[2J"))
    code, _, err = csq("report", path)
    assert (code, "\x1b" in err) == (2, False)
    save_file({"\x1b[2J": torch.tensor([float("nan")])}, tmp_path / "c.safetensors")
    read = checkpoints.read_checkpoint(str(tmp_path / "c.safetensors"))
    with pytest.raises(UserError) as caught:
        checkpoints.choose_weights(read, read.groups[""])
    assert "\\x1b[2J" in caught.value.line()


def test_an_onnx_file_that_was_changed_never_reaches_the_engine(csq, digits_file: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    assert csq("export", digits_file, "--onnx", "-o", tmp_path / "a.onnx")[0] == 0
    proto = onnx.load(tmp_path / "a.onnx")
    packed = next(value for value in proto.graph.initializer if value.name == "conv2.weight_packed")
    packed.raw_data = bytes([packed.raw_data[0] ^ 1]) + packed.raw_data[1:]
    onnx.save(proto, tmp_path / "b.onnx")
    code, _, err = csq("evaluate", tmp_path / "b.onnx", "--data", "digits", "--val-limit", 8)
    assert (code, "the graph does not match its sha-256" in err) == (2, True)
    assert csq("evaluate", tmp_path / "a.onnx", "--data", "digits", "--val-limit", 8)[0] == 0


def test_an_onnx_file_with_tensors_in_other_files_is_refused_even_with_a_right_hash(
    csq, digits_file: Path, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from csqcli.exporting import runtime

    assert csq("export", digits_file, "--onnx", "-o", tmp_path / "a.onnx")[0] == 0
    proto = onnx.load(tmp_path / "a.onnx")
    packed = next(value for value in proto.graph.initializer if value.name == "conv2.weight_packed")
    packed.data_location = onnx.TensorProto.EXTERNAL
    packed.external_data.add(key="location", value="secret")
    packed.ClearField("raw_data")
    manifest = json.loads(proto.metadata_props[0].value)
    manifest["parity"]["graph_sha256"] = runtime.graph_sha256(proto)
    proto.metadata_props[0].value = json.dumps(manifest)
    (tmp_path / "b.onnx").write_bytes(proto.SerializeToString())
    code, _, err = csq("evaluate", tmp_path / "b.onnx", "--data", "digits", "--val-limit", 8)
    assert (code, "keeps tensors in other files, which csq never follows" in err) == (2, True)


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("suffix", ["pth", "pt", "tar", "th"])
def test_pickled_code_is_refused_with_the_way_to_convert(csq, tmp_path: Path, monkeypatch, suffix: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": models.digits_cnn().state_dict(), "hook": _Evil()}, f"new.{suffix}")
    Path(f"old.{suffix}").write_bytes(pickle.dumps({"state_dict": _Evil()}, protocol=2))
    for name in ("new", "old"):
        code, _, err = csq(
            "search", "--recipe", "digits", "--checkpoint", f"{name}.{suffix}", "--target-bits", 2, "-o", "out"
        )
        assert code == 2
        assert "executed" not in os.listdir()
        if name == "new":
            assert "holds pickled code, which csq never runs; convert it where you trust it" in err
