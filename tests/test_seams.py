"""Parts from outside the package, named on the command line, do what csq's own do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from outside import bytes_of_rows

from csqcli.quant.costs import LayerFacts

DIGITS = ("search", "--recipe", "digits", "--epochs", 2, "--quiet")
TERNARY = (*DIGITS, "--method", "outside:Ternary", "--target-bits", 1)


def test_a_method_from_outside_searches_resumes_finetunes_exports_and_evaluates(csq, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _, err = csq(*TERNARY, "--set", "threshold=0.5", "--output", run)
    assert code == 0, err
    report = json.loads((run / "report.json").read_text())
    assert report["recipe"]["quantization"]["method"] == "outside:Ternary"
    assert report["recipe"]["ternary"] == {"threshold": 0.5}
    assert {layer["bits"] for layer in report["layers"]} == {1}
    assert report["accuracy"]["hard_top1"] > 80

    file = run / "model.safetensors"
    code, out, err = csq("evaluate", file, "--data", "digits", "--json")
    assert code == 0, err
    assert json.loads(out)["top1"] == report["accuracy"]["hard_top1"]
    code, _, err = csq("export", file, "--bit-packed")
    assert code == 0, err

    again = (*TERNARY, "--set", "threshold=0.5", "--output", run, "--resume")
    assert csq(*again)[0] == 0  # a finished run
    code, _, err = csq("finetune", file, "--data", "digits", "--epochs", 1, "--quiet", "--output", tmp_path / "tuned")
    assert code == 2
    assert "the file asks to import the method `outside:Ternary`; pass --trust-code" in err
    code, _, err = csq(
        *("finetune", file, "--data", "digits", "--epochs", 1, "--quiet", "--output", tmp_path / "tuned"),
        "--trust-code",
    )
    assert code == 0, err
    recipe = json.loads((tmp_path / "tuned" / "report.json").read_text())["recipe"]
    assert recipe["quantization"]["method"] == "staged"  # which trains any delivered integers on


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--method", "outside:Ternary", "--set", "threshold=9"), "ternary.threshold: Input should be less than 3"),
        (("--method", "outside:Ternary", "--set", "treshold=1"), "unknown key `treshold`; did you mean `threshold`"),
        (("--method", "outside:Ternary", "--set", "latent_lr=1"), "`latent_lr` is a setting of method staged"),
        (("--method", "outside:Unfinished"), "`outside:Unfinished` lacks hard_layers, harden"),
        (("--method", "outside:bytes_of_rows"), "`outside:bytes_of_rows` is no weight method"),
        (("--method", "outside:Nothing"), "`outside` has no `Nothing`"),
        (("--method", "nowhere:Nothing"), "cannot import `nowhere`"),
        (("--allocator", "nowhere:f"), "cannot import `nowhere`"),
        (("--allocator", "hawk"), "no allocator `hawk`; one of uniform, importance"),
        (("--method", "ste", "--allocator", "outside:endless"), "not [4, 8] of finite numbers ≥ 0"),
        (("--cost", "outside:half_a_byte"), "the cost function gave [0.0, 0.5"),
        (("--cost", "watts"), "no cost `watts`; one of weights, bops"),
    ],
)
def test_mistakes_with_parts_from_outside_are_one_line(csq, tmp_path: Path, options: tuple, complaint: str) -> None:
    code, out, err = csq(*DIGITS, "--target-bits", 2, *options, "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("method", ["staged", "csq", "csq-uniform", "ste", "lsq"])
def test_an_allocator_from_outside_decides_the_planes_of_every_method(csq, tmp_path: Path, method: str) -> None:
    code, _, err = csq(
        *(*DIGITS, "--method", method, "--target-bits", 3, "--allocator", "outside:last_layers_first"),
        *("--output", tmp_path / "run"),
    )
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    # of 144, 4608, 13,824 and 480 weights: importance rises with depth, so that the largest gets more than the second
    assert [layer["bits"] for layer in report["layers"]] == [8, 2, 3, 8]


def test_the_importance_allocator_spends_the_budget_and_prefers_small_layers(csq, tmp_path: Path) -> None:
    code, _, err = csq(
        *(*DIGITS, "--method", "ste", "--target-bits", 2.5, "--allocator", "importance", "--output", tmp_path / "run")
    )
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    planes = {layer["name"]: layer["bits"] for layer in report["layers"]}
    assert planes["conv1.weight"] > planes["conv3.weight"]  # 144 weights next to 13,824
    assert 2.4 < report["budget"]["mean_bits"] <= 2.5


@pytest.mark.parametrize(
    ("cost", "method"), [("outside:bytes_of_rows", "staged"), ("outside:bytes_of_rows", "csq"), ("bops", "staged")]
)
def test_a_cost_sets_the_budget_that_the_result_keeps(csq, tmp_path: Path, cost: str, method: str) -> None:
    code, _, err = csq(
        *(*DIGITS, "--method", method, "--target-bits", 2.5, "--cost", cost, "--output", tmp_path / "run")
    )
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())

    def spent(planes_of) -> int:
        total = 0
        for layer in report["layers"]:
            facts = LayerFacts(layer["name"], tuple(layer["shape"]), layer["weights"], layer["macs"])
            planes = planes_of(layer)
            total += bytes_of_rows(facts, planes) if "outside" in cost else planes * layer["macs"] * 32
        return total

    asked = (spent(lambda layer: 2) + spent(lambda layer: 3)) / 2
    assert 0.8 * asked < spent(lambda layer: layer["bits"]) <= asked


def test_methods_lists_every_part_with_what_it_takes(csq) -> None:
    from csqcli.quant.catalog import ALLOCATORS, CARDS

    code, out, _ = csq("methods", "--json")
    assert code == 0
    found = json.loads(out)
    assert {card["name"] for card in found["methods"]} == set(CARDS)
    assert {card["name"] for card in found["allocators"]} == set(ALLOCATORS)
    assert all(card["summary"] for kind in found.values() for card in kind)
    text = csq("methods")[1]
    for name in (*CARDS, *ALLOCATORS, "bops", "auto"):
        assert name in text
    assert "Xiao et al." in text
