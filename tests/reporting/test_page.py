"""The report as a page: complete offline and without its script, and no name out of a file becomes markup."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from quantized_models import make_file

import csqcli
from csqcli.file import io
from csqcli.models.coverage import Operations
from csqcli.models.networks import digits_cnn
from csqcli.reporting import history
from csqcli.reporting.report_page import report_figures, report_page

HOSTILE = "</title></script></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
VOID = {"meta", "link", "input", "br", "img"}
FIGURES = {"planes", "mean-bits", "accuracy", "temperature", "loss", "planes-over-training", "integers"}


class Page(html.parser.HTMLParser):
    """The tags of a page, in order; AssertionError where they do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def lines(layers: int) -> list[dict[str, object]]:
    """Three epochs; the lowest plane of the first layer goes in the second, and comes back in the third."""
    full = ["11111111"] * layers
    masks = [full, ["11111110", *full[1:]], full]
    numbers = {"phase": "search", "beta": 2.0, "train_loss": 0.5}
    return [numbers | {"epoch": n + 1, "mean_bits": 8.0 - n, "val_top1": 90 + n, "masks": masks[n]} for n in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    file = make_file("csq:digits_cnn", classes=[str(n) for n in range(10)])
    io.write(folder / "model.safetensors", file)
    history_text = "".join(json.dumps(line) + "\n" for line in lines(len(file.layers)))
    (folder / "metrics.jsonl").write_text(history_text)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def shown(run: Path) -> str:
    return report_page(run)


def test_the_page_is_well_formed_and_says_the_numbers(shown: str, run: Path) -> None:
    page, manifest = Page(shown), io.read(run).manifest
    for words in (f"{manifest.budget.mean_bits:.4f}", f"{run.stat().st_size:,} bytes", "one plane is ternary"):
        assert words in page.text
    for layer in manifest.layers:
        assert layer.name.removesuffix(".weight") in page.text
    assert {attributes["id"] for attributes in page.all("figure")} >= FIGURES
    identifiers = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))


def test_nothing_on_the_page_comes_from_elsewhere(shown: str) -> None:
    page = Page(shown)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "xlink:href", "srcset"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, value)
        assert "style" not in attributes
    assert "url(" not in shown
    assert "@import" not in shown
    assert not {"iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}


def test_the_policy_allows_this_style_and_this_script_alone(shown: str) -> None:
    policy = next(m["content"] for m in Page(shown).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", shown, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")


def test_a_screen_reader_finds_its_way(shown: str) -> None:
    page = Page(shown)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == 1
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {a["href"][1:] for a in page.all("a") if a["href"]} <= targets
    for attributes in page.all("svg"):
        assert attributes["role"] == "img"
        assert attributes.get("aria-label") or set((attributes["aria-labelledby"] or "").split()) <= targets
    for section in page.all("section"):
        assert section["aria-labelledby"] in targets
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert len(page.all("caption")) == len([t for t in page.all("table") if t.get("class") == "sortable"])


def test_without_its_script_the_page_has_every_row_and_no_control(shown: str, run: Path) -> None:
    page = Page(shown)
    rows = [head for head in page.all("th") if head.get("scope") == "row"]
    assert len(rows) >= len(io.read(run).manifest.layers)
    assert page.all("button") == []
    assert [p for p in page.all("p") if p.get("class") == "filter" and "hidden" not in p] == []


def test_no_name_in_a_file_or_beside_it_becomes_markup(tmp_path: Path) -> None:
    harmless = make_file("csq:digits_cnn", classes=["a"] * 10)
    pages = {}
    for name, word in (("harmless", "conv9"), ("hostile", HOSTILE)):
        file = make_file("csq:digits_cnn", classes=[word] * 10)
        file.manifest.layers[0].name = word
        file.layers[0] = type(file.layers[0])(**vars(file.layers[0]) | {"name": word})
        file.manifest.model.weights_from = file.manifest.data_config["interpolation"] = word
        file.manifest.environment = {word: word}
        file.manifest.recipe = {"data": {"source": word}, word: [word]}
        file.manifest.left_float = [{"name": word, "shape": [1], "why": word}]
        file.manifest.payload_sha256 = io.payload_sha256(file.layers)
        file.manifest.data_config["interpolation"] = harmless.manifest.data_config["interpolation"]
        folder = tmp_path / name
        folder.mkdir()
        io.write(folder / "model.safetensors", file)
        beside = [line | {"phase": word} for line in lines(len(file.layers))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in beside))
        pages[name] = report_page(folder / "model.safetensors")
        for figure in report_figures(folder / "model.safetensors").all():
            ET.fromstring(figure.svg())
    plain, attacked = Page(pages["harmless"]), Page(pages["hostile"])
    assert [tag for tag, _ in attacked.tags] == [tag for tag, _ in plain.tags]
    assert {name for _, attributes in attacked.tags for name in attributes} == {
        name for _, attributes in plain.tags for name in attributes
    }
    assert "<script>alert" not in pages["hostile"]
    assert "alert(1)" in attacked.text


@pytest.mark.parametrize(
    "text",
    ["", "[]\n", "3\n", '{"mean_bits": "x", "masks": 3}\n' * 3, '{"mean_bits": 1e999}\n' * 2, "{broken",
     '{"mean_bits": true, "masks": ["2"], "val_top1": null, "phase": []}\n' * 3],
)  # fmt: skip
def test_a_history_that_anybody_wrote_does_no_harm(run: Path, tmp_path: Path, text: str) -> None:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(run.read_bytes())
    (tmp_path / "metrics.jsonl").write_text(text)
    Page(report_page(copy))
    assert "mean-bits" not in {figure.name for figure in report_figures(copy).all()}


def test_which_plane_was_switched_when_is_told() -> None:
    names = ["a", "b"]
    found = list(history.plane_changes(history.masks(lines(2), 2), names))
    assert [(change.epoch, change.layer, change.plane, change.on) for change in found] == [
        (2, "a", 0, False),
        (3, "a", 0, True),
    ]
    assert history.masks(lines(2), 3) == {}


@pytest.mark.parametrize("method", ["csq", "staged"])
def test_what_a_run_records_of_its_masks_is_what_it_trains_with(method: str) -> None:
    torch.manual_seed(0)
    model = digits_cnn()
    optimizer = csqcli.CSQ(model, target_bits=2, total_steps=10, method=method)
    for _ in range(10):
        model(torch.rand(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    found = optimizer.method.monitor(10)
    bits = [mask.count("1") for mask in found["masks"]]
    weights = [layer.weights for layer in optimizer.method.layers]
    assert {len(mask) for mask in found["masks"]} == {8}
    mean = sum(b * w for b, w in zip(bits, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(found["mean_bits"])


def test_the_masks_of_a_finished_run_end_with_those_of_its_file(digits_run: Path) -> None:
    report = json.loads((digits_run / "report.json").read_text())
    assert report["history"][-1]["masks"] == [layer["mask"] for layer in report["layers"]]


def test_epochs_are_counted_over_phases_and_their_starts_marked() -> None:
    beside = [{"phase": "float", "x": 1}, {"phase": "search", "x": None}, {"phase": "search", "x": 3}]
    assert history.series(beside, "x") == [(1, 1.0), (2, None), (3, 3.0)]
    assert history.phase_starts(beside) == [(2, "search")]


def test_a_figures_words_name_the_epochs_that_its_first_and_last_values_are_of(run: Path, tmp_path: Path) -> None:
    beside = [{"phase": "float", "val_top1": 80}, {"phase": "float", "val_top1": 85}, *lines(4)]
    beside.append({"phase": "finetune", "mean_bits": None, "val_top1": 93})
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(run.read_bytes())
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in beside))
    words = {figure.name: figure.description for figure in report_figures(copy).all()}
    assert words["mean-bits"].startswith("8 after epoch 3, 6 after epoch 5.")
    assert words["accuracy"].startswith("80 after epoch 1, 93 after epoch 6.")


def test_a_float_file_and_one_without_a_recipe_have_a_page(tmp_path: Path) -> None:
    file = make_file("csq:digits_cnn")
    file.manifest.recipe = {}
    io.write(tmp_path / "a.safetensors", file)
    assert "holds no recipe" in report_page(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"target_size": 2000},
            ["Size, asked to reached", "1.5 kB", "asked 2 kB; 75.0 % used", "model-bit-packed.safetensors beside it"],
        ),
        ({"target_compression": 4.0}, ["Compression, asked to reached", "asked 4×"]),
        ({"target_bops": 1e9}, ["Bit operations, asked to reached", "asked 1 G"]),
        ({"target_size": "<b>", "target_bops": float("nan"), "target_compression": -1}, []),
    ],
)
def test_budgets_in_the_users_unit_say_what_was_asked_and_what_is_there(
    asked: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    macs = {"conv1.weight": 100, "conv2.weight": 100, "conv3.weight": 100, "fc.weight": 10}
    file = make_file("csq:digits_cnn", operations=Operations((1, 8, 8), macs, 310))
    file.manifest.recipe = {"quantization": {"ship_as": "bit-packed", **asked}}
    io.write(tmp_path / "model.safetensors", file)
    (tmp_path / "model-bit-packed.safetensors").write_bytes(bytes(1500))
    text = Page(report_page(tmp_path / "model.safetensors")).text
    assert all(word in text for word in words), text[:900]
    if "target_compression" in asked and words:
        floats = 4 * sum(value.numel() for value in digits_cnn().state_dict().values())
        assert f"{floats / 1500:.2f}×" in text
    if not words:
        assert text.count("asked to reached") == 1  # bits alone


def test_the_command_writes_the_page_and_the_figures(run: Path, tmp_path: Path, csq) -> None:
    code, out, err = csq("report", run.parent, "--html", tmp_path / "r.html", "--svg", tmp_path / "figures")
    assert (code, err) == (0, "")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names >= FIGURES
    assert out.count("wrote ") == 1 + len(names)


def test_a_page_takes_the_place_of_no_model(run: Path, csq) -> None:
    before = run.read_bytes()
    code, _, err = csq("report", run, "--html", run)
    assert (code, err) == (2, f"csq: error: {run}: the page's name must end in .html\n")
    assert run.read_bytes() == before
