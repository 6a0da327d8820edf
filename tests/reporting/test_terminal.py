"""The terminal's report: as wide as the terminal, never broken inside a word, in the signs that its encoding has."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from quantized_models import make_file
from rich.console import Console

from csqcli.file.manifest import Manifest, ParityRecord
from csqcli.reporting import layout
from csqcli.reporting.layout import ASCII, Column, Glyphs, print_columns, shortened, spark, wrapped
from csqcli.reporting.terminal import export_lines, print_coverage, print_plan, print_report

WIDTHS = (60, 80, 120, 200)
HISTORY = [{"epoch": n, "mean_bits": 8 / n, "val_top1": 90 + n, "masks": []} for n in range(1, 6)]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return make_file("csq:cifar_resnet20").manifest


def printed(manifest: Manifest, width: int, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    print_report(manifest, Console(file=out, width=width), history=HISTORY)
    out.flush()
    return raw.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal_and_every_word_is_whole(manifest: Manifest, width: int) -> None:
    lines = printed(manifest, width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    whole = " ".join(printed(manifest, 1000)).split()
    rows = len(manifest.layers)
    assert [word for word in words if word in ("weights;", "compression", "entropy", "smaller", "training")]
    assert set(words[-12:]) <= set(whole)
    assert sum("░" in line or "█" in line for line in lines) >= rows


def test_a_narrow_terminal_shows_fewer_columns_and_bits_always(manifest: Manifest) -> None:
    headings = [printed(manifest, width)[1].split() for width in (40, *WIDTHS)]
    assert [len(row) for row in headings] == sorted(len(row) for row in headings)
    assert all({"layer", "planes", "bits"} <= set(row) for row in headings)
    assert {"shape", "mask", "MACs"} <= set(headings[-1])


def test_planes_are_drawn_as_the_mask_has_them(manifest: Manifest) -> None:
    rows = printed(manifest, 120)[3:]
    for layer, row in zip(manifest.layers, rows, strict=False):
        assert layer.mask.replace("1", "█").replace("0", "░") in row
        assert layer.name.removesuffix(".weight") in row


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_bars_and_sparklines_are_ascii_where_the_encoding_has_no_blocks(manifest: Manifest, encoding: str) -> None:
    lines = printed(manifest, 60, encoding)
    assert any("##......" in line for line in lines)
    assert any("#-:.._ mean bits" in line or "mean bits" in line for line in lines if line.startswith("training"))
    assert "\\u" not in "".join(lines[:20])


def test_no_color_leaves_no_escape(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        out = io.StringIO()
        print_report(manifest, Console(file=out, force_terminal=True, color_system="standard", width=100))
        assert ("\x1b[36m" in out.getvalue()) == coloured


def test_a_name_is_shortened_in_the_middle_by_the_columns_it_takes() -> None:
    assert shortened("blocks.0.0.conv_pw", 10, Glyphs()) == "bloc…nv_pw"
    assert shortened("blocks.0.0.conv_pw", 10, ASCII) == "bloc..v_pw"
    assert layout.cell_len(shortened("层" * 20, 9, Glyphs())) <= 9


def test_a_line_is_broken_between_words_and_goes_on_under_its_beginning() -> None:
    assert wrapped("file         12 bytes and more of it", 30) == [
        "file         12 bytes and more",
        "             of it",
    ]
    word = "x" * 50
    assert wrapped(f"a {word} b", 30) == ["a", f"{'':<13}{word}", f"{'':<13}b"]


def test_a_sparkline_has_a_sign_per_value_up_to_its_width_and_ends_with_the_last() -> None:
    assert spark([0, 1, 2, 3, 4, 5, 6, 7], Glyphs()) == "▁▂▃▄▅▆▇█"
    assert spark([5, 5], Glyphs()) == "▁▁"
    many = spark([*range(999), 0], Glyphs(), most=20)
    assert (len(many), many[-1]) == (20, "▁")


def test_columns_of_the_highest_rank_go_first() -> None:
    out = io.StringIO()
    columns = [Column("name", ["a" * 30], shrinks=18), Column("kept", ["1"], rank=1), Column("gone", ["1"], rank=2)]
    print_columns(columns, Console(file=out, width=26), Glyphs())
    assert out.getvalue().splitlines()[0].split() == ["name", "kept"]


def test_coverage_lists_what_stays_float_and_why() -> None:
    found = {
        "layers": [{"name": "conv.weight", "shape": [8, 3, 3, 3], "weights": 216, "macs": None}],
        "left_float": [{"name": "pos_embed", "shape": [1, 4], "why": "no weight of a layer"}],
        "parameter_share": 0.9, "parameters": 240, "mac_share": 0.5, "macs": 1000, "input_size": [3, 8, 8],
    }  # fmt: skip
    out = io.StringIO()
    print_coverage(found, Console(file=out, width=80))
    text = out.getvalue()
    assert "never called" in text
    assert "float: no weight of a layer" in text
    assert "1 weight tensor: 90.00 % of 240 parameters" in text


def test_json_of_every_command_that_lists_is_json(csq) -> None:
    for command in ("methods", "recipes list", "recipes show digits", "recipes schema"):
        words = [*command.split(), *(["--json"] if command != "recipes schema" else [])]
        code, out, err = csq(*words)
        assert (code, err) == (0, "")
        json.loads(out)


def test_a_run_is_named_by_its_folder_or_its_file(digits_run: Path, tmp_path: Path, csq) -> None:
    by_folder, by_file = csq("report", digits_run), csq("report", digits_run / "model.safetensors")
    assert by_folder == by_file
    assert by_folder[0] == 0
    assert "training" in by_folder[1] or len(json.loads((digits_run / "report.json").read_text())["history"]) < 2
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    code, _, err = csq("report", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds an unfinished run" in err


@pytest.mark.parametrize(("columns", "widest"), [("0", 140), ("abc", 140), ("60", 60), (None, 140)])
def test_a_pipe_is_as_wide_as_columns_says(
    digits_run: Path, csq, monkeypatch: pytest.MonkeyPatch, columns: str | None, widest: int
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = csq("report", digits_run)
    assert code == 0
    assert "mean bits" in out
    assert widest - 60 < max(map(len, out.splitlines())) <= widest


PLAN = {
    "recipe": {
        "model": {"source": "resnet18"},
        "data": {"source": "/images", "batch_size": 64},
        "quantization": {"method": "staged"},
        **{"adaptation": {"epochs": 1}, "epochs": 5, "finetune": {"epochs": 0}},
    },
    "method_why": "",
    "layers": [
        {"name": "conv1.weight", "shape": [8, 3, 3, 3], "weights": 216, "planes": 3},
        {"name": "conv2.weight", "shape": [8, 8, 3, 3], "weights": 576, "planes": 2},
        {"name": "conv3.weight", "shape": [8, 8, 3, 3], "weights": 576, "planes": 2},
    ],
    "left_float": [{"name": "fc.weight", "shape": [10, 8], "why": "excluded by the recipe"}],
    **{"target_mean_bits": 2.5, "mean_bits": 2.1579},
    "bytes": {"model": 4321, "bit_packed_small": 1234},
    "memory": {"bytes": 3 * 2**20, "free_bytes": 2**31, "images": 64},
    "time": {"steps": 120, "step_seconds": 0.5, "evaluations": 1, "evaluation_seconds": 102.4, "seconds": 162},
}


def test_a_plan_says_in_a_few_lines_what_is_quantized_how_large_and_how_long() -> None:
    out = io.StringIO()
    print_plan(PLAN, Console(file=out, width=80))
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "model        resnet18 on /images",
        "method       staged",
        "training     1 epoch in float, 5 epochs of the search, batches of 64 images",
        "quantized    3 weight tensors, 1,368 weights",
        "left float   1 tensor: excluded by the recipe",
        "bits         2.16 of 2.5, planes as far as a few steps tell: 2 tensors at 2, 1",
        "             tensor at 3",
        "file         about 4,321 bytes; 1,234 bytes by `csq export --bit-packed-small`",
        "memory       about 3 MiB for steps of 64 images at once, 2.0 GiB are free",
        "time         about 3 min: 120 steps of 0.5 s, 1 evaluation of 102 s",
        "more         every tensor and the whole recipe: `csq plan … --verbose`",
    ]


def test_a_plan_in_full_goes_on_with_the_tensors_and_ends_in_the_recipe() -> None:
    short, full = io.StringIO(), io.StringIO()
    print_plan(PLAN, Console(file=short, width=80))
    print_plan(PLAN, Console(file=full, width=80), verbose=True)
    summary = short.getvalue().splitlines()[:-1]  # all but where there is more
    lines = full.getvalue().splitlines()
    assert lines[: len(summary)] == summary
    first_tensor = next(number for number, line in enumerate(lines) if line.startswith("conv1.weight"))
    assert len(summary) < first_tensor < lines.index("model:")
    assert lines[-1] == "  epochs: 0"


def test_shipped_recipes_stand_in_one_column_whatever_the_longest_is_called(
    csq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    lines = csq("recipes")[1].splitlines()
    begins = {line.index(line.split(None, 1)[1]) for line in lines}
    assert len(lines) > 5
    assert len(begins) == 1


@pytest.mark.parametrize(("tolerance", "said"), [(0.2, False), (0.4, True)])
def test_a_certificate_says_where_comparing_logits_proves_little(
    manifest: Manifest, tolerance: float, said: bool
) -> None:
    parity = ParityRecord(
        payload_sha256="", layers_matched=1, inputs="4 images", max_logit_error=0.1, logit_std=0.09, tolerance_in_std=tolerance,
        engine="torch", load_seconds=0.1,
    )  # fmt: skip
    lines = export_lines(manifest.model_copy(update={"parity": parity}))
    assert any("0.4 of their std is what rounding alone may do here" in line for line in lines) == said
