"""A run as one page: what was asked and reached, its figures, every layer, and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from csqcli.errors import UserError
from csqcli.file.manifest import LayerRecord, Manifest
from csqcli.file.sizes import bit_operations
from csqcli.reporting import charts, history
from csqcli.reporting.build import history_beside
from csqcli.reporting.figure import Figure
from csqcli.reporting.histogram import Histogram
from csqcli.reporting.page import Column, Section, cards, page, table
from csqcli.reporting.png import png
from csqcli.reporting.recompute import recomputed
from csqcli.reporting.run_figures import Figures, figures
from csqcli.reporting.sparsity import LayerSparsity, sentence
from csqcli.reporting.svg import element, escaped
from csqcli.reporting.words import layer_names, short, signed, size
from csqcli.system.files import replacing
from csqcli.version import __version__

_TERNARY = (
    "A plane holds a digit in {−1, 0, 1} for every weight, so one plane is ternary: k planes are what the paper calls k bits, "
    "and give 2^(k+1) − 1 levels. The paper's compression counts a plane as one bit and weights alone (32 ÷ mean planes); "
    "the measured one is the whole float model, 4 bytes a value, over the file as it lies on disk, with signs, scales, "
    "BatchNorm and description."
)
_MOST_CHANGES = 2000  # rows of a table that nobody reads to its end


@dataclass(frozen=True)
class _Shown:
    """What the page is about."""

    manifest: Manifest
    lines: list[Mapping[str, Any]]
    histograms: Mapping[str, Histogram]
    sparsity: Mapping[str, LayerSparsity]
    figures: Figures
    file: Path
    as_stated: Sequence[str]


def report_figures(file: Path) -> Figures:
    """The figures of a file and of the history beside it."""
    return _shown(file).figures


def write_figures(drawn: Figures, folder: Path, *, as_png: bool = False) -> list[Path]:
    """Each figure as an SVG, or a PNG, of its own in ``folder``, which is made; their paths. UserError where that cannot be
    written, and as :func:`csqcli.reporting.png.png`."""
    contents = [(f"{figure.name}.{'png' if as_png else 'svg'}", figure.svg()) for figure in drawn.all()]
    encoded = [(name, png(text) if as_png else text.encode()) for name, text in contents]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "is a file" if folder.is_file() else f"cannot be created ({error.strerror})"
        raise UserError(what, where=str(folder), hint="name a folder for the figures") from None
    paths = []
    for name, data in encoded:
        paths.append(folder / name)
        with replacing(paths[-1]) as temporary:
            temporary.write_bytes(data)
    return paths


def report_page(file: Path) -> str:
    """The HTML of a file's report. UserError for a file that is not csq's, or is damaged."""
    shown = _shown(file)
    manifest = shown.manifest
    sections = [Section("headline", "Asked and reached", _headline(shown)), *_figure_sections(shown)]
    if manifest.layers:
        sections.append(Section("layers", "Every layer", _layer_table(shown)))
    sections.append(Section("again", "Do it again", _again(shown)))
    subtitle = f"{shown.file.name}, {manifest.form}, {size(manifest.sizes.file_bytes or 0)}"
    return page(
        f"{manifest.model.source} at {_bits(manifest)}", subtitle, sections, footer=f"Written by csq {__version__}."
    )


def _shown(file: Path) -> _Shown:
    found = recomputed(file)
    lines = history.lines_of(history_beside(file))
    drawn = figures(found.manifest, lines, found.histograms)
    return _Shown(found.manifest, lines, found.histograms, found.sparsity, drawn, file, found.as_stated)


def _bits(manifest: Manifest) -> str:
    return f"{manifest.budget.mean_bits:.4g} bits" if manifest.layers else "32 bits (float)"


def _headline(shown: _Shown) -> str:
    manifest = shown.manifest
    sizes, budget, accuracy, compute = manifest.sizes, manifest.budget, manifest.accuracy, manifest.compute
    entries = []
    if accuracy.hard_top1 is not None:
        before = accuracy.float_top1
        change = (
            f"float {before:.2f} %, {signed(accuracy.hard_top1 - before)} points"
            if before is not None
            else "hard model"
        )
        entries.append(
            ("Top-1, float to hard", f"{accuracy.hard_top1:.2f} %", f"{change}; {accuracy.samples:,} images")
        )
    if manifest.layers:
        asked = f"asked {budget.target_mean_bits:g}" if budget.target_mean_bits is not None else "no target asked"
        over = f"{asked}; mean planes of {budget.total_weights:,} weights"
        entries.append(("Bits, asked to reached", f"{budget.mean_bits:.4f}", over))
    entries += _in_users_unit(shown)
    if sizes.file_bytes:
        entries.append(
            ("On disk", size(sizes.file_bytes), f"{sizes.file_bytes:,} bytes; float {size(sizes.float_bytes)}")
        )
        paper = sizes.paper_compression
        beside = (
            f"the paper's count: {f'{paper:.2f}×' if paper else 'without bound'}" if manifest.layers else "float model"
        )
        entries.append(("Compression, measured", f"{sizes.float_bytes / sizes.file_bytes:.2f}×", beside))
    if compute is not None:
        full = 32 * 32 * compute.macs
        share = f"{full / compute.bops:.1f}× fewer than float's" if compute.bops else "none"
        entries.append(("Bit operations", short(compute.bops), f"{share}; {short(compute.macs)} MACs an image"))
    words = [element("p", escaped(_TERNARY))] if manifest.layers else []
    if manifest.layers:
        words.append(element("p", escaped(
            f"Stored densely the planes and signs take {sizes.stored_bits_per_weight:.3f} bits per weight; an ideal coder "
            f"would need {sizes.entropy_bits_per_weight:.3f}."
        )))  # fmt: skip
    stated = ", ".join(shown.as_stated)
    words.append(element("p", escaped(
        f"Sizes, bits and bit operations on this page were counted again from the file's bytes. What only the file says: {stated}."
    )))  # fmt: skip
    return cards(entries) + "".join(words)


def _in_users_unit(shown: _Shown) -> list[tuple[str, str, str]]:
    """A budget of bytes or operations: what its recipe asked for, and what is there, counted here."""
    manifest, folder = shown.manifest, shown.file.parent
    quantization = manifest.recipe.get("quantization")
    asked = quantization if isinstance(quantization, Mapping) else {}
    entries = []
    bops, compute = _number(asked.get("target_bops")), manifest.compute
    if bops and compute is not None:
        used = f"asked {short(bops)}; {100 * compute.bops / bops:.1f} % used"
        entries.append(("Bit operations, asked to reached", short(compute.bops), used))
    form = asked.get("ship_as")
    bytes_, times = _number(asked.get("target_size")), _number(asked.get("target_compression"))
    if form not in ("bit-packed", "bit-packed-small") or not (bytes_ or times):
        return entries
    ships = folder / f"{shown.file.stem}-{form}.safetensors"
    reached = ships.stat().st_size if ships.is_file() else None
    name = f"{ships.name} beside it" if reached else f"{ships.name} is not beside it"
    if bytes_:
        used = f"; {100 * reached / bytes_:.1f} % used" if reached else ""
        big = size(reached) if reached else "not known"
        entries.append(("Size, asked to reached", big, f"asked {size(bytes_)}{used}; {name}"))
    if times:
        big = f"{manifest.sizes.float_bytes / reached:.2f}×" if reached else "not known"
        entries.append(("Compression, asked to reached", big, f"asked {times:g}×; {name}"))
    return entries


def _number(value: object) -> float | None:
    """A number above 0 out of a file's recipe, which may hold anything."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
    return float(value) if is_number else None  # type: ignore[arg-type]


def _figure_sections(shown: _Shown) -> list[Section]:
    drawn, found = shown.figures, []
    if drawn.planes:
        found.append(Section("planes-section", "Planes over depth", _all(drawn.planes)))
    if drawn.training:
        wide = [figure for figure in drawn.training if not figure.small]
        body = _pair([figure for figure in drawn.training if figure.small]) + _all(wide) + _changes(shown)
        found.append(Section("training-section", "Training", body))
    if drawn.integers:
        found.append(Section("integers-section", "Integers", _all(drawn.integers)))
    if drawn.cost:
        found.append(Section("cost-section", "Where the cost is", _pair(drawn.cost)))
    return found


def _all(drawn: Sequence[Figure]) -> str:
    return "".join(figure.html() for figure in drawn)


def _pair(drawn: Sequence[Figure]) -> str:
    return element("div", _all(drawn), class_="pair") if drawn else ""


def _changes(shown: _Shown) -> str:
    """Which plane of which layer was switched when, as a table under a heading to open."""
    layers = shown.manifest.layers
    by_epoch = history.masks(shown.lines, len(layers))
    found = list(history.plane_changes(by_epoch, [layer.name for layer in layers]))
    if not found:
        return ""
    rows = [
        [(escaped(change.layer), None), (f"2<sup>{change.plane}</sup>", change.plane), ("on" if change.on else "off", None),
         (f"{change.epoch}", change.epoch)]
        for change in found[:_MOST_CHANGES]
    ]  # fmt: skip
    columns = [Column("layer"), Column("plane", True), Column("switched"), Column("by the end of epoch", True)]
    more = f"; the first {_MOST_CHANGES} of {len(found)}" if len(found) > _MOST_CHANGES else ""
    caption = f"Planes by the place of their digit, 2^0 the finest; all were on before the first epoch{more}."
    return element(
        "details", "<summary>Which plane was switched when</summary>" + table("changes", caption, columns, rows)
    )


def _layer_table(shown: _Shown) -> str:
    manifest = shown.manifest
    total = sum(layer.packed_bytes for layer in manifest.layers) or 1
    names = layer_names([layer.name for layer in manifest.layers])
    inputs = {entry.module: entry.bits for entry in manifest.activations}
    headings = ("planes", "mask", "shape", "weights", "MACs", "BOPs", "stored", "entropy", "bytes", "share")
    columns = [Column("layer"), *(Column(name, name not in ("shape", "mask")) for name in headings)]
    if shown.sparsity:
        columns += [Column(name, True) for name in ("zeros", "empty filters", "empty inputs", "2:4")]
    columns.append(Column("integers"))
    rows = [
        [
            (escaped(name), None),
            (f"{layer.bits}", layer.bits),
            (element("code", layer.mask), None),
            (escaped("×".join(map(str, layer.shape))), None),
            (f"{layer.weights:,}", layer.weights),
            ("–" if layer.macs is None else escaped(short(layer.macs)), layer.macs or 0),
            (escaped(short(bit_operations(layer, inputs))), bit_operations(layer, inputs)),
            (f"{layer.stored_bits}", layer.stored_bits),
            (f"{layer.entropy_bits:.2f}", layer.entropy_bits),
            (f"{layer.packed_bytes:,}", layer.packed_bytes),
            (f"{100 * layer.packed_bytes / total:.1f} %", layer.packed_bytes),
            *_zeros(shown.sparsity.get(layer.name)),
            (_spark(layer, shown.histograms.get(layer.name)), None),
        ]
        for layer, name in zip(manifest.layers, names, strict=True)
    ]
    caption = (
        f"{len(rows)} quantized layers; mask: most significant plane first; stored and entropy in bits per weight."
    )
    left = [f"{entry.get('name')} ({entry.get('why')})" for entry in manifest.left_float]
    floats = element("p", escaped(f"Left in float: {', '.join(left)}.")) if left else ""
    sparse = element("p", escaped(f"Sparsity: {sentence(shown.sparsity)}.")) if shown.sparsity else ""
    return table("layer-table", caption, columns, rows) + sparse + floats


def _zeros(found: LayerSparsity | None) -> list[tuple[str, float | None]]:
    """What of a layer's sparsity a runtime could use, as cells; none where its integers could not be counted."""
    if found is None:
        return []
    groups = found.sparse_groups / found.groups if found.groups else None
    return [
        (f"{100 * found.zeros / found.weights:.1f} %", found.zeros / found.weights),
        (f"{found.empty_filters} of {found.filters}", found.empty_filters),
        (f"{found.empty_inputs} of {found.inputs}", found.empty_inputs),
        ("–" if groups is None else f"{100 * groups:.1f} %", groups or 0),
    ]


def _spark(layer: LayerRecord, found: Histogram | None) -> str:
    if found is None:
        return ""
    zeros = 100 * found.magnitudes[0] / layer.weights
    return charts.spark(found.bins, label=f"integers from {found.low} to {found.high}, {zeros:.0f} % zero")


def _again(shown: _Shown) -> str:
    """The command, the recipe that it needs and the environment of the run."""
    manifest = shown.manifest
    source = manifest.model.weights_from
    if manifest.model.checkpoint_sha256:
        source += f" (SHA-256 {manifest.model.checkpoint_sha256})"
    environment = element("dl", "".join(
        element("div", element("dt", escaped(name)) + element("dd", escaped(version) or " "))
        for name, version in manifest.environment.items()
    ) or " ", class_="cards")  # fmt: skip
    if manifest.recipe:
        command = "csq search --recipe recipe.yaml --output runs/again"
        recipe = yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True)
        how = element("p", escaped("With the recipe below as recipe.yaml (a run's folder holds it):"))
        how += element("pre", element("code", escaped(command)), tabindex="0")
        lines = "\n".join(map(escaped, recipe.splitlines()))
        how += element(
            "details", "<summary>recipe.yaml</summary>" + element("pre", element("code", lines), tabindex="0")
        )
    else:
        how = element("p", "The file holds no recipe: it was saved from a training loop of its author's own.")
    weights = element(
        "p",
        escaped(f"First weights: {source}. Integers (SHA-256): ") + element("code", escaped(manifest.payload_sha256)),
    )
    return how + weights + environment
