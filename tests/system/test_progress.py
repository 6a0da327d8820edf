"""What a person sees: named steps, a line a minute where nothing can be drawn, and when the whole run will be over."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from csqcli.system.progress import Display, counted, duration, fitted, planes_fixed, summary

LINE = {
    "epoch": 1,
    "train_loss": 0.5,
    "val_top1": 97.0,
    "mean_bits": 2.0,
    "beta": 31.0,
    "lr": 0.05,
    "images_per_second": 9,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def display(clock: Clock, *, terminal: bool = False, **more) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(console=Console(file=out, force_terminal=terminal, width=120), clock=clock, **more), out


def test_a_step_is_named_when_it_begins_and_every_minute_after(clock: Clock) -> None:
    shown, out = display(clock)
    with shown.step("evaluating", 100) as done:
        assert out.getvalue() == "evaluating …\n"
        for batch in range(1, 101):
            clock.now += 2
            done(batch)
    assert out.getvalue().splitlines()[1:] == [
        "evaluating: 30 of 100, 2 min left",  # 70 batches of 2 s
        "evaluating: 60 of 100, 80 s left",
        "evaluating: 90 of 100, 20 s left",
    ]


def test_evaluate_and_export_say_nothing_of_steps_that_are_soon_over(clock: Clock) -> None:
    shown, out = display(clock, names_steps=False, log_every=10)
    with shown.step("evaluating", 3) as done:
        clock.now += 9
        done(1)
    assert out.getvalue() == ""
    with shown.step("evaluating") as done:
        clock.now += 11
        done(1)
    assert out.getvalue() == "evaluating: 1\n"


def test_quiet_is_quiet(clock: Clock) -> None:
    shown, out = display(clock, quiet=True)
    with shown.step("a", 2) as done, shown.evaluation("b", 2) as told, shown.training(2, 2):
        clock.now += 1000
        done(1)
        told(1)
        shown.on_step(1, [0.5])
        shown.on_epoch(LINE)
    assert out.getvalue() == ""


def test_the_time_left_is_that_of_the_whole_run_from_the_second_step_on(clock: Clock) -> None:
    shown, _ = display(clock)
    with shown.evaluation("evaluating the float model", 4) as told:
        for batch in range(1, 5):
            clock.now += 5
            told(batch)
    with shown.training(epochs=3, steps_per_epoch=10, later_epochs=2):
        clock.now += 100  # what the first step spends on warming up is not expected again
        shown.on_step(1, [0.5])
        assert shown.time_left() is None
        clock.now += 2
        shown.on_step(2, [0.5])
        # 48 of 50 steps of 2 s; 5 evaluations after epochs and 2 of the delivered model, each of 4 batches of 5 s
        assert shown.time_left() == 48 * 2 + 7 * 4 * 5


def test_a_resumed_run_has_only_the_rest_left(clock: Clock) -> None:
    shown, _ = display(clock)
    with shown.training(epochs=3, steps_per_epoch=10, first_epoch=2, first_step=4):
        for step in (5, 6):
            clock.now += 3
            shown.on_step(step, [0.5])
        assert shown.time_left() == 4 * 3


def test_training_gives_a_line_a_minute_and_one_per_epoch(clock: Clock) -> None:
    shown, out = display(clock)
    with shown.training(epochs=2, steps_per_epoch=100, target_bits=2):
        for step in range(1, 101):
            clock.now += 1
            shown.on_step(step, [0.25])
        shown.on_epoch(LINE)
    lines = out.getvalue().splitlines()
    assert lines[0] == "epoch   1 of 2, step 60 of 100  loss 0.2500  about 2 min left"
    assert lines[1] == (
        "epoch   1 of 2  loss 0.5000  top-1 97.00 %  bits 2.00 of 2  lr 0.05  9 img/s  about 2 min left"
    )


def test_a_terminal_shows_bars_with_the_time_left(clock: Clock) -> None:
    shown, out = display(clock, terminal=True)
    with shown.training(epochs=2, steps_per_epoch=4):
        for step in range(1, 5):
            clock.now += 1
            shown.on_step(step, [0.25])
        with shown.evaluation("evaluating after epoch 1", 2) as told:
            told(1)
        shown.on_epoch(LINE)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    for part in ("epochs", "steps", "loss 0.250", "about", "epoch   1 of 2"):
        assert part in text


def test_planes_above_the_target_are_not_given_as_a_part_of_it() -> None:
    assert ("bits 8.00, target 2", 0) in summary(LINE | {"mean_bits": 8.0}, 2)
    assert ("bits 2.00 of 2", 0) in summary(LINE | {"mean_bits": 2.0000001}, 2)
    assert ("bits 8.00", 0) in summary(LINE | {"mean_bits": 8.0}, None)


def test_a_step_that_is_not_counted_shows_no_count(clock: Clock) -> None:
    shown, out = display(clock, terminal=True)
    with shown.step("loading PyTorch"):
        pass
    with shown.step("evaluating", 7):
        pass
    assert "?" not in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "0/7" in out.getvalue()


def test_numbers_agree_with_their_nouns() -> None:
    assert [counted(n, "image") for n in (0, 1, 1297)] == ["0 images", "1 image", "1,297 images"]
    assert [counted(n, "class") for n in (1, 2)] == ["1 class", "2 classes"]
    assert [duration(s) for s in (0.4, 89, 91, 3599, 3600, 11100)] == [
        "0 s", "89 s", "2 min", "1 h 00 min", "1 h 00 min", "3 h 05 min"
    ]  # fmt: skip


def test_planes_are_told_by_how_many_layers_have_how_many() -> None:
    assert (
        planes_fixed([2, 2, 3, 0], 1.987, 2)
        == "planes fixed: 1 layer at 0, 2 layers at 2, 1 layer at 3; bits 1.99 of 2"
    )
    assert planes_fixed([2], 2.001, 2).endswith("bits 2.00 of 2")
    assert "β" not in fitted(summary(LINE, 2), None)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (None, "epoch   1 of 20  loss 0.5000  top-1 97.00 %  bits 2.00 of 2  lr 0.05  9 img/s  about 2 min left"),
        (90, "epoch   1 of 20  loss 0.5000  top-1 97.00 %  bits 2.00 of 2  9 img/s  about 2 min left"),
        (80, "epoch   1 of 20  loss 0.5000  top-1 97.00 %  bits 2.00 of 2  about 2 min left"),
        (70, "epoch   1 of 20  top-1 97.00 %  bits 2.00 of 2  about 2 min left"),
        (20, "epoch   1 of 20  top-1 97.00 %  bits 2.00 of 2  about 2 min left"),
    ],
)
def test_an_epochs_line_leaves_out_first_what_matters_least(columns: int | None, said: str) -> None:
    parts = [("epoch   1 of 20", 0), *summary(LINE, 2), ("about 2 min left", 0)]
    assert fitted(parts, columns) == said


def test_no_line_is_wider_than_a_terminal_and_a_log_has_all_of_it(clock: Clock) -> None:
    long = "method staged: " + "soft masks priced by Fisher importance, " * 4
    command = f"next: csq evaluate {'/a/long/path' * 9} --data digits"
    for terminal in (True, False):
        out = io.StringIO()
        shown = Display(console=Console(file=out, force_terminal=terminal, width=80), clock=clock)
        shown.say(long)
        shown.say(command, whole=True)
        with shown.training(epochs=20, steps_per_epoch=4, target_bits=2):
            for step in range(1, 5):
                clock.now += 100
                shown.on_step(step, [0.25])
            shown.on_epoch(LINE)
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()
        assert command in lines
        assert (long.rstrip() in map(str.rstrip, lines)) != terminal
        assert any("lr 0.05" in line for line in lines) != terminal
        assert not terminal or max(len(line) for line in lines if line != command) <= 80


@pytest.mark.parametrize("method", ["staged", "csq"])
def test_a_search_names_its_slow_steps_and_the_planes_once(csq, tmp_path, method: str) -> None:
    code, _, err = csq(
        *(
            "search",
            "--recipe",
            "digits",
            "--target-bits",
            2,
            "--method",
            method,
            "--epochs",
            4,
            "-o",
            tmp_path / "run",
        ),
        *("--set", "max_steps=4", "--log-every", 0.1),
    )
    assert code == 0, err
    lines = err.splitlines()
    for name in ("loading PyTorch", "listing the images of digits", "loading csq:digits_cnn", "evaluating the float model",
                 "rehearsing the file", "recalibrating BatchNorm", "writing the file and reading it back"):  # fmt: skip
        assert f"{name} …" in lines
    assert len([line for line in lines if line.startswith("planes fixed: ")]) == 1
    assert any(re.search(r"bits \d\.\d\d of 2 .* about \d+ s left", line) for line in lines)
