"""README's commands run, and its Python works as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from csqcli.quant.catalog import CARDS
from csqcli.recipe.yaml_files import builtin_names

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def shell_commands() -> list[list[str]]:
    text = "\n".join(body for language, body in BLOCKS if language == "sh").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("csq ")]


def test_readme_commands_that_need_no_data_of_yours_run_in_order(csq, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for command in shell_commands():
        if "/imagenet" in command or "/images" in command:
            continue
        quick = ["--epochs", "2", "--quiet"] if command[1] in ("search", "finetune") else []
        code, out, err = csq(*command[1:], *quick)
        assert code == 0, f"{command}: {err}"
        assert out
        ran += 1
    assert ran >= 4


def test_every_option_in_readme_exists(csq) -> None:
    helps = {name: csq(name, "--help")[1] for name in {command[1] for command in shell_commands()}}
    for command in shell_commands():
        for word in command[2:]:
            if word.startswith("--"):
                assert word in helps[command[1]], f"{word} of {command}"


def python_blocks() -> list[str]:
    return [body for language, body in BLOCKS if language == "python"]


def test_readme_python_runs_and_writes_a_file_that_loads(tmp_path: Path, monkeypatch, csq) -> None:
    monkeypatch.chdir(tmp_path)
    loop = next(body for body in python_blocks() if "csqcli.CSQ(" in body)
    exec(compile(loop, "README.md", "exec"), {})
    report = csq("report", "model.safetensors")[1]
    assert "mean bits" in report


def test_readme_python_rounds_a_model_in_memory(tmp_path: Path, monkeypatch, csq) -> None:
    monkeypatch.chdir(tmp_path)
    rounds = next(body for body in python_blocks() if "csqcli.quantize(" in body)
    exec(compile(rounds, "README.md", "exec"), {})
    assert "test_resnet" in csq("report", "rounded.safetensors")[1]


def test_readme_python_runs_the_commands_as_functions(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    commands = next(body for body in python_blocks() if "csqcli.search(" in body).replace("epochs=5", "epochs=1")
    names: dict = {}
    exec(compile(commands, "README.md", "exec"), names)
    assert not names["model"].training
    assert names["report"]["budget"]["mean_bits"] <= 2
    assert "'samples': 500" in capsys.readouterr().out
    assert Path("runs/python/model-bit-packed.safetensors").is_file()


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda path: path.name
)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_readme_names_no_recipe_that_does_not_ship() -> None:
    for command in shell_commands():
        if "--recipe" in command:
            recipe = command[command.index("--recipe") + 1]
            assert recipe in builtin_names() or recipe.endswith(".yaml")


def test_the_row_of_method_names_every_method() -> None:
    [row] = [
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `--method` |")
    ]
    assert [name for name in CARDS if f"`{name}`" not in row] == []


def test_help_and_package_describe_csq_in_the_same_words(csq) -> None:
    # a regular expression: no TOML reader is in Python 3.10
    [line] = re.findall(
        r'^description = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert f"{line}." in " ".join(csq("--help")[1].split())
