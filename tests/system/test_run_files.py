"""The model of a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from csqcli.errors import UserError
from csqcli.system.run_files import model_of


def test_a_folder_stands_for_its_model_and_a_file_for_itself(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.touch()
    (tmp_path / "resume.pt").touch()  # of a run with --force, whose older model is still the one that there is
    assert model_of(tmp_path) == model_of(str(tmp_path)) == model
    assert model_of(model) == model
    assert model_of(tmp_path / "nowhere.safetensors") == tmp_path / "nowhere.safetensors"  # who opens it says so


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        ([], "RUN: holds no model.safetensors; give a run's folder, or a file"),
        (["b/model.safetensors", "a/model.safetensors"], "RUN: holds no model.safetensors; name a run in it, as RUN/a"),
        (
            ["a/model.safetensors", "table4.md", "pareto.html"],
            "RUN: holds no model.safetensors; name a run in it, as RUN/a; about all of them see RUN/pareto.html and RUN/table4.md",
        ),
        ([".lock"], "RUN: holds an unfinished run; to go on, repeat the command that began it with --resume"),
        (
            ["resume.pt", "recipe.yaml"],
            "RUN: holds an unfinished run; to go on, repeat the command that began it with --resume; of a search "
            "that is `csq search --recipe RUN/recipe.yaml --output RUN --resume`",
        ),
    ],
)
def test_a_folder_without_a_model_is_said_in_one_line(tmp_path: Path, holds: list[str], said: str) -> None:
    for name in holds:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        model_of(tmp_path)
    assert error.value.line() == said.replace("RUN", str(tmp_path))
