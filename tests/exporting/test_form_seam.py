"""An export form from outside the package, names of files, and two exports at once."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_models import make_file
from torch import nn

from csqcli.errors import UserError
from csqcli.exporting import registry, verify
from csqcli.exporting.form import Form
from csqcli.exporting.run import export_file, output_path
from csqcli.exporting.verify import ParityError
from csqcli.file import io
from csqcli.file.manifest import ParityRecord
from csqcli.models.libraries import build
from csqcli.training.evaluate import Accuracy

NPZ = "tests.exporting.test_form_seam:Npz"


class Npz(Form):
    """A form that this package does not have: a NumPy archive of integers and scales."""

    name, suffix = "npz", ".npz"

    def write(self, path: Path, parity: ParityRecord | None) -> None:
        arrays = {name: value.numpy() for name, value in self.file.others.items()}
        for layer in self.file.layers:
            arrays |= {f"{layer.name}/q": layer.integers.numpy(), f"{layer.name}/s": layer.scale.numpy()}
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    def check(self, path: Path) -> None:
        with np.load(path) as arrays:
            for layer in self.file.layers:
                if not np.array_equal(arrays[f"{layer.name}/q"], layer.integers.numpy()):
                    raise ParityError("integers differ", where=layer.name)

    def open(self, path: Path) -> nn.Module:
        self.engine = f"numpy {np.__version__}"
        model = build(self.file.manifest.spec, num_classes=self.file.manifest.model.num_classes)
        with np.load(path) as arrays:
            state = {name: torch.from_numpy(arrays[name]) for name in arrays.files if "/" not in name}
            for layer in self.file.layers:
                integers, scale = (torch.from_numpy(arrays[f"{layer.name}/{part}"]) for part in "qs")
                state[layer.name] = integers.float() * scale.view(-1, *[1] * (integers.dim() - 1))
        model.load_state_dict(state)
        return model.eval()


class Lossy(Npz):
    """The same, with a number changed on the way."""

    def write(self, path: Path, parity: ParityRecord | None) -> None:
        integers = self.file.layers[0].integers
        integers[0, 0, 0, 0] += 1
        super().write(path, parity)
        integers[0, 0, 0, 0] -= 1


class Half(Form):
    name, suffix = "half", ".half"

    def write(self, path: Path, parity: ParityRecord | None) -> None: ...


@pytest.fixture
def model(tmp_path: Path) -> Path:
    io.write(tmp_path / "net.v2.safetensors", make_file("csq:digits_cnn"))
    return tmp_path / "net.v2.safetensors"


def test_a_form_from_outside_is_written_verified_and_reported(csq, model: Path) -> None:
    code, out, err = csq("export", model, "--form", NPZ, "--data", "digits", "--val-limit", 20)
    assert code == 0, err
    assert out.startswith("npz: ")
    assert f"numpy {np.__version__}" in out
    assert "of 20 images" in out
    assert model.with_name("net.v2-npz.npz").is_file()


def test_a_form_from_outside_that_changes_a_number_is_not_delivered(csq, model: Path) -> None:
    code, _, err = csq("export", model, "--form", NPZ.replace("Npz", "Lossy"))
    assert code == 2
    assert "conv1.weight: integers differ" in err
    assert not model.with_name("net.v2-npz.npz").exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (NPZ.replace("Npz", "Half"), "lacks check, open"),
        ("json:dumps", "is not an export form"),
        ("json:nothing", "`json` has no `nothing`"),
        ("no_such_module:Form", "cannot import `no_such_module`"),
        ("npz", "no form `npz`"),
    ],
)
def test_what_is_no_form_is_one_line(csq, model: Path, name: str, complaint: str) -> None:
    code, out, err = csq("export", model, "--form", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert complaint in err


def test_a_form_from_outside_takes_only_the_options_that_it_names(csq, model: Path) -> None:
    code, _, err = csq("export", model, "--form", NPZ, "--target", "openvino")
    assert code == 2
    assert "--target belongs to --onnx" in err


@pytest.mark.parametrize("name", registry.CARDS)
def test_the_card_of_each_form_says_what_its_class_says(name: str) -> None:
    form = registry.find(name)
    assert (form.name, form.takes) == (name, registry.CARDS[name].takes)


@pytest.mark.parametrize(
    ("file", "form", "expected"),
    [
        ("net.v2.safetensors", "int8-packed", "net.v2-int8-packed.safetensors"),
        ("net.v2.safetensors", "onnx", "net.v2-onnx.onnx"),
        ("model.safetensors", "state-dict", "model-state-dict.safetensors"),
        ("a.b", "bit-packed", "a-bit-packed.safetensors"),
    ],
)
def test_dots_in_a_name_stay(file: str, form: str, expected: str) -> None:
    assert output_path(Path("folder", file), form) == Path("folder", expected)


def test_an_export_with_no_output_named_writes_beside_its_source(csq, model: Path) -> None:
    code, out, err = csq("export", model, "--int8-packed")
    assert code == 0, err
    assert f"wrote {model.with_name('net.v2-int8-packed.safetensors')}" in out


def _hold(output: Path, ready, release) -> None:
    with verify.candidate(output) as path:
        path.write_bytes(b"the first export's")
        ready.set()
        release.wait(60)


def test_two_exports_to_one_name_do_not_break_each_other(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(output, ready, release))
    first.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=r"another run is writing here \(pid \d+ on .*\); wait for it"):
        export_file(model, output, form="bit-packed", force=True)
    release.set()
    first.join(60)
    assert first.exitcode == 0
    assert output.read_bytes() == b"the first export's"  # its candidate was not taken away
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.v2.safetensors", "out.safetensors"]
    with pytest.raises(UserError, match="exists already"):
        export_file(model, output, form="bit-packed")
    export_file(model, output, form="bit-packed", force=True)
    assert json.loads(io.read(output).manifest.model_dump_json())["form"] == "bit-packed"


@pytest.mark.parametrize("form", ["bit-packed", "state-dict"])
def test_a_full_disk_is_said_of_the_name_that_was_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    output = tmp_path / "out.safetensors"
    with pytest.raises(UserError) as refused:
        export_file(model, output, form=form)
    assert str(refused.value) == refused.value.line() == f"{output}: cannot be written (No space left on device)"
    assert not output.exists()


@pytest.mark.parametrize("name", [".out.safetensors.lock", "out.safetensors"])
def test_an_export_writes_through_no_link(model: Path, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    try:
        export_file(model, tmp_path / "out.safetensors", form="bit-packed", force=True)
    except UserError as error:
        assert "symbolic link" in error.line()  # noqa: PT017
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("samples", "missed", "refused"), [(60, 3, False), (60, 4, True), (5000, 25, False), (5000, 26, True)]
)
def test_top_1_may_differ_by_half_a_point_or_three_images(samples: int, missed: int, refused: bool) -> None:
    wanted = Accuracy(samples // 2, samples, samples)
    for sign in (1, -1):
        written = Accuracy(samples // 2 + sign * missed, samples, samples)
        with pytest.raises(ParityError, match=rf"on {samples:,} images \(tolerance ") if refused else nullcontext():
            verify.check_accuracy(written, wanted, where="a.onnx")
