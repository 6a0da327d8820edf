"""Zeros that a runtime could use, against a count by loops over single weights, and by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_models import make_file

from csqcli.file import codes, io
from csqcli.reporting.recompute import recomputed
from csqcli.reporting.sparsity import count_sparsity, described, sentence, total


def by_loops(integers: np.ndarray, channel_dim: int) -> dict[str, int]:
    """The same counts, weight by weight."""
    other = 0 if channel_dim == 1 else 1
    filters, inputs = integers.shape[channel_dim], integers.shape[other]
    positions = list(itertools.product(*(range(size) for size in integers.shape[2:])))

    def at(f: int, i: int, position: tuple[int, ...]) -> int:
        return int(integers[(i, f, *position) if channel_dim == 1 else (f, i, *position)])

    full_f = [f for f in range(filters) if any(at(f, i, p) for i in range(inputs) for p in positions)]
    full_i = [i for i in range(inputs) if any(at(f, i, p) for f in range(filters) for p in positions)]
    kept = [
        sum(at(f, 4 * g + n, p) != 0 for n in range(4))
        for f in range(filters)
        for g in range(inputs // 4)
        for p in positions
    ]
    return {
        "weights": integers.size,
        "zeros": sum(int(value) == 0 for value in integers.flat),
        "filters": filters,
        "empty_filters": filters - len(full_f),
        "inputs": inputs,
        "empty_inputs": inputs - len(full_i),
        "left": len(full_f) * len(full_i) * len(positions),
        "groups": len(kept),
        "sparse_groups": sum(count <= 2 for count in kept),
    }


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((5, 9), 0), ((6, 8, 3, 3), 0), ((4, 7, 2, 2), 1), ((8, 1, 3, 3), 0), ((3, 4, 5), 0)]
)
def test_counts_are_those_of_a_loop_over_the_weights(shape: tuple[int, ...], channel_dim: int) -> None:
    integers = np.random.default_rng(3).integers(-1, 2, shape) * (np.random.default_rng(4).random(shape) < 0.6)
    filters = np.moveaxis(integers, channel_dim, 0)
    filters[1] = 0
    filters[:, 0] = 0 if shape[1] > 1 else filters[:, 0]
    found = count_sparsity(integers != 0, channel_dim=channel_dim)
    assert vars(found) == by_loops(integers, channel_dim)


def test_a_layer_by_hand() -> None:
    integers = np.array([[1, 0, 0, -2, 0], [0, 0, 0, 0, 0], [3, 0, 1, 1, 0]])
    found = count_sparsity(integers != 0)
    assert (found.zeros, found.empty_filters, found.empty_inputs) == (10, 1, 2)  # row 1; columns 1 and 4
    assert found.left == 2 * 3
    assert (found.groups, found.sparse_groups) == (3, 2)  # the fifth input makes no group; the last row has three


def test_the_model_s_numbers_are_sums_over_its_layers() -> None:
    empty, half = np.zeros((4, 8), dtype=bool), np.ones((4, 8), dtype=bool)
    half[:2] = False
    found = {"a": count_sparsity(empty), "b": count_sparsity(half), "c": count_sparsity(np.ones((32, 3), dtype=bool))}
    whole = described(found)
    assert whole is not None
    assert (whole["zeros"], whole["structured"]) == ((32 + 16) / 160, (32 + 16) / 160)
    assert (whole["empty_layers"], whole["filters"], whole["empty_filters"]) == (1, 40, 6)
    assert (whole["inputs"], whole["empty_inputs"]) == (19, 8)
    assert whole["two_of_four"] == 12 / 16
    assert [row["two_of_four"] for row in whole["layers"]] == [1.0, 0.5, None]
    assert total(found).weights == 160
    assert "empty: 1 of 3 layers, 6 of 40 filters, 8 of 19 input channels" in sentence(found)
    assert described({}) is None


@pytest.mark.parametrize("form", ["compact", "int8-packed", "bit-packed", "state-dict"])
def test_every_form_of_a_file_has_the_sparsity_of_its_integers(form: str, tmp_path: Path) -> None:
    file = make_file("quantized_models:Traps")
    io.write(tmp_path / "a.safetensors", file, form=form)  # type: ignore[arg-type]
    found = recomputed(tmp_path / "a.safetensors").sparsity
    for layer in file.layers:
        assert vars(found[layer.name]) == by_loops(layer.integers.numpy(), layer.channel_dim % layer.integers.dim())


@pytest.mark.parametrize("top", [1, 7, 127, 128])
def test_zeros_are_read_from_codes_of_every_width(top: int) -> None:
    integers = np.random.default_rng(0).integers(-top, top + 1, (7, 3, 3))
    integers[2], integers[0, 0, 0] = 0, top
    for encoding in (codes.encode(integers), codes.encode(np.zeros_like(integers))):
        found = codes.nonzero_encoded(*encoding, integers.shape)
        assert np.array_equal(found, codes.decode(*encoding, integers.shape) != 0)


@pytest.mark.parametrize("method", ["staged", "twn", "ste"])
def test_the_report_of_a_run_and_of_its_file_agree(method: str, tmp_path: Path, csq) -> None:
    planes = 1 if method == "twn" else 2
    run = ("search", "--recipe", "digits", "--method", method, "--target-bits", planes, "--epochs", 1, "--quiet")
    assert csq(*run, "--set", "max_steps=2", "-o", tmp_path)[0] == 0
    code, out, err = csq("report", tmp_path, "--json")
    assert code == 0, err
    report = json.loads(out)["sparsity"]
    assert report == json.loads((tmp_path / "report.json").read_text())["sparsity"]
    integers = {layer.name: layer.integers for layer in io.read(tmp_path / "model.safetensors").layers}
    for row in report["layers"]:
        assert row["zeros"] == float(torch.count_nonzero(integers[row["name"]] == 0)) / integers[row["name"]].numel()
    code, out, err = csq("report", tmp_path)
    assert (code, "% of weights are 0; empty: 0 of 4 layers" in " ".join(out.split())) == (0, True), err
