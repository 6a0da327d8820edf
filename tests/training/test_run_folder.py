"""A run's folder is its own: nothing that csq did not write is replaced, and a start that fails leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

SEARCH = ("search", "--recipe", "digits", "--target-bits", 2, "--epochs", 1, "--set", "max_steps=1", "--quiet")


def test_a_search_without_output_gets_a_folder_of_its_own(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("mine: true")
    code, _, err = csq(*SEARCH)
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "runs"]
    assert Path("recipe.yaml").read_text() == "mine: true"
    assert Path("runs/digits_cnn-2bit/model.safetensors").is_file()
    assert "holds a finished run" in csq(*SEARCH)[2]


@pytest.mark.parametrize("name", ["recipe.yaml", "report.json", "metrics.jsonl", "model.safetensors"])
@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["start", "resume"])
def test_a_file_that_no_run_wrote_is_replaced_by_force_only(
    csq, tmp_path: Path, name: str, resume: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text("mine")
    code, _, err = csq(*SEARCH, "-o", tmp_path, *resume)
    assert (code, f"holds a {name} of no known run" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    assert csq(*SEARCH, "-o", tmp_path, "--force")[0] == 0
    assert (tmp_path / name).read_bytes() != b"mine"


@pytest.mark.parametrize("wrong", [("--checkpoint", "nothing.pth"), ("--set", "layers.exclude=[nothing]")])
def test_a_start_that_fails_leaves_nothing_behind(csq, tmp_path: Path, wrong: tuple[str, str]) -> None:
    (tmp_path / "there").mkdir()
    assert csq(*SEARCH, "-o", tmp_path / "there", *wrong)[0] == 2
    assert csq(*SEARCH, "-o", tmp_path / "runs" / "new", *wrong)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []
