"""Files of earlier revisions do all that new ones do.

``fixtures/digits_schema1.safetensors`` was written before the manifest had a module of its own, by
``csq search --recipe digits --target-bits 2 --epochs 2 --set act_bits=8 --seed 7``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import csqcli
from csqcli.file import io

OLD = Path(__file__).with_name("fixtures") / "digits_schema1.safetensors"


def test_an_earlier_file_is_read_and_written_again_byte_for_byte(tmp_path: Path) -> None:
    file = io.read(OLD)
    file.manifest.sizes.file_bytes = None
    io.write(tmp_path / "again.safetensors", file)
    assert (tmp_path / "again.safetensors").read_bytes() == OLD.read_bytes()


def test_an_earlier_file_is_reported_evaluated_and_exported(csq, tmp_path: Path) -> None:
    code, out, err = csq("report", OLD, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["payload_sha256"] == "49424d0402d23abc0b391603adb09bd52adf237d665fe648dd260148a70c2230"
    code, out, err = csq("evaluate", OLD, "--data", "digits", "--json")
    assert code == 0, err
    assert json.loads(out)["top1"] == report["accuracy"]["hard_top1"] == 97.6
    code, _, err = csq("export", OLD, "--bit-packed", "-o", tmp_path / "small.safetensors")
    assert code == 0, err
    small, old = csqcli.load(tmp_path / "small.safetensors"), csqcli.load(OLD)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(small(images), old(images))


def test_an_earlier_file_is_finetuned(csq, tmp_path: Path) -> None:
    options = ("--data", "digits", "--epochs", 1, "--set", "max_steps=2", "--quiet")
    code, _, err = csq("finetune", OLD, *options, "-o", tmp_path / "tuned")
    assert code == 0, err
    assert json.loads((tmp_path / "tuned" / "report.json").read_text())["accuracy"]["hard_top1"] >= 97.6
