"""Models and settings that cannot be trained end in one line before the training; a stranger's mistake shows its own place."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import strangers
import torch
from rich.console import Console

import csqcli
from csqcli.errors import UserError
from csqcli.file import io as file_io
from csqcli.quant.layers import find_layers
from csqcli.system.progress import Display
from csqcli.training import loop
from csqcli.training.evaluate import BrokenScores

SHORT = {"epochs": 1, "max_steps": 2, "threads": 1, "data.train_limit": 200, "data.val_limit": 40}
HERE = "strangers.py, line "
Csq = Callable[..., tuple[int, str, str]]


def searched(csq: Csq, output: Path, model: str, *more: str) -> tuple[int, str]:
    settings = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    command = ("search", model, "--no-pretrained", "--data", "digits", "--target-bits", 2, "-o", output, "--quiet")
    code, _, err = csq(*command, *settings, *more)
    return code, err


@pytest.mark.parametrize(
    ("factory", "line"),
    [
        ("frozen", "strangers:frozen: every parameter is frozen (requires_grad is False)"),
        ("expanded", "conv.weight: is expanded: its elements share memory; make it a clone of itself"),
        ("lazy", "strangers:lazy: the factory returned lazy modules, whose shapes are open (fc.weight)"),
        ("two_channels", "the model takes images of 2 channels"),
        ("twelve_pixels", "images of 12 pixels only"),
    ],
)
def test_a_model_that_cannot_be_trained_is_one_line_before_the_training(
    csq: Csq, tmp_path: Path, factory: str, line: str
) -> None:
    code, err = searched(csq, tmp_path / "out", f"strangers:{factory}")
    assert (code, err.count("\n"), line in err) == (2, 1, True), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("factory", "kind", "words"),
    [
        ("slip", "IndexError", "list index out of range"),
        ("slips_in_training", "KeyError", "no such part"),
        ("reads_a_table", "FileNotFoundError", "table.bin"),
    ],
)
def test_a_stranger_s_mistake_shows_its_own_message_file_and_line(
    csq: Csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, kind: str, words: str
) -> None:
    code, err = searched(csq, tmp_path / "out", f"strangers:{factory}")
    assert (code, err.count("\n")) == (2, 1), err
    assert all(part in err for part in (HERE, f"{kind}: ", words)), err
    monkeypatch.setenv("CSQ_DEBUG", "1")
    _, err = searched(csq, tmp_path / "out", f"strangers:{factory}")
    assert "Traceback (most recent call last)" in err
    assert "strangers.py" in err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1/0", "stranger.py, line 1 in <module>: ZeroDivisionError: division by zero"),
        ("def f(:\n", "stranger.py, line 1: SyntaxError: "),
        ("import sys; sys.exit(3)", "importing `stranger` ends the program"),
        ("import nowhere", "cannot import `stranger` (No module named 'nowhere')"),
        ("sys.path", "NameError: name 'sys' is not defined"),
        ("import os; os.nothing", "stranger.py, line 1 in <module>: AttributeError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    csq: Csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: str
) -> None:
    (tmp_path / "stranger.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, err = searched(csq, tmp_path / "out", "stranger:net")
    assert (code, err.count("\n"), line in err) == (2, 1, True), err


def test_csq_s_own_mistakes_keep_their_traceback(csq: Csq, monkeypatch: pytest.MonkeyPatch) -> None:
    from csqcli.reporting import recompute

    monkeypatch.setattr(recompute, "recomputed", None)
    monkeypatch.setattr("csqcli.reporting.build.recomputed", None)
    with pytest.raises(TypeError, match="not callable"):
        csq("report", Path(__file__).parents[1] / "file" / "fixtures" / "digits_schema1.safetensors", "--json")


def test_an_optimizer_that_needs_more_than_one_backward_pass_is_refused_by_name(tmp_path: Path) -> None:
    line = "optimizer.name=adahessian: needs more than one backward pass"
    with pytest.raises(UserError, match=line):
        csqcli.search(recipe="digits", target_bits=2, output=tmp_path, **SHORT | {"optimizer.name": "adahessian"})


def test_weights_without_memory_of_their_own_are_refused_by_the_optimizer_too() -> None:
    with pytest.raises(UserError, match=r"fc\.weight: has no shape yet"):
        find_layers(strangers.lazy(3))
    with pytest.raises(UserError, match=r"conv\.weight: is expanded"):
        csqcli.CSQ(strangers.expanded(3), target_bits=2, total_steps=5)


@pytest.mark.parametrize(
    "setting",
    ["optimizer.lr=1e308", "weight_decay=1e308", "finetune.lr=1e308", "adaptation.lr=1e308", "latent_lr=1e308"],
)
def test_rates_beyond_any_meaning_are_refused_before_the_run(csq: Csq, tmp_path: Path, setting: str) -> None:
    code, _, err = csq("search", "--recipe", "digits", "--target-bits", 2, "-o", tmp_path / "out", "--set", setting)
    assert (code, "less than or equal to 1000000" in err) == (2, True), err


def test_a_file_asks_for_no_more_threads_than_the_machine_has() -> None:
    from csqcli.recipe.resolve import resolve, resolve_stored

    stored = resolve("digits", {"threads": 1024}).to_dict()
    assert resolve_stored(stored, {}, where="file").threads == os.cpu_count()
    assert resolve_stored(stored, {"threads": 1000}, where="file").threads == 1000  # the user's own word


def test_a_clip_that_is_off_stops_no_search(tmp_path: Path) -> None:
    csqcli.search("strangers:unbounded", target_bits=2, data="digits", output=tmp_path, pretrained=False, **SHORT)
    others = file_io.read(tmp_path / "model.safetensors").others
    assert (others["most"], others["least"]) == (torch.inf, -torch.inf)


def test_a_buffer_that_becomes_infinite_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Trainer.run_epoch

    def run_epoch(self, *arguments, **more):
        line = original(self, *arguments, **more)
        self.model.register_buffer("table", torch.tensor(torch.inf))
        return line

    monkeypatch.setattr(loop.Trainer, "run_epoch", run_epoch)
    with pytest.raises(loop.NonFinite):
        csqcli.search("strangers:unbounded", target_bits=2, data="digits", output=tmp_path, pretrained=False, **SHORT)


def test_scores_that_become_non_finite_are_rolled_back_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = loop.evaluate, iter(range(99))

    def evaluate(*arguments, **more):
        if next(calls) == 0:
            raise BrokenScores("the model's scores are NaN or infinite")
        return original(*arguments, **more)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    settings = SHORT | {"optimizer.on_nonfinite": "rollback", "optimizer.schedule": "constant"}
    report = csqcli.search(recipe="digits", target_bits=2, output=tmp_path, **settings)
    assert report["history"][0]["lr"] == pytest.approx(0.5 * csqcli_rate())
    assert (tmp_path / "model.safetensors").exists()


def csqcli_rate() -> float:
    from csqcli.recipe.resolve import resolve

    return resolve("digits", {}).optimizer.lr


def test_inspect_takes_the_size_that_a_model_wants(csq: Csq) -> None:
    code, _, err = csq("inspect", "strangers:twelve_pixels")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot run on an image of 1×8×8" in err
    assert csq("inspect", "strangers:twelve_pixels", "--input-size", 12)[0] == 0
    code, _, err = csq("inspect", "strangers:lazy", "--num-classes", 3)
    assert (code, err.count("\n"), "lazy modules" in err) == (2, 1, True)


def test_no_name_steers_the_terminal_through_a_warning(csq: Csq) -> None:
    """Those of pytest's own logging aside, warnings go to stderr by logging's last resort."""
    csq("--version")
    assert logging.lastResort is not None
    record = logging.LogRecord("csqcli", logging.WARNING, "", 0, "%s: skipped", ("\x1b[2Jgone\n.png",), None)
    assert logging.lastResort.format(record) == "\\x1b[2Jgone\\n.png: skipped"
    out = io.StringIO()
    Display(console=Console(file=out)).say("a \x1b[2J")
    assert out.getvalue() == "a \\x1b[2J\n"


def test_an_activation_without_a_range_is_refused() -> None:
    from pydantic import ValidationError

    from csqcli.file.manifest import ActivationEntry

    for signed in (False, True):  # one bit is 0 or s, or −s or s (XNOR-Net)
        ActivationEntry(module="fc", bits=1, signed=signed, scale=0.1)
    for more in ({"scale": 1e39}, {"scale": 1e-320}, {"scale": 0.0}, {"bits": 0}):
        with pytest.raises(ValidationError):
            ActivationEntry(**{"module": "fc", "bits": 4, "signed": False, "scale": 0.1} | more)


@pytest.mark.parametrize("part", ["os:getcwd", "os:sep", "builtins:dict", "json:dumps", "collections:OrderedDict"])
def test_a_part_that_cannot_be_called_as_csq_calls_it_is_one_line(csq: Csq, tmp_path: Path, part: str) -> None:
    search = ("search", "--recipe", "digits", "--target-bits", 2, "-o", tmp_path / "out", "--set", "max_steps=1", "-q")
    fixture = Path(__file__).parents[1] / "file" / "fixtures" / "digits_schema1.safetensors"
    for command in (
        (*search, "--allocator", part),
        (*search, "--cost", part),
        ("evaluate", fixture, "--data", f"{part}:x"),
    ):
        code, _, err = csq(*command)
        assert (code, err.count("\n")) == (2, 1), err
        assert f"`{part}` " in err


@pytest.mark.parametrize("factory", ["half_precision", "scores_by_name"])
def test_a_model_of_another_precision_or_output_goes_through_every_command(
    csq: Csq, tmp_path: Path, factory: str
) -> None:
    code, err = searched(csq, tmp_path / "run", f"strangers:{factory}")
    assert code == 0, err
    for form in ("--bit-packed", "--bit-packed-small", "--int8-packed", "--state-dict"):
        code, _, err = csq("export", tmp_path / "run", form, "--trust-code", "-q")
        assert code == 0, err
    code, _, err = csq("evaluate", tmp_path / "run", "--data", "digits", "--trust-code", "--json")
    assert code == 0, err
    stored = file_io.read(tmp_path / "run" / "model.safetensors").state_dict()
    loaded = csqcli.load(tmp_path / "run", trust_code=True).state_dict()
    assert all(
        torch.equal(loaded[name], value) for name, value in stored.items()
    )  # not rounded to the factory's precision


def test_a_frozen_weight_is_trained_under_quantization_and_said(csq: Csq, tmp_path: Path) -> None:
    settings = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    words = ("--no-pretrained", "--data", "digits", "--target-bits", 2, "--method", "staged", "-o", tmp_path / "run")
    code, out, err = csq("search", "strangers:frozen_convolution", *words, *settings)
    assert code == 0, err
    assert "1 frozen weight tensor trained all the same: conv.weight\n" in out + err


def test_grey_images_that_a_factory_did_not_declare_are_told_how(csq: Csq, tmp_path: Path) -> None:
    code, err = searched(csq, tmp_path / "run", "strangers:undeclared", "--input-size", "8")
    assert code == 2
    assert 'a factory says what its model takes: model.data_config = {"input_size": (1, 28, 28)}' in err


@pytest.mark.parametrize(
    "rule",
    ["--target-bits 2 --set layers.keep=[nope]", "--target-bits 2 --set layers.exclude=[nope]", "--target-bits 0.5"],
)
def test_a_wrong_rule_is_told_before_anything_is_evaluated(csq: Csq, tmp_path: Path, rule: str) -> None:
    code, out, err = csq("search", "--recipe", "digits", *rule.split(), "-o", tmp_path / "run")
    assert code == 2
    assert "float" not in out + err
