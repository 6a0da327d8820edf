"""Nothing outside is written through a link, and nothing but a regular file is read."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from csqcli.errors import UserError
from csqcli.system import files
from csqcli.system.lock import LOCK_FILE, locked, locked_file


def link(path: Path, target: Path, kind: str) -> None:
    (path.symlink_to if kind == "symbolic" else path.hardlink_to)(target)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_lock_file_that_is_a_link_is_refused_and_its_target_stays(tmp_path: Path, kind: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    link(folder / LOCK_FILE, victim, kind)
    with pytest.raises(UserError, match=r"\.lock: is a .*, which csq does not open; remove it"), locked(folder):
        pytest.fail("locked")
    assert victim.read_text() == "precious"


def test_a_lock_file_that_is_a_pipe_or_points_nowhere_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK_FILE)
    with pytest.raises(UserError, match="not a regular file"), locked(tmp_path):
        pytest.fail("locked")
    (tmp_path / LOCK_FILE).unlink()
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a symbolic link"), locked(tmp_path):
        pytest.fail("locked")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_name_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path, kind: str) -> None:
    victim, output = tmp_path / "victim", tmp_path / "report.json"
    victim.write_text("precious")
    link(output, victim, kind)
    files.write_text(output, "new")
    assert (victim.read_text(), output.read_text()) == ("precious", "new")
    assert not output.is_symlink()


@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "metrics.jsonl", "recipe.yaml", "resume.pt"])
def test_a_run_writes_through_no_link_in_its_folder(csq, tmp_path: Path, name: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    quick = ("--epochs", 1, "--set", "max_steps=1", "--quiet", "--force")
    code, _, err = csq("search", "--recipe", "digits", "--target-bits", 2, "-o", folder, *quick)
    assert code == 0, err
    assert victim.read_text() == "precious"


def test_the_lock_of_a_file_is_held_and_left_behind_by_nobody(tmp_path: Path) -> None:
    with locked_file(tmp_path / "a.onnx"):
        assert [path.name for path in tmp_path.iterdir()] == [".a.onnx.lock"]
    assert not list(tmp_path.iterdir())


def test_only_regular_files_below_the_limit_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"12345")
    assert files.read_regular(path, limit=5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        files.read_regular(path, limit=4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(path)
    for name in ("pipe", "link"):
        with pytest.raises(UserError, match="does not open"):
            files.read_regular(tmp_path / name, limit=5)


def test_the_hash_of_files_is_that_of_their_bytes_in_a_row_and_never_holds_a_whole_one(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(os.urandom(3 * 2**20 + 5))
    second.write_bytes(b"end")
    whole = first.read_bytes() + second.read_bytes()
    assert files.sha256(first, second) == hashlib.sha256(whole).hexdigest()
    assert files.sha256(first, size=2**20 + 3) == hashlib.sha256(whole[: 2**20 + 3]).hexdigest()
    tracemalloc.start()
    files.sha256(first)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 2**20
