"""Files of earlier revisions do all that new ones do.

``fixtures/digits_schema1.safetensors`` was written before the manifest had a module of its own, by
``csq search --recipe digits --target-bits 2 --epochs 2 --set act_bits=8 --seed 7``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

import csqcli
from csqcli.file import io
from csqcli.file.manifest import METADATA_KEY

OLD = Path(__file__).with_name("fixtures") / "digits_schema1.safetensors"


def test_an_earlier_file_is_read_and_written_again_with_all_that_it_says(tmp_path: Path) -> None:
    """Every tensor bit for bit; every statement of its manifest, to which later versions only add."""
    file = io.read(OLD)
    file.manifest.sizes.file_bytes = None
    again = tmp_path / "again.safetensors"
    io.write(again, file)
    with safe_open(OLD, "np") as before, safe_open(again, "np") as after:
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():  # not a mapping
            ours, theirs = before.get_tensor(name), after.get_tensor(name)
            assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())
        said, says = (json.loads(opened.metadata()[METADATA_KEY]) for opened in (before, after))

    def kept(old: object, new: object) -> bool:
        if isinstance(old, dict):
            return isinstance(new, dict) and all(key in new and kept(value, new[key]) for key, value in old.items())
        if isinstance(old, list):
            return isinstance(new, list) and len(old) == len(new) and all(map(kept, old, new))
        return old == new

    assert kept(said, says)


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
