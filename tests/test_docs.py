"""What the documentation tells people to type exists; the quickstart runs; the site's generated pages hold every option and key."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from csqcli.cli.app import app
from csqcli.recipe.schema import Recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def shell_commands(path: Path) -> list[list[str]]:
    text = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.search(r"(^|-m )csq(cli)? ", line)]
    return [shlex.split(re.sub(r"^.*?-m csqcli ", "csq ", line), comments=True) for line in lines]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_parses(path: Path) -> None:
    root: Any = typer.main.get_command(app)
    for words in shell_commands(path):
        name, *rest = words[1:]
        if name.startswith("-") or name == "recipes":
            continue
        root.commands[name].make_context(
            name, rest
        )  # UsageError for an option that is gone, or a value of another kind


def test_extras_are_named_in_one_form_as_pip_takes_it() -> None:
    """Where a page speaks of the folder of csq's source `'.[onnx]'`, elsewhere `'csq[onnx]'`, which finds csq however it came."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", project.partition("\n\n")[0], flags=re.MULTILINE))
    sources = sorted((ROOT / "csqcli").rglob("*.py"))
    named = []
    for path in (*DOCUMENTS, ROOT / "CHANGELOG.md", *sources):
        text = path.read_text(encoding="utf-8")
        form = "." if "pip install .\n" in text else "csq"
        for found in re.findall(r"pip\s+install\s+(\S*?\[\w+\]\S?)", text):
            extra = found.partition("[")[2].partition("]")[0]
            assert found == f"'{form}[{extra}]'", path
            assert extra in extras, path
            named.append(extra)
        assert path.name == "errors.py" or "pip install 'csq[{" not in text, f"{path}: csqcli.errors.install says it"
    assert len(named) >= 10


def test_the_quickstart_runs(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("onnxscript")
    commands = [words for words in shell_commands(ROOT / "docs" / "quickstart.md") if words[1] != "doctor"]
    for words in commands:
        quick = ["--epochs", "1", "--quiet"] if words[1] == "search" else []
        code, out, err = csq(*words[1:], *quick)
        assert code == 0, f"{words}: {err}"
        assert out
    assert len(commands) >= 7


def site() -> Any:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_pages_hold_every_command_and_key() -> None:
    pages = site()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = pages._cli()
    for name, command in commands.items():
        assert f"## csq {name}\n" in text
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert f"`{option}`" in text, option
    text = pages._recipe()
    for key in Recipe.leaves():
        assert f"| `{key.rpartition('.')[2]}` |" in text, key
