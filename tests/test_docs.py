"""What the documentation tells people to type exists; the quickstart runs; the site's generated pages hold every option and key."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import csqcli
from csqcli.cli.app import app
from csqcli.file import io
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


def test_every_folder_of_the_package_is_built_into_the_wheel() -> None:
    """setuptools cannot find them by itself: recipes lie beside the package, where people see them, and are built into it."""
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.setuptools]")[2]
    listed = re.findall(r'^    "([\w.]+)",$', section.partition("\n\n")[0], flags=re.MULTILINE)
    held = {
        path.parent.relative_to(ROOT) for path in (ROOT / "csqcli").rglob("*") if path.suffix in (".py", ".safetensors")
    }
    assert sorted(listed) == sorted([".".join(folder.parts) for folder in held] + ["csqcli.recipes"])


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


def section(page: str, heading: str) -> str:
    """What stands under a heading of a page in docs/, up to the next heading of its level or above."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    level, rest = heading.count("#"), text.split(f"\n{heading}\n")[1]
    return re.split(rf"^#{{1,{level}}} ", rest, flags=re.MULTILINE)[0]


def code(text: str, language: str) -> str:
    """The first block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    return found[1]


def written(heading: str, language: str, file: str) -> str:
    """A section of methods.md, whose block of a language is now a file here."""
    text = section("methods.md", heading)
    Path(file).write_text(code(text, language), encoding="utf-8")
    return text


def run_of(csq, command: str) -> Path:
    """The folder of a run by a command as it stands on a page, cut to two epochs."""
    code_, _, err = csq(*shlex.split(command)[1:], "--epochs", 2, "--quiet")
    assert code_ == 0, err
    return Path(command.split("--output ")[1].strip())


def planes_of(file: Path) -> dict[str, int]:
    return {layer["name"]: layer["bits"] for layer in csqcli.report(file)["layers"]}


def test_the_method_of_your_own_runs_as_written_and_its_levels_are_in_the_file(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = written("## A method of your own", "python", "mymethod.py")
    folder = run_of(csq, code(text, "sh"))
    report = csqcli.report(folder)
    assert report["recipe"]["powers"] == {"reach": 2.5}
    assert report["accuracy"]["hard_top1"] > 90
    layers = io.read(folder / "model.safetensors").layers
    assert len(layers) == 4
    for layer in layers:  # three planes hold integers up to 7: of those the powers of two, each with both signs
        assert set(layer.integers.unique().tolist()) == {-4, -2, -1, 0, 1, 2, 4}
        assert layer.scale.shape == (1,)


def test_the_allocator_and_the_cost_of_your_own_run_as_written(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = written("### An allocator or a cost of your own", "python", "myplanes.py")
    report = csqcli.report(run_of(csq, code(text, "sh")))
    rows = {"conv1.weight": (16, 9), "conv2.weight": (32, 144), "conv3.weight": (48, 288), "fc.weight": (10, 48)}

    def spent(planes: dict[str, float]) -> float:  # rows are padded to whole bytes
        return sum(count * math.ceil(planes[name] * weights / 8) for name, (count, weights) in rows.items())

    allowed = (spent(dict.fromkeys(rows, 2)) + spent(dict.fromkeys(rows, 3))) / 2
    assert 0.9 * allowed < spent({layer["name"]: layer["bits"] for layer in report["layers"]}) <= allowed


def test_the_file_of_planes_is_trained_as_the_page_says(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = written("### A file of planes", "yaml", "planes.yaml")
    command = re.search(r"^    (csq search .*)$", text, flags=re.MULTILINE)
    assert command is not None
    folder = run_of(csq, f"{command[1]} --output runs/planes")
    assert planes_of(folder) == {"conv1.weight": 5, "conv2.weight": 3, "conv3.weight": 3, "fc.weight": 2}


def test_of_the_lines_that_match_a_weight_the_last_one_counts(csq, tmp_path: Path) -> None:
    """A general line that comes last takes all, the weight's own name included."""
    file, run = tmp_path / "planes.yaml", tmp_path / "run"
    file.write_text('planes: {conv1.weight: 5, "conv*": 3, "*": 2}')
    quick = ("--method", "ste", "--epochs", 1, "--quiet", "--set", "max_steps=1", "--output", run)
    code_, _, err = csq("search", "--recipe", "digits", "--planes", file, "--target-bits", 2, *quick)
    assert code_ == 0, err
    assert set(planes_of(run).values()) == {2}


def test_first_and_last_layer_get_the_planes_that_the_questions_promise(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (words,) = (
        words for words in shell_commands(ROOT / "docs" / "faq.md") if "layers.min_bits={conv1: 8, fc: 8}" in words
    )
    words[words.index("/images")] = "digits"
    words[words.index("MODEL")] = "csq:digits_cnn"
    weights = ("--recipe", "digits", "--epochs", 1, "--quiet", "--set", "max_steps=5", "--output", "run")
    code_, _, err = csq(*words[1:], *weights)
    assert code_ == 0, err
    planes = planes_of(Path("run"))
    assert (planes["conv1.weight"], planes["fc.weight"]) == (8, 8)
    bits = {row["module"]: row["bits"] for row in csqcli.report("run")["activations"]}
    assert bits == {"conv1": 8, "conv2": 4, "conv3": 4, "fc": 4}  # the network's own input has 8


def test_python_on_its_page_runs_in_order_and_has_every_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "api.md"
    text = "\n".join(blocks(page, "python"))
    for name in csqcli.__all__:
        assert f"csqcli.{name}" in text, name
    names: dict[str, Any] = {}
    exec(compile(re.sub(r"epochs=[25]\b", "epochs=1", text), page.name, "exec"), names)
    assert names["report"]["budget"]["mean_bits"] <= 2
    assert "runs/nothing: no such file" in capsys.readouterr().out
    assert planes_of(Path("runs/api-planes")) == {
        "conv1.weight": 5, "conv2.weight": 2, "conv3.weight": 2, "fc.weight": 2
    }  # fmt: skip
    assert list(planes_of(Path("parts.safetensors")).values()) == [5, 3, 2, 4]
    assert "fc.weight" not in planes_of(Path("loop.safetensors"))


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
