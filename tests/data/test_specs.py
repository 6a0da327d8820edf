"""The registry of data sources: one function adds one, from inside the package or outside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from csqcli.data import registry, specs
from csqcli.data.splits import DataSet, Images
from csqcli.errors import UserError


def stripes(text: str, *, train: bool) -> DataSet:
    """Horizontal and vertical stripes of 8×8 grey pixels; ``text`` is the number of images of each."""
    count = int(text or 4)
    rows = (torch.arange(8) % 2 * 255).to(torch.uint8)
    pixels = torch.stack([rows[:, None].expand(8, 8), rows[None].expand(8, 8)]).repeat_interleave(count, 0)[:, None]
    images = Images(torch.arange(2).repeat_interleave(count), pixels=pixels.contiguous())
    return DataSet(f"stripes:{count}", ["across", "down"], images, images if train else None)


def wrong(text: str, *, train: bool) -> list[int]:
    return [1]


def test_a_function_from_outside_the_package_is_a_data_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "somebody", sys.modules[__name__])
    opened = specs.open_data("somebody:stripes:6", val_limit=8)
    assert (len(opened.train), len(opened.val), opened.classes) == (12, 8, ["across", "down"])
    assert len(specs.open_data("somebody:stripes", train=False).val) == 8
    with pytest.raises(
        UserError, match=r"somebody:wrong: the data source returned list, not a csqcli.data.splits.DataSet"
    ):
        specs.open_data("somebody:wrong")
    with pytest.raises(UserError, match="`somebody` has no `nothing`"):
        specs.open_data("somebody:nothing")
    with pytest.raises(UserError, match=r"cannot import `no.such.module`"):
        specs.open_data("no.such.module:stripes")


def test_a_search_runs_on_data_from_outside_the_package(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "somebody", sys.modules[__name__])
    code, _, err = csq(
        *("search", "digits_cnn", "--no-pretrained", "--data", "somebody:stripes:40", "--target-bits", 2),
        *("--epochs", 1, "--quiet", "-o", tmp_path / "run"),
    )
    assert (code, err) == (0, "")
    code, out, _ = csq("evaluate", tmp_path / "run" / "model.safetensors", "--data", "somebody:stripes")
    assert (code, "8 images" in out) == (0, True), out


def test_a_registered_source_shows_in_the_help_and_in_hints_by_itself(csq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SOURCES, "stripes", specs.known_sources()[0])  # taken out again when the test ends
    del registry.SOURCES["stripes"]
    registry.data_source("stripes:COUNT", "stripes across and down")(stripes)
    assert "stripes:COUNT (stripes across and down)" in specs.help_text()
    assert len(specs.open_data("stripes:3").val) == 6
    with pytest.raises(UserError, match="did you mean `stripes`"):
        specs.open_data("stripe:3")
    with pytest.raises(UserError, match=r"`stripes` takes a text after its name; write stripes:COUNT"):
        specs.open_data("stripes:")
    with pytest.raises(ValueError, match="there is a data source `stripes` already"):
        registry.data_source("stripes", "again")(stripes)


def test_every_source_of_the_package_stands_in_csq_search_help(csq) -> None:
    code, out, _ = csq("search", "--help")
    text = " ".join(out.split())
    assert code == 0
    for source in specs.known_sources():
        assert source.name in text
    assert {source.name for source in specs.known_sources()} >= {"folder", "cifar10", "cifar100", "digits"}


def test_a_bare_path_is_a_folder_even_where_a_source_has_its_name(image_folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(image_folder.parent)
    image_folder.rename("cifar10")
    assert specs.open_data("cifar10").classes == ["bright", "dark"]
    assert specs.open_data("folder:cifar10").classes == ["bright", "dark"]
